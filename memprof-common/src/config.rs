//! What the daemon tells the BPF programs: a [`TargetConfig`] a traced process
//! and an [`AttachCookie`] a probe.

/// The value of the map of targets, one slot a traced process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TargetConfig {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Frames to keep of a stack, at most [`crate::limits::MAX_STACK_DEPTH`].
    pub stack_depth: u32,
    /// Mean sampling gap; 1 takes every allocation, 0 none.
    pub sample_interval_bytes: u64,
    /// Keys the hash of stacks, so that no target can choose colliding stacks.
    pub stack_seed: u64,
    /// Where the random bits of sampling decisions start ([`crate::random`]).
    pub sample_seed: u64,
    /// Not 0 if more than one module of the process defines `malloc`: then one
    /// may call the other, and even an unsampled call must be remembered until
    /// it returns.
    pub malloc_nests: u32,
    /// [`Unwind`] as a number.
    pub unwind: u32,
    /// What its code is mapped from, in the arena of unwind tables
    /// ([`crate::unwind::table::MappingList`]) ...
    pub mappings: u64,
    /// ... of the program of this epoch.
    pub mappings_epoch: u32,
    /// Not 0 if functions of pools are probed: then a block may be one of a pool's
    /// ([`crate::live::POOL_BLOCK`]).
    pub pools: u32,
}

const _: () = assert!(size_of::<TargetConfig>() == 56);

/// How stacks are walked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Unwind {
    /// By unwind tables; by frame pointers through code that has none.
    #[default]
    Auto = 0,
    /// By unwind tables only.
    Dwarf = 1,
    /// By frame pointers only, by the kernel.
    FramePointers = 2,
}

impl Unwind {
    /// As users write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Dwarf => "dwarf",
            Self::FramePointers => "fp",
        }
    }
}

/// What the map of slots says of a process that is left alone: no slot has this number.
pub const NO_SLOT: u32 = u32::MAX;

/// What BPF keeps of a target; a cache line, so that targets do not share one. The daemon
/// writes it before the slot is anybody's, and BPF from then on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct TargetState {
    /// Calls of the target in flight in which another call of the allocator may run. While
    /// there are none, which is nearly always, no call need look itself up to know that it
    /// is not nested.
    pub nesting_calls: u64,
    /// How often the target has replaced its program.
    pub epoch: u32,
    /// 0.
    pub reserved: u32,
    /// Where the probe of `malloc` is in the present program, once it was hit.
    pub malloc_ip: u64,
    /// When the daemon was last told of unknown code.
    pub told_ns: u64,
    /// 0.
    pub unused: [u64; 4],
}

const _: () = assert!(size_of::<TargetState>() == 64);

/// The number that the kernel hands to a program with each hit of a probe.
///
/// `slot` in bits 0-15, `site` in bits 16-31, the function's code in bits 32-39, where its
/// arguments are, if its code does not say that, in bits 40-48 ([`Places`]). Bit 49 says that
/// the return of a function with places is seen by a return probe. Bit 63 says that the probe
/// is every process's: then there is no slot in it, and the process that hits it is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachCookie(pub u64);

/// The bit of a probe that is every process's.
const SHARED: u64 = 1 << 63;

/// The bit of a function with [`Places`] that has a return probe.
const RETURN_PROBE: u64 = 1 << 49;

impl AttachCookie {
    /// The cookie of probe site number `site` of the target in `slot`.
    #[must_use]
    pub const fn new(slot: u16, site: u16, function: crate::function::Function) -> Self {
        Self(slot as u64 | (site as u64) << 16 | (function as u64) << 32)
    }

    /// The cookie of a site of the image that a prefilter has put into the target in
    /// `slot`. Its kind stands where a function's code does, and is none.
    #[must_use]
    pub const fn of_site(slot: u16, kind: crate::prefilter::SiteKind) -> Self {
        Self(slot as u64 | (kind as u64) << 32)
    }

    /// The cookie of probe site number `site` for whatever process hits it.
    #[must_use]
    pub const fn shared(site: u16, function: crate::function::Function) -> Self {
        Self(SHARED | Self::new(0, site, function).0)
    }

    /// Whether the probe is every process's.
    #[must_use]
    #[inline(always)]
    pub const fn is_shared(self) -> bool {
        self.0 & SHARED != 0
    }

    /// The same of a shared probe, for the process in `slot`.
    #[must_use]
    #[inline(always)]
    pub const fn in_slot(self, slot: u32) -> Self {
        Self(self.0 | slot as u64 & 0xffff)
    }

    /// The same, with the places of arguments.
    #[must_use]
    pub const fn with_places(self, places: Places) -> Self {
        Self(self.0 | places.bits() << PLACES_SHIFT)
    }

    /// Where the arguments are.
    #[must_use]
    pub const fn places(self) -> Places {
        Places::from_bits(self.0 >> PLACES_SHIFT)
    }

    /// The same of a function whose return is seen by a return probe.
    #[must_use]
    pub const fn with_return_probe(self) -> Self {
        Self(self.0 | RETURN_PROBE)
    }

    /// Whether the return is seen by a return probe, not by probes on the function's own
    /// instructions.
    #[must_use]
    #[inline(always)]
    pub const fn has_return_probe(self) -> bool {
        self.0 & RETURN_PROBE != 0
    }

    /// The target's slot in the map of targets.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self.0 as u32 & 0xffff
    }

    /// The number of the probe site within its target.
    #[must_use]
    pub const fn site(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The code of the function that the site belongs to.
    #[must_use]
    pub const fn function_code(self) -> u8 {
        (self.0 >> 32) as u8
    }
}

/// The first of the bits of [`Places`].
const PLACES_SHIFT: u32 = 40;

/// Arguments that are in registers.
pub const REGISTER_ARGUMENTS: u8 = 6;

/// Where a function has its arguments, counted from 0: each below [`REGISTER_ARGUMENTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Places {
    /// The size; of a function that gives a block up, the block.
    pub size: u8,
    /// How many of that size.
    pub count: Option<u8>,
    /// Where it stores the block's address, if it does not return it.
    pub out: Option<u8>,
}

impl Places {
    const fn bits(self) -> u64 {
        const fn behind(place: Option<u8>) -> u64 {
            match place {
                Some(place) => (place as u64 & 7) + 1,
                None => 0,
            }
        }
        self.size as u64 & 7 | (behind(self.count) & 7) << 3 | (behind(self.out) & 7) << 6
    }

    const fn from_bits(bits: u64) -> Self {
        const fn before(bits: u64) -> Option<u8> {
            match bits & 7 {
                0 => None,
                behind => Some(behind as u8 - 1),
            }
        }
        Self {
            size: (bits & 7) as u8,
            count: before(bits >> 3),
            out: before(bits >> 6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AttachCookie, Places, REGISTER_ARGUMENTS};
    use crate::{function::Function, prefilter::SiteKind};

    /// Check that a cookie gives back what went into it, at the limits too.
    #[test]
    fn cookie_round_trips() {
        for (slot, site) in [(0, 0), (1023, 7), (u16::MAX, u16::MAX)] {
            let cookie = AttachCookie::new(slot, site, Function::Pvalloc);
            assert_eq!(cookie.slot(), u32::from(slot));
            assert_eq!(cookie.site(), site);
            assert_eq!(cookie.function_code(), Function::Pvalloc as u8);
        }
    }

    /// Check that the cookie of a shared probe is told from others, and gives back its site
    /// and function whatever slot it is completed with.
    #[test]
    fn shared_cookie() {
        assert!(!AttachCookie::new(u16::MAX, u16::MAX, Function::Pvalloc).is_shared());
        let shared = AttachCookie::shared(u16::MAX, Function::Pvalloc);
        for slot in [0, 1023, 0xffff] {
            let cookie = shared.in_slot(slot);
            assert!(shared.is_shared() && cookie.is_shared());
            assert_eq!(cookie.slot(), slot);
            assert_eq!(cookie.site(), u16::MAX);
            assert_eq!(cookie.function_code(), Function::Pvalloc as u8);
        }
    }

    /// Check that places of arguments come back from a cookie, and leave the rest of it.
    #[test]
    fn places_round_trip() {
        let cookie = AttachCookie::new(u16::MAX, u16::MAX, Function::New);
        assert_eq!(cookie.places(), Places::default());
        for size in 0..REGISTER_ARGUMENTS {
            for other in [None, Some(0), Some(REGISTER_ARGUMENTS - 1)] {
                let places = Places {
                    size,
                    count: other,
                    out: other.map(|other| REGISTER_ARGUMENTS - 1 - other),
                };
                let with = cookie.with_places(places);
                assert!(!with.has_return_probe());
                for with in [with, with.with_return_probe()] {
                    assert_eq!(with.places(), places);
                    assert_eq!((with.slot(), with.site()), (0xffff, u16::MAX));
                    assert_eq!(with.function_code(), Function::New as u8);
                    assert_eq!(with.0 >> 63, 0);
                }
                assert!(with.with_return_probe().has_return_probe());
            }
        }
    }

    /// Check that the cookie of a prefilter's site gives back its slot and its kind, which
    /// is no function's code.
    #[test]
    fn site_cookie_round_trips() {
        for kind in [
            SiteKind::Alloc,
            SiteKind::Free,
            SiteKind::Take,
            SiteKind::Restore,
        ] {
            let cookie = AttachCookie::of_site(1023, kind);
            assert_eq!(cookie.slot(), 1023);
            assert_eq!(cookie.function_code(), kind as u8);
            assert_eq!(Function::from_code(cookie.function_code()), None);
        }
    }
}
