//! How a walk gets from a frame in an image to its caller.
//!
//! Stacks lead through an image where a signal has interrupted a stub, or a function that a stub
//! follows, and its handler allocates. The stubs have no unwind information of a compiler's: their
//! code is followed instead, instruction by instruction, from where it is entered, which tells how
//! far the stack pointer is below the caller's. The displaced instructions of the functions are
//! followed with it.

use std::collections::{BTreeMap, btree_map::Entry};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};
use memprof_common::unwind::rule::{BpRule, Rule};

use crate::address::FileOffset;

/// From this offset in an image on, this rule.
pub type Row = (u32, Rule);

/// The rows of one image of a memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeRows {
    /// Where it is in the file.
    pub offset: FileOffset,
    /// How many bytes are mapped.
    pub bytes: u64,
    /// Offsets from there.
    pub rows: Vec<Row>,
}

/// How stacks are walked through the code of a memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRows {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Its images, in their order.
    pub code: Vec<CodeRows>,
}

/// Where code of an image is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entered {
    /// The address.
    pub(super) at: u64,
    /// From the stack pointer up to the caller's.
    pub(super) depth: u64,
}

/// Behind a call: the return address is all there is.
pub(super) const CALLED: u64 = 8;

/// What is known of the stack in front of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// From the stack pointer up to the caller's; none if that cannot be told.
    depth: Option<u64>,
    bp: Bp,
}

/// Where the caller's rbp is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bp {
    /// Where it was.
    Same,
    /// So far below the caller's stack pointer.
    Below(u64),
    /// Not known.
    Lost,
}

impl State {
    const fn entered(depth: u64) -> Self {
        Self {
            depth: Some(depth),
            bp: Bp::Same,
        }
    }

    fn rule(self) -> Rule {
        let (bp, below) = match self.bp {
            Bp::Same => (BpRule::Same, 0),
            Bp::Below(below) => (BpRule::AtCfa, below),
            Bp::Lost => (BpRule::Undefined, 0),
        };
        let depth = self.depth.and_then(|depth| i64::try_from(depth).ok());
        let below = i64::try_from(below).unwrap_or(0);
        depth
            .and_then(|depth| Rule::narrow(false, depth, bp, -below))
            .unwrap_or(Rule::UNSUPPORTED)
    }
}

/// The rows of the image that is to be at `at`; ascending, with [`Rule::NONE`] from where no
/// code is.
pub(super) fn rows(image: &[u8], at: u64, entered: &[Entered]) -> Vec<Row> {
    let mut followed = Followed {
        image,
        at,
        states: BTreeMap::new(),
        open: Vec::new(),
        factory: InstructionInfoFactory::new(),
    };
    for entered in entered {
        followed.reach(entered.at, State::entered(entered.depth));
    }
    while let Some(address) = followed.open.pop() {
        followed.follow(address);
    }
    followed.rows()
}

/// How far the stack pointer moves over straight code, upwards.
pub(super) fn moves_stack_by(code: &[u8]) -> Option<i64> {
    let mut factory = InstructionInfoFactory::new();
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    decoder
        .iter()
        .map(|instruction| moved(&instruction, &mut factory))
        .sum()
}

struct Followed<'a> {
    image: &'a [u8],
    at: u64,
    /// Each instruction, with its length once it was looked at.
    states: BTreeMap<u64, (State, usize)>,
    open: Vec<u64>,
    factory: InstructionInfoFactory,
}

impl Followed<'_> {
    /// Control comes to `address`, if that is in the image.
    fn reach(&mut self, address: u64, state: State) {
        let end = self.at.wrapping_add(self.image.len() as u64);
        if !(self.at..end).contains(&address) {
            return;
        }
        match self.states.entry(address) {
            Entry::Vacant(place) => {
                place.insert((state, 0));
                self.open.push(address);
            }
            Entry::Occupied(mut place) => {
                let known = &mut place.get_mut().0;
                // By two ways that leave it at two depths. Once only, so this ends.
                if *known != state && (known.depth.is_some() || known.bp != Bp::Lost) {
                    let depth = known.depth.filter(|_| known.depth == state.depth);
                    let bp = if known.bp == state.bp {
                        known.bp
                    } else {
                        Bp::Lost
                    };
                    if *known != (State { depth, bp }) {
                        *known = State { depth, bp };
                        self.open.push(address);
                    }
                }
            }
        }
    }

    fn follow(&mut self, address: u64) {
        let offset = usize::try_from(address.wrapping_sub(self.at)).unwrap_or(usize::MAX);
        let code = self.image.get(offset..).unwrap_or_default();
        let instruction = Decoder::with_ip(64, code, address, DecoderOptions::NONE).decode();
        let Some((state, length)) = self.states.get_mut(&address) else {
            return;
        };
        let state = *state;
        if instruction.is_invalid() {
            *length = 1;
            return;
        }
        *length = instruction.len();
        let next = instruction.next_ip();
        let target = (instruction.op0_kind() == OpKind::NearBranch64)
            .then(|| instruction.near_branch_target());
        match instruction.flow_control() {
            FlowControl::Next => {
                let behind = behind(&instruction, state, &mut self.factory);
                self.reach(next, behind);
            }
            FlowControl::ConditionalBranch => {
                target
                    .into_iter()
                    .for_each(|target| self.reach(target, state));
                self.reach(next, state);
            }
            FlowControl::UnconditionalBranch => {
                target
                    .into_iter()
                    .for_each(|target| self.reach(target, state));
            }
            FlowControl::Call => {
                let entered = State::entered(CALLED);
                target
                    .into_iter()
                    .for_each(|target| self.reach(target, entered));
                // What is called preserves both.
                self.reach(next, state);
            }
            _ => {}
        }
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = vec![(0, Rule::NONE)];
        let mut end = 0;
        let mut push = |offset: u32, rule: Rule| {
            if let Some(last) = rows.last_mut().filter(|last| last.0 == offset) {
                last.1 = rule;
            } else if rows.last().is_some_and(|last| last.1 != rule) {
                rows.push((offset, rule));
            }
        };
        for (address, (state, length)) in &self.states {
            let Ok(offset) = u32::try_from(address.wrapping_sub(self.at)) else {
                continue;
            };
            if offset > end {
                push(end, Rule::NONE);
            }
            push(offset, state.rule());
            end = offset.saturating_add(*length as u32);
        }
        push(end, Rule::NONE);
        rows
    }
}

/// The stack behind an instruction that goes on to the next.
fn behind(instruction: &Instruction, state: State, factory: &mut InstructionInfoFactory) -> State {
    let moved = moved(instruction, factory);
    let depth = state
        .depth
        .zip(moved)
        .and_then(|(depth, moved)| depth.checked_add_signed(-moved))
        .filter(|&depth| depth >= CALLED);
    let is_of_bp =
        instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::RBP;
    let bp = match (instruction.mnemonic(), state.bp) {
        (Mnemonic::Push, Bp::Same) if is_of_bp => depth.map_or(Bp::Lost, Bp::Below),
        (Mnemonic::Pop, Bp::Below(below)) if is_of_bp && state.depth == Some(below) => Bp::Same,
        (_, Bp::Same) if writes(instruction, Register::RBP, factory) => Bp::Lost,
        (_, bp) => bp,
    };
    State { depth, bp }
}

/// How far the stack pointer moves, upwards; none if that cannot be told.
fn moved(instruction: &Instruction, factory: &mut InstructionInfoFactory) -> Option<i64> {
    let is_sp = |operand: u32| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand) == Register::RSP
    };
    let has_number = instruction.op_count() == 2
        && matches!(
            instruction.op1_kind(),
            OpKind::Immediate8to64 | OpKind::Immediate32to64
        );
    match instruction.mnemonic() {
        Mnemonic::Push | Mnemonic::Pop if !is_sp(0) => {
            Some(instruction.stack_pointer_increment().into())
        }
        Mnemonic::Add if is_sp(0) && has_number => Some(instruction.immediate(1).cast_signed()),
        Mnemonic::Sub if is_sp(0) && has_number => {
            instruction.immediate(1).cast_signed().checked_neg()
        }
        Mnemonic::Lea
            if is_sp(0)
                && instruction.memory_base() == Register::RSP
                && instruction.memory_index() == Register::None =>
        {
            Some(instruction.memory_displacement64().cast_signed())
        }
        _ if writes(instruction, Register::RSP, factory) => None,
        _ => Some(0),
    }
}

fn writes(
    instruction: &Instruction,
    register: Register,
    factory: &mut InstructionInfoFactory,
) -> bool {
    let used = factory.info(instruction).used_registers();
    used.iter().any(|used| {
        used.register().full_register() == register
            && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
    })
}

#[cfg(test)]
#[path = "stack_rows_tests.rs"]
mod tests;
