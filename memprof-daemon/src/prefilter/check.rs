//! Whether a process can have the prefilter, as far as that can be told without stopping
//! it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
};

use super::{
    attach::ModuleHooks,
    error::PrefilterError,
    hooks::{hooks_of, load_biases},
};
use crate::{
    probe::find::AllocatorModule,
    process::{info::ProcessError, mapping::MappingTable},
};

/// The hooks of every module, if all can be hooked and nothing else is in the way.
///
/// # Errors
///
/// Why not.
pub fn check(
    pid: u32,
    mappings: &MappingTable,
    modules: &[AllocatorModule],
) -> Result<Vec<ModuleHooks>, PrefilterError> {
    require_lzcnt(std::arch::is_x86_feature_detected!("lzcnt"))?;
    if pid == std::process::id() {
        return Err(PrefilterError::Myself);
    }
    let memory = File::open(format!("/proc/{pid}/mem"))
        .map_err(|error| ProcessError::from_io(pid, error))?;
    let mut all = Vec::with_capacity(modules.len());
    for module in modules {
        // Several, if it is loaded into several namespaces of the loader.
        for bias in load_biases(module, mappings)? {
            let hooks = hooks_of(module, bias, |address, bytes| {
                memory.read_exact_at(bytes, address)
            })?;
            if !hooks.is_empty() {
                all.push(ModuleHooks {
                    path: module.file.path.clone(),
                    hooks,
                });
            }
        }
    }
    if all.is_empty() {
        return Err(PrefilterError::NotMapped);
    }
    Ok(all)
}

/// Older processors execute another instruction in its place.
fn require_lzcnt(has_lzcnt: bool) -> Result<(), PrefilterError> {
    has_lzcnt.then_some(()).ok_or(PrefilterError::NoLzcnt)
}

/// A process has one tracer at a time, and each of its threads can have another.
///
/// # Errors
///
/// Who traces it.
pub fn require_untraced(pid: u32) -> Result<(), PrefilterError> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|error| ProcessError::from_io(pid, error))?;
    for task in tasks.flatten() {
        // A thread that has ended is nobody's.
        let Ok(status) = fs::read_to_string(task.path().join("status")) else {
            continue;
        };
        let tracer = status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"))
            .and_then(|tracer| tracer.trim().parse().ok())
            .unwrap_or(0);
        if tracer != 0 {
            let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            return Err(PrefilterError::Traced {
                name: name.trim_end().to_owned(),
                pid: tracer,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a processor without the instruction is refused, and said to be, and that
    /// memprof does not stop itself.
    #[test]
    fn refusals() {
        assert!(require_lzcnt(true).is_ok());
        let error = require_lzcnt(false).unwrap_err();
        assert!(error.to_string().contains("LZCNT"), "{error}");
        let myself = check(std::process::id(), &MappingTable::default(), &[]);
        assert!(matches!(myself, Err(PrefilterError::Myself)), "{myself:?}");
    }
}
