use aya::EbpfLoader;

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
