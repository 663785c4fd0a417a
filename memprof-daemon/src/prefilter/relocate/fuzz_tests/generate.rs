//! Functions that no compiler has made: random instructions, in every form that the first
//! instructions of a real function have, and that end for all contents of registers.

use crate::unwind::testing::Random;

/// Numbers of registers, as instructions have them.
const RCX: u8 = 1;
const RSP: u8 = 4;
const RBP: u8 = 5;
/// These point to the data at the start.
pub(super) const POINTERS: [u8; 3] = [6, 7, 8];

/// Where the function's data is: this long, of which what pointers point to is the middle.
pub(super) const DATA_BYTES: u64 = 4096;
/// A pointer to a function that marks that it was called, and the mark.
pub(super) const CALLBACK: u64 = 0;
/// A byte for each place whose passing is to be seen.
const MARKS: u64 = 16;
const MARK_BYTES: u64 = 240;

/// Something to be filled in when the places are known.
enum Fix {
    None,
    /// The last byte, or the last four, lead to the instruction with this number.
    Short(usize),
    Near(usize),
    /// Four bytes, behind which so many come, refer to this place.
    Memory(u64, usize),
}

pub(super) struct Function {
    pub(super) bytes: Vec<u8>,
    /// Where it has an instruction that must not be executed.
    pub(super) poison: Option<usize>,
}

pub(super) struct Generator<'a> {
    pub(super) random: &'a mut Random,
    data: u64,
    address: u64,
    items: Vec<(Vec<u8>, Fix)>,
    /// Registers that were written, a bit each.
    written: u16,
    /// Words on the stack.
    depth: usize,
    /// Instructions up to here can be skipped, or repeated: those in between leave the stack
    /// alone.
    fixed_until: usize,
    /// `rcx` counts a loop up to here.
    counted_until: usize,
    marks: u64,
    poison: Option<usize>,
}

impl<'a> Generator<'a> {
    /// Of a function at `address` with this data.
    pub(super) fn new(random: &'a mut Random, address: u64, data: u64) -> Self {
        Self {
            random,
            data,
            address,
            items: Vec::new(),
            written: 0,
            depth: 0,
            fixed_until: 0,
            counted_until: 0,
            marks: 0,
            poison: None,
        }
    }

    /// The function; none if a branch in it would not reach.
    pub(super) fn function(mut self) -> Option<Function> {
        const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
        if self.one_in(3) {
            self.push(ENDBR64);
        }
        match self.random.below(40) {
            0 => self.thunk(),
            1 => self.poison(),
            2 => self.push(ENDBR64),
            _ => {}
        }
        let count = 2 + self.random.below(14);
        for _ in 0..count {
            if self.one_in(60) {
                self.poison();
            }
            self.instruction();
        }
        while self.items.len() < self.fixed_until.max(self.counted_until) {
            self.plain();
        }
        self.end();
        self.assemble()
    }

    fn one_in(&mut self, number: usize) -> bool {
        self.random.below(number) == 0
    }

    fn byte(&mut self) -> u8 {
        self.random.below(256) as u8
    }

    fn push(&mut self, bytes: impl Into<Vec<u8>>) {
        self.items.push((bytes.into(), Fix::None));
    }

    /// Any register but the stack pointer; in a loop, neither its counter nor pointers, which
    /// are used again.
    fn target(&mut self) -> u8 {
        let is_repeated = self.items.len() < self.counted_until;
        loop {
            let register = self.random.below(16) as u8;
            let is_kept = register == RCX || POINTERS.contains(&register);
            if register != RSP && !(is_repeated && is_kept) {
                return register;
            }
        }
    }

    fn source(&mut self) -> u8 {
        let register = self.random.below(16) as u8;
        if register == RSP { RBP } else { register }
    }

    fn note_written(&mut self, register: u8) {
        self.written |= 1 << register;
    }

    fn mark(&mut self) {
        if self.marks < MARK_BYTES {
            let (place, value) = (self.data + MARKS + self.marks, self.byte());
            self.marks += 1;
            let bytes = vec![0xc6, 0x05, 0, 0, 0, 0, value];
            self.items.push((bytes, Fix::Memory(place, 1)));
        }
    }

    /// A function that is nothing but a jump.
    fn thunk(&mut self) {
        if self.one_in(2) {
            let bytes = vec![0xff, 0x25, 0, 0, 0, 0];
            self.items
                .push((bytes, Fix::Memory(self.data + CALLBACK, 0)));
        } else {
            let to = self.items.len() + 2;
            self.items.push((vec![0xe9, 0, 0, 0, 0], Fix::Near(to)));
        }
        self.mark();
    }

    /// An instruction that the program cannot go on behind, or whose moving shows.
    fn poison(&mut self) {
        const KINDS: [&[u8]; 7] = [
            &[0x0f, 0x0b],
            &[0xcc],
            &[0xf4],
            &[0x0f, 0x05],
            &[0xe8, 0, 0, 0, 0],
            &[0x06],
            &[0xff, 0xd0],
        ];
        let kind = KINDS[self.random.below(KINDS.len())];
        self.poison.get_or_insert(self.items.len());
        self.push(kind);
    }

    fn instruction(&mut self) {
        let is_free = self.items.len() >= self.fixed_until.max(self.counted_until);
        match self.random.below(10) {
            0 if is_free => self.forward(),
            1 if is_free => self.stack(),
            2 if is_free && self.one_in(3) => self.repeated(),
            3 if is_free && self.one_in(3) => {
                // Refused if it were moved.
                self.items.push((
                    vec![0xff, 0x15, 0, 0, 0, 0],
                    Fix::Memory(self.data + CALLBACK, 0),
                ));
            }
            _ => self.plain(),
        }
    }

    /// A branch over some instructions, or to the next.
    fn forward(&mut self) {
        let to = self.items.len() + 1 + self.random.below(6);
        let condition = self.random.below(16) as u8;
        let (bytes, fix) = match self.random.below(6) {
            0 | 1 => (vec![0x70 | condition, 0], Fix::Short(to)),
            2 | 3 => (vec![0x0f, 0x80 | condition, 0, 0, 0, 0], Fix::Near(to)),
            4 => (vec![0xe3, 0], Fix::Short(to)),
            _ if self.one_in(2) => (vec![0xeb, 0], Fix::Short(to)),
            _ => (vec![0xe9, 0, 0, 0, 0], Fix::Near(to)),
        };
        self.items.push((bytes, fix));
        self.fixed_until = to;
        if self.one_in(2) {
            self.mark();
        }
    }

    /// A loop, which can begin within the first instructions: `rcx` is small at the entry.
    fn repeated(&mut self) {
        if self.written & (1 << RCX) != 0 || self.one_in(4) {
            let count = 1 + self.random.below(9) as u8;
            self.push([0xb9, count, 0, 0, 0]);
            self.note_written(RCX);
        }
        let start = self.items.len();
        let count = self.random.below(4);
        // Too far: the end is only known behind the body.
        self.counted_until = usize::MAX;
        for _ in 0..count {
            self.plain();
        }
        self.counted_until = 0;
        match self.random.below(3) {
            0 => self.items.push((vec![0xe2, 0], Fix::Short(start))),
            1 => {
                self.push([0xff, 0xc9]);
                self.items.push((vec![0x75, 0], Fix::Short(start)));
            }
            _ => {
                self.push([0x48, 0x83, 0xe9, 1]);
                let bytes = vec![0x0f, 0x85, 0, 0, 0, 0];
                self.items.push((bytes, Fix::Near(start)));
            }
        }
        self.note_written(RCX);
    }

    fn stack(&mut self) {
        match self.random.below(5) {
            0 | 1 => {
                let register = self.source();
                if register >= 8 {
                    self.push([0x41, 0x50 | (register & 7)]);
                } else {
                    self.push([0x50 | register]);
                }
                self.depth += 1;
            }
            2 => {
                if self.one_in(2) {
                    let value = self.byte();
                    self.push([0x6a, value]);
                } else {
                    let place = self.place(8);
                    let bytes = vec![0xff, 0x35, 0, 0, 0, 0];
                    self.items.push((bytes, Fix::Memory(place, 0)));
                }
                self.depth += 1;
            }
            3 => {
                let words = 1 + self.random.below(8);
                self.push([0x48, 0x83, 0xec, words as u8 * 8]);
                self.depth += words;
            }
            _ if self.depth > 0 => {
                let register = self.target();
                if register >= 8 {
                    self.push([0x41, 0x58 | (register & 7)]);
                } else {
                    self.push([0x58 | register]);
                }
                self.note_written(register);
                self.depth -= 1;
            }
            _ => self.plain(),
        }
    }

    /// A place of the data that is neither a mark nor the callback.
    fn place(&mut self, bytes: u64) -> u64 {
        let from = MARKS + MARK_BYTES;
        self.data + from + self.random.below((DATA_BYTES - from - bytes) as usize) as u64
    }

    fn end(&mut self) {
        if self.depth > 0 {
            let bytes = (self.depth * 8) as u32;
            let mut code = vec![0x48, 0x8d, 0xa4, 0x24];
            code.extend(bytes.to_le_bytes());
            self.push(code);
        }
        self.mark();
        match self.random.below(8) {
            0 => self.push([0xf3, 0xc3]),
            _ => self.push([0xc3]),
        }
    }

    fn assemble(mut self) -> Option<Function> {
        let mut starts = Vec::new();
        let mut length = 0;
        for (bytes, _) in &self.items {
            starts.push(length);
            length += bytes.len();
        }
        let mut code = Vec::new();
        for (bytes, fix) in &mut self.items {
            let end = bytes.len();
            let behind = (code.len() + end) as i64;
            match *fix {
                Fix::None => {}
                Fix::Short(to) => {
                    let distance = *starts.get(to)? as i64 - behind;
                    bytes[end - 1] = i8::try_from(distance).ok()?.cast_unsigned();
                }
                Fix::Near(to) => {
                    let distance = (*starts.get(to)? as i64 - behind) as i32;
                    bytes[end - 4..].copy_from_slice(&distance.to_le_bytes());
                }
                Fix::Memory(place, more) => {
                    let behind = self.address.wrapping_add(behind as u64);
                    let distance = place.wrapping_sub(behind) as i32;
                    bytes[end - more - 4..end - more].copy_from_slice(&distance.to_le_bytes());
                }
            }
            code.extend_from_slice(bytes);
        }
        Some(Function {
            bytes: code,
            poison: self.poison.map(|item| starts[item]),
        })
    }
}

mod plain;
