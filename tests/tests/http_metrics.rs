//! `/metrics`, as Debian's Prometheus reads it.

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
};

use memprof_tests::{Daemon, Running, TempDir, daemon::eventually, http::Tcp, target};
use serde_json::Value;

fn hold() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

fn text(tcp: &Tcp) -> String {
    String::from_utf8(tcp.get("/metrics").body).expect("text")
}

/// The value of a series, given as it is written.
#[track_caller]
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in {text}"));
    line.trim().parse().expect("a number")
}

/// Check that promtool finds nothing to complain of, and that the numbers are those of the
/// books and of the daemon.
#[test]
fn promtool_accepts_them() {
    let dir = TempDir::new("metrics");
    let mut hold = hold();
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--listen", "0"]);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    let tcp = daemon.tcp();
    let profile = tcp.get("/v1/profile");
    assert_eq!(profile.status, 200);
    let text = text(&tcp);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool of Debian's prometheus");
    let mut stdin = promtool.stdin.take().expect("a pipe");
    stdin
        .write_all(text.as_bytes())
        .expect("writing to promtool");
    drop(stdin);
    let output = promtool.wait_with_output().expect("promtool");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}\n{text}");

    assert_eq!(value(&text, "memprof_samples_total "), 10.0);
    let labels = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}{{")));
        let (series, value) = line.and_then(|line| line.rsplit_once(' ')).expect(name);
        assert!(
            series.contains(&format!("pid=\"{}\"", hold.pid())),
            "{series}"
        );
        value.parse::<f64>().expect("a number")
    };
    assert_eq!(labels("memprof_target_inuse_bytes"), 1000.0);
    assert_eq!(labels("memprof_target_inuse_objects"), 10.0);
    assert_eq!(labels("memprof_target_allocated_bytes_total"), 1000.0);
    assert!(labels("memprof_target_attach_seconds") > 0.0);
    assert_eq!(
        value(&text, "memprof_attaches_total{result=\"attached\"} "),
        1.0
    );
    assert!(value(&text, "memprof_attach_seconds_total ") > 0.0);
    assert_eq!(value(&text, "memprof_dump_seconds_count "), 1.0);
    assert_eq!(
        value(&text, "memprof_losses_total{cause=\"alloc_ring_full\"} "),
        0.0
    );
    assert!(value(&text, "process_cpu_seconds_total ") > 0.0);
    assert!(value(&text, "process_resident_memory_bytes ") > 1e6);
    daemon.stop();
}

/// Check that only so many targets have series of their own, the first ones, and that the sums
/// have them all.
#[test]
fn bounded_series() {
    let dir = TempDir::new("metrics");
    let mut holds: Vec<Running> = (0..3).map(|_| hold()).collect();
    let pids: Vec<u32> = holds.iter().map(Running::pid).collect();
    let options = ["--listen", "0", "--metrics-targets", "1"];
    let daemon = Daemon::start(&dir, &pids, &options);
    for hold in &mut holds {
        hold.send("go");
        hold.wait_stdout(|line| line == "done");
    }
    let text = text(&daemon.tcp());
    assert_eq!(value(&text, "memprof_samples_total "), 30.0);
    assert_eq!(value(&text, "memprof_targets{state=\"tracing\"} "), 3.0);
    assert_eq!(value(&text, "memprof_targets_unlisted "), 2.0);
    let series = text.matches("memprof_target_samples_total{").count();
    assert_eq!(series, 1, "{text}");
    assert!(text.contains(&format!(
        "memprof_target_samples_total{{pid=\"{}\"",
        pids[0]
    )));
    daemon.stop();
}

/// Check that a Prometheus scrapes the daemon, with its token, and has the numbers then.
#[test]
fn prometheus_scrapes() {
    let dir = TempDir::new("metrics");
    let mut hold = hold();
    let token = dir.file("token");
    fs::write(&token, "correct-horse-battery").expect("a token");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&token, mode).expect("its mode");
    let options = ["--listen", "0", "--token-file", &token];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");

    let config = dir.file("prometheus.yml");
    let text = format!(
        "scrape_configs:\n- job_name: memprof\n  scrape_interval: 1s\n  scrape_timeout: 1s\n  \
         authorization: {{type: Bearer, credentials_file: {token}}}\n  \
         static_configs: [{{targets: ['{}']}}]\n",
        daemon.tcp().address
    );
    fs::write(&config, text).expect("a configuration");
    // The port is free when it is given back, and taken at once.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let address = port.expect("a port");
    let prometheus = Running::spawn(Command::new("prometheus").args([
        &format!("--config.file={config}"),
        &format!("--storage.tsdb.path={}", dir.file("tsdb")),
        &format!("--web.listen-address={address}"),
    ]));
    let asked = Tcp {
        address,
        headers: Vec::new(),
    };
    eventually(|| std::net::TcpStream::connect(address).ok());
    let query = |query: &str| -> Option<Value> {
        let answer = asked.get(&format!("/api/v1/query?query={query}"));
        // It answers queries a moment after it has begun to listen.
        if answer.status != 200 {
            return None;
        }
        let result = answer.json()["data"]["result"].as_array()?.first()?.clone();
        Some(result)
    };
    let up = eventually(|| query("up").filter(|up| up["value"][1] == "1"));
    assert_eq!(up["metric"]["job"], "memprof");
    let inuse = eventually(|| query("memprof_target_inuse_bytes"));
    assert_eq!(inuse["value"][1], "1000", "{inuse:#}");
    assert_eq!(inuse["metric"]["pid"], hold.pid().to_string());
    let samples = eventually(|| query("memprof_samples_total"));
    assert_eq!(samples["value"][1], "10", "{samples:#}");
    prometheus.signal(nix::sys::signal::Signal::SIGTERM);
    prometheus.finish().expect_code(0);
    daemon.stop();
}
