//! Processes in namespaces and cgroups of their own, traced from outside.

use std::fs;

use memprof_tests::{
    Daemon, End, Process, Profile, Running, TempDir, Totals,
    container::{Cgroup, Container, PROGRAM, User},
    daemon::eventually,
    memprof, pprof,
};
use nix::sys::signal::Signal;

const ID: &str = "3f2b0c9d8e7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c";
const POD: &str = "0e7d3c1a-94b8-4f6c-8d21-5a0b9c7e6f32";

/// Records one go of a container's program.
fn record(dir: &TempDir, container: &mut Container, end: End) -> Profile {
    let file = dir.file("profile.json");
    let pid = container.pid.to_string();
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file, "-p", &pid]);
    let memprof = Running::spawn(&mut command);
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    container.running.send("go");
    container.running.wait_stdout(|line| line == "done");
    match end {
        End::Interrupt => memprof.signal(Signal::SIGINT),
        End::TargetExits => container.running.close_stdin(),
    }
    memprof.finish().expect_code(0);
    Profile::read(&file)
}

/// Fails the test unless the totals, the stack, the names and both pids are right.
#[track_caller]
fn check(process: &Process, container: &Container) {
    assert_eq!(process.pid, container.pid);
    assert_eq!(process.namespace_pids, [container.pid, container.inner_pid]);
    assert_ne!(container.pid, container.inner_pid);
    assert_eq!(
        (process.exe.as_str(), process.comm.as_str()),
        (PROGRAM, "head")
    );
    assert_eq!(process.totals(), Totals::of(10, 10, 100));
    let exact = process.exact();
    assert_eq!((exact.alloc_calls, exact.alloc_bytes), (10, 1000));
    let stack = process.only_stack("hold_here");
    assert_eq!(
        stack.names()[..2],
        ["hold_here", "main"],
        "{}",
        stack.path()
    );
    // Of the container's own file, not of the host's of that path.
    let (leaf, file) = (&stack.frames[0], stack.frames[0].file.as_deref());
    assert_eq!(leaf.module.as_deref(), Some(PROGRAM));
    assert!(
        file.is_some_and(|file| file.ends_with("hold.c")),
        "{leaf:?}"
    );
    for frame in &stack.frames[2..] {
        assert_eq!(
            frame.module.as_deref(),
            Some("/lib/ld-musl-x86_64.so.1"),
            "{frame:?}"
        );
    }
}

/// Check that a process in mount and pid namespaces of its own, whose program and C library
/// have paths that lead elsewhere on the host, is recorded with its names and exact totals.
#[test]
fn other_root() {
    let dir = TempDir::new("containers");
    let mut container = Container::start(&dir, User::Root);
    let profile = record(&dir, &mut container, End::Interrupt);
    check(profile.process(), &container);
    assert_eq!(
        (profile.process().uid, profile.process().exited),
        (0, false)
    );
}

/// Check the same of one without privileges, whose root is nobody on the host; and that
/// everything has its name after the process, and with it the mount namespace, is gone.
#[test]
fn without_privileges_and_gone() {
    let dir = TempDir::new("containers");
    let mut container = Container::start(&dir, User::Nobody);
    let profile = record(&dir, &mut container, End::TargetExits);
    check(profile.process(), &container);
    assert_eq!(
        (profile.process().uid, profile.process().exited),
        (65534, true)
    );
}

/// Check that the container, the pod and both pids are where people and tools look: in JSON,
/// in pprof's labels, in text, and in the daemon's list.
#[test]
fn labels() {
    let dir = TempDir::new("containers");
    let slice = format!("kubepods-pod{}.slice", POD.replace('-', "_"));
    let scope = format!("cri-containerd-{ID}.scope");
    let cgroup = Cgroup::make(&format!("kubepods.slice/{slice}/{scope}"));
    let mut container = Container::start(&dir, User::Root);
    cgroup.enter(container.pid);
    let daemon = Daemon::start(&dir, &[container.pid], &[]);
    container.running.send("go");
    container.running.wait_stdout(|line| line == "done");

    let profile = daemon.profile_when(container.pid, |profile| {
        profile.process().totals().alloc_objects == 10
    });
    let process = profile.process();
    check(process, &container);
    let named = process.container.as_ref().expect("a container");
    assert_eq!(named.runtime.as_deref(), Some("containerd"));
    assert_eq!(
        (named.id.as_str(), named.pod_uid.as_deref()),
        (ID, Some(POD))
    );
    assert_eq!(process.unit.as_deref(), Some(scope.as_str()));
    assert_eq!(process.cgroup, cgroup.path());

    let listed = daemon.get("/v1/processes").json();
    let listed = &listed[0];
    assert_eq!(listed["container"]["id"], ID);
    assert_eq!(listed["container"]["pod_uid"], POD);
    assert_eq!(
        listed["namespace_pids"],
        serde_json::json!([container.pid, container.inner_pid])
    );
    let text = String::from_utf8(daemon.get("/v1/profile?format=text").body).expect("text");
    let pids = format!(
        "(pid {}, {} in its namespace)",
        container.pid, container.inner_pid
    );
    let named = format!("containerd {}, pod {POD}", &ID[..12]);
    assert!(text.contains(&pids) && text.contains(&named), "{text}");

    let file = dir.file("profile.pb.gz");
    fs::write(&file, daemon.get("/v1/profile?format=pprof").body).expect("writing the profile");
    let tags = pprof::tags(&dir, &file);
    for (key, value) in [
        ("container_id", ID),
        ("pod_uid", POD),
        ("unit", scope.as_str()),
    ] {
        assert!(
            tags.contains(&format!("{key}:")) && tags.contains(value),
            "{key}: {tags}"
        );
    }
    daemon.stop();
}

/// Check that a process that is moved to another cgroup before its program is replaced is
/// shown where it is then.
#[test]
fn moved_before_exec() {
    let dir = TempDir::new("containers");
    let cgroup = Cgroup::make("web.slice/web.service");
    let hold = memprof_tests::target("hold.c");
    let mut exec =
        Running::spawn(&mut memprof_tests::target("exec.c").command(&[hold.text(), "3", "30"]));
    exec.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[exec.pid()], &[]);
    cgroup.enter(exec.pid());
    exec.send("go");
    let second = eventually(|| {
        let profile = Profile::parse(&daemon.get("/v1/profile").body);
        let image = profile.processes.into_iter().nth(1)?;
        image.exe.contains("/hold-").then_some(image)
    });
    assert_eq!(second.unit.as_deref(), Some("web.service"));
    assert_eq!((second.cgroup, second.container), (cgroup.path(), None));
    assert_eq!(second.namespace_pids, [exec.pid()]);
    daemon.stop();
}
