//! A Rust program whose allocator is jemalloc, as tikv-jemallocator brings it: its functions
//! have the prefix `_rjem_`. Reads and writes without a buffer, which would be allocated.

use std::{
    alloc::{GlobalAlloc, Layout},
    ffi::c_void,
    fs::File,
    hint::black_box,
    io::{Read, Write},
    mem::ManuallyDrop,
    os::fd::FromRawFd,
};

use tikv_jemalloc_sys as ffi;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn say(text: &str) {
    // SAFETY: standard output, which is not closed at the end.
    let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    file.write_all(text.as_bytes()).expect("standard output");
}

fn wait_line() {
    // SAFETY: standard input, which is not closed at the end.
    let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(0) });
    let mut byte = [0];
    while file.read(&mut byte).is_ok_and(|read| read == 1) && byte != *b"\n" {}
}

#[inline(never)]
fn from_box() -> Box<[u64; 25]> {
    black_box(Box::new([black_box(1); 25]))
}

#[inline(never)]
fn from_zeroed() -> Vec<u8> {
    black_box(vec![0; black_box(300)])
}

#[inline(never)]
fn from_grown(bytes: &mut Vec<u8>) {
    bytes.reserve_exact(black_box(1000));
    black_box(bytes);
}

/// An alignment that needs flags: `_rjem_mallocx`.
#[inline(never)]
fn from_aligned() -> *mut u8 {
    let layout = Layout::from_size_align(black_box(640), 64).expect("a layout");
    // SAFETY: the layout is not empty.
    black_box(unsafe { ALLOCATOR.alloc(layout) })
}

#[inline(never)]
fn from_mallocx() -> *mut c_void {
    // SAFETY: an alignment of 2^6.
    black_box(unsafe { ffi::mallocx(black_box(500), 6) })
}

#[inline(never)]
fn from_rallocx(block: *mut c_void) -> *mut c_void {
    // SAFETY: a block of from_mallocx.
    black_box(unsafe { ffi::rallocx(block, black_box(5000), 6) })
}

#[inline(never)]
fn from_xallocx(block: *mut c_void) {
    // SAFETY: a block of from_rallocx, of whose size class this is.
    let size = unsafe { ffi::xallocx(block, black_box(4999), 0, 6) };
    assert!(size >= 4999);
}

fn main() {
    say("ready\n");
    wait_line();
    let layout = Layout::from_size_align(640, 64).expect("a layout");
    for n in 0..10 {
        let boxed = from_box();
        let mut bytes = from_zeroed();
        from_grown(&mut bytes);
        let aligned = from_aligned();
        let block = from_rallocx(from_mallocx());
        from_xallocx(block);
        let other = from_mallocx();
        if n < 3 {
            std::mem::forget((boxed, bytes));
            continue;
        }
        // SAFETY: each is freed as it was allocated, once.
        unsafe {
            ALLOCATOR.dealloc(aligned, layout);
            ffi::sdallocx(block, 4999, 6);
            ffi::dallocx(other, 6);
        }
    }
    say("done\n");
    wait_line();
}
