//! Leaks of known sizes from a known Rust function.

use std::{
    hint::black_box,
    io::{Read, Write},
};

mod leaky {
    use std::hint::black_box;

    #[inline(never)]
    pub fn hold(size: usize) {
        let block: Vec<u8> = Vec::with_capacity(black_box(size));
        std::mem::forget(black_box(block));
    }

    #[inline(never)]
    pub fn drop_again(size: usize) {
        let block: Vec<u8> = Vec::with_capacity(black_box(size));
        drop(black_box(block));
    }
}

/// Up to and with the next newline, byte by byte.
fn wait_line() {
    let _ = std::io::stdin().lock().by_ref().bytes().find(|byte| !matches!(byte, Ok(byte) if *byte != b'\n'));
}

fn say(text: &str) {
    let mut output = std::io::stdout();
    output.write_all(text.as_bytes()).expect("stdout");
    output.flush().expect("stdout");
}

fn main() {
    say("ready\n");
    wait_line();
    for _ in 0..50 {
        leaky::hold(black_box(777));
    }
    for _ in 0..60 {
        leaky::drop_again(black_box(888));
    }
    say("done\n");
    wait_line();
}
