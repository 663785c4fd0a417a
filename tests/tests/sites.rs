//! Where functions are probed, and that each call there is still one event.

use std::path::Path;

use memprof_tests::{
    End, Finished, Record, Recorded, Running, TempDir, Totals, engine::is_prefilter, memprof,
    target, targets::freestanding,
};

const JEMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";

fn record(preload: Option<&str>) -> Recorded {
    let dir = TempDir::new("sites");
    let mut command = target("sites.c").command(&["20000", "10000"]);
    if let Some(library) = preload {
        assert!(Path::new(library).exists(), "the tests need {library}");
        command.env("LD_PRELOAD", library);
    }
    Record::every_allocation(&dir).attach(&mut command, End::Interrupt)
}

/// Each call counts once, with its arguments, and each block is freed once.
fn expect_exact(recorded: &Recorded) {
    let process = recorded.process();
    assert_eq!(process.leaf_totals("pair"), Totals::of(10_000, 0, 48));
    assert_eq!(process.leaf_totals("zeroed"), Totals::of(50, 0, 300));
    let grown = process.leaf_totals("grown");
    assert_eq!((grown.alloc_objects, grown.alloc_bytes), (100, 50 * 50_100));
    assert_eq!((grown.inuse_objects, grown.inuse_bytes), (0, 0));
    let aligned = process.leaf_totals("aligned");
    assert_eq!(
        (aligned.alloc_objects, aligned.alloc_bytes),
        (100, 50 * 1140)
    );
    assert_eq!((aligned.inuse_objects, aligned.inuse_bytes), (0, 0));
    assert_eq!(process.leaf_totals("kept"), Totals::of(7, 7, 1000));
    assert!(process.through("free_null").is_empty());
    assert_eq!(process.totals().inuse_objects, 7);
    for (cause, count) in &process.losses {
        let stays_0 = ["replaced_allocations", "unmatched_frees"].contains(&cause.as_str());
        assert!(!stays_0 || *count == 0, "{cause}: {count}");
    }
}

fn site<'a>(recorded: &'a Recorded, module: &str, function: &str) -> (u64, &'a str, bool) {
    let mut sites = recorded.profile.probe.sites.iter();
    let site = sites
        .find(|site| site.module.contains(module) && site.function == function)
        .unwrap_or_else(|| panic!("no {function}: {:?}", recorded.profile.probe.sites));
    (site.offset, &site.instruction, site.emulated)
}

/// Check that glibc's functions are exact when probed behind their entries, and
/// that the profile tells where.
#[test]
fn glibc_is_exact() {
    let recorded = record(None);
    expect_exact(&recorded);
    if is_prefilter() {
        // Entered by a jump behind its first instruction.
        let (offset, instruction, emulated) = site(&recorded, "libc.so.6", "free");
        assert!(
            offset > 0 && instruction == "jmp" && emulated,
            "free+{offset:#x}"
        );
        return;
    }
    let (offset, instruction, emulated) = site(&recorded, "libc.so.6", "free");
    assert!(offset > 0 && emulated, "free+{offset:#x} {instruction}");
    let (offset, instruction, emulated) = site(&recorded, "libc.so.6", "posix_memalign");
    assert!(
        offset > 0 && emulated,
        "posix_memalign+{offset:#x} {instruction}"
    );
}

/// Check the same with jemalloc, whose malloc is probed behind its entry.
#[test]
fn jemalloc_is_exact() {
    let recorded = record(Some(JEMALLOC));
    expect_exact(&recorded);
    if is_prefilter() {
        let (offset, instruction, emulated) = site(&recorded, "libjemalloc", "malloc");
        assert!(
            offset > 0 && instruction == "jmp" && emulated,
            "malloc+{offset:#x}"
        );
        return;
    }
    let (offset, instruction, emulated) = site(&recorded, "libjemalloc", "malloc");
    assert!(offset > 0 && emulated, "malloc+{offset:#x} {instruction}");
}

fn check(args: &[&str]) -> Finished {
    let finished = Running::spawn(&mut memprof(&[&["check"], args].concat())).finish();
    finished.expect_no_panic();
    finished
}

/// Check that `memprof check -p` has a line a site with all that is to be known of
/// it, in columns.
#[test]
fn check_shows_sites() {
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    let pid = hold.pid().to_string();
    let finished = check(&["-p", &pid]);
    finished.expect_code(0);
    let (_, shown) = finished
        .stdout
        .split_once(&format!("pid {pid} ("))
        .unwrap_or_else(|| panic!("{finished}"));
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].contains("libc.so.6"), "{finished}");
    let row = |name: &str| {
        let named = |line: &&&str| line.split_whitespace().next() == Some(name);
        *lines
            .iter()
            .find(named)
            .unwrap_or_else(|| panic!("{finished}"))
    };
    let emulated = row("free");
    assert!(
        emulated.contains("+0x") && emulated.ends_with("  emulated"),
        "{emulated}"
    );
    let stepped = row("reallocarray");
    assert!(
        stepped.ends_with("  stepped out of line: an argument is overwritten first"),
        "{stepped}"
    );
    assert_eq!(emulated.find('+'), row("malloc").find('+'));
    assert!(row("malloc").contains(" push "), "{finished}");
    assert!(!check(&[]).stdout.contains("+0x"), "sites without -p");
}

/// Check that what cannot be shown is an error, as for other subcommands.
#[test]
fn check_refuses() {
    check(&["-p", "4194305"])
        .expect_code(1)
        .expect_stderr(&["4194305"]);
    let program = Running::spawn(&mut freestanding("no_allocator.c").command(&[]));
    program.wait_stdout(|line| line == "ready");
    check(&["-p", &program.pid().to_string()])
        .expect_code(1)
        .expect_stderr(&["malloc"]);
    check(&["-p", "0"]).expect_code(2);
}
