//! A service with a leak, to see what memprof says of it.
//!
//! Requests come in, most of what they allocate is freed again, and the session
//! cache forgets to evict. The README's picture is of this program.

use std::{
    collections::HashMap,
    hint::black_box,
    time::{Duration, Instant},
};

/// Keeps every session for ever: this is the leak.
#[derive(Default)]
struct SessionCache {
    sessions: HashMap<u64, Vec<u8>>,
}

impl SessionCache {
    #[inline(never)]
    fn remember(&mut self, user: u64, token: &[u8]) {
        self.sessions.insert(user, token.repeat(64));
    }
}

/// What comes in; freed when it has been answered.
#[inline(never)]
fn read_request(user: u64) -> Vec<u8> {
    let mut body = Vec::with_capacity(16 << 10);
    body.extend_from_slice(&user.to_le_bytes());
    body
}

/// What goes out; freed when it has been sent.
#[inline(never)]
fn render_response(body: &[u8]) -> String {
    format!("{:>8192}", body.len())
}

#[inline(never)]
fn handle_request(cache: &mut SessionCache, user: u64) {
    let request = read_request(user);
    let response = render_response(&request);
    cache.remember(user, &request);
    black_box(response);
}

fn main() {
    let mut cache = SessionCache::default();
    let end = Instant::now() + Duration::from_secs(3);
    let mut user = 0;
    while Instant::now() < end && user < 40_000 {
        handle_request(&mut cache, user);
        user += 1;
        if user.is_multiple_of(100) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!("{} requests, {} sessions", user, cache.sessions.len());
    // As services end: nobody frees anything.
    std::process::exit(0);
}
