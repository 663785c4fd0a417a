//! Programs that start and end all the time while every process is traced: the daemon's memory
//! and descriptors stay as they are, and nothing is lost that is not told. `cargo xtask soak`
//! runs it; by itself it would take as long as it is told to.

use std::{
    collections::BTreeMap,
    env, fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use memprof_tests::{Daemon, TempDir, target};
use serde_json::Value;

/// Set by `cargo xtask soak`.
const SECONDS: &str = "MEMPROF_SOAK_SECONDS";

/// One program starts each time so much has passed.
const EVERY: Duration = Duration::from_millis(50);

/// The daemon is asked each time so much has passed ...
const ASK_EVERY: Duration = Duration::from_secs(3);
/// ... and keeps what it knows of a program that has ended for so long.
const KEEP_SECONDS: u64 = 10;

/// What may be more at the end than in the second quarter of the time, besides a tenth.
const SLACK_BYTES: u64 = 16 << 20;
const SLACK_DESCRIPTORS: u64 = 20;

/// What the daemon takes at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// Without the tables, which the daemon maps: they follow what all programs of the host are.
    resident_bytes: u64,
    /// Descriptors, without the two that watch each process.
    descriptors: u64,
    table_bytes: u64,
    stacks: u64,
}

impl Usage {
    fn max(self, other: Self) -> Self {
        Self {
            resident_bytes: self.resident_bytes.max(other.resident_bytes),
            descriptors: self.descriptors.max(other.descriptors),
            table_bytes: self.table_bytes.max(other.table_bytes),
            stacks: self.stacks.max(other.stacks),
        }
    }
}

/// Programs under way, and those of known totals that have ended and were not yet looked for.
struct Programs {
    input: String,
    hold: String,
    started: u64,
    running: Vec<(bool, Child)>,
    to_be_found: Vec<u32>,
    found: u64,
}

impl Programs {
    /// Starts the next: every other one asks for 10 blocks of 100 bytes and nothing else.
    fn start(&mut self) {
        let is_counted = self.started.is_multiple_of(2);
        let mut command = match self.started % 8 {
            1 => shell("ls / | sort > /dev/null"),
            3 => {
                // The program itself: what chooses among versions of it can be a script that
                // starts fifty others.
                let mut command = Command::new("/usr/bin/python3");
                command.args(["-S", "-c", "x = [bytes(1000) for i in range(3000)]"]);
                command
            }
            5 => shell("(echo x; sleep 0.3) | cat > /dev/null"),
            7 => shell("exec grep -c root /etc/passwd"),
            _ => {
                let mut command = Command::new(&self.hold);
                command.args(["10", "100"]);
                command.stdin(fs::File::open(&self.input).expect("the input"));
                command
            }
        };
        let child = command.stdout(Stdio::null()).spawn().expect("a program");
        self.running.push((is_counted, child));
        self.started += 1;
    }

    /// Takes notice of those that have ended.
    fn reap(&mut self) {
        let to_be_found = &mut self.to_be_found;
        self.running.retain_mut(|(is_counted, child)| {
            let Some(status) = child.try_wait().expect("its status") else {
                return true;
            };
            assert!(status.success(), "{status}");
            if *is_counted {
                to_be_found.push(child.id());
            }
            false
        });
    }

    /// Looks those up in what the daemon tells that had ended before it was asked.
    fn look_up(&mut self, ended: &[u32], processes: &BTreeMap<u64, &Value>) {
        for pid in ended {
            let process = processes.get(&u64::from(*pid));
            let process = process.unwrap_or_else(|| panic!("{pid} is not known"));
            let images = process["images"].as_array().expect("images");
            assert_eq!(images.len(), 1, "{process:#}");
            let totals = &images[0]["totals"];
            assert_eq!(
                (
                    totals["alloc_calls"].as_u64(),
                    totals["alloc_bytes"].as_u64()
                ),
                (Some(10), Some(1000)),
                "{process:#}"
            );
            self.found += 1;
        }
    }
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// Every allocation of every program is live, freed, or gone with it, and of what was lost it
/// is told.
fn check_books(stats: &Value, processes: &BTreeMap<u64, &Value>) {
    for name in [
        "unclaimed_calls",
        "undecodable_events",
        "failed_sweeps",
        "missing_stacks",
    ] {
        assert_eq!(stats[name], 0, "{name}");
    }
    for process in processes.values() {
        for image in process["images"].as_array().expect("images") {
            let number = |name: &str| image[name].as_u64().expect("a number");
            assert_eq!(
                number("alloc_events"),
                number("live") + number("free_events") + number("purged"),
                "{process:#}"
            );
        }
    }
}

fn usage(daemon: &Daemon, stats: &Value, live: u64) -> Usage {
    let pid = daemon.running.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = resident.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its descriptors")
        .count() as u64;
    let table_bytes = stats["unwind_table_bytes"].as_u64().expect("a number");
    Usage {
        resident_bytes: (kib.expect("its memory") << 10).saturating_sub(table_bytes),
        descriptors: open.saturating_sub(2 * live),
        table_bytes,
        stacks: stats["known_stacks"].as_u64().expect("a number"),
    }
}

/// Check that 20 programs a second, starting and ending, are each booked exactly, and leave
/// nothing in the daemon.
#[test]
#[ignore = "takes as long as it is told to: `cargo xtask soak`"]
fn programs_come_and_go() {
    let seconds = env::var(SECONDS).ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.expect(SECONDS));
    let dir = TempDir::new("soak");
    let input = dir.file("input");
    fs::write(&input, "\n").expect("the input");
    let keep = KEEP_SECONDS.to_string();
    let options = [
        "-a",
        "-i",
        "512KiB",
        "--probe",
        "uprobe",
        "--keep-exited",
        &keep,
    ];
    let daemon = Daemon::start(&dir, &[], &options);
    let mut programs = Programs {
        input,
        hold: target("hold.c").text().to_owned(),
        started: 0,
        running: Vec::new(),
        to_be_found: Vec::new(),
        found: 0,
    };
    let begun = Instant::now();
    let (mut next, mut ask) = (begun, begun + ASK_EVERY);
    let (mut before, mut after) = (Usage::default(), Usage::default());
    while begun.elapsed() < time {
        programs.start();
        programs.reap();
        if Instant::now() >= ask {
            ask += ASK_EVERY;
            let ended = std::mem::take(&mut programs.to_be_found);
            let stats = daemon.stats();
            let listed = stats["processes"].as_array().expect("processes");
            let known: BTreeMap<u64, &Value> = listed
                .iter()
                .filter_map(|process| Some((process["pid"].as_u64()?, process)))
                .collect();
            programs.look_up(&ended, &known);
            check_books(&stats, &known);
            let live = known
                .values()
                .filter(|process| process["state"] != "ended")
                .count() as u64;
            let now = usage(&daemon, &stats, live);
            let passed = begun.elapsed().as_secs_f64() / time.as_secs_f64();
            if (0.25..0.5).contains(&passed) {
                before = before.max(now);
            } else if passed >= 0.75 {
                after = after.max(now);
            }
            println!(
                "{:4.0} s: {} programs, {} found, {live} live, {now:?}",
                begun.elapsed().as_secs_f64(),
                programs.started,
                programs.found,
            );
        }
        next += EVERY;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    for (_, mut child) in programs.running {
        assert!(child.wait().expect("its end").success());
    }
    daemon.stop();
    assert!(programs.found > 0);
    println!("from {before:?} to {after:?}");
    let bytes = before.resident_bytes + before.resident_bytes / 10 + SLACK_BYTES;
    assert!(after.resident_bytes <= bytes, "memory grows");
    let tables = before.table_bytes + before.table_bytes / 10 + SLACK_BYTES;
    assert!(after.table_bytes <= tables, "tables grow");
    assert!(
        after.descriptors <= before.descriptors + SLACK_DESCRIPTORS,
        "descriptors leak"
    );
}
