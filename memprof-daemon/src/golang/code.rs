//! Addresses of variables by the code that uses them, for programs without symbols.
//!
//! Three functions of the runtime load them, in all versions that are known:
//!
//! ```text
//! runtime.mProf_FlushLocked   mov rcx, [rip+...]     mbuckets, its first load of 8 bytes
//! runtime.mProf_PostSweep     mov ecx, [rip+...]     mProfCycle, its first load of 4 bytes
//! runtime.profilealloc        mov rdx, [rip+...]     mcache0
//!                             mov rax, [rip+...]     MemProfileRate, its last load of 8 bytes
//! ```
//!
//! What is found so is only believed if what is read there is plausible.

use std::io;

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

use super::{pclntab::FunctionTable, program::Variables};

/// These functions have some hundred bytes.
const LONGEST: u64 = 4096;

/// The variables' addresses; none where the code is not as it should be.
///
/// # Errors
///
/// The file cannot be read.
pub(super) fn find(table: &mut FunctionTable<'_>) -> io::Result<Option<Variables>> {
    let mut loads = |name: &str| -> io::Result<Vec<(u64, usize)>> {
        let Some(func) = table.named(name)? else {
            return Ok(Vec::new());
        };
        let code = table.code(func, LONGEST)?;
        Ok(loads(&code, func.entry))
    };
    let buckets = first(&loads("runtime.mProf_FlushLocked")?, 8);
    let cycle = first(&loads("runtime.mProf_PostSweep")?, 4);
    let mut of_rate = loads("runtime.profilealloc")?;
    of_rate.reverse();
    let rate = first(&of_rate, 8);
    Ok(match (buckets, cycle, rate) {
        (Some(buckets), Some(cycle), Some(rate)) => Some(Variables {
            buckets,
            cycle,
            rate,
            is_disabled: None,
        }),
        _ => None,
    })
}

fn first(loads: &[(u64, usize)], size: usize) -> Option<u64> {
    let load = loads.iter().find(|load| load.1 == size)?;
    Some(load.0)
}

/// What code loads from fixed addresses into registers, and how many bytes each.
fn loads(code: &[u8], address: u64) -> Vec<(u64, usize)> {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    let mut loads = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        if instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Register
            && instruction.op1_kind() == OpKind::Memory
            && instruction.memory_base() == Register::RIP
        {
            let size = instruction.op0_register().size();
            loads.push((instruction.memory_displacement64(), size));
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that loads are told from stores, other addresses and addresses taken.
    #[test]
    fn finds_loads() {
        let code = [
            0x48, 0x8b, 0x0d, 0x10, 0, 0, 0, // mov rcx, [rip+0x10]
            0x89, 0x05, 0x20, 0, 0, 0, // mov [rip+0x20], eax
            0x48, 0x8d, 0x05, 0x30, 0, 0, 0, // lea rax, [rip+0x30]
            0x8b, 0x05, 0x40, 0, 0, 0, // mov eax, [rip+0x40]
            0x48, 0x8b, 0x04, 0x24, // mov rax, [rsp]
        ];
        let loads = loads(&code, 0x1000);
        assert_eq!(loads, [(0x1017, 8), (0x105a, 4)]);
        assert_eq!(
            (first(&loads, 8), first(&loads, 4)),
            (Some(0x1017), Some(0x105a))
        );
        assert_eq!(first(&loads, 2), None);
    }
}
