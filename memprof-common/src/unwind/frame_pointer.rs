//! Steps that no table describes: by frame pointers, and out of signal handlers.

use super::{
    table::MappingKind,
    walk::{END_BY_FRAME_POINTER, Memory, StackEnd, Walk},
};

/// How a frame was found by a frame pointer: its return address is behind what can be a
/// call ...
pub(super) const BEHIND_CALL: u32 = 1;
/// ... or it is not, after another that was found so, or after none. Interpreters that are
/// made at run time, Java's among them, return to places that no call leads to.
pub(super) const NOT_BEHIND_CALL: u32 = 2;
pub(super) const FIRST_NOT_BEHIND_CALL: u32 = 3;

impl Walk {
    /// The kernel has put the registers of what it interrupted on the stack:
    /// `struct ucontext` in arch/x86/include/uapi/asm/ucontext.h, of which the
    /// `struct sigcontext_64` begins at its 40th byte.
    #[inline(always)]
    pub(super) fn leave_signal_handler(&mut self, memory: &impl Memory) -> Result<(), StackEnd> {
        let context = self.sp;
        let (Some(bp), Some([sp, ip])) = (
            memory.single(context.wrapping_add(120)),
            memory.pair(context.wrapping_add(160)),
        ) else {
            return Err(StackEnd::Unreadable);
        };
        self.by_frame_pointer = 0;
        self.bp = bp;
        self.sp = sp;
        self.go_to(ip.wrapping_add(1))
    }

    /// To the caller by rbp, if that leads to what can be a frame.
    #[inline(always)]
    pub(super) fn follow_frame_pointer(&mut self, memory: &impl Memory) -> Result<(), StackEnd> {
        let bp = self.bp;
        if bp == 0 {
            return Err(StackEnd::Complete);
        }
        let broken = if self.by_frame_pointer != 0 {
            StackEnd::BrokenChain
        } else {
            StackEnd::NoUnwindInfo
        };
        if bp < self.sp || bp & 7 != 0 {
            return Err(broken);
        }
        let Some([saved, ip]) = memory.pair(bp) else {
            return Err(broken);
        };
        if ip == 0 {
            return Err(StackEnd::Complete);
        }
        self.by_frame_pointer = if follows_call(memory, ip) {
            BEHIND_CALL
        } else if self.by_frame_pointer != 0 {
            NOT_BEHIND_CALL
        } else {
            FIRST_NOT_BEHIND_CALL
        };
        self.sp = bp.wrapping_add(16);
        self.bp = saved;
        self.ip = ip;
        Ok(())
    }
}

impl Walk {
    /// Whether this frame, of which it is known by now which code it is in, can be one.
    #[inline(always)]
    pub(super) fn accept(&mut self) -> Result<(), StackEnd> {
        if self.by_frame_pointer == 0 {
            return Ok(());
        }
        // Code made at run time may return anywhere within.
        if self.by_frame_pointer != BEHIND_CALL && self.kind != MappingKind::FramePointers as u32 {
            return Err(if self.by_frame_pointer == NOT_BEHIND_CALL {
                StackEnd::BrokenChain
            } else {
                StackEnd::NoUnwindInfo
            });
        }
        self.flags |= END_BY_FRAME_POINTER;
        Ok(())
    }
}

/// Whether the instruction before `ip` can be a call: `e8` and 32 bits, or `ff /2` with
/// any of its operands. Data that merely looks like an address is rarely behind one.
#[inline(always)]
fn follows_call(memory: &impl Memory, ip: u64) -> bool {
    let Some(code) = memory.single(ip.wrapping_sub(8)) else {
        return false;
    };
    // Byte n is the one at `ip - 8 + n`.
    let indirect = |place: u32| {
        let opcode = code >> (place * 8) & 0xff;
        let operand = code >> (place * 8 + 8) & 0x38;
        opcode == 0xff && operand == 0x10
    };
    code >> 24 & 0xff == 0xe8
        || indirect(6)
        || indirect(5)
        || indirect(4)
        || indirect(2)
        || indirect(1)
}

/// Whether a signal handler returns to `ip`: `mov $15, %rax` or `%eax`, `syscall`, which
/// is how C libraries call `rt_sigreturn`, with unwind information or without.
#[inline(always)]
pub(super) fn is_sigreturn(memory: &impl Memory, ip: u64) -> bool {
    let Some([low, high]) = memory.pair(ip) else {
        return false;
    };
    (low == 0x0f00_0000_0fc0_c748 && high & 0xff == 0x05)
        || low & 0x00ff_ffff_ffff_ffff == 0x0005_0f00_0000_0fb8
}
