//! Which instruction a frame of a stack stands at.
//!
//! A frame is known by the address that is returned to, and stands at the call before
//! that. Two kinds of frames nobody has called, and the instruction before theirs belongs
//! to somebody else: what a signal handler returns to, which the kernel has put there, and
//! the first function on a stack that a program has made itself (`makecontext`). Those
//! stand at the address itself.

use std::{collections::HashMap, os::unix::fs::FileExt as _};

use memprof_common::unwind::walk::StackEnd;

use crate::{
    address::{AbsAddr, FrameAddress},
    ledger::snapshot::StackTrace,
    process::mapping::MappingLookup,
};

/// Bytes of the longest call that counts from a register: `ff /2` with a SIB byte and 32
/// bits, and `e8` has less.
const BEFORE: usize = 8;

/// `mov $15, %rax; syscall`, and the same with `%eax`: how C libraries have
/// `rt_sigreturn` called. Debuggers know it by these bytes, too.
const SIGNAL_RETURNS: [&[u8]; 2] = [
    &[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05],
    &[0xb8, 15, 0, 0, 0, 0x0f, 0x05],
];

/// What an address that is returned to can be, by the code there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    /// There can be a call before, or it could not be read.
    AfterCall,
    /// There is none before, and a signal handler returns to it.
    SignalReturn,
    /// There is none before.
    NotCalled,
}

/// Finds the instructions of frames; what was read of a process's code once is remembered.
pub(super) struct Sites<'a> {
    mappings: &'a dyn MappingLookup,
    codes: HashMap<FrameAddress, Code>,
}

impl<'a> Sites<'a> {
    pub(super) fn new(mappings: &'a dyn MappingLookup) -> Self {
        Self {
            mappings,
            codes: HashMap::new(),
        }
    }

    /// The instruction of each frame, in their order.
    pub(super) fn of(&mut self, stack: &StackTrace) -> Vec<AbsAddr> {
        let mut is_interrupted = false;
        let last = stack.frames.len().saturating_sub(1);
        stack
            .frames
            .iter()
            .enumerate()
            .map(|(place, &address)| {
                // Of interrupted code the walk has the address behind the first byte of
                // the instruction: that there is no call before means nothing.
                if std::mem::take(&mut is_interrupted) {
                    return address.call_site();
                }
                match self.code(address) {
                    Code::SignalReturn => {
                        is_interrupted = true;
                        address.0
                    }
                    Code::NotCalled if place == last && stack.end == StackEnd::Complete => {
                        address.0
                    }
                    Code::NotCalled | Code::AfterCall => address.call_site(),
                }
            })
            .collect()
    }

    fn code(&mut self, address: FrameAddress) -> Code {
        if let Some(&code) = self.codes.get(&address) {
            return code;
        }
        let code = self.read(address.0).map_or(Code::AfterCall, |bytes| {
            let (before, at) = bytes.split_at(BEFORE);
            if can_be_call(before) {
                Code::AfterCall
            } else if SIGNAL_RETURNS.iter().any(|code| at.starts_with(code)) {
                Code::SignalReturn
            } else {
                Code::NotCalled
            }
        });
        self.codes.insert(address, code);
        code
    }

    /// The bytes around an address, from the mapped file.
    fn read(&self, address: AbsAddr) -> Option<[u8; BEFORE + 9]> {
        let mapping = self.mappings.lookup(address)?;
        let file = mapping.file.as_ref()?.file.as_ref()?;
        let into = address.0.checked_sub(mapping.start.0)?;
        let place = mapping.file_offset.0.checked_add(into)?;
        let mut bytes = [0; BEFORE + 9];
        file.read_exact_at(&mut bytes, place.checked_sub(BEFORE as u64)?)
            .ok()?;
        Some(bytes)
    }
}

/// Whether what ends there can be a call: `e8` and 32 bits, or `ff /2` with any of its
/// operands. As the walk in BPF has it (`memprof-common/src/unwind/walk.rs`), of which this
/// must be no part: it would be in the BPF object.
fn can_be_call(before: &[u8]) -> bool {
    let from_end = |count: usize| {
        before
            .len()
            .checked_sub(count)
            .and_then(|at| before.get(at))
    };
    let indirect = |length: usize| {
        from_end(length) == Some(&0xff)
            && from_end(length - 1).is_some_and(|operand| operand & 0x38 == 0x10)
    };
    from_end(5) == Some(&0xe8) || [2, 3, 4, 6, 7].into_iter().any(indirect)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, sync::Arc};

    use super::*;
    use crate::{address::FileOffset, process::mapping::Mapping, symbolize::testing::mapped_file};

    /// One mapping, of a file with this code in it.
    struct Mapped(Arc<Mapping>);

    impl Mapped {
        fn new(code: &[u8]) -> Self {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(code).unwrap();
            let file: File = file;
            Self(Arc::new(Mapping {
                start: AbsAddr(0x1000),
                end: AbsAddr(0x1000 + code.len() as u64),
                file_offset: FileOffset(0),
                file: Some(mapped_file(std::path::Path::new("/code"), Some(file))),
                name: "/code".to_owned(),
            }))
        }
    }

    impl MappingLookup for Mapped {
        fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
            (self.0.start <= address && address < self.0.end).then(|| Arc::clone(&self.0))
        }
    }

    const CALL: [u8; 5] = [0xe8, 1, 2, 3, 4];

    /// What is at 0x1000 on: 16 bytes that are no call, what is given, and zeros.
    fn sites(code: &[u8], frames: &[u64], end: StackEnd) -> Vec<u64> {
        let mapped = Mapped::new(&[&[0x90; 16], code, &[0; 32]].concat());
        let stack = StackTrace {
            frames: frames.iter().map(|&at| FrameAddress(AbsAddr(at))).collect(),
            end,
            by_frame_pointer: false,
        };
        let sites = Sites::new(&mapped).of(&stack);
        sites.into_iter().map(|site| site.0).collect()
    }

    /// Check that the return of a signal handler stands at its own first byte, and that
    /// the interrupted frame behind it does not, although no call is before it.
    #[test]
    fn signal_return() {
        for code in SIGNAL_RETURNS {
            for end in [StackEnd::Complete, StackEnd::Truncated] {
                let frames = [0x1010, 0x1005];
                assert_eq!(sites(code, &frames, end), [0x1010, 0x1004]);
            }
        }
    }

    /// Check that a call right before it, which never returns, is the frame instead.
    #[test]
    fn behind_a_call() {
        for call in [
            &CALL[..],
            &[0xff, 0xd0],
            &[0xff, 0x55, 0x08],
            &[0x41, 0xff, 0xd4],
        ] {
            let at = 0x1010 + call.len() as u64;
            for code in [SIGNAL_RETURNS[0], &[0x55]] {
                let code = [call, code].concat();
                assert_eq!(sites(&code, &[at], StackEnd::Complete), [at - 1]);
            }
        }
    }

    /// Check that what nobody called stands at its own first byte if it is the last of a
    /// whole stack, and only then.
    #[test]
    fn first_of_a_made_stack() {
        let whole = sites(&[0x55], &[0x1010, 0x1010], StackEnd::Complete);
        assert_eq!(whole, [0x100f, 0x1010]);
        let cut = sites(&[0x55], &[0x1010], StackEnd::BrokenChain);
        assert_eq!(cut, [0x100f]);
    }

    /// Check addresses without code to read: outside, at the first bytes of a file and at
    /// the last.
    #[test]
    fn unreadable() {
        for at in [0, 0x1000, 0x1007, 0x102f, 0x9000, u64::MAX] {
            let stands = sites(&[], &[at], StackEnd::Complete);
            assert_eq!(stands, [FrameAddress(AbsAddr(at)).call_site().0]);
        }
    }
}
