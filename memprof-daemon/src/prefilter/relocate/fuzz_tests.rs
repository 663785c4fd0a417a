//! Random functions, executed as they are and with their first instructions moved: both must
//! leave the same registers, flags, memory and stack, and pass the same places.
//! `MEMPROF_FUZZ_SECONDS` says for how long; a fixed number otherwise.

mod generate;
mod run;

use std::time::Instant;

use self::{
    generate::{DATA_BYTES, Generator},
    run::{Area, Batch, State},
};
use super::{Refusal, displace, displace_behind_first};
use crate::unwind::testing::{Random, fuzz_time, random};

/// Functions tried without a time.
const CASES: u64 = 20_000;
/// Functions tried by one child.
const BATCH: u64 = 500;

/// What can become of a function.
const OUTCOMES: [&str; 15] = [
    "moved",
    "moved but the first",
    "no function",
    "not to be executed",
    "too short",
    "leaves",
    "jump target",
    "loops",
    "call",
    "not movable",
    "breakpoint",
    "refers to itself",
    "crosses a page",
    "out of reach",
    "not encoded",
];

/// How often it did.
type Counts = [u64; OUTCOMES.len()];

fn name(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::TooShort { .. } => "too short",
        Refusal::Leaves => "leaves",
        Refusal::JumpTarget(_) => "jump target",
        Refusal::Loops(_) => "loops",
        Refusal::Call => "call",
        Refusal::NotMovable(_) => "not movable",
        Refusal::Breakpoint(_) => "breakpoint",
        Refusal::RefersToItself(_) => "refers to itself",
        Refusal::CrossesPage(_) => "crosses a page",
        Refusal::OutOfReach { .. } => "out of reach",
        Refusal::Encoding => "not encoded",
    }
}

/// Registers with numbers of all sizes, and pointers to the data.
fn registers(random: &mut Random, data: u64) -> State {
    // Carry, parity, adjust, zero, sign, overflow; interrupts are always on.
    const FLAGS: u64 = 0x8d5;
    let mut number = || {
        let wide = random.below(1 << 32) as u64 | (random.below(1 << 32) as u64) << 32;
        match random.below(6) {
            0 => wide & 0xff,
            1 => u64::MAX - (wide & 0xff),
            2 => 1 << (wide % 64),
            _ => wide,
        }
    };
    let mut state = State::default();
    for register in &mut state.registers {
        *register = number();
    }
    state.flags = number() & FLAGS | 0x202;
    // Loops at the entry count by it.
    state.registers[1] = 1 + number() % 20;
    for pointer in generate::POINTERS {
        state.registers[usize::from(pointer)] = data + DATA_BYTES / 2 - 300 + number() % 600;
    }
    state
}

/// Tries one function: what became of it, or what differs. What is tried is told before it is
/// executed, in case it does not return.
fn case(
    random: &mut Random,
    area: &mut Area,
    mut tell: impl FnMut(&str),
) -> Result<&'static str, String> {
    let place = match random.below(40) {
        0 => 4080 + random.below(16),
        1..10 => random.below(4096),
        _ => random.below(256) * 16,
    };
    let (from, to) = area.places(random);
    let address = from + place as u64;
    let data = area.data(from);
    let Some(function) = Generator::new(random, address, data).function() else {
        return Ok("no function");
    };
    let start = registers(random, data);
    let how = [displace, displace_behind_first][random.below(2)];
    let displaced = match how(&function.bytes, address) {
        Ok(displaced) => displaced,
        Err(refusal) => return Ok(name(refusal)),
    };
    if let Some(poison) = function.poison {
        // It is refused if it would have been moved.
        let moved = displaced.end() - address;
        if (poison as u64) < moved {
            return Err(format!("moved {:02x?}", function.bytes));
        }
        return Ok("not to be executed");
    }
    let to = to + random.below(4000) as u64;
    let undo = displaced.undo();
    let moved = displaced
        .relocate(to + undo.len() as u64)
        .map_err(|refusal| format!("{refusal}: {:02x?}", function.bytes))?;
    let code = [undo, moved.bytes].concat();
    tell(&format!(
        "at {address:#x}, moved to {to:#x}:\n{:02x?}\n{code:02x?}\n{start:x?}",
        function.bytes
    ));
    let contents = Random(random.below(usize::MAX) as u64 | 1);
    area.write(address, &function.bytes);
    let original = area.run(&start, address, data, contents.clone());
    area.write(to, &code);
    // What must not be executed any more, traps.
    let mut jump = vec![0xcc; displaced.bytes.len()];
    jump[0] = 0xe9;
    jump[1..5].copy_from_slice(&(to.wrapping_sub(displaced.address + 5) as u32).to_le_bytes());
    area.write(displaced.address, &jump);
    let moved = area.run(&start, address, data, contents);
    if original == moved {
        let stays = displaced.lead.is_some();
        return Ok(if stays {
            "moved but the first"
        } else {
            "moved"
        });
    }
    Err(original.difference(&moved))
}

/// Check that functions with their first instructions moved do the same, or are refused.
#[test]
fn same_as_the_original() {
    let mut random = random();
    let begin = Instant::now();
    let mut counts = Counts::default();
    let mut done = 0;
    while fuzz_time().map_or(done < CASES, |time| begin.elapsed() < time) {
        let seed = random.below(usize::MAX) as u64 | 1;
        Batch::run(seed, BATCH, &mut counts);
        done += BATCH;
    }
    let named = OUTCOMES.into_iter().zip(counts);
    let shown: Vec<String> = named
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    println!("{done} functions: {}", shown.join(", "));
    let count = |name: &str| counts[OUTCOMES.iter().position(|each| *each == name).unwrap()];
    assert!(count("moved") + count("moved but the first") > done / 2);
    // What is made never is that, or rarely.
    let rare = ["no function", "too short", "out of reach", "not encoded"];
    for outcome in OUTCOMES.iter().filter(|outcome| !rare.contains(outcome)) {
        assert!(count(outcome) > 0, "never {outcome}");
    }
}
