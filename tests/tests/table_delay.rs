//! How long stacks through code that was mapped a moment ago are cut.

use memprof_tests::{End, Record, TempDir, targets::target_with};

/// At least a millisecond from one to the next.
const BLOCKS: u64 = 2000;

/// Far beyond the 100 ms that are the aim, which a busy machine can miss.
const MOST_CUT: u64 = 1000;

/// Check that from the first allocation through a library on, its stacks are whole soon;
/// until then they are cut in it, marked and counted. Says how long it took.
#[test]
fn whole_soon_after_the_first() {
    let flags = ["-O2", "-fomit-frame-pointer"];
    let library = target_with(
        "replaced_plugin.c",
        &[&flags[..], &["-shared", "-fPIC"]].concat(),
    );
    let target = target_with("mapped_late.c", &flags);
    let dir = TempDir::new("delay");
    let blocks = BLOCKS.to_string();
    let mut command = target.command(&[library.text(), &blocks]);
    let recorded = Record::every_allocation(&dir).attach(&mut command, End::Interrupt);

    let process = recorded.process();
    let (mut cut, mut whole) = (0, 0);
    for stack in process.with_leaf("leaf") {
        let objects = stack.totals().alloc_objects;
        if stack.truncated {
            assert_eq!(stack.names(), ["leaf", "first_inner"], "{}", stack.end);
            cut += objects;
        } else {
            assert_eq!(
                stack.names()[..4],
                ["leaf", "first_inner", "plugin_call", "main"]
            );
            assert_eq!(stack.end, "complete");
            whole += objects;
        }
    }
    println!("stacks were cut for some {cut} ms after the library was loaded");
    assert_eq!(cut + whole, BLOCKS);
    assert!(cut <= MOST_CUT, "{cut} of {BLOCKS} stacks were cut");
    assert!(process.loss("cut_unknown_mapping") >= cut);
}
