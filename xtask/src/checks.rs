//! `cargo xtask test` and `cargo xtask lint`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::run;

/// End-to-end tests that run at the same time: each traced call is a trap, and a
/// machine with fewer cores than tracers and targets only makes them wait.
const PARALLEL_TESTS: &str = "--test-threads=2";

fn cargo(workspace: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace);
    command
}

/// The end-to-end tests to which it matters how probes are attached. What becomes of a
/// sample is the same in each.
const ABOUT_PROBES: [&str; 12] = [
    "detach",
    "errors",
    "family",
    "functions",
    "invariants",
    "limits",
    "modes",
    "realloc",
    "sampling",
    "sites",
    "threads",
    "totals",
];

/// The end-to-end tests to which it does not matter how calls are looked at, and those that
/// choose it themselves.
const ONCE: &[&str] = &[
    "config",
    "containers",
    "debuginfod",
    "go",
    "go_daemon",
    "go_system",
    "http_access",
    "http_limits",
    "http_metrics",
    "http_openapi",
    "http_pprof",
    "max_memory",
    "packaging",
    "prefilter_hazards",
    "prefilter_steps",
    "prefilter_stress",
    "prefilter_targets",
    "prefilter_undone",
    "prefilter_uprobes",
    "ps",
    "service",
    "symbols",
    "system",
    "system_filters",
    "system_memory",
    "system_rules",
    "system_slots",
    "system_soak",
    "table_delay",
    "unwind_gdb",
    "unwind_places",
    "unwind_steps",
];

/// Every test: the unit tests, and the end-to-end tests as root, these with the
/// prefilter and, but for [`ONCE`], with the best way to attach probes that the kernel has;
/// those about probes for each other way, too, and those of the unwinder once more as on
/// kernels without `bpf_loop`. `filter` is passed on to the end-to-end tests.
///
/// # Errors
///
/// A test that fails.
pub(crate) fn test(workspace: &Path, filter: &[String]) -> Result<()> {
    if filter.is_empty() {
        unit(workspace)?;
    }
    // The end-to-end tests run this binary; they would build it themselves, but
    // as root, and after each other.
    run(cargo(workspace).args(["build", "--package", "memprof-daemon"]))?;
    let modes = probe_modes(workspace)?;
    let (best, others) = modes.split_first().context("no way to attach")?;
    println!("\nEnd-to-end tests, prefilter:");
    end_to_end(workspace, &[(PROBE_MODE, "prefilter")], &[""; 0], filter)?;
    let again = all_but_once(workspace)?;
    println!(
        "\nEnd-to-end tests, uprobes, mode {best}, without {}:",
        ONCE.join(", ")
    );
    end_to_end(workspace, &[(PROBE_MODE, best)], &again, filter)?;
    for mode in others {
        println!("\nEnd-to-end tests about probes, mode {mode}:");
        end_to_end(workspace, &[(PROBE_MODE, mode)], &ABOUT_PROBES, filter)?;
    }
    println!("\nTests of the unwinder, stacks walked by tail calls:");
    let variables = [(PROBE_MODE, "perf"), (WALK, "tail-calls")];
    let tests = ["unwind", "unwind_oracle"];
    end_to_end(workspace, &variables, &tests, filter)
}

/// The names of the end-to-end tests but for [`ONCE`], each of which there must be.
fn all_but_once(workspace: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace.join("tests/tests")).context("list the tests")? {
        let path = entry.context("list the tests")?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(
                path.file_stem()
                    .map(|stem| stem.to_string_lossy().into_owned()),
            );
        }
    }
    names.sort();
    if let Some(gone) = ONCE
        .iter()
        .find(|once| !names.iter().any(|name| name == *once))
    {
        bail!("there is no test {gone} any more");
    }
    names.retain(|name| !ONCE.contains(&name.as_str()));
    Ok(names)
}

/// The end-to-end tests of these names, or all if there are none, with `variables` set.
fn end_to_end(
    workspace: &Path,
    variables: &[(&str, &str)],
    tests: &[impl AsRef<str>],
    filter: &[String],
) -> Result<()> {
    // Or the tests ask cargo for it. To some build scripts that is another environment than this
    // one: each would have memprof built anew for itself.
    let memprof = env::var_os(BINARY).map_or_else(|| built(workspace), PathBuf::from);
    let memprof = memprof.to_str().context("a path in UTF-8")?;
    let variables = [variables, &[(BINARY, memprof)]].concat();
    let mut command = cargo(workspace);
    command.envs(variables.iter().copied());
    if !is_root()? {
        command.arg("--config").arg(sudo_runner(&variables)?);
    }
    command
        .args(["test", "--package", "memprof-tests", "--no-fail-fast"])
        .args(tests.iter().flat_map(|test| ["--test", test.as_ref()]));
    command.arg("--").arg(PARALLEL_TESTS).args(filter);
    run(&mut command)
}

/// The tests of Go programs, built with one `go`.
///
/// # Errors
///
/// A test that fails.
pub(crate) fn go(workspace: &Path, go: &Path) -> Result<()> {
    run(cargo(workspace).args(["build", "--package", "memprof-daemon"]))?;
    let go = go.to_str().context("a path in UTF-8")?;
    end_to_end(workspace, &[("MEMPROF_GO", go)], &["go"], &[])
}

/// The tests that draw their input, for so many seconds each. A seed of each is printed:
/// `MEMPROF_FUZZ_SEED` begins with it again.
///
/// # Errors
///
/// A test that fails.
pub(crate) fn fuzz(workspace: &Path, seconds: &str) -> Result<()> {
    let _: u64 = seconds.parse().context("fuzz takes a number of seconds")?;
    run(cargo(workspace)
        .env("MEMPROF_FUZZ_SECONDS", seconds)
        .args(["test", "--package", "memprof-daemon", "--lib"])
        .args(["fuzz_tests", "--", "--nocapture"]))
}

/// memprof as it was built for the tests.
fn built(workspace: &Path) -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    workspace.join(target).join("debug/memprof")
}

/// Which memprof the tests run.
const BINARY: &str = "MEMPROF_BIN";
/// How memprof is told to attach its probes.
const PROBE_MODE: &str = "MEMPROF_PROBE";
/// How it is told to walk stacks.
const WALK: &str = "MEMPROF_WALK";

/// The ways to attach that this kernel has, as the built memprof tells. Those it
/// has not are named: they are not tested here.
fn probe_modes(workspace: &Path) -> Result<Vec<String>> {
    let memprof = built(workspace);
    let mut command = if is_root()? {
        Command::new(&memprof)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg(&memprof);
        sudo
    };
    let output = command.arg("check").output().context("run memprof check")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ok    probe modes"))
        .with_context(|| format!("this host cannot run memprof:\n{text}"))?;
    println!("probe modes: {}", line.trim());
    let (there, _) = line.split_once(':').context("no modes in memprof check")?;
    Ok(there
        .split(',')
        .map(|mode| mode.trim().to_owned())
        .collect())
}

/// The tests within each crate. Some load BPF programs, and run as root.
///
/// # Errors
///
/// A test that fails.
pub(crate) fn unit(workspace: &Path) -> Result<()> {
    run(cargo_as_root(workspace)?.args([
        "test",
        "--workspace",
        "--exclude=memprof-ebpf",
        "--exclude=memprof-tests",
    ]))
}

/// Attaches the prefilter and takes it out for so many seconds, with what is delivered.
///
/// # Errors
///
/// A process was not as before, or has failed.
pub(crate) fn stress(workspace: &Path, seconds: &str) -> Result<()> {
    run_for(
        workspace,
        "prefilter_stress",
        ("MEMPROF_STRESS_SECONDS", seconds),
    )
}

/// Traces every process for so many seconds, while programs start and end.
///
/// # Errors
///
/// Something has grown, or was lost.
pub(crate) fn soak(workspace: &Path, seconds: &str) -> Result<()> {
    run_for(workspace, "system_soak", ("MEMPROF_SOAK_SECONDS", seconds))
}

/// Runs a test, optimized, that takes as long as a variable says.
fn run_for(workspace: &Path, test: &str, time: (&str, &str)) -> Result<()> {
    run(cargo(workspace).args(["build", "--release", "--package", "memprof-daemon"]))?;
    let variables = [time];
    let mut command = cargo(workspace);
    command.envs(variables);
    if !is_root()? {
        command.arg("--config").arg(sudo_runner(&variables)?);
    }
    run(command.args([
        "test",
        "--release",
        "--package=memprof-tests",
        "--test",
        test,
        "--",
        "--ignored",
        "--nocapture",
    ]))
}

/// Formatting, clippy and documentation, warnings being errors.
///
/// # Errors
///
/// A finding.
pub(crate) fn lint(workspace: &Path) -> Result<()> {
    format(workspace)?;
    clippy(workspace)?;
    docs(workspace)
}

/// Formatting.
///
/// # Errors
///
/// A file that rustfmt would change.
pub(crate) fn format(workspace: &Path) -> Result<()> {
    run(cargo(workspace).args(["fmt", "--all", "--check"]))
}

/// Clippy on everything but the BPF program, which no stable compiler takes.
///
/// # Errors
///
/// A warning.
pub(crate) fn clippy(workspace: &Path) -> Result<()> {
    run(cargo(workspace).args(["clippy", "--all-targets", "--", "-D", "warnings"]))
}

/// Documentation.
///
/// # Errors
///
/// A warning.
pub(crate) fn docs(workspace: &Path) -> Result<()> {
    run(cargo(workspace)
        .args(["doc", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings"))
}

/// cargo, with the test binaries it runs as root: cargo itself stays the user's.
fn cargo_as_root(workspace: &Path) -> Result<Command> {
    let mut command = cargo(workspace);
    if !is_root()? {
        command.arg("--config").arg(sudo_runner(&[])?);
    }
    Ok(command)
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("run id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

/// A cargo setting that runs test binaries by sudo, with the variables they
/// need: sudo's own rules drop PATH, and with it the compilers.
fn sudo_runner(variables: &[(&str, &str)]) -> Result<String> {
    if Command::new("sudo").arg("--version").output().is_err() {
        bail!("the tests load BPF programs: run this as root, or install sudo");
    }
    let mut words = vec!["sudo".to_owned(), "env".to_owned()];
    for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "MEMPROF_BIN"] {
        if let Ok(value) = env::var(name) {
            words.push(format!("{name}={value}"));
        }
    }
    for (name, value) in variables {
        words.push(format!("{name}={value}"));
    }
    Ok(format!("target.'cfg(all())'.runner={words:?}"))
}
