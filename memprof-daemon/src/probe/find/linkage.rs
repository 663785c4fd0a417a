//! Functions that are nothing but a jump to another of the file's.
//!
//! Libraries jump to functions that others may replace by way of a stub in the PLT, which
//! takes the goal from a slot that the dynamic loader fills.

use std::{collections::HashMap, fs::File, os::unix::fs::FileExt as _};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use object::elf;

use super::for_each_chunk;
use crate::{
    address::{FileOffset, VirtOffset},
    process::elf::{ElfError, ElfLayout, Fields},
};

const FILE_HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const DYNAMIC_BYTES: usize = 16;
const RELOCATION_BYTES: usize = 24;
const SYMBOL_BYTES: u64 = 24;
const MAX_SEGMENTS: u16 = 4096;
const MAX_DYNAMIC_BYTES: usize = 64 << 10;
/// A stub in the PLT: `endbr64`, `bnd jmp *slot(%rip)`.
const STUB_BYTES: u64 = 16;
/// Of a file with more slots for functions, jumps by way of them are not seen through.
const MAX_SLOTS: usize = 1 << 16;

/// Where a jump leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// Code.
    Code(u64),
    /// What the word at this address says.
    Slot(u64),
}

/// Where `instruction` leads to, if it is a jump or a call to one place.
pub(super) fn goal(instruction: &Instruction) -> Option<Goal> {
    let is_indirect = matches!(
        instruction.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall
    );
    if is_indirect {
        let by_slot = instruction.op0_kind() == OpKind::Memory
            && instruction.memory_base() == Register::RIP
            && instruction.memory_index() == Register::None;
        return by_slot.then(|| Goal::Slot(instruction.memory_displacement64()));
    }
    match instruction.near_branch_target() {
        0 => None,
        target => Some(Goal::Code(target)),
    }
}

/// Where the code at `address` leads to, if it is nothing but a jump.
pub(super) fn passes_on_to(bytes: &[u8], address: u64) -> Option<Goal> {
    let first = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE)
        .into_iter()
        .find(|instruction| instruction.mnemonic() != Mnemonic::Endbr64)?;
    let jumps = matches!(
        first.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
    );
    jumps.then(|| goal(&first))?
}

/// What the slots of a file lead to in the file itself.
pub(super) struct Linkage<'a> {
    file: &'a File,
    layout: &'a ElfLayout,
    /// Read when they are first asked for.
    slots: Option<HashMap<u64, u64>>,
}

impl<'a> Linkage<'a> {
    pub(super) const fn new(file: &'a File, layout: &'a ElfLayout) -> Self {
        Self {
            file,
            layout,
            slots: None,
        }
    }

    /// Address of the function in the file at which a jump arrives.
    pub(super) fn resolve(&mut self, goal: Goal) -> Option<u64> {
        let slot = match goal {
            Goal::Slot(slot) => slot,
            Goal::Code(address) => {
                let offset = self.layout.code_offset(VirtOffset(address))?;
                let stub = super::points::read_code(self.file, offset, STUB_BYTES).ok()?;
                match passes_on_to(&stub, address) {
                    Some(Goal::Slot(slot)) => slot,
                    _ => return Some(address),
                }
            }
        };
        // A table that cannot be read is as good as none.
        let read = || read_slots(self.file, self.layout).unwrap_or_default();
        self.slots.get_or_insert_with(read).get(&slot).copied()
    }
}

/// The slots that the dynamic loader fills with addresses of functions which the file has
/// itself, with these.
fn read_slots(file: &File, layout: &ElfLayout) -> Result<HashMap<u64, u64>, ElfError> {
    let dynamic = read_dynamic(file)?;
    let value = |tag: i64| {
        let of_it = |(t, _): &&(u64, u64)| *t == tag.cast_unsigned();
        dynamic.iter().find(of_it).map(|&(_, value)| value)
    };
    let mut slots = HashMap::new();
    let Some(symbols) = value(elf::DT_SYMTAB.0).and_then(|at| file_offset(layout, at)) else {
        return Ok(slots);
    };
    let mut wanted: Vec<(u64, u32)> = Vec::new();
    for (table, size) in [
        (value(elf::DT_JMPREL.0), value(elf::DT_PLTRELSZ.0)),
        (value(elf::DT_RELA.0), value(elf::DT_RELASZ.0)),
    ] {
        let (Some(table), Some(size)) = (table, size) else {
            continue;
        };
        let Some(at) = file_offset(layout, table) else {
            continue;
        };
        let chunk_bytes = super::CHUNK_BYTES / RELOCATION_BYTES * RELOCATION_BYTES;
        for_each_chunk(file, FileOffset(at), size, chunk_bytes, |chunk| {
            for relocation in chunk.chunks_exact(RELOCATION_BYTES).map(Fields) {
                let kind = relocation.u32(8);
                let is_slot = kind == elf::R_X86_64_JUMP_SLOT.0 || kind == elf::R_X86_64_GLOB_DAT.0;
                if is_slot && wanted.len() < MAX_SLOTS {
                    wanted.push((relocation.u64(0), relocation.u32(12)));
                }
            }
        })?;
    }
    for (slot, symbol) in wanted {
        let mut bytes = [0; SYMBOL_BYTES as usize];
        let at = symbols.saturating_add(u64::from(symbol) * SYMBOL_BYTES);
        file.read_exact_at(&mut bytes, at)?;
        let symbol = Fields(&bytes);
        if symbol.u16(6) != elf::SHN_UNDEF.0 && symbol.u8(4) & 0xf == elf::STT_FUNC.0 {
            slots.insert(slot, symbol.u64(8));
        }
    }
    Ok(slots)
}

/// Where in the file the byte is that is at `address` in memory.
fn file_offset(layout: &ElfLayout, address: u64) -> Option<u64> {
    layout.segments.iter().find_map(|segment| {
        let within = address.checked_sub(segment.address.0)?;
        (within < segment.file_size).then_some(())?;
        segment.file_offset.0.checked_add(within)
    })
}

/// The entries of `PT_DYNAMIC`: tag and value.
fn read_dynamic(file: &File) -> Result<Vec<(u64, u64)>, ElfError> {
    let mut header = [0; FILE_HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let header = Fields(&header);
    let count = header.u16(56);
    if count > MAX_SEGMENTS || usize::from(header.u16(54)) != SEGMENT_BYTES {
        return Ok(Vec::new());
    }
    let mut segments = vec![0; usize::from(count) * SEGMENT_BYTES];
    file.read_exact_at(&mut segments, header.u64(32))?;
    let dynamic = segments
        .chunks_exact(SEGMENT_BYTES)
        .map(Fields)
        .find(|segment| segment.u32(0) == elf::PT_DYNAMIC.0);
    let Some(dynamic) = dynamic else {
        return Ok(Vec::new());
    };
    let size = usize::try_from(dynamic.u64(32)).unwrap_or(usize::MAX);
    let mut entries = vec![0; size.min(MAX_DYNAMIC_BYTES)];
    file.read_exact_at(&mut entries, dynamic.u64(8))?;
    Ok(entries
        .chunks_exact(DYNAMIC_BYTES)
        .map(|entry| (Fields(entry).u64(0), Fields(entry).u64(8)))
        .take_while(|&(tag, _)| tag != elf::DT_NULL.0.cast_unsigned())
        .collect())
}
