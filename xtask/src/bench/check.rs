//! Whether a tool has really seen what the target did. A tool that misses calls
//! is cheap for the wrong reason.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::tools::Work;

/// How far a sampled estimate may be from the truth, in standard deviations.
const SIGMAS: f64 = 6.0;

/// Calls that a process makes beside its work, such as those of the C library.
const SLACK: u64 = 64;

/// Losses of memprof through which an allocation is missing in the profile.
const MISSING: [&str; 4] = [
    "alloc_unreported",
    "live_map_full",
    "in_flight_full",
    "result_unreadable",
];

/// Checks a profile of one process against the target's own count, and gives the
/// calls that memprof counted, if it does.
///
/// # Errors
///
/// They contradict each other.
pub(super) fn profile(profile: &Value, exact: bool, work: Option<Work>) -> Result<Option<u64>> {
    let process = profile.pointer("/processes/0");
    let process = process.context("the profile has no process")?;
    let (mut objects, mut bytes, mut samples) = (0, 0, 0);
    for stack in stacks(process) {
        let field = |name: &str| stack[name].as_u64().with_context(|| format!("no {name}"));
        let (alloc, inuse) = (field("alloc_objects")?, field("inuse_objects")?);
        if inuse > alloc {
            bail!("a stack has {inuse} objects in use of {alloc} allocated");
        }
        objects += alloc;
        bytes += field("alloc_bytes")?;
        samples += field("samples")?;
    }
    let total = |name: &str| process["totals"][name].as_u64();
    let calls = all_calls(profile);
    let Some(work) = work else {
        return Ok(calls);
    };
    let missing: u64 = MISSING
        .iter()
        .filter_map(|cause| process["losses"][cause].as_u64())
        .sum();
    if let Some(allocs) = total("alloc_calls")
        && allocs.abs_diff(work.allocs) > work.allocs / 1000 + SLACK
    {
        bail!(
            "its totals say {allocs} allocations, the program made {}",
            work.allocs
        );
    }
    if exact {
        if (objects + missing).abs_diff(work.allocs) > work.allocs / 1000 + SLACK {
            bail!(
                "it has {objects} allocations and counts {missing} as missing, the program made {}",
                work.allocs
            );
        }
    } else if missing == 0 && samples >= 10 {
        let off = (bytes as f64 - work.bytes as f64).abs();
        let sigma = work.bytes as f64 / (samples as f64).sqrt();
        if off > SIGMAS * sigma {
            bail!(
                "it estimates {bytes} bytes, the program allocated {}",
                work.bytes
            );
        }
    } else if samples == 0 && missing == 0 && work.bytes > 20 << 20 {
        bail!("it has no sample of {} bytes", work.bytes);
    }
    Ok(calls)
}

/// Calls that memprof counted, over all images of a process that was replaced.
fn all_calls(profile: &Value) -> Option<u64> {
    let images = profile["processes"].as_array()?;
    let calls = images.iter().filter_map(|image| {
        let total = |name: &str| image["totals"][name].as_u64();
        Some(total("alloc_calls")? + total("free_calls").unwrap_or(0))
    });
    calls.reduce(|sum, calls| sum + calls)
}

/// The stacks of a process in a profile.
pub(super) fn stacks(process: &Value) -> impl Iterator<Item = &Value> {
    process["stacks"].as_array().into_iter().flatten()
}

/// Objects and bytes in use in a profile's first process.
pub(super) fn in_use(profile: &Value) -> (u64, u64) {
    let Some(process) = profile.pointer("/processes/0") else {
        return (0, 0);
    };
    let sum = |name: &str| {
        let values = stacks(process).filter_map(|stack| stack[name].as_u64());
        values.sum()
    };
    (sum("inuse_objects"), sum("inuse_bytes"))
}

/// The value of a count that bpftrace prints at its end.
///
/// # Errors
///
/// It is not there, or 0.
pub(super) fn bpftrace_count(stdout: &str, name: &str) -> Result<u64> {
    let count = stdout.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(": ")?
            .trim()
            .parse()
            .ok()
    });
    match count {
        None | Some(0) => bail!("bpftrace counted no {name}"),
        Some(count) => Ok(count),
    }
}

/// Checks a peer's count of mallocs.
///
/// # Errors
///
/// It misses more than one in a hundred.
pub(super) fn counted(mallocs: u64, work: Option<Work>) -> Result<()> {
    match work {
        Some(work) if mallocs < work.allocs - work.allocs / 100 => {
            bail!("it saw {mallocs} of {} allocations", work.allocs)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one_stack(alloc: u64, bytes: u64, samples: u64, lost: u64) -> Value {
        json!({"processes": [{"losses": {"alloc_unreported": lost}, "stacks": [
            {"alloc_objects": alloc, "alloc_bytes": bytes, "inuse_objects": 1,
             "inuse_bytes": 16, "samples": samples}]}]})
    }

    const WORK: Option<Work> = Some(Work {
        allocs: 10_000,
        bytes: 1_000_000,
    });

    /// Check that an exact profile must account for every allocation.
    #[test]
    fn exact() {
        assert!(profile(&one_stack(10_000, 1_000_000, 10_000, 0), true, WORK).is_ok());
        assert!(profile(&one_stack(9_000, 900_000, 9_000, 1_000), true, WORK).is_ok());
        assert!(profile(&one_stack(9_000, 900_000, 9_000, 0), true, WORK).is_err());
    }

    /// Check that an estimate of 100 samples, whose standard deviation is a tenth,
    /// may be a half off and not twice the truth.
    #[test]
    fn sampled() {
        assert!(profile(&one_stack(10_000, 1_500_000, 100, 0), false, WORK).is_ok());
        assert!(profile(&one_stack(10_000, 2_000_000, 100, 0), false, WORK).is_err());
    }

    /// Check that memprof's own totals are held against the program's.
    #[test]
    fn totals() {
        let mut wrong = one_stack(10_000, 1_000_000, 100, 0);
        wrong["processes"][0]["totals"] = json!({"alloc_calls": 5, "free_calls": 5});
        assert!(profile(&wrong, false, WORK).is_err());
        wrong["processes"][0]["totals"] = json!({"alloc_calls": 10_000, "free_calls": 9_000});
        assert_eq!(profile(&wrong, false, WORK).expect("right"), Some(19_000));
    }

    /// Check that in-use is summed over stacks.
    #[test]
    fn sums() {
        assert_eq!(in_use(&one_stack(5, 80, 5, 0)), (1, 16));
    }

    /// Check that a bpftrace that saw nothing, or too little, is refused.
    #[test]
    fn bpftrace() {
        assert_eq!(
            bpftrace_count("\n@mallocs: 12\n", "@mallocs").expect("a count"),
            12
        );
        assert!(bpftrace_count("@mallocs: 0\n", "@mallocs").is_err());
        assert!(bpftrace_count("\n", "@mallocs").is_err());
        assert!(counted(9_950, WORK).is_ok());
        assert!(counted(9_000, WORK).is_err());
    }
}
