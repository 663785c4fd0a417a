//! Memory made up by tests.

use std::{
    cell::{Cell, RefCell},
    io,
};

use super::memory::Memory;

/// Where it begins.
pub(super) const BASE: u64 = 0x10_0000;

/// Some memory, which can change between one reading and the next.
pub(super) struct Fake {
    bytes: RefCell<Vec<u8>>,
    reads: Cell<usize>,
    /// Words to be written before the reading of that number.
    changes: RefCell<Vec<(usize, u64, u64)>>,
}

impl Fake {
    pub(super) fn new(len: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; len.next_multiple_of(4096)]),
            reads: Cell::new(0),
            changes: RefCell::default(),
        }
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address - BASE).unwrap();
        self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put_words(&self, address: u64, words: &[u64]) {
        for (place, word) in words.iter().enumerate() {
            self.put(address + 8 * place as u64, &word.to_le_bytes());
        }
    }

    /// Has a word written before so many more readings.
    pub(super) fn put_later(&self, reads: usize, address: u64, word: u64) {
        let at = self.reads.get() + reads;
        self.changes.borrow_mut().push((at, address, word));
    }

    pub(super) fn reads(&self) -> usize {
        self.reads.get()
    }

    /// Changes one byte, and tells what it was.
    pub(super) fn swap(&self, place: usize, byte: u8) -> u8 {
        std::mem::replace(&mut self.bytes.borrow_mut()[place], byte)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.borrow().len()
    }
}

impl Memory for Fake {
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let now = self.reads.get() + 1;
        self.reads.set(now);
        let changes: Vec<_> = self
            .changes
            .borrow_mut()
            .extract_if(.., |change| change.0 <= now)
            .collect();
        for (_, address, word) in changes {
            self.put_words(address, &[word]);
        }
        let bytes = self.bytes.borrow();
        let part = address
            .checked_sub(BASE)
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| bytes.get(at..at.checked_add(buffer.len())?));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Random numbers from a fixed seed.
pub(super) fn random() -> impl FnMut(u64) -> u64 {
    let mut state = 0x1234_5678_9abc_def1_u64;
    move |bound| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    }
}
