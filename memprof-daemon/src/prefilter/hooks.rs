//! The functions of an allocator in a process, and whether all of them can be entered by a
//! jump: half of an allocator would count blocks that are never freed.

use std::{fs::File, io, ops::RangeInclusive, path::PathBuf};

use memprof_common::function::Function;

use super::relocate::{self, Displaced, JUMP_BYTES, displace_behind_first};
use crate::{
    probe::{
        find::{self, AllocatorModule, FoundSite},
        jumps,
    },
    process::{
        elf::{ElfError, ElfLayout},
        mapping::MappingTable,
    },
};

/// A function to be entered by a jump.
#[derive(Clone, Debug)]
pub struct Hook {
    /// What it is, by the meaning of its arguments.
    pub function: Function,
    /// Its name.
    pub symbol: &'static str,
    /// Where the jump goes: its second instruction if the first can stay, as `endbr64` does;
    /// else the first.
    pub entry: u64,
    /// The instructions that make space for it.
    pub displaced: Displaced,
    /// Where the function is that is called in its place: see [`FoundSite::twin`].
    pub twin: Option<u64>,
}

/// Why an allocator cannot be entered by jumps.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// One of its functions cannot.
    #[error("{}: {}: {reason}", module.display(), symbol)]
    Function {
        /// The file.
        module: PathBuf,
        /// The function.
        symbol: &'static str,
        /// Why.
        reason: Refusal,
    },
    /// Its file says too little.
    #[error("{}: {source}", module.display())]
    File {
        /// The file.
        module: PathBuf,
        /// What is wrong with it.
        source: ElfError,
    },
}

/// Why a function cannot be entered by a jump.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// By its own code.
    #[error(transparent)]
    Relocation(#[from] relocate::Refusal),
    /// Code elsewhere in the file leads to its first instructions.
    #[error("code elsewhere leads to within its first instructions")]
    JumpTarget,
    /// There is more code than is searched for jumps.
    #[error("its file has too much code to search for jumps")]
    FileTooLarge,
    /// Something else begins within its first instructions.
    #[error("another symbol is within its first instructions")]
    OtherSymbol,
    /// Another function's first instructions are its own.
    #[error("its first instructions are those of {0} too")]
    Overlap(&'static str),
    /// It may throw through a stub that has called it.
    #[error("it may throw, and its file has no other that does the same and does not")]
    Throws,
    /// The user has named it.
    #[error("it is named by --function")]
    Pool,
    /// It is not in the file's code.
    #[error("it is not in the file's code")]
    NotInCode,
    /// Its code is not in the process as the file has it.
    #[error("its code cannot be read in the process: {0}")]
    Unreadable(io::Error),
    /// A debugger or uprobe is there.
    #[error("another tool has a breakpoint at {0:#x}")]
    Breakpoint(u64),
    /// The program or another tool has changed it.
    #[error("its code in the process is not that of the file: changed at {0:#x}")]
    Changed(u64),
}

/// Where `module` is loaded: what to add to addresses of the file. More than once, if
/// several namespaces of the loader have it each for itself.
///
/// # Errors
///
/// The file cannot be read.
pub fn load_biases(
    module: &AllocatorModule,
    mappings: &MappingTable,
) -> Result<Vec<u64>, HookError> {
    let (_, layout) = open(module)?;
    let mut biases = Vec::new();
    for mapping in mappings.iter() {
        let of_it = mapping.file.as_ref().is_some_and(|file| {
            (file.device, file.inode) == (module.file.device, module.file.inode)
        });
        if !of_it {
            continue;
        }
        let size = mapping.end.0.saturating_sub(mapping.start.0);
        let mapped = mapping.file_offset.0..mapping.file_offset.0.saturating_add(size);
        for segment in layout.segments.iter().filter(|segment| segment.executable) {
            let start = segment.file_offset.0;
            if start < mapped.end && start.saturating_add(segment.file_size) > mapped.start {
                let base = mapping.start.0.wrapping_sub(mapping.file_offset.0);
                let bias = base.wrapping_add(start).wrapping_sub(segment.address.0);
                if !biases.contains(&bias) {
                    biases.push(bias);
                }
            }
        }
    }
    Ok(biases)
}

/// A jump into every function of `module`, by address, where it is loaded with `bias`.
/// `read` reads the process's memory.
///
/// # Errors
///
/// One of its functions cannot be entered by a jump.
pub fn hooks_of(
    module: &AllocatorModule,
    bias: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Result<Vec<Hook>, HookError> {
    let refused = |symbol| {
        move |reason: Refusal| HookError::Function {
            module: module.file.path.clone(),
            symbol,
            reason,
        }
    };
    let (file, layout) = open(module)?;
    let mut all = Vec::with_capacity(module.sites.len());
    let mut others = Vec::new();
    for site in &module.sites {
        match hook(module, &layout, site, bias, &mut read) {
            Ok(found) => all.push(found),
            Err(reason) => others.push((site, reason)),
        }
    }
    // What leads to a function that is entered need not be: the call is seen there.
    let entered: Vec<u64> = all
        .iter()
        .map(|(start, _)| start.wrapping_sub(bias))
        .collect();
    for (site, reason) in others {
        let address = layout.code_address(site.file_offset);
        let leads_on = address.is_some_and(|address| {
            let function = (site.function, address.0);
            find::always_leads_to(file, &layout, function, &entered)
        });
        if !leads_on {
            return Err(refused(site.symbol)(reason));
        }
    }
    let mut hooks = without_thunks(all);
    hooks.sort_by_key(|hook| hook.entry);
    for pair in hooks.windows(2) {
        if let [first, second] = pair
            && second.entry < first.displaced.end()
        {
            let reason = Refusal::Overlap(first.symbol);
            return Err(refused(second.symbol)(reason));
        }
    }
    for (hook, reason) in hooks
        .iter()
        .zip(check_file(file, &layout, &hooks, bias).map_err(|source| file_error(module, source))?)
    {
        if let Some(reason) = reason {
            return Err(refused(hook.symbol)(reason));
        }
    }
    Ok(hooks)
}

fn file_error(module: &AllocatorModule, source: ElfError) -> HookError {
    HookError::File {
        module: module.file.path.clone(),
        source,
    }
}

fn open(module: &AllocatorModule) -> Result<(&File, ElfLayout), HookError> {
    let file = module.file.file.as_ref();
    let file = file.ok_or_else(|| ElfError::Io(io::ErrorKind::NotFound.into()));
    file.and_then(|file| Ok((file, ElfLayout::read(file)?)))
        .map_err(|source| file_error(module, source))
}

/// Where a function starts, and its hook.
fn hook(
    module: &AllocatorModule,
    layout: &ElfLayout,
    site: &FoundSite,
    bias: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Result<(u64, Hook), Refusal> {
    if site.function.is_pool() {
        return Err(Refusal::Pool);
    }
    let address = layout.code_address(site.file_offset);
    let address = address.ok_or(Refusal::NotInCode)?.0.wrapping_add(bias);
    let code = module.code(site).map_err(Refusal::Unreadable)?;
    let twin = match site.twin {
        Some(twin) => Some(layout.code_address(twin).ok_or(Refusal::NotInCode)?),
        None if site.function.throws() => return Err(Refusal::Throws),
        None => None,
    };
    let displaced = displace_behind_first(&code, address)?;
    let length = displaced.end().wrapping_sub(address);
    let expected = usize::try_from(length).ok().and_then(|end| code.get(..end));
    compare(expected.unwrap_or_default(), address, read)?;
    let hook = Hook {
        function: site.function,
        symbol: site.symbol,
        entry: displaced.address,
        displaced,
        twin: twin.map(|twin| twin.0.wrapping_add(bias)),
    };
    Ok((address, hook))
}

/// The hooks but for those of functions that give a block up and are nothing but a jump to
/// another that does, as `free_sized` can be: each call is seen there, and would count twice.
/// The others' calls of each other are told apart as they are made.
fn without_thunks(all: Vec<(u64, Hook)>) -> Vec<Hook> {
    let frees: Vec<RangeInclusive<u64>> = all
        .iter()
        .filter(|(_, hook)| hook.function.is_free())
        .map(|(start, hook)| *start..=hook.entry)
        .collect();
    let is_thunk = |hook: &Hook| {
        let goal = hook.displaced.passes_on_to();
        hook.function.is_free()
            && goal.is_some_and(|goal| frees.iter().any(|free| free.contains(&goal)))
    };
    let hooks = all.into_iter().map(|(_, hook)| hook);
    hooks.filter(|hook| !is_thunk(hook)).collect()
}

/// Checks that memory has what the file has.
fn compare(
    expected: &[u8],
    address: u64,
    read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Result<(), Refusal> {
    const INT3: u8 = 0xcc;
    let mut found = vec![0; expected.len()];
    read(address, &mut found).map_err(Refusal::Unreadable)?;
    let differs = expected.iter().zip(&found).position(|(a, b)| a != b);
    let Some(differs) = differs else {
        return Ok(());
    };
    let at = address.wrapping_add(differs as u64);
    Err(if found.get(differs) == Some(&INT3) {
        Refusal::Breakpoint(at)
    } else {
        Refusal::Changed(at)
    })
}

/// What the rest of the file has against each hook.
fn check_file(
    file: &File,
    layout: &ElfLayout,
    hooks: &[Hook],
    bias: u64,
) -> Result<Vec<Option<Refusal>>, ElfError> {
    let inside: Vec<RangeInclusive<u64>> = hooks
        .iter()
        .map(|hook| {
            let inside = hook.displaced.inside();
            let last = inside.end.wrapping_sub(1);
            inside.start.wrapping_sub(bias)..=last.wrapping_sub(bias)
        })
        .collect();
    debug_assert!(
        hooks
            .iter()
            .all(|hook| hook.displaced.bytes.len() >= JUMP_BYTES)
    );
    let targets = jumps::targets(file, &layout.segments, &inside)?;
    let symbols = find::ranges_with_symbols(file, layout, &inside)?;
    let Some(targets) = targets else {
        return Ok(hooks.iter().map(|_| Some(Refusal::FileTooLarge)).collect());
    };
    let reason = |(is_target, has_symbol)| match (is_target, has_symbol) {
        (true, _) => Some(Refusal::JumpTarget),
        (_, true) => Some(Refusal::OtherSymbol),
        _ => None,
    };
    Ok(targets.into_iter().zip(symbols).map(reason).collect())
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
