//! Every function of every allocator that docs/allocators.md has, exactly.

use std::{fs, path::Path, process::Command};

use memprof_tests::{
    End, Process, Record, TempDir, Totals,
    engine::is_prefilter,
    profile::sum,
    target,
    targets::{Package, Target, package, target_with},
};

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

fn library(name: &str) -> String {
    let path = format!("{LIBRARIES}/{name}");
    assert!(fs::exists(&path).unwrap_or(false), "the tests need {path}");
    path
}

/// What a line of allocators.c says.
struct Slot<'a> {
    slot: &'a str,
    function: &'a str,
    done: Totals,
}

fn slots(stdout: &str) -> Vec<Slot<'_>> {
    let of_line = |line| {
        let words: Vec<_> = str::split(line, ' ').collect();
        let [slot, function, calls, kept, size] = words[..] else {
            return None;
        };
        let number = |text: &str| text.parse::<u64>().expect("a number");
        Some(Slot {
            slot,
            function,
            done: Totals::of(number(calls), number(kept), number(size)),
        })
    };
    stdout.lines().filter_map(of_line).collect()
}

/// Runs allocators.c with `arguments` in this command, and checks that each function was
/// counted as often as it was called, under the function that called it, and that nothing
/// else was. `functions` are how many of the driver's the allocator has.
fn check_driver(command: &mut Command, functions: usize) -> Process {
    let dir = TempDir::new("allocators");
    let recorded = Record::every_allocation(&dir).attach(command, End::Interrupt);
    let process = recorded.process();
    let slots = slots(&recorded.target.stdout);
    // And the one that first blocks come from.
    assert_eq!(slots.len(), functions + 1, "{}", recorded.target.stdout);
    let (mut all, mut failed) = (Totals::default(), 0);
    for Slot {
        slot,
        function,
        done,
    } in slots
    {
        let mut done = done;
        let seen = sum(process.through(slot));
        if slot == "first_block" {
            // Those that xallocx was then given, and did not resize, are freed as well.
            done.inuse_objects = 0;
            done.inuse_bytes = 0;
        }
        assert_eq!(seen, done, "{slot}: {function}");
        all.alloc_objects += done.alloc_objects;
        all.alloc_bytes += done.alloc_bytes;
        all.inuse_objects += done.inuse_objects;
        failed += u64::from(function.ends_with("xallocx") && done.alloc_objects == 0);
    }
    let totals = process.totals();
    assert_eq!(totals.alloc_objects, all.alloc_objects);
    assert_eq!(totals.inuse_objects, all.inuse_objects);
    // Calls that failed are calls; the driver's slot 10 makes 13 of them.
    let exact = process.exact();
    assert_eq!(exact.alloc_calls, all.alloc_objects + 13 * failed);
    assert_eq!(exact.free_calls, all.alloc_objects - all.inuse_objects);
    let engine = if is_prefilter() {
        "prefilter"
    } else {
        "uprobe"
    };
    assert_eq!(process.engine, engine, "{:?}", process.engine_reason);
    process.clone()
}

fn driver() -> Target {
    target("allocators.c")
}

/// Check the C library, and the names that it has beyond others.
#[test]
fn glibc() {
    check_driver(&mut driver().command(&["more"]), 9);
}

/// Check jemalloc in place of the C library's, with its functions that take flags.
#[test]
fn jemalloc() {
    let mut command = driver().command(&["jemalloc"]);
    command.env("LD_PRELOAD", library("libjemalloc.so.2"));
    check_driver(&mut command, 11);
}

/// Check gperftools' tcmalloc, by its own names and the C library's.
#[test]
fn tcmalloc() {
    for name in ["libtcmalloc.so.4", "libtcmalloc_minimal.so.4"] {
        for (family, functions) in [("tcmalloc", 8), ("plain", 7)] {
            let mut command = driver().command(&[family]);
            command.env("LD_PRELOAD", library(name));
            check_driver(&mut command, functions);
        }
    }
}

/// Check mimalloc by its own names and the C library's, in place of that and beside it.
#[test]
fn mimalloc() {
    let path = library("libmimalloc.so.2");
    for (family, functions) in [("mimalloc", 54), ("more", 11)] {
        let mut command = driver().command(&[family]);
        command.env("LD_PRELOAD", &path);
        check_driver(&mut command, functions);
    }
    check_driver(&mut driver().command(&["mimalloc", &path]), 54);
}

/// The libraries that have `operator new` of their own, and how many of the driver's functions
/// each has: mimalloc has no `delete` that does not throw.
const CXX: [(&str, usize); 4] = [
    ("libjemalloc.so.2", 12),
    ("libtcmalloc.so.4", 16),
    ("libtcmalloc_minimal.so.4", 16),
    ("libmimalloc.so.2", 17),
];

/// Check C++'s `new` and `delete` in all their forms.
#[test]
fn cxx() {
    for (name, functions) in CXX {
        let mut command = driver().command(&["cxx"]);
        command.env("LD_PRELOAD", library(name));
        check_driver(&mut command, functions);
    }
}

/// Check that a `new` which throws is one call that failed, that the program goes on as ever,
/// and that what it allocates then, in the very frames that the exception has passed, is
/// counted. mimalloc's of Debian is built as C, and aborts.
#[test]
fn cxx_throws() {
    let target = target_with("new_throws.cpp", &["-ldl"]);
    for (name, _) in CXX.iter().filter(|(name, _)| *name != "libmimalloc.so.2") {
        let dir = TempDir::new("allocators");
        let mut command = target.command(&[]);
        command.env("LD_PRELOAD", library(name));
        let recorded = Record::every_allocation(&dir).attach(&mut command, End::Interrupt);
        let process = recorded.process();
        let (thrown, kept) = (
            recorded.target.value("thrown"),
            recorded.target.value("kept"),
        );
        assert_eq!((thrown, kept), (300, 300), "{name}");
        let blocks = sum(process.through("after_a_throw"));
        assert_eq!(blocks, Totals::of(kept, kept, 48), "{name}");
        // Each exception is a block, too, which is freed.
        let totals = process.totals();
        assert_eq!(totals.alloc_objects, kept + thrown, "{name}");
        assert_eq!(totals.inuse_objects, kept, "{name}");
        let exact = process.exact();
        assert_eq!(exact.alloc_calls, kept + 2 * thrown, "{name}");
        assert_eq!(exact.free_calls, thrown, "{name}");
    }
}

/// Check musl, shared. `static_pie` has static programs.
#[test]
fn musl() {
    let specs = "-specs=/usr/lib/x86_64-linux-musl/musl-gcc.specs";
    let driver = target_with("allocators.c", &[specs]);
    check_driver(&mut driver.command(&["more"]), 8);
}

/// The C functions of the jemalloc in `package`, by another prefix.
fn with_prefix(package: &Package, dir: &TempDir, prefix: &str) -> String {
    let builds = fs::read_dir(package.build_dir.join("build")).expect("builds");
    let archive = builds
        .filter_map(|build| {
            let path = build.ok()?.path().join("out/lib/libjemalloc.a");
            path.exists().then_some(path)
        })
        .next()
        .expect("jemalloc's archive");
    let renamed = dir.file("libjemalloc.a");
    let mut objcopy = Command::new("objcopy");
    for name in [
        "malloc",
        "calloc",
        "realloc",
        "posix_memalign",
        "aligned_alloc",
        "memalign",
        "valloc",
        "free",
        "mallocx",
        "rallocx",
        "xallocx",
        "dallocx",
        "sdallocx",
    ] {
        objcopy.args(["--redefine-sym", &format!("_rjem_{name}={prefix}{name}")]);
    }
    let status = objcopy.arg(archive).arg(&renamed).status();
    assert!(status.expect("the tests need objcopy").success());
    renamed
}

/// Check jemalloc of a Rust program, and with prefixes linked into programs in C.
#[test]
fn jemalloc_with_a_prefix() {
    let built = package("rust_jemalloc");
    let dir = TempDir::new("allocators-rust");
    let recorded =
        Record::every_allocation(&dir).attach(&mut built.program.command(&[]), End::Interrupt);
    let process = recorded.process();
    for (function, expected) in [
        ("rust_jemalloc::from_box", Totals::of(10, 3, 200)),
        ("rust_jemalloc::from_aligned", Totals::of(10, 3, 640)),
        ("rust_jemalloc::from_mallocx", Totals::of(20, 3, 500)),
        ("rust_jemalloc::from_rallocx", Totals::of(10, 0, 5000)),
        ("rust_jemalloc::from_xallocx", Totals::of(10, 3, 4999)),
        ("rust_jemalloc::from_zeroed", Totals::of(10, 0, 300)),
        ("rust_jemalloc::from_grown", Totals::of(10, 3, 1300)),
    ] {
        assert_eq!(sum(process.through(function)), expected, "{function}");
    }
    let totals = process.totals();
    assert_eq!((totals.alloc_objects, totals.inuse_objects), (80, 15));
    assert_eq!(process.exact().alloc_calls, 80);
    assert_eq!(process.exact().free_calls, 65);

    for prefix in ["je_", "_rjem_"] {
        let archive = with_prefix(&built, &dir, prefix);
        let flags = [
            "-rdynamic",
            "-Wl,--whole-archive",
            &archive,
            "-Wl,--no-whole-archive",
            "-lm",
        ];
        let program = dir.file(&format!("driver{prefix}"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("targets/allocators.c");
        let status = Command::new("cc")
            .args([
                "-g",
                "-O1",
                "-fno-omit-frame-pointer",
                "-pthread",
                "-o",
                &program,
            ])
            .arg(source)
            .args(flags)
            .status();
        assert!(status.expect("a C compiler").success());
        let mut command = Command::new(&program);
        command.arg(prefix.trim_matches('_'));
        check_driver(&mut command, 11);
    }
}
