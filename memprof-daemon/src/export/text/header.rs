//! What stands above the tables: the process as a whole.

use std::{
    cmp::Reverse,
    io::{self, Write},
    time::Duration,
};

use super::{
    Report, grown,
    terminal::{Style, printable},
};
use crate::{
    export::{
        json::rfc_3339,
        losses,
        numbers::Numbers,
        profile::{Inherited, ProcessProfile},
        totals::{CallTotals, ExactTotals},
        units,
    },
    process::cgroup::{Container, Runtime},
};

/// Classes of sizes that are shown.
const TOP_SIZES: usize = 3;

impl<W: Write> Report<'_, W> {
    pub(super) fn header(&mut self, process: &ProcessProfile, total: &Numbers) -> io::Result<()> {
        let Style { bold, plain, .. } = self.style;
        let profile = self.profile;
        let inner = match process.origin.inner_pid() {
            Some(inner) => format!(", {inner} in its namespace"),
            None => String::new(),
        };
        write!(
            self.out,
            "{bold}{} (pid {}{inner}){plain}  {}",
            printable(&process.comm),
            process.pid,
            printable(&process.exe)
        )?;
        let ended = if process.exited { "  has exited" } else { "" };
        writeln!(self.out, "{ended}\n")?;

        if !process.is_refused() {
            self.sums(process, total)?;
        }
        if let Some(totals) = &process.totals {
            self.fact("calls", &calls(&totals.calls, process.traced))?;
            let sizes = most_asked_for(totals);
            if !sizes.is_empty() {
                self.fact("sizes", &sizes)?;
            }
        }
        if let Some(memory) = process.memory {
            let mut resident = format!(
                "{} (anonymous {}, peak {}",
                units::bytes(memory.rss_bytes),
                units::bytes(memory.rss_anon_bytes),
                units::bytes(memory.rss_peak_bytes),
            );
            if memory.swap_bytes != 0 {
                resident += ", swapped out ";
                resident += &units::bytes(memory.swap_bytes);
            }
            self.fact("resident", &(resident + ")"))?;
        }
        let samples = units::counted(total.samples, "sample");
        let (at_present, coarsest) = (
            profile.interval_of(process),
            profile.coarsest_interval_of(process),
        );
        let now = match at_present {
            0 => "none at present".to_owned(),
            1 => "every allocation at present".to_owned(),
            interval => format!("one every {} on average", units::bytes(interval)),
        };
        match (at_present, coarsest) {
            _ if process.is_refused() => {}
            (0, 0) => self.fact("sampling", "off")?,
            (1, 0 | 1) => self.fact("exact", &format!("every allocation counted: {samples}"))?,
            _ => {
                let estimated = format!("from {samples}, {now}; ranges are 95% sure");
                self.fact("estimated", &estimated)?;
            }
        }
        let engine = match process.engine.reason() {
            Some(reason) => format!("{}: {}", process.engine.name(), printable(reason)),
            None => process.engine.name().to_owned(),
        };
        self.fact("engine", &engine)?;
        if let Some(go) = &process.go {
            self.fact("go", &printable(&go.line(process.exited)))?;
            for note in go.notes() {
                self.fact("", &printable(&note))?;
            }
        }
        if let Some(reason) = &process.go_refusal {
            let reason = format!("its Go heap is not here: {}", printable(reason));
            self.fact("go", &reason)?;
        }
        if let Some(inherited) = &process.inherited {
            let Inherited {
                parent_pid,
                objects,
                bytes,
            } = *inherited;
            let objects = units::counted(objects, "object");
            let bytes = units::bytes(bytes);
            self.fact(
                "inherited",
                &format!("{bytes} in {objects} from pid {parent_pid}, not counted here"),
            )?;
        }
        if let Some(child) = &process.child_of {
            let late = match child.untraced_s {
                Some(late) => format!(", not traced for its first {:.0} ms", late * 1e3),
                None => String::new(),
            };
            self.fact("child of", &format!("pid {}{late}", child.parent_pid))?;
        }
        let cgroup = &process.origin.cgroup;
        if let Some(container) = &cgroup.container {
            self.fact("container", &in_words(container))?;
        } else if let Some(unit) = &cgroup.unit {
            self.fact("unit", &printable(unit))?;
        }
        self.fact("captured", &rfc_3339(profile.captured_at))
    }

    /// What is in use and what was allocated.
    fn sums(&mut self, process: &ProcessProfile, total: &Numbers) -> io::Result<()> {
        let Style { bold, plain, .. } = self.style;
        let profile = self.profile;
        let inuse_objects = total.inuse_objects.unsigned_abs();
        let inuse_objects = units::counted(inuse_objects, "object");
        if profile.window.is_some() {
            let change = units::change(total.inuse_bytes);
            let sign = if total.inuse_objects < 0 { "-" } else { "+" };
            let [low, high] = total.inuse_bytes_ci95.map(units::change);
            let range = if low == high {
                String::new()
            } else {
                format!(" ({low} to {high})")
            };
            let change = format!("{bold}{change}{plain}{range} in {sign}{inuse_objects}");
            self.fact("in use", &change)?;
        } else {
            let inuse_bytes = grown(total.inuse_bytes);
            let inuse_range = range(inuse_bytes, total.inuse_bytes_ci95.map(grown));
            let inuse_bytes = units::bytes(inuse_bytes);
            let inuse = format!("{bold}{inuse_bytes}{plain}{inuse_range} in {inuse_objects}");
            self.fact("in use", &inuse)?;
        }
        let allocated = format!(
            "{}{} in {}, {}",
            units::bytes(total.alloc_bytes),
            range(total.alloc_bytes, total.alloc_bytes_ci95),
            units::counted(total.alloc_objects, "object"),
            match &process.go {
                Some(go) if go.is_since_start => "since its start".to_owned(),
                _ => format!("in {}", duration(profile.duration)),
            },
        );
        self.fact("allocated", &allocated)
    }

    fn fact(&mut self, name: &str, fact: &str) -> io::Result<()> {
        writeln!(self.out, "  {name:<10}  {fact}")
    }

    pub(super) fn losses(&mut self, process: &ProcessProfile) -> io::Result<()> {
        let Style { warn, plain, .. } = self.style;
        let losses = process.losses.iter().filter(|&(_, &number)| number != 0);
        let mut heading = format!("\n  {warn}Lost or late:{plain}\n");
        for (name, &number) in losses {
            let loss = losses::sentence(name, number);
            writeln!(self.out, "{heading}    {loss}")?;
            heading.clear();
        }
        Ok(())
    }

    pub(super) fn nothing_sampled(&mut self, process: &ProcessProfile) -> io::Result<()> {
        if process.is_refused() {
            return writeln!(self.out, "\nNothing is known of its heap: see above.");
        }
        if process.go.is_some() {
            let why = "Nothing was sampled: Go's runtime samples one allocation every\n\
                       MemProfileRate bytes, and the program has made none of these.";
            return writeln!(self.out, "\n{why}");
        }
        let why = match self.profile.sample_interval_bytes {
            0 => "Nothing was sampled: sampling is off. Turn it on with -i 512KiB.".to_owned(),
            1 => "Nothing was allocated through the probed functions while it was recorded.\n\
                  Record for longer (-d), or give the program something to do."
                .to_owned(),
            interval => format!(
                "Nothing was sampled: the process allocated little against the {} between\n\
                 samples. Try a smaller interval (-i 16KiB, or -i 1 to count every allocation),\n\
                 or record for longer (-d).",
                units::bytes(interval)
            ),
        };
        writeln!(self.out, "\n{why}")
    }
}

/// The range of an estimate in parentheses, unless it is as good as exact.
fn range(estimate: u64, [low, high]: [u64; 2]) -> String {
    let range = units::range(low, high);
    if range == units::bytes(estimate) {
        String::new()
    } else {
        format!(" ({range})")
    }
}

/// `docker 0123456789ab, pod 0e7d3c1a-…`: as much of the id as runtimes show themselves.
fn in_words(container: &Container) -> String {
    let runtime = container.runtime.map_or("", Runtime::name);
    let id = container.id.get(..12).unwrap_or(&container.id);
    let mut text = format!("{runtime} {id}").trim_start().to_owned();
    if let Some(pod_uid) = &container.pod_uid {
        text += &format!(", pod {pod_uid}");
    }
    text
}

/// Exact numbers of calls, and how often that is.
fn calls(calls: &CallTotals, traced: Duration) -> String {
    let mut text = format!("{} allocating", units::count(calls.alloc_calls));
    if let Some(frequency) = frequency(calls.alloc_calls, traced) {
        text += &format!(" ({frequency})");
    }
    text += &format!(
        ", {} asked for; {} freeing; all counted",
        units::bytes(calls.alloc_bytes),
        units::count(calls.free_calls)
    );
    text
}

/// How often something happens; none for too short a time to say.
fn frequency(number: u64, time: Duration) -> Option<String> {
    if number == 0 || time < Duration::from_millis(100) {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    let a_second = number as f64 / time.as_secs_f64();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative, and no more than `number` / 0.1"
    )]
    let whole = a_second.round() as u64;
    Some(if a_second >= 9.5 {
        format!("{} a second", units::count(whole))
    } else if a_second >= 0.1 {
        format!("{a_second:.1} a second")
    } else {
        format!("{:.1} a minute", a_second * 60.0)
    })
}

/// The sizes that most calls ask for: `8 to 16 KiB (50.5%), 1 B (1.0%)`.
fn most_asked_for(totals: &ExactTotals) -> String {
    let mut classes: Vec<_> = totals.size_histogram.iter().collect();
    classes.sort_by_key(|class| (Reverse(class.calls), class.min_bytes));
    let shown = classes.iter().take(TOP_SIZES).map(|class| {
        let sizes = match class.max_bytes {
            Some(max) => units::range(class.min_bytes, max),
            None => format!("{} or more", units::bytes(class.min_bytes)),
        };
        let share = units::percent(class.calls, totals.calls.alloc_calls);
        format!("{sizes} ({share})")
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// A duration as one says it: `30.0 s`, `5 min 12 s`, `3 h 2 min`.
pub(in crate::export) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}
