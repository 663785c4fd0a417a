//! Ways to find a shard: what each adds to a call that is not sampled.

use std::{
    arch::asm,
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

use memprof_common::prefilter::SHARD_HASH;

const CALLS: u64 = 4_000_000;
const ROUNDS: usize = 21;

/// Shards as large as real ones, 16 lines each, with three counters and an owner.
#[repr(C, align(1024))]
struct Shard {
    countdown: AtomicU64,
    bytes: AtomicU64,
    calls: AtomicU64,
    _unused: [u64; 117],
    owner: AtomicU64,
    _rest: [u64; 7],
}

const SHARDS: usize = 64;

fn shards() -> Vec<Shard> {
    (0..SHARDS)
        .map(|_| Shard {
            countdown: AtomicU64::new(u64::MAX >> 1),
            bytes: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            _unused: [0; 117],
            owner: AtomicU64::new(0),
            _rest: [0; 7],
        })
        .collect()
}

/// A loop that finds a shard in %rax by `$find`, and counts a call with `$lock` in front of
/// each change.
macro_rules! way {
    ($name:ident, $lock:literal, $($find:literal),+ $(, $operand:ident = $value:expr)*) => {
        fn $name(shards: &[Shard]) {
            // SAFETY: changes the counters of shards within the slice (an index is masked or
            // that of a processor, of which there are fewer), which are atomic, and registers
            // that are told.
            unsafe {
                asm!(
                    "2:",
                    $($find,)+
                    "shl $10, %rax",
                    "add {shards}, %rax",
                    concat!($lock, " subq $24, (%rax)"),
                    concat!($lock, " addq $24, 8(%rax)"),
                    concat!($lock, " incq 16(%rax)"),
                    "dec {calls}",
                    "jnz 2b",
                    shards = in(reg) shards.as_ptr(),
                    calls = inout(reg) CALLS => _,
                    $($operand = in(reg) $value,)*
                    out("rax") _,
                    out("rdx") _,
                    options(att_syntax, nostack),
                );
            }
        }
    };
}

/// A thread's own shard, as the stubs do it: a hash of the thread pointer, and a look
/// whether it is the owner.
fn by_thread(shards: &[Shard]) {
    // SAFETY: as in `way`; the index is masked.
    unsafe {
        asm!(
            "2:",
            "mov %fs:0, %rdx",
            "imul ${hash}, %rdx, %rax",
            "shr $42, %rax",
            "and ${mask}, %eax",
            "shl $10, %rax",
            "add {shards}, %rax",
            "cmp 960(%rax), %rdx",
            "jne 3f",
            "subq $24, (%rax)",
            "addq $24, 8(%rax)",
            "incq 16(%rax)",
            "3:",
            "dec {calls}",
            "jnz 2b",
            shards = in(reg) shards.as_ptr(),
            calls = inout(reg) CALLS => _,
            hash = const SHARD_HASH,
            mask = const SHARDS - 1,
            out("rax") _,
            out("rdx") _,
            options(att_syntax, nostack),
        );
    }
}

way!(
    by_stack,
    "lock",
    "mov %rsp, %rax",
    "shr $13, %rax",
    "and $63, %eax"
);
way!(by_rdpid, "lock", "rdpid %rax", "and $63, %eax");
way!(by_rdpid_unsafely, "", "rdpid %rax", "and $63, %eax");
way!(
    by_rseq,
    "lock",
    "mov %fs:4({rseq}), %eax",
    "and $63, %eax",
    rseq = rseq_offset()
);
// A sequence that the kernel restarts begins with the address of its description.
way!(
    by_rseq_restarted,
    "",
    "lea 2b(%rip), %rdx",
    "mov %rdx, %fs:8({scratch})",
    "mov %fs:4({rseq}), %eax",
    "and $63, %eax",
    rseq = rseq_offset(),
    scratch = scratch_offset()
);

/// Where glibc has put the thread's `struct rseq`, from the thread pointer on.
fn rseq_offset() -> isize {
    // SAFETY: looks a name up; the symbol is a `const ptrdiff_t` (sys/rseq.h).
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr());
        assert!(!offset.is_null(), "a C library that registers rseq");
        *offset.cast::<isize>()
    }
}

std::thread_local! {
    /// Stands for the word of `struct rseq` that names a sequence: what is written there by
    /// the test describes none.
    static SCRATCH: [AtomicU64; 2] = const { [AtomicU64::new(0), AtomicU64::new(0)] };
}

fn scratch_offset() -> isize {
    SCRATCH.with(|scratch| {
        let thread = super::rig::thread_pointer() as isize;
        scratch.as_ptr().addr() as isize - thread
    })
}

/// Counts calls.
type Way = fn(&[Shard]);

fn nanoseconds(way: Way, shards: &[Shard]) -> f64 {
    let start = Instant::now();
    way(black_box(shards));
    start.elapsed().as_secs_f64() * 1e9 / CALLS as f64
}

/// Check that no call is lost by any way on one thread, and print what it costs to find a shard and to count a call there: by the thread, as the stubs
/// do, and by stack address or processor, where several threads change one shard, so that
/// each change must be atomic or restarted by the kernel. Rounds are interleaved, and the
/// median counts.
#[test]
#[ignore = "measures: cargo test --release -p memprof-daemon --lib ways -- --ignored --nocapture"]
fn what_ways_to_a_shard_cost() {
    assert!(
        std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains(" rdpid")),
        "a processor with rdpid"
    );
    let shards = shards();
    for shard in &shards {
        shard.owner.store(super::rig::thread_pointer(), Relaxed);
    }
    let ways: [(&str, Way); 6] = [
        ("by thread", by_thread),
        ("by stack address, atomic", by_stack),
        ("by rdpid, atomic", by_rdpid),
        ("by rdpid, not atomic: wrong", by_rdpid_unsafely),
        ("by rseq's processor, atomic", by_rseq),
        ("by rseq's processor, restarted", by_rseq_restarted),
    ];
    let mut rounds = [const { Vec::new() }; 6];
    for _ in 0..ROUNDS {
        for ((_, way), round) in ways.iter().zip(&mut rounds) {
            round.push(nanoseconds(*way, &shards));
        }
    }
    for ((name, _), round) in ways.iter().zip(&mut rounds) {
        round.sort_by(f64::total_cmp);
        println!("{name}: {:.2} ns a call", round[ROUNDS / 2]);
    }
    let calls: u64 = shards.iter().map(|shard| shard.calls.load(Relaxed)).sum();
    assert_eq!(calls, CALLS * (ROUNDS * ways.len()) as u64);
}
