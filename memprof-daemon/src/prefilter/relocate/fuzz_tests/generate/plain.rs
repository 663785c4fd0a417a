//! Instructions that go on with the next.

use super::{Fix, Generator, POINTERS, RCX, RSP};

/// `reg` and `rm` of an instruction.
struct Operand {
    /// REX.B.
    high: bool,
    /// ModRM without the register, and what follows.
    bytes: Vec<u8>,
    /// What it refers to from its own place.
    place: Option<u64>,
    /// The register it is, if it is one.
    register: Option<u8>,
}

/// How long an operation's operands are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Byte,
    Word,
    Long,
    Quad,
}

/// An instruction with a ModRM byte.
struct Form<'a> {
    prefixes: &'a [u8],
    opcode: &'a [u8],
    register: u8,
    /// That is a register, not a part of the opcode.
    has_register: bool,
    immediate: Vec<u8>,
}

impl<'a> Form<'a> {
    fn of(opcode: &'a [u8], register: u8) -> Self {
        Self {
            prefixes: &[],
            opcode,
            register,
            has_register: true,
            immediate: Vec::new(),
        }
    }

    /// An opcode that goes on in the register's place.
    fn group(opcode: &'a [u8], number: u8, immediate: Vec<u8>) -> Self {
        Self {
            has_register: false,
            immediate,
            ..Self::of(opcode, number)
        }
    }
}

impl Generator<'_> {
    fn size(&mut self) -> Size {
        [Size::Byte, Size::Word, Size::Long, Size::Quad, Size::Quad][self.random.below(5)]
    }

    fn direct(register: u8) -> Operand {
        Operand {
            high: register >= 8,
            bytes: vec![0xc0 | (register & 7)],
            place: None,
            register: Some(register),
        }
    }

    /// Memory that may be read and written.
    fn memory(&mut self) -> Operand {
        let pointers: Vec<u8> = POINTERS
            .into_iter()
            .filter(|pointer| self.written & (1 << pointer) == 0)
            .collect();
        match self.random.below(4) {
            0 if !pointers.is_empty() => {
                let pointer = pointers[self.random.below(pointers.len())];
                let mut bytes = vec![0x40 | (pointer & 7)];
                if self.one_in(2) {
                    bytes.push(self.byte());
                } else {
                    bytes[0] ^= 0xc0;
                    let distance = self.random.below(2000) as i32 - 1000;
                    bytes.extend(distance.to_le_bytes());
                }
                Operand {
                    high: pointer >= 8,
                    bytes,
                    place: None,
                    register: None,
                }
            }
            1 if self.depth > 1 => {
                // Not the last: two words can be accessed.
                let word = self.random.below((self.depth - 1).min(15)) as u8;
                Operand {
                    high: false,
                    bytes: vec![0x44, 0x24, word * 8],
                    place: None,
                    register: None,
                }
            }
            _ => Operand {
                high: false,
                bytes: vec![0x05, 0, 0, 0, 0],
                place: Some(self.place(16)),
                register: None,
            },
        }
    }

    fn read(&mut self) -> Operand {
        if self.one_in(2) {
            Self::direct(self.source())
        } else {
            self.memory()
        }
    }

    /// A register that is to be written, or memory.
    fn write(&mut self) -> Operand {
        if self.one_in(2) {
            Self::direct(self.target())
        } else {
            self.memory()
        }
    }

    /// Puts an instruction together. With operands of a byte, the registers from 4 on are
    /// others without REX: the second bytes of the first four.
    fn emit(&mut self, size: Size, form: Form<'_>, operand: Operand) {
        let mut bytes = form.prefixes.to_vec();
        if size == Size::Word {
            bytes.push(0x66);
        }
        let wide = u8::from(size == Size::Quad) << 3;
        let register = if form.has_register { form.register } else { 0 };
        let rex = 0x40 | wide | (register >> 3 & 1) << 2 | u8::from(operand.high);
        let counts = self.items.len() < self.counted_until;
        if rex != 0x40 || (size == Size::Byte && counts) || self.one_in(16) {
            bytes.push(rex);
        } else if size == Size::Byte {
            for register in [Some(form.register), operand.register]
                .into_iter()
                .flatten()
            {
                self.note_written(register & 3);
            }
        }
        for register in [Some(register), operand.register].into_iter().flatten() {
            // Not all forms write both: what is said to be written is not used as a pointer.
            self.note_written(register);
        }
        bytes.extend_from_slice(form.opcode);
        let modrm = bytes.len();
        bytes.extend(operand.bytes);
        bytes[modrm] |= (form.register & 7) << 3;
        let behind = form.immediate.len();
        bytes.extend(form.immediate);
        let fix = operand
            .place
            .map_or(Fix::None, |place| Fix::Memory(place, behind));
        self.items.push((bytes, fix));
    }

    fn immediate(&mut self, size: Size) -> Vec<u8> {
        let bytes = match size {
            Size::Byte => 1,
            Size::Word => 2,
            Size::Long | Size::Quad => 4,
        };
        if self.one_in(4) {
            let extreme = [0x00, 0xff, 0x7f][self.random.below(3)];
            return vec![extreme; bytes];
        }
        (0..bytes).map(|_| self.byte()).collect()
    }

    pub(super) fn plain(&mut self) {
        let size = self.size();
        let wide = u8::from(size != Size::Byte);
        let condition = self.random.below(16) as u8;
        let at_least_word = if size == Size::Byte { Size::Long } else { size };
        match self.random.below(24) {
            // add, or, adc, sbb, and, sub, xor, cmp: both ways, and with a number.
            0 | 1 => {
                let opcode = [(self.random.below(8) as u8) << 3 | wide];
                let (register, operand) = (self.source(), self.write());
                self.emit(size, Form::of(&opcode, register), operand);
            }
            2 | 3 => {
                let opcode = [(self.random.below(8) as u8) << 3 | 2 | wide];
                let (register, operand) = (self.target(), self.read());
                self.emit(size, Form::of(&opcode, register), operand);
            }
            4 | 5 => {
                let number = self.random.below(8) as u8;
                let (opcode, immediate) = if wide == 1 && self.one_in(2) {
                    (0x83, self.immediate(Size::Byte))
                } else {
                    (0x80 | wide, self.immediate(size))
                };
                let operand = self.write();
                self.emit(size, Form::group(&[opcode], number, immediate), operand);
            }
            // mov, both ways, and of a number.
            6 => {
                let (register, operand) = (self.source(), self.write());
                self.emit(size, Form::of(&[0x88 | wide], register), operand);
            }
            7 | 8 => {
                let (register, operand) = (self.target(), self.read());
                self.emit(size, Form::of(&[0x8a | wide], register), operand);
            }
            9 => {
                let (immediate, operand) = (self.immediate(size), self.write());
                self.emit(size, Form::group(&[0xc6 | wide], 0, immediate), operand);
            }
            10 => self.mov_number(),
            // test; inc, dec; not, neg.
            11 => {
                let (register, operand) = (self.source(), self.read());
                self.emit(size, Form::of(&[0x84 | wide], register), operand);
            }
            12 => {
                let (immediate, operand) = (self.immediate(size), self.read());
                self.emit(size, Form::group(&[0xf6 | wide], 0, immediate), operand);
            }
            13 => {
                let (number, operand) = (self.random.below(2) as u8, self.write());
                self.emit(size, Form::group(&[0xfe | wide], number, vec![]), operand);
            }
            14 => {
                let (number, operand) = (2 + self.random.below(2) as u8, self.write());
                self.emit(size, Form::group(&[0xf6 | wide], number, vec![]), operand);
            }
            // Shifts and rotations.
            15 => {
                let number = [0, 1, 2, 3, 4, 5, 7][self.random.below(7)];
                let (operand, count) = (self.write(), self.byte());
                let (opcode, immediate) = if self.one_in(2) {
                    (0xc0 | wide, vec![count])
                } else {
                    (0xd0 | wide, vec![])
                };
                self.emit(size, Form::group(&[opcode], number, immediate), operand);
            }
            // setcc, cmovcc, movzx, movsx.
            16 => {
                let operand = self.write();
                let opcode = [0x0f, 0x90 | condition];
                self.emit(Size::Byte, Form::group(&opcode, 0, vec![]), operand);
            }
            17 => {
                let (register, operand) = (self.target(), self.read());
                let opcode = [0x0f, 0x40 | condition];
                self.emit(at_least_word, Form::of(&opcode, register), operand);
            }
            18 => {
                let (register, operand) = (self.target(), self.read());
                let opcode = [0x0f, [0xb6, 0xb7, 0xbe, 0xbf][self.random.below(4)]];
                self.emit(at_least_word, Form::of(&opcode, register), operand);
            }
            // imul.
            19 => {
                let (register, operand) = (self.target(), self.read());
                if self.one_in(2) {
                    self.emit(at_least_word, Form::of(&[0x0f, 0xaf], register), operand);
                } else {
                    let immediate = self.immediate(at_least_word);
                    let form = Form {
                        immediate,
                        ..Form::of(&[0x69], register)
                    };
                    self.emit(at_least_word, form, operand);
                }
            }
            20 => self.lea(),
            21 => self.vector(),
            _ => self.special(),
        }
    }

    fn mov_number(&mut self) {
        let register = self.target();
        self.note_written(register);
        let high = register >> 3;
        let opcode = 0xb8 | (register & 7);
        let mut bytes = if self.one_in(2) {
            vec![0x48 | high, opcode]
        } else if high == 1 {
            vec![0x41, opcode]
        } else {
            vec![opcode]
        };
        let count = if bytes[0] & 0xf8 == 0x48 { 8 } else { 4 };
        for _ in 0..count {
            bytes.push(self.byte());
        }
        self.push(bytes);
    }

    /// Any address, since it is not accessed.
    fn lea(&mut self) {
        let register = self.target();
        let operand = if self.one_in(2) {
            Operand {
                high: false,
                bytes: vec![0x05, 0, 0, 0, 0],
                // Or the function's own.
                place: Some(if self.one_in(4) {
                    self.address + self.random.below(24) as u64
                } else {
                    self.place(1)
                }),
                register: None,
            }
        } else {
            // A SIB byte, which has all forms in it.
            let mut bytes = vec![[0x04, 0x44, 0x84][self.random.below(3)], self.byte()];
            let distance = match (bytes[0] >> 6, bytes[1] & 7) {
                (0, 5) | (2, _) => 4,
                (1, _) => 1,
                _ => 0,
            };
            for _ in 0..distance {
                bytes.push(self.byte());
            }
            Operand {
                high: self.one_in(2),
                bytes,
                place: None,
                register: None,
            }
        };
        let size = [Size::Word, Size::Long, Size::Quad, Size::Quad][self.random.below(4)];
        self.emit(size, Form::of(&[0x8d], register), operand);
    }

    /// movdqu of the first registers; with VEX too where the processor has it.
    fn vector(&mut self) {
        let register = self.random.below(4) as u8;
        let operand = self.memory();
        let direction = [0x6f, 0x7f][self.random.below(2)];
        if !operand.high && std::is_x86_feature_detected!("avx") && self.one_in(2) {
            let opcode = [0xc5, 0xfa, direction];
            let mut bytes = opcode.to_vec();
            bytes.extend(operand.bytes);
            bytes[3] |= register << 3;
            let fix = operand
                .place
                .map_or(Fix::None, |place| Fix::Memory(place, 0));
            self.items.push((bytes, fix));
        } else {
            let opcode = [0x0f, direction];
            let form = Form {
                prefixes: &[0xf3],
                ..Form::of(&opcode, register)
            };
            // Noted as written though it is no general register: that does no harm.
            self.emit(Size::Long, form, operand);
        }
    }

    fn special(&mut self) {
        const PLAIN: [&[u8]; 15] = [
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
            &[0xf3, 0x90],
            &[0x48, 0x99],
            &[0x99],
            &[0x98],
            &[0xf5],
            &[0xf8],
            &[0xf9],
            &[0x9f],
            &[0x0f, 0xc8],
            &[0x49, 0x0f, 0xcb],
        ];
        match self.random.below(6) {
            // The thread pointer.
            0 => {
                let register = self.target();
                self.note_written(register);
                let rex = 0x48 | register >> 3 << 2;
                let modrm = (register & 7) << 3 | 4;
                self.push([0x64, rex, 0x8b, modrm, 0x25, 0, 0, 0, 0]);
            }
            // mov of rax from and to a whole address.
            1 => {
                let mut bytes = vec![0x48, [0xa1, 0xa3][self.random.below(2)]];
                bytes.extend(self.place(8).to_le_bytes());
                self.push(bytes);
            }
            // lock xadd, lock cmpxchg.
            2 => {
                let opcode = [0x0f, [0xc1, 0xb1][self.random.below(2)]];
                let (register, operand) = (self.target(), self.memory());
                let size = [Size::Word, Size::Long, Size::Quad][self.random.below(3)];
                let form = Form {
                    prefixes: &[0xf0],
                    ..Form::of(&opcode, register)
                };
                self.emit(size, form, operand);
            }
            // bt and kin with a number.
            3 => {
                let (number, operand) = (4 + self.random.below(4) as u8, self.write());
                let immediate = self.immediate(Size::Byte);
                let form = Form::group(&[0x0f, 0xba], number, immediate);
                self.emit(Size::Quad, form, operand);
            }
            _ => {
                let bytes = PLAIN[self.random.below(PLAIN.len())];
                self.push(bytes);
            }
        }
        // rax, rdx and r11 of the above, none of which is a pointer.
        debug_assert!(
            POINTERS
                .iter()
                .all(|pointer| ![0, 2, 11, RCX, RSP].contains(pointer))
        );
    }
}
