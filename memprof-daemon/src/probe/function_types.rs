//! The least type information that the kernel wants of a program with callbacks: that
//! each of its functions is one, and static (kernel/bpf/verifier.c, `check_ld_imm`). The
//! object carries none, since what compilers write of Rust is not what every kernel
//! accepts.

use std::{collections::BTreeSet, io, os::fd::OwnedFd};

use aya_obj::generated::{
    BPF_CALL, BPF_DW, BPF_IMM, BPF_JMP, BPF_LD, BPF_PSEUDO_CALL, BPF_PSEUDO_FUNC, bpf_insn,
};

use super::syscall::{address, bpf, length};

/// `struct bpf_func_info` (include/uapi/linux/bpf.h).
#[repr(C)]
pub(super) struct FunctionInfo {
    instruction: u32,
    type_id: u32,
}

/// The only function's type, see [`load`].
const FUNCTION_TYPE: u32 = 3;

/// Where the functions of a program begin: itself, what it calls, and its callbacks.
pub(super) fn functions(instructions: &[bpf_insn]) -> Vec<FunctionInfo> {
    const CALL: u32 = BPF_JMP | BPF_CALL;
    const LOAD: u32 = BPF_LD | BPF_IMM | BPF_DW;
    let mut begins = BTreeSet::from([0]);
    for (at, instruction) in (0_i64..).zip(instructions) {
        let is_reference = match (
            u32::from(instruction.code),
            u32::from(instruction.src_reg()),
        ) {
            (CALL, register) => register == BPF_PSEUDO_CALL,
            (LOAD, register) => register == BPF_PSEUDO_FUNC,
            _ => false,
        };
        if is_reference && let Ok(begin) = u32::try_from(at + 1 + i64::from(instruction.imm)) {
            begins.insert(begin);
        }
    }
    begins
        .into_iter()
        .map(|instruction| FunctionInfo {
            instruction,
            type_id: FUNCTION_TYPE,
        })
        .collect()
}

/// `union bpf_attr` of `BPF_BTF_LOAD`.
#[repr(C)]
#[derive(Default)]
struct BtfLoad {
    btf: u64,
    btf_log_buf: u64,
    btf_size: u32,
    btf_log_size: u32,
    btf_log_level: u32,
    /// 0: older kernels refuse what they do not know, padding too.
    reserved: u32,
}

const BPF_BTF_LOAD: u32 = 18;

/// Brings the types into the kernel: `int`, `int ()`, and a static function of that type.
pub(super) fn load() -> io::Result<OwnedFd> {
    // include/uapi/linux/btf.h: a header, the types, the names.
    const NAMES: &[u8; 14] = b"\0int\0function\0";
    const KIND_INT: u32 = 1 << 24;
    const KIND_FUNC: u32 = 12 << 24;
    const KIND_FUNC_PROTO: u32 = 13 << 24;
    const SIGNED_32_BITS: u32 = 1 << 24 | 32;
    let types = [
        [1, KIND_INT, 4, SIGNED_32_BITS].as_slice(),
        [0, KIND_FUNC_PROTO, 1].as_slice(),
        [5, KIND_FUNC, 2].as_slice(),
    ]
    .concat();
    let types_bytes = length(types.len() * 4)?;
    let header: [u32; 6] = [
        // The magic number, version 1, no flags.
        0x0001_eb9f,
        24,
        0,
        types_bytes,
        types_bytes,
        length(NAMES.len())?,
    ];
    let mut btf: Vec<u8> = header
        .into_iter()
        .chain(types)
        .flat_map(u32::to_ne_bytes)
        .collect();
    btf.extend(NAMES);
    let attr = BtfLoad {
        btf: address(btf.as_ptr()),
        btf_size: length(btf.len())?,
        ..BtfLoad::default()
    };
    bpf(BPF_BTF_LOAD, &attr)
}
