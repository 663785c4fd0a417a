//! docs/openapi.json, held against the running daemon.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    thread,
};

use memprof_tests::{
    Daemon, Running, TempDir,
    daemon::eventually,
    golang,
    http::{Response, Tcp, parse},
    openapi::Contract,
    target, targets,
};

const TOKEN: &str = "correct-horse-battery";

/// The path of an operation, with a process in it.
fn concrete(path: &str, pid: u32) -> String {
    path.replace("{pid}", &pid.to_string())
}

/// Asks, and checks the answer and its status.
fn ask(
    contract: &mut Contract,
    tcp: &Tcp,
    case: (&str, &str, &str, &str),
    status: u16,
) -> Response {
    let (method, path, asked, body) = case;
    let response = tcp.request(method, asked, body);
    let text = String::from_utf8_lossy(&response.body);
    assert_eq!(response.status, status, "{method} {asked}: {text}");
    contract.check(path, method, &response);
    response
}

/// A request whose body is never complete.
fn unfinished(tcp: &Tcp, method: &str, path: &str) -> TcpStream {
    let mut stream = tcp.connect();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\
         Connection: close\r\nContent-Length: 10\r\n\r\n{{"
    );
    stream.write_all(head.as_bytes()).expect("sending");
    stream
}

fn finished(mut stream: TcpStream) -> Response {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    parse(&answer)
}

/// Check that every path, method and status of the description is met, with answers as it has
/// them; that no path knows a method which it does not describe; and that the daemon hands out
/// the very file. Paths that are served and not described, a test in the daemon's own crate
/// finds.
#[test]
fn every_operation_and_status() {
    let dir = TempDir::new("openapi");
    let mut hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    let other = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    other.wait_stdout(|line| line == "ready");
    let bare = Running::spawn(&mut targets::freestanding("no_allocator.c").command(&[]));
    let token = dir.file("token");
    fs::write(&token, TOKEN).expect("a token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("its mode");
    let pid = hold.pid();
    let options = ["--listen", "0", "--token-file", &token];
    // What is told of one beside all else.
    let go =
        golang::start(&mut targets::target_with("heap.go", &[]).command(&[&dir.file("own"), "1"]));
    let daemon = Daemon::start(&dir, &[pid, go.pid()], &options);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    let stranger = daemon.tcp();
    let tcp = stranger.with("Authorization", &format!("Bearer {TOKEN}"));

    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let file = fs::read(file).expect("docs/openapi.json");
    assert!(tcp.get("/v1/openapi.json").body == file);
    let mut contract = Contract::read(&file);
    let contract = &mut contract;
    let operations = contract.operations();

    // Who may not ask is told so, whatever is asked.
    for (path, method) in &operations {
        let asked = concrete(path, pid);
        let page = stranger.with("Origin", "http://evil.example");
        ask(contract, &stranger, (method, path, &asked, ""), 401);
        ask(contract, &page, (method, path, &asked, ""), 403);
    }
    unknown_methods(&operations, &tcp, pid);
    good(contract, &tcp, pid);
    bad(contract, &tcp, [&other, &bare].map(Running::pid));
    letting_go(contract, &tcp, other.pid());
    overload(contract, &tcp, &operations, pid);
    assert_eq!(contract.unseen(), []);
    daemon.stop();
}

/// No path knows a method that is not described; each says which it knows.
fn unknown_methods(operations: &BTreeSet<(String, String)>, tcp: &Tcp, pid: u32) {
    let paths: BTreeSet<&String> = operations.iter().map(|(path, _)| path).collect();
    for path in paths {
        let refused = tcp.request("PROPFIND", &concrete(path, pid), "");
        assert_eq!(refused.status, 405, "{path}");
        let allowed = refused.header("allow").unwrap_or_default();
        let allowed = allowed
            .split(',')
            .map(|method| method.trim().to_ascii_lowercase());
        // What comes with GET.
        let allowed: BTreeSet<String> = allowed.filter(|method| method != "head").collect();
        let described = operations.iter().filter(|(other, _)| other == path);
        let described: BTreeSet<String> = described.map(|(_, method)| method.clone()).collect();
        assert_eq!(allowed, described, "{path}");
    }
}

/// What makes sense.
fn good(contract: &mut Contract, tcp: &Tcp, pid: u32) {
    for path in [
        "/healthz",
        "/metrics",
        "/v1/openapi.json",
        "/v1/processes",
        "/v1/config",
        "/v1/stats",
        "/v1/targets",
        "/debug/pprof/",
        "/debug/pprof/symbol",
        "/debug/pprof/cmdline",
    ] {
        ask(contract, tcp, ("GET", path, path, ""), 200);
    }
    let open = tcp.with("Accept", "application/openmetrics-text;version=1.0.0");
    ask(contract, &open, ("GET", "/metrics", "/metrics", ""), 200);
    for query in [
        "",
        "format=json",
        "format=pprof",
        "format=folded",
        "format=text",
        "seconds=1",
    ] {
        let asked = format!("/v1/profile?pid={pid}&{query}");
        ask(contract, tcp, ("GET", "/v1/profile", &asked, ""), 200);
    }
    for path in ["/debug/pprof/heap", "/debug/pprof/allocs"] {
        for query in ["", "debug=1", "seconds=1"] {
            let asked = format!("{path}?pid={pid}&{query}");
            ask(contract, tcp, ("GET", path, &asked, ""), 200);
        }
    }
    let one = format!("/v1/targets/{pid}");
    ask(contract, tcp, ("GET", "/v1/targets/{pid}", &one, ""), 200);
    let body = r#"{"sample_interval_bytes": 1}"#;
    ask(
        contract,
        tcp,
        ("PUT", "/v1/config", "/v1/config", body),
        200,
    );
    ask(contract, tcp, ("POST", "/v1/reset", "/v1/reset", ""), 200);
    let symbol = "/debug/pprof/symbol";
    ask(contract, tcp, ("POST", symbol, symbol, "0x1+0x2"), 200);
}

/// What makes none, or comes too slowly, or is too long.
fn bad(contract: &mut Contract, tcp: &Tcp, [other, bare]: [u32; 2]) {
    for path in [
        "/v1/profile",
        "/debug/pprof/heap",
        "/debug/pprof/allocs",
        "/debug/pprof/cmdline",
    ] {
        ask(
            contract,
            tcp,
            ("GET", path, &format!("{path}?pid=x"), ""),
            400,
        );
        ask(
            contract,
            tcp,
            ("GET", path, &format!("{path}?pid=1&pid=2"), ""),
            400,
        );
        ask(
            contract,
            tcp,
            ("GET", path, &format!("{path}?pid={other}"), ""),
            404,
        );
    }
    let config = "/v1/config";
    ask(contract, tcp, ("PUT", config, config, "{}"), 400);
    let target = "/v1/targets/{pid}";
    for method in ["GET", "DELETE"] {
        for name in ["x", "%ff", &other.to_string()] {
            let asked = format!("/v1/targets/{name}");
            ask(contract, tcp, (method, target, &asked, ""), 404);
        }
    }
    let targets = "/v1/targets";
    for (body, status) in [
        ("{}".to_owned(), 400),
        (r#"{"pid": 4194304}"#.to_owned(), 404),
        (format!("{{\"pid\": {bare}}}"), 422),
        (format!("{{\"pid\": {other}}}"), 201),
        (format!("{{\"pid\": {other}}}"), 409),
    ] {
        ask(contract, tcp, ("POST", targets, targets, &body), status);
    }
    // The limit of a body that is read, and of one that is thrown away.
    let long = " ".repeat(65 << 10);
    ask(contract, tcp, ("PUT", config, config, &long), 413);
    ask(contract, tcp, ("POST", targets, targets, &long), 413);
    let symbol = "/debug/pprof/symbol";
    let longer = " ".repeat((16 << 20) + 1);
    ask(contract, tcp, ("POST", symbol, symbol, &longer), 413);
    let slow = [("PUT", config), ("POST", targets), ("POST", symbol)];
    let streams = slow.map(|(method, path)| unfinished(tcp, method, path));
    for ((method, path), stream) in slow.into_iter().zip(streams) {
        let response = finished(stream);
        assert_eq!(response.status, 408, "{method} {path}");
        contract.check(path, method, &response);
    }
}

/// Several want to let a process go: one does, and the others hear that it is being done.
fn letting_go(contract: &mut Contract, tcp: &Tcp, pid: u32) {
    let path = format!("/v1/targets/{pid}");
    let body = format!("{{\"pid\": {pid}}}");
    eventually(|| {
        let answers: Vec<Response> = thread::scope(|scope| {
            let asking: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| tcp.request("DELETE", &path, "")))
                .collect();
            let answers = asking.into_iter().map(|asking| asking.join());
            answers.map(|answer| answer.expect("an answer")).collect()
        });
        let count = |status| answers.iter().filter(|a| a.status == status).count();
        assert_eq!(count(200), 1);
        for answer in &answers {
            contract.check("/v1/targets/{pid}", "DELETE", answer);
        }
        if count(409) > 0 {
            return Some(());
        }
        assert_eq!(tcp.request("POST", "/v1/targets", &body).status, 201);
        None
    });
}

/// While as many requests are served as can be, every other one is refused, and afterwards it
/// is not.
fn overload(contract: &mut Contract, tcp: &Tcp, operations: &BTreeSet<(String, String)>, pid: u32) {
    let waiting: Vec<TcpStream> = (0..64)
        .map(|_| unfinished(tcp, "PUT", "/v1/config"))
        .collect();
    eventually(|| (tcp.get("/healthz").status == 503).then_some(()));
    for (path, method) in operations {
        let asked = concrete(path, pid);
        ask(contract, tcp, (method, path, &asked, ""), 503);
    }
    drop(waiting);
    eventually(|| (tcp.get("/healthz").status == 200).then_some(()));
    // Profiles have a bound of their own.
    let windows: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = tcp.connect();
            let head = format!(
                "GET /v1/profile?seconds=5 HTTP/1.1\r\nHost: localhost\r\n\
                 Authorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).expect("sending");
            stream
        })
        .collect();
    // Not before they have come in.
    thread::sleep(std::time::Duration::from_millis(500));
    eventually(|| {
        let one_more = tcp.get("/debug/pprof/heap?seconds=1");
        (one_more.status == 503).then_some(())
    });
    assert_eq!(tcp.get("/v1/profile").status, 200);
    for stream in windows {
        assert_eq!(finished(stream).status, 200);
    }
}
