//! Three kinds of address that must never be mixed.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// An address in a process's memory.
    AbsAddr
}
address! {
    /// An address as an ELF file has it in its symbols and program headers.
    VirtOffset
}
address! {
    /// A position in a file, in bytes.
    FileOffset
}

/// A frame of a stack as BPF captured it: a return address.
///
/// The instruction that names the frame is the call before it, so look-ups use
/// [`Self::call_site`], and only they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameAddress(pub AbsAddr);

impl FrameAddress {
    /// An address within the call instruction.
    #[must_use]
    pub const fn call_site(self) -> AbsAddr {
        AbsAddr(self.0.0.saturating_sub(1))
    }
}
