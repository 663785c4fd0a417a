use aya::EbpfLoader;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::*;
use crate::probe::arena;

/// Check that the verifier is far from its limit of a million instructions in each program,
/// however stacks are walked: those of other kernels look at more, or less. Needs root, as
/// everything that loads BPF.
#[test]
fn verified_with_ease() {
    let bytes = aya::include_bytes_aligned!(env!("MEMPROF_BPF_OBJECT"));
    let slabs = arena::create_slabs().expect("run as root");
    let others = [("ARENA", slabs.fd().as_fd())];
    for walker in Walker::ALL {
        let has_loop = u8::from(walker == Walker::Loop);
        let ebpf = EbpfLoader::new()
            .override_global("HAS_LOOP", &has_loop, true)
            .load(bytes)
            .unwrap();
        let object = Object::parse(bytes, &ebpf, &others).unwrap();
        let names = ProgramSet::Tracing(walker).names(ProbeMode::Perf);
        let mut programs = vec![names.free_entry, names.alloc_entry];
        programs.extend(names.alloc_return);
        programs.extend(names.site);
        programs.extend(
            [names.placed_entry, names.placed_free]
                .into_iter()
                .flatten(),
        );
        programs.extend(
            [names.placed_return, names.placed_exit]
                .into_iter()
                .flatten(),
        );
        if walker == Walker::TailCalls {
            programs.push(tail_calls::WALK_ON);
        }
        for name in programs {
            let program = object.load(name, AttachType::Perf).unwrap();
            let verified = told(&program, VERIFIED).unwrap();
            println!("{walker}: {name}: {verified}");
            assert!((1..500_000).contains(&verified), "{name}: {verified}");
        }
    }
}

/// Check that the programs which walk in a loop have the stack for it. Kernels before Linux 6.13
/// give 512 bytes to a program and what it calls, each a multiple of 32
/// (`check_max_stack_depth_subprog` in kernel/bpf/verifier.c); newer ones more. `alloc_session`
/// is for these alone.
#[test]
fn stack_is_enough() {
    let bytes = aya::include_bytes_aligned!(env!("MEMPROF_BPF_OBJECT"));
    let file = object::File::parse(bytes).unwrap();
    let stack_of = |wanted: &str| {
        // Programs have their own names; that of the step is mangled, and ends with it.
        let is_wanted = |name: &str| name == wanted || name.ends_with(wanted);
        let symbol = file
            .symbols()
            .find(|symbol| symbol.size() > 0 && symbol.name().is_ok_and(is_wanted))
            .unwrap_or_else(|| panic!("no {wanted}"));
        let section = symbol.section_index().unwrap();
        let section = file.section_by_index(section).unwrap();
        let code = section.data_range(symbol.address(), symbol.size());
        stack_bytes(code.unwrap().unwrap()).next_multiple_of(32)
    };
    let step = stack_of("loop_step");
    for name in [
        "alloc_return",
        "prefilter_site",
        "placed_return",
        "placed_exit",
    ] {
        let own = stack_of(name);
        assert!(own > 32 && own + step <= 512, "{name}: {own} + {step}");
    }
}

/// The lowest place of the stack that `code` writes, reads, or takes the address of.
fn stack_bytes(code: &[u8]) -> u64 {
    const FRAME: u8 = 10;
    // `bpf_insn` in include/uapi/linux/bpf.h: classes of loads and stores, and
    // `BPF_ALU64 | BPF_MOV | BPF_X`, `BPF_ALU64 | BPF_ADD | BPF_K`.
    const LOAD: u8 = 1;
    const STORES: [u8; 2] = [2, 3];
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let mut lowest = 0;
    let mut holds_frame = [false; 16];
    for instruction in code.chunks_exact(8) {
        let (code, registers) = (instruction[0], instruction[1]);
        let (to, from) = (registers & 15, registers >> 4);
        let offset = i64::from(i16::from_le_bytes([instruction[2], instruction[3]]));
        let number = i32::from_le_bytes(*instruction.last_chunk().unwrap());
        let class = code & 7;
        if class == LOAD && from == FRAME || STORES.contains(&class) && to == FRAME {
            lowest = lowest.min(offset);
        }
        if code == ADD && holds_frame[usize::from(to)] {
            lowest = lowest.min(i64::from(number));
        }
        holds_frame[usize::from(to)] = code == MOVE && from == FRAME;
    }
    lowest.unsigned_abs()
}
