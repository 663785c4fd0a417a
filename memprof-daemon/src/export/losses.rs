//! What was lost, in words.

use memprof_common::counters::DropReason;

use crate::export::{profile::Profile, units};

/// Everything that was lost in a profile, one sentence each.
pub(crate) fn losses_in_words(profile: &Profile) -> Vec<String> {
    profile
        .processes
        .iter()
        .flat_map(|process| {
            process
                .losses
                .iter()
                .filter(|(_, number)| **number > 0)
                .map(|(name, number)| format!("pid {}: {}", process.pid, sentence(name, *number)))
        })
        .collect()
}

/// A loss and its consequence, for people: `name` is as in JSON.
pub(crate) fn sentence(name: &str, number: u64) -> String {
    let reason = DropReason::ALL.iter().find(|reason| reason.name() == name);
    let what = |singular| units::counted(number, singular);
    let Some(reason) = reason else {
        return match name {
            "broken_stacks" => format!(
                "{} cut where the chain of frame pointers breaks: code compiled without them",
                what("stack")
            ),
            "recovered_allocations" => format!(
                "{} found in the map of live blocks after the ring buffer was full",
                what("allocation")
            ),
            "swept_frees" => format!(
                "{} found missing in the map of live blocks after the ring buffer was full",
                what("freed block")
            ),
            "replaced_allocations" => format!(
                "{} of which the free was not seen: the address was handed out again",
                what("block")
            ),
            "unmatched_frees" => format!("{} told after it was found out otherwise", what("free")),
            "unsharded_calls" => format!(
                "{} of threads beyond those that the prefilter has room for: neither counted nor sampled",
                what("call")
            ),
            "stacks_full" => format!(
                "{} without a stack: there was no memory for more stacks; raise --max-memory or -i",
                what("allocation")
            ),
            "starved_threads" => format!(
                "{}: a thread sampled nothing for a while, since it allocated faster than memprof could follow",
                what("gap in sampling")
            ),
            // A counter without words is shown all the same.
            _ => format!("{}: {}", name.replace('_', " "), units::count(number)),
        };
    };
    match reason {
        DropReason::AllocRingFull => format!(
            "{}: the ring buffer was full; counted later, from the map of live blocks",
            what("late allocation")
        ),
        DropReason::AllocUnreported => format!(
            "{}: made and freed while the ring buffer was full; in-use is right",
            what("missing allocation")
        ),
        DropReason::FreeRingFull => format!(
            "{}: the ring buffer was full; counted later, so in-use is right",
            what("late free")
        ),
        DropReason::LiveMapFull => format!(
            "{}: the map of live blocks was full; raise --max-memory or -i",
            what("missing allocation")
        ),
        DropReason::InFlightFull => format!(
            "{}: too many calls of the allocator at once",
            what("missing allocation")
        ),
        DropReason::StackMapFull => format!(
            "{} without a stack: the stack map was full; raise --max-memory or -i",
            what("allocation")
        ),
        DropReason::StackUnreadable => format!(
            "{} without a stack: the kernel could not read it",
            what("allocation")
        ),
        DropReason::ScratchBusy => format!(
            "{} without a stack: no buffer was free for it",
            what("allocation")
        ),
        DropReason::ExecRingFull => format!(
            "{}: the ring buffer was full; the next event told it",
            what("late exec")
        ),
        DropReason::StackTruncated => format!(
            "{}: deeper than --stack-depth; their outer callers are missing",
            what("cut stack")
        ),
        DropReason::CutNoUnwindInfo => format!(
            "{} at code that has no unwind information and no frame pointers",
            what("cut stack")
        ),
        DropReason::CutUnknownMapping => {
            format!("{} at code that had just been mapped", what("cut stack"))
        }
        DropReason::CutUnsupportedRule => format!(
            "{} at unwind information that cannot be followed",
            what("cut stack")
        ),
        DropReason::CutUnreadable => format!(
            "{} where the stack's memory could not be read",
            what("cut stack")
        ),
        DropReason::CutBrokenChain => format!(
            "{} where the next frame would have been none",
            what("cut stack")
        ),
        DropReason::CutStaleTables => format!(
            "{} since unwind tables were changed meanwhile",
            what("cut stack")
        ),
        DropReason::CutReturnProbe => format!(
            "{} at a function whose return another tool probes",
            what("cut stack")
        ),
        DropReason::ResultUnreadable => format!(
            "{}: the address that posix_memalign stored could not be read",
            what("missing allocation")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that every cause has words with its number, and that one without
    /// words is still told.
    #[test]
    fn every_cause_has_words() {
        for reason in DropReason::ALL {
            let sentence = sentence(reason.name(), 1234);
            assert!(sentence.contains("1,234 "), "{sentence}");
            assert!(!sentence.contains('_') || sentence.contains("posix_memalign"));
        }
        assert_eq!(sentence("ring_torn", 2), "ring torn: 2");
        // What an operator can do about it is said.
        for name in ["live_map_full", "stack_map_full", "stacks_full"] {
            assert!(sentence(name, 1).ends_with("raise --max-memory or -i"));
        }
    }
}
