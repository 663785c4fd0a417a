//! Made unwind information, for tests.

use std::{env, time::Duration};

use super::{CompileError, Table, rows, section, table};
use crate::{
    address::{FileOffset, VirtOffset},
    process::elf::{ElfLayout, Segment},
};

/// A generator that needs no crate; the same numbers each time.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

/// How long a test with made input is to run, if the user says.
pub(crate) fn fuzz_time() -> Option<Duration> {
    let seconds = env::var("MEMPROF_FUZZ_SECONDS").ok()?;
    Some(Duration::from_secs(
        seconds.parse().expect("a number of seconds"),
    ))
}

/// A seed that a failure tells: the time, unless `MEMPROF_FUZZ_SEED` says.
pub(crate) fn random() -> Random {
    let seed = env::var("MEMPROF_FUZZ_SEED").map_or_else(
        |_| {
            let now = std::time::UNIX_EPOCH.elapsed().unwrap();
            now.as_nanos() as u64 | 1
        },
        |text| text.parse().expect("a number"),
    );
    println!("MEMPROF_FUZZ_SEED={seed}");
    Random(seed)
}

impl Random {
    /// A number below `bound`, or 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

fn layout() -> ElfLayout {
    let mut layout = ElfLayout::default();
    layout.segments.push(Segment {
        file_offset: FileOffset(0),
        address: VirtOffset(0x1000),
        file_size: 0x18_0000,
        executable: true,
    });
    layout
}

/// Compiles a section of a file whose code is at 0x1000.
pub(super) fn compile_section(bytes: &[u8], kind: section::Kind) -> Result<Table, CompileError> {
    let bytes = section::Bytes {
        bytes: bytes.to_vec(),
        address: 0x20_0000,
        kind,
    };
    let code = rows::Code::of(&layout())?;
    table::build(&code, rows::collect(&bytes, &code)?)
}

/// A header with these instructions, and functions at 0x1000, 0x1100...
pub(super) fn frames(header_code: &[u8], functions: usize, function_code: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let entry = |bytes: &mut Vec<u8>, body: &[u8]| {
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
    };
    // Version 1, no augmentation, alignments 1 and -8, return address in 16.
    let mut header = vec![0, 0, 0, 0, 1, 0, 1, 0x78, 16];
    // CFA = rsp + 8, return address below.
    header.extend([0x0c, 7, 8, 0x90, 1]);
    header.extend(header_code);
    entry(&mut bytes, &header);
    for number in 0..functions {
        let mut function = Vec::new();
        function.extend((bytes.len() as u32 + 4).to_le_bytes());
        function.extend((0x1000 + number as u64 * 0x100).to_le_bytes());
        function.extend(0x100_u64.to_le_bytes());
        function.extend(function_code);
        entry(&mut bytes, &function);
    }
    bytes.extend([0; 4]);
    bytes
}

/// Changes bits, bytes or lengths, doubles, cuts out or cuts off a part.
pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let place = random.below(bytes.len());
    match random.below(6) {
        0 => bytes[place] ^= 1 << random.below(8),
        1 => bytes[place] = random.below(256) as u8,
        2 => {
            let extreme = [0_u32, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff];
            let value = extreme[random.below(extreme.len())].to_le_bytes();
            let end = (place + 4).min(bytes.len());
            bytes[place..end].copy_from_slice(&value[..end - place]);
        }
        3 => bytes.truncate(place),
        4 => {
            let end = (place + random.below(32)).min(bytes.len());
            let part = bytes[place..end].to_vec();
            let at = random.below(bytes.len());
            bytes.splice(at..at, part);
        }
        _ => {
            let end = (place + random.below(32)).min(bytes.len());
            bytes.drain(place..end);
        }
    }
}
