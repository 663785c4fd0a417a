//! The rules that walks have found last, by the place in the code.
//!
//! The stacks of a program share most of their frames. To find a rule in the arena takes a
//! page and some rows of a table, which lie in memory far from each other; to find it here
//! takes one place in a few pages that every walk on this CPU uses.

use core::hint::black_box;

use super::{
    rule::{Rule, RuleKind},
    table::MappingList,
};

/// Binary logarithm of [`CACHED_RULES`].
const CACHE_SHIFT: u32 = 9;
/// Rules that are kept, each in the one place that its code has.
const CACHED_RULES: usize = 1 << CACHE_SHIFT;

/// 2^64 over the golden ratio: spreads addresses that lie near each other.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a rule was found by, besides the place in the code: a list of mappings, while the
/// words of the arena mean what they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Source {
    /// How often words of the arena have been given a new meaning.
    reuses: u64,
    list: MappingList,
}

impl Source {
    /// `list`, read when words had been given a new meaning so often.
    #[must_use]
    #[inline(always)]
    pub const fn new(list: MappingList, reuses: u64) -> Self {
        Self { reuses, list }
    }
}

/// A rule, and what it was found by.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct CachedRule {
    pc: u64,
    source: Source,
    rule: Rule,
    reserved: u32,
}

/// Rules by a hash of the place in the code.
#[derive(Debug)]
#[repr(C)]
pub struct RuleCache {
    rules: [CachedRule; CACHED_RULES],
}

impl RuleCache {
    /// With nothing in it, as the kernel makes it.
    pub const EMPTY: Self = Self {
        rules: [CachedRule {
            pc: 0,
            source: Source::new(MappingList(0), 0),
            rule: Rule::NONE,
            reserved: 0,
        }; CACHED_RULES],
    };

    /// The rule that was found for `pc`; [`Rule::NONE`] if it is not here.
    #[must_use]
    #[inline(always)]
    pub fn recall(&self, source: Source, pc: u64) -> Rule {
        let known = &self.rules[place(pc)];
        // One branch: of each the verifier follows what comes behind.
        let difference = known.pc ^ pc
            | known.source.reuses ^ source.reuses
            | known.source.list.0 ^ source.list.0;
        if difference == 0 {
            known.rule
        } else {
            Rule::NONE
        }
    }

    /// Keeps the rule that was found for `pc`, unless it takes more than the rule to apply
    /// it.
    #[inline(always)]
    pub fn remember(&mut self, source: Source, pc: u64, rule: Rule) {
        // -1 of a wide rule, else 0; without a branch.
        let is_wide = (i64::from(rule.kind() ^ RuleKind::Wide as u32) - 1) >> 63;
        let known = &mut self.rules[place(pc)];
        known.pc = pc;
        known.source = source;
        known.rule = Rule(rule.0 & !black_box(is_wide) as u32);
    }
}

#[inline(always)]
const fn place(pc: u64) -> usize {
    (pc.wrapping_mul(SPREAD) >> (u64::BITS - CACHE_SHIFT)) as usize
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::boxed::Box;

    use super::*;

    const LIST: MappingList = MappingList::new(7, 2);

    fn sp(offset: i64) -> Rule {
        Rule::narrow(false, offset, crate::unwind::rule::BpRule::Same, 0).unwrap()
    }

    /// Check that a rule is found by all that it was kept with, and by nothing less.
    #[test]
    fn found_by_all_of_it() {
        let mut cache = Box::new(RuleCache::EMPTY);
        let source = Source::new(LIST, 3);
        cache.remember(source, 0x1234, sp(16));
        assert_eq!(cache.recall(source, 0x1234), sp(16));
        assert_eq!(cache.recall(source, 0x1235), Rule::NONE);
        for other in [
            Source::new(LIST, 4),
            Source::new(MappingList::new(8, 2), 3),
            Source::new(MappingList::new(7, 1), 3),
        ] {
            assert_eq!(cache.recall(other, 0x1234), Rule::NONE, "{other:?}");
        }
    }

    /// Check that two places in the code that share one in the cache are not taken for
    /// each other.
    #[test]
    fn places_are_shared() {
        let mut cache = Box::new(RuleCache::EMPTY);
        let source = Source::new(LIST, 0);
        let first = 0x40_0000;
        let second = (first + 1..)
            .find(|&other| place(other) == place(first))
            .unwrap();
        cache.remember(source, first, sp(8));
        cache.remember(source, second, sp(24));
        assert_eq!(cache.recall(source, first), Rule::NONE);
        assert_eq!(cache.recall(source, second), sp(24));
    }

    /// Check that nothing is found in an empty cache, also at the place that its zeros name.
    #[test]
    fn empty() {
        let cache = Box::new(RuleCache::EMPTY);
        for list in [LIST, MappingList(0)] {
            assert_eq!(cache.recall(Source::new(list, 0), 0), Rule::NONE);
        }
    }

    /// Check that a rule whose words are elsewhere is found anew each time, and every other
    /// kind is kept.
    #[test]
    fn wide_rules_are_not_kept() {
        let mut cache = Box::new(RuleCache::EMPTY);
        let source = Source::new(LIST, 0);
        for rule in [sp(8), Rule::PLT, Rule::SIGNAL, Rule::END, Rule::UNSUPPORTED] {
            cache.remember(source, 0x1234, rule);
            assert_eq!(cache.recall(source, 0x1234), rule);
        }
        for index in [0, 1, 5, 1 << 20] {
            cache.remember(source, 0x1234, Rule::wide(index));
            assert_eq!(cache.recall(source, 0x1234), Rule::NONE);
        }
    }
}
