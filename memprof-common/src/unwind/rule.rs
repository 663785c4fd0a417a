//! How to get from a frame to its caller.
//!
//! The *CFA* (canonical frame address) is the stack pointer of the caller, after
//! the call has returned. The return address lies in the word below it: no compiler
//! for x86-64 puts it elsewhere, and what does is [`RuleKind::Unsupported`].

/// What a row says, in 32 bits.
///
/// ```text
///  31        21 20              5 4    3 2    0
/// ┌────────────┬─────────────────┬──────┬──────┐
/// │ rbp / 8    │ CFA offset / 8  │ rbp  │ kind │
/// └────────────┴─────────────────┴──────┴──────┘
/// ```
///
/// Of [`RuleKind::Wide`] all but the kind is the index of the wide rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Rule(pub u32);

/// The kinds of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RuleKind {
    /// No function is described here.
    None = 0,
    /// CFA is rsp and an offset.
    Sp = 1,
    /// CFA is rbp and an offset.
    Bp = 2,
    /// See the [`WideRule`].
    Wide = 3,
    /// An entry of a procedure linkage table: CFA is `rsp + 8`, and 8 more from the
    /// 11th byte of its 16 on, after its push.
    Plt = 4,
    /// The caller was interrupted by a signal; the kernel has put its registers at
    /// rsp.
    Signal = 5,
    /// The outermost frame: the return address is undefined.
    End = 6,
    /// There is a rule, and it is not one that can be followed here.
    Unsupported = 7,
}

/// Where the caller's rbp is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BpRule {
    /// Where it was.
    Same = 0,
    /// In memory, at an offset from the CFA.
    AtCfa = 1,
    /// Lost.
    Undefined = 2,
    /// In memory, at an offset from this frame's rbp. Wide rules only.
    AtBp = 3,
}

const KIND_MASK: u32 = 7;
const BP_SHIFT: u32 = 3;
const CFA_SHIFT: u32 = 5;
const CFA_LIMIT: i64 = 1 << 16;
const SAVED_SHIFT: u32 = 21;
const SAVED_LIMIT: i64 = 1 << 11;
const WIDE_SHIFT: u32 = 3;
/// How many wide rules one module can have.
pub const MAX_WIDE_RULES: usize = 1 << 29;

impl Rule {
    /// No function is described here.
    pub const NONE: Self = Self(RuleKind::None as u32);
    /// See [`RuleKind::Plt`].
    pub const PLT: Self = Self(RuleKind::Plt as u32);
    /// See [`RuleKind::Signal`].
    pub const SIGNAL: Self = Self(RuleKind::Signal as u32);
    /// See [`RuleKind::End`].
    pub const END: Self = Self(RuleKind::End as u32);
    /// See [`RuleKind::Unsupported`].
    pub const UNSUPPORTED: Self = Self(RuleKind::Unsupported as u32);

    /// The rule in 32 bits, if it fits: the CFA is rsp or rbp (`from_bp`) and
    /// `cfa_offset`; rbp is kept as `bp` says, at `bp_offset` from the CFA if it is in
    /// memory.
    #[must_use]
    pub const fn narrow(
        from_bp: bool,
        cfa_offset: i64,
        bp: BpRule,
        bp_offset: i64,
    ) -> Option<Self> {
        if cfa_offset % 8 != 0 || cfa_offset < 0 || cfa_offset / 8 >= CFA_LIMIT {
            return None;
        }
        let saved = match bp {
            BpRule::Same | BpRule::Undefined => 0,
            BpRule::AtCfa => {
                if bp_offset % 8 != 0 || bp_offset > 0 || -(bp_offset / 8) >= SAVED_LIMIT {
                    return None;
                }
                -(bp_offset / 8)
            }
            BpRule::AtBp => return None,
        };
        let kind = if from_bp { RuleKind::Bp } else { RuleKind::Sp };
        Some(Self(
            kind as u32
                | (bp as u32) << BP_SHIFT
                | ((cfa_offset / 8) as u32) << CFA_SHIFT
                | (saved as u32) << SAVED_SHIFT,
        ))
    }

    /// The rule that is the module's wide rule number `index`, below
    /// [`MAX_WIDE_RULES`].
    #[must_use]
    pub const fn wide(index: u32) -> Self {
        Self(RuleKind::Wide as u32 | index << WIDE_SHIFT)
    }

    /// Its kind, as a number.
    #[must_use]
    #[inline(always)]
    pub const fn kind(self) -> u32 {
        self.0 & KIND_MASK
    }

    /// [`BpRule`] as a number.
    #[must_use]
    #[inline(always)]
    pub const fn bp(self) -> u32 {
        self.0 >> BP_SHIFT & 3
    }

    /// Of a narrow rule: bytes from the register to the CFA.
    #[must_use]
    #[inline(always)]
    pub const fn cfa_offset(self) -> u64 {
        ((self.0 >> CFA_SHIFT & 0xffff) as u64) * 8
    }

    /// Of a narrow rule: bytes from the saved rbp up to the CFA.
    #[must_use]
    #[inline(always)]
    pub const fn bp_below_cfa(self) -> u64 {
        ((self.0 >> SAVED_SHIFT) as u64) * 8
    }

    /// Of [`RuleKind::Wide`]: which.
    #[must_use]
    #[inline(always)]
    pub const fn wide_index(self) -> u32 {
        self.0 >> WIDE_SHIFT
    }
}

/// A rule that takes two words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WideRule {
    /// The CFA counts from rbp, not rsp.
    pub from_bp: bool,
    /// The CFA is what lies in memory at the register and `cfa_offset`, and
    /// `cfa_add`; otherwise it is the register and `cfa_offset`.
    pub in_memory: bool,
    /// See `in_memory`.
    pub cfa_offset: i32,
    /// See `in_memory`.
    pub cfa_add: i32,
    /// [`BpRule`] as a number.
    pub bp: u32,
    /// From the CFA or from rbp, as `bp` says.
    pub bp_offset: i32,
}

const FROM_BP: u64 = 1;
const IN_MEMORY: u64 = 2;

impl WideRule {
    /// How many words it takes.
    pub const WORDS: u32 = 2;

    /// As it lies in the arena.
    #[must_use]
    pub const fn to_words(self) -> [u64; 2] {
        let mut flags = (self.bp as u64 & 3) << 2;
        if self.from_bp {
            flags |= FROM_BP;
        }
        if self.in_memory {
            flags |= IN_MEMORY;
        }
        [
            flags | (self.cfa_offset as u32 as u64) << 32,
            self.cfa_add as u32 as u64 | (self.bp_offset as u32 as u64) << 32,
        ]
    }

    /// Back from the arena.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(first: u64, second: u64) -> Self {
        Self {
            from_bp: first & FROM_BP != 0,
            in_memory: first & IN_MEMORY != 0,
            cfa_offset: (first >> 32) as i32,
            cfa_add: second as u32 as i32,
            bp: (first >> 2) as u32 & 3,
            bp_offset: (second >> 32) as i32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a rule gives back what went into it, at the limits too, and that
    /// what does not fit is refused.
    #[test]
    fn narrow_rules() {
        for cfa in [0, 8, 16, 4096, (CFA_LIMIT - 1) * 8] {
            for saved in [0, 8, 16, 1000, (SAVED_LIMIT - 1) * 8] {
                let rule = Rule::narrow(true, cfa, BpRule::AtCfa, -saved).unwrap();
                assert_eq!(rule.kind(), RuleKind::Bp as u32);
                assert_eq!(rule.cfa_offset(), cfa as u64);
                assert_eq!(rule.bp(), BpRule::AtCfa as u32);
                assert_eq!(rule.bp_below_cfa(), saved as u64);
            }
        }
        let same = Rule::narrow(false, 8, BpRule::Same, 0).unwrap();
        assert_eq!(same.kind(), RuleKind::Sp as u32);
        assert_eq!((same.bp(), same.cfa_offset()), (0, 8));
        for (cfa, saved) in [
            (CFA_LIMIT * 8, -16),
            (-8, -16),
            (12, -16),
            (16, -12),
            (16, 8),
            (16, -SAVED_LIMIT * 8),
        ] {
            assert_eq!(Rule::narrow(false, cfa, BpRule::AtCfa, saved), None);
        }
        assert_eq!(Rule::narrow(true, 16, BpRule::AtBp, 0), None);
        let wide = Rule::wide(MAX_WIDE_RULES as u32 - 1);
        assert_eq!(wide.kind(), RuleKind::Wide as u32);
        assert_eq!(wide.wide_index(), MAX_WIDE_RULES as u32 - 1);
    }

    /// Check that wide rules survive their two words, negative offsets among them.
    #[test]
    fn wide_rules_round_trip() {
        for from_bp in [false, true] {
            for in_memory in [false, true] {
                for bp in 0..4 {
                    let rule = WideRule {
                        from_bp,
                        in_memory,
                        cfa_offset: i32::MIN,
                        cfa_add: -8,
                        bp,
                        bp_offset: i32::MAX,
                    };
                    let [first, second] = rule.to_words();
                    assert_eq!(WideRule::from_words(first, second), rule);
                }
            }
        }
    }
}
