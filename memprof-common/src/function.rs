//! The allocator functions memprof knows.

macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $symbol:literal;)*) => {
        /// A function of the allocator family, by what its arguments mean.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Function { $($(#[$doc])* $variant = $code,)* }

        impl Function {
            /// Every function, in the order in which sites that share an
            /// address are given to one of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The function with this code, if there is one.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The name of its symbol.
            #[must_use]
            pub const fn symbol(self) -> &'static str {
                match self { $(Self::$variant => $symbol,)* }
            }
        }
    };
}

functions! {
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
}

impl Function {
    /// Whether it gives a block up and hands none out.
    #[must_use]
    pub const fn is_free(self) -> bool {
        matches!(
            self,
            Self::Free | Self::Cfree | Self::FreeSized | Self::FreeAlignedSized
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Function;

    /// Check that every code leads back to its function and no other code does.
    #[test]
    fn codes_round_trip() {
        for &function in Function::ALL {
            assert_eq!(Function::from_code(function as u8), Some(function));
        }
        assert_eq!(Function::from_code(0), None);
        assert_eq!(Function::from_code(Function::ALL.len() as u8 + 1), None);
    }
}
