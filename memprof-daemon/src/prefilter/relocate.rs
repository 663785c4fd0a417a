//! Functions' first instructions, moved elsewhere.
//!
//! A jump over a function's entry takes the place of its first instructions. They are
//! executed elsewhere instead, followed by a jump to where the function goes on. That is
//! the same to the program if nothing else leads to between them, if they refer to the same
//! places as before, and if none tells anybody where it stands (as a call does by its
//! return address).

mod copy;
mod lead;

use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind,
};

pub use copy::Relocated;
use lead::Lead;

/// A jump with a 32-bit distance: opcode and distance.
pub const JUMP_BYTES: usize = 5;
const JMP_REL32: u8 = 0xe9;
/// What relocated instructions and the jump back take at most: one of 15 bytes that stays,
/// four bytes of others and one of 15, of which short branches can grow, `loop` and its kin the
/// most.
pub const MAX_RELOCATED_BYTES: usize = 80;
/// The entry's bytes are exchanged by words of this size, which must not cross pages: the
/// next may be of another file.
const WORD_BYTES: u64 = 8;
const PAGE_BYTES: u64 = 4096;

/// Why a function cannot be entered by a jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no space for a jump.
    #[error("it is too short for a jump: {bytes} bytes")]
    TooShort {
        /// Behind its `endbr64`.
        bytes: usize,
    },
    /// It goes on elsewhere, or returns, and what is behind has a meaning of its own.
    #[error("it leaves within the first {JUMP_BYTES} bytes")]
    Leaves,
    /// Code leads to between the instructions.
    #[error("code leads to {0:#x}, within its first instructions")]
    JumpTarget(u64),
    /// It jumps back to its entry, which would count as a call.
    #[error("it jumps back to its entry at {0:#x}")]
    Loops(u64),
    /// The return address would be another.
    #[error("it calls another within its first instructions")]
    Call,
    /// Bytes that are no instruction, or none that programs execute and go on.
    #[error("what is at {0:#x} is no instruction to move")]
    NotMovable(u64),
    /// Another tool's probe, perhaps, but in the file.
    #[error("a breakpoint is at {0:#x}")]
    Breakpoint(u64),
    /// An instruction works with the bytes that the jump takes the place of.
    #[error("the instruction at {0:#x} refers to its own place")]
    RefersToItself(u64),
    /// The jump cannot be written in one go.
    #[error("its entry at {0:#x} is at the end of a page")]
    CrossesPage(u64),
    /// From where the instructions are to run.
    #[error("{target:#x} is out of reach from {from:#x}")]
    OutOfReach {
        /// Where they are to run.
        from: u64,
        /// What they refer to.
        target: u64,
    },
    /// The encoder has no such form.
    #[error("its first instructions cannot be encoded")]
    Encoding,
}

/// The first instructions of a function, which a jump takes the place of.
#[derive(Clone, Debug)]
pub struct Displaced {
    /// They as they are, [`JUMP_BYTES`] or more.
    pub bytes: Vec<u8>,
    /// Where they are.
    pub address: u64,
    instructions: Vec<Instruction>,
    /// The last is not a jump or a return.
    goes_on: bool,
    /// The function's first instruction, if that stays, before the jump.
    lead: Option<Lead>,
}

/// The jump at `from` that leads to `to`; none if that is out of its reach.
#[must_use]
pub fn jump(from: u64, to: u64) -> Option<[u8; JUMP_BYTES]> {
    let behind = from.wrapping_add(JUMP_BYTES as u64);
    let distance = i32::try_from(to.wrapping_sub(behind).cast_signed()).ok()?;
    let mut jump = [JMP_REL32; JUMP_BYTES];
    *jump.last_chunk_mut()? = distance.to_le_bytes();
    Some(jump)
}

/// The instructions to displace of the function at `address`: whole ones that take the
/// space of a jump, behind `endbr64`, which has to be the first where indirect branches
/// are checked. `code` is all of the function.
///
/// Jumps from outside of `code` are for the caller to look for. Indirect jumps are taken to
/// lead elsewhere: compilers fill tables of jumps with places behind the jump that uses them.
///
/// # Errors
///
/// Why there can be no jump.
pub fn displace(code: &[u8], address: u64) -> Result<Displaced, Refusal> {
    let displaced = first_instructions(code, address)?;
    let entry = displaced.address;
    if entry % PAGE_BYTES + WORD_BYTES > PAGE_BYTES {
        return Err(Refusal::CrossesPage(entry));
    }
    displaced.check_own_references(address)?;
    displaced.check_rest(code, address)?;
    Ok(displaced)
}

/// As [`displace`], but where it can be, the function's first instruction stays in its place,
/// so that another tool's uprobe there does no harm.
///
/// # Errors
///
/// As [`displace`].
pub fn displace_behind_first(code: &[u8], address: u64) -> Result<Displaced, Refusal> {
    // As a whole it has to be fit: nothing leads back to its entry.
    let plain = displace(code, address)?;
    Ok(behind_first(code, &plain).unwrap_or(plain))
}

fn behind_first(code: &[u8], plain: &Displaced) -> Option<Displaced> {
    let lead = Lead::of(*plain.instructions.first()?)?;
    let second = lead.instruction.next_ip();
    let length = lead.instruction.len();
    // Not behind `endbr64`: there it stays anyway.
    let is_first = plain.bytes.get(..length) == code.get(..length);
    let displaced = displace(code.get(length..)?, second).ok()?;
    let fits = is_first && displaced.address == second;
    let displaced = Displaced {
        lead: Some(lead),
        ..displaced
    };
    (fits && displaced.refers_to_itself().is_none()).then_some(displaced)
}

fn first_instructions(code: &[u8], address: u64) -> Result<Displaced, Refusal> {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    let mut instruction = decoder.decode();
    let skipped = if instruction.code() == Code::Endbr64 {
        let skipped = decoder.position();
        instruction = decoder.decode();
        skipped
    } else {
        0
    };
    let code = code.get(skipped..).unwrap_or_default();
    let mut displaced = Displaced {
        bytes: Vec::new(),
        address: address.wrapping_add(skipped as u64),
        instructions: Vec::new(),
        goes_on: true,
        lead: None,
    };
    let mut length = 0;
    loop {
        match decoder.last_error() {
            DecoderError::None => {}
            DecoderError::NoMoreBytes => return Err(Refusal::TooShort { bytes: code.len() }),
            _ => return Err(Refusal::NotMovable(instruction.ip())),
        }
        displaced.goes_on = goes_on(&instruction)?;
        length += instruction.len();
        displaced.instructions.push(instruction);
        if length >= JUMP_BYTES {
            displaced.bytes = code.get(..length).unwrap_or_default().to_vec();
            return Ok(displaced);
        }
        if !displaced.goes_on {
            let bytes = code.len();
            return Err(if bytes < JUMP_BYTES {
                Refusal::TooShort { bytes }
            } else {
                Refusal::Leaves
            });
        }
        decoder.decode_out(&mut instruction);
    }
}

/// Whether the next instruction can be executed after this one, if it can be moved at all.
fn goes_on(instruction: &Instruction) -> Result<bool, Refusal> {
    let at = instruction.ip();
    match instruction.flow_control() {
        _ if matches!(instruction.code(), Code::Int3 | Code::Int1) => Err(Refusal::Breakpoint(at)),
        // The second one of a function is where an indirect branch leads to.
        _ if instruction.code() == Code::Endbr64 => Err(Refusal::JumpTarget(at)),
        FlowControl::Next if instruction.is_privileged() => Err(Refusal::NotMovable(at)),
        FlowControl::Next => Ok(true),
        FlowControl::ConditionalBranch if is_near(instruction) => Ok(true),
        FlowControl::UnconditionalBranch if is_near(instruction) => Ok(false),
        FlowControl::IndirectBranch if instruction.is_jmp_near_indirect() => Ok(false),
        FlowControl::Return if instruction.mnemonic() == Mnemonic::Ret => Ok(false),
        FlowControl::Call | FlowControl::IndirectCall
            if instruction.mnemonic() == Mnemonic::Call =>
        {
            Err(Refusal::Call)
        }
        _ => Err(Refusal::NotMovable(at)),
    }
}

/// A direct branch of 64-bit code.
fn is_near(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::NearBranch64
}

/// Where a direct branch leads to.
fn branch_target(instruction: &Instruction) -> Option<u64> {
    is_near(instruction).then(|| instruction.near_branch_target())
}

/// What an instruction finds by its own place.
fn own_reference(instruction: &Instruction) -> Option<u64> {
    instruction
        .is_ip_rel_memory_operand()
        .then(|| instruction.ip_rel_memory_address())
}

impl Displaced {
    /// Where the function goes on at once, if it is nothing but a jump.
    #[must_use]
    pub fn passes_on_to(&self) -> Option<u64> {
        match self.instructions.as_slice() {
            [jump] if !self.goes_on && self.lead.is_none() => branch_target(jump),
            _ => None,
        }
    }

    /// The bytes that must not be executed, nor returned to, any more.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.address..self.end()
    }

    /// The addresses that nothing but the instruction before may lead to. The first of the
    /// function is where all calls lead.
    #[must_use]
    pub fn inside(&self) -> Range<u64> {
        let start = self.address.wrapping_add(u64::from(self.lead.is_none()));
        start..self.end()
    }

    /// Where the function begins: with the instruction that stays, if one does.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.all().next().map_or(self.address, Instruction::ip)
    }

    /// What is to be executed before anything else, where the jump leads to, so that all is as
    /// it was when the function was called.
    #[must_use]
    pub fn undo(&self) -> Vec<u8> {
        self.lead.as_ref().map(Lead::undo).unwrap_or_default()
    }

    /// Where the function goes on.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address.wrapping_add(self.bytes.len() as u64)
    }

    /// Those that run elsewhere.
    fn all(&self) -> impl Iterator<Item = &Instruction> {
        let lead = self.lead.as_ref().map(|lead| &lead.instruction);
        lead.into_iter().chain(&self.instructions)
    }

    /// What must be within 2 GiB of where the instructions are to run.
    pub fn references(&self) -> impl Iterator<Item = u64> + '_ {
        let own = self.all().flat_map(|instruction| {
            branch_target(instruction)
                .into_iter()
                .chain(own_reference(instruction))
        });
        own.chain(self.goes_on.then(|| self.end()))
    }

    /// The instruction, of those that run elsewhere, that works with one of them: the encoder
    /// leads it to the copy, which would be wrong.
    fn refers_to_itself(&self) -> Option<u64> {
        let moved = self.start()..self.end();
        self.all()
            .find(|one| own_reference(one).is_some_and(|place| moved.contains(&place)))
            .map(Instruction::ip)
    }

    /// Branches among the displaced instructions lead to their copies, and so do not harm.
    fn check_own_references(&self, address: u64) -> Result<(), Refusal> {
        let is_one_of_them = |target| self.instructions.iter().any(|one| one.ip() == target);
        if let Some(place) = self.refers_to_itself() {
            return Err(Refusal::RefersToItself(place));
        }
        for instruction in &self.instructions {
            match branch_target(instruction) {
                Some(target) if (address..self.address).contains(&target) => {
                    return Err(Refusal::Loops(target));
                }
                Some(target) if self.range().contains(&target) && !is_one_of_them(target) => {
                    return Err(Refusal::JumpTarget(target));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What is behind the displaced instructions must not lead to between them. What is not
    /// code is decoded as if it were: that can only find branches too many.
    fn check_rest(&self, code: &[u8], address: u64) -> Result<(), Refusal> {
        let inside = self.address.wrapping_add(1)..self.end();
        let skipped = self.end().wrapping_sub(address);
        let rest = usize::try_from(skipped).ok().and_then(|at| code.get(at..));
        let decoder = Decoder::with_ip(
            64,
            rest.unwrap_or_default(),
            self.end(),
            DecoderOptions::NONE,
        );
        for instruction in decoder {
            if instruction.is_invalid() {
                continue;
            }
            let reference = own_reference(&instruction);
            let branch = branch_target(&instruction);
            for target in reference.into_iter().chain(branch) {
                if inside.contains(&target) {
                    return Err(Refusal::JumpTarget(target));
                }
            }
            let is_call = instruction.flow_control() == FlowControl::Call;
            if let Some(target) = branch
                && (address..=self.address).contains(&target)
                && !is_call
            {
                return Err(Refusal::Loops(target));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
