//! The allocator functions memprof knows.

macro_rules! functions {
    (
        allocators: { $($(#[$doc:meta])* $variant:ident = $code:literal, $symbol:literal;)* }
        named: { $($(#[$own_doc:meta])* $own:ident = $own_code:literal, $own_symbol:literal;)* }
    ) => {
        /// A function of an allocator, by what its arguments mean: several names can have
        /// the same.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Function {
            $($(#[$doc])* $variant = $code,)*
            $($(#[$own_doc])* $own = $own_code,)*
        }

        impl Function {
            /// Every function that allocators have.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The function with this code, if there is one.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    $($own_code => Some(Self::$own),)*
                    _ => None,
                }
            }

            /// The name that it has where it comes from; of one that the user has named, the
            /// option.
            #[must_use]
            pub const fn symbol(self) -> &'static str {
                match self {
                    $(Self::$variant => $symbol,)*
                    $(Self::$own => $own_symbol,)*
                }
            }
        }
    };
}

functions! {
    allocators: {
        /// `void *malloc(size_t)`
        Malloc = 1, "malloc";
        /// `void *calloc(size_t, size_t)`
        Calloc = 2, "calloc";
        /// `void *realloc(void *, size_t)`
        Realloc = 3, "realloc";
        /// `void *reallocarray(void *, size_t, size_t)`
        Reallocarray = 4, "reallocarray";
        /// `int posix_memalign(void **, size_t, size_t)`
        PosixMemalign = 5, "posix_memalign";
        /// `void *aligned_alloc(size_t, size_t)`
        AlignedAlloc = 6, "aligned_alloc";
        /// `void *memalign(size_t, size_t)`
        Memalign = 7, "memalign";
        /// `void *valloc(size_t)`
        Valloc = 8, "valloc";
        /// `void *pvalloc(size_t)`
        Pvalloc = 9, "pvalloc";
        /// `void free(void *)`
        Free = 10, "free";
        /// `void cfree(void *)`, glibc before 2.26
        Cfree = 11, "cfree";
        /// `void free_sized(void *, size_t)`, C23
        FreeSized = 12, "free_sized";
        /// `void free_aligned_sized(void *, size_t, size_t)`, C23
        FreeAlignedSized = 13, "free_aligned_sized";
        /// `void *mallocx(size_t, int)`, jemalloc: a `malloc` that calls no other, whatever other
        /// modules do
        Mallocx = 14, "mallocx";
        /// `size_t xallocx(void *, size_t, size_t, int)`, jemalloc: resizes in place, or not, and
        /// returns the size that the block has
        Xallocx = 15, "xallocx";
        /// `void *reallocf(void *, size_t)`: a `realloc` that frees the block if it fails
        Reallocf = 16, "reallocf";
        /// `void *mi_heap_calloc(mi_heap_t *, size_t, size_t)`, mimalloc
        HeapCalloc = 17, "mi_heap_calloc";
        /// `void *mi_heap_realloc(mi_heap_t *, void *, size_t)`, mimalloc
        HeapRealloc = 18, "mi_heap_realloc";
        /// `void *mi_heap_reallocn(mi_heap_t *, void *, size_t, size_t)`, mimalloc
        HeapReallocn = 19, "mi_heap_reallocn";
        /// `void *mi_heap_reallocf(mi_heap_t *, void *, size_t)`, mimalloc
        HeapReallocf = 20, "mi_heap_reallocf";
        /// `void *operator new(size_t)`, also with an alignment behind it
        New = 21, "operator new";
        /// `void *mi_new_n(size_t, size_t)`, mimalloc
        NewN = 22, "mi_new_n";
        /// `void *mi_heap_alloc_new(mi_heap_t *, size_t)`, mimalloc
        HeapNew = 23, "mi_heap_alloc_new";
        /// `void *mi_heap_alloc_new_n(mi_heap_t *, size_t, size_t)`, mimalloc
        HeapNewN = 24, "mi_heap_alloc_new_n";
    }
    named: {
        /// Hands out blocks of a pool. It may throw, and call any other.
        Pool = 25, "--function";
        /// Gives blocks of a pool up, and may call any other.
        PoolFree = 26, "--free-function";
    }
}

impl Function {
    /// Whether it gives a block up and hands out another.
    #[must_use]
    pub const fn reallocates(self) -> bool {
        matches!(
            self,
            Self::Realloc
                | Self::Reallocarray
                | Self::Xallocx
                | Self::Reallocf
                | Self::HeapRealloc
                | Self::HeapReallocn
                | Self::HeapReallocf
        )
    }

    /// Whether it may end by an exception. A return probe would be in the way of that: the
    /// unwinder finds the address that the kernel has put in place of the caller's.
    #[must_use]
    pub const fn throws(self) -> bool {
        matches!(
            self,
            Self::New | Self::NewN | Self::HeapNew | Self::HeapNewN
        )
    }

    /// Where the arguments are of an allocator's function that is probed by
    /// [`crate::config::Places`]; none for the others. Those of a pool's function the user
    /// tells.
    #[must_use]
    pub const fn places(self) -> Option<crate::config::Places> {
        let (size, count) = match self {
            Self::New => (0, None),
            Self::NewN => (1, Some(0)),
            Self::HeapNew => (1, None),
            Self::HeapNewN => (2, Some(1)),
            _ => return None,
        };
        Some(crate::config::Places {
            size,
            count,
            out: None,
        })
    }

    /// Whether it gives a block up and hands none out.
    #[must_use]
    pub const fn is_free(self) -> bool {
        matches!(
            self,
            Self::Free | Self::Cfree | Self::FreeSized | Self::FreeAlignedSized | Self::PoolFree
        )
    }

    /// Whether it is one that the user has named.
    #[must_use]
    pub const fn is_pool(self) -> bool {
        matches!(self, Self::Pool | Self::PoolFree)
    }
}

#[cfg(test)]
mod tests {
    use super::Function;

    /// Check that every code leads back to its function and no other code does.
    #[test]
    fn codes_round_trip() {
        let pools = [Function::Pool, Function::PoolFree];
        for &function in Function::ALL.iter().chain(&pools) {
            assert_eq!(Function::from_code(function as u8), Some(function));
            assert_eq!(function.is_pool(), pools.contains(&function));
        }
        let functions = (Function::ALL.len() + pools.len()) as u8;
        assert_eq!(Function::from_code(0), None);
        assert_eq!(Function::from_code(functions + 1), None);
    }
}
