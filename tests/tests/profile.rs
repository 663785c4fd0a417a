//! Known leaks from known functions, by name, line, bytes and count.

use memprof_tests::{End, Record, Recorded, TempDir, Totals, target};

fn check_leaks(recorded: &Recorded) {
    let process = recorded.process();
    let small = process.only_stack("leak_small");
    assert_eq!(small.totals(), Totals::of(100, 100, 24));
    assert_eq!(small.samples, 100);
    let large = process.only_stack("leak_large");
    assert_eq!(large.totals(), Totals::of(3, 3, 1_048_581));
    let churn = process.only_stack("churn");
    assert_eq!(churn.totals(), Totals::of(1000, 0, 64));

    for (stack, leaf, line) in [
        (small, "leak_small", "small_line"),
        (large, "leak_large", "large_line"),
    ] {
        let names = stack.names();
        assert_eq!(names[..4], [leaf, "middle", "outer", "main"], "{names:?}");
        let frame = &stack.frames[0];
        let file = frame.file.as_deref().expect("a source file");
        assert!(file.ends_with("leaks.c"), "{file}");
        assert_eq!(
            frame.line,
            Some(recorded.target.value(line)),
            "line of {leaf}"
        );
        assert!(!frame.inlined);
        let module = frame.module.as_deref().expect("a module");
        assert!(module.contains("/leaks-"), "{module}");
    }

    for cause in [
        "live_map_full",
        "stack_map_full",
        "stack_unreadable",
        "truncated_stacks",
    ] {
        assert_eq!(process.loss(cause), 0, "{cause}");
    }
    assert!(process.exe.contains("/leaks-"), "{}", process.exe);
    assert!(process.comm.starts_with("leaks-"), "{}", process.comm);
    assert_eq!(recorded.profile.sample_interval_bytes, 1);
    assert!(recorded.profile.duration_s > 0.0);
    assert!(!recorded.profile.probe.mode.is_empty());
    for function in ["malloc", "calloc", "realloc", "free", "posix_memalign"] {
        let mut sites = recorded.profile.probe.sites.iter();
        let site = sites.find(|site| site.function == function);
        let site = site.unwrap_or_else(|| panic!("no probe on {function}"));
        assert!(
            site.module.contains("libc") && site.file_offset > 0,
            "{site:?}"
        );
    }
}

/// Check that a command's leaks are in its profile to the byte, under the
/// functions and lines that made them.
#[test]
fn c_command() {
    let dir = TempDir::new("profile");
    let recorded = Record::every_allocation(&dir).command(&target("leaks.c"), &[]);
    check_leaks(&recorded);
    let process = recorded.process();
    assert!(process.exited);
    // Nothing but these three functions allocates.
    let Totals {
        inuse_objects,
        inuse_bytes,
        ..
    } = process.totals();
    assert_eq!((inuse_objects, inuse_bytes), (103, 2400 + 3 * 1_048_581));
}

/// Check that a process that runs already gives the same profile, once it has
/// exited.
#[test]
fn c_attached_until_exit() {
    let dir = TempDir::new("profile");
    let mut leaks = target("leaks.c").command(&[]);
    let recorded = Record::every_allocation(&dir).attach(&mut leaks, End::TargetExits);
    check_leaks(&recorded);
}

/// Check that a process that runs already gives the same profile while it lives.
#[test]
fn c_attached_until_interrupt() {
    let dir = TempDir::new("profile");
    let mut leaks = target("leaks.c").command(&[]);
    let recorded = Record::every_allocation(&dir).attach(&mut leaks, End::Interrupt);
    check_leaks(&recorded);
}

fn check_cpp(recorded: &Recorded) {
    let process = recorded.process();
    let grown = process.only_stack("leak::Holder::grow(int)");
    assert_eq!(grown.totals(), Totals::of(40, 40, 1234));
    assert_eq!(grown.names()[1], "main");

    // operator new is in libstdc++, which sets up no frame pointer: the walk
    // goes from it either to its caller or to that one's caller.
    let new = process.stacks.iter().filter(|stack| {
        stack.frames[0].name().contains("operator new")
            || stack.frames[0].is("leak::Holder::make(int)")
    });
    assert_eq!(memprof_tests::sum(new), Totals::of(30, 30, 4321));

    let inlined = process.only_stack("leak::inlined_helper(unsigned long)");
    assert_eq!(inlined.totals(), Totals::of(20, 20, 333));
    assert!(inlined.frames[0].inlined, "{:?}", inlined.frames[0]);
    assert_eq!(inlined.names()[1..3], ["leak::around_inlined()", "main"]);
    assert!(!inlined.frames[1].inlined, "{:?}", inlined.frames[1]);
}

/// Check that C++ names are demangled and inlined functions have frames.
#[test]
fn cpp_command() {
    let dir = TempDir::new("profile");
    check_cpp(&Record::every_allocation(&dir).command(&target("cpp.cpp"), &[]));
}

/// Check the same of a C++ program that runs already.
#[test]
fn cpp_attached() {
    let dir = TempDir::new("profile");
    let mut cpp = target("cpp.cpp").command(&[]);
    check_cpp(&Record::every_allocation(&dir).attach(&mut cpp, End::Interrupt));
}

fn check_rust(recorded: &Recorded) {
    let process = recorded.process();
    let held = process.through("rust::leaky::hold");
    assert_eq!(
        memprof_tests::sum(held.iter().copied()),
        Totals::of(50, 50, 777)
    );
    for stack in held {
        assert!(stack.names().contains(&"rust::main"), "{}", stack.path());
    }
    let dropped = process.through("rust::leaky::drop_again");
    assert_eq!(memprof_tests::sum(dropped), Totals::of(60, 0, 888));
}

/// Check that Rust names are demangled.
#[test]
fn rust_command() {
    let dir = TempDir::new("profile");
    check_rust(&Record::every_allocation(&dir).command(&target("rust.rs"), &[]));
}

/// Check the same of a Rust program that runs already.
#[test]
fn rust_attached() {
    let dir = TempDir::new("profile");
    let mut rust = target("rust.rs").command(&[]);
    check_rust(&Record::every_allocation(&dir).attach(&mut rust, End::TargetExits));
}
