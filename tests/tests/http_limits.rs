//! What clients cannot do to the daemon: by sending slowly, too much, or too many requests.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use memprof_tests::{Daemon, Running, TempDir, daemon::eventually, target};

fn hold() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

/// What comes until the other side closes, and how long that takes.
fn rest(stream: &mut TcpStream) -> (String, Duration) {
    let begun = Instant::now();
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    // A reset is an end, too.
    let is_end = read.is_ok_and(|_| true) || begun.elapsed() < Duration::from_secs(50);
    assert!(is_end, "the connection stays open");
    (
        String::from_utf8_lossy(&bytes).into_owned(),
        begun.elapsed(),
    )
}

/// Check that a client that does not come to the end of its headers is cut off, whatever it
/// sends meanwhile, and that one with headers without end is refused.
#[test]
fn slow_and_long_headers() {
    let dir = TempDir::new("limits");
    let hold = hold();
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--listen", "0"]);
    let tcp = daemon.tcp();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut silent = tcp.connect();
            let (_, time) = rest(&mut silent);
            assert!(time > Duration::from_secs(5), "{time:?}");
        });
        scope.spawn(|| {
            let mut slow = tcp.connect();
            slow.write_all(b"GET /healthz HTTP/1.1\r\n")
                .expect("sending");
            let begun = Instant::now();
            // One header after the other, until it is cut off.
            while slow.write_all(b"X: y\r\n").is_ok() {
                assert!(begun.elapsed() < Duration::from_secs(40));
                thread::sleep(Duration::from_millis(500));
            }
        });
        scope.spawn(|| {
            let mut long = tcp.connect();
            long.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
                .expect("sending");
            let line = [b"X: ".as_slice(), &[b'y'; 8000], b"\r\n"].concat();
            let mut sent = 0;
            while sent < 1 << 20 && long.write_all(&line).is_ok() {
                sent += line.len();
            }
            let (answer, _) = rest(&mut long);
            assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
        });
    });
    assert_eq!(tcp.get("/healthz").status, 200);
    daemon.stop();
}

/// Check that connections beyond the bound wait, that the Unix socket has places of its own,
/// and that idle connections make room by themselves.
#[test]
fn many_connections() {
    let dir = TempDir::new("limits");
    let hold = hold();
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--listen", "0"]);
    let tcp = daemon.tcp();
    let idle: Vec<TcpStream> = (0..300).map(|_| tcp.connect()).collect();
    assert_eq!(daemon.get("/healthz").status, 200);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", daemon.running.pid()));
    let fds = fds.expect("its descriptors").count();
    assert!(fds < 260, "{fds} descriptors");
    // After them: so it waits for two times the time that idle ones have.
    assert_eq!(tcp.get("/healthz").status, 200);
    drop(idle);
    daemon.stop();
}

/// Check that dumps, eight at a time and again and again, keep no event waiting: the ring is
/// drained while they run, and nothing is lost.
#[test]
fn dumps_do_not_block_sampling() {
    let dir = TempDir::new("limits");
    let busy = Running::spawn(&mut target("storm.c").command(&["1"]));
    let pid = busy.pid();
    let daemon = Daemon::start(&dir, &[pid], &["--listen", "0", "-i", "64KiB"]);
    let tcp = daemon.tcp();
    let events = || {
        let stats = daemon.stats();
        let image = &stats["processes"][0]["images"][0];
        image["alloc_events"].as_u64().expect("a number")
    };
    eventually(|| (events() > 100).then_some(()));
    let is_over = AtomicBool::new(false);
    let (mut dumps, mut busiest) = (0, 0);
    let mut booked = Vec::new();
    thread::scope(|scope| {
        let askers: Vec<_> = (0..8)
            .map(|number| {
                let (tcp, is_over) = (&tcp, &is_over);
                scope.spawn(move || {
                    let path = ["/v1/profile", "/debug/pprof/heap"][number % 2];
                    let (mut done, mut refused) = (0, 0);
                    while !is_over.load(Ordering::Relaxed) {
                        match tcp.get(path).status {
                            200 => done += 1,
                            // A place is given back after the last byte has come.
                            503 => refused += 1,
                            other => panic!("{other}"),
                        }
                    }
                    (done, refused)
                })
            })
            .collect();
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(500));
            booked.push(events());
        }
        is_over.store(true, Ordering::Relaxed);
        for asker in askers {
            let (done, refused) = asker.join().expect("an asker");
            dumps += done;
            busiest += refused;
        }
    });
    assert!(dumps >= 16, "{dumps} dumps, {busiest} refused");
    // Events were booked in every half second of it.
    assert!(
        booked.is_sorted_by(|before, after| before < after),
        "{booked:?}"
    );
    let stats = daemon.stats();
    let losses = &stats["sums"]["losses"];
    for cause in ["alloc_ring_full", "alloc_unreported", "free_ring_full"] {
        assert_eq!(losses[cause], 0, "{losses:#}");
    }
    println!(
        "{dumps} dumps, {busiest} refused, {} events, longest round {} ms",
        booked[9] - booked[0],
        stats["longest_round_ms"]
    );
    daemon.stop();
}
