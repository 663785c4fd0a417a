use std::{fs, os::unix::fs::FileExt as _, process::Command};

use super::*;
use crate::process::debug_info::DebugInfo;
use crate::symbolize::testing::{
    OUTER_LINE, OwnMappings, mapped_file, open, outer_address, own_path,
};

fn outer_offset() -> FileOffset {
    OwnMappings::read().file_offset(outer_address())
}

fn resolve_one(file: &Arc<MappedFile>, offset: FileOffset) -> FrameName {
    let mut names = resolve(file, &[offset]);
    assert_eq!(names.len(), 1);
    names.remove(0)
}

fn resolve(file: &Arc<MappedFile>, offsets: &[FileOffset]) -> Vec<FrameName> {
    match Source::of(file, None) {
        Some(source) => Resolver::new().resolve(&source, offsets),
        None => vec![FrameName::Unknown(UnknownReason::FileUnreadable); offsets.len()],
    }
}

#[track_caller]
fn assert_names_outer(name: &FrameName, with_line: bool) {
    let FrameName::Known(lines) = name else {
        panic!("{name:?}");
    };
    let outer = lines.last().unwrap();
    assert!(
        outer.function.ends_with("::testing::outer_function"),
        "{outer:?}"
    );
    if with_line {
        assert!(
            outer
                .file
                .as_ref()
                .unwrap()
                .ends_with("symbolize/testing.rs"),
            "{outer:?}"
        );
        assert!(
            (OUTER_LINE - 1..=OUTER_LINE + 2).contains(&outer.line.unwrap()),
            "{outer:?}"
        );
    } else {
        assert_eq!((&outer.file, outer.line), (&None, None));
    }
}

/// Check that a function of this program gets its demangled name, file and line.
#[test]
fn names_a_function() {
    let name = resolve_one(&open(&own_path()), outer_offset());
    assert_names_outer(&name, true);
}

/// Check that inlined functions come leaf first, the containing one last, each
/// with the line that executes in it.
#[test]
fn inlined_functions_are_leaf_first() {
    let start = outer_offset();
    let offsets: Vec<_> = (start.0..start.0 + 256).map(FileOffset).collect();
    let names = resolve(&open(&own_path()), &offsets);
    let nested: Vec<_> = names
        .iter()
        .filter_map(|name| match name {
            FrameName::Known(lines) if lines.len() >= 3 => Some(lines),
            _ => None,
        })
        .filter(|lines| lines[lines.len() - 1].function.ends_with("outer_function"))
        .collect();
    assert!(!nested.is_empty(), "{names:?}");
    for lines in nested {
        let [.., inner, middle, outer] = &lines[..] else {
            unreachable!("at least three, as filtered");
        };
        assert!(inner.function.contains("inner_function"), "{lines:?}");
        assert!(middle.function.contains("middle_function"), "{lines:?}");
        assert_eq!(outer.line, Some(OUTER_LINE + 1), "{lines:?}");
        assert_eq!(middle.line, Some(OUTER_LINE + 6), "{lines:?}");
        assert_eq!(inner.line, Some(OUTER_LINE + 11), "{lines:?}");
    }
}

/// Check that a file is named through its descriptor, also when it is deleted
/// and its path is another file.
#[test]
fn names_a_deleted_and_replaced_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    fs::copy(own_path(), &path).unwrap();
    let file = open(&path);
    fs::remove_file(&path).unwrap();
    assert_names_outer(&resolve_one(&file, outer_offset()), true);
    fs::write(&path, "another").unwrap();
    assert_names_outer(&resolve_one(&file, outer_offset()), true);
}

/// Check that a stripped file gets its lines from its debug file, that a damaged one costs
/// the lines only, not the names, and that its `.gnu_debuglink` is not followed here.
#[test]
fn a_debug_file_and_a_link() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    let debug = directory.path().join("program.debug");
    let objcopy = |arguments: &[&str]| {
        let status = Command::new("objcopy")
            .args(arguments)
            .current_dir(directory.path())
            .status();
        assert!(status.unwrap().success(), "{arguments:?}");
    };
    fs::copy(own_path(), &path).unwrap();
    objcopy(&["--only-keep-debug", "program", "program.debug"]);
    objcopy(&[
        "--strip-debug",
        "--add-gnu-debuglink=program.debug",
        "program",
    ]);
    let offset = outer_offset();
    let named = |debug_file| resolve_one(&with_debug_file(&path, debug_file), offset);
    assert_names_outer(&named(Some(&debug)), true);
    assert_names_outer(&named(None), false);

    let mut damaged = fs::read(&debug).unwrap();
    damaged.truncate(damaged.len() / 2);
    fs::write(&debug, damaged).unwrap();
    assert_names_outer(&named(Some(&debug)), false);

    // Where the link leads now, a reader would wait for ever.
    fs::remove_file(&debug).unwrap();
    nix::unistd::mkfifo(&debug, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_names_outer(&named(None), false);
}

/// Check that a file with no symbol there says so.
#[test]
fn no_symbol() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    fs::copy(own_path(), &path).unwrap();
    let status = Command::new("strip").arg(&path).status();
    assert!(status.unwrap().success());
    let names = resolve(
        &open(&path),
        &[outer_offset(), FileOffset(u64::MAX), FileOffset(0)],
    );
    assert_eq!(
        names,
        vec![FrameName::Unknown(UnknownReason::NoSymbol); names.len()]
    );
}

/// Check that what is no ELF file, or no file, says which.
#[test]
fn not_an_elf_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let unknown = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        resolve_one(&open(&path), FileOffset(0x1000))
    };
    for content in [&b""[..], b"\x7fEL", b"#!/bin/sh\n", &[0xff; 8192]] {
        assert_eq!(unknown(content), FrameName::Unknown(UnknownReason::NotElf));
    }
    for file in [
        mapped_file(Path::new("/gone"), None),
        open(directory.path()),
        open(Path::new("/dev/zero")),
    ] {
        assert_eq!(
            resolve_one(&file, FileOffset(0)),
            FrameName::Unknown(UnknownReason::FileUnreadable)
        );
    }
}

/// Check that ELF files cut short give reasons, not panics.
#[test]
fn truncated_elf_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    fs::copy(own_path(), &path).unwrap();
    let offset = outer_offset();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let whole = file.metadata().unwrap().len();
    for size in [
        whole - 1,
        whole - 4096,
        whole / 2,
        4096,
        65,
        64,
        63,
        17,
        5,
        4,
    ] {
        file.set_len(size).unwrap();
        let name = resolve_one(&open(&path), offset);
        if size < whole / 2 {
            assert!(matches!(name, FrameName::Unknown(_)), "{size}: {name:?}");
        }
    }
}

/// Check that damage anywhere in an ELF file gives names or reasons, never a
/// panic: a fixed seed, each copy damaged in ten places.
#[test]
fn damaged_elf_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    let original = fs::read("/bin/sh").unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = move |below: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % below
    };
    fs::write(&path, &original).unwrap();
    let offsets: Vec<_> = (0..32).map(|page| FileOffset(page * 4096)).collect();
    for round in 0..200 {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&original, 0).unwrap();
        // Headers are small and what parsing trusts most: half of it goes there.
        for hit in 0..10 {
            let place = if hit % 2 == 0 {
                draw(1024)
            } else {
                draw(original.len())
            };
            let place = if place < 4 { place + 4 } else { place };
            file.write_all_at(&[draw(256) as u8], place as u64).unwrap();
        }
        let names = resolve(&open(&path), &offsets);
        assert_eq!(names.len(), offsets.len(), "{round}");
    }
}

/// A C program as three files: with everything, stripped, and what was stripped from it.
fn split_program(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let file = |name: &str| dir.join(name);
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        let status = Command::new(program).args(arguments).status();
        assert!(status.expect(program).success(), "{program} {arguments:?}");
    };
    let source = "__attribute__((noinline)) static int hidden_function(int n) {\n\
                  \x20   return n * 3 + (n >> 1);\n}\n\
                  int main(int n, char **v) { return hidden_function(n) + hidden_function(!v); }\n";
    fs::write(file("program.c"), source).unwrap();
    let (whole, stripped, debug) = (file("whole"), file("stripped"), file("debug"));
    let flag = |text: &'static str| std::ffi::OsStr::new(text);
    let c = file("program.c");
    run(
        "cc",
        &[
            flag("-g"),
            flag("-O1"),
            flag("-Wl,--build-id"),
            flag("-o"),
            whole.as_os_str(),
            c.as_os_str(),
        ],
    );
    run(
        "objcopy",
        &[
            flag("--only-keep-debug"),
            whole.as_os_str(),
            debug.as_os_str(),
        ],
    );
    run(
        "objcopy",
        &[flag("--strip-all"), whole.as_os_str(), stripped.as_os_str()],
    );
    (whole, stripped, debug)
}

/// The place of `hidden_function`, by the symbols of the whole file.
fn hidden_offset(whole: &Path) -> FileOffset {
    let nm = Command::new("nm").arg(whole).output().unwrap();
    let text = String::from_utf8(nm.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.ends_with(" hidden_function"))
        .unwrap();
    let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let layout = ElfLayout::read(&File::open(whole).unwrap()).unwrap();
    layout
        .code_offset(crate::address::VirtOffset(address))
        .unwrap()
}

fn with_debug_file(path: &Path, debug_file: Option<&PathBuf>) -> Arc<MappedFile> {
    Arc::new(MappedFile {
        path: path.to_owned(),
        device: 0,
        inode: 0,
        build_id: None,
        file: Some(File::open(path).unwrap()),
        debug_info: debug_file.map_or(DebugInfo::Missing, |path| {
            DebugInfo::Separate(File::open(path).unwrap())
        }),
    })
}

/// Check that a stripped file has no name for the function, and that its debug file, held
/// open and by now without a path, gives name and line.
#[test]
fn names_by_a_debug_file() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, stripped, debug) = split_program(dir.path());
    let offset = hidden_offset(&whole);
    let name = resolve_one(&with_debug_file(&stripped, None), offset);
    assert!(matches!(name, FrameName::Unknown(_)), "{name:?}");
    let file = with_debug_file(&stripped, Some(&debug));
    fs::remove_file(debug).unwrap();
    let FrameName::Known(lines) = resolve_one(&file, offset) else {
        panic!("no name");
    };
    assert_eq!(lines.last().unwrap().function, "hidden_function");
    assert!(lines.last().unwrap().line.is_some(), "{lines:?}");
}

/// Check names from `.gnu_debugdata`, and that a damaged one, and one that claims to be
/// far larger than it is, are no more than missing.
#[test]
fn names_by_mini_debug_info() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    let (whole, stripped, debug) = split_program(dir.path());
    let offset = hidden_offset(&whole);
    let mut writer =
        lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(6)).unwrap();
    writer.write_all(&fs::read(debug).unwrap()).unwrap();
    let mut packed = writer.finish().unwrap();
    let mini = |bytes: &[u8]| {
        let (data, out) = (dir.path().join("data"), dir.path().join("mini"));
        fs::write(&data, bytes).unwrap();
        let status = Command::new("objcopy")
            .arg(format!("--add-section=.gnu_debugdata={}", data.display()))
            .args([&stripped, &out])
            .status();
        assert!(status.unwrap().success());
        resolve_one(&with_debug_file(&out, None), offset)
    };
    let FrameName::Known(lines) = mini(&packed) else {
        panic!("no name");
    };
    assert_eq!(lines.last().unwrap().function, "hidden_function");
    let middle = packed.len() / 2;
    packed[middle] ^= 0xff;
    assert!(matches!(mini(&packed), FrameName::Unknown(_)));
    packed.truncate(middle);
    assert!(matches!(mini(&packed), FrameName::Unknown(_)));
    assert!(matches!(mini(b""), FrameName::Unknown(_)));
}
