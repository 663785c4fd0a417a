//! What takes part: memprof, the floor, the peers that are installed, and the
//! compiled targets.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{options::Options, process};
use crate::{
    machine::{Found, installed, target_dir},
    run,
};

/// Names that distributions give to memleak of bcc.
const MEMLEAKS: [&str; 3] = ["memleak-bpfcc", "memleak", "libbpf-memleak"];

const JEMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";

const FRAME_POINTERS: [&str; 2] = ["-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"];

/// Our C programs, with what they are compiled with.
const TARGETS: [(&str, &str, &[&str]); 6] = [
    ("pair", include_str!("targets/pair.c"), &["-pthread"]),
    ("churn", include_str!("targets/churn.c"), &["-pthread"]),
    ("stacks", include_str!("targets/stacks.c"), &FRAME_POINTERS),
    ("deep", include_str!("targets/deep.c"), &FRAME_POINTERS),
    ("threads", include_str!("targets/threads.c"), &["-pthread"]),
    ("gate", include_str!("targets/gate.c"), &[]),
];

/// What takes part.
pub(super) struct Context {
    /// Fewer and shorter rounds.
    pub(super) quick: bool,
    /// Directory for everything written, under `target/`.
    pub(super) dir: PathBuf,
    /// memprof itself.
    pub(super) memprof: PathBuf,
    /// Whether it has `--probe`.
    pub(super) has_probe_option: bool,
    /// Empty BPF programs at memprof's sites.
    pub(super) floor: Found,
    /// Compiles unwind tables of files.
    pub(super) unwind_tables: Found,
    /// bpftrace.
    pub(super) bpftrace: Found,
    /// memleak of bcc.
    pub(super) memleak: Found,
    /// heaptrack.
    pub(super) heaptrack: Found,
    /// jemalloc, to be preloaded.
    pub(super) jemalloc: Found,
    /// The same, if it was built with its profiler.
    pub(super) jemalloc_prof: Found,
    /// Logical processors.
    pub(super) cpus: usize,
}

impl Context {
    /// Builds memprof, the floor and the targets, and looks for the peers.
    ///
    /// # Errors
    ///
    /// memprof or a target cannot be built.
    pub(super) fn new(workspace: &Path, options: &Options) -> Result<Self> {
        let dir = target_dir(workspace).join("bench");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let memprof = match &options.memprof {
            Some(path) => path.clone(),
            None => build(workspace, &["-p", "memprof-daemon"], "memprof")?,
        };
        let floor = match &options.floor {
            Some(path) if path.exists() => Ok(path.clone()),
            Some(path) => Err(format!("there is no {}", path.display())),
            None => build(
                workspace,
                &["-p", "memprof-tests", "--bin", "floor"],
                "floor",
            )
            .map_err(|_| "this checkout cannot build `floor`".to_owned()),
        };
        let unwind_tables = build(
            workspace,
            &["-p", "memprof-tests", "--bin", "unwind_tables"],
            "unwind_tables",
        )
        .map_err(|_| "this checkout cannot build `unwind_tables`".to_owned());
        for (name, source, flags) in TARGETS {
            compile(&dir, name, source, flags)?;
        }
        let jemalloc = if Path::new(JEMALLOC).exists() {
            Ok(PathBuf::from(JEMALLOC))
        } else {
            Err("not installed: libjemalloc2".to_owned())
        };
        let jemalloc_prof = jemalloc.clone().and_then(with_profiler);
        let help = process::run(
            Command::new(&memprof).args(["record", "--help"]),
            process::LIMIT,
        )?;
        Ok(Self {
            quick: options.quick,
            has_probe_option: help.stdout.contains("--probe"),
            memprof,
            floor,
            unwind_tables,
            bpftrace: installed("bpftrace", "bpftrace"),
            memleak: MEMLEAKS
                .iter()
                .find_map(|name| installed(name, "").ok())
                .ok_or_else(|| "not installed: bpfcc-tools".to_owned()),
            heaptrack: installed("heaptrack", "heaptrack"),
            jemalloc,
            jemalloc_prof,
            cpus: thread::available_parallelism().map_or(1, usize::from),
            dir,
        })
    }

    /// A file among those written.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `full` or, with `--quick`, `quick`.
    pub(super) fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

fn build(workspace: &Path, what: &[&str], name: &str) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace);
    run(command.args(["build", "--release", "--quiet"]).args(what))?;
    Ok(target_dir(workspace).join("release").join(name))
}

fn compile(dir: &Path, name: &str, source: &str, flags: &[&str]) -> Result<()> {
    let file = dir.join(name).with_extension("c");
    fs::write(&file, source)?;
    let mut command = Command::new("gcc");
    command.args(["-O2", "-g", "-o"]).arg(dir.join(name));
    run(command.args(flags).arg(&file))
}

/// jemalloc says so on stderr if an option is not known to it.
fn with_profiler(jemalloc: PathBuf) -> Found {
    let mut command = Command::new("true");
    command.env("LD_PRELOAD", &jemalloc);
    command.env("MALLOC_CONF", "prof:true");
    match process::run(&mut command, Duration::from_secs(10)) {
        Ok(finished) if finished.stderr.contains("jemalloc") => {
            Err("this jemalloc was built without its profiler".to_owned())
        }
        Ok(_) => Ok(jemalloc),
        Err(error) => Err(format!("{error:#}")),
    }
}

/// The file with the `malloc` that process `pid` uses.
///
/// # Errors
///
/// It maps none that is known.
pub(super) fn allocator_of(pid: u32) -> Result<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let paths = || {
        maps.lines()
            .filter_map(|line| line.find('/').map(|at| &line[at..]))
    };
    for name in ["/libjemalloc.so", "/libc.so", "/libc-2", "/ld-musl"] {
        if let Some(path) = paths().find(|path| path.contains(name)) {
            return Ok(path.to_owned());
        }
    }
    bail!("process {pid} maps no library with malloc")
}
