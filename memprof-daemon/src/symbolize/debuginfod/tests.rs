use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::process::{debug_info::hex, elf::ElfLayout};

const PATIENCE: Duration = Duration::from_secs(30);

/// A server with one answer for everything: what is written to each connection.
struct Server {
    url: String,
    asked: Arc<AtomicU64>,
}

impl Server {
    fn new(answer: impl Fn(&str, &mut TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicU64::new(0));
        thread::spawn({
            let asked = Arc::clone(&asked);
            move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let reader = BufReader::new(stream.try_clone().unwrap());
                    let mut lines = reader.lines().map_while(Result::ok);
                    let request = lines.next().unwrap_or_default();
                    for _ in lines.by_ref().take_while(|line| !line.is_empty()) {}
                    asked.fetch_add(1, Ordering::Relaxed);
                    answer(request.split(' ').nth(1).unwrap_or_default(), &mut stream);
                }
            }
        });
        Self { url, asked }
    }

    fn absent() -> Self {
        Self::new(|_, stream| {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        })
    }

    fn with(body: Vec<u8>) -> Self {
        Self::new(move |_, stream| send(stream, &body))
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

fn send(stream: &mut TcpStream, body: &[u8]) {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    // The client may hang up.
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

fn own() -> (Vec<u8>, Vec<u8>) {
    let file = File::open("/proc/self/exe").unwrap();
    let build_id = ElfLayout::read(&file).unwrap().build_id(&file).unwrap();
    (build_id, fs::read("/proc/self/exe").unwrap())
}

fn settings(dir: &tempfile::TempDir, servers: &[&Server]) -> Settings {
    Settings {
        urls: servers.iter().map(|server| server.url.clone()).collect(),
        cache: dir.path().join("cache"),
        max_bytes: 2 << 30,
        answer_within: Duration::from_millis(500),
        complete_within: Duration::from_secs(20),
    }
}

/// Asks, and waits for what becomes of it.
fn settle(debuginfod: &Debuginfod, build_id: &[u8]) -> Option<Arc<File>> {
    let before = Instant::now();
    let found = debuginfod.find(build_id);
    assert!(before.elapsed() < Duration::from_millis(400), "it waited");
    while debuginfod.counts().pending > 0 {
        assert!(before.elapsed() < PATIENCE, "still pending");
        thread::sleep(Duration::from_millis(5));
    }
    found.or_else(|| debuginfod.find(build_id))
}

fn counts(pending: u64, downloaded: u64, absent: u64, failed: u64) -> Counts {
    Counts {
        pending,
        downloaded,
        absent,
        failed,
        queue_full: 0,
    }
}

/// Check that a file comes from the first server that has it, by the path of the
/// protocol; and that another run finds it on disk, without a server.
#[test]
fn downloads_once() {
    let (build_id, bytes) = own();
    let expected = format!("/buildid/{}/debuginfo", hex(&build_id));
    let none = Server::absent();
    let has = Server::new(move |path, stream| {
        assert_eq!(path, expected);
        send(stream, &bytes);
    });
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&dir, &[&none, &has]);
    let debuginfod = Debuginfod::start(&settings).unwrap();
    assert!(settle(&debuginfod, &build_id).is_some());
    assert_eq!(debuginfod.counts(), counts(0, 1, 0, 0));
    let again = Debuginfod::start(&settings).unwrap();
    assert!(again.find(&build_id).is_some());
    assert_eq!((none.asked(), has.asked()), (1, 1));
}

/// Check that what no server has is not asked for again, by this run and by another.
#[test]
fn absence_is_remembered() {
    let none = Server::absent();
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&dir, &[&none]);
    for _ in 0..2 {
        let debuginfod = Debuginfod::start(&settings).unwrap();
        for _ in 0..2 {
            assert!(settle(&debuginfod, &[1, 2, 3]).is_none());
        }
    }
    assert_eq!(none.asked(), 1);
}

/// Check that a file for another build id, one that is too large by its header, one that
/// is too large without telling, one that is cut short, and an error of the server are no
/// file, are no absence, and leave nothing in the cache.
#[test]
fn refuses_what_is_wrong() {
    let (build_id, bytes) = own();
    let whole = bytes.clone();
    let unannounced = Server::new(move |_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        let _ = stream.write_all(&whole);
    });
    let whole = bytes.clone();
    let cut = Server::new(move |_, stream| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", whole.len());
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(&whole[..whole.len() / 2]);
    });
    let broken = Server::new(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n");
    });
    let small = bytes.len() as u64 - 1;
    for (server, build_id, max_bytes) in [
        (&Server::with(bytes.clone()), &vec![1, 2, 3], 2 << 30),
        (&Server::with(b"no ELF file".to_vec()), &build_id, 2 << 30),
        (&Server::with(bytes), &build_id, small),
        (&unannounced, &build_id, small),
        (&cut, &build_id, 2 << 30),
        (&broken, &build_id, 2 << 30),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(&dir, &[server]);
        settings.max_bytes = max_bytes;
        let debuginfod = Debuginfod::start(&settings).unwrap();
        assert!(settle(&debuginfod, build_id).is_none());
        assert_eq!(debuginfod.counts(), counts(0, 0, 0, 1));
        assert_eq!(server.asked(), 1);
        let place = settings.cache.join(hex(build_id));
        assert_eq!(fs::read_dir(place).unwrap().count(), 0);
    }
}

/// Check that a server which says nothing costs nobody but the thread its time, and is
/// left alone then, while the next one is asked.
#[test]
fn a_silent_server_rests() {
    let (build_id, bytes) = own();
    let silent = Server::new(|_, stream| {
        std::mem::forget(stream.try_clone());
    });
    let has = Server::with(bytes);
    let dir = tempfile::tempdir().unwrap();
    let debuginfod = Debuginfod::start(&settings(&dir, &[&silent, &has])).unwrap();
    assert!(settle(&debuginfod, &build_id).is_some());
    // What the other server has is not what is asked for.
    assert!(settle(&debuginfod, &[1, 2, 3]).is_none());
    assert_eq!(debuginfod.counts(), counts(0, 1, 0, 1));
    assert_eq!((silent.asked(), has.asked()), (1, 2));
}

/// Check that what finds no room in the queue is counted, and not taken for pending.
#[test]
fn a_full_queue() {
    let silent = Server::new(|_, stream| {
        std::mem::forget(stream.try_clone());
    });
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&dir, &[&silent]);
    settings.answer_within = PATIENCE;
    let debuginfod = Debuginfod::start(&settings).unwrap();
    let asked = QUEUE as u64 + 10;
    for number in 0..asked {
        assert!(debuginfod.find(&number.to_le_bytes()).is_none());
    }
    let counts = debuginfod.counts();
    assert_eq!(counts.pending + counts.queue_full, asked);
    // One is with the thread.
    assert!((9..=10).contains(&counts.queue_full), "{counts:?}");
}
