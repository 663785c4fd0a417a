//! One row of unwind information to one rule.

use std::collections::HashMap;

use gimli::{
    CfaRule, Encoding, Expression, Operation, Register, RegisterRule, UnwindExpression,
    UnwindTableRow, X86_64,
};
use memprof_common::unwind::rule::{BpRule, MAX_WIDE_RULES, Rule, WideRule};

use super::rows::Slice;

/// Wide rules beyond these are not followed: compilers need a few.
const MAX_WIDE: usize = 1 << 16;

const _: () = assert!(MAX_WIDE <= MAX_WIDE_RULES);

/// See [`memprof_common::unwind::rule::RuleKind::Plt`].
const USUAL_PUSH: u64 = 11;

/// Rules that take two words, each once.
#[derive(Debug, Default)]
pub(super) struct WideRules {
    numbers: HashMap<WideRule, u32>,
    words: Vec<u64>,
}

impl WideRules {
    fn rule(&mut self, wide: WideRule) -> Rule {
        let count = self.numbers.len();
        if let Some(&number) = self.numbers.get(&wide) {
            return Rule::wide(number);
        }
        if count >= MAX_WIDE {
            return Rule::UNSUPPORTED;
        }
        let number = count as u32;
        self.numbers.insert(wide, number);
        self.words.extend(wide.to_words());
        Rule::wide(number)
    }

    pub(super) fn into_words(self) -> Vec<u64> {
        self.words
    }
}

/// Reads expressions of the section that rows are of.
pub(super) struct Expressions<'a> {
    pub(super) section: &'a [u8],
    pub(super) encoding: Encoding,
}

impl<'a> Expressions<'a> {
    fn get(&self, at: &UnwindExpression<usize>) -> Option<Expression<Slice<'a>>> {
        let bytes = self.section.get(at.offset..)?.get(..at.length)?;
        Some(Expression(Slice::new(bytes, gimli::LittleEndian)))
    }

    /// As many operations as fit `N`, and none of the rest.
    fn operations<const N: usize>(
        &self,
        at: &UnwindExpression<usize>,
    ) -> Option<Vec<Operation<Slice<'a>>>> {
        let mut operations = self.get(at)?.operations(self.encoding);
        let mut all = Vec::with_capacity(N);
        while let Some(operation) = operations.next().ok()? {
            if all.len() == N {
                return None;
            }
            all.push(operation);
        }
        Some(all)
    }
}

/// The rule that a row says. `is_signal`: the function is what signal handlers return to.
pub(super) fn convert(
    row: &UnwindTableRow<usize>,
    is_signal: bool,
    expressions: &Expressions<'_>,
    wide: &mut WideRules,
) -> Rule {
    if is_signal {
        return signal(row, expressions);
    }
    match row.register(X86_64::RA) {
        Some(RegisterRule::Offset(-8)) => {}
        Some(RegisterRule::Undefined) => return Rule::END,
        _ => return Rule::UNSUPPORTED,
    }
    let (bp, bp_offset) = match row.register(X86_64::RBP) {
        // Called functions preserve it, said or not.
        None | Some(RegisterRule::SameValue) => (BpRule::Same, 0),
        Some(RegisterRule::Offset(offset)) => (BpRule::AtCfa, offset),
        Some(RegisterRule::Expression(at)) => match expressions.operations::<1>(&at).as_deref() {
            Some(
                &[
                    Operation::RegisterOffset {
                        register: X86_64::RBP,
                        offset,
                        ..
                    },
                ],
            ) => (BpRule::AtBp, offset),
            _ => (BpRule::Undefined, 0),
        },
        Some(_) => (BpRule::Undefined, 0),
    };
    let mut widen = |from_bp, in_memory, cfa_offset: i64, cfa_add: i64| {
        let (Ok(cfa_offset), Ok(cfa_add), Ok(bp_offset)) = (
            i32::try_from(cfa_offset),
            i32::try_from(cfa_add),
            i32::try_from(bp_offset),
        ) else {
            return Rule::UNSUPPORTED;
        };
        wide.rule(WideRule {
            from_bp,
            in_memory,
            cfa_offset,
            cfa_add,
            bp: bp as u32,
            bp_offset,
        })
    };
    match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => match is_bp(*register) {
            Some(from_bp) => Rule::narrow(from_bp, *offset, bp, bp_offset)
                .unwrap_or_else(|| widen(from_bp, false, *offset, 0)),
            None => Rule::UNSUPPORTED,
        },
        CfaRule::Expression(at) => {
            let Some(operations) = expressions.operations::<9>(at) else {
                return Rule::UNSUPPORTED;
            };
            if pushed_from(&operations) == Some(USUAL_PUSH) {
                return Rule::PLT;
            }
            let (first, rest) = match operations.split_first() {
                Some((
                    &Operation::RegisterOffset {
                        register, offset, ..
                    },
                    rest,
                )) => ((is_bp(register), offset), rest),
                _ => return Rule::UNSUPPORTED,
            };
            match (first, rest) {
                ((Some(from_bp), offset), []) => widen(from_bp, false, offset, 0),
                ((Some(from_bp), offset), [deref]) if is_word(deref) => {
                    widen(from_bp, true, offset, 0)
                }
                ((Some(from_bp), offset), [deref, Operation::PlusConstant { value }])
                    if is_word(deref) =>
                {
                    i64::try_from(*value)
                        .map_or(Rule::UNSUPPORTED, |add| widen(from_bp, true, offset, add))
                }
                _ => Rule::UNSUPPORTED,
            }
        }
    }
}

fn is_bp(register: Register) -> Option<bool> {
    match register {
        X86_64::RSP => Some(false),
        X86_64::RBP => Some(true),
        _ => None,
    }
}

fn is_word(operation: &Operation<Slice<'_>>) -> bool {
    matches!(
        operation,
        Operation::Deref {
            size: 8,
            space: false,
            ..
        }
    )
}

/// What linkers write for a procedure linkage table whose entries take 16 bytes and push
/// a word: `rsp + 8 + ((rip & 15) >= N) * 8`. N, behind the push, is 11; 9 in a table for
/// processors that check where jumps lead, 5 in one for those that checked bounds
/// (`elf_x86_64_eh_frame_lazy_plt` and its like in bfd/elf64-x86-64.c of binutils 2.40).
fn pushed_from(operations: &[Operation<Slice<'_>>]) -> Option<u64> {
    match operations {
        [
            Operation::RegisterOffset {
                register: X86_64::RSP,
                offset: 8,
                ..
            },
            Operation::RegisterOffset {
                register: X86_64::RA,
                offset: 0,
                ..
            },
            Operation::UnsignedConstant { value: 15 },
            Operation::And,
            Operation::UnsignedConstant {
                value: from @ 1..=15,
            },
            Operation::Ge,
            Operation::UnsignedConstant { value: 3 },
            Operation::Shl,
            Operation::Plus,
        ] => Some(*from),
        _ => None,
    }
}

/// Of a row of a linkage table: from which byte of an entry on a word more is pushed, where
/// that is another than [`Rule::PLT`] has.
pub(super) fn unusual_linkage(
    row: &UnwindTableRow<usize>,
    expressions: &Expressions<'_>,
) -> Option<u64> {
    let CfaRule::Expression(at) = row.cfa() else {
        return None;
    };
    let simple = row.register(X86_64::RA) == Some(RegisterRule::Offset(-8))
        && matches!(
            row.register(X86_64::RBP),
            None | Some(RegisterRule::SameValue)
        );
    let operations = expressions.operations::<9>(at).filter(|_| simple)?;
    pushed_from(&operations).filter(|from| *from != USUAL_PUSH)
}

/// What the kernel leaves on the stack is the same for all; that the file says so is
/// checked (`struct ucontext`, arch/x86/include/uapi/asm/ucontext.h).
fn signal(row: &UnwindTableRow<usize>, expressions: &Expressions<'_>) -> Rule {
    let at_rsp = |operations: Option<&[Operation<Slice<'_>>]>, wanted: i64| {
        matches!(
            operations,
            Some([Operation::RegisterOffset { register: X86_64::RSP, offset, .. }, ..])
                if *offset == wanted
        )
    };
    let CfaRule::Expression(cfa) = row.cfa() else {
        return Rule::UNSUPPORTED;
    };
    let cfa = expressions.operations::<2>(cfa);
    let is_cfa =
        at_rsp(cfa.as_deref(), 160) && cfa.as_deref().and_then(<[_]>::last).is_some_and(is_word);
    let is_at = |register, wanted| match row.register(register) {
        Some(RegisterRule::Expression(at)) => {
            at_rsp(expressions.operations::<1>(&at).as_deref(), wanted)
        }
        _ => false,
    };
    if is_cfa && is_at(X86_64::RA, 168) && is_at(X86_64::RBP, 120) {
        Rule::SIGNAL
    } else {
        Rule::UNSUPPORTED
    }
}
