//! From a place in a file to the functions there, by blazesym.
//!
//! The file is read through the descriptor that was opened while the target ran
//! it, as `/proc/self/fd/N`: its path may by now be another file, or name one in
//! another mount namespace. docs/symbols.md has the order in which names are looked for.
//! Links from file to file are followed before blazesym sees the file, since it opens
//! whatever they name: where there is one that leads elsewhere, it is told to read symbols
//! only.
//!
//! Files are hostile until proven otherwise: blazesym can panic on a malformed
//! one, and that is caught. Two things cannot be caught, and end the process: a
//! file that is cut short while blazesym has it mapped, and debug information
//! nested deeper than the stack of the thread.

use std::{
    fmt,
    fs::File,
    io,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use blazesym::symbolize::{
    CodeInfo, Input, Reason, Sym, Symbolized, Symbolizer,
    source::{Elf, Source as ElfSource},
};

use super::{
    demangle::demangle,
    separate::{self, Separate},
};
use crate::{
    address::FileOffset,
    process::{debug_info::leads_nowhere_else, elf::ElfLayout, mapping::MappedFile},
    symbolize::{
        frame::{FrameName, FunctionLine, UnknownReason},
        names::{NamedFile, Source},
    },
};

/// How many files stay parsed. Names that were found are cached elsewhere; this
/// saves parsing only for new places in the same files.
const PARSED_FILES: usize = 32;

/// Where distributions put what several debug files share (`.gnu_debugaltlink`).
const DEBUG_DIRECTORIES: [&str; 2] = ["/usr/lib/debug", "/lib/debug"];

/// One file with what blazesym parsed of it. A symbolizer a file, so that one
/// can be dropped without the others, and each has its own debug directories.
struct ParsedFile {
    key: NamedFile,
    /// Keeps the descriptor open that the symbolizer's path goes through.
    _file: Arc<MappedFile>,
    path: PathBuf,
    /// What it has elsewhere, and where its code belongs in memory.
    separate: Vec<Separate>,
    /// Its own debug information may be read.
    has_lines: bool,
    layout: ElfLayout,
    symbolizer: Symbolizer,
}

/// Names places in files. It stays on one thread: blazesym's symbolizer is not
/// `Send`.
#[derive(Default)]
pub struct Resolver {
    /// The most recently used last.
    parsed: Vec<ParsedFile>,
    /// Fewer than usual stay parsed.
    max_parsed: Option<usize>,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver")
            .field("parsed", &self.parsed.len())
            .finish()
    }
}

impl Resolver {
    /// A resolver that knows no file yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets so many files stay parsed, but not more than usual.
    pub fn limit(&mut self, max_parsed: usize) {
        self.max_parsed = Some(max_parsed.clamp(1, PARSED_FILES));
    }

    /// Names places in one file: as many names as offsets, in their order.
    pub fn resolve(&mut self, source: &Source, offsets: &[FileOffset]) -> Vec<FrameName> {
        self.try_resolve(source, offsets)
            .unwrap_or_else(|reason| vec![FrameName::Unknown(reason); offsets.len()])
    }

    fn try_resolve(
        &mut self,
        source: &Source,
        offsets: &[FileOffset],
    ) -> Result<Vec<FrameName>, UnknownReason> {
        let file = &source.file;
        let open = file.file.as_ref().ok_or(UnknownReason::FileUnreadable)?;
        check_magic(open)?;

        let parsed = self.take(source.key).unwrap_or_else(|| {
            // A file that is damaged here may have names all the same.
            let layout = ElfLayout::read(open).unwrap_or_default();
            ParsedFile {
                key: source.key,
                _file: Arc::clone(file),
                path: PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())),
                separate: separate::find(source, open, &layout),
                has_lines: leads_nowhere_else(open, &layout),
                layout,
                symbolizer: new_symbolizer(),
            }
        });
        // After a panic the symbolizer is dropped, so nobody sees what it left.
        let named = catch_unwind(AssertUnwindSafe(|| name_all(&parsed, offsets)));
        if let Ok(names) = named {
            self.keep(parsed);
            return Ok(names);
        }
        tracing::warn!(path = %file.path.display(), "malformed debug information; using symbols only");
        let path = parsed.path.clone();
        catch_unwind(|| {
            let mut names = vec![Err(UnknownReason::NotElf); offsets.len()];
            let source = NameSource {
                path: &path,
                debug_syms: false,
                layout: None,
            };
            name_missing(&new_symbolizer(), &source, offsets, &mut names);
            finish(names)
        })
        .map_err(|_| UnknownReason::NotElf)
    }

    /// Takes the file out, if it is parsed.
    fn take(&mut self, key: NamedFile) -> Option<ParsedFile> {
        let place = self.parsed.iter().position(|parsed| parsed.key == key)?;
        Some(self.parsed.remove(place))
    }

    /// Puts a file back as the most recently used.
    fn keep(&mut self, parsed: ParsedFile) {
        while self.parsed.len() >= self.max_parsed.unwrap_or(PARSED_FILES) {
            self.parsed.remove(0);
        }
        self.parsed.push(parsed);
    }
}

/// Says "not ELF" itself: blazesym's error does not tell it from a damaged file.
fn check_magic(file: &File) -> Result<(), UnknownReason> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == *b"\x7fELF" => Ok(()),
        Ok(()) => Err(UnknownReason::NotElf),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(UnknownReason::NotElf),
        Err(_) => Err(UnknownReason::FileUnreadable),
    }
}

fn new_symbolizer() -> Symbolizer {
    Symbolizer::builder()
        .enable_code_info(true)
        .enable_inlined_fns(true)
        // `demangle` does it, see there.
        .enable_demangling(false)
        // The key has changed if the file has.
        .enable_auto_reload(false)
        .set_debug_dirs(Some(DEBUG_DIRECTORIES))
        .build()
}

/// A name, or the reason known so far for having none.
type Found = Result<Vec<FunctionLine>, UnknownReason>;

/// Names by debug information, and by symbols where that has none or is damaged.
///
/// The order: lines before symbols, the file itself before others.
fn name_all(parsed: &ParsedFile, offsets: &[FileOffset]) -> Vec<FrameName> {
    let mut names = vec![Err(UnknownReason::NotElf); offsets.len()];
    let mut name_by = |path: &Path, debug_syms, layout| {
        let source = NameSource {
            path,
            debug_syms,
            layout,
        };
        name_missing(&parsed.symbolizer, &source, offsets, &mut names);
    };
    let layout = Some(&parsed.layout);
    for separate in parsed.separate.iter().filter(|other| other.has_lines) {
        name_by(&separate.path(), true, layout);
    }
    if parsed.has_lines {
        name_by(&parsed.path, true, None);
    }
    name_by(&parsed.path, false, None);
    for separate in &parsed.separate {
        name_by(&separate.path(), false, layout);
    }
    finish(names)
}

/// A file to take names from.
struct NameSource<'a> {
    path: &'a Path,
    /// By debug information, not by symbols.
    debug_syms: bool,
    /// Of the file that names are wanted for, if they are taken from another: that has the
    /// same addresses, and other places.
    layout: Option<&'a ElfLayout>,
}

/// Names those that have no name yet.
fn name_missing(
    symbolizer: &Symbolizer,
    source: &NameSource<'_>,
    offsets: &[FileOffset],
    names: &mut [Found],
) {
    let (missing, places): (Vec<&mut Found>, Vec<u64>) = names
        .iter_mut()
        .zip(offsets)
        .filter(|(name, _)| name.is_err())
        .filter_map(|(name, &offset)| match source.layout {
            Some(layout) => Some((name, layout.code_address(offset)?.0)),
            None => Some((name, offset.0)),
        })
        .unzip();
    if missing.is_empty() {
        return;
    }
    let NameSource {
        path,
        debug_syms,
        layout,
    } = *source;
    let mut elf = Elf::new(path);
    elf.debug_syms = debug_syms;
    let input = match layout {
        Some(_) => Input::VirtOffset(places.as_slice()),
        None => Input::FileOffset(places.as_slice()),
    };
    match symbolizer.symbolize(&ElfSource::Elf(elf), input) {
        Ok(results) => {
            for (name, result) in missing.into_iter().zip(results) {
                let found = function_lines(result);
                // Why there is no name, the file itself tells.
                if found.is_ok() || layout.is_none() {
                    *name = found;
                }
            }
        }
        Err(error) => {
            tracing::debug!(%error, path = %path.display(), debug_syms, "no names from this file");
        }
    }
}

fn finish(names: Vec<Found>) -> Vec<FrameName> {
    names
        .into_iter()
        .map(|found| found.map_or_else(FrameName::Unknown, FrameName::Known))
        .collect()
}

/// Leaf first, where blazesym has the containing function and then the inlined
/// ones from the outside in. It has already moved the lines: each is the one
/// that is executing in its function.
fn function_lines(result: Symbolized<'_>) -> Found {
    match result {
        // A function that debug information leaves nameless.
        Symbolized::Sym(sym) if sym.name.is_empty() => Err(UnknownReason::NoSymbol),
        Symbolized::Sym(Sym {
            name,
            code_info,
            inlined,
            ..
        }) => {
            let containing = function_line(&name, code_info.as_deref());
            Ok(inlined
                .iter()
                .rev()
                .map(|inlined| function_line(&inlined.name, inlined.code_info.as_ref()))
                .chain([containing])
                .collect())
        }
        Symbolized::Unknown(Reason::IgnoredError) => Err(UnknownReason::NotElf),
        Symbolized::Unknown(_) => Err(UnknownReason::NoSymbol),
    }
}

fn function_line(name: &str, code_info: Option<&CodeInfo<'_>>) -> FunctionLine {
    FunctionLine {
        function: demangle(name),
        file: code_info.map(|info| info.to_path().to_string_lossy().into_owned()),
        // Line 0 is DWARF's "no line".
        line: code_info
            .and_then(|info| info.line)
            .filter(|&line| line != 0),
    }
}

#[cfg(test)]
mod tests;
