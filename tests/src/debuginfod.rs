//! A debuginfod server of our own.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

/// What it does when it is asked for a file.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Sends it.
    File(Vec<u8>),
    /// Says nothing until the server is told something else.
    Hang,
}

#[derive(Debug, Default)]
struct State {
    answers: HashMap<String, Answer>,
    /// Connections that wait for an answer.
    hanging: Vec<(String, TcpStream)>,
    asked: Vec<String>,
}

/// The server, on loopback. What it was not told of it has not.
#[derive(Debug)]
pub struct Debuginfod {
    /// For `DEBUGINFOD_URLS`.
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Default for Debuginfod {
    fn default() -> Self {
        Self::start()
    }
}

impl Debuginfod {
    /// Starts it; it ends with the test.
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(Mutex::new(State::default()));
        thread::spawn({
            let state = Arc::clone(&state);
            move || {
                for stream in listener.incoming().flatten() {
                    serve(&mut lock(&state), stream);
                }
            }
        });
        Self {
            url: format!("http://{address}"),
            state,
        }
    }

    /// From now on this is the answer for a build id.
    pub fn answer(&self, build_id: &str, answer: Answer) {
        let mut state = lock(&self.state);
        let asked = path(build_id);
        state.answers.insert(asked.clone(), answer.clone());
        if matches!(answer, Answer::Hang) {
            return;
        }
        let hanging = std::mem::take(&mut state.hanging);
        for (path, mut stream) in hanging {
            if path == asked {
                send(&mut stream, Some(&answer));
            } else {
                state.hanging.push((path, stream));
            }
        }
    }

    /// How often it was asked for a build id.
    #[must_use]
    pub fn asked(&self, build_id: &str) -> usize {
        let wanted = path(build_id);
        let state = lock(&self.state);
        state.asked.iter().filter(|path| **path == wanted).count()
    }
}

fn path(build_id: &str) -> String {
    format!("/buildid/{build_id}/debuginfo")
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(state: &mut State, mut stream: TcpStream) {
    let Ok(reader) = stream.try_clone() else {
        return;
    };
    let mut lines = BufReader::new(reader).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    for _ in lines.take_while(|line| !line.is_empty()) {}
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    state.asked.push(path.clone());
    match state.answers.get(&path) {
        Some(Answer::Hang) => state.hanging.push((path, stream)),
        answer => send(&mut stream, answer),
    }
}

/// Who asked may have gone.
fn send(stream: &mut TcpStream, answer: Option<&Answer>) {
    let (status, body) = match answer {
        Some(Answer::File(body)) => ("200 OK", body.as_slice()),
        _ => ("404 Not Found", &b""[..]),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}
