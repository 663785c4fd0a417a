//! From a place in a file to the functions there, by blazesym.
//!
//! The file is read through the descriptor that was opened while the target ran
//! it, as `/proc/self/fd/N`: its path may by now be another file, or name one in
//! another mount namespace. blazesym canonicalizes that path, which gives the
//! path the file was opened by, so debug files are found next to it as well.
//!
//! Where debug information is looked for, when the file has a `.gnu_debuglink`:
//! the build id below `/usr/lib/debug`, the link's name in there, in the
//! original directory and in its `.debug`. blazesym compares the checksum, so
//! another namespace's file of the same name is never taken for it. Without a link, by
//! build id, also in the target's mount namespace, and in `.gnu_debugdata`: see
//! `separate`. Not found are `.dwp` packages and anything by debuginfod. Names
//! then come from the symbol tables, without lines.
//!
//! Files are hostile until proven otherwise: blazesym can panic on a malformed
//! one, and that is caught. Two things cannot be caught, and end the process: a
//! file that is cut short while blazesym has it mapped, and debug information
//! nested deeper than the stack of the thread.

use std::{
    fmt,
    fs::File,
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use blazesym::symbolize::{
    CodeInfo, Input, Reason, Sym, Symbolized, Symbolizer,
    source::{Elf, Source},
};

use super::{
    demangle::demangle,
    separate::{self, Separate},
};
use crate::{
    address::FileOffset,
    process::{elf::ElfLayout, mapping::MappedFile},
    symbolize::frame::{FrameName, FunctionLine, UnknownReason},
};

/// How many files stay parsed. Names that were found are cached elsewhere; this
/// saves parsing only for new places in the same files.
const PARSED_FILES: usize = 32;

/// Where distributions put debug files.
const DEBUG_DIRECTORIES: [&str; 2] = ["/usr/lib/debug", "/lib/debug"];

/// A file's content, as far as the file system can tell: equal keys, equal
/// names. Of the open file, since a path can be another file by now; with its
/// change time, since inode numbers are used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileKey {
    device: u64,
    inode: u64,
    size_bytes: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl FileKey {
    /// The key of an open regular file.
    ///
    /// # Errors
    ///
    /// If the file's metadata cannot be read, or it is not a regular file.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            changed_s: metadata.ctime(),
            changed_ns: metadata.ctime_nsec(),
        })
    }
}

/// One file with what blazesym parsed of it. A symbolizer a file, so that one
/// can be dropped without the others, and each has its own debug directories.
struct ParsedFile {
    key: FileKey,
    /// Keeps the descriptor open that the symbolizer's path goes through.
    _file: Arc<MappedFile>,
    path: PathBuf,
    /// What it has elsewhere, and where its code belongs in memory.
    separate: Vec<Separate>,
    layout: ElfLayout,
    symbolizer: Symbolizer,
}

/// Names places in files. It stays on one thread: blazesym's symbolizer is not
/// `Send`.
#[derive(Default)]
pub struct Resolver {
    /// The most recently used last.
    parsed: Vec<ParsedFile>,
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

    /// Names places in one file: as many names as offsets, in their order.
    pub fn resolve(&mut self, file: &Arc<MappedFile>, offsets: &[FileOffset]) -> Vec<FrameName> {
        self.try_resolve(file, offsets)
            .unwrap_or_else(|reason| vec![FrameName::Unknown(reason); offsets.len()])
    }

    fn try_resolve(
        &mut self,
        file: &Arc<MappedFile>,
        offsets: &[FileOffset],
    ) -> Result<Vec<FrameName>, UnknownReason> {
        let open = file.file.as_ref().ok_or(UnknownReason::FileUnreadable)?;
        let key = FileKey::of(open).map_err(|_| UnknownReason::FileUnreadable)?;
        check_magic(open)?;

        let parsed = self.take(key).unwrap_or_else(|| {
            // A file that is damaged here may have names all the same.
            let layout = ElfLayout::read(open).unwrap_or_default();
            ParsedFile {
                key,
                _file: Arc::clone(file),
                path: PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())),
                separate: separate::find(file, open, &layout),
                layout,
                symbolizer: new_symbolizer(&file.path),
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
            name_missing(&new_symbolizer(&file.path), &source, offsets, &mut names);
            finish(names)
        })
        .map_err(|_| UnknownReason::NotElf)
    }

    /// Takes the file out, if it is parsed.
    fn take(&mut self, key: FileKey) -> Option<ParsedFile> {
        let place = self.parsed.iter().position(|parsed| parsed.key == key)?;
        Some(self.parsed.remove(place))
    }

    /// Puts a file back as the most recently used.
    fn keep(&mut self, parsed: ParsedFile) {
        if self.parsed.len() >= PARSED_FILES {
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

/// A symbolizer for the file that the target sees at `path`.
fn new_symbolizer(path: &Path) -> Symbolizer {
    let beside = path.parent().filter(|directory| directory.is_absolute());
    let directories = DEBUG_DIRECTORIES
        .iter()
        .map(PathBuf::from)
        .chain(beside.map(Path::to_path_buf))
        .chain(beside.map(|directory| directory.join(".debug")));
    Symbolizer::builder()
        .enable_code_info(true)
        .enable_inlined_fns(true)
        // `demangle` does it, see there.
        .enable_demangling(false)
        // The key has changed if the file has.
        .enable_auto_reload(false)
        .set_debug_dirs(Some(directories))
        .build()
}

/// A name, or the reason known so far for having none.
type Found = Result<Vec<FunctionLine>, UnknownReason>;

/// Names by debug information, and by symbols where that has none or is damaged.
///
/// The order: lines before symbols, the file itself before others.
fn name_all(parsed: &ParsedFile, offsets: &[FileOffset]) -> Vec<FrameName> {
    let mut names = vec![Err(UnknownReason::NotElf); offsets.len()];
    for separate in parsed.separate.iter().filter(|other| other.has_lines) {
        let source = NameSource {
            path: &separate.path(),
            debug_syms: separate.has_lines,
            layout: Some(&parsed.layout),
        };
        name_missing(&parsed.symbolizer, &source, offsets, &mut names);
    }
    for debug_syms in [true, false] {
        let source = NameSource {
            path: &parsed.path,
            debug_syms,
            layout: None,
        };
        name_missing(&parsed.symbolizer, &source, offsets, &mut names);
    }
    for separate in parsed.separate.iter().filter(|other| !other.has_lines) {
        let source = NameSource {
            path: &separate.path(),
            debug_syms: separate.has_lines,
            layout: Some(&parsed.layout),
        };
        name_missing(&parsed.symbolizer, &source, offsets, &mut names);
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
    match symbolizer.symbolize(&Source::Elf(elf), input) {
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
