//! `/debug/pprof/`: what `go tool pprof` makes of it over TCP.

use std::{thread, time::Duration};

use memprof_tests::{
    Daemon, Running, TempDir,
    daemon::eventually,
    pprof::{TopLine, tags, top, top_by_default},
    target,
};

/// Allocates 100 blocks of 1000 bytes, then as many elsewhere, then frees the first.
struct Generations {
    running: Running,
    steps: usize,
}

impl Generations {
    fn start() -> Self {
        let running = Running::spawn(&mut target("generations.c").command(&["100", "1000"]));
        running.wait_stdout(|line| line == "ready");
        Self { running, steps: 0 }
    }

    fn step(&mut self) {
        self.running.send("go");
        self.steps += 1;
        eventually(|| {
            let done = self.running.stdout().matches("done\n").count();
            (done == self.steps).then_some(())
        });
    }
}

#[track_caller]
fn flat(lines: &[TopLine], function: &str) -> i64 {
    let line = lines.iter().find(|line| line.function == function);
    line.map_or(0, |line| line.flat)
}

/// Check that `go tool pprof http://...` shows what is in use of the heap, and all that was
/// allocated of allocs, for all processes and for one.
#[test]
fn heap_and_allocs() {
    let dir = TempDir::new("pprof");
    let mut generations = Generations::start();
    let pid = generations.running.pid();
    let daemon = Daemon::start(&dir, &[pid], &["--listen", "0"]);
    let url = daemon.tcp().url();
    for _ in 0..3 {
        generations.step();
    }
    for query in [String::new(), format!("?pid={pid}"), "?gc=1".to_owned()] {
        let heap = format!("{url}/debug/pprof/heap{query}");
        let (shown, lines) = top_by_default(&dir, &heap, &[]);
        assert_eq!(shown, "inuse_space");
        assert_eq!(flat(&lines, "old_here"), 0);
        assert_eq!(flat(&lines, "new_here"), 100_000);
        let allocs = format!("{url}/debug/pprof/allocs{query}");
        let (shown, lines) = top_by_default(&dir, &allocs, &[]);
        assert_eq!(shown, "alloc_space");
        assert_eq!(flat(&lines, "old_here"), 100_000);
        assert_eq!(flat(&lines, "new_here"), 100_000);
    }
    let lines = top(&dir, format!("{url}/debug/pprof/heap"), "alloc_objects");
    assert_eq!(lines.iter().map(|line| line.flat).sum::<i64>(), 200);
    daemon.stop();
}

/// Check that `-seconds` gives what changes meanwhile: nothing while nothing happens; else what
/// is allocated, and of what is in use also what becomes less.
#[test]
fn windows() {
    let dir = TempDir::new("pprof");
    let mut generations = Generations::start();
    let daemon = Daemon::start(&dir, &[generations.running.pid()], &["--listen", "0"]);
    let tcp = daemon.tcp();
    generations.step();
    let url = format!("{}/debug/pprof/heap", tcp.url());
    let (_, lines) = top_by_default(&dir, &url, &["-seconds=1"]);
    assert_eq!(lines, []);
    let delta = thread::scope(|scope| {
        let asking = scope.spawn(|| tcp.get("/debug/pprof/heap?seconds=4"));
        // Far longer than the way to the daemon.
        thread::sleep(Duration::from_secs(1));
        generations.step();
        generations.step();
        asking.join().expect("a window")
    });
    let file = dir.file("delta.pb.gz");
    std::fs::write(&file, delta.body).expect("writing the delta");
    let lines = top(&dir, &file, "inuse_space");
    assert_eq!(flat(&lines, "old_here"), -100_000);
    assert_eq!(flat(&lines, "new_here"), 100_000);
    let lines = top(&dir, &file, "alloc_space");
    assert_eq!(flat(&lines, "old_here"), 0);
    assert_eq!(flat(&lines, "new_here"), 100_000);
    daemon.stop();
}

/// Check that samples are labelled with their process, also if there is one only, and that
/// one that was asked for by its id is not.
#[test]
fn labels() {
    let dir = TempDir::new("pprof");
    let (mut one, mut other) = (Generations::start(), Generations::start());
    let pids = [one.running.pid(), other.running.pid()];
    let daemon = Daemon::start(&dir, &pids, &["--listen", "0"]);
    let url = format!("{}/debug/pprof/allocs", daemon.tcp().url());
    one.step();
    let said = tags(&dir, &url);
    assert!(said.contains("comm: ") && said.contains("pid: "), "{said}");
    assert!(said.contains(&pids[0].to_string()), "{said}");
    assert!(!said.contains(&pids[1].to_string()), "{said}");
    other.step();
    let said = tags(&dir, &url);
    assert!(
        pids.iter().all(|pid| said.contains(&pid.to_string())),
        "{said}"
    );
    let said = tags(&dir, format!("{url}?pid={}", pids[0]));
    assert!(!said.contains("pid: "), "{said}");
    daemon.stop();
}

/// Check that code without names does not keep `go tool pprof` from showing the rest: it asks
/// for them then, and is told that there are none.
#[test]
fn code_without_names() {
    let dir = TempDir::new("pprof");
    let stripped = dir.file("nameless");
    std::fs::copy(target("hold.c").path(), &stripped).expect("a copy");
    let status = std::process::Command::new("strip").arg(&stripped).status();
    assert!(status.expect("strip").success());
    let mut hold = Running::spawn(std::process::Command::new(&stripped).args(["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--listen", "0"]);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    // It lies elsewhere for `go tool pprof`: it has no names of its own for it either.
    std::fs::remove_file(&stripped).expect("the copy");
    let (_, lines) = top_by_default(
        &dir,
        &format!("{}/debug/pprof/heap", daemon.tcp().url()),
        &[],
    );
    assert_eq!(
        lines.iter().map(|line| line.flat).sum::<i64>(),
        1000,
        "{lines:?}"
    );
    daemon.stop();
}

/// Check what the headers say, the text of `?debug=1`, the page and the command line.
#[test]
fn as_go_answers() {
    let dir = TempDir::new("pprof");
    let mut generations = Generations::start();
    let pid = generations.running.pid();
    let daemon = Daemon::start(&dir, &[pid], &["--listen", "0"]);
    generations.step();
    let tcp = daemon.tcp();
    let heap = tcp.get("/debug/pprof/heap");
    assert_eq!(
        heap.header("content-type"),
        Some("application/octet-stream")
    );
    assert_eq!(
        heap.header("content-disposition"),
        Some("attachment; filename=\"heap\"")
    );
    assert!(heap.body.starts_with(&[0x1f, 0x8b]));
    let delta = tcp.get("/debug/pprof/allocs?seconds=1");
    assert_eq!(
        delta.header("content-disposition"),
        Some("attachment; filename=\"allocs-delta\"")
    );

    let text = tcp.get("/debug/pprof/heap?debug=1");
    assert_eq!(
        text.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    let text = String::from_utf8(text.body).expect("text");
    let first = "heap profile: 100: 100000 [100: 100000] @ heap/2\n";
    assert!(text.starts_with(first), "{text}");
    assert!(text.contains("\told_here\t"), "{text}");
    let both = tcp.get("/debug/pprof/heap?debug=1&seconds=1");
    assert_eq!(both.status, 400);

    let page = String::from_utf8(tcp.get("/debug/pprof/").body).expect("a page");
    assert!(page.contains(&format!("heap?pid={pid}")), "{page}");
    let line = tcp.get("/debug/pprof/cmdline").body;
    let words: Vec<_> = line.split(|&byte| byte == 0).collect();
    assert_eq!(words[1], b"daemon");
    let line = tcp.get(&format!("/debug/pprof/cmdline?pid={pid}")).body;
    assert!(line.ends_with(b"\x00100\x001000"), "{line:?}");
    assert_eq!(tcp.get("/debug/pprof/cmdline?pid=1").status, 404);
    daemon.stop();
}
