//! Programs that hold their C library, at a fixed address or at any: their allocator is
//! found, and nothing of it is missed.

use memprof_tests::{
    End, Process, Record, TempDir, Totals,
    engine::is_prefilter,
    targets::{Target, target_with},
};

const MUSL: &str = "/usr/lib/x86_64-linux-musl";

/// What the target's functions allocate: how often, how many blocks stay, and their size.
/// Those of them that musl 1.2.3 has.
const EXPECTED: &[(&str, u64, u64, u64)] = &[
    ("from_malloc", 21, 1, 1001),
    ("from_calloc", 22, 2, 13 * 77),
    ("from_realloc_null", 23, 3, 1003),
    ("from_reallocarray_null", 24, 4, 17 * 59),
    ("from_posix_memalign", 25, 5, 1005),
    ("from_aligned_alloc", 26, 6, 1024),
    ("from_memalign", 27, 7, 1007),
    ("from_realloc_grow", 30, 10, 2001),
    ("from_reallocarray_grow", 31, 11, 31 * 65),
];

fn glibc(flags: &[&str]) -> Target {
    target_with(
        "family.c",
        &[&["-O2", "-fomit-frame-pointer"], flags].concat(),
    )
}

/// Debian's musl-gcc does not know `-static-pie`; musl does.
fn musl(position_independent: bool) -> Target {
    let specs = format!("-specs={MUSL}/musl-gcc.specs");
    let objects = ["rcrt1.o", "crti.o", "crtn.o"].map(|name| format!("{MUSL}/{name}"));
    // musl has no such function.
    let mut flags = vec!["-O2", "-fomit-frame-pointer", "-Dpvalloc=valloc", &specs];
    if position_independent {
        flags.extend([
            "-fPIE",
            "-nostartfiles",
            "-Wl,-static,-pie,--no-dynamic-linker,-z,text",
        ]);
        flags.extend(objects.iter().map(String::as_str));
    } else {
        flags.push("-static");
    }
    target_with("family.c", &flags)
}

fn check(process: &Process) {
    for &(function, count, kept, size) in EXPECTED {
        let expected = Totals::of(count, kept, size);
        assert_eq!(process.leaf_totals(function), expected, "{function}");
    }
    // Nothing is missed, nor counted twice.
    let exact = process.exact();
    let totals = process.totals();
    assert_eq!(totals.alloc_objects, exact.alloc_calls);
    assert_eq!(totals.alloc_bytes, exact.alloc_bytes);
}

/// Checks that every stack goes from its allocation to the first function of all.
fn check_stacks(process: &Process) {
    for stack in &process.stacks {
        assert_eq!(stack.names().last(), Some(&"_start"), "{}", stack.path());
        assert_eq!(stack.end, "complete", "{}", stack.path());
    }
}

fn check_program(target: &Target, check_all: impl Fn(&Process)) {
    check_program_with(target, &[], check_all);
}

fn check_program_with(target: &Target, options: &[&str], check_all: impl Fn(&Process)) {
    let dir = TempDir::new("static");
    let recorded = Record::every_allocation(&dir)
        .options(options)
        .command(target, &[]);
    check_all(recorded.process());
    let dir = TempDir::new("static");
    let recorded = Record::every_allocation(&dir)
        .options(options)
        .attach(&mut target.command(&[]), End::Interrupt);
    check_all(recorded.process());
}

/// Check glibc in a static program that can be at any address: there its `malloc` is a
/// local symbol. Linked as usual, in one piece, and without what is not needed.
#[test]
fn glibc_static_pie() {
    for flags in [
        &["-static-pie"][..],
        &["-static-pie", "-flto"],
        &["-static-pie", "-ffunction-sections", "-Wl,--gc-sections"],
    ] {
        check_program(&glibc(flags), |process| {
            check(process);
            check_stacks(process);
        });
    }
}

/// Check glibc in a static program at a fixed address, also with no symbol of it visible.
#[test]
fn glibc_static() {
    for flags in [&["-static"][..], &["-static", "-Wl,--exclude-libs,ALL"]] {
        check_program(&glibc(flags), |process| {
            check(process);
            check_stacks(process);
        });
    }
}

/// Check musl in static programs of both kinds. Its start-up code has no unwind
/// information: stacks are complete or cut behind main, and marked.
#[test]
fn musl_static() {
    // Without a signal handler it has no code that returns from one, which the prefilter
    // needs to make calls: it is refused then, with that reason, and probed.
    let options: &[&str] = if is_prefilter() {
        &["--probe", "auto"]
    } else {
        &[]
    };
    for position_independent in [true, false] {
        check_program_with(&musl(position_independent), options, |process| {
            check(process);
            if is_prefilter() && process.engine != "prefilter" {
                let reason = process.engine_reason.as_deref().unwrap_or_default();
                assert!(reason.contains("rt_sigreturn"), "{reason}");
            }
            for stack in EXPECTED
                .iter()
                .flat_map(|expected| process.with_leaf(expected.0))
            {
                assert!(stack.names().contains(&"main"), "{}", stack.path());
                let end = stack.end.as_str();
                assert!(["complete", "no_unwind_info"].contains(&end), "{end}");
            }
        });
    }
}
