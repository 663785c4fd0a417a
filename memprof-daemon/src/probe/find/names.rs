//! The names that allocators give their functions.

use std::sync::LazyLock;

use memprof_common::{config::Places, function::Function};

/// Whose names they are: an allocator has an allocating and a freeing function of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// The C library's, whoever defines them.
    Plain,
    /// jemalloc with the prefix `je_`.
    Je,
    /// jemalloc in Rust programs, `_rjem_`.
    Rjem,
    /// gperftools' `tc_`.
    Tc,
    /// mimalloc's `mi_`.
    Mi,
    /// C++'s `operator new` and `operator delete`: an allocator's in files that have another
    /// family beside the C library's. Those of C++'s own library call `malloc`.
    Cxx,
    /// Pools': what the user has named.
    Pool,
}

impl Family {
    /// Allocators' families.
    pub(super) const ALL: [Self; 6] = [
        Self::Plain,
        Self::Je,
        Self::Rjem,
        Self::Tc,
        Self::Mi,
        Self::Cxx,
    ];

    /// Whether a name of it means that function also where no other file sees it: programs
    /// have functions of their own that are called `malloc`, and none called `mi_malloc`.
    pub(super) const fn is_distinct(self) -> bool {
        !matches!(self, Self::Plain | Self::Cxx)
    }
}

/// A function that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) symbol: &'static str,
    pub(super) function: Function,
    pub(super) family: Family,
    /// Where its arguments are, if it is probed by that.
    pub(super) places: Option<Places>,
}

macro_rules! known {
    ($family:ident, $prefix:literal: $($name:literal $function:ident,)*) => {
        [$(Known {
            symbol: concat!($prefix, $name),
            function: Function::$function,
            family: Family::$family,
            places: Function::$function.places(),
        },)*]
    };
}

/// jemalloc's own, beside those of the C library.
macro_rules! extended_jemalloc {
    ($family:ident, $prefix:literal) => {
        known! { $family, $prefix:
            "mallocx" Mallocx,
            "rallocx" Realloc,
            "xallocx" Xallocx,
            "dallocx" Free,
            "sdallocx" FreeSized,
        }
    };
}

/// Those of the C library with a prefix. Its `malloc` calls no other: it is jemalloc's.
macro_rules! prefixed_jemalloc {
    ($family:ident, $prefix:literal) => {
        known! { $family, $prefix:
            "malloc" Mallocx,
            "calloc" Calloc,
            "realloc" Realloc,
            "posix_memalign" PosixMemalign,
            "aligned_alloc" AlignedAlloc,
            "memalign" Memalign,
            "valloc" Valloc,
            "pvalloc" Pvalloc,
            "free" Free,
            "free_sized" FreeSized,
            "free_aligned_sized" FreeAlignedSized,
        }
    };
}

/// Sites that share an address are given to the first of these.
static PLAIN: [Known; 14] = known! { Plain, "":
    "malloc" Malloc,
    "calloc" Calloc,
    "realloc" Realloc,
    "reallocarray" Reallocarray,
    "posix_memalign" PosixMemalign,
    "aligned_alloc" AlignedAlloc,
    "memalign" Memalign,
    "valloc" Valloc,
    "pvalloc" Pvalloc,
    "free" Free,
    "cfree" Cfree,
    "free_sized" FreeSized,
    "free_aligned_sized" FreeAlignedSized,
    "reallocf" Reallocf,
};
static JEMALLOC: [Known; 5] = extended_jemalloc!(Plain, "");
static JE: [Known; 11] = prefixed_jemalloc!(Je, "je_");
static JE_EXTENDED: [Known; 5] = extended_jemalloc!(Je, "je_");
static RJEM: [Known; 11] = prefixed_jemalloc!(Rjem, "_rjem_");
static RJEM_EXTENDED: [Known; 5] = extended_jemalloc!(Rjem, "_rjem_");
static TCMALLOC: [Known; 31] = known! { Tc, "tc_":
    "malloc" Valloc,
    "malloc_skip_new_handler" Valloc,
    "calloc" Calloc,
    "realloc" Realloc,
    "posix_memalign" PosixMemalign,
    "memalign" Memalign,
    "valloc" Valloc,
    "pvalloc" Pvalloc,
    "free" Free,
    "cfree" Cfree,
    "free_sized" FreeSized,
    "new" New,
    "newarray" New,
    "new_aligned" New,
    "newarray_aligned" New,
    "new_nothrow" Mallocx,
    "newarray_nothrow" Mallocx,
    "new_aligned_nothrow" Mallocx,
    "newarray_aligned_nothrow" Mallocx,
    "delete" Free,
    "deletearray" Free,
    "delete_nothrow" Free,
    "deletearray_nothrow" Free,
    "delete_sized" FreeSized,
    "deletearray_sized" FreeSized,
    "delete_aligned" FreeSized,
    "deletearray_aligned" FreeSized,
    "delete_aligned_nothrow" FreeSized,
    "deletearray_aligned_nothrow" FreeSized,
    "delete_sized_aligned" FreeAlignedSized,
    "deletearray_sized_aligned" FreeAlignedSized,
};
/// C++'s: `new` and `delete`, each also of an array (`a`). The size of what is made comes first,
/// then its alignment.
static CXX: [Known; 20] = known! { Cxx, "_Z":
    "nwm" New,
    "nam" New,
    "nwmSt11align_val_t" New,
    "namSt11align_val_t" New,
    "nwmRKSt9nothrow_t" Mallocx,
    "namRKSt9nothrow_t" Mallocx,
    "nwmSt11align_val_tRKSt9nothrow_t" Mallocx,
    "namSt11align_val_tRKSt9nothrow_t" Mallocx,
    "dlPv" Free,
    "daPv" Free,
    "dlPvRKSt9nothrow_t" Free,
    "daPvRKSt9nothrow_t" Free,
    "dlPvm" FreeSized,
    "daPvm" FreeSized,
    "dlPvSt11align_val_t" FreeSized,
    "daPvSt11align_val_t" FreeSized,
    "dlPvSt11align_val_tRKSt9nothrow_t" FreeSized,
    "daPvSt11align_val_tRKSt9nothrow_t" FreeSized,
    "dlPvmSt11align_val_t" FreeAlignedSized,
    "daPvmSt11align_val_t" FreeAlignedSized,
};
/// Functions that may throw, each with one of the same file that takes the same arguments, and
/// ignores one more, and returns 0 instead.
static TWINS: [(&str, &str); 12] = [
    ("_Znwm", "_ZnwmRKSt9nothrow_t"),
    ("_Znam", "_ZnamRKSt9nothrow_t"),
    ("_ZnwmSt11align_val_t", "_ZnwmSt11align_val_tRKSt9nothrow_t"),
    ("_ZnamSt11align_val_t", "_ZnamSt11align_val_tRKSt9nothrow_t"),
    ("tc_new", "tc_new_nothrow"),
    ("tc_newarray", "tc_newarray_nothrow"),
    ("tc_new_aligned", "tc_new_aligned_nothrow"),
    ("tc_newarray_aligned", "tc_newarray_aligned_nothrow"),
    ("mi_new", "mi_new_nothrow"),
    ("mi_new_n", "mi_mallocn"),
    ("mi_heap_alloc_new", "mi_heap_malloc"),
    ("mi_heap_alloc_new_n", "mi_heap_mallocn"),
];

/// The function that can be called in place of `symbol`, which may throw, and cannot.
pub(super) fn twin(symbol: &str) -> Option<&'static str> {
    let twin = TWINS.iter().find(|(throws, _)| *throws == symbol);
    twin.map(|&(_, twin)| twin)
}

/// mimalloc's take the size first, then an alignment, then an offset. `mi_cfree` is none: it
/// calls `mi_free`, if the block is mimalloc's.
static MIMALLOC: [Known; 70] = known! { Mi, "mi_":
    "malloc" Valloc,
    "malloc_small" Valloc,
    "zalloc" Valloc,
    "zalloc_small" Valloc,
    "malloc_aligned" Valloc,
    "malloc_aligned_at" Valloc,
    "zalloc_aligned" Valloc,
    "zalloc_aligned_at" Valloc,
    "valloc" Valloc,
    "pvalloc" Pvalloc,
    "calloc" Calloc,
    "mallocn" Calloc,
    "calloc_aligned" Calloc,
    "calloc_aligned_at" Calloc,
    "posix_memalign" PosixMemalign,
    "aligned_alloc" AlignedAlloc,
    "memalign" Memalign,
    "realloc" Realloc,
    "reallocf" Reallocf,
    "rezalloc" Realloc,
    "expand" Realloc,
    "realloc_aligned" Realloc,
    "realloc_aligned_at" Realloc,
    "rezalloc_aligned" Realloc,
    "rezalloc_aligned_at" Realloc,
    "reallocn" Reallocarray,
    "reallocarray" Reallocarray,
    "recalloc" Reallocarray,
    "recalloc_aligned" Reallocarray,
    "recalloc_aligned_at" Reallocarray,
    "aligned_recalloc" Reallocarray,
    "aligned_offset_recalloc" Reallocarray,
    "free" Free,
    "free_size" FreeSized,
    "free_size_aligned" FreeAlignedSized,
    "free_aligned" FreeSized,
    "new" New,
    "new_aligned" New,
    "new_nothrow" Mallocx,
    "new_aligned_nothrow" Mallocx,
    "new_n" NewN,
    "heap_alloc_new" HeapNew,
    "heap_alloc_new_n" HeapNewN,
    // The heap comes first: for the size, that is as with an alignment.
    "heap_malloc" Memalign,
    "heap_malloc_small" Memalign,
    "heap_zalloc" Memalign,
    "heap_zalloc_small" Memalign,
    "heap_malloc_aligned" Memalign,
    "heap_malloc_aligned_at" Memalign,
    "heap_zalloc_aligned" Memalign,
    "heap_zalloc_aligned_at" Memalign,
    "heap_calloc" HeapCalloc,
    "heap_mallocn" HeapCalloc,
    "heap_calloc_aligned" HeapCalloc,
    "heap_calloc_aligned_at" HeapCalloc,
    "heap_realloc" HeapRealloc,
    "heap_reallocf" HeapReallocf,
    "heap_rezalloc" HeapRealloc,
    "heap_realloc_aligned" HeapRealloc,
    "heap_realloc_aligned_at" HeapRealloc,
    "heap_rezalloc_aligned" HeapRealloc,
    "heap_rezalloc_aligned_at" HeapRealloc,
    "heap_reallocn" HeapReallocn,
    "heap_recalloc" HeapReallocn,
    "heap_recalloc_aligned" HeapReallocn,
    "heap_recalloc_aligned_at" HeapReallocn,
    "theap_malloc" Memalign,
    "theap_zalloc" Memalign,
    "theap_calloc" HeapCalloc,
    "theap_realloc" HeapRealloc,
};

/// Every function that is looked for.
static KNOWN: LazyLock<Vec<Known>> = LazyLock::new(|| {
    [
        PLAIN.as_slice(),
        &JEMALLOC,
        &JE,
        &JE_EXTENDED,
        &RJEM,
        &RJEM_EXTENDED,
        &TCMALLOC,
        &MIMALLOC,
        &CXX,
    ]
    .concat()
});

/// Every function that is looked for, in the order in which sites that share an address are
/// given to one of them.
pub(super) fn known() -> &'static [Known] {
    &KNOWN
}

/// Whether it is a function of an allocator that is looked for by that name.
pub(super) fn is_known(symbol: &str) -> bool {
    known().iter().any(|known| known.symbol == symbol)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Check that no name stands for two functions, and that the C library's functions have
    /// the names that their codes have.
    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = known().iter().map(|known| known.symbol).collect();
        assert_eq!(names.len(), known().len());
        let plain = || {
            known()
                .iter()
                .filter(|known| known.family == Family::Plain)
                .map(|known| known.symbol)
        };
        for known in &PLAIN {
            assert_eq!(known.symbol, known.function.symbol());
        }
        for family in Family::ALL {
            let of_it = || known().iter().filter(|known| known.family == family);
            assert!(of_it().any(|known| known.function.is_free()), "{family:?}");
            assert!(of_it().any(|known| !known.function.is_free()), "{family:?}");
        }
        for (throws, twin) in TWINS {
            let function = |symbol| {
                let named = |known: &&Known| known.symbol == symbol;
                known().iter().find(named).map(|known| known.function)
            };
            assert_eq!(function(throws).map(Function::throws), Some(true));
            assert_eq!(function(twin).map(Function::throws), Some(false));
            assert_eq!(super::twin(throws), Some(twin));
        }
        // What jemalloc has with a prefix, it has without.
        for known in JE.iter().chain(&RJEM_EXTENDED) {
            let name = known
                .symbol
                .trim_start_matches("je_")
                .trim_start_matches("_rjem_");
            assert!(plain().any(|plain| plain == name), "{name}");
        }
    }
}
