//! Memory that is read in small pieces: a process's, or a file's at the addresses that it is
//! mapped at.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _, sync::Arc};

use crate::process::{elf::Segment, mapping::MappedFile};

/// What can be read at an address.
pub(crate) trait Memory {
    /// Fills `buffer` from `address` on.
    ///
    /// # Errors
    ///
    /// Not all of it can be read.
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// The memory of a process as it was when this was opened: after an `execve` nothing can be
/// read any more, rather than another program's memory.
#[derive(Debug)]
pub(crate) struct ProcessMemory(File);

impl ProcessMemory {
    /// # Errors
    ///
    /// It is gone, or may not be read.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/mem")).map(Self)
    }
}

impl Memory for ProcessMemory {
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, address)
    }
}

/// What of a file is mapped, at its place in memory.
#[derive(Clone, Debug)]
pub(crate) struct FileImage {
    pub(super) file: Arc<MappedFile>,
    pub(super) segments: Vec<Segment>,
    /// What is added to an address of the file.
    pub(super) bias: u64,
}

impl Memory for FileImage {
    fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let file = self.file.file.as_ref().ok_or_else(missing)?;
        let address = address.wrapping_sub(self.bias);
        let offset = self.segments.iter().find_map(|segment| {
            let within = address.checked_sub(segment.address.0)?;
            let left = segment.file_size.checked_sub(within)?;
            (left >= buffer.len() as u64).then_some(())?;
            segment.file_offset.0.checked_add(within)
        });
        file.read_exact_at(buffer, offset.ok_or_else(missing)?)
    }
}

/// As much is read at once. Memory is mapped in units of this.
const BLOCK_BYTES: u64 = 4096;

/// Blocks beyond this number, which are 256 MiB, are not kept.
const MAX_BLOCKS: usize = 1 << 16;

/// Reads each block of a memory once.
pub(super) struct Blocks<'a> {
    memory: &'a dyn Memory,
    blocks: HashMap<u64, Box<[u8]>>,
}

impl<'a> Blocks<'a> {
    pub(super) fn new(memory: &'a dyn Memory) -> Self {
        Self {
            memory,
            blocks: HashMap::new(),
        }
    }

    /// Fills `buffer` from `address` on.
    pub(super) fn read(&mut self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let block = at / BLOCK_BYTES;
            let within = usize::try_from(at % BLOCK_BYTES).unwrap_or(0);
            let known = match self.block(block) {
                Ok(known) => known,
                // A file's part can end within a block.
                Err(_) => return self.memory.read(at, rest),
            };
            let known = known.get(within..).unwrap_or_default();
            let len = known.len().min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(known.get(..len).unwrap_or_default());
            rest = later;
            at = at
                .checked_add(len as u64)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
        }
        Ok(())
    }

    fn block(&mut self, block: u64) -> io::Result<&[u8]> {
        if self.blocks.len() >= MAX_BLOCKS && !self.blocks.contains_key(&block) {
            self.blocks.clear();
        }
        match self.blocks.entry(block) {
            std::collections::hash_map::Entry::Occupied(known) => Ok(known.into_mut()),
            std::collections::hash_map::Entry::Vacant(new) => {
                let mut bytes = vec![0; BLOCK_BYTES as usize].into_boxed_slice();
                self.memory.read(block * BLOCK_BYTES, &mut bytes)?;
                Ok(new.insert(bytes))
            }
        }
    }

    pub(super) fn array<const N: usize>(&mut self, address: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self, address: u64) -> io::Result<u8> {
        self.array(address).map(u8::from_le_bytes)
    }

    pub(super) fn u32(&mut self, address: u64) -> io::Result<u32> {
        self.array(address).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, address: u64) -> io::Result<u64> {
        self.array(address).map(u64::from_le_bytes)
    }

    /// Words from `address` on.
    pub(super) fn words(&mut self, address: u64, count: usize) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; count.saturating_mul(8)];
        self.read(address, &mut bytes)?;
        let words = bytes.as_chunks::<8>().0;
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// The text from `address` up to a zero byte, or as much of it as anyone wants to read.
    pub(super) fn text(&mut self, address: u64) -> io::Result<String> {
        const LONGEST: u64 = 4096;
        let mut bytes = Vec::new();
        for at in address..address.saturating_add(LONGEST) {
            match self.u8(at)? {
                0 => break,
                byte => bytes.push(byte),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
