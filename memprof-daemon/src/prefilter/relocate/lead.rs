//! First instructions that stay where they are, so that other tools' uprobes can be there.
//!
//! A uprobe executes the instruction that the *file* has at its place, and goes on behind it
//! (kernel/events/uprobes.c). On a jump of five bytes it would go on in the midst of that. So
//! where it can be, the jump is not a function's first instruction but its second: tools
//! probe functions where they begin. What the first has done is undone where the jump leads
//! to, and it is executed again with the others that are displaced.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// A first instruction that can be executed twice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead {
    pub(super) instruction: Instruction,
    /// How much lower the stack pointer is behind it.
    lowers_stack_by: i32,
}

impl Lead {
    /// `instruction` as one, if it is fit: it lowers the stack pointer and changes nothing
    /// else but memory below that; or it only changes flags, or a register that it does not
    /// read and that passes no argument and need not be preserved. The real function finds
    /// all of that as it would have.
    pub(super) fn of(instruction: Instruction) -> Option<Self> {
        let lead = |lowers_stack_by| {
            Some(Self {
                instruction,
                lowers_stack_by,
            })
        };
        match instruction.code() {
            Code::Push_r64 if instruction.op0_register() != Register::RSP => lead(8),
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32
                if instruction.op0_kind() == OpKind::Register
                    && instruction.op0_register() == Register::RSP =>
            {
                let bytes = i32::try_from(instruction.immediate(1).cast_signed()).ok()?;
                // More, and the guard below a stack might be passed over.
                (0..4096).contains(&bytes).then(|| lead(bytes))?
            }
            _ if is_idempotent(&instruction) => lead(0),
            _ => None,
        }
    }

    /// Code that undoes it, if there is anything to undo. Changes nothing else, flags neither.
    pub(super) fn undo(&self) -> Vec<u8> {
        match self.lowers_stack_by {
            0 => Vec::new(),
            // lea bytes(%rsp), %rsp
            bytes => [&[0x48, 0x8d, 0xa4, 0x24], &bytes.to_le_bytes()[..]].concat(),
        }
    }
}

/// Whether nothing is different when it is executed once more.
fn is_idempotent(instruction: &Instruction) -> bool {
    let uses_stack = [instruction.memory_base(), instruction.memory_index()]
        .iter()
        .any(|register| register.full_register() == Register::RSP);
    if uses_stack || instruction.has_rep_prefix() || instruction.has_lock_prefix() {
        return false;
    }
    match instruction.mnemonic() {
        // They write flags.
        Mnemonic::Test | Mnemonic::Cmp => true,
        Mnemonic::Nop => true,
        Mnemonic::Mov | Mnemonic::Lea if instruction.op0_kind() == OpKind::Register => {
            let written = instruction.op0_register().full_register();
            let is_free = matches!(
                written,
                Register::RAX
                    | Register::RCX
                    | Register::R8
                    | Register::R9
                    | Register::R10
                    | Register::R11
            );
            let reads = |register: Register| register.full_register() == written;
            let reads_it = reads(instruction.memory_base())
                || reads(instruction.memory_index())
                || instruction.op1_kind() == OpKind::Register && reads(instruction.op1_register());
            is_free && !reads_it
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn lead(bytes: &[u8]) -> Option<Lead> {
        Lead::of(Decoder::with_ip(64, bytes, 0x40_1000, DecoderOptions::NONE).decode())
    }

    /// Check which first instructions of allocators stay, with what undoes them.
    #[test]
    fn fit() {
        let lea = |bytes: u8| vec![0x48, 0x8d, 0xa4, 0x24, bytes, 0, 0, 0];
        for (bytes, undo) in [
            // push r15; push rbp; sub rsp, 0x18; sub rsp, 0x18 (long)
            (&[0x41, 0x57][..], lea(8)),
            (&[0x55], lea(8)),
            (&[0x48, 0x83, 0xec, 0x18], lea(0x18)),
            (&[0x48, 0x81, 0xec, 0x18, 0, 0, 0], lea(0x18)),
            // test rdi, rdi; cmp rdi, 0x1000; cmp byte [rip+1], 0; mov rax, rdi;
            // mov rax, [rip+1]; lea rax, [rsi-1]; nop
            (&[0x48, 0x85, 0xff], vec![]),
            (&[0x48, 0x81, 0xff, 0, 0x10, 0, 0], vec![]),
            (&[0x80, 0x3d, 1, 0, 0, 0, 0], vec![]),
            (&[0x48, 0x89, 0xf8], vec![]),
            (&[0x48, 0x8b, 0x05, 1, 0, 0, 0], vec![]),
            (&[0x48, 0x8d, 0x46, 0xff], vec![]),
            (&[0x90], vec![]),
        ] {
            assert_eq!(lead(bytes).expect("fit").undo(), undo, "{bytes:x?}");
        }
    }

    /// Check that what cannot be executed twice does not stay: it reads what it writes, writes
    /// memory, an argument or what is the caller's, or leads elsewhere.
    #[test]
    fn unfit() {
        for bytes in [
            // push rsp; push [rax]; push 1; sub rsp, -8; sub rax, 8; sub rsp, 0x10000
            &[0x54][..],
            &[0xff, 0x30],
            &[0x6a, 1],
            &[0x48, 0x83, 0xec, 0xf8],
            &[0x48, 0x83, 0xe8, 8],
            &[0x48, 0x81, 0xec, 0, 0, 1, 0],
            // mov rax, [rax]; mov al, ah; lea rax, [rax+1]; mov [rdi], rax; mov rdi, rax
            &[0x48, 0x8b, 0x00],
            &[0x88, 0xe0],
            &[0x48, 0x8d, 0x40, 1],
            &[0x48, 0x89, 0x07],
            &[0x48, 0x89, 0xc7],
            // mov rdx, [rip+1]; mov rbx, rdi; mov rsp, rax; mov rax, [rsp]; cmp rax, [rsp]
            &[0x48, 0x8b, 0x15, 1, 0, 0, 0],
            &[0x48, 0x89, 0xfb],
            &[0x48, 0x89, 0xc4],
            &[0x48, 0x8b, 0x04, 0x24],
            &[0x48, 0x3b, 0x04, 0x24],
            // jmp; je; call; xor eax, eax; add rax, 1; pop rax; ret; endbr64
            &[0xe9, 0, 1, 0, 0],
            &[0x74, 1],
            &[0xe8, 0, 1, 0, 0],
            &[0x31, 0xc0],
            &[0x48, 0x83, 0xc0, 1],
            &[0x58],
            &[0xc3],
            &[0xf3, 0x0f, 0x1e, 0xfa],
        ] {
            assert!(lead(bytes).is_none(), "{bytes:x?}");
        }
    }
}
