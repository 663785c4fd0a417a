//! The daemon's side only: which types are plain bytes to aya.

#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use crate::{
    config::{TargetConfig, TargetState},
    counters::TargetCounters,
    live::{LiveKey, LiveValue},
    stack::{StackKey, StackRecord},
    totals::TargetTotals,
};

// SAFETY: each is `repr(C)` of integers without padding (sizes asserted where
// they are defined), so every bit pattern is a value and every byte is defined.
unsafe impl aya::Pod for TargetConfig {}
// SAFETY: as above.
unsafe impl aya::Pod for TargetState {}
// SAFETY: as above.
unsafe impl aya::Pod for TargetCounters {}
// SAFETY: as above.
unsafe impl aya::Pod for LiveKey {}
// SAFETY: as above.
unsafe impl aya::Pod for LiveValue {}
// SAFETY: as above.
unsafe impl aya::Pod for StackKey {}
// SAFETY: as above.
unsafe impl aya::Pod for StackRecord {}
// SAFETY: as above.
unsafe impl aya::Pod for TargetTotals {}
