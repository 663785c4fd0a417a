//! The frame that the kernel leaves on a stack before a signal handler, and that
//! rt_sigreturn(2) takes back: all of a thread's registers, its signal mask, and its
//! processor's extended state.
//!
//! As `struct rt_sigframe` (arch/x86/include/asm/sigframe.h) has it, with
//! `struct ucontext` and `struct sigcontext_64` (arch/x86/include/uapi/asm/):
//!
//! ```text
//!   0 where the handler would return to: what makes rt_sigreturn(2)
//!   8 uc_flags   16 uc_link   24 uc_stack: address, flags, size
//!  48 r8..r15 rdi rsi rbp rbx rdx rax rcx rsp rip rflags   192 cs gs fs ss
//! 200 err trapno oldmask cr2   232 address of the extended state   240 reserved
//! 304 uc_sigmask   312 siginfo, 128 bytes
//! ```
//!
//! The extended state is that of XSAVE, 64-byte aligned, with a note of the kernel's in
//! bytes that the processor leaves alone (`struct _fpx_sw_bytes`), and a mark behind it.

use std::arch::x86_64::__cpuid_count;

use libc::user_regs_struct;

/// Bytes of the frame without extended state.
const FRAME_BYTES: usize = 440;
/// `UC_FP_XSTATE`, `UC_SIGCONTEXT_SS`, `UC_STRICT_RESTORE_SS`.
const FLAGS: u64 = 7;
/// No mode of sigaltstack(2): the kernel then leaves the thread's alternate stack, which
/// nobody else can ask for, as it is (kernel/signal.c, `restore_altstack` and
/// `do_sigaltstack`: `EINVAL` before anything is changed, and ignored).
const NO_STACK_MODE: u32 = 0x7f;
/// `FP_XSTATE_MAGIC1`, `FP_XSTATE_MAGIC2`.
const MAGIC_1: u32 = 0x4650_5853;
const MAGIC_2: u32 = 0x4650_5845;
/// Where in the legacy area of XSAVE the kernel has its note.
const NOTE_AT: usize = 464;
/// The legacy area and the header behind it.
const LEAST_STATE: usize = 512 + 64;
const RED_ZONE: u64 = 128;
/// Room for what injected calls point to, below the frame.
pub(super) const SCRATCH_BYTES: u64 = 256;

/// `-ERESTARTSYS`, `-ERESTARTNOINTR`, `-ERESTARTNOHAND`: make the call again; and
/// `-ERESTART_RESTARTBLOCK`: go on with it (include/linux/errno.h). A program never sees
/// them, the kernel acts on them before.
const AGAIN: [i64; 3] = [-512, -513, -514];
const GO_ON: i64 = -516;

/// Why no frame can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The processor has no XSAVE, or the kernel shows another form of it.
    #[error("the kernel does not show the processor's state as XSAVE writes it")]
    NoXsave,
}

/// A frame, and where it is to be written.
#[derive(Debug)]
pub(super) struct Frame {
    /// Of its first byte, which is its lowest.
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
}

impl Frame {
    /// The frame for a thread that stands with `registers`, `mask` of signals and
    /// extended `state`; `sigreturn` is the address of what takes it back.
    pub(super) fn new(
        registers: &user_regs_struct,
        mask: u64,
        state: &[u8],
        sigreturn: u64,
    ) -> Result<Self, FrameError> {
        let extended = extended(state)?;
        let top = registers.rsp.wrapping_sub(RED_ZONE);
        let state_at = top.wrapping_sub(extended.len() as u64) & !63;
        // As a function's that has just been called, like the kernel's.
        let address = (state_at.wrapping_sub(FRAME_BYTES as u64) & !15).wrapping_sub(8);
        let mut bytes = fixed(registers, mask, state_at, sigreturn);
        let gap = usize::try_from(state_at.wrapping_sub(address)).unwrap_or(0);
        bytes.resize(gap.max(FRAME_BYTES), 0);
        bytes.extend(extended);
        Ok(Self { address, bytes })
    }

    /// Where rt_sigreturn(2) wants the stack pointer.
    pub(super) fn stack_pointer_to_return(&self) -> u64 {
        self.address.wrapping_add(8)
    }

    /// Where a `ret` leads to it.
    pub(super) fn stack_pointer_before_ret(&self) -> u64 {
        self.address
    }

    /// Memory for what calls point to: of `SCRATCH_BYTES`.
    pub(super) fn scratch(&self) -> u64 {
        self.address.wrapping_sub(SCRATCH_BYTES) & !15
    }
}

/// The part of fixed length.
fn fixed(registers: &user_regs_struct, mask: u64, state_at: u64, sigreturn: u64) -> Vec<u8> {
    let again = resumable(registers);
    let mut bytes = Vec::with_capacity(FRAME_BYTES);
    let mut words = |words: &[u64]| bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    words(&[sigreturn, FLAGS, 0, 0, u64::from(NO_STACK_MODE), 0]);
    words(&[again.r8, again.r9, again.r10, again.r11]);
    words(&[again.r12, again.r13, again.r14, again.r15]);
    words(&[again.rdi, again.rsi, again.rbp, again.rbx]);
    words(&[again.rdx, again.rax, again.rcx, again.rsp]);
    words(&[again.rip, again.eflags]);
    words(&[(again.cs & 0xffff) | (again.ss & 0xffff) << 48]);
    words(&[0, 0, 0, 0, state_at]);
    words(&[0; 8]);
    words(&[mask]);
    bytes.resize(FRAME_BYTES, 0);
    bytes
}

/// The registers with which a thread goes on by itself. What the kernel would do at the
/// end of an interrupted call cannot be left to it: rt_sigreturn(2) forgets the call.
fn resumable(registers: &user_regs_struct) -> user_regs_struct {
    let mut registers = *registers;
    let result = registers.rax.cast_signed();
    if registers.orig_rax.cast_signed() < 0 {
        return registers;
    }
    if AGAIN.contains(&result) {
        registers.rax = registers.orig_rax;
        // `syscall` has two bytes.
        registers.rip = registers.rip.wrapping_sub(2);
    } else if result == GO_ON {
        // How long is left is known to the kernel alone, and forgotten too.
        registers.rax = i64::from(-libc::EINTR).cast_unsigned();
    }
    registers
}

/// The extended state as the kernel wants it in a frame.
fn extended(state: &[u8]) -> Result<Vec<u8>, FrameError> {
    let word = |at: usize| {
        let bytes = state.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    // The kernel shows here which features it has enabled (Documentation/arch/x86:
    // `NT_X86_XSTATE`, XCR0), the header which of them are not in their initial state.
    let (Some(enabled), Some(in_use)) = (word(NOTE_AT), word(512)) else {
        return Err(FrameError::NoXsave);
    };
    let len = bytes_of(in_use);
    let mut bytes = state
        .get(..len)
        .filter(|_| enabled & 3 == 3)
        .ok_or(FrameError::NoXsave)?
        .to_vec();
    let len = u32::try_from(len).map_err(|_| FrameError::NoXsave)?;
    let mut note = Vec::with_capacity(48);
    note.extend(MAGIC_1.to_ne_bytes());
    note.extend((len + 4).to_ne_bytes());
    note.extend(enabled.to_ne_bytes());
    note.extend(len.to_ne_bytes());
    note.resize(48, 0);
    if let Some(place) = bytes.get_mut(NOTE_AT..NOTE_AT + note.len()) {
        place.copy_from_slice(&note);
    }
    bytes.extend(MAGIC_2.to_ne_bytes());
    Ok(bytes)
}

/// How long the state is up to the last feature in use. All features may be more than
/// the kernel allows the thread (AMX is on demand), and would then be refused.
fn bytes_of(in_use: u64) -> usize {
    (2..63)
        .filter(|feature| in_use & (1 << feature) != 0)
        .map(|feature| {
            // Leaf 0xd: size and place of a feature (Intel SDM 1, 13.4.3).
            let leaf = __cpuid_count(0xd, feature);
            (leaf.eax + leaf.ebx) as usize
        })
        .fold(LEAST_STATE, usize::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> user_regs_struct {
        // SAFETY: numbers only, for which zeroes are values.
        let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
        registers.rsp = 0x7fff_0000_1238;
        registers.rip = 0x40_1002;
        registers.orig_rax = u64::MAX;
        registers
    }

    fn word(frame: &Frame, at: usize) -> u64 {
        u64::from_ne_bytes(frame.bytes[at..at + 8].try_into().unwrap())
    }

    /// Check that fields are where libc's own `ucontext_t` has them.
    #[test]
    fn laid_out_like_libcs() {
        let mut state = vec![0; 4096];
        state[NOTE_AT] = 7;
        let frame = Frame::new(&registers(), 0x1234, &state, 0x55).unwrap();
        let context = 8;
        let mcontext = context + std::mem::offset_of!(libc::ucontext_t, uc_mcontext);
        let greg = |register: i32| word(&frame, mcontext + 8 * register as usize);
        assert_eq!(greg(libc::REG_RSP), 0x7fff_0000_1238);
        assert_eq!(greg(libc::REG_RIP), 0x40_1002);
        let mask = context + std::mem::offset_of!(libc::ucontext_t, uc_sigmask);
        assert_eq!(word(&frame, mask), 0x1234);
        assert_eq!(word(&frame, 0), 0x55);
        let fpregs = mcontext + std::mem::offset_of!(libc::mcontext_t, fpregs);
        let state_at = word(&frame, fpregs);
        assert_eq!(state_at % 64, 0);
        assert_eq!(frame.address % 16, 8);
        let end = frame.address + frame.bytes.len() as u64;
        assert!(end <= registers().rsp - RED_ZONE);
        assert_eq!(end, state_at + LEAST_STATE as u64 + 4);
        assert_eq!(frame.bytes[frame.bytes.len() - 4..], MAGIC_2.to_ne_bytes());
    }

    /// Check what becomes of an interrupted call in a frame: made again, ended with
    /// EINTR where only the kernel knows the rest, left alone if it was none.
    #[test]
    fn interrupted_calls() {
        let stand = |rax: i64, orig_rax: u64| {
            let mut stand = registers();
            (stand.rax, stand.orig_rax) = (rax.cast_unsigned(), orig_rax);
            let on = resumable(&stand);
            (on.rax.cast_signed(), on.rip)
        };
        assert_eq!(stand(-512, 7), (7, 0x40_1000));
        assert_eq!(stand(-513, 7), (7, 0x40_1000));
        assert_eq!(stand(-514, 0), (0, 0x40_1000));
        assert_eq!(stand(-516, 7), (-4, 0x40_1002));
        assert_eq!(stand(-4, 7), (-4, 0x40_1002));
        assert_eq!(stand(-512, u64::MAX), (-512, 0x40_1002));
    }

    /// Check that state which is no XSAVE state is refused.
    #[test]
    fn strange_states() {
        for state in [vec![], vec![0; 519], vec![0; 4096]] {
            let frame = Frame::new(&registers(), 0, &state, 0);
            assert_eq!(frame.unwrap_err(), FrameError::NoXsave);
        }
    }
}
