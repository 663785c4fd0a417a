//! What BPF counts for each target: events that did not reach the daemon, by
//! cause, and stacks that were cut.

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $index:literal, $name:literal;)*) => {
        /// A cause of loss; also the index of its counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum DropReason { $($(#[$doc])* $variant = $index,)* }

        impl DropReason {
            /// Every cause, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The cause as it is spelled in JSON and in the text output.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

counters! {
    /// The ring had no room for an alloc event. The block is in the live map
    /// all the same, marked unsent: it is reported later, when it is freed or
    /// when the daemon reads the live map.
    AllocRingFull = 0, "alloc_ring_full";
    /// An unsent block was freed while the ring still had no room: the
    /// allocation and its free are missing from the profile, in-use is right.
    AllocUnreported = 1, "alloc_unreported";
    /// The ring had no room for a free event. The block left the live map, and
    /// the daemon finds that out by reading the map.
    FreeRingFull = 2, "free_ring_full";
    /// The live map took no more blocks: the sampled allocation is not in the
    /// profile.
    LiveMapFull = 3, "live_map_full";
    /// The map of calls in flight took no more calls: the allocation is not in
    /// the profile.
    InFlightFull = 4, "in_flight_full";
    /// The stack map took no more stacks: the allocation is in the profile,
    /// under an unknown stack.
    StackMapFull = 5, "stack_map_full";
    /// The kernel gave no stack: the allocation is in the profile, under an
    /// unknown stack.
    StackUnreadable = 6, "stack_unreadable";
    /// More programs were interrupted by each other on one CPU than there are
    /// scratch buffers: the allocation is in the profile, under an unknown
    /// stack.
    ScratchBusy = 7, "scratch_busy";
    /// The ring had no room to report an `execve`; the next event says it too.
    ExecRingFull = 8, "exec_ring_full";
    /// A stack was longer than `--stack-depth` and is cut.
    StackTruncated = 9, "truncated_stacks";
    /// The address that `posix_memalign` had stored could not be read, or a stub of the
    /// prefilter showed a call that can be none: the allocation is not in the profile.
    ResultUnreadable = 10, "result_unreadable";
    /// A stack is cut at code without unwind information.
    CutNoUnwindInfo = 11, "cut_no_unwind_info";
    /// A stack is cut at code that had just been mapped.
    CutUnknownMapping = 12, "cut_unknown_mapping";
    /// A stack is cut at unwind information that cannot be followed.
    CutUnsupportedRule = 13, "cut_unsupported_rule";
    /// A stack is cut where its memory could not be read.
    CutUnreadable = 14, "cut_unreadable";
    /// A stack is cut where the next frame would have been no frame.
    CutBrokenChain = 15, "cut_broken_chain";
    /// A stack is cut since unwind tables changed meanwhile.
    CutStaleTables = 16, "cut_stale_tables";
    /// A stack is cut at a function whose return another tool probes.
    CutReturnProbe = 17, "cut_return_probe";
}

/// How many counters a target has.
pub const COUNTERS: usize = 24;

const _: () = assert!(DropReason::ALL.len() <= COUNTERS);

/// The value of the per-CPU map of counters, one slot a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TargetCounters {
    /// Indexed by [`DropReason`].
    pub dropped: [u64; COUNTERS],
}

#[cfg(test)]
mod tests {
    use super::DropReason;

    /// Check that each cause's number is its place, so that the index is right.
    #[test]
    fn indices_are_places() {
        for (place, &reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason as usize, place, "{}", reason.name());
        }
    }
}
