//! Where in a function its entry probe costs least: the choice, from machine
//! code alone. `docs/probes.md` has the reasons and worked examples.
//!
//! A probe on an instruction that the kernel emulates is one trap; on any other,
//! the kernel executes a copy of the instruction and traps again behind it. So
//! the probe goes on the first emulated instruction at or after the entry at
//! which a call still looks as it does at the entry.

use std::fmt;

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, FlowControl, Formatter, Instruction,
    InstructionInfoFactory, IntelFormatter, OpAccess, Register,
};
use memprof_common::{config::Places, function::Function};

/// Code that a file holds.
#[derive(Clone, Copy, Debug)]
pub struct Code<'a> {
    /// From a function's first byte to its end, or to where it is not known any
    /// more to go on.
    pub bytes: &'a [u8],
    /// Address of the first byte, before relocation.
    pub address: u64,
}

/// The instruction on which a function is probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePoint {
    /// From the function's first byte.
    pub offset: u32,
    /// In Intel's syntax; addresses are the file's.
    pub instruction: String,
    /// The kernel emulates it: a hit is one trap.
    pub emulated: bool,
    /// Why it is the entry, although that is not emulated.
    pub refusal: Option<Refusal>,
}

/// Why no instruction behind a function's entry stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The BPF program would not find the arguments in their registers.
    ArgumentWritten,
    /// The return address is not at the stack pointer any more, where the kernel
    /// puts the return probe.
    StackPointerMoved,
    /// Not every call goes on behind it, or not at once.
    Branch,
    /// Other code jumps behind the entry: some calls would count twice, or what
    /// is no call would count.
    JumpTarget,
    /// There is something that is no instruction for programs.
    Undecodable,
    /// The function is over before.
    FunctionEnds,
    /// The file has more code than is searched for jumps.
    FileTooLarge,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ArgumentWritten => "an argument is overwritten first",
            Self::StackPointerMoved => "the stack pointer moves first",
            Self::Branch => "a branch comes first",
            Self::JumpTarget => "code jumps in behind the entry",
            Self::Undecodable => "undecodable code comes first",
            Self::FunctionEnds => "the function ends first",
            Self::FileTooLarge => "too much code to search for jumps",
        })
    }
}

impl ProbePoint {
    /// The entry of the function with this `code`, which is not left for a
    /// better place for this reason.
    #[must_use]
    pub fn entry(code: Code<'_>, refusal: Refusal) -> Self {
        let instruction = Decoder::with_ip(64, code.bytes, code.address, DecoderOptions::NONE)
            .into_iter()
            .next()
            .unwrap_or_default();
        let emulated = is_emulated(code.bytes, &instruction);
        Self {
            offset: 0,
            instruction: text(&instruction),
            emulated,
            refusal: (!emulated).then_some(refusal),
        }
    }
}

/// The place to probe calls of `function` at, whose arguments are in `places` if its code does
/// not say where; as far as its own code tells: jumps from elsewhere to behind the entry are
/// for the caller to look for.
#[must_use]
pub fn choose(function: Function, places: Option<Places>, code: Code<'_>) -> ProbePoint {
    find(function, places, code).unwrap_or_else(|refusal| ProbePoint::entry(code, refusal))
}

fn find(function: Function, places: Option<Places>, code: Code<'_>) -> Result<ProbePoint, Refusal> {
    let arguments = match places {
        Some(places) => arguments_at(places),
        None => arguments(function),
    };
    // Calls under way are told apart by it.
    let needs_stack_pointer = !function.is_free() || function.is_pool();
    let mut decoder = Decoder::with_ip(64, code.bytes, code.address, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut usage = InstructionInfoFactory::new();
    loop {
        let start = decoder.position();
        decoder.decode_out(&mut instruction);
        match decoder.last_error() {
            DecoderError::None => {}
            DecoderError::NoMoreBytes => return Err(Refusal::FunctionEnds),
            _ => return Err(Refusal::Undecodable),
        }
        let bytes = code.bytes.get(start..).unwrap_or_default();
        if is_emulated(bytes, &instruction) {
            if start > 0 && jumps_into(code, instruction.ip()) {
                return Err(Refusal::JumpTarget);
            }
            return Ok(ProbePoint {
                offset: u32::try_from(start).map_err(|_| Refusal::FunctionEnds)?,
                instruction: text(&instruction),
                emulated: true,
                refusal: None,
            });
        }
        match instruction.flow_control() {
            FlowControl::Next if instruction.is_privileged() => return Err(Refusal::Undecodable),
            FlowControl::Next => {}
            FlowControl::Interrupt | FlowControl::Exception => return Err(Refusal::Undecodable),
            _ => return Err(Refusal::Branch),
        }
        for used in usage.info(&instruction).used_registers() {
            let written = !matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            // Half of a register is enough: xor edi, edi.
            let register = used.register().full_register();
            if written && arguments.contains(&register) {
                return Err(Refusal::ArgumentWritten);
            }
            if written && register == Register::RSP && needs_stack_pointer {
                return Err(Refusal::StackPointerMoved);
            }
        }
    }
}

/// The registers of arguments, in their order.
const ARGUMENTS: [Register; 6] = {
    use Register::{R8, R9, RCX, RDI, RDX, RSI};
    [RDI, RSI, RDX, RCX, R8, R9]
};

/// Those up to the last of `places`.
fn arguments_at(places: Places) -> &'static [Register] {
    let Places { size, count, out } = places;
    let last = [Some(size), count, out].into_iter().flatten().max();
    let last = usize::from(last.unwrap_or_default());
    ARGUMENTS.get(..=last).unwrap_or(&ARGUMENTS)
}

/// Those up to the last that `memprof-ebpf` reads of a function that it knows.
const fn arguments(function: Function) -> &'static [Register] {
    use Register::{RCX, RDI, RDX, RSI};
    match function {
        Function::Malloc
        | Function::Mallocx
        | Function::Valloc
        | Function::Pvalloc
        | Function::Free
        | Function::Cfree
        | Function::FreeSized
        | Function::FreeAlignedSized => &[RDI],
        Function::Calloc
        | Function::Realloc
        | Function::Reallocf
        | Function::Xallocx
        | Function::AlignedAlloc
        | Function::Memalign => &[RDI, RSI],
        Function::Reallocarray
        | Function::PosixMemalign
        | Function::HeapCalloc
        | Function::HeapRealloc
        | Function::HeapReallocf => &[RDI, RSI, RDX],
        Function::HeapReallocn => &[RDI, RSI, RDX, RCX],
        // Their places say it.
        Function::New
        | Function::NewN
        | Function::HeapNew
        | Function::HeapNewN
        | Function::Pool
        | Function::PoolFree => &ARGUMENTS,
    }
}

/// Whether `bytes` begin with an instruction that every supported kernel
/// emulates: `branch_setup_xol_ops` and `push_setup_xol_ops` in Linux 5.15's
/// arch/x86/kernel/uprobes.c.
///
/// Not among them, since older kernels step them: NOPs of several bytes, which
/// Linux 6.16 emulates. And no prefix but `push`'s REX.B, though the kernel
/// looks beyond some: it refuses probes on branches with 0x66 altogether, and
/// takes REX 0x90, an exchange of registers, for a NOP.
fn is_emulated(bytes: &[u8], instruction: &Instruction) -> bool {
    if instruction.is_invalid() {
        return false;
    }
    match bytes {
        // push; short jcc; nop; call; near jmp; short jmp
        [0x50..=0x57 | 0x70..=0x7f | 0x90 | 0xe8 | 0xe9 | 0xeb, ..]
        // push of r8 to r15; near jcc
        | [0x41, 0x50..=0x57, ..]
        | [0x0f, 0x80..=0x8f, ..] => true,
        _ => false,
    }
}

/// Whether a branch of the function's own leads to behind its entry, `last`
/// included.
///
/// What is not code in between is decoded as if it were: that can only find
/// branches too many.
fn jumps_into(code: Code<'_>, last: u64) -> bool {
    Decoder::with_ip(64, code.bytes, code.address, DecoderOptions::NONE)
        .into_iter()
        .filter(|instruction| !instruction.is_invalid())
        .map(|instruction| instruction.near_branch_target())
        .any(|target| target > code.address && target <= last)
}

fn text(instruction: &Instruction) -> String {
    if instruction.is_invalid() {
        return "(bad)".to_owned();
    }
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    options.set_space_after_operand_separator(true);
    options.set_rip_relative_addresses(true);
    let mut text = String::new();
    formatter.format(instruction, &mut text);
    text
}

#[cfg(test)]
pub(crate) mod real;
#[cfg(test)]
mod tests;
