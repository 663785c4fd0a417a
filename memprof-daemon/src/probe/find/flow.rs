//! Where the ways through a function lead.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};
use memprof_common::function::Function;

use super::{
    linkage::{Goal, Linkage, goal},
    points::read_code,
};
use crate::{address::VirtOffset, process::elf::ElfLayout};

/// Of a function that is longer, it is not known where it leads.
const MAX_INSTRUCTIONS: usize = 8192;
/// Code is read in pieces of this size.
const PIECE_BYTES: u64 = 4096;
const MAX_INSTRUCTION_BYTES: u64 = 15;

/// How a function ends.
#[derive(Debug, Default)]
pub(super) struct Flow {
    /// Addresses of the `ret`s at which it returns to its caller, in parts that it jumps to
    /// too.
    pub(super) returns: BTreeSet<u64>,
    /// Some way calls another function that is looked for, or jumps to it.
    pub(super) leads_on: bool,
    /// The jumps that end the function, and calls, by which it surely leads on: where they are,
    /// and to which function.
    pub(super) passes: BTreeSet<(u64, u64)>,
    /// There are ways that cannot be followed.
    pub(super) is_unknown: bool,
}

/// How deep a function is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Through jumps, to all of its ends.
    Jumps,
    /// Through calls of the file's functions, too, so deep; and not where a call has returned 0:
    /// what a function does that runs out of memory, an allocator's `new` does by `malloc`.
    Calls,
}

/// How many calls deep. Further down allocators set themselves up, by `new` among others.
const MAX_CALLS: u32 = 1;

impl Flow {
    /// Whether each call comes by another function that is looked for, before it returns.
    pub(super) fn always_leads_on(&self) -> bool {
        self.leads_on && !self.is_unknown && self.returns.is_empty()
    }
}

/// Code of a file by address, the last piece kept.
struct CodeReader<'a> {
    file: &'a File,
    layout: &'a ElfLayout,
    start: u64,
    bytes: Vec<u8>,
}

impl CodeReader<'_> {
    /// The instruction at `address`; none if there is none.
    fn instruction(&mut self, address: u64) -> Option<Instruction> {
        let within = address.wrapping_sub(self.start);
        let held = self.bytes.len() as u64;
        let is_held = within < held && (held - within >= MAX_INSTRUCTION_BYTES || within == 0);
        if !is_held {
            let offset = self.layout.code_offset(VirtOffset(address))?;
            let left = self.layout.code_bytes_from(VirtOffset(address));
            self.bytes = read_code(self.file, offset, left.min(PIECE_BYTES)).ok()?;
            self.start = address;
        }
        let from = usize::try_from(address.wrapping_sub(self.start)).ok()?;
        let bytes = self.bytes.get(from..)?;
        let instruction = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE)
            .into_iter()
            .next()?;
        (!instruction.is_invalid()).then_some(instruction)
    }
}

/// Follows the function at an address on all its ways: through jumps to other parts and to
/// functions that end it (tail calls); and not behind a call of or a jump to one of `others`,
/// which are addresses of functions.
///
/// Ways on which no block is handed out or given up are left out: of a `free`, those for a first
/// argument of 0, where the function asks for it at its beginning; of others, those that return
/// 0 for certain. Of a pool's function all are followed.
pub(super) fn follow(
    file: &File,
    layout: &ElfLayout,
    linkage: &mut Linkage<'_>,
    function: (Function, u64),
    others: &[u64],
    depth: Depth,
) -> Flow {
    let (function, start) = function;
    let is_free = function.is_free() && !function.is_pool();
    // To the others, 0 is a failure; all ends are wanted of those that may throw.
    let zero_fails = !is_free
        && !function.throws()
        && !function.is_pool()
        && !matches!(function, Function::PosixMemalign | Function::Xallocx);
    let mut reader = CodeReader {
        file,
        layout,
        start: 0,
        bytes: Vec::new(),
    };
    let mut flow = Flow::default();
    let mut seen = BTreeSet::new();
    // What was passed on the way to a `ret` that returns 0, and that `ret`.
    let mut failures: BTreeMap<u64, u64> = BTreeMap::new();
    let mut ways = vec![(start, 0)];
    while let Some((way, calls)) = ways.pop() {
        let mut at = way;
        let mut is_zero_tested = false;
        // Whether the register has what a call has returned.
        let mut is_result = false;
        // Whether the register still has the first argument.
        let mut is_argument = is_free && way == start;
        let mut returns_zero = false;
        let mut failing = Vec::new();
        while seen.insert(at) {
            let Some(instruction) = reader.instruction(at) else {
                flow.is_unknown = true;
                break;
            };
            if seen.len() > MAX_INSTRUCTIONS {
                flow.is_unknown = true;
                return flow;
            }
            let next = instruction.next_ip();
            let leads_on = |linkage: &mut Linkage<'_>, goal: Option<Goal>| {
                let known = match goal {
                    Some(Goal::Code(address)) if others.contains(&address) => Some(address),
                    Some(goal) => linkage.resolve(goal),
                    None => None,
                };
                (
                    known.is_some_and(|address| others.contains(&address)),
                    known,
                )
            };
            match instruction.flow_control() {
                FlowControl::Next => {}
                FlowControl::Call | FlowControl::IndirectCall => {
                    match leads_on(linkage, goal(&instruction)) {
                        (true, known) => {
                            flow.leads_on = true;
                            flow.passes.extend(known.map(|known| (at, known)));
                            break;
                        }
                        (false, Some(target)) if depth == Depth::Calls && calls < MAX_CALLS => {
                            ways.push((target, calls + 1));
                        }
                        _ => {}
                    }
                }
                FlowControl::ConditionalBranch => {
                    let target = instruction.near_branch_target();
                    match instruction.mnemonic() {
                        Mnemonic::Je if is_zero_tested => {}
                        Mnemonic::Jne if is_zero_tested => {
                            at = target;
                            is_zero_tested = false;
                            continue;
                        }
                        _ => match leads_on(linkage, Some(Goal::Code(target))) {
                            (true, _) => flow.leads_on = true,
                            _ => ways.push((target, calls)),
                        },
                    }
                }
                FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => {
                    match leads_on(linkage, goal(&instruction)) {
                        (true, known) => {
                            flow.leads_on = true;
                            flow.passes.extend(known.map(|known| (at, known)));
                        }
                        (false, Some(target)) => ways.push((target, calls)),
                        (false, None) => flow.is_unknown = true,
                    }
                    break;
                }
                FlowControl::Return if calls > 0 => break,
                FlowControl::Return => {
                    if returns_zero {
                        failures.extend(failing.iter().map(|&passed| (passed, at)));
                    } else {
                        flow.returns.insert(at);
                    }
                    break;
                }
                // ud2 behind a call that does not return.
                FlowControl::Exception | FlowControl::Interrupt => break,
                _ => {
                    flow.is_unknown = true;
                    break;
                }
            }
            is_zero_tested = is_argument && tests(&instruction, Register::RDI)
                || is_result && tests(&instruction, Register::RAX);
            let is_call = matches!(
                instruction.flow_control(),
                FlowControl::Call | FlowControl::IndirectCall
            );
            is_result = depth == Depth::Calls
                && (is_call || is_result && !may_change(&instruction, Register::RAX));
            is_argument &= !may_change(&instruction, Register::RDI);
            if zero_fails && clears_result(&instruction) {
                returns_zero = true;
            } else if may_change(&instruction, Register::RAX) {
                returns_zero = false;
            }
            at = next;
            if returns_zero {
                failing.push(at);
            } else {
                failing.clear();
            }
        }
        // Another way to where one has failed.
        if !returns_zero && let Some(&end) = failures.get(&at) {
            flow.returns.insert(end);
        }
    }
    flow
}

/// `test rdi, rdi`, which at a function's beginning asks whether its first argument is 0;
/// `test rax, rax` does so of what a call has returned.
fn tests(instruction: &Instruction, register: Register) -> bool {
    instruction.mnemonic() == Mnemonic::Test
        && instruction.op0_register() == register
        && instruction.op1_register() == register
}

/// `xor eax, eax`
fn clears_result(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Xor
        && instruction.op0_register() == Register::EAX
        && instruction.op1_register() == Register::EAX
}

/// Whether `register` may be another behind it.
fn may_change(instruction: &Instruction, register: Register) -> bool {
    let mut usage = InstructionInfoFactory::new();
    let used = usage.info(instruction).used_registers();
    let calls = matches!(
        instruction.flow_control(),
        FlowControl::Call | FlowControl::IndirectCall
    );
    calls
        || used.iter().any(|used| {
            used.register().full_register() == register
                && !matches!(
                    used.access(),
                    OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
                )
        })
}
