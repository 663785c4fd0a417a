//! The displaced instructions, made to run elsewhere.

use iced_x86::{BlockEncoder, BlockEncoderOptions, Instruction, InstructionBlock};

use super::{Displaced, MAX_RELOCATED_BYTES, Refusal, jump};
use crate::prefilter::moves::Move;

/// Displaced instructions as they run elsewhere.
#[derive(Clone, Debug)]
pub struct Relocated {
    /// They, and a jump back if the function goes on behind them.
    pub bytes: Vec<u8>,
    /// Each of them that is one instruction still, and the jump back.
    pub moves: Vec<Move>,
}

impl Displaced {
    /// The instructions to run at `to` in place of the displaced ones, with a jump back
    /// behind them.
    ///
    /// # Errors
    ///
    /// What they refer to is out of reach from there.
    pub fn relocate(&self, to: u64) -> Result<Relocated, Refusal> {
        let last = to.wrapping_add(MAX_RELOCATED_BYTES as u64);
        let is_near = |from: u64, target: u64| {
            let distance = target.wrapping_sub(from).cast_signed();
            i32::try_from(distance).is_ok()
        };
        if let Some(target) = self
            .references()
            .find(|&target| !is_near(to, target) || !is_near(last, target))
        {
            return Err(Refusal::OutOfReach { from: to, target });
        }
        let instructions: Vec<Instruction> = self.all().copied().collect();
        let block = InstructionBlock::new(&instructions, to);
        let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let encoded = BlockEncoder::encode(64, block, options).map_err(|_| Refusal::Encoding)?;
        let mut bytes = encoded.code_buffer;
        let offsets = encoded.new_instruction_offsets.into_iter();
        let mut moves: Vec<Move> = instructions
            .iter()
            .zip(offsets)
            // One that has become several is at no one place.
            .filter(|&(_, offset)| offset != u32::MAX)
            .map(|(instruction, offset)| Move {
                text: instruction.ip(),
                image: to.wrapping_add(offset.into()),
            })
            .collect();
        if self.goes_on {
            let (from, target) = (to.wrapping_add(bytes.len() as u64), self.end());
            bytes.extend(jump(from, target).ok_or(Refusal::OutOfReach { from, target })?);
            moves.push(Move {
                text: target,
                image: from,
            });
        }
        if bytes.len() > MAX_RELOCATED_BYTES {
            return Err(Refusal::Encoding);
        }
        Ok(Relocated { bytes, moves })
    }
}
