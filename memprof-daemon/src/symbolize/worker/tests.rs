use std::time::Duration;

use super::*;
use crate::{
    address::FrameAddress,
    process::mapping::Mapping,
    symbolize::testing::{OwnMappings, outer_address},
};

fn stack(addresses: &[u64]) -> Arc<StackTrace> {
    Arc::new(StackTrace {
        frames: addresses
            .iter()
            .map(|&address| FrameAddress(AbsAddr(address)))
            .collect(),
        // Of a whole stack the last frame need not be behind a call.
        end: memprof_common::unwind::walk::StackEnd::Truncated,
        by_frame_pointer: false,
    })
}

fn is_outer(frame: &Frame) -> bool {
    match &frame.name {
        FrameName::Known(lines) => lines.last().unwrap().function.ends_with("outer_function"),
        FrameName::Unknown(_) => false,
    }
}

fn reason(frame: &Frame) -> Option<UnknownReason> {
    match frame.name {
        FrameName::Known(_) => None,
        FrameName::Unknown(reason) => Some(reason),
    }
}

/// Check that every stack gets its frames in order, known or not, and that an
/// empty one gets a frame that says so.
#[tokio::test]
async fn names_stacks_in_order() {
    let mappings = OwnMappings::read();
    let return_address = outer_address() + 1;
    let vdso = mappings.start_of("[vdso]").0 + 1;
    let handle = SymbolizeHandle::start(None).unwrap();
    let named = handle
        .symbolize(
            vec![
                stack(&[return_address, 1, vdso]),
                stack(&[]),
                stack(&[1, return_address]),
            ],
            Arc::new(mappings),
        )
        .await
        .unwrap();
    let [first, empty, last] = &named[..] else {
        panic!("{named:?}");
    };
    assert!(is_outer(&first[0]), "{first:?}");
    assert_eq!(first[0].address, AbsAddr(return_address - 1));
    assert!(first[0].file_offset.is_some() && first[0].mapping.is_some());
    assert_eq!(reason(&first[1]), Some(UnknownReason::Unmapped));
    assert_eq!(reason(&first[2]), Some(UnknownReason::Vdso));
    assert_eq!(empty.len(), 1);
    assert_eq!(reason(&empty[0]), Some(UnknownReason::NoStack));
    assert!(Arc::ptr_eq(&first[0], &last[1]));
}

/// Check that names are remembered across requests, and across processes that
/// hold the same file open separately.
#[test]
fn remembers_names() {
    let mut namer = Namer::new(None);
    let stacks = [stack(&[outer_address() + 1])];
    for _ in 0..3 {
        let named = namer.name(&stacks, &OwnMappings::read());
        assert!(is_outer(&named[0][0]), "{named:?}");
        assert_eq!(namer.cache.len(), 1);
        // Whatever is asked from now on comes from the cache.
        namer.resolver = Resolver::new();
    }
}

/// Fails in a way that only a bug can.
struct Broken;

impl MappingLookup for Broken {
    fn lookup(&self, _: AbsAddr) -> Option<Arc<Mapping>> {
        panic!("on purpose");
    }
}

/// Check that a panic while naming is an error to the one who asked, and that
/// the next request is answered.
#[tokio::test]
async fn survives_a_panic() {
    let handle = SymbolizeHandle::start(None).unwrap();
    let stacks = vec![stack(&[outer_address() + 1])];
    for _ in 0..3 {
        let answer = handle.symbolize(stacks.clone(), Arc::new(Broken));
        let answer = tokio::time::timeout(Duration::from_secs(60), answer).await;
        assert!(matches!(answer.unwrap(), Err(SymbolizeError::Failed)));
        let named = handle
            .symbolize(stacks.clone(), Arc::new(OwnMappings::read()))
            .await
            .unwrap();
        assert!(is_outer(&named[0][0]), "{named:?}");
    }
}
