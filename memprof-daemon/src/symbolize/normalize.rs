//! From an address in a process to a place in a file.

use std::sync::Arc;

use crate::{
    address::{AbsAddr, FileOffset},
    process::mapping::{MappedFile, Mapping},
    symbolize::frame::UnknownReason,
};

/// Where an address belongs.
#[derive(Clone, Debug)]
pub enum Normalized {
    /// In a file, where a name can be looked for.
    InFile {
        /// The mapping that holds it.
        mapping: Arc<Mapping>,
        /// The mapping's file.
        file: Arc<MappedFile>,
        /// The instruction's place in the file.
        file_offset: FileOffset,
    },
    /// In no file: no name can be had.
    Nowhere {
        /// The mapping that holds it, if there is one.
        mapping: Option<Arc<Mapping>>,
        /// Why there is no file.
        reason: UnknownReason,
    },
}

/// Finds the place in a file of the instruction that a frame of a stack stands at.
///
/// That is the call, not the return address: after a call that never returns, the return
/// address can be the first byte of the next function, or of the next mapping.
#[must_use]
pub fn normalize(address: AbsAddr, lookup: impl Fn(AbsAddr) -> Option<Arc<Mapping>>) -> Normalized {
    let held = lookup(address)
        .filter(|mapping| mapping.start <= address && address < mapping.end)
        .and_then(|mapping| {
            let into_mapping = address.0.checked_sub(mapping.start.0)?;
            let file_offset = mapping.file_offset.0.checked_add(into_mapping)?;
            Some((mapping, FileOffset(file_offset)))
        });
    let Some((mapping, file_offset)) = held else {
        return Normalized::Nowhere {
            mapping: None,
            reason: UnknownReason::Unmapped,
        };
    };
    match &mapping.file {
        Some(file) => Normalized::InFile {
            file: Arc::clone(file),
            mapping,
            file_offset,
        },
        None => Normalized::Nowhere {
            reason: reason_without_file(&mapping.name),
            mapping: Some(mapping),
        },
    }
}

/// What the kernel's name for a mapping says about why it has no file.
fn reason_without_file(name: &str) -> UnknownReason {
    match name {
        "[vdso]" | "[vsyscall]" => UnknownReason::Vdso,
        path if path.starts_with('/') => UnknownReason::FileUnreadable,
        _ => UnknownReason::Anonymous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{address::FrameAddress, process::debug_info::DebugInfo};

    fn mapping(name: &str, with_file: bool) -> Arc<Mapping> {
        Arc::new(Mapping {
            start: AbsAddr(0x7000),
            end: AbsAddr(0x8000),
            file_offset: FileOffset(0x2000),
            file: with_file.then(|| {
                Arc::new(MappedFile {
                    path: name.into(),
                    device: 1,
                    inode: 2,
                    build_id: None,
                    debug_info: DebugInfo::Missing,
                    file: None,
                })
            }),
            name: name.to_owned(),
        })
    }

    fn normalize_in(mapping: &Arc<Mapping>, return_address: u64) -> Normalized {
        normalize(
            FrameAddress(AbsAddr(return_address)).call_site(),
            |address| {
                (mapping.start <= address && address < mapping.end).then(|| Arc::clone(mapping))
            },
        )
    }

    fn reason(normalized: &Normalized) -> Option<UnknownReason> {
        match normalized {
            Normalized::InFile { .. } => None,
            Normalized::Nowhere { reason, .. } => Some(*reason),
        }
    }

    /// Check that the byte before the return address is what gets a place, so
    /// that a call at the very end of a mapping still belongs to it.
    #[test]
    fn looks_up_the_call_site() {
        let mapping = mapping("/bin/true", true);
        for (return_address, offset) in [(0x7001, 0x2000), (0x7010, 0x200f), (0x8000, 0x2fff)] {
            match normalize_in(&mapping, return_address) {
                Normalized::InFile { file_offset, .. } => {
                    assert_eq!(file_offset, FileOffset(offset));
                }
                other => panic!("{return_address:#x}: {other:?}"),
            }
        }
        for return_address in [0, 0x7000, 0x8001, u64::MAX] {
            assert_eq!(
                reason(&normalize_in(&mapping, return_address)),
                Some(UnknownReason::Unmapped)
            );
        }
    }

    /// Check that memory without a file says what kind it is, and keeps its
    /// mapping.
    #[test]
    fn reasons_without_file() {
        for (name, expected) in [
            ("", UnknownReason::Anonymous),
            ("[heap]", UnknownReason::Anonymous),
            ("[anon:v8]", UnknownReason::Anonymous),
            ("[vdso]", UnknownReason::Vdso),
            ("[vsyscall]", UnknownReason::Vdso),
            ("/usr/lib/gone.so", UnknownReason::FileUnreadable),
        ] {
            match normalize_in(&mapping(name, false), 0x7010) {
                Normalized::Nowhere { mapping, reason } => {
                    assert_eq!(reason, expected, "{name}");
                    assert!(mapping.is_some(), "{name}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    /// Check that a look-up that answers with a mapping elsewhere, or one whose
    /// offsets overflow, is not believed.
    #[test]
    fn distrusts_the_lookup() {
        let elsewhere = mapping("/bin/true", true);
        let normalized = normalize(AbsAddr(0x10), |_| Some(Arc::clone(&elsewhere)));
        assert_eq!(reason(&normalized), Some(UnknownReason::Unmapped));

        let mut overflowing = Mapping::clone(&elsewhere);
        overflowing.file_offset = FileOffset(u64::MAX);
        let normalized = normalize_in(&Arc::new(overflowing), 0x7010);
        assert_eq!(reason(&normalized), Some(UnknownReason::Unmapped));
    }
}
