//! The table of functions, `.gopclntab`, which a Go program needs to run and `strip` does not
//! take away: names, files, lines and what was inlined where.

use std::io;

use super::{GoError, layout::Layout, memory::Blocks, module::Module};

/// `_PCDATA_InlTreeIndex` and `_FUNCDATA_InlTree`.
const INLINED_AT: u64 = 2;
const INLINED: u64 = 3;

/// Functions beyond this number are none that a linker has written.
const MAX_FUNCTIONS: u64 = 1 << 24;
/// Steps through functions' tables: some seconds. Some hundred each are usual.
const MAX_STEPS: usize = 1 << 26;
/// Names beyond so many bytes are not searched.
const MAX_NAMES: u64 = 256 << 20;
/// Names are searched in pieces of this size.
const CHUNK_BYTES: u64 = 64 << 10;

/// A function as it was compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Func {
    /// First instruction.
    pub(super) entry: u64,
    /// First instruction of the next one.
    pub(super) end: u64,
    /// Its record.
    record: u64,
}

/// What an instruction belongs to: the innermost function, if some were inlined there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) function: String,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    /// The instruction that stands for the call, if the function was inlined.
    pub(super) caller: Option<u64>,
}

/// The table, read where it is needed.
pub(super) struct FunctionTable<'a> {
    blocks: Blocks<'a>,
    layout: Layout,
    module: Module,
    count: u64,
    names: u64,
    units: u64,
    files: u64,
    steps: u64,
    functions: u64,
    /// Steps that may still be taken.
    steps_left: usize,
}

impl<'a> FunctionTable<'a> {
    /// Reads the header of the table at `address`.
    ///
    /// # Errors
    ///
    /// It is another version's, or it is none.
    pub(super) fn new(
        mut blocks: Blocks<'a>,
        layout: Layout,
        module: Module,
        address: u64,
    ) -> Result<Self, GoError> {
        let header = blocks.words(address, 9).map_err(GoError::Memory)?;
        let [magic, count, _, _, names, units, files, steps, functions] = *header else {
            return Err(GoError::FunctionTable("it is too short"));
        };
        // The magic number, two zeros, then the sizes of instructions and of pointers.
        if magic != u64::from(layout.pclntab_magic) | 1 << 48 | 8 << 56 {
            return Err(GoError::FunctionTable(
                "it does not begin as that version's",
            ));
        }
        if count > MAX_FUNCTIONS {
            return Err(GoError::FunctionTable("it has too many functions"));
        }
        let at = |offset: u64| address.wrapping_add(offset);
        Ok(Self {
            blocks,
            layout,
            module,
            count,
            names: at(names),
            units: at(units),
            files: at(files),
            steps: at(steps),
            functions: at(functions),
            steps_left: MAX_STEPS,
        })
    }

    /// Where function number `index` begins, and where its record is.
    fn entry(&mut self, index: u64) -> io::Result<(u64, u64)> {
        let words = self.blocks.u64(self.functions.wrapping_add(index * 8))?;
        let (entry, record) = (words & 0xffff_ffff, words >> 32);
        Ok((
            self.module.text.wrapping_add(entry),
            self.functions.wrapping_add(record),
        ))
    }

    /// The function that an instruction belongs to.
    pub(super) fn func(&mut self, pc: u64) -> io::Result<Option<Func>> {
        if self.count == 0 || !(self.module.text..self.module.text_end).contains(&pc) {
            return Ok(None);
        }
        // The first of `low..high` that begins behind it.
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.0 <= pc {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        match low.checked_sub(1) {
            Some(index) => self.numbered(index).map(Some),
            None => Ok(None),
        }
    }

    fn numbered(&mut self, index: u64) -> io::Result<Func> {
        let (entry, record) = self.entry(index)?;
        // Behind the last one there is an entry that says where it ends.
        let end = self
            .blocks
            .u32(self.functions.wrapping_add((index + 1) * 8))?;
        Ok(Func {
            entry,
            end: self.module.text.wrapping_add(u64::from(end)),
            record,
        })
    }

    /// The function of that name.
    pub(super) fn named(&mut self, name: &str) -> io::Result<Option<Func>> {
        let Some(wanted) = self.find_name(name)? else {
            return Ok(None);
        };
        for index in 0..self.count {
            let (_, record) = self.entry(index)?;
            if self.blocks.u32(record.wrapping_add(4))? == wanted {
                return self.numbered(index).map(Some);
            }
        }
        Ok(None)
    }

    /// Whether a function of that name is compiled, or inlined somewhere.
    pub(super) fn has_name(&mut self, name: &str) -> io::Result<bool> {
        Ok(self.find_name(name)?.is_some())
    }

    /// Where a name is, as records say it.
    fn find_name(&mut self, name: &str) -> io::Result<Option<u32>> {
        let mut wanted = vec![0];
        wanted.extend(name.as_bytes());
        wanted.push(0);
        let end = self.units.min(self.names.saturating_add(MAX_NAMES));
        let mut at = self.names;
        while at < end {
            let len = CHUNK_BYTES.min(end - at);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            self.blocks.read(at, &mut bytes)?;
            let place = bytes.windows(wanted.len()).position(|part| part == wanted);
            if let Some(place) = place {
                let offset = at.wrapping_sub(self.names) + place as u64 + 1;
                return Ok(u32::try_from(offset).ok());
            }
            // It may have begun at the end of this piece.
            at += len.saturating_sub(wanted.len() as u64).max(1);
        }
        Ok(None)
    }

    /// The innermost function at the instruction `pc`, its line, and who called it.
    pub(super) fn place(&mut self, pc: u64) -> io::Result<Option<Place>> {
        let Some(func) = self.func(pc)? else {
            return Ok(None);
        };
        let offset = pc.saturating_sub(func.entry);
        let word = |this: &mut Self, at: u64| this.blocks.u32(func.record.wrapping_add(at));
        let [name, files, lines, pcdata, unit] = [4, 20, 24, 28, 32].map(|at| word(self, at));
        let (files, lines, pcdata, unit) = (files?, lines?, u64::from(pcdata?), unit?);
        let funcdata = u64::from(
            self.blocks
                .u8(func.record.wrapping_add(self.layout.func_bytes - 1))?,
        );

        let tables = func.record.wrapping_add(self.layout.func_bytes);
        let mut inlined = None;
        if pcdata > INLINED_AT && funcdata > INLINED {
            let steps = self.blocks.u32(tables.wrapping_add(4 * INLINED_AT))?;
            let tree = self
                .blocks
                .u32(tables.wrapping_add(4 * (pcdata + INLINED)))?;
            let index = self.value(steps, offset)?;
            if let Some(index) = index.and_then(|index| u64::try_from(index).ok())
                && tree != u32::MAX
            {
                let tree = self.module.gofunc.wrapping_add(u64::from(tree));
                inlined = Some(tree.wrapping_add(index * self.layout.inlined_bytes));
            }
        }
        let (name, caller) = match inlined {
            Some(call) => {
                let name = self
                    .blocks
                    .u32(call.wrapping_add(self.layout.inlined_name))?;
                let parent = self
                    .blocks
                    .u32(call.wrapping_add(self.layout.inlined_parent))?;
                (name, Some(func.entry.wrapping_add(u64::from(parent))))
            }
            None => (name?, None),
        };
        let function = self.blocks.text(self.names.wrapping_add(u64::from(name)))?;
        let file = match self.value(files, offset)?.map(u32::try_from) {
            Some(Ok(number)) => self.file(unit, number)?,
            _ => None,
        };
        let line = self.value(lines, offset)?;
        Ok((!function.is_empty()).then_some(Place {
            function,
            file,
            line: line.and_then(|line| u32::try_from(line).ok()),
            caller,
        }))
    }

    fn file(&mut self, unit: u32, number: u32) -> io::Result<Option<String>> {
        let index = u64::from(unit) + u64::from(number);
        let offset = self.blocks.u32(self.units.wrapping_add(index * 4))?;
        if offset == u32::MAX {
            return Ok(None);
        }
        let file = self
            .blocks
            .text(self.files.wrapping_add(u64::from(offset)))?;
        Ok(Some(file).filter(|file| !file.is_empty()))
    }

    /// The value that a table of steps has at an instruction of its function: pairs of how the
    /// value changes and for how many bytes it is so (`pcvalue` in src/runtime/symtab.go).
    fn value(&mut self, table: u32, wanted: u64) -> io::Result<Option<i32>> {
        if table == 0 {
            return Ok(None);
        }
        let mut at = self.steps.wrapping_add(u64::from(table));
        let (mut value, mut offset) = (-1_i32, 0_u64);
        let mut is_first = true;
        loop {
            self.steps_left = self
                .steps_left
                .checked_sub(1)
                .ok_or(io::ErrorKind::InvalidData)?;
            let change = self.varint(&mut at)?;
            if change == 0 && !is_first {
                return Ok(None);
            }
            is_first = false;
            // Zigzag.
            let change = (change >> 1).cast_signed() ^ -(change & 1).cast_signed();
            value = value.wrapping_add(change);
            offset += u64::from(self.varint(&mut at)?);
            if wanted < offset {
                return Ok(Some(value));
            }
        }
    }

    fn varint(&mut self, at: &mut u64) -> io::Result<u32> {
        let mut value = 0_u32;
        for shift in (0..35).step_by(7) {
            let byte = self.blocks.u8(*at)?;
            *at = at.wrapping_add(1);
            value |= u32::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// The machine code of a function, or how it begins.
    pub(super) fn code(&mut self, func: Func, longest: u64) -> io::Result<Vec<u8>> {
        let len = func.end.saturating_sub(func.entry).min(longest);
        let mut code = vec![0; usize::try_from(len).unwrap_or(0)];
        self.blocks.read(func.entry, &mut code)?;
        Ok(code)
    }
}

#[cfg(test)]
#[path = "pclntab_tests.rs"]
mod tests;
