//! Stacks from every instruction: of calls through linkage tables, of the vDSO, of the C
//! library, of prologues and epilogues.

use std::{collections::BTreeMap, fs};

use memprof_tests::{Record, Stack, TempDir, profile::Frame, targets::target_with};

/// A frame's place: file and place in it, or the address itself of what is in no file.
type Place = (String, u64);

/// What the target has written down.
struct Truth {
    /// How often each stack was.
    stacks: BTreeMap<Vec<Place>, u64>,
    /// Instructions in the vDSO, in linkage tables of the program, in each.
    vdso: u64,
    linkage: u64,
    steps: u64,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("a number")
}

/// `linkage` says what of the program's file is a linkage table.
fn read_truth(text: &str, linkage: &[(u64, u64)]) -> Truth {
    let mappings: Vec<(u64, u64, u64, &str)> = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.strip_prefix("map ")?.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let (_permissions, offset) = (fields.next()?, hex(fields.next()?));
            Some((hex(start), hex(end), offset, fields.nth(2)?))
        })
        .collect();
    let place = |address: u64| -> Place {
        let (start, _, offset, path) = mappings
            .iter()
            .find(|(start, end, ..)| (*start..*end).contains(&address))
            .unwrap_or_else(|| panic!("{address:#x} is not mapped"));
        if path.starts_with('/') {
            ((*path).to_owned(), address - start + offset)
        } else {
            ((*path).to_owned(), address)
        }
    };
    let mut truth = Truth {
        stacks: BTreeMap::new(),
        vdso: 0,
        linkage: 0,
        steps: 0,
    };
    for line in text.lines() {
        let Some(stack) = line.strip_prefix("stack ") else {
            continue;
        };
        let stack: Vec<Place> = stack.split_whitespace().map(|at| place(hex(at))).collect();
        let (path, at) = &stack[0];
        truth.steps += 1;
        truth.vdso += u64::from(path == "[vdso]");
        truth.linkage += u64::from(
            path.contains("/stepped-")
                && linkage
                    .iter()
                    .any(|(start, end)| (*start..*end).contains(at)),
        );
        *truth.stacks.entry(stack).or_default() += 1;
    }
    truth
}

/// Where a file's linkage tables are in it.
fn linkage_tables(path: &str) -> Vec<(u64, u64)> {
    use object::{Object as _, ObjectSection as _};
    let bytes = fs::read(path).expect("the target");
    let file = object::File::parse(&*bytes).expect("an ELF file");
    file.sections()
        .filter(|section| section.name().is_ok_and(|name| name.starts_with(".plt")))
        .filter_map(|section| section.file_range())
        .map(|(start, size)| (start, start + size))
        .collect()
}

fn place(frame: &Frame) -> Place {
    match frame.file_offset {
        Some(offset) => (frame.module.clone().expect("a module"), offset),
        None => {
            let address = frame.address.as_deref().expect("an address");
            let module = frame.module.clone().unwrap_or_default();
            (module, hex(address.trim_start_matches("0x")))
        }
    }
}

/// A stack from the interrupted instruction on, if it is of the handler. Functions that
/// the compiler has put into others are no frames.
fn interrupted(stack: &Stack) -> Option<Vec<Place>> {
    let frames = stack.frames[1..].iter().filter(|frame| !frame.inlined);
    stack.frames[0]
        .is("on_step")
        .then(|| frames.skip(1).map(place).collect())
}

/// Steps through the target as it is linked with `flags`. Every stack must be one that
/// was, as often as it was, whole; or cut in the loader's function that binds lazily,
/// which is the only one that memprof cannot leave.
fn step(flags: &[&str], lazy: bool) {
    let flags = [&["-g0", "-O2", "-fomit-frame-pointer"], flags].concat();
    let target = target_with("stepped.c", &flags);
    let dir = TempDir::new("steps");
    let file = dir.file("truth");
    // The prefilter adds instructions of its own to step through, which no table describes.
    let record = Record::every_allocation(&dir).options(&["--probe", "uprobe"]);
    let recorded = record.command(&target, &[&file]);
    let process = recorded.process();
    let text = fs::read_to_string(&file).expect("the target's account");
    let mut truth = read_truth(&text, &linkage_tables(target.text()));

    let (mut complete, mut cut) = (0, 0);
    let mut cut_at: Vec<u64> = Vec::new();
    let mut cut_stacks: BTreeMap<Vec<Place>, u64> = BTreeMap::new();
    for stack in &process.stacks {
        let Some(places) = interrupted(stack) else {
            continue;
        };
        if stack.end == "complete" {
            complete += stack.alloc_objects;
            let expected = truth.stacks.remove(&places);
            assert_eq!(
                expected,
                Some(stack.alloc_objects),
                "{flags:?}: no such stack: {}\n{places:x?}",
                stack.path()
            );
            assert!(!stack.by_frame_pointer, "{}", stack.path());
            assert!(stack.names().contains(&"main"), "{}", stack.path());
        } else {
            cut += stack.alloc_objects;
            assert_eq!(stack.end, "unsupported_rule", "{flags:?}: {places:x?}");
            let (path, at) = places.last().expect("a frame");
            assert!(path.contains("/ld-linux"), "{flags:?}: {path}");
            cut_at.push(*at);
            *cut_stacks.entry(places).or_default() += stack.alloc_objects;
        }
    }
    // What is left was cut, and is as it was until there; behind it comes the program.
    for (stack, count) in &truth.stacks {
        let length = (1..stack.len())
            .find(|&length| cut_stacks.contains_key(&stack[..length]))
            .unwrap_or_else(|| panic!("{flags:?}: missing: {stack:x?}"));
        if let Some(left) = cut_stacks.get_mut(&stack[..length]) {
            *left -= count;
        }
        assert!(stack[length].0.contains("/stepped-"), "{stack:x?}");
    }
    assert!(cut_stacks.values().all(|left| *left == 0), "{flags:?}");
    // One function.
    cut_at.sort_unstable();
    if let [first, .., last] = cut_at[..] {
        assert!(last - first < 512, "{flags:?}: {cut_at:x?}");
    }
    println!(
        "{flags:?}: {} steps, {} of them in linkage tables and {} in the vDSO: {complete} \
         complete, {cut} cut behind the binding of a function",
        truth.steps, truth.linkage, truth.vdso
    );
    assert_eq!(complete + cut, truth.steps);
    assert_eq!(process.loss("cut_unsupported_rule"), cut);
    assert!(truth.vdso > 40, "{}", truth.vdso);
    assert!(truth.linkage >= 10, "{}", truth.linkage);
    assert!(complete > 2000, "{complete}");
    assert_eq!(cut > 500, lazy, "{cut}");
}

/// Check that the stack is right, whichever instruction is interrupted, in a program whose
/// functions are bound at their first call.
#[test]
fn lazy() {
    step(&["-no-pie", "-Wl,-z,lazy"], true);
}

/// Check the same where the linkage table is of two parts, for processors that check
/// where jumps lead.
#[test]
fn two_tables() {
    let flags = ["-pie", "-fcf-protection", "-Wl,-z,lazy,-z,ibtplt"];
    step(&flags, true);
}

/// Check the same where all is bound at the start: then every single stack is whole.
#[test]
fn bound_at_start() {
    step(&["-pie", "-Wl,-z,now"], false);
}
