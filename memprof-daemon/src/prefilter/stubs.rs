//! The stubs: what runs in the target in front of the allocator's functions.
//!
//! They are assembly of this program, which it never executes: it copies them, and
//! patches into the copy what differs between targets ([`super::image`]).
//!
//! # What they promise
//!
//! * A call that is not sampled finds all registers as they were when the real function
//!   begins, but `rax` where the function returns its result there, and flags. So does a
//!   sampled one; and when it returns, all registers are as the real function left them.
//!   Compilers know which registers a function of the same program leaves alone, so those
//!   that the calling convention lets a call change are kept, too.
//! * Vector registers are never touched.
//! * In place of one that may throw another is called that does the same and does not. That
//!   leaves registers as the calling convention lets it.
//! * The real function is called with the stack as aligned as it was.
//! * They call nothing and make no system call. The only loops wait for nobody: each turn
//!   is paid by another thread's progress.
//! * They may be interrupted anywhere by a signal handler that calls them.
//!
//! `docs/prefilter.md` explains why.

use std::arch::global_asm;

use memprof_common::prefilter as shared;

global_asm!(
    include_str!("stubs/common.S"),
    include_str!("stubs/functions.S"),
    FRAME_SIZE = const std::mem::offset_of!(shared::SiteFrame, size_bytes),
    FRAME_INTERVAL = const std::mem::offset_of!(shared::SiteFrame, interval_bytes),
    FRAME_ADDRESS = const std::mem::offset_of!(shared::SiteFrame, address),
    FRAME_FUNCTION = const std::mem::offset_of!(shared::SiteFrame, function),
    FRAME_FLAGS = const std::mem::offset_of!(shared::SiteFrame, flags),
    FRAME_OUT = const std::mem::offset_of!(shared::SiteFrame, out_pointer),
    FRAME_OLD = const std::mem::offset_of!(shared::SiteFrame, old_pointer),
    FRAME_SHARD = const std::mem::offset_of!(shared::SiteFrame, shard),
    FRAME_SAMPLED = const shared::FRAME_SAMPLED,
    FRAME_TAKEN = const shared::FRAME_TAKEN,
    FRAME_NESTS = const shared::FRAME_NESTS,
    FRAME_STORES = const shared::FRAME_STORES,
    FRAME_IN_PLACE = const shared::FRAME_IN_PLACE,
    FRAME_GIVES_UP = const shared::FRAME_GIVES_UP,
    FRAME_UNMARKED = const shared::FRAME_UNMARKED,
    SITE_FRAME_OFFSET = const shared::SITE_FRAME_OFFSET,
    HEADER_GENERATION = const shared::HEADER_GENERATION,
    HEADER_STARVED = const shared::HEADER_STARVED,
    HEADER_UNSHARDED = const shared::HEADER_UNSHARDED,
    HEADER_UNMARKED = const shared::HEADER_UNMARKED,
    HEADER_RING_HEAD = const shared::HEADER_RING_HEAD,
    HEADER_RING_TAIL = const shared::HEADER_RING_TAIL,
    HEADER_CREDIT = const shared::HEADER_CREDIT,
    HEADER_BYTES = const shared::HEADER_BYTES,
    RING_ENTRIES = const shared::RING_ENTRIES,
    RING_ENTRY_SHIFT = const shared::RING_ENTRY_BYTES.trailing_zeros(),
    SHARD_BYTES = const shared::SHARD_BYTES,
    SHARD_COUNTDOWN = const shared::SHARD_COUNTDOWN,
    SHARD_BYTES_ASKED = const shared::SHARD_BYTES_ASKED,
    SHARD_FREES = const shared::SHARD_FREES,
    SHARD_INTERVAL = const shared::SHARD_INTERVAL,
    SHARD_GENERATION = const shared::SHARD_GENERATION,
    SHARD_CALLS = const shared::SHARD_CALLS,
    OWNER_GONE = const shared::OWNER_GONE,
    SHARD_PROBES = const shared::SHARD_PROBES,
    SHARD_HASH = const shared::SHARD_HASH,
    BUCKET_HASH = const shared::BUCKET_HASH,
    BUCKET_BYTES = const shared::BUCKET_BYTES,
    BUCKET_SHIFT = const shared::BUCKET_BYTES.trailing_zeros(),
    OCCUPANCY_OVERFLOWED = const shared::OCCUPANCY_OVERFLOWED,
    REDRAW = const shared::REDRAW,
    REDRAW_LIMIT_UPPER = const shared::REDRAW_LIMIT >> 32,
    ASLEEP = const shared::ASLEEP,
    IMPOSSIBLE_BITS = const memprof_common::totals::IMPOSSIBLE_BYTES.trailing_zeros(),
    SITE_ALLOC = const shared::SiteKind::Alloc as u8,
    SITE_FREE = const shared::SiteKind::Free as u8,
    SITE_TAKE = const shared::SiteKind::Take as u8,
    SITE_RESTORE = const shared::SiteKind::Restore as u8,
    HEADER_ADDRESS = const PatchKind::HeaderAddress as u8,
    SHARDS_ADDRESS = const PatchKind::ShardsAddress as u8,
    SHARD_MASK = const PatchKind::ShardMask as u8,
    OCCUPANCY_ADDRESS = const PatchKind::OccupancyAddress as u8,
    BUCKETS_ADDRESS = const PatchKind::BucketsAddress as u8,
    BUCKET_MASK = const PatchKind::BucketMask as u8,
    ENABLED_ADDRESS = const PatchKind::EnabledAddress as u8,
    OWNER_DISTANCE = const PatchKind::OwnerDistance as u8,
    CALL_DISTANCE = const PatchKind::CallDistance as u8,
    FUNCTION = const PatchKind::Function as u8,
    TO_COMMON = const PatchKind::ToCommon as u8,
    TWIN = const PatchKind::Twin as u8,
    options(att_syntax)
);

macro_rules! patch_kinds {
    ($($(#[$doc:meta])* $variant:ident = $code:literal,)*) => {
        /// What is to be written over a number in the stubs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(super) enum PatchKind { $($(#[$doc])* $variant = $code,)* }

        impl PatchKind {
            pub(super) const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

patch_kinds! {
    /// 8 bytes: the shared part.
    HeaderAddress = 1,
    /// 8 bytes: the first shard.
    ShardsAddress = 2,
    /// 4 bytes: bits of a shard's distance from the first.
    ShardMask = 3,
    /// 8 bytes: the first occupancy byte.
    OccupancyAddress = 4,
    /// 8 bytes: the first bucket.
    BucketsAddress = 5,
    /// 4 bytes: bits of a bucket's number.
    BucketMask = 6,
    /// 8 bytes: the word that says whether the stubs are to do anything.
    EnabledAddress = 7,
    /// 4 bytes: from a shard to its owner.
    OwnerDistance = 8,
    /// 4 bytes: from a shard to its owner's call.
    CallDistance = 9,
    /// 4 bytes: code of the function.
    Function = 10,
    /// 4 bytes: from behind it to a routine of the common part, as things lie in the
    /// stubs.
    ToCommon = 11,
    /// 4 bytes: from behind it to the function's twin.
    Twin = 12,
}

/// The stub of a kind of functions. The order is that of the table in functions.S.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Template {
    /// `malloc`, with a way for unsampled calls.
    Malloc,
    /// `free` and its kin.
    Free,
    /// One argument, the size.
    Sized,
    /// `calloc`.
    Calloc,
    /// `realloc`.
    Realloc,
    /// `reallocarray`.
    Reallocarray,
    /// `posix_memalign`.
    PosixMemalign,
    /// An alignment, or a heap, and the size.
    Aligned,
    /// `xallocx`.
    Xallocx,
    /// `reallocf`.
    Reallocf,
    /// A heap, then as `calloc`.
    HeapCalloc,
    /// A heap, then as `realloc`.
    HeapRealloc,
    /// A heap, then as `reallocarray`.
    HeapReallocn,
    /// A heap, then as `reallocf`.
    HeapReallocf,
    /// `operator new`, with a way for unsampled calls.
    New,
    /// A count and the size, and may throw.
    NewN,
    /// A heap and the size, and may throw.
    HeapNew,
    /// A heap, then as `NewN`.
    HeapNewN,
    /// A `free` that calls another.
    Passing,
}

/// How many templates there are.
pub(super) const TEMPLATES: usize = 19;

/// Offsets in the stubs.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Extent {
    pub(super) start: u32,
    /// Where the patched function jumps to.
    pub(super) entry: u32,
    /// Where the function's first instructions are to be.
    pub(super) end: u32,
}

/// A note of the assembler.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Note {
    /// Offset in the stubs.
    pub(super) offset: u32,
    /// Code of a [`PatchKind`] or of a site's kind.
    pub(super) kind: u32,
}

unsafe extern "C" {
    static memprof_stubs_start: u8;
    static memprof_stubs_end: u8;
    static memprof_stubs_table: [Extent; TEMPLATES];
    static memprof_stubs_patches_start: Note;
    static memprof_stubs_patches_end: Note;
}

/// The stubs as assembled: the common part, then the templates.
pub(super) fn code() -> &'static [u8] {
    let (start, end) = (&raw const memprof_stubs_start, &raw const memprof_stubs_end);
    // SAFETY: the two symbols are the bounds of one section of read-only data.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Where a template is in [`code`].
pub(super) fn extent(template: Template) -> Extent {
    // SAFETY: functions.S writes one entry of three words for each template; the table
    // is read-only data.
    let table = unsafe { &memprof_stubs_table };
    #[expect(
        clippy::indexing_slicing,
        reason = "the index is a variant, of which there are as many as entries"
    )]
    table[template as usize]
}

/// Where the common part ends in [`code`].
pub(super) fn common_end() -> u32 {
    extent(Template::Malloc).start
}

/// What to patch, and where the sites are.
pub(super) fn notes() -> &'static [Note] {
    let start = &raw const memprof_stubs_patches_start;
    let end = &raw const memprof_stubs_patches_end;
    let count = (end.addr() - start.addr()) / size_of::<Note>();
    // SAFETY: between the two symbols the assembler has written pairs of words, which
    // are read-only data.
    unsafe { std::slice::from_raw_parts(start, count) }
}
