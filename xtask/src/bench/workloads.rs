//! The real programs: redis, sqlite3, Python and a C compiler.

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    check,
    context::Context,
    process::{LIMIT, Process, run},
    programs::{How, Run},
    tools::{Left, Tool},
};
use crate::machine::installed;

/// The longest that a program may take under any tool.
const LONG_LIMIT: Duration = Duration::from_secs(120);

/// A program with its work.
pub(super) trait Workload {
    /// The program and what it does.
    fn name(&self) -> &'static str;

    /// How much work it does, and in what unit a second.
    fn units(&self) -> (f64, &'static str);

    /// Does the work once.
    ///
    /// # Errors
    ///
    /// The program or the tool fails.
    fn run(&self, context: &Context, how: How) -> Result<Run>;
}

/// A program, or its name and why it cannot take part.
type Candidate = std::result::Result<Box<dyn Workload>, (&'static str, String)>;

/// All programs, their input made.
///
/// # Errors
///
/// The input cannot be made.
pub(super) fn all(context: &Context) -> Result<Vec<Candidate>> {
    Ok(vec![
        redis(context),
        sqlite(context)?,
        python(context)?,
        compiler(context)?,
    ])
}

/// A command that does its work and ends.
struct Batch {
    name: &'static str,
    units: (f64, &'static str),
    command: Vec<String>,
}

impl Workload for Batch {
    fn name(&self) -> &'static str {
        self.name
    }

    fn units(&self) -> (f64, &'static str) {
        self.units
    }

    fn run(&self, context: &Context, how: How) -> Result<Run> {
        match how {
            How::Attached(tool @ Tool::Memprof { .. }) => self.run_memprof(context, tool),
            How::Plain | How::Attached(_) => self.run_gated(context, how),
            How::Heaptrack => self.run_heaptrack(context),
        }
    }
}

impl Batch {
    /// Starts it behind a gate, so that a tool is on it before its first
    /// allocation and the time is that of the program alone.
    fn run_gated(&self, context: &Context, how: How) -> Result<Run> {
        let mut command = Command::new(context.file("gate"));
        let mut process = Process::spawn(command.args(&self.command))?;
        process.wait_stdout(LIMIT, |line| line == "ready")?;
        let attached = match how {
            How::Attached(tool) => {
                let pid = process.pid();
                let mut unknown = || bail!("this tool does not say when it is ready");
                Some(tool.attach(context, pid, &mut unknown)?)
            }
            _ => None,
        };
        let started = Instant::now();
        process.send("")?;
        process.close_stdin();
        let finished = process.finish(LONG_LIMIT)?.success(self.name)?;
        let left = match attached {
            Some(attached) => attached.detach(None)?,
            None => Left::default(),
        };
        Ok(Run {
            time: finished.ended - started,
            left,
        })
    }

    /// memprof starts it: put on the gate, it would have to look anew at the program
    /// that replaces it, and miss what that does meanwhile.
    fn run_memprof(&self, context: &Context, tool: Tool) -> Result<Run> {
        let profile = context.file("attached.json");
        let _ = fs::remove_file(&profile);
        let mut command = Command::new(&context.memprof);
        command.arg("record").args(tool.memprof_arguments());
        command
            .arg("-o")
            .arg(&profile)
            .arg("--")
            .args(&self.command);
        let mut process = Process::spawn(&mut command)?;
        process.close_stdin();
        let time = time_of_child(process.pid()).context(self.name)?;
        process.finish(LONG_LIMIT)?.success("memprof")?;
        let profile = serde_json::from_slice(&fs::read(&profile)?)?;
        let calls = check::profile(&profile, false, None)?;
        Ok(Run {
            time,
            left: Left {
                calls: calls.map(|calls| (calls, "memprof")),
            },
        })
    }

    /// heaptrack announces the program and, when it has ended, its own results.
    fn run_heaptrack(&self, context: &Context) -> Result<Run> {
        let mut process = Process::spawn(&mut heaptrack(context, &self.command)?)?;
        process.close_stdin();
        let (started, _) =
            process.wait_stdout(LIMIT, |line| line.starts_with("starting application"))?;
        let (ended, _) =
            process.wait_stdout(LONG_LIMIT, |line| line.starts_with("Heaptrack finished"))?;
        process.finish(LONG_LIMIT)?.success("heaptrack")?;
        Ok(Run {
            time: ended - started,
            left: Left::default(),
        })
    }
}

/// How long the child of process `parent` has run: from when its parent last held
/// it back, to when it ended, both to a millisecond.
fn time_of_child(parent: u32) -> Result<Duration> {
    let deadline = Instant::now() + LONG_LIMIT;
    let mut started = None;
    let mut child = None;
    // Once it is let go nothing but its end is looked for. Each look takes time from the
    // program, and it runs without one by itself.
    let mut is_let_go = false;
    while Instant::now() < deadline {
        child = child.or_else(|| child_of(parent));
        if let Some(pid) = child {
            let now = Instant::now();
            if matches!(state(pid), None | Some('Z')) {
                let started = started.context("its start was missed")?;
                return Ok(now - started);
            }
            if !is_let_go {
                if is_traced(pid) {
                    started = Some(now);
                }
                is_let_go = started.is_some_and(|started| started != now);
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("it does not end")
}

/// A child of process `parent`, whichever of its threads made it.
fn child_of(parent: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?;
    tasks.flatten().find_map(|task| {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

/// Whether a process is held by a tracer, as one is that memprof starts, from its first
/// instruction until it is on it.
fn is_traced(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|tracer| tracer.trim() != "0")
}

/// The state of a process, a letter of proc_pid_stat(5).
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn heaptrack(context: &Context, command: &[String]) -> Result<Command> {
    let path = context
        .heaptrack
        .as_ref()
        .map_err(|why| anyhow::anyhow!("{why}"))?;
    let mut heaptrack = Command::new(path);
    heaptrack
        .args(["--raw", "-o"])
        .arg(context.file("heaptrack"));
    heaptrack.args(command);
    Ok(heaptrack)
}

/// redis-server under redis-benchmark.
struct Redis {
    server: PathBuf,
    benchmark: PathBuf,
    requests: u32,
}

/// Commands that redis-benchmark sends, each as often as asked.
const REDIS_TESTS: &str = "set,lpush";

fn redis(context: &Context) -> Candidate {
    let name = "redis-server";
    let found = |program, package| installed(program, package).map_err(|why| (name, why));
    Ok(Box::new(Redis {
        server: found("redis-server", "redis-server")?,
        benchmark: found("redis-benchmark", "redis-tools")?,
        requests: context.pick(40_000, 5_000),
    }))
}

impl Workload for Redis {
    fn name(&self) -> &'static str {
        "redis-server, SET and LPUSH of redis-benchmark"
    }

    fn units(&self) -> (f64, &'static str) {
        (f64::from(self.requests) * 2.0, "requests/s")
    }

    fn run(&self, context: &Context, how: How) -> Result<Run> {
        let socket = context.file("redis.sock");
        let _ = fs::remove_file(&socket);
        let path = socket.display().to_string();
        let mut words = vec![self.server.display().to_string()];
        words.extend(["--port", "0", "--save", "", "--unixsocket", &path].map(str::to_owned));
        let mut command = match how {
            How::Heaptrack => heaptrack(context, &words)?,
            _ => {
                let mut command = Command::new(&words[0]);
                command.args(&words[1..]);
                command
            }
        };
        let server = Process::spawn(command.current_dir(&context.dir))?;
        server.wait_stdout(LIMIT, |line| line.contains("eady to accept connections"))?;
        let attached = match how {
            How::Attached(tool) => {
                let mut unknown = || bail!("this tool does not say when it is ready");
                Some(tool.attach(context, server.pid(), &mut unknown)?)
            }
            _ => None,
        };
        let mut benchmark = Command::new(&self.benchmark);
        benchmark.args([
            "-s",
            &path,
            "-t",
            REDIS_TESTS,
            "-n",
            &self.requests.to_string(),
            "--csv",
        ]);
        let finished = run(&mut benchmark, LONG_LIMIT)?;
        let time = seconds(&finished.stdout, self.requests)?;
        let left = match attached {
            Some(attached) => attached.detach(None)?,
            None => Left::default(),
        };
        Ok(Run { time, left })
    }
}

/// The time that `requests` of each test took, by the rates redis-benchmark tells.
fn seconds(csv: &str, requests: u32) -> Result<Duration> {
    let rates: Vec<f64> = csv
        .lines()
        .filter_map(|line| line.split(',').nth(1)?.trim_matches('"').parse().ok())
        .filter(|&rate| rate > 0.0)
        .collect();
    if rates.len() != REDIS_TESTS.split(',').count() {
        bail!("redis-benchmark told no rates: {csv}");
    }
    let seconds = rates.iter().map(|rate| f64::from(requests) / rate).sum();
    Ok(Duration::from_secs_f64(seconds))
}

fn sqlite(context: &Context) -> Result<Candidate> {
    let rows: u32 = context.pick(400_000, 40_000);
    let sql = context.file("index.sql");
    fs::write(
        &sql,
        format!(
            "CREATE TABLE words (id INTEGER PRIMARY KEY, word TEXT, n INTEGER);\n\
             WITH RECURSIVE count(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM count WHERE i < {rows})\n\
             INSERT INTO words SELECT i, hex(i * 2654435761 % 4294967296), i * 7919 % 10007 FROM count;\n\
             CREATE INDEX by_word ON words (word);\n\
             CREATE INDEX by_n ON words (n, word);\n\
             SELECT count(DISTINCT word) FROM words;\n"
        ),
    )?;
    let name = "sqlite3, filling a table and building two indexes";
    Ok(batch(
        name,
        "sqlite3",
        (f64::from(rows), "rows/s"),
        &[":memory:", &format!(".read {}", sql.display())],
    ))
}

/// How often Python parses its file.
const PYTHON_REPEATS: u32 = 4;

fn python(context: &Context) -> Result<Candidate> {
    let records: u32 = context.pick(60_000, 20_000);
    let mut text = String::from("[");
    for i in 0..records {
        let comma = if i == 0 { "" } else { "," };
        // Long strings: Python's own allocator takes what has 512 bytes or less.
        write!(
            text,
            r#"{comma}{{"id":{i},"name":"user {i}","tags":["a{i}","b{i}"],"text":"{}"}}"#,
            "lorem ipsum ".repeat(50)
        )?;
    }
    text.push(']');
    let file = context.file("records.json");
    fs::write(&file, text)?;
    // More than once: what is to be judged is what memprof costs a program while it runs, and
    // a program that is over in 0.2 s also sees what it does at the start, on the other core.
    let program = format!(
        "import json\nfor _ in range({PYTHON_REPEATS}): print(len(json.load(open({:?}))))",
        file.display().to_string()
    );
    let name = "python3, parsing JSON";
    // A wrapper that chooses among versions starts others: ask for the program.
    let python = run(
        Command::new("python3").args(["-c", "import sys; print(sys.executable)"]),
        LIMIT,
    );
    let python = python.map(|finished| finished.stdout.trim().to_owned());
    Ok(match python {
        Ok(python) => Ok(Box::new(Batch {
            name,
            units: (f64::from(records * PYTHON_REPEATS), "records/s"),
            command: vec![python, "-c".to_owned(), program],
        })),
        Err(_) => Err((name, "not installed: python3".to_owned())),
    })
}

fn compiler(context: &Context) -> Result<Candidate> {
    let functions: u32 = context.pick(300, 150);
    let mut text = String::new();
    for i in 0..functions {
        writeln!(
            text,
            "struct s{i} {{ int a, b; struct s{i} *next; }};\n\
             int f{i}(struct s{i} *s, int n) {{\n  int sum = {i};\n  \
             for (int k = 0; k < n; k++) {{ if (s->a > k) sum += s->b * k; else s = s->next; }}\n  \
             switch (sum & 7) {{ case 0: return sum + 1; case 3: return n; default: return sum ^ n; }}\n}}"
        )?;
    }
    let file = context.file("generated.i");
    fs::write(&file, text)?;
    let name = "cc1 of gcc -O1, compiling generated C";
    let cc1 = run(Command::new("gcc").arg("-print-prog-name=cc1"), LIMIT);
    Ok(match cc1 {
        Ok(cc1) => Ok(Box::new(Batch {
            name,
            units: (f64::from(functions), "functions/s"),
            command: [
                cc1.stdout.trim(),
                "-quiet",
                "-fpreprocessed",
                "-O1",
                "-o",
                "/dev/null",
            ]
            .iter()
            .map(|&word| word.to_owned())
            .chain([file.display().to_string()])
            .collect(),
        })),
        Err(_) => Err((name, "not installed: gcc".to_owned())),
    })
}

fn batch(
    name: &'static str,
    program: &'static str,
    units: (f64, &'static str),
    arguments: &[&str],
) -> Candidate {
    let path = installed(program, program).map_err(|why| (name, why))?;
    let path = path.to_str().context("a path that is no text");
    let path = path.map_err(|error| (name, error.to_string()))?;
    Ok(Box::new(Batch {
        name,
        units,
        command: [path]
            .iter()
            .chain(arguments)
            .map(|&word| word.to_owned())
            .collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that rates become the time for both tests, and a header is skipped.
    #[test]
    fn rates() {
        let csv =
            "\"test\",\"rps\",\"avg\"\n\"SET\",\"1000.00\",\"1\"\n\"LPUSH\",\"500.00\",\"1\"\n";
        assert_eq!(seconds(csv, 1000).expect("rates"), Duration::from_secs(3));
        assert!(seconds("\"SET\",\"1000.00\"\n", 1000).is_err());
    }
}
