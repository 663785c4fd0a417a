//! Who may ask the daemon.

use std::{
    fs,
    net::UdpSocket,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

use memprof_tests::{Daemon, Running, TempDir, http::Tcp, memprof, target};

const TOKEN: &str = "correct-horse-battery";

fn hold() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

fn token_file(dir: &TempDir, mode: u32) -> String {
    let file = dir.file(&format!("token-{mode:o}"));
    fs::write(&file, format!("{TOKEN}\n")).expect("a token");
    fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("its mode");
    file
}

/// An address of this host that is not loopback's, if it has one.
fn other_address() -> Option<std::net::IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: the kernel only chooses the way.
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// Check that a page of another origin is turned away from every method, as browsers say so,
/// and a name that leads here but is not ours is, too.
#[test]
fn web_pages() {
    let dir = TempDir::new("access");
    let hold = hold();
    let options = ["--listen", "0", "--allow-host", "probe.example"];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    let tcp = daemon.tcp();
    let port = tcp.address.port();
    let before = tcp.get("/v1/config").json();
    for (name, value) in [
        ("Origin", "http://evil.example"),
        ("Origin", "null"),
        ("Origin", "http://127.0.0.1:1"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("Host", "evil.example"),
        ("Host", "127.0.0.1.evil.example"),
        ("Host", "10.255.255.1"),
    ] {
        let page = tcp.with(name, value);
        for (method, path, body) in [
            ("GET", "/v1/profile", ""),
            ("GET", "/healthz", ""),
            ("PUT", "/v1/config", r#"{"sample_interval_bytes": 77}"#),
            ("POST", "/v1/reset", ""),
            ("DELETE", "/v1/targets/1", ""),
            ("OPTIONS", "/v1/config", ""),
            ("GET", "/no/such/path", ""),
        ] {
            let response = page.request(method, path, body);
            assert_eq!(response.status, 403, "{name}: {value}: {method} {path}");
            assert!(response.header("access-control-allow-origin").is_none());
        }
    }
    assert_eq!(tcp.get("/v1/config").json(), before);
    for (name, value) in [
        ("Origin", format!("http://127.0.0.1:{port}")),
        ("Sec-Fetch-Site", "same-origin".to_owned()),
        ("Sec-Fetch-Site", "none".to_owned()),
        ("Host", format!("localhost:{port}")),
        ("Host", "probe.example".to_owned()),
        ("Host", format!("[::1]:{port}")),
    ] {
        let status = tcp.with(name, &value).get("/healthz").status;
        assert_eq!(status, 200, "{name}: {value}");
    }
    daemon.stop();
}

/// Check that with a token nobody is served without it, on loopback neither, and that the Unix
/// socket needs none.
#[test]
fn token() {
    let dir = TempDir::new("access");
    let hold = hold();
    let file = token_file(&dir, 0o600);
    let options = ["--listen", "0", "--token-file", &file];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    let tcp = daemon.tcp();
    for refused in [
        tcp.clone(),
        tcp.with("Authorization", "Bearer wrong-horse-battery"),
        tcp.with("Authorization", &format!("Bearer {TOKEN}x")),
        tcp.with("Authorization", TOKEN),
    ] {
        for path in [
            "/healthz",
            "/v1/profile",
            "/metrics",
            "/debug/pprof/heap",
            "/no",
        ] {
            let response = refused.get(path);
            assert_eq!(response.status, 401, "{path}");
            assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        }
    }
    let known = tcp.with("Authorization", &format!("Bearer {TOKEN}"));
    assert_eq!(known.get("/v1/profile").status, 200);
    // The token does not open for a page: it may be in the browser.
    let page = known.with("Origin", "http://evil.example");
    assert_eq!(page.get("/v1/profile").status, 403);
    assert_eq!(daemon.get("/v1/profile").status, 200);

    let url = tcp.url();
    let dump = |options: &[&str]| {
        let mut command = memprof(&["dump", "-f", "json", "--connect", &url]);
        Running::spawn(command.args(options)).finish()
    };
    dump(&["--token-file", &file]).expect_code(0);
    dump(&[]).expect_code(1).expect_stderr(&["--token-file"]);
    // As clients send it that know of URLs alone.
    let with_token = url.replace("http://", &format!("http://memprof:{TOKEN}@"));
    let heap = format!("{with_token}/debug/pprof/heap");
    let (shown, _) = memprof_tests::pprof::top_by_default(&dir, &heap, &[]);
    assert_eq!(shown, "inuse_space");
    daemon.stop();
}

/// Check that what others can read is no token, with the reason, and that an address which
/// others can reach is not listened on without one.
#[test]
fn refused_at_start() {
    let dir = TempDir::new("access");
    let hold = hold();
    let pid = hold.pid().to_string();
    let socket = dir.file("memprof.sock");
    let start = |options: &[&str]| {
        let mut command = memprof(&["daemon", "--socket", &socket, "-p", &pid]);
        Running::spawn(command.args(options)).finish()
    };
    for mode in [0o644, 0o660, 0o604] {
        let file = token_file(&dir, mode);
        start(&["--listen", "0", "--token-file", &file])
            .expect_code(1)
            .expect_stderr(&[&format!("its mode is {mode:o}")]);
    }
    for address in ["0.0.0.0:0", "[::]:0", "10.1.2.3:9464"] {
        start(&["--listen", address])
            .expect_code(1)
            .expect_stderr(&["--token-file"]);
    }
    let short = dir.file("short");
    fs::write(&short, "guess").expect("a token");
    fs::set_permissions(&short, fs::Permissions::from_mode(0o600)).expect("its mode");
    start(&["--listen", "0", "--token-file", &short])
        .expect_code(1)
        .expect_stderr(&["at least 16"]);
    start(&["--listen", "example.com:80"]).expect_code(2);
    start(&["--token-file", &short]).expect_code(2);
    assert!(!fs::exists(&socket).expect("a directory"));
}

/// Check that a daemon on all addresses is asked by its own ones, and by no others' names.
#[test]
fn all_addresses() {
    let dir = TempDir::new("access");
    let hold = hold();
    let file = token_file(&dir, 0o400);
    let options = [
        "--listen",
        "0.0.0.0:0",
        "--listen",
        "[::1]:0",
        "--token-file",
        &file,
    ];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    let bearer = format!("Bearer {TOKEN}");
    let told = daemon.running.stderr();
    let all = daemon.tcp().with("Authorization", &bearer);
    let six = told.find("http://[").expect("an address of IPv6");
    let six = Tcp::told(&told[six..]).with("Authorization", &bearer);
    assert_eq!(six.get("/healthz").status, 200);
    let mut addresses = vec![std::net::IpAddr::from([127, 0, 0, 1])];
    addresses.extend(other_address());
    for address in addresses {
        let mut tcp = all.clone();
        tcp.address.set_ip(address);
        assert_eq!(tcp.get("/healthz").status, 200, "{address}");
        assert_eq!(tcp.with("Host", "192.0.2.7").get("/healthz").status, 403);
        assert_eq!(tcp.with("Host", "evil.example").get("/healthz").status, 403);
    }
    daemon.stop();
}

/// Check that the socket has the mode and the owner that were asked for.
#[test]
fn socket_guard() {
    let dir = TempDir::new("access");
    let hold = hold();
    let options = ["--socket-mode", "660", "--socket-owner", "nobody:7"];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    let metadata = fs::metadata(&daemon.socket).expect("the socket");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    assert_eq!((metadata.uid(), metadata.gid()), (65_534, 7));
    assert_eq!(daemon.get("/healthz").status, 200);
    daemon.stop();
}
