//! Cuts what a broken chain of frame pointers has appended to a stack.
//!
//! The kernel follows frame pointers. Code compiled without them uses the
//! register for something else, and the walk goes on through whatever lies
//! there: addresses that no code is at, different ones for each sample. Left
//! alone they split one stack into as many as there are samples. The first frame
//! that is in no executable mapping is where the chain broke: nothing behind it
//! can be trusted, and what is before it is kept.

use std::{collections::HashMap, sync::Arc};

use memprof_common::unwind::walk::StackEnd;

use crate::{
    ledger::{StackCounters, StackSnapshot, StackTrace},
    process::mapping::MappingLookup,
};

/// Stacks without their broken ends.
#[derive(Debug, Default)]
pub struct Trimmed {
    /// Those that are alike now are added up.
    pub stacks: Vec<StackSnapshot>,
    /// How many samples had a broken stack.
    pub broken_samples: u64,
}

/// Cuts each stack at the first frame that is in no executable mapping. The
/// first frame always stays: it is the allocating call itself, not a step along
/// the chain.
#[must_use]
pub fn trim(stacks: Vec<StackSnapshot>, mappings: &impl MappingLookup) -> Trimmed {
    let mut broken_samples = 0;
    let mut sums: HashMap<Arc<StackTrace>, StackCounters> = HashMap::with_capacity(stacks.len());
    for stack in stacks {
        // A walk by tables ends by itself where no code is.
        let is_doubtful = matches!(
            stack.trace.end,
            StackEnd::Unverified | StackEnd::UnknownMapping | StackEnd::Truncated
        );
        let frames = &stack.trace.frames;
        let good = frames
            .iter()
            .skip(1)
            .take_while(|frame| mappings.lookup(frame.call_site()).is_some())
            .count()
            + 1;
        let trace = match frames.get(..good) {
            Some(kept) if is_doubtful && good < frames.len() => {
                broken_samples += stack.counters.samples;
                Arc::new(StackTrace {
                    frames: kept.to_vec(),
                    end: StackEnd::BrokenChain,
                    by_frame_pointer: stack.trace.by_frame_pointer,
                })
            }
            _ => stack.trace,
        };
        *sums.entry(trace).or_default() += stack.counters;
    }
    Trimmed {
        stacks: sums
            .into_iter()
            .map(|(trace, counters)| StackSnapshot { trace, counters })
            .collect(),
        broken_samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        address::{AbsAddr, FileOffset, FrameAddress},
        process::mapping::Mapping,
    };

    /// Code from 0x1000 to 0x2000.
    struct OneMapping;

    impl MappingLookup for OneMapping {
        fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
            (0x1000..0x2000).contains(&address.0).then(|| {
                Arc::new(Mapping {
                    start: AbsAddr(0x1000),
                    end: AbsAddr(0x2000),
                    file_offset: FileOffset(0),
                    file: None,
                    name: String::new(),
                })
            })
        }
    }

    fn stack(frames: &[u64], samples: u64) -> StackSnapshot {
        StackSnapshot {
            trace: Arc::new(StackTrace {
                frames: frames.iter().map(|&f| FrameAddress(AbsAddr(f))).collect(),
                end: StackEnd::Unverified,
                by_frame_pointer: false,
            }),
            counters: StackCounters {
                alloc_objects: samples as f64,
                samples,
                live_samples: samples,
                ..StackCounters::default()
            },
        }
    }

    fn shape(trimmed: &Trimmed) -> Vec<(Vec<u64>, bool, u64)> {
        let mut shape: Vec<_> = trimmed
            .stacks
            .iter()
            .map(|stack| {
                let frames = stack.trace.frames.iter().map(|f| f.0.0).collect();
                (
                    frames,
                    stack.trace.end == StackEnd::BrokenChain,
                    stack.counters.samples,
                )
            })
            .collect();
        shape.sort();
        shape
    }

    /// Check that stacks which differ only behind the break become one, and
    /// that their numbers are added up.
    #[test]
    fn broken_ends_are_cut_and_merged() {
        let stacks = vec![
            stack(&[0x1100, 0x1200, 0x3131_3131], 2),
            stack(&[0x1100, 0x1200, 0x3232_3232, 0x1300], 3),
            stack(&[0x1100, 0x1200], 5),
        ];
        let trimmed = trim(stacks, &OneMapping);
        assert_eq!(trimmed.broken_samples, 5);
        assert_eq!(
            shape(&trimmed),
            [
                (vec![0x1100, 0x1200], false, 5),
                (vec![0x1100, 0x1200], true, 5)
            ]
        );
    }

    /// Check that whole stacks stay as they are, that the first frame stays in
    /// every case, and that a stack without frames stays.
    #[test]
    fn whole_stacks_and_first_frames_stay() {
        let stacks = vec![
            stack(&[0x1100, 0x1200], 1),
            stack(&[0x9999, 0x1200], 1),
            stack(&[], 1),
            // A return address just behind the mapping belongs to its last call.
            stack(&[0x1100, 0x2000], 1),
        ];
        let trimmed = trim(stacks, &OneMapping);
        assert_eq!(trimmed.broken_samples, 0);
        assert_eq!(trimmed.stacks.len(), 4);
    }
}
