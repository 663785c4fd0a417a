//! Names of programs and libraries that have none themselves, or are no longer where they
//! were.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use memprof_tests::{
    Daemon, End, Process, Record, Running, Stack, TempDir,
    stripped::{Stripped, run},
    targets::{Target, shared_library, target, target_with},
};

fn names(stack: &Stack) -> Vec<&str> {
    stack
        .frames
        .iter()
        .map(|frame| frame.function.as_deref().unwrap_or("?"))
        .collect()
}

/// The frame of the program in which it allocates.
fn leaf<'a>(process: &'a Process, module: &str) -> &'a memprof_tests::profile::Frame {
    let leaves = process.stacks.iter().map(|stack| &stack.frames[0]);
    let mut leaves = leaves.filter(|frame| {
        let path = frame.module.as_deref().unwrap_or_default();
        path.ends_with(module)
    });
    leaves.next().expect("a stack from the program")
}

fn expect_named(process: &Process) {
    let frame = leaf(process, "program");
    assert_eq!(frame.function.as_deref(), Some("hold_here"));
    assert!(frame.line.is_some(), "{frame:?}");
    let file = frame.file.as_deref().unwrap_or_default();
    assert!(file.ends_with("hold.c"), "{file}");
}

fn expect_unnamed(process: &Process) {
    let frame = leaf(process, "program");
    assert_eq!(frame.function, None);
    assert_eq!(frame.unknown.as_deref(), Some("no_symbol"));
}

fn hold() -> Target {
    target_with("hold.c", &["-Wl,--build-id"])
}

/// A root directory for a program: the program, and what it needs to run.
fn root(stripped: &Stripped) -> TempDir {
    let root = TempDir::new("root");
    let maps = fs::read_to_string("/proc/self/maps").expect("our own mappings");
    let mut loaded: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains("/libc.so") || path.contains("/ld-linux"))
        .collect();
    loaded.dedup();
    let libraries = root.path().join("lib/x86_64-linux-gnu");
    fs::create_dir_all(&libraries).expect("a directory");
    fs::create_dir(root.path().join("lib64")).expect("a directory");
    for path in loaded {
        let name = Path::new(path).file_name().expect("a file");
        fs::copy(path, libraries.join(name)).expect("a library");
    }
    fs::copy(
        "/lib64/ld-linux-x86-64.so.2",
        root.path().join("lib64/ld-linux-x86-64.so.2"),
    )
    .expect("the loader");
    fs::create_dir(root.path().join("opt")).expect("a directory");
    fs::copy(&stripped.program, root.path().join("opt/program")).expect("the program");
    root
}

/// Records a program in its root directory until it has exited: when names are looked
/// for, it and its mount namespace are gone.
fn record_in(root: &TempDir, launcher: &[&str]) -> Process {
    let dir = TempDir::new("symbols");
    let mut command = Command::new(launcher[0]);
    command.args(&launcher[1..]);
    command.args([
        "chroot",
        root.path().to_str().expect("UTF-8"),
        "/opt/program",
    ]);
    let recorded = Record::every_allocation(&dir).attach(&mut command, End::TargetExits);
    recorded.process().clone()
}

fn put(place: &Path, content: &[u8]) {
    fs::create_dir_all(place.parent().expect("a directory")).expect("a directory");
    fs::write(place, content).expect("a debug file");
}

const OTHER_NAMESPACE: &[&str] = &["unshare", "--mount"];
const OTHER_ROOT: &[&str] = &["env"];

/// Check that a debug file is found by build id in the target's own root, in our mount
/// namespace and in another, and that without one there is no name.
#[test]
fn by_build_id_in_the_targets_root() {
    let dir = TempDir::new("stripped");
    let stripped = Stripped::new(&hold(), &dir);
    let root = root(&stripped);
    expect_unnamed(&record_in(&root, OTHER_NAMESPACE));
    put(&stripped.place_by_build_id(root.path()), &stripped.debug);
    for launcher in [OTHER_NAMESPACE, OTHER_ROOT] {
        expect_named(&record_in(&root, launcher));
    }
}

/// Check that a debug file is found by `.gnu_debuglink` in each of its places in the
/// target's own root, by build id and by checksum; that a damaged one is not taken by its
/// checksum; and that a link out of the root leads nowhere.
#[test]
fn by_debug_link_in_the_targets_root() {
    for build_id in ["-Wl,--build-id", "-Wl,--build-id=none"] {
        let dir = TempDir::new("stripped");
        let with_id = Stripped::new(&hold(), &dir);
        let stripped = if build_id == "-Wl,--build-id" {
            with_id
        } else {
            without_build_id(with_id)
        };
        let debug = dir.path().join("linked.debug");
        fs::write(&debug, &stripped.debug).expect("a debug file");
        run(Command::new("objcopy")
            .arg(format!("--add-gnu-debuglink={}", debug.display()))
            .arg(&stripped.program));
        fs::remove_file(&debug).expect("the debug file is ours");
        let root = root(&stripped);
        for (place, launcher) in [
            ("opt/linked.debug", OTHER_NAMESPACE),
            ("opt/.debug/linked.debug", OTHER_ROOT),
            ("usr/lib/debug/opt/linked.debug", OTHER_NAMESPACE),
        ] {
            let place = root.path().join(place);
            put(&place, &stripped.debug);
            expect_named(&record_in(&root, launcher));
            fs::remove_file(&place).expect("the debug file is ours");
        }
        put(&dir.path().join("outside"), &stripped.debug);
        let place = root.path().join("opt/linked.debug");
        symlink(dir.path().join("outside"), &place).expect("a link");
        expect_unnamed(&record_in(&root, OTHER_NAMESPACE));
        fs::remove_file(&place).expect("the link is ours");
        if build_id != "-Wl,--build-id" {
            let mut damaged = stripped.debug.clone();
            *damaged.last_mut().expect("bytes") ^= 1;
            put(&place, &damaged);
            expect_unnamed(&record_in(&root, OTHER_NAMESPACE));
        }
    }
}

/// The same program and debug file without a build id.
fn without_build_id(mut stripped: Stripped) -> Stripped {
    let debug = stripped.program.with_file_name("debug");
    fs::write(&debug, &stripped.debug).expect("a debug file");
    for file in [&stripped.program, &debug] {
        run(Command::new("objcopy")
            .arg("--remove-section=.note.gnu.build-id")
            .arg(file));
    }
    stripped.debug = fs::read(&debug).expect("the debug file");
    fs::remove_file(debug).expect("the debug file is ours");
    stripped
}

/// Check names from `.gnu_debugdata`, which have no lines.
#[test]
fn mini_debug_info() {
    let dir = TempDir::new("stripped");
    let stripped = Stripped::new(&hold(), &dir);
    let data = dir.path().join("data");
    fs::write(&data, &stripped.debug).expect("a debug file");
    // As `xz` is told to by those who make such files: no debug information.
    run(Command::new("strip").arg("--strip-debug").arg(&data));
    run(Command::new("xz").arg(&data));
    let data = data.with_extension("xz");
    run(Command::new("objcopy")
        .arg(format!("--add-section=.gnu_debugdata={}", data.display()))
        .arg(&stripped.program));
    let out = TempDir::new("symbols");
    let recorded = Record::every_allocation(&out)
        .attach(&mut Command::new(&stripped.program), End::TargetExits);
    let frame = leaf(recorded.process(), "program");
    assert_eq!(frame.function.as_deref(), Some("hold_here"));
    assert_eq!(frame.line, None);
}

/// Check that a library which a package upgrade replaces under a running daemon, and a
/// program that is deleted, are named from what is mapped, also after the program's end.
#[test]
fn replaced_files() {
    let dir = TempDir::new("replaced");
    let [library, program, newer] =
        ["library.so", "program", "newer"].map(|name| dir.path().join(name));
    fs::copy(shared_library("plugin.c").path(), &library).expect("a library");
    fs::copy(target("linked.c").path(), &program).expect("a program");
    let mut target = Running::spawn(Command::new(&program).arg(&library));
    target.wait_stdout(|line| line == "ready");
    let pid = target.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);

    // As package managers do it: the new file takes the old one's name.
    fs::copy(self::target("brief.c").path(), &newer).expect("another file");
    fs::rename(&newer, &library).expect("replacing the library");
    fs::remove_file(&program).expect("deleting the program");
    target.send("go");
    target.wait_stdout(|line| line == "done");
    let expect = |process: &Process| {
        let stack = process
            .stacks
            .iter()
            .find(|stack| names(stack).contains(&"plugin_call"));
        let stack = stack.unwrap_or_else(|| panic!("{:?}", process.stacks));
        assert_eq!(names(stack)[..3], ["allocate", "plugin_call", "main"]);
        for (frame, source) in stack
            .frames
            .iter()
            .zip(["linked.c", "plugin.c", "linked.c"])
        {
            let file = frame.file.as_deref().unwrap_or_default();
            assert!(file.ends_with(source), "{frame:?}");
            assert!(frame.line.is_some(), "{frame:?}");
        }
    };
    let allocated = |process: &Process| process.estimates.alloc_objects == 1;
    expect(
        daemon
            .profile_when(pid, |profile| allocated(profile.process()))
            .process(),
    );
    target.close_stdin();
    target.finish().expect_code(0);
    let after = daemon.profile_when(pid, |profile| profile.process().exited);
    expect(after.process());
    daemon.stop();
}

/// Check the name of what a signal handler returns to, and of the first function of a
/// coroutine's stack: nobody has called either, and the byte before is another function's.
#[test]
fn frames_that_nobody_called() {
    let musl = "-specs=/usr/lib/x86_64-linux-musl/musl-gcc.specs";
    for flags in [&["-static"][..], &["-static", musl]] {
        let hazards = target_with(
            "hazards.c",
            &[&["-O2", "-fomit-frame-pointer"], flags].concat(),
        );
        let stack = |what| {
            let dir = TempDir::new("symbols");
            let recorded = Record::every_allocation(&dir).command(&hazards, &[what]);
            let stacks = &recorded.process().stacks;
            let stack = stacks.iter().find(|stack| names(stack)[0] == "leaf");
            stack.expect("a stack from leaf").clone()
        };
        let signal = stack("signal");
        let expected = ["leaf", "on_signal", "__restore_rt", "interrupted", "main"];
        assert_eq!(names(&signal)[..5], expected, "{flags:?}");
        // musl has no coroutines.
        if flags == ["-static"] {
            let coroutine = stack("coroutine");
            let expected = ["leaf", "coroutine_body", "__start_context"];
            assert_eq!(names(&coroutine), expected);
        }
    }
}
