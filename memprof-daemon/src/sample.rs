//! Samples: events after decoding, and the identities that they share.

use memprof_common::{function::Function, stack::StackKey};

/// One program image of one process: `execve` makes another of the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId {
    /// Process id, the kernel's tgid.
    pub pid: u32,
    /// Counts the `execve`s since memprof attached.
    pub epoch: u32,
}

/// Which block: an address is only unique within its process image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AllocKey {
    /// Whose.
    pub image: ImageId,
    /// What the allocator returned.
    pub addr: u64,
}

/// A stack of one process image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StackId {
    /// Its addresses, by the name BPF gave them.
    pub key: StackKey,
    /// Which of the programs and libraries that were at these addresses in turn; 0 is what
    /// was there first.
    pub version: u32,
}

impl StackId {
    /// The stack with these addresses, of the code that was there first.
    #[must_use]
    pub const fn first(key: StackKey) -> Self {
        Self { key, version: 0 }
    }
}

/// A sampled allocation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AllocSample {
    /// Which block.
    pub key: AllocKey,
    /// `CLOCK_MONOTONIC`; with the key it names this allocation among all that
    /// ever got the address.
    pub timestamp_ns: u64,
    /// Bytes the caller asked for.
    pub size_bytes: u64,
    /// The interval in force when the sample was taken.
    pub sample_interval_bytes: u64,
    /// Its stack.
    pub stack: StackId,
    /// What was called.
    pub function: Function,
    /// A failed `realloc` gave the block back: if the daemon holds it for
    /// freed, that free did not happen.
    pub restored: bool,
}

/// A free of a sampled block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeSample {
    /// Which block.
    pub key: AllocKey,
    /// Which of its allocations.
    pub alloc_timestamp_ns: u64,
}

/// What one record of the ring says.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A block was handed out.
    Alloc(AllocSample),
    /// A sampled block was given up.
    Free(FreeSample),
    /// A process has a new program image; the blocks of the one before are gone.
    Exec {
        /// The new image.
        image: ImageId,
        /// Whether a thread other than the first did it. Probes that were bound to
        /// the first thread are off then.
        by_other_thread: bool,
        /// Its name.
        comm: String,
    },
    /// A process that was not known has taken a slot.
    Claim(Claim),
    /// A stack led to code that BPF was not told of.
    UnknownCode {
        /// Whose.
        image: ImageId,
        /// A return address in it.
        address: u64,
    },
}

/// A process that called an allocator which is probed for all, and was not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Process id.
    pub pid: u32,
    /// The slot it has taken.
    pub slot: u32,
    /// `CLOCK_MONOTONIC`.
    pub timestamp_ns: u64,
    /// Its name; none if another thread than the first, which may be called otherwise, has
    /// called.
    pub comm: Option<String>,
}
