//! How the Go runtime's structures are laid out in memory, by version: `src/runtime/mprof.go`
//! and `src/runtime/symtab.go` of Go 1.19 to 1.27, on 64-bit machines.

/// The oldest Go 1.x that is known. Go 1.18 keeps its cycle otherwise.
pub(super) const OLDEST: u32 = 19;

/// The newest.
pub(super) const NEWEST: u32 = 27;

/// Bytes of a `runtime.bucket`, which its stack follows: `next`, `allnext`, `typ`, `hash`,
/// `size`, `nstk`.
pub(super) const BUCKET_BYTES: u64 = 48;

/// `typ` of a bucket of the heap profile.
pub(super) const MEM_PROFILE: u64 = 1;

/// Cycles that are being counted beside the published one: `memRecord.future`.
pub(super) const FUTURE_CYCLES: usize = 3;

/// `mProfCycleWrap`: cycle numbers are below it.
pub(super) const CYCLE_WRAP: u32 = 3 * (2 << 24);

/// The layout of one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Words of a `memRecordCycle`: `allocs`, `frees` and, before Go 1.27, the bytes of both.
    pub(super) cycle_words: usize,
    /// Frames that a stack can have.
    pub(super) max_stack: u64,
    /// Frames that it has at most if the program asks for no more (`GODEBUG=profstackdepth`).
    pub(super) usual_stack: usize,
    /// First word of `.gopclntab`.
    pub(super) pclntab_magic: u32,
    /// Bytes of a `_func`, which the offsets of its tables follow.
    pub(super) func_bytes: u64,
    /// Bytes of an `inlinedCall`, ...
    pub(super) inlined_bytes: u64,
    /// ... and where in it the name of the function is, ...
    pub(super) inlined_name: u64,
    /// ... and the place of the call.
    pub(super) inlined_parent: u64,
    /// Which word of `moduledata` is `gofunc`.
    pub(super) gofunc_word: u64,
}

impl Layout {
    /// That of Go 1.`minor`; none if it is not known.
    pub(super) const fn of(minor: u32) -> Option<Self> {
        if minor < OLDEST || minor > NEWEST {
            return None;
        }
        let is_first = minor == 19;
        Some(Self {
            cycle_words: if minor >= 27 { 2 } else { 4 },
            max_stack: if minor >= 23 { 1024 } else { 32 },
            usual_stack: if minor >= 23 { 128 } else { 32 },
            pclntab_magic: if is_first { 0xffff_fff0 } else { 0xffff_fff1 },
            func_bytes: if is_first { 40 } else { 44 },
            inlined_bytes: if is_first { 20 } else { 16 },
            inlined_name: if is_first { 12 } else { 4 },
            inlined_parent: if is_first { 16 } else { 8 },
            gofunc_word: match minor {
                19 => 38,
                20..=26 => 40,
                _ => 43,
            },
        })
    }

    /// Words of a `memRecord`.
    pub(super) const fn record_words(&self) -> usize {
        self.cycle_words * (1 + FUTURE_CYCLES)
    }
}
