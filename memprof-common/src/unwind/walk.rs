//! Walking a stack, frame by frame, by tables.

use core::hint::black_box;

use crate::limits::MAX_STACK_DEPTH;

use super::{
    frame_pointer::{BEHIND_CALL, is_sigreturn},
    rule::{BpRule, Rule, RuleKind, WideRule},
    search::search,
    table::{MappingEntry, MappingKind, MappingList, PAGE_SHIFT, page_rows, row_address, row_rule},
};

/// What a walk reads.
pub trait Memory {
    /// A word of the arena; none beyond its end.
    fn word(&self, place: u32) -> Option<u64>;
    /// Two words of the target's memory; none if one cannot be read.
    fn pair(&self, address: u64) -> Option<[u64; 2]>;
    /// One word of the target's memory; none if it cannot be read.
    fn single(&self, address: u64) -> Option<u64>;
}

/// What walks keep for those after them.
pub trait KnownRules {
    /// The rule that another walk has found for `pc`; [`Rule::NONE`] if that is not known.
    fn recall(&self, pc: u64) -> Rule;
    /// Keeps the rule that was found for `pc`.
    fn remember(&self, pc: u64, rule: Rule);
}

/// Nothing is kept.
impl KnownRules for () {
    #[inline(always)]
    fn recall(&self, _pc: u64) -> Rule {
        Rule::NONE
    }

    #[inline(always)]
    fn remember(&self, _pc: u64, _rule: Rule) {}
}

macro_rules! stack_ends {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal;)*) => {
        /// Why a stack has no more frames.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum StackEnd { $($(#[$doc])* $variant = $code,)* }

        impl StackEnd {
            /// Each, in the order of their codes.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As it is spelled in JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

stack_ends! {
    /// It is whole: the outermost frame was reached, which unwind information marks by
    /// an undefined return address, and code with frame pointers by an rbp of 0; or the
    /// return address is 0, which is what lies below the first frame where a program
    /// has made a stack itself.
    Complete = 0, "complete";
    /// There is another frame, and as many as were wanted are there.
    Truncated = 1, "truncated";
    /// Code without unwind information, and frame pointers lead nowhere or may not be
    /// used.
    NoUnwindInfo = 2, "no_unwind_info";
    /// The process has mapped code that memprof does not know yet.
    UnknownMapping = 3, "unknown_mapping";
    /// The unwind information says what cannot be followed here.
    UnsupportedRule = 4, "unsupported_rule";
    /// The stack's memory could not be read.
    Unreadable = 5, "unreadable";
    /// The next frame would not be above this one, or not be code.
    BrokenChain = 6, "broken_chain";
    /// The tables were changed during the walk.
    StaleTables = 7, "stale_tables";
    /// The function returns to a probe; its caller is not known.
    ReturnProbe = 8, "return_probe";
    /// The kernel walked, by frame pointers, and does not say why it stopped.
    Unverified = 9, "unverified";
}

impl StackEnd {
    /// The end that BPF has written.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|&end| end as u32 == code & END_MASK)
    }
}

/// The bits of a stack's end that say why; the others are flags.
pub const END_MASK: u32 = 0xff;
/// Some of the frames were found by frame pointers.
pub const END_BY_FRAME_POINTER: u32 = 0x100;

/// [`MappingKind`], and what no mapping has.
const KIND_UNKNOWN: u32 = u32::MAX;

/// Steps of a search that halves what is left, for up to 4096 mappings and for the
/// 1024 rows of a page with the one before.
const MAPPING_STEPS: u32 = 13;
const ROW_STEPS: u32 = 11;

/// A walk between two frames. BPF keeps it in a map: its stack is small.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Walk {
    /// The return address into this frame. Where a signal has interrupted the frame:
    /// one more than the instruction, so that the byte before is in it, too.
    pub ip: u64,
    /// The stack pointer in this frame.
    pub sp: u64,
    /// The frame pointer in this frame.
    pub bp: u64,
    /// [`END_BY_FRAME_POINTER`], once a frame was found so.
    pub flags: u32,
    /// Code was passed through that is not known yet.
    is_unknown: u32,
    /// This frame was found by a frame pointer.
    pub(super) by_frame_pointer: u32,
    /// The mapping that `ip - 1` is in.
    pub(super) kind: u32,
    start: u64,
    end: u64,
    bias: u64,
    /// Rows below, wide rules above.
    rows_and_wide: u64,
    /// First page below, their number above.
    pages: u64,
    /// On the way to the caller: its CFA, and where its rbp is.
    cfa: u64,
    bp_place: u64,
    bp_rule: u32,
    /// Why the walk is over, once it is.
    pub stopped: u32,
    /// Frames found.
    pub depth: u32,
    /// This frame's rule, if it was recalled; otherwise it is to be found, by the mapping.
    rule: Rule,
}

/// Has what is known of a walk written to memory, and read back: the verifier forgets
/// what it knew, and sees one state where there were many.
#[inline(always)]
fn settle(walk: &mut Walk) -> &mut Walk {
    black_box(walk)
}

impl Walk {
    /// Begins in the frame that `ip` returns to.
    #[inline(always)]
    pub fn begin(&mut self, ip: u64, sp: u64, bp: u64) {
        self.ip = ip;
        self.sp = sp;
        self.bp = bp;
        self.flags = 0;
        self.is_unknown = 0;
        self.by_frame_pointer = 0;
        self.kind = KIND_UNKNOWN;
        self.start = 1;
        self.end = 0;
        self.depth = 0;
    }

    /// Finds out which code this frame is in. An error if it is none and that cannot
    /// be: then it is no frame.
    #[inline(always)]
    fn locate(&mut self, memory: &impl Memory, mappings: MappingList) -> Result<(), StackEnd> {
        let pc = self.ip.wrapping_sub(1);
        if pc >= self.start && pc < self.end {
            return self.accept();
        }
        self.kind = KIND_UNKNOWN;
        self.start = 1;
        self.end = 0;
        let count = mappings.count();
        if count != 0
            && let Some(found) = search(
                memory,
                mappings.first(),
                MappingEntry::WORDS,
                count,
                MAPPING_STEPS,
                pc,
                u64::MAX,
            )
        {
            let place = mappings
                .first()
                .wrapping_add(found.wrapping_mul(MappingEntry::WORDS));
            let (Some(start), Some(end), Some(bias), Some(rows_and_wide), Some(pages), Some(kind)) = (
                memory.word(place),
                memory.word(place.wrapping_add(1)),
                memory.word(place.wrapping_add(2)),
                memory.word(place.wrapping_add(3)),
                memory.word(place.wrapping_add(4)),
                memory.word(place.wrapping_add(5)),
            ) else {
                return Err(StackEnd::StaleTables);
            };
            if pc >= start && pc < end {
                self.kind = kind as u32;
                self.start = start;
                self.end = end;
                self.bias = bias;
                self.rows_and_wide = rows_and_wide;
                self.pages = pages;
                return self.accept();
            }
        }
        // A frame pointer can lead anywhere, also to code that was made a moment ago. Where
        // nothing is known, what looks like a frame must do.
        if self.by_frame_pointer == BEHIND_CALL && count != 0 {
            return Err(StackEnd::UnknownMapping);
        }
        self.accept()
    }

    /// Whether there is a frame and it is wanted: then it is `ip`, and
    /// [`Self::next`] is the step to its caller. Otherwise `stopped` says why not.
    #[inline(always)]
    pub fn frame(
        &mut self,
        memory: &impl Memory,
        known: &impl KnownRules,
        mappings: MappingList,
        most: u32,
    ) -> bool {
        self.rule = Rule::NONE;
        // What a frame pointer leads to is no frame before it is known which code it is in.
        if self.by_frame_pointer == 0 {
            self.rule = known.recall(self.ip.wrapping_sub(1));
        }
        if self.rule.0 == Rule::NONE.0
            && let Err(why) = self.locate(memory, mappings)
        {
            self.stopped = why as u32;
            return false;
        }
        if self.depth >= most || self.depth as usize >= MAX_STACK_DEPTH {
            self.stopped = StackEnd::Truncated as u32;
            return false;
        }
        true
    }

    /// To the caller of the frame. False if there is none; `stopped` says why.
    #[inline(always)]
    pub fn next(
        &mut self,
        memory: &impl Memory,
        known: &impl KnownRules,
        mappings: MappingList,
        frame_pointers: bool,
    ) -> bool {
        self.depth += 1;
        match settle(self).advance(memory, known, mappings, frame_pointers) {
            Ok(()) => true,
            Err(why) => {
                self.stopped = why as u32;
                false
            }
        }
    }

    /// From this frame, which was located or whose rule is known, to its caller.
    #[inline(always)]
    fn advance(
        &mut self,
        memory: &impl Memory,
        known: &impl KnownRules,
        mappings: MappingList,
        frame_pointers: bool,
    ) -> Result<(), StackEnd> {
        let pc = self.ip.wrapping_sub(1);
        let mut rule = self.rule;
        if rule.0 != Rule::NONE.0 {
            // Recalled.
        } else if self.kind == MappingKind::Table as u32 {
            rule = self.find_rule(memory, pc);
            known.remember(pc, rule);
        } else if self.kind == MappingKind::ReturnProbe as u32 {
            return Err(StackEnd::ReturnProbe);
        } else if self.kind != MappingKind::FramePointers as u32 {
            // In a process of which nothing is known frame pointers are all there is;
            // in one that is known, unknown code is a matter of milliseconds.
            self.is_unknown = 1;
            if self.kind != MappingKind::Pending as u32 && mappings.count() != 0 {
                return Err(StackEnd::UnknownMapping);
            }
        }

        let kind = rule.kind();
        if kind == RuleKind::End as u32 {
            return Err(StackEnd::Complete);
        }
        if kind == RuleKind::Unsupported as u32 {
            return Err(StackEnd::UnsupportedRule);
        }
        if kind == RuleKind::Signal as u32 {
            return self.leave_signal_handler(memory);
        }
        if kind == RuleKind::None as u32 {
            if is_sigreturn(memory, self.ip) {
                return self.leave_signal_handler(memory);
            }
            if !frame_pointers {
                return Err(StackEnd::NoUnwindInfo);
            }
            return self.follow_frame_pointer(memory);
        }

        if kind == RuleKind::Wide as u32 {
            self.apply_wide(memory, rule)?;
        } else if kind == RuleKind::Plt as u32 {
            let pushed = if pc & 15 >= 11 { 8 } else { 0 };
            self.cfa = self.sp.wrapping_add(8 + pushed);
            self.bp_rule = BpRule::Same as u32;
        } else {
            let base = if kind == RuleKind::Bp as u32 {
                self.bp
            } else {
                self.sp
            };
            self.cfa = base.wrapping_add(rule.cfa_offset());
            self.bp_rule = rule.bp();
            self.bp_place = self.cfa.wrapping_sub(rule.bp_below_cfa());
        }
        settle(self).leave_function(memory)
    }

    #[inline(always)]
    fn apply_wide(&mut self, memory: &impl Memory, rule: Rule) -> Result<(), StackEnd> {
        let place = rule
            .wide_index()
            .wrapping_mul(WideRule::WORDS)
            .wrapping_add((self.rows_and_wide >> 32) as u32);
        let (Some(first), Some(second)) = (memory.word(place), memory.word(place.wrapping_add(1)))
        else {
            return Err(StackEnd::StaleTables);
        };
        let wide = WideRule::from_words(first, second);
        let base = if wide.from_bp { self.bp } else { self.sp };
        self.cfa = base.wrapping_add(wide.cfa_offset as i64 as u64);
        if wide.in_memory {
            match memory.single(self.cfa) {
                Some(value) => self.cfa = value.wrapping_add(wide.cfa_add as i64 as u64),
                None => return Err(StackEnd::Unreadable),
            }
        }
        self.bp_rule = wide.bp;
        let from = if wide.bp == BpRule::AtBp as u32 {
            self.bp
        } else {
            self.cfa
        };
        self.bp_place = from.wrapping_add(wide.bp_offset as i64 as u64);
        Ok(())
    }

    /// From the CFA to the registers of the caller.
    #[inline(always)]
    fn leave_function(&mut self, memory: &impl Memory) -> Result<(), StackEnd> {
        let cfa = self.cfa;
        // The stack grows down: a caller's frame is above its callee's.
        if cfa <= self.sp {
            return Err(StackEnd::BrokenChain);
        }
        // Nearly always what is saved is right below the return address.
        let (below, ip) = match memory.pair(cfa.wrapping_sub(16)) {
            Some([below, ip]) => (below, ip),
            None => match memory.single(cfa.wrapping_sub(8)) {
                Some(ip) => (0, ip),
                None => return Err(StackEnd::Unreadable),
            },
        };
        if self.bp_rule == BpRule::Undefined as u32 {
            self.bp = 0;
        } else if self.bp_rule != BpRule::Same as u32 {
            if self.bp_place == cfa.wrapping_sub(16) {
                self.bp = below;
            } else {
                match memory.single(self.bp_place) {
                    Some(bp) => self.bp = bp,
                    None => return Err(StackEnd::Unreadable),
                }
            }
        }
        self.by_frame_pointer = 0;
        self.sp = cfa;
        self.go_to(ip)
    }

    /// The end as it is written down.
    #[must_use]
    #[inline(always)]
    pub const fn end_code(&self) -> u32 {
        if self.is_unknown != 0 {
            self.flags | StackEnd::UnknownMapping as u32
        } else {
            self.flags | self.stopped
        }
    }

    #[inline(always)]
    pub(super) fn go_to(&mut self, ip: u64) -> Result<(), StackEnd> {
        if ip == 0 {
            return Err(StackEnd::Complete);
        }
        self.ip = ip;
        Ok(())
    }

    #[inline(always)]
    fn find_rule(&self, memory: &impl Memory, pc: u64) -> Rule {
        let address = pc.wrapping_sub(self.bias);
        let page = address >> PAGE_SHIFT;
        if page >= self.pages >> 32 {
            return Rule::NONE;
        }
        let Some(page) = memory.word((self.pages as u32).wrapping_add(page as u32)) else {
            return Rule::NONE;
        };
        let rows = self.rows_and_wide as u32;
        let (first, end) = page_rows(page);
        // The row in force where the page begins is the last of those before. The first
        // page has none before, and begins with a row.
        let before = if address >> PAGE_SHIFT == 0 { 0 } else { 1 };
        let first = rows.wrapping_add(first).wrapping_sub(before);
        let count = rows.wrapping_add(end).wrapping_sub(first);
        let Some(found) = search(
            memory,
            first,
            1,
            count,
            ROW_STEPS,
            address & u64::from(u32::MAX),
            u64::from(u32::MAX),
        ) else {
            return Rule::NONE;
        };
        let place = first.wrapping_add(found);
        let Some(row) = memory.word(place) else {
            return Rule::NONE;
        };
        // No call returns to the first byte of a function where the byte before is in
        // none. So somebody has made this frame: the kernel, of a signal handler, or the
        // program, of the first function on a stack of its own, which nobody has called.
        let next = place.wrapping_add(1);
        if row_rule(row).0 == Rule::NONE.0
            && next < (self.rows_and_wide >> 32) as u32
            && let Some(row) = memory.word(next)
            && u64::from(row_address(row)) == (address & u64::from(u32::MAX)) + 1
        {
            return if row_rule(row).0 == Rule::SIGNAL.0 {
                Rule::SIGNAL
            } else {
                Rule::END
            };
        }
        row_rule(row)
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
