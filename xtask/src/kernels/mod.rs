//! `cargo xtask kernels`: memprof on kernels other than the running one.
//!
//! Verifiers differ: programs that one kernel takes, an older one refuses. So
//! Debian's kernels are booted in a virtual machine without any support by the
//! processor, with memprof and a target with known totals as all there is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Error, Result, bail, ensure};
use serde_json::Value;

use crate::{
    machine::{installed, target_dir},
    run,
};

/// Packages whose newest version is tried where none is named: Debian 12's own
/// kernel, and the one of its backports.
const DEFAULT: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64"];

/// Commands that are needed, and Debian's packages of them.
const NEEDED: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    ("cpio", "cpio"),
    ("gcc", "gcc"),
    ("timeout", "coreutils"),
];

/// What busybox stands for in the guest.
const APPLETS: [&str; 8] = [
    "sh", "mount", "cat", "rm", "echo", "tail", "grep", "poweroff",
];

/// Seconds until a guest is given up: minutes, as every instruction is emulated.
const LIMIT: &str = "600";

/// What is tried, and the first kernel that must have each: the modes, `perf` with
/// stacks walked by tail calls, and the prefilter.
const MODES: [(&str, (u32, u32)); 5] = [
    ("session", (6, 13)),
    ("multi", (6, 6)),
    ("perf", (5, 15)),
    ("tail-calls", (5, 15)),
    ("prefilter", (5, 15)),
];

/// Instructions that a verifier may look at in one program, half of what it would
/// (`BPF_COMPLEXITY_LIMIT_INSNS` in include/linux/bpf.h): the next one may see more.
const MOST_VERIFIED: u32 = 500_000;

/// Boots each kernel, given as a Debian package or as a file, and checks what
/// memprof counts there.
pub(crate) fn kernels(workspace: &Path, wanted: &[String]) -> Result<()> {
    for (command, package) in NEEDED {
        installed(command, package).map_err(Error::msg)?;
    }
    let dir = target_dir(workspace).join("kernels");
    fs::create_dir_all(&dir)?;
    let initrd = initrd(workspace, &dir)?;
    let default = DEFAULT.map(str::to_owned);
    for wanted in if wanted.is_empty() { &default } else { wanted } {
        let kernel = if Path::new(wanted).is_file() {
            PathBuf::from(wanted)
        } else {
            download(&dir, wanted)?
        };
        boot(&dir, &kernel, &initrd).with_context(|| format!("on {}", kernel.display()))?;
    }
    Ok(())
}

/// The kernel of a package, or of the one that it depends on.
fn download(dir: &Path, package: &str) -> Result<PathBuf> {
    let depends = output(Command::new("apt-cache").args(["depends", package]))?;
    let image = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .unwrap_or(package);
    let tree = dir.join(image);
    if !tree.exists() {
        let before = packages(dir)?;
        run(Command::new("apt-get")
            .args(["download", "-qq", image])
            .current_dir(dir))?;
        let after = packages(dir)?;
        let file = after.iter().find(|file| !before.contains(file));
        // One that is there from a time before is the newest still.
        let file = file.or_else(|| {
            let is_it = |file: &&PathBuf| file.to_string_lossy().contains(&format!("/{image}_"));
            after.iter().find(is_it)
        });
        let file = file.context("apt-get downloaded nothing")?;
        run(Command::new("dpkg-deb").arg("-x").arg(file).arg(&tree))?;
    }
    let boot = fs::read_dir(tree.join("boot"))?;
    boot.flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .with_context(|| format!("{image} has no kernel"))
}

fn packages(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    Ok(entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect())
}

/// All files of the guest: memprof with its libraries, the target, busybox.
fn initrd(workspace: &Path, dir: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo).current_dir(workspace).args([
        "build",
        "--quiet",
        "-p",
        "memprof-daemon",
    ]))?;
    let root = dir.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for part in ["bin", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(root.join(part))?;
    }
    let memprof = root.join("bin/memprof");
    run(Command::new("strip")
        .arg("-o")
        .arg(&memprof)
        .arg(target_dir(workspace).join("debug/memprof")))?;
    let source = dir.join("target.c");
    fs::write(&source, include_str!("target.c"))?;
    let target = root.join("bin/target");
    run(Command::new("gcc")
        .args(["-O1", "-g", "-fomit-frame-pointer"])
        .args(["-fno-optimize-sibling-calls", "-o"])
        .arg(&target)
        .arg(&source))?;
    for program in [&memprof, &target] {
        let libraries = output(Command::new("ldd").arg(program))?;
        let paths = libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'));
        for path in paths {
            let place = root.join(&path[1..]);
            fs::create_dir_all(place.parent().context("a file in no directory")?)?;
            fs::copy(path, place)?;
        }
    }
    let busybox = installed("busybox", "busybox-static").map_err(Error::msg)?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    let init = root.join("init");
    fs::write(&init, include_str!("init.sh"))?;
    run(Command::new("chmod").arg("755").arg(&init))?;
    run(Command::new("sh").current_dir(&root).args([
        "-c",
        "find . | cpio --quiet -o -H newc | gzip -1 >../initrd.gz",
    ]))?;
    Ok(dir.join("initrd.gz"))
}

fn boot(dir: &Path, kernel: &Path, initrd: &Path) -> Result<()> {
    eprintln!("kernels: booting {}", kernel.display());
    let results = dir.join("results");
    let _ = fs::remove_file(&results);
    run(Command::new("timeout")
        .args([LIMIT, "qemu-system-x86_64", "-cpu", "max", "-smp", "2"])
        .args(["-m", "2048", "-display", "none", "-no-reboot"])
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .arg("-serial")
        .arg(format!("file:{}", dir.join("console").display()))
        .arg("-serial")
        .arg(format!("file:{}", results.display())))?;
    let text = fs::read_to_string(&results).context("the guest wrote no results")?;
    ensure!(
        text.contains("=== end"),
        "the guest did not come to its end: {}",
        dir.join("console").display()
    );
    let results: Vec<(&str, &str)> = text
        .split("=== ")
        .filter_map(|part| part.split_once('\n'))
        .map(|(mode, rest)| (mode.trim(), rest.trim()))
        .collect();
    let release = results
        .iter()
        .find_map(|(_, text)| serde_json::from_str::<Value>(text).ok())
        .and_then(|profile| Some(profile["kernel"].as_str()?.to_owned()))
        .with_context(|| format!("memprof ran in no mode:\n{text}"))?;
    let version = version(&release).with_context(|| format!("what version is {release}?"))?;
    for (mode, since) in MODES {
        let of_mode = results.iter().find(|(name, _)| *name == mode);
        let (_, text) = of_mode.with_context(|| format!("nothing of mode {mode}"))?;
        if version < since {
            ensure!(
                text.contains("cannot attach probes by"),
                "mode {mode} was to be refused:\n{text}"
            );
            eprintln!("kernels: {release}: {mode} refused, as it should be");
            continue;
        }
        let profile: Value = serde_json::from_str(text)
            .map_err(|_| anyhow::anyhow!("mode {mode} failed:\n{text}"))?;
        check(&profile).with_context(|| format!("in mode {mode}"))?;
        let log = results.iter().find_map(|(name, text)| {
            (name.strip_prefix("verified ") == Some(mode)).then_some(*text)
        });
        let verified = verified(log.with_context(|| format!("no log of mode {mode}"))?)?;
        eprintln!("kernels: {release}: {mode} counts right; instructions verified: {verified}");
    }
    Ok(())
}

/// The programs in a log, and how many of their instructions the verifier has looked at,
/// which kernels before 5.16 do not tell.
fn verified(log: &str) -> Result<String> {
    let mut programs = Vec::new();
    for line in log.lines() {
        let field = |name: &str| {
            line.split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let name = field("name").with_context(|| format!("which program? {line}"))?;
        let Some(count) = field("instructions") else {
            continue;
        };
        let count: u32 = count.parse()?;
        ensure!(
            count < MOST_VERIFIED,
            "the verifier looks at {count} instructions of {name}"
        );
        programs.push(format!("{} {count}", name.trim_matches('"')));
    }
    Ok(programs.join(", "))
}

/// `6.1.0-50-cloud-amd64` is 6.1.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether a profile has the totals of `target.c`.
fn check(profile: &Value) -> Result<()> {
    let process = &profile["processes"][0];
    let is = |what: &str, value: &Value, expected: u64| {
        ensure!(
            value.as_u64() == Some(expected),
            "{what} are {value} and not {expected}"
        );
        Ok(())
    };
    is("alloc_calls", &process["totals"]["alloc_calls"], 61_001)?;
    is("free_calls", &process["totals"]["free_calls"], 60_000)?;
    is("alloc_bytes", &process["totals"]["alloc_bytes"], 14_464_016)?;
    let stacks = process["stacks"].as_array().context("no stacks")?;
    let sum = |function: &str, field: &str| -> u64 {
        let is_in = |stack: &&Value| {
            let frames = stack["frames"].as_array();
            frames.is_some_and(|frames| frames.iter().any(|frame| frame["function"] == function))
        };
        let values = stacks
            .iter()
            .filter(is_in)
            .filter_map(|stack| stack[field].as_u64());
        values.sum()
    };
    for (function, field, expected) in [
        ("keep_here", "alloc_objects", 1_000),
        ("keep_here", "inuse_objects", 1_000),
        ("keep_here", "inuse_bytes", 64_000),
        ("churn_here", "alloc_objects", 60_000),
        ("churn_here", "inuse_objects", 0),
        ("churn_here", "alloc_bytes", 14_400_000),
        ("deep_here", "inuse_bytes", 16),
    ] {
        is(
            &format!("{function}'s {field}"),
            &sum(function, field).into(),
            expected,
        )?;
    }
    // Each up to the outermost frame, however many steps that takes.
    for stack in stacks {
        is_whole(stack)?;
    }
    let losses = process["losses"].as_object().context("no losses")?;
    if let Some((cause, count)) = losses.iter().find(|(_, count)| count.as_u64() != Some(0)) {
        bail!("{count} lost by {cause}");
    }
    Ok(())
}

/// Whether a stack goes through main to its end, and has the frames that it has.
fn is_whole(stack: &Value) -> Result<()> {
    let frames = stack["frames"].as_array().context("no frames")?;
    let calls = |function: &str| {
        let of_it = frames.iter().filter(|frame| frame["function"] == function);
        of_it.count()
    };
    ensure!(
        stack["end"] == "complete" && calls("main") == 1 && matches!(calls("deep_here"), 0 | 100),
        "a stack is not whole: {stack}"
    );
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        command.get_program().display(),
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::{verified, version};

    /// Check that counts are read from a log, that kernels may be silent, and that a
    /// program which is too much for the verifier is an error.
    #[test]
    fn counts_of_the_verifier() {
        let line =
            |rest: &str| format!("2026-01-01 DEBUG the verifier has passed a program {rest}\n");
        let log = [
            line(r#"name="walk_on" instructions=155865"#),
            line(r#"name="free_entry""#),
            line(r#"name="alloc_entry" instructions=7"#),
        ];
        let text = verified(&log.concat()).unwrap();
        assert_eq!(text, "walk_on 155865, alloc_entry 7");
        assert!(verified(&line(r#"name="walk_on" instructions=500000"#)).is_err());
        assert!(verified(&line("")).is_err());
    }

    /// Check that releases of Debian's and of other kernels are understood.
    #[test]
    fn versions() {
        assert_eq!(version("6.1.0-50-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.12.115+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(version("6.18-rc1"), Some((6, 18)));
        assert_eq!(version("linux"), None);
    }
}
