//! The sampled set: which frees hit a site.

use memprof_common::{
    function::Function,
    prefilter::{BUCKET_SLOTS, FRAME_TAKEN, SHARD_PROBES, SiteKind, bucket_of, home_shard},
};

use super::{
    fakes,
    rig::{GEOMETRY, Rig, call, thread_pointer},
    sites::{hits, kinds},
};

/// Check that the free of a sampled block hits its site, once, and that of others does
/// not; by each kind of free.
#[test]
fn frees_of_sampled_blocks_are_told() {
    let rig = fakes::rig_with_gaps(&[1, 1, 1, 1, 1 << 40]);
    for function in [
        Function::Free,
        Function::Cfree,
        Function::FreeSized,
        Function::FreeAlignedSized,
    ] {
        let block = rig.malloc(10);
        assert_eq!(kinds(), [SiteKind::Alloc]);
        rig.free(block + 64);
        rig.free(block ^ 1 << 40);
        assert_eq!(hits(), []);
        assert_eq!(rig.occupancy(block), 1);
        call(rig.function(function), [block, 10, 16]);
        let hits_now = hits();
        assert_eq!(hits_now.len(), 1, "{function:?}");
        assert_eq!((hits_now[0].kind, hits_now[0].rdi), (SiteKind::Free, block));
        assert_eq!(rig.occupancy(block), 0);
        call(rig.function(function), [block, 10, 16]);
        assert_eq!(hits(), [], "a double free");
    }
    assert!(rig.set().is_empty());
    assert_eq!(rig.totals().2, 16);
}

/// Addresses of one bucket.
fn same_bucket() -> impl Iterator<Item = u64> {
    (1..)
        .map(|n| 0x7000_0000_0000 + n * 16)
        .filter(|&address| bucket_of(address, GEOMETRY.bucket_bits) == 77)
}

thread_local! {
    static ADDRESS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

extern "C" fn given_address() -> u64 {
    ADDRESS.get()
}

/// A rig whose calls are all for BPF to decide, and whose malloc returns what is asked.
fn rig_of_given() -> Rig {
    let mut functions = fakes::all();
    for (function, rust) in &mut functions {
        if !function.is_free() && *function != Function::PosixMemalign {
            *rust = (given_address as *const ()).expose_provenance();
        }
    }
    let rig = Rig::new(&functions);
    rig.set_credit(1 << 40);
    rig
}

fn insert(rig: &Rig, address: u64) {
    ADDRESS.set(address);
    rig.malloc(10);
    assert_eq!(kinds(), [SiteKind::Alloc]);
}

/// Check that an address that is in already (its free was missed) is in once.
#[test]
fn an_address_is_in_once() {
    let rig = rig_of_given();
    insert(&rig, 0x1230);
    insert(&rig, 0x1230);
    assert_eq!(rig.set(), [0x1230]);
    assert_eq!(rig.occupied(), 1);
    rig.free(0x1230);
    rig.free(0x1230);
    assert_eq!(kinds(), [SiteKind::Free]);
}

/// Check that a bucket holds eight addresses, in any order of leaving; that with the ninth
/// every free of the bucket is told for good, since BPF alone knows; and that the buckets
/// around are as before.
#[test]
fn a_full_bucket_tells_every_free() {
    let rig = rig_of_given();
    let addresses: Vec<_> = same_bucket().take(12).collect();
    let (held, others) = addresses.split_at(BUCKET_SLOTS);
    for &address in held {
        insert(&rig, address);
    }
    assert_eq!(rig.occupied(), BUCKET_SLOTS);
    rig.free(others[0]);
    assert_eq!(hits(), [], "not in, and the bucket has not overflowed");
    for &address in [held[3], held[0], held[7]].iter() {
        rig.free(address);
        assert_eq!(kinds(), [SiteKind::Free]);
        insert(&rig, address);
    }

    insert(&rig, others[0]);
    assert_eq!(rig.occupancy(others[0]), 0x80 | BUCKET_SLOTS as u8);
    for &address in held.iter().chain(others) {
        rig.free(address);
        assert_eq!(kinds(), [SiteKind::Free], "{address:x}");
    }
    assert!(rig.set().is_empty());
    assert_eq!(rig.occupancy(others[0]), 0x80);
    rig.free(others[0]);
    assert_eq!(kinds(), [SiteKind::Free]);
    let elsewhere = 0x1230;
    assert_ne!(bucket_of(elsewhere, GEOMETRY.bucket_bits), 77);
    rig.free(elsewhere);
    assert_eq!(hits(), []);
}

/// Check that realloc takes its sampled block out before the real function runs, that a
/// failure puts it back, and that a success does not.
#[test]
fn realloc_takes_and_restores() {
    let rig = fakes::rig_with_gaps(&[1, 1 << 40]);
    let block = rig.malloc(10);
    hits();

    fakes::fail(true);
    assert_eq!(rig.realloc(block, 20), 0);
    let [take, restore] = hits()[..] else {
        panic!("two hits");
    };
    assert_eq!((take.kind, take.rdi), (SiteKind::Take, block));
    assert_eq!(restore.kind, SiteKind::Restore);
    assert_eq!(restore.frame.old_pointer, block);
    assert_eq!(restore.frame.flags & FRAME_TAKEN, FRAME_TAKEN);
    assert_eq!(restore.frame.address, 0);
    assert_eq!(rig.set(), [block]);
    assert_eq!(rig.occupied(), 1);

    fakes::fail(false);
    assert_ne!(rig.realloc(block, 20), 0);
    assert_eq!(kinds(), [SiteKind::Take]);
    assert!(rig.set().is_empty());
    assert_eq!(rig.occupied(), 0);
    assert_eq!(rig.realloc(block, 0), 0, "to nothing: freed");
    assert_eq!(hits(), []);
    // malloc, three reallocs; the failed one has freed nothing.
    assert_eq!(rig.totals(), (4, 50, 2));
}

/// Check that realloc(p, 0) takes the block out and does not put it back.
#[test]
fn realloc_to_nothing_frees() {
    let rig = fakes::rig_with_gaps(&[1, 1 << 40]);
    let block = rig.malloc(10);
    assert_eq!(rig.realloc(block, 0), 0);
    assert_eq!(kinds(), [SiteKind::Alloc, SiteKind::Take]);
    assert!(rig.set().is_empty());
    assert_eq!(rig.call_frame(), None);
}

/// Check that a sampled realloc of a sampled block takes the one out and puts the other in,
/// also if it is at the same address.
#[test]
fn realloc_of_a_sample_to_a_sample() {
    let rig = rig_of_given();
    insert(&rig, 0x1230);
    ADDRESS.set(0x4560);
    assert_eq!(rig.realloc(0x1230, 20), 0x4560);
    assert_eq!(kinds(), [SiteKind::Take, SiteKind::Alloc]);
    assert_eq!(rig.set(), [0x4560]);
    rig.realloc(0x4560, 30);
    assert_eq!(kinds(), [SiteKind::Take, SiteKind::Alloc]);
    assert_eq!(rig.set(), [0x4560]);
}

/// Check that a free inside another call takes its block out, though it is not counted,
/// and that realloc's old block is told once, by realloc.
#[test]
fn a_nested_free_is_settled() {
    let rig = fakes::rig_with_gaps(&[1, 1, 1, 1 << 40]);
    fakes::nest(&rig);
    let block = rig.malloc(10);
    assert_eq!(kinds(), [SiteKind::Alloc]);
    let block = rig.realloc(block, 20);
    assert_eq!(kinds(), [SiteKind::Take, SiteKind::Alloc]);
    assert_eq!(rig.set(), [block]);

    /// A function that frees another block inside.
    extern "C" fn frees(free: usize, block: u64) -> u64 {
        call(free, [block, 0, 0]);
        0
    }
    let outer = Rig::new(&[
        (Function::Calloc, (frees as *const ()).expose_provenance()),
        (
            Function::Malloc,
            (given_address as *const ()).expose_provenance(),
        ),
        (Function::Free, rig.function(Function::Free)),
    ]);
    outer.fill(&[(1, 512), (super::rig::NEVER, 512)]);
    ADDRESS.set(0x1230);
    outer.malloc(10);
    assert_eq!(kinds(), [SiteKind::Alloc]);
    call(
        outer.function(Function::Calloc),
        [outer.function(Function::Free) as u64, 0x1230, 0],
    );
    assert_eq!(kinds(), [SiteKind::Free]);
    assert!(outer.set().is_empty());
    assert_eq!(outer.totals().2, 0, "not counted");
}

/// Check that a thread without a shard takes sampled blocks out of the set, too, by free
/// and by realloc, and that a failing realloc puts its block back.
#[test]
fn settles_without_a_shard() {
    let rig = fakes::rig_with_gaps(&[1, 1, 1 << 40]);
    let (freed, moved) = (rig.malloc(10), rig.malloc(10));
    hits();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let home = home_shard(thread_pointer(), GEOMETRY.shards) as usize;
            for shard in home..home + SHARD_PROBES {
                rig.give_away(shard);
            }
            rig.free(freed);
            assert_eq!(kinds(), [SiteKind::Free]);
            fakes::fail(true);
            rig.realloc(moved, 20);
            assert_eq!(kinds(), [SiteKind::Take, SiteKind::Restore]);
            assert_eq!(rig.set(), [moved]);
            fakes::fail(false);
            rig.realloc(moved, 20);
            assert_eq!(kinds(), [SiteKind::Take]);
        });
    });
    assert!(rig.set().is_empty());
    assert_eq!(rig.unsharded(), 3);
    assert_eq!(rig.unmarked(), 0);
}
