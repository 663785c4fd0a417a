use std::{fmt::Write as _, fs, os::unix::fs::FileExt as _, path::Path, process::Command};

use super::*;
use crate::{
    address::VirtOffset,
    probe::{
        find::{Finder, tests::mapped},
        point::real,
    },
    process::{files::FileStore, maps::read_mappings},
};

fn module(path: &Path) -> AllocatorModule {
    assert!(path.exists(), "needs {}", path.display());
    Finder::default()
        .find(&mapped(path))
        .unwrap_or_else(|| panic!("{} is no allocator", path.display()))
}

/// Reads what a process that has just loaded the module has.
fn as_in_file(module: &AllocatorModule, bias: u64) -> impl FnMut(u64, &mut [u8]) -> io::Result<()> {
    let file = module.file.file.as_ref().unwrap().try_clone().unwrap();
    let layout = ElfLayout::read(&file).unwrap();
    move |address, bytes: &mut [u8]| {
        let offset = layout.code_offset(VirtOffset(address.wrapping_sub(bias)));
        file.read_exact_at(bytes, offset.ok_or(io::ErrorKind::NotFound)?.0)
    }
}

const BIAS: u64 = 0x7fff_1234_5000;

fn hooks(module: &AllocatorModule) -> Result<Vec<Hook>, HookError> {
    hooks_of(module, BIAS, as_in_file(module, BIAS))
}

/// A line for each function, and how many are refused.
fn table(module: &AllocatorModule) -> (String, usize) {
    let mut text = format!("{}\n", module.file.path.display());
    let mut refused = 0;
    for site in &module.sites {
        let alone = AllocatorModule {
            sites: vec![site.clone()],
            ..module.clone()
        };
        let code = module.code(site).unwrap();
        let bytes = code.get(..code.len().min(12)).unwrap();
        let name = site.symbol;
        let outcome = match hooks(&alone) {
            Ok(hooks) => {
                let displaced = &hooks[0].displaced;
                let (_, layout) = open(module).unwrap();
                let function = layout.code_address(site.file_offset).unwrap().0;
                let stays = displaced.address != function.wrapping_add(BIAS);
                format!(
                    "{:2} bytes, {}",
                    displaced.bytes.len(),
                    if stays {
                        "the first stays"
                    } else {
                        "at its start"
                    }
                )
            }
            Err(error) => {
                refused += 1;
                error.to_string()
            }
        };
        let _ = writeln!(text, "  {name:25} {outcome}  {bytes:02x?}");
    }
    (text, refused)
}

/// Compiles a program or library.
fn build(compiler: &str, source: &str, options: &[&str]) -> (tempfile::TempDir, AllocatorModule) {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (
        directory.path().join("source.c"),
        directory.path().join("built"),
    );
    fs::write(&from, source).unwrap();
    let status = Command::new(compiler)
        .args(["-O2", "-fno-builtin", "-o"])
        .args([&to, &from])
        .args(options)
        .status()
        .unwrap();
    assert!(status.success());
    let module = module(&to);
    (directory, module)
}

/// A program with every function of its C library in it.
const STATIC: &str = "#include <stdlib.h>\n#include <malloc.h>\n
    int main(void) { void *p; if (posix_memalign(&p, 64, 64)) return 1;
    free(realloc(p, 9)); free(calloc(3, 3)); free(malloc(9)); free(aligned_alloc(64, 64));
    free(memalign(64, 64)); free(valloc(9)); free(reallocarray(0, 3, 3));
    return 0; }\n";

/// Check that every function of every allocator tried can be entered: shared and static C
/// libraries, and those that are loaded in their place.
#[test]
fn real_allocators() {
    let libraries = Path::new("/usr/lib/x86_64-linux-gnu");
    let mut modules: Vec<_> = [
        "libc.so.6",
        "libjemalloc.so.2",
        "libmimalloc.so.2",
        "libtcmalloc.so.4",
        "libtcmalloc_minimal.so.4",
        "libtcmalloc_debug.so.4",
        "libtcmalloc_minimal_debug.so.4",
    ]
    .map(|name| module(&libraries.join(name)))
    .into();
    modules.push(module(Path::new("/usr/lib/x86_64-linux-musl/libc.so")));
    let built = [
        build("cc", STATIC, &["-static"]),
        build("cc", STATIC, &["-static-pie", "-fcf-protection"]),
        build("musl-gcc", STATIC, &["-static"]),
    ];
    modules.extend(built.iter().map(|(_, module)| module.clone()));
    for module in modules {
        let (text, refused) = table(&module);
        println!("{text}");
        // Of those that call others at once, some are seen there.
        let left_out = if module.file.path.ends_with("libmimalloc.so.2") {
            3
        } else {
            0
        };
        assert_eq!(refused, left_out, "{text}");
        let hooks = hooks(&module).unwrap();
        assert_eq!(hooks.len(), module.sites.len() - left_out);
        assert!(hooks.is_sorted_by_key(|hook| hook.entry));
    }
}

/// Check that a real allocator is refused for one function: AddressSanitizer's `free` calls
/// another at once.
#[test]
fn sanitizer() {
    let module = module(Path::new("/usr/lib/x86_64-linux-gnu/libasan.so.8"));
    let (text, refused) = table(&module);
    println!("{text}");
    assert_eq!(refused, 2, "cfree and free: {text}");
    let error = hooks(&module).unwrap_err().to_string();
    assert!(
        error.ends_with("free: it calls another within its first instructions"),
        "{error}"
    );
}

/// Check that the functions of newer allocators can be entered, as far as their first bytes
/// tell.
#[test]
fn newer_allocators() {
    for starts in [real::TRIXIE, real::SID, real::MUSL_CET, real::JEMALLOC_SID] {
        for &(function, address, bytes) in starts {
            let displaced = displace_behind_first(bytes, address);
            assert!(
                displaced.is_ok(),
                "{function:?} at {address:#x}: {displaced:?}"
            );
        }
    }
}

/// Check the hooks of this process's own C library, at the addresses where it is, and that
/// what its memory differs in from the file is told.
#[test]
fn own_c_library() {
    let mappings = read_mappings(std::process::id(), &FileStore::default()).unwrap();
    let modules = Finder::default()
        .find_all(std::process::id(), &mappings)
        .unwrap();
    let module = &modules[0];
    let biases = load_biases(module, &mappings).unwrap();
    assert_eq!(biases.len(), 1);
    let memory = File::open("/proc/self/mem").unwrap();
    let read = |address, bytes: &mut [u8]| memory.read_exact_at(bytes, address);
    let hooks = hooks_of(module, biases[0], read).unwrap();
    assert_eq!(hooks.len(), module.sites.len());
    let malloc = hooks
        .iter()
        .find(|hook| hook.function == Function::Malloc)
        .unwrap();
    let start = libc::malloc as *const () as u64;
    assert!((start..start + 16).contains(&malloc.entry));

    let outcome = |at: u64, byte: u8| {
        let read = |address, bytes: &mut [u8]| {
            memory.read_exact_at(bytes, address)?;
            let place = usize::try_from(at.wrapping_sub(address)).ok();
            if let Some(place) = place.and_then(|place| bytes.get_mut(place)) {
                *place = byte;
            }
            Ok(())
        };
        hooks_of(module, biases[0], read).map(|hooks| hooks.len())
    };
    for place in [start, malloc.entry] {
        let error = outcome(place, 0xcc).unwrap_err().to_string();
        let expected = format!("malloc: another tool has a breakpoint at {place:#x}");
        assert!(
            error.contains(&expected) && error.contains("libc"),
            "{error}"
        );
    }
    let last = malloc.displaced.end() - 1;
    let error = outcome(last, 0xe9).unwrap_err().to_string();
    assert!(error.contains(&format!("changed at {last:#x}")), "{error}");
    assert_eq!(outcome(malloc.displaced.end(), 0xcc).unwrap(), hooks.len());
    let unreadable = hooks_of(
        module,
        biases[0],
        |_, _| Err(io::ErrorKind::NotFound.into()),
    );
    assert!(
        unreadable
            .unwrap_err()
            .to_string()
            .contains("cannot be read")
    );
}

/// A library whose `malloc` begins with 16 bytes that can be displaced, and whose other code
/// is `more`.
fn library(more: &str) -> (tempfile::TempDir, AllocatorModule) {
    let source = format!(
        "asm(\".text\\n.globl malloc, free, cfree\\n.type malloc, @function\\n\"
        \".type free, @function\\n.type cfree, @function\\n\"
        \".balign 16\\nfree: .fill 16, 1, 0x90\\nret\\n.size free, .-free\\n\"
        \".balign 16\\nmalloc: .fill 16, 1, 0x90\\nret\\n.size malloc, .-malloc\\n\"
        \"{more}\");"
    );
    build("cc", &source, &["-shared", "-nostdlib"])
}

fn outcome(more: &str) -> Result<Vec<(Function, usize)>, String> {
    let (_directory, module) = library(more);
    let hooks = hooks(&module).map_err(|error| error.to_string())?;
    let shown = |hook: &Hook| (hook.function, hook.displaced.bytes.len());
    Ok(hooks.iter().map(shown).collect())
}

/// Check what the rest of a file can have against a hook: jumps from another function, and
/// symbols, to within what is displaced; and that what leads to right behind it has not.
#[test]
fn rest_of_the_file() {
    let plain = [(Function::Free, 5), (Function::Malloc, 5)];
    assert_eq!(outcome("").unwrap(), plain);
    let end = |text: &str, reason: &str| {
        let error = outcome(text).unwrap_err();
        assert!(error.ends_with(reason), "{error}");
    };
    let far = ".fill 200, 1, 0x90\\n";
    assert_eq!(
        outcome(&format!("{far}{{disp32}} jmp .text + 38")).unwrap(),
        plain
    );
    // To the second instruction, where the jump is, too.
    for place in [33, 37] {
        end(
            &format!("{far}{{disp32}} jmp .text + {place}"),
            "malloc: code elsewhere leads to within its first instructions",
        );
    }
    assert_eq!(outcome("inside = malloc + 6").unwrap(), plain);
    assert_eq!(outcome("alias = malloc").unwrap(), plain);
    end(
        "inside = malloc + 5",
        "malloc: another symbol is within its first instructions",
    );
}

/// Check that a `cfree` that jumps to `free` has no hook, with and without `endbr64`, and that
/// one that does more, or jumps elsewhere, has.
#[test]
fn thunks() {
    let cfree = |code: &str| {
        let functions = outcome(&format!(
            ".balign 16\\ncfree: {code}\\n.size cfree, .-cfree\\n"
        ));
        functions
            .unwrap()
            .iter()
            .any(|(function, _)| *function == Function::Cfree)
    };
    assert!(!cfree("{disp32} jmp .text"));
    assert!(!cfree("endbr64\\n{disp32} jmp .text"));
    assert!(cfree("nop\\n{disp32} jmp .text"));
    assert!(cfree("{disp32} jmp .text + 16"));
}

/// Check that functions whose first instructions are the same bytes are refused.
#[test]
fn overlap() {
    let (_directory, mut module) = library("");
    let start = module.sites[0].file_offset.0;
    let other = &mut module.sites[1];
    other.file_offset.0 = start + 4;
    other.code_bytes = 12;
    let error = hooks(&module).unwrap_err().to_string();
    assert!(
        error.ends_with("its first instructions are those of free too"),
        "{error}"
    );
}
