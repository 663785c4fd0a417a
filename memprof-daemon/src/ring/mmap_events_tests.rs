use std::{
    fs::File,
    mem,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
};

use super::*;
use crate::address::FileOffset;

/// These tests tell their mappings by address, and addresses are shared with
/// every thread: so one at a time.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// A page of a file, mapped so that code could run in it.
struct Executable(*mut libc::c_void);

impl Executable {
    fn map(file: &File, offset: i64) -> Self {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                offset,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self(start)
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: the page mapped above, to which nothing refers.
        unsafe { libc::munmap(self.0, 4096) };
    }
}

fn own_events(events: &mut MmapEvents) -> Vec<MmapEvent> {
    let mut own = Vec::new();
    events.drain(|event| {
        if let HostEvent::Mmap(event) = event
            && event.pid == std::process::id()
        {
            own.push(event);
        }
    });
    own
}

/// Check that an executable mapping made by this process is in the buffer as
/// soon as mmap has returned, with all its particulars, and is handed over
/// once.
#[test]
fn own_mapping_is_seen_at_once() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let mut events = MmapEvents::open(Scope::Mappings).unwrap();
    let file = File::open("/bin/true").unwrap();
    let before = monotonic_ns();
    let page = Executable::map(&file, 4096);
    let after = monotonic_ns();
    let metadata = file.metadata().unwrap();
    let here = |event: &&MmapEvent| event.start.0 == page.0 as u64;
    let seen = own_events(&mut events);
    let event = seen.iter().find(here).unwrap();
    assert_eq!(event.len, 4096);
    assert_eq!(event.file_offset, FileOffset(4096));
    assert_eq!(event.inode, metadata.ino());
    assert_eq!(
        libc::makedev(event.device_major, event.device_minor),
        metadata.dev()
    );
    let path = fs::canonicalize("/bin/true").unwrap();
    assert_eq!(event.path, path);
    assert!((before..=after).contains(&event.timestamp_ns));
    assert!(!own_events(&mut events).iter().any(|event| here(&event)));
    assert_eq!((events.lost(), events.malformed()), (0, 0));
}

fn monotonic_ns() -> u64 {
    // SAFETY: all zeros is a timespec.
    let mut now: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: `now` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Check that memory made executable later is seen, and that memory which
/// never is, is not.
#[test]
fn only_executable_mappings() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let mut events = MmapEvents::open(Scope::Mappings).unwrap();
    // SAFETY: a new mapping, whose protection is then changed.
    let start = unsafe {
        let start = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        start
    };
    let page = Executable(start);
    let here = |event: &MmapEvent| event.start.0 == page.0 as u64;
    assert!(!own_events(&mut events).iter().any(here));
    // SAFETY: the page is this test's own.
    let changed = unsafe { libc::mprotect(start, 4096, libc::PROT_READ | libc::PROT_EXEC) };
    assert_eq!(changed, 0);
    let seen = own_events(&mut events);
    let event = seen.iter().find(|event| here(event)).unwrap();
    assert_eq!((event.inode, event.path.as_path()), (0, "//anon".as_ref()));
}

/// Check that reading keeps in step when the buffer wraps around (each of
/// 20,000 mappings is seen, in order), and that mappings which find no room
/// are counted, each of them.
#[test]
fn wraps_and_counts_losses() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let mut events = MmapEvents::open(Scope::Mappings).unwrap();
    let file = File::open("/bin/true").unwrap();
    let inode = file.metadata().unwrap().ino();
    let mut seen = 0_u64;
    let mut last = 0;
    let mut count = |events: &mut MmapEvents| {
        events.drain(|event| {
            let HostEvent::Mmap(event) = event else {
                return;
            };
            assert!(event.timestamp_ns >= last, "out of order");
            last = event.timestamp_ns;
            let own = event.pid == std::process::id() && event.inode == inode;
            seen += u64::from(own && event.file_offset == FileOffset(8192));
        });
    };
    for _ in 0..200 {
        for _ in 0..100 {
            drop(Executable::map(&file, 8192));
        }
        count(&mut events);
    }
    assert_eq!((events.lost(), events.malformed()), (0, 0));

    let maps = 20_000;
    for _ in 0..maps {
        drop(Executable::map(&file, 8192));
    }
    count(&mut events);
    // The kernel writes how many were lost with the next record on that CPU.
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    for cpu in parse_cpu_list(&online) {
        // SAFETY: all zeros is an empty set; the set is of the size given.
        let moved = unsafe {
            let mut set: libc::cpu_set_t = mem::zeroed();
            libc::CPU_SET(cpu as usize, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
        };
        assert_eq!(moved, 0);
        drop(Executable::map(&file, 8192));
    }
    count(&mut events);
    assert!(events.lost() > 0);
    assert_eq!(events.malformed(), 0);
    assert!(seen + events.lost() >= 20_000 + maps, "{seen} seen");
}

/// Check the forms in which the kernel lists CPUs.
#[test]
fn cpu_lists() {
    let list = |text| parse_cpu_list(text).collect::<Vec<_>>();
    assert_eq!(list("0\n"), [0]);
    assert_eq!(list("0-2,4,6-7\n"), [0, 1, 2, 4, 6, 7]);
    assert!(list("").is_empty());
    assert!(list("x-y").is_empty());
}

/// Check that each new mapping wakes who waits, that none is missed which is made while the
/// records are read, and that nothing wakes without one.
#[tokio::test]
async fn alarm_at_each_mapping() {
    let map = || {
        // SAFETY: a new mapping, unmapped again.
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            libc::munmap(start, 4096);
        }
    };
    let mut events = MmapEvents::open(Scope::Mappings).unwrap();
    let alarm = events.alarm().unwrap();
    let limit = std::time::Duration::from_secs(5);
    for _ in 0..100 {
        map();
        tokio::time::timeout(limit, alarm.recorded())
            .await
            .expect("an alarm")
            .unwrap();
        // Between the alarm and the reading.
        map();
        events.drain(|_| {});
    }
}

/// Check that a process that is made, replaces its program and ends is told of in this order,
/// with its mappings after its program, and that its threads are not.
#[test]
fn lives_of_processes() {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let mut events = MmapEvents::open(Scope::Lives).unwrap();
    std::thread::spawn(|| ()).join().unwrap();
    let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let own = std::process::id();
    let mut told = Vec::new();
    let mut is_thread_told = false;
    events.drain(|event| match event {
        HostEvent::Fork {
            pid: new, parent, ..
        } if new == pid => {
            assert_eq!(parent, own);
            told.push("fork");
        }
        HostEvent::Exec { pid: of, comm, .. } if of == pid => {
            assert_eq!(comm, "true");
            told.push("exec");
        }
        HostEvent::Mmap(event) if event.pid == pid && told.last() == Some(&"exec") => {
            assert!(event.path.ends_with("true"), "{event:?}");
            told.push("map");
        }
        HostEvent::Exit { pid: of, .. } if of == pid => told.push("exit"),
        HostEvent::Fork { pid: new, .. } => is_thread_told |= new == own,
        _ => {}
    });
    assert_eq!(told, ["fork", "exec", "map", "exit"]);
    assert!(!is_thread_told);
}
