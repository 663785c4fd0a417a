//! The program of the prefilter's sites, on this kernel: a child maps a file in memory with
//! a few made stubs, and calls them as it is told to.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    ops::Range,
    os::fd::AsRawFd as _,
    path::PathBuf,
    ptr,
};

use memprof_common::{
    config::{TargetConfig, Unwind},
    counters::DropReason,
    function::Function,
    live::{LiveKey, LiveValue},
    prefilter::{SITE_FRAME_OFFSET, SiteFrame, SiteKind},
    stack::StackKey,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, pipe},
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::{
    decode::decode,
    probe::{
        loader::{LoadOptions, Loaded, load},
        mode::ModeChoice,
        walker::Walker,
    },
    sample::{AllocSample, Sample},
};

const PAGE: usize = 4096;
/// Where the stubs are in the image, one that passes each site.
const ALLOC: usize = 0;
const RESTORE: usize = 0x100;
const FREE: usize = 0x200;
const TAKE: usize = 0x240;
/// Calls [`ALLOC`], with a frame pointer.
const CALLER: usize = 0x300;

/// A page with the stubs, and the sites among them.
fn image() -> (Vec<u8>, Vec<ImageSite>) {
    let mut bytes = vec![0xcc; PAGE];
    let mut sites = Vec::new();
    for (at, kind) in [(ALLOC, SiteKind::Alloc), (RESTORE, SiteKind::Restore)] {
        // sub $56, %rsp: with the return address, that is the frame.
        let mut code = vec![0x48, 0x83, 0xec, 56];
        for word in 0..7 {
            // mov 8 * word(%rdi), %rax; mov %rax, 8 * word(%rsp)
            code.extend([0x48, 0x8b, 0x47, 8 * word, 0x48, 0x89, 0x44, 0x24, 8 * word]);
        }
        let below = u8::try_from(SITE_FRAME_OFFSET).unwrap();
        // sub $below, %rsp; nop; add $below, %rsp; add $56, %rsp; ret
        code.extend([0x48, 0x83, 0xec, below]);
        let site = at + code.len();
        code.extend([0x90, 0x48, 0x83, 0xc4, below, 0x48, 0x83, 0xc4, 56, 0xc3]);
        bytes[at..at + code.len()].copy_from_slice(&code);
        sites.push((site, kind));
    }
    for (at, kind) in [(FREE, SiteKind::Free), (TAKE, SiteKind::Take)] {
        // nop; ret
        bytes[at..at + 2].copy_from_slice(&[0x90, 0xc3]);
        sites.push((at, kind));
    }
    // push %rbp; mov %rsp, %rbp; call ALLOC; pop %rbp; ret
    let mut caller = vec![0x55, 0x48, 0x89, 0xe5, 0xe8];
    let distance = ALLOC as i32 - (CALLER + caller.len() + 4) as i32;
    caller.extend(distance.to_le_bytes());
    caller.extend([0x5d, 0xc3]);
    bytes[CALLER..CALLER + caller.len()].copy_from_slice(&caller);
    let sites = sites
        .into_iter()
        .map(|(offset, kind)| ImageSite {
            file_offset: FileOffset(offset as u64),
            kind,
        })
        .collect();
    (bytes, sites)
}

/// Where [`CALLER`]'s call returns to.
const RETURN: usize = CALLER + 9;

/// A call that the child can be told to make: of which stub, with which argument.
type Call = (usize, u64);

/// The child and the pipes to it.
struct Child {
    pid: Pid,
    /// The image, mapped here and there.
    base: usize,
    file: File,
    orders: File,
    answers: File,
}

impl Child {
    fn start(bytes: &[u8], calls: &[Call]) -> Self {
        let file = memfd_create("memprof-prefilter", MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(file);
        file.write_all(bytes).unwrap();
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base as usize;
        let (told, orders) = pipe().unwrap();
        let (answers, answer) = pipe().unwrap();
        // SAFETY: the child makes system calls and calls the stubs, which do not allocate.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                let mut order = [0_u8];
                // SAFETY: system calls on descriptors and memory that are there, and calls of
                // the code that was mapped above.
                unsafe {
                    if libc::read(told.as_raw_fd(), order.as_mut_ptr().cast(), 1) != 1 {
                        libc::_exit(0);
                    }
                    let (stub, argument) = calls[usize::from(order[0])];
                    let stub: extern "C" fn(u64) = std::mem::transmute(base + stub);
                    stub(argument);
                    libc::write(answer.as_raw_fd(), order.as_ptr().cast(), 1);
                }
            },
            ForkResult::Parent { child } => Self {
                pid: child,
                base,
                file,
                orders: orders.into(),
                answers: answers.into(),
            },
        }
    }

    fn id(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// Has it make a call, and waits until it has returned.
    fn call(&mut self, number: u8) {
        self.orders.write_all(&[number]).unwrap();
        let mut answer = [0];
        self.answers.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [number]);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
        // SAFETY: mapped by `start`, and nobody calls it any more.
        unsafe { libc::munmap(ptr::without_provenance_mut(self.base), PAGE) };
    }
}

const A: u64 = 0x7000_0000_1000;
const B: u64 = 0x7000_0000_2000;
const C: u64 = 0x7000_0000_3000;

fn frame(address: u64, size_bytes: u64, interval_bytes: u64) -> SiteFrame {
    SiteFrame {
        size_bytes,
        interval_bytes,
        address,
        function: Function::Calloc as u32,
        ..SiteFrame::default()
    }
}

/// What a test looks at.
struct Traced {
    loaded: Loaded,
    config: TargetConfig,
}

impl Traced {
    fn samples(&mut self) -> Vec<Sample> {
        let mut samples = Vec::new();
        while let Some(record) = self.loaded.maps.events.next() {
            match decode(&record).unwrap() {
                // Nobody has told BPF of any.
                Sample::UnknownCode { .. } => {}
                sample => samples.push(sample),
            }
        }
        samples
    }

    /// The one sample that there is, which is of an allocation.
    #[track_caller]
    fn alloc(&mut self) -> AllocSample {
        match self.samples().as_slice() {
            [Sample::Alloc(sample)] => *sample,
            others => panic!("{others:?}"),
        }
    }

    /// The address in the one sample that there is, which is of a free.
    #[track_caller]
    fn free(&mut self) -> u64 {
        match self.samples().as_slice() {
            [Sample::Free(sample)] => sample.key.addr,
            others => panic!("{others:?}"),
        }
    }

    fn set_interval(&mut self, bytes: u64) {
        self.config.sample_interval_bytes = bytes;
        self.loaded.maps.targets.set(0, self.config, 0).unwrap();
    }

    fn live(&self) -> Vec<(LiveKey, LiveValue)> {
        self.loaded.maps.live.read_all().unwrap()
    }

    fn lost(&self, reason: DropReason) -> u64 {
        let counters = self.loaded.maps.counters.get(&0, 0).unwrap();
        counters
            .iter()
            .map(|cpu| cpu.dropped[reason as usize])
            .sum()
    }
}

/// Passes every site, and checks what comes of it.
fn pass_sites(mode: ProbeMode, walker: Walker, unwind: Unwind) {
    let options = LoadOptions {
        mode: ModeChoice::Only(mode),
        walker: Some(walker),
        ..LoadOptions::default()
    };
    let frames = [
        frame(A, 100, 4096),
        frame(B, 200, 0),
        frame(C, 300, u64::MAX),
        SiteFrame {
            old_pointer: A,
            ..frame(0, 1 << 60, 0)
        },
        SiteFrame {
            function: 0x101,
            ..frame(C, 1, 1)
        },
        frame(0, 1, 1),
    ];
    let at = |index: usize| &raw const frames[index] as u64;
    let calls = [
        (CALLER, at(0)),
        (CALLER, at(1)),
        (CALLER, at(2)),
        (RESTORE, at(3)),
        (ALLOC, at(4)),
        (ALLOC, at(5)),
        (TAKE, A),
        (TAKE, B + 8),
        (FREE, B),
    ];
    let [a, b, c, restore, unknown, null, take, take_other, free] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
    let (bytes, sites) = image();
    let mut child = Child::start(&bytes, &calls);
    let mut traced = Traced {
        loaded: load(&options).expect("run as root"),
        config: TargetConfig {
            pid: child.id(),
            stack_depth: 32,
            unwind: unwind as u32,
            ..TargetConfig::default()
        },
    };
    traced.set_interval(1);
    let path = PathBuf::from(format!("/proc/self/fd/{}", child.file.as_raw_fd()));
    traced
        .loaded
        .prober
        .attach_image(0, child.id(), &path, &sites)
        .unwrap();

    child.call(a);
    let first = traced.alloc();
    assert_eq!((first.key.addr, first.size_bytes), (A, 100));
    assert_eq!(first.sample_interval_bytes, 4096);
    assert_eq!((first.function, first.restored), (Function::Calloc, false));
    let record = traced.loaded.maps.stacks.get(&first.stack.key, 0).unwrap();
    assert_ne!(first.stack.key, StackKey::UNKNOWN);
    assert_eq!(record.frames[0], (child.base + RETURN) as u64);
    if unwind == Unwind::FramePointers {
        let ours: Range<u64> = own_code();
        assert!(record.depth >= 2, "{}", record.depth);
        assert!(ours.contains(&record.frames[1]), "{:x}", record.frames[1]);
    }

    // Undecided: by the interval in force, which takes all, and then none.
    child.call(b);
    let undecided = traced.alloc();
    assert_eq!(
        (undecided.key.addr, undecided.sample_interval_bytes),
        (B, 1)
    );
    traced.set_interval(0);
    child.call(b);
    assert_eq!(traced.samples(), []);
    // Decided, by a gap with an interval that there is not.
    child.call(c);
    assert_eq!(traced.alloc().sample_interval_bytes, u64::from(u32::MAX));
    assert_eq!(traced.live().len(), 3);

    // A realloc that fails gives its block back, with what was known of it.
    child.call(take);
    assert_eq!(traced.free(), A);
    assert_eq!(traced.live().len(), 2);
    child.call(restore);
    let restored = traced.alloc();
    assert!(restored.restored);
    assert_eq!(
        (restored.key, restored.stack, restored.timestamp_ns),
        (first.key, first.stack, first.timestamp_ns)
    );
    // What one that succeeded had taken is not given back by a later one.
    child.call(take);
    assert_eq!(traced.free(), A);
    child.call(take_other);
    child.call(restore);
    assert_eq!(traced.samples(), []);

    child.call(free);
    assert_eq!(traced.free(), B);
    child.call(free);
    assert_eq!(traced.samples(), []);

    // Nonsense is counted.
    assert_eq!(traced.lost(DropReason::ResultUnreadable), 0);
    child.call(unknown);
    child.call(null);
    assert_eq!(traced.samples(), []);
    assert_eq!(traced.lost(DropReason::ResultUnreadable), 2);

    traced.loaded.prober.detach(0);
    child.call(a);
    assert_eq!(traced.samples(), []);
    let live: Vec<u64> = traced.live().iter().map(|(key, _)| key.addr).collect();
    assert_eq!(live, [C]);
}

/// Where this program's code is.
fn own_code() -> Range<u64> {
    let here = own_code as fn() -> Range<u64> as usize as u64;
    let maps = crate::process::maps::read_maps(std::process::id()).unwrap();
    let entry = maps
        .iter()
        .find(|entry| (entry.start.0..entry.end.0).contains(&here))
        .unwrap();
    entry.start.0..entry.end.0
}

/// Check that the sites of an image in a file in memory do what their kinds say, in each
/// way of attaching and of walking. Needs root, as everything that loads BPF.
#[test]
fn sites_pass_samples_on() {
    for (mode, walker) in [
        (ProbeMode::Session, Walker::Loop),
        (ProbeMode::Multi, Walker::Loop),
        (ProbeMode::Perf, Walker::Loop),
        (ProbeMode::Multi, Walker::TailCalls),
        (ProbeMode::Perf, Walker::TailCalls),
        (ProbeMode::Perf, Walker::FramePointers),
    ] {
        if mode.try_out().is_err() {
            println!("{mode} is not there");
            continue;
        }
        for unwind in [Unwind::Auto, Unwind::FramePointers] {
            println!("{mode}, {walker}, {}", unwind.name());
            pass_sites(mode, walker, unwind);
        }
    }
}
