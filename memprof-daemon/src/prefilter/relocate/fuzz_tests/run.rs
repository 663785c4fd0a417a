//! Executes made functions, in children: a wrong one must not take the tests along.

use std::{arch::naked_asm, fmt::Write as _, ptr};

use super::{
    Counts, OUTCOMES, case,
    generate::{CALLBACK, DATA_BYTES},
};
use crate::unwind::testing::Random;

const PAGE_BYTES: u64 = 4096;
/// A function and what it is moved to lie this far apart at most.
const AREA_BYTES: u64 = 0x7800_0000;
/// At each place are two pages of code, the data and the callback's code.
const PLACE_BYTES: u64 = 4 * PAGE_BYTES;
const STACK_BYTES: usize = 4096;
/// Seconds after which a batch hangs.
const PATIENCE: u32 = 60;

/// What a function is called with, and what it leaves. `rsp` is the fourth register.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) registers: [u64; 16],
    pub(super) flags: u64,
    function: u64,
    stack: u64,
    host_stack: u64,
}

/// Calls `state.function` with all registers, flags and stack of `state`, and puts there what
/// it leaves.
///
/// # Safety
///
/// The function returns, and its stack and what it writes are its own.
#[unsafe(naked)]
unsafe extern "C" fn call(state: *mut State) {
    // Registers of the caller are on its own stack, which `host_stack` (152) holds. On the
    // function's stack lie the state and the function.
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + 152], rsp",
        "mov rsp, [rdi + 144]",
        "push rdi",
        "push [rdi + 136]",
        "push [rdi + 128]",
        "popfq",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        // Vector registers, of which generated code uses four.
        "pxor xmm0, xmm0",
        "pxor xmm1, xmm1",
        "pxor xmm2, xmm2",
        "pxor xmm3, xmm3",
        "mov rdi, [rdi + 56]",
        "call [rsp]",
        // Nothing up to pushfq changes the flags.
        "push rax",
        "mov rax, [rsp + 16]",
        "mov [rax + 8], rcx",
        "mov [rax + 16], rdx",
        "mov [rax + 24], rbx",
        "mov [rax + 32], rsp",
        "mov [rax + 40], rbp",
        "mov [rax + 48], rsi",
        "mov [rax + 56], rdi",
        "mov [rax + 64], r8",
        "mov [rax + 72], r9",
        "mov [rax + 80], r10",
        "mov [rax + 88], r11",
        "mov [rax + 96], r12",
        "mov [rax + 104], r13",
        "mov [rax + 112], r14",
        "mov [rax + 120], r15",
        "pop rbx",
        "mov [rax], rbx",
        "pushfq",
        "pop rbx",
        "mov [rax + 128], rbx",
        "mov rsp, [rax + 152]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// What a function left.
#[derive(PartialEq, Eq)]
pub(super) struct Left {
    state: State,
    data: Vec<u8>,
    stack: Vec<u8>,
}

impl Left {
    pub(super) fn difference(&self, other: &Self) -> String {
        let mut text = String::new();
        if self.state != other.state {
            let _ = writeln!(text, "{:x?}\n{:x?}", self.state, other.state);
        }
        for (what, a, b) in [
            ("data", &self.data, &other.data),
            ("stack", &self.stack, &other.stack),
        ] {
            for (at, (a, b)) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
                let _ = writeln!(text, "{what} {at:#x}: {a:02x} {b:02x}");
            }
        }
        text
    }
}

/// Memory that this process executes code in.
pub(super) struct Area {
    start: u64,
    stack: Vec<u8>,
    /// Where a call's state is: at the same address each time, which is on the stack.
    state: Box<State>,
}

impl Area {
    fn new() -> Self {
        // SAFETY: new memory, which nobody else knows.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                AREA_BYTES as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let area = Self {
            start: start as u64,
            stack: vec![0; STACK_BYTES],
            state: Box::default(),
        };
        for place in area.all() {
            // SAFETY: part of the memory above.
            let result = unsafe {
                libc::mprotect(
                    place as *mut libc::c_void,
                    PLACE_BYTES as usize,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                )
            };
            assert_eq!(result, 0);
        }
        area
    }

    /// The places where code can be: next to each other and far away.
    fn all(&self) -> [u64; 4] {
        let last = self.start + AREA_BYTES - PLACE_BYTES;
        [
            self.start,
            self.start + PLACE_BYTES,
            self.start + AREA_BYTES / 2,
            last,
        ]
    }

    /// Two of them.
    pub(super) fn places(&self, random: &mut Random) -> (u64, u64) {
        let all = self.all();
        let from = random.below(all.len());
        let to = (from + 1 + random.below(all.len() - 1)) % all.len();
        (all[from], all[to])
    }

    /// The data of functions at `place`.
    #[expect(clippy::unused_self, reason = "a place of this area")]
    pub(super) fn data(&self, place: u64) -> u64 {
        place + 2 * PAGE_BYTES
    }

    /// Writes into one of the places.
    pub(super) fn write(&mut self, address: u64, bytes: &[u8]) {
        let fits = |place: u64| {
            (place..place + PLACE_BYTES).contains(&address)
                && address + bytes.len() as u64 <= place + PLACE_BYTES
        };
        assert!(self.all().into_iter().any(fits));
        // SAFETY: within one of the places, by the line above, all of which are writable, and
        // no reference to them is kept.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
    }

    /// Executes the function at `address` whose data is at `data`.
    pub(super) fn run(
        &mut self,
        start: &State,
        address: u64,
        data: u64,
        mut contents: Random,
    ) -> Left {
        let random: Vec<u8> = (0..DATA_BYTES).map(|_| contents.below(256) as u8).collect();
        self.write(data, &random);
        let callback = data + DATA_BYTES;
        self.write(data + CALLBACK, &callback.to_le_bytes());
        // mov byte [rip + ...], 1, behind the pointer; ret
        let distance = (data + CALLBACK + 8).wrapping_sub(callback + 7) as u32;
        let mut code = vec![0xc6, 0x05];
        code.extend(distance.to_le_bytes());
        code.extend([1, 0xc3]);
        self.write(callback, &code);

        self.stack.fill(0x5a);
        *self.state = start.clone();
        self.state.function = address;
        self.state.stack = (self.stack.as_ptr() as u64 + STACK_BYTES as u64) & !15;
        // SAFETY: generated functions end, leave the stack as it was, and write to their data
        // and stack only. Should one not, it is in a child with nothing to lose.
        unsafe { call(&raw mut *self.state) };
        let mut left = vec![0; DATA_BYTES as usize];
        // SAFETY: the data of one of the places, which are readable.
        unsafe { ptr::copy_nonoverlapping(data as *const u8, left.as_mut_ptr(), left.len()) };
        Left {
            state: State {
                host_stack: 0,
                ..(*self.state).clone()
            },
            data: left,
            stack: self.stack.clone(),
        }
    }
}

/// What a child has to say, in memory that both have.
#[repr(C)]
struct Report {
    /// The case it is at.
    case: u64,
    counts: Counts,
    /// What it tries, and what is wrong.
    texts: [Text; 2],
}

#[repr(C)]
struct Text {
    length: usize,
    bytes: [u8; 16384],
}

impl Text {
    fn set(&mut self, text: &str) {
        self.length = text.len().min(self.bytes.len());
        self.bytes[..self.length].copy_from_slice(&text.as_bytes()[..self.length]);
    }

    fn get(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.length]).into_owned()
    }
}

/// Functions tried by one child.
pub(super) struct Batch;

impl Batch {
    /// Tries `cases` functions, and adds to `counts` what became of them.
    pub(super) fn run(seed: u64, cases: u64, counts: &mut Counts) {
        // SAFETY: new memory, zeroed, as large as a report, which has no invalid values.
        let report = unsafe {
            let memory = libc::mmap(
                ptr::null_mut(),
                size_of::<Report>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(memory, libc::MAP_FAILED);
            &mut *memory.cast::<Report>()
        };
        // SAFETY: the child goes on with a copy of this thread, uses the C library's
        // allocator, which is made for that, and leaves by _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: no handler is set for the alarm: it ends the child.
            unsafe { libc::alarm(PATIENCE) };
            let status = in_child(seed, cases, report);
            // SAFETY: nothing is left to be done in the child.
            unsafe { libc::_exit(status) };
        }
        let mut status = 0;
        // SAFETY: the child was made above and is waited for here only.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        let [tried, failure] = &report.texts;
        assert_eq!(
            status,
            0,
            "batch {seed}, case {}: {}\n{}",
            report.case,
            tried.get(),
            failure.get()
        );
        for (all, new) in counts.iter_mut().zip(report.counts) {
            *all += new;
        }
        // SAFETY: the memory mapped above, which nothing refers to any more.
        unsafe { libc::munmap(ptr::from_mut(report).cast(), size_of::<Report>()) };
    }
}

fn in_child(seed: u64, cases: u64, report: &mut Report) -> i32 {
    let mut random = Random(seed);
    let mut area = Area::new();
    for number in 0..cases {
        report.case = number;
        let [tried, failure] = &mut report.texts;
        match case(&mut random, &mut area, |text| tried.set(text)) {
            Ok(outcome) => {
                let index = OUTCOMES.iter().position(|each| *each == outcome);
                report.counts[index.unwrap()] += 1;
            }
            Err(what) => {
                failure.set(&what);
                return 1;
            }
        }
    }
    0
}
