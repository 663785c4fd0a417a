//! An image in this process: fake allocator functions, patched to enter it, and its data.

use std::{
    ptr,
    sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst},
};

use memprof_common::{
    function::Function,
    prefilter::{
        ASLEEP, BUCKET_BYTES, HEADER_CREDIT, HEADER_GENERATION, HEADER_RING_HEAD, HEADER_RING_TAIL,
        HEADER_STARVED, HEADER_UNMARKED, HEADER_UNSHARDED, OWNER_GONE, PRIVATE_CALL, PRIVATE_OWNER,
        RING_ENTRIES, RING_ENTRY_BYTES, SHARD_BYTES, SHARD_BYTES_ASKED, SHARD_CALL_CLASSES,
        SHARD_CALLS, SHARD_COUNTDOWN, SHARD_FREES, SHARD_GENERATION, SHARD_INTERVAL, bucket_of,
        home_shard,
    },
    unwind::rule::Rule,
};

use super::super::{CodeImage, MallocNests, assemble_for};
use super::sites;
use crate::prefilter::{
    hooks::Hook,
    layout::Geometry,
    relocate::{Displaced, Refusal, displace, displace_behind_first},
};

/// Small tables.
pub(super) const GEOMETRY: Geometry = Geometry {
    shards: 256,
    bucket_bits: 14,
};
/// A gap that no test uses up.
pub(super) const NEVER: u64 = 1 << 45;

const CODE_BYTES: usize = 1 << 20;
const IMAGE_OFFSET: usize = CODE_BYTES / 2;
const FAKE_BYTES: usize = 1024;

/// The image, mapped, and the functions that enter it.
pub(super) struct Rig {
    code: usize,
    data: usize,
    data_bytes: usize,
    functions: Vec<(Function, usize)>,
    pub(super) image: CodeImage,
    pub(super) geometry: Geometry,
}

impl Rig {
    /// Functions that go on in Rust functions, whose addresses are given.
    pub(super) fn new(functions: &[(Function, usize)]) -> Self {
        Self::with(GEOMETRY, MallocNests::No, functions)
    }

    pub(super) fn with(
        geometry: Geometry,
        nests: MallocNests,
        functions: &[(Function, usize)],
    ) -> Self {
        let codes: Vec<_> = functions
            .iter()
            .map(|&(function, rust)| (function, call_through(rust)))
            .collect();
        Self::with_code(geometry, nests, &codes)
    }

    /// As [`Self::new`]; the functions' first instructions stay in their places.
    pub(super) fn behind_first(functions: &[(Function, usize)]) -> Self {
        let codes: Vec<_> = functions
            .iter()
            .map(|&(function, rust)| (function, call_through(rust)))
            .collect();
        Self::displaced(GEOMETRY, MallocNests::No, &codes, displace_behind_first)
    }

    /// Functions with this code.
    pub(super) fn with_code(
        geometry: Geometry,
        nests: MallocNests,
        codes: &[(Function, Vec<u8>)],
    ) -> Self {
        Self::displaced(geometry, nests, codes, displace)
    }

    fn displaced(
        geometry: Geometry,
        nests: MallocNests,
        codes: &[(Function, Vec<u8>)],
        displace: impl Fn(&[u8], u64) -> Result<Displaced, Refusal>,
    ) -> Self {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let code = map(
            0,
            CODE_BYTES,
            all,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
        );
        let mut functions = Vec::new();
        let mut hooks = Vec::new();
        for (index, (function, bytes)) in codes.iter().enumerate() {
            let at = code + index * FAKE_BYTES;
            write(at, bytes);
            functions.push((*function, at));
            let displaced = displace(bytes, at as u64).unwrap();
            hooks.push(Hook {
                function: *function,
                symbol: function.symbol(),
                entry: displaced.address,
                displaced,
                // Itself: inside its own call it is not followed.
                twin: function.throws().then_some(at as u64),
            });
        }

        let data_bytes = geometry.shared_bytes() + geometry.private_bytes();
        let data = map_data(geometry);
        let at = (code + IMAGE_OFFSET) as u64;
        let image = assemble_for(at, data as u64, geometry, &hooks, nests).unwrap();
        write(code + IMAGE_OFFSET, &image.bytes);
        for patch in &image.patches {
            write(patch.address as usize, &patch.jump);
        }
        for site in sites::watch(code + IMAGE_OFFSET, &image) {
            write(site, &[0xcc]);
        }
        let rig = Self {
            code,
            data,
            data_bytes,
            functions,
            image,
            geometry,
        };
        rig.word(HEADER_GENERATION).store(1, SeqCst);
        rig.enable(true);
        rig
    }

    /// As the daemon does, and as a fork undoes.
    pub(super) fn enable(&self, enabled: bool) {
        self.word(self.geometry.shared_bytes())
            .store(enabled.into(), SeqCst);
    }

    /// Address of a patched function.
    pub(super) fn function(&self, function: Function) -> usize {
        let found = self.functions.iter().find(|&&(f, _)| f == function);
        found.unwrap().1
    }

    /// A function as it was before, at another address.
    pub(super) fn copy_of(&self, function: Function) -> usize {
        let at = self.function(function);
        let patch = self.image.patches.iter().find(|p| p.address == at as u64);
        let copy = at + FAKE_BYTES / 2;
        let original = ptr::with_exposed_provenance::<[u8; FAKE_BYTES / 2]>(at);
        // SAFETY: within the code of the rig; the copy is behind the function.
        write(copy, &unsafe { original.read() });
        write(copy, &patch.unwrap().original);
        copy
    }

    pub(super) fn malloc(&self, size: u64) -> u64 {
        call(self.function(Function::Malloc), [size, 0, 0])
    }

    pub(super) fn free(&self, address: u64) {
        call(self.function(Function::Free), [address, 0, 0]);
    }

    pub(super) fn calloc(&self, count: u64, size: u64) -> u64 {
        call(self.function(Function::Calloc), [count, size, 0])
    }

    pub(super) fn realloc(&self, old: u64, size: u64) -> u64 {
        call(self.function(Function::Realloc), [old, size, 0])
    }

    /// A word of the data.
    pub(super) fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < self.data_bytes);
        // SAFETY: within the data, which is mapped as long as `self` lives, aligned.
        unsafe { &*ptr::with_exposed_provenance::<AtomicU64>(self.data + offset) }
    }

    /// A byte of the shared part.
    pub(super) fn occupancy(&self, address: u64) -> u8 {
        let bucket = bucket_of(address, self.geometry.bucket_bits) as usize;
        let at = self.geometry.occupancy_offset() + bucket;
        self.word(at & !7).load(SeqCst).to_le_bytes()[at % 8]
    }

    /// The words of a range of the data, nobody writing there.
    fn words(&self, range: std::ops::Range<usize>) -> Vec<u64> {
        assert!(range.start.is_multiple_of(8) && range.end <= self.data_bytes);
        let mut words = vec![0_u64; range.len() / 8];
        let start = ptr::with_exposed_provenance::<u64>(self.data + range.start);
        // SAFETY: within the data, and as long as the vector; threads that write are
        // done.
        unsafe { ptr::copy_nonoverlapping(start, words.as_mut_ptr(), words.len()) };
        words
    }

    /// Addresses in the sampled set.
    pub(super) fn set(&self) -> Vec<u64> {
        let mut words = self.words(self.geometry.buckets_offset()..self.geometry.shards_offset());
        words.retain(|&address| address != 0);
        words
    }

    /// As [`Self::set`], of the buckets that are said to be occupied: faster.
    pub(super) fn counted_set(&self) -> Vec<u64> {
        let occupancy = self.geometry.occupancy_offset();
        let words = self.words(occupancy..self.geometry.buckets_offset());
        let eights = words.iter().enumerate().filter(|&(_, &eight)| eight != 0);
        let mut set: Vec<u64> = eights
            .flat_map(|(eight, _)| {
                let start = self.geometry.buckets_offset() + eight * 8 * BUCKET_BYTES;
                self.words(start..start + 8 * BUCKET_BYTES)
            })
            .collect();
        set.retain(|&address| address != 0);
        set
    }

    /// Sum of the counts of all occupancy bytes; they must all be without overflow.
    pub(super) fn occupied(&self) -> usize {
        let mut words =
            self.words(self.geometry.occupancy_offset()..self.geometry.buckets_offset());
        words.retain(|&eight| eight != 0);
        words
            .iter()
            .flat_map(|eight| eight.to_le_bytes())
            .map(usize::from)
            .sum()
    }

    /// The whole shared part.
    pub(super) fn shared(&self) -> Vec<u64> {
        self.words(0..self.geometry.shared_bytes())
    }

    /// Appends gaps to the ring.
    pub(super) fn fill(&self, gaps: &[(u64, u64)]) {
        for &(gap, interval) in gaps {
            let tail = self.word(HEADER_RING_TAIL).load(SeqCst);
            assert!(tail - self.word(HEADER_RING_HEAD).load(SeqCst) < RING_ENTRIES as u64);
            let entry =
                self.geometry.ring_offset() + tail as usize % RING_ENTRIES * RING_ENTRY_BYTES;
            self.word(entry).store(gap, SeqCst);
            self.word(entry + 8).store(interval, SeqCst);
            self.word(HEADER_RING_TAIL).store(tail + 1, SeqCst);
        }
    }

    /// How many gaps are left.
    pub(super) fn gaps(&self) -> u64 {
        self.word(HEADER_RING_TAIL).load(SeqCst) - self.word(HEADER_RING_HEAD).load(SeqCst)
    }

    pub(super) fn set_credit(&self, credit: u64) {
        self.word(HEADER_CREDIT).store(credit, SeqCst);
    }

    pub(super) fn starved(&self) -> u64 {
        self.word(HEADER_STARVED).load(SeqCst)
    }

    pub(super) fn unsharded(&self) -> u64 {
        self.word(HEADER_UNSHARDED).load(SeqCst)
    }

    pub(super) fn unmarked(&self) -> u64 {
        self.word(HEADER_UNMARKED).load(SeqCst)
    }

    /// Over all shards: calls, bytes, frees.
    pub(super) fn totals(&self) -> (u64, u64, i64) {
        let words = self.words(self.geometry.shards_offset()..self.geometry.shared_bytes());
        let (mut calls, mut bytes, mut frees) = (0, 0, 0_u64);
        for shard in words.chunks(SHARD_BYTES / 8) {
            let classes = &shard[SHARD_CALLS / 8..][..SHARD_CALL_CLASSES];
            calls += classes.iter().sum::<u64>();
            bytes += shard[SHARD_BYTES_ASKED / 8];
            frees = frees.wrapping_add(shard[SHARD_FREES / 8]);
        }
        (calls, bytes, frees.cast_signed())
    }

    /// This thread's shard: where it is in the data.
    pub(super) fn own_shard(&self) -> Option<usize> {
        let thread = thread_pointer();
        let home = home_shard(thread, self.geometry.shards) as usize;
        (0..self.geometry.shards as usize)
            .map(|probe| (home + probe) % self.geometry.shards as usize)
            .map(|shard| self.geometry.shard_offset(shard))
            .find(|&shard| {
                let owner = shard + self.geometry.p_delta() + PRIVATE_OWNER;
                self.word(owner).load(SeqCst) == thread
            })
    }

    fn own(&self, field: usize) -> &AtomicU64 {
        self.word(self.own_shard().unwrap() + field)
    }

    pub(super) fn countdown(&self) -> &AtomicI64 {
        let word = self.own(SHARD_COUNTDOWN);
        // SAFETY: of the same size and alignment, and every value is one.
        unsafe { &*ptr::from_ref(word).cast::<AtomicI64>() }
    }

    pub(super) fn is_asleep(&self) -> bool {
        self.countdown().load(SeqCst) > ASLEEP / 2
    }

    pub(super) fn interval(&self) -> u64 {
        self.own(SHARD_INTERVAL).load(SeqCst)
    }

    pub(super) fn generation(&self) -> u64 {
        self.own(SHARD_GENERATION).load(SeqCst)
    }

    /// Calls of this thread by leading zeros of their size.
    pub(super) fn calls(&self, leading_zeros: usize) -> u64 {
        self.own(SHARD_CALLS + 8 * leading_zeros).load(SeqCst)
    }

    /// A shard's owner.
    pub(super) fn owner(&self, shard: usize) -> u64 {
        let shard = self.geometry.shard_offset(shard);
        self.word(shard + self.geometry.p_delta() + PRIVATE_OWNER)
            .load(SeqCst)
    }

    /// Where the image is.
    pub(super) fn image_at(&self) -> u64 {
        (self.code + IMAGE_OFFSET) as u64
    }

    /// Whether it is the address of code of the image.
    pub(super) fn is_code(&self, address: u64) -> bool {
        let start = self.image_at();
        (start..start + self.image.bytes.len() as u64).contains(&address)
    }

    /// How to get from the instruction at an address of the image to its caller.
    pub(super) fn rule_at(&self, address: u64) -> Rule {
        let offset = (address - self.image_at()) as u32;
        let behind = self.image.rows.partition_point(|row| row.0 <= offset);
        self.image.rows[behind - 1].1
    }

    /// The call that this thread is in.
    pub(super) fn call_frame(&self) -> Option<u64> {
        let call = self
            .own(self.geometry.p_delta() + PRIVATE_CALL)
            .load(SeqCst);
        (call != thread_pointer()).then_some(call)
    }

    /// Gives a shard away, so that its thread finds it taken.
    pub(super) fn give_away(&self, shard: usize) {
        self.set_owner(shard, 16, 16);
    }

    /// Gives a shard back, as of a thread that has ended.
    pub(super) fn give_back(&self, shard: usize) {
        self.set_owner(shard, OWNER_GONE, 0);
    }

    fn set_owner(&self, shard: usize, owner: u64, call: u64) {
        let shard = self
            .geometry
            .shard_offset(shard % self.geometry.shards as usize);
        let block = shard + self.geometry.p_delta();
        self.word(block + PRIVATE_OWNER).store(owner, SeqCst);
        self.word(block + PRIVATE_CALL).store(call, SeqCst);
    }

    /// This thread's home.
    pub(super) fn home(&self) -> usize {
        home_shard(thread_pointer(), self.geometry.shards) as usize
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        sites::forget(self.code as u64..(self.code + CODE_BYTES) as u64);
        // SAFETY: both were mapped by `new`, and nothing borrowed outlives `self`.
        unsafe {
            libc::munmap(ptr::with_exposed_provenance_mut(self.code), CODE_BYTES);
            libc::munmap(ptr::with_exposed_provenance_mut(self.data), self.data_bytes);
        }
    }
}

/// What `%fs:0` is.
pub(super) fn thread_pointer() -> u64 {
    let pointer;
    // SAFETY: reads the word that the ABI puts there.
    unsafe {
        std::arch::asm!("mov %fs:0, {}", out(reg) pointer, options(att_syntax, nostack, readonly))
    };
    pointer
}

/// Calls a function of the rig.
pub(super) fn call(function: usize, [a, b, c]: [u64; 3]) -> u64 {
    let function = ptr::with_exposed_provenance::<()>(function);
    // SAFETY: a fake function is there, which takes up to three words and returns one.
    unsafe {
        let function: extern "C" fn(u64, u64, u64) -> u64 = std::mem::transmute(function);
        function(a, b, c)
    }
}

/// Code that calls a Rust function: `push %rbp; mov %rsp,%rbp; movabs $rust,%rax; call
/// *%rax; pop %rbp; ret`.
fn call_through(rust: usize) -> Vec<u8> {
    let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0x48, 0xb8];
    code.extend((rust as u64).to_le_bytes());
    code.extend([0xff, 0xd0, 0x5d, 0xc3]);
    code
}

fn map(at: usize, bytes: usize, protection: i32, flags: i32, fd: i32) -> usize {
    // SAFETY: a new mapping, or one over a range that `map_data` has reserved.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(at),
            bytes,
            protection,
            flags,
            fd,
            0,
        )
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    mapped.expose_provenance()
}

/// The shared part of a memory file, and the private part behind it.
fn map_data(geometry: Geometry) -> usize {
    let (shared, private) = (geometry.shared_bytes(), geometry.private_bytes());
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let data = map(0, shared + private, libc::PROT_NONE, anonymous, -1);
    let both = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: makes a file of the length that is mapped; private memory is advised on.
    unsafe {
        let file = libc::memfd_create(c"memprof-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(file >= 0 && libc::ftruncate(file, shared as i64) == 0);
        map(data, shared, both, libc::MAP_SHARED | libc::MAP_FIXED, file);
        libc::close(file);
        map(
            data + shared,
            private,
            both,
            anonymous | libc::MAP_FIXED,
            -1,
        );
        let private_part = ptr::with_exposed_provenance_mut(data + shared);
        assert_eq!(
            libc::madvise(private_part, private, libc::MADV_WIPEONFORK),
            0
        );
    }
    data
}

fn write(at: usize, bytes: &[u8]) {
    // SAFETY: within the code of a rig, which is writable and not being executed.
    unsafe {
        ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            ptr::with_exposed_provenance_mut(at),
            bytes.len(),
        );
    }
}
