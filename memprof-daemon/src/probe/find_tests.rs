use super::*;
use crate::process::{
    debug_info::DebugInfo, files::FileStore, mapping::Mapping, maps::read_mappings,
};
use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command};

/// The file, as if a process mapped it.
pub(crate) fn mapped(path: &Path) -> Arc<MappedFile> {
    let file = File::open(path).unwrap();
    let metadata = file.metadata().unwrap();
    Arc::new(MappedFile {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
        build_id: None,
        debug_info: DebugInfo::Missing,
        file: Some(file),
    })
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new(name: &str) -> Self {
        let prefix = format!("memprof-find-{name}");
        Self(tempfile::Builder::new().prefix(&prefix).tempdir().unwrap())
    }

    fn build(&self, source: &str, options: &[&str]) -> PathBuf {
        let (from, to) = (self.0.path().join("source.c"), self.0.path().join("built"));
        fs::write(&from, source).unwrap();
        let status = Command::new("cc")
            .args(["-O1", "-w", "-fno-builtin", "-o"])
            .args([&to, &from])
            .args(options)
            .status()
            .unwrap();
        assert!(status.success());
        to
    }
}

fn site(module: &AllocatorModule, function: Function) -> &FoundSite {
    let named = |site: &&FoundSite| site.is_called(function.symbol());
    module.sites.iter().find(named).unwrap()
}

/// Check that this process's C library is found, with every function it has,
/// that names which share an address are one site, and that the sites are where
/// the object crate and the memory of this process have them.
#[test]
fn own_c_library() {
    use object::read::{Object, ObjectSymbol};
    let mappings = read_mappings(std::process::id(), &FileStore::default()).unwrap();
    let modules = Finder::default()
        .find_all(std::process::id(), &mappings)
        .unwrap();
    assert_eq!(modules.len(), 1);
    let module = &modules[0];
    assert!(module.file.path.to_string_lossy().contains("libc"));
    assert_eq!(
        site(module, Function::Memalign).function,
        Function::AlignedAlloc
    );
    assert!(module.indirect.is_empty());

    let bytes = fs::read(&module.attach_path).unwrap();
    let object = object::File::parse(&*bytes).unwrap();
    let layout = ElfLayout::read(module.file.file.as_ref().unwrap()).unwrap();
    for &function in Function::ALL {
        let expected = object
            .dynamic_symbols()
            .find(|symbol| symbol.name() == Ok(function.symbol()))
            .and_then(|symbol| layout.code_offset(VirtOffset(symbol.address())));
        if let Some(expected) = expected {
            assert_eq!(site(module, function).file_offset, expected, "{function:?}");
        }
    }
    let unique: std::collections::BTreeSet<_> =
        module.sites.iter().map(|site| site.file_offset).collect();
    assert_eq!(unique.len(), module.sites.len());

    let malloc = libc::malloc as *const () as u64;
    let here = mappings
        .iter()
        .find(|mapping: &&Arc<Mapping>| (mapping.start.0..mapping.end.0).contains(&malloc))
        .unwrap();
    let offset = FileOffset(here.file_offset.0 + malloc - here.start.0);
    assert_eq!(site(module, Function::Malloc).file_offset, offset);
}

/// Check that the kernel accepts the path of a found module for a uprobe.
#[test]
fn attach_path_takes_a_probe() {
    let mappings = read_mappings(std::process::id(), &FileStore::default()).unwrap();
    let finder = Finder::default();
    let module = finder
        .find_all(std::process::id(), &mappings)
        .unwrap()
        .remove(0);
    let kind = fs::read_to_string("/sys/bus/event_source/devices/uprobe/type").unwrap();
    let path = std::ffi::CString::new(module.attach_path.to_str().unwrap()).unwrap();
    // struct perf_event_attr: type and size, then config1 and config2 behind
    // 56 bytes are the path and the offset.
    let mut attributes = [0_u64; 14];
    attributes[0] = kind.trim().parse::<u64>().unwrap() | 112 << 32;
    attributes[7] = path.as_ptr() as u64;
    attributes[8] = site(&module, Function::Pvalloc).file_offset.0;
    // SAFETY: the attributes are 112 bytes as they say, and the path they point
    // to lives until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 8) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor was opened above and is used nowhere else.
    unsafe { libc::close(fd as i32) };
}

/// Check that jemalloc, which programs link in libc's place, is found in its
/// own file, and that programs which only import malloc are no allocators.
#[test]
fn other_files() {
    let finder = Finder::default();
    let jemalloc = Path::new("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2");
    assert!(jemalloc.exists(), "needs Debian's libjemalloc2");
    let module = finder.find(&mapped(jemalloc)).unwrap();
    for function in [
        Function::PosixMemalign,
        Function::Mallocx,
        Function::Xallocx,
    ] {
        site(&module, function);
    }
    // mimalloc's by their own names, of which some only jump to others by way of the PLT.
    let mimalloc = mapped(Path::new("/usr/lib/x86_64-linux-gnu/libmimalloc.so.2"));
    let module = finder.find(&mimalloc).unwrap();
    let find = |name| module.sites.iter().find(|site| site.is_called(name));
    let named = |name| find(name).unwrap_or_else(|| panic!("{name}"));
    for name in [
        "mi_malloc",
        "mi_heap_calloc",
        "mi_free",
        "mi_recalloc_aligned",
    ] {
        named(name);
    }
    assert_eq!(named("cfree"), named("free"));
    assert_eq!(named("mi_free_size"), named("free"));
    assert_eq!(named("posix_memalign"), named("mi_posix_memalign"));
    for path in [
        "/bin/sh",
        "/usr/bin/redis-server",
        "/etc/passwd",
        "/dev/null",
    ] {
        assert!(finder.find(&mapped(Path::new(path))).is_none(), "{path}");
    }
}

/// The probed instruction of each function of `path`, and how far in it is.
fn points(path: &Path) -> Vec<(&'static str, u32, String)> {
    assert!(path.exists(), "needs {}", path.display());
    let module = Finder::default().find(&mapped(path)).unwrap();
    let bytes = fs::read(path).unwrap();
    let shown = |site: &FoundSite| {
        let point = &site.point;
        assert_eq!(
            site.probe_offset().0,
            site.file_offset.0 + u64::from(point.offset)
        );
        // What stands there is what is said.
        let first = bytes[site.probe_offset().0 as usize];
        assert!(!point.instruction.starts_with("jmp") || matches!(first, 0xe9 | 0xeb));
        let what = match point.refusal {
            Some(refusal) => format!("{refusal:?}"),
            None => point.instruction.split(' ').next().unwrap().to_owned(),
        };
        (site.symbol, point.offset, what)
    };
    let mut points: Vec<_> = module.sites.iter().map(shown).collect();
    points.sort();
    points
}

fn expect_points(path: &str, expected: &[(&'static str, u32, &str)]) {
    let expected: Vec<_> = expected
        .iter()
        .map(|&(function, offset, what)| (function, offset, what.to_owned()))
        .collect();
    assert_eq!(points(Path::new(path)), expected, "{path}");
}

/// Check where the functions of Debian 12's C library are probed.
#[test]
fn points_in_glibc() {
    expect_points(
        "/usr/lib/x86_64-linux-gnu/libc.so.6",
        &[
            ("aligned_alloc", 7, "je"),
            ("calloc", 0, "push"),
            ("free", 3, "je"),
            ("malloc", 0, "push"),
            ("posix_memalign", 7, "push"),
            ("pvalloc", 7, "push"),
            ("realloc", 0, "push"),
            ("reallocarray", 0, "ArgumentWritten"),
            ("valloc", 7, "push"),
        ],
    );
}

/// Check where the functions of Debian 12's musl are probed: most are jumps.
#[test]
fn points_in_musl() {
    expect_points(
        "/usr/lib/x86_64-linux-musl/libc.so",
        &[
            ("aligned_alloc", 0, "push"),
            ("calloc", 0, "push"),
            ("free", 0, "jmp"),
            ("malloc", 0, "jmp"),
            ("posix_memalign", 0, "push"),
            ("realloc", 0, "jmp"),
            ("reallocarray", 6, "je"),
            ("valloc", 0, "ArgumentWritten"),
        ],
    );
}

/// Check where the functions of Debian 12's jemalloc are probed.
#[test]
fn points_in_jemalloc() {
    let points = points(Path::new("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"));
    assert!(
        points.contains(&("malloc", 7, "ja".to_owned())),
        "{points:?}"
    );
    assert!(points.contains(&("calloc", 0, "push".to_owned())));
    assert!(points.iter().all(|(_, _, what)| what != "JumpTarget"));
}

/// A library with `malloc: cmp rdi, 1; jne` and `free: test rdi, rdi; je`, and
/// with more.
fn assembled(name: &str, more: &str) -> (Scratch, PathBuf) {
    let scratch = Scratch::new(name);
    let source = format!(
        "__asm__(\".intel_syntax noprefix\\n.text\\n.globl malloc, free\\n\
        .type malloc, @function\\nmalloc: cmp rdi, 1\\n inner: jne 1f\\n nop\\n1: ret\\n\
        .size malloc, . - malloc\\n.type free, @function\\n\
        free: test rdi, rdi\\n je 1f\\n nop\\n1: ret\\n{more}\\n.att_syntax\");"
    );
    let path = scratch.build(&source, &["-shared", "-fPIC", "-nostdlib"]);
    (scratch, path)
}

/// Check that a jump from another part of the file to behind an entry, to the
/// site itself too, keeps the probe at that entry, and no other's.
#[test]
fn jumps_from_elsewhere() {
    let show = |more: &str| {
        let (_scratch, path) = assembled("jumps", more);
        points(&path)
            .into_iter()
            .map(|(name, offset, what)| format!("{name}+{offset} {what}"))
            .collect::<Vec<_>>()
    };
    let moved = ["free+3 je", "malloc+4 jne"];
    assert_eq!(show(""), moved);
    let far = ".size free, . - free\\n.skip 4096, 0x90\\n";
    assert_eq!(show(&format!("{far} jmp malloc")), moved);
    let kept = ["free+3 je", "malloc+0 JumpTarget"];
    for jump in ["jmp inner", "call inner", "ja inner"] {
        assert_eq!(show(&format!("{far} {jump}")), kept, "{jump}");
    }
}

/// Check that functions without a size are read up to the next one, and never
/// into it.
#[test]
fn functions_without_size() {
    let more = ".globl calloc\\n.type calloc, @function\\ncalloc: mov eax, 1\\n\
        .globl realloc\\n.type realloc, @function\\nrealloc: push rbp\\n ret";
    let (_scratch, path) = assembled("sizes", more);
    let found: Vec<_> = points(&path);
    assert!(
        found.contains(&("calloc", 0, "FunctionEnds".to_owned())),
        "{found:?}"
    );
    assert!(
        found.contains(&("realloc", 0, "push".to_owned())),
        "{found:?}"
    );
    assert!(found.contains(&("free", 3, "je".to_owned())), "{found:?}");
}

/// Check that the `endbr64` that a compiler puts at an entry is passed over.
#[test]
fn built_with_cet() {
    let scratch = Scratch::new("cet");
    let source = "extern void *get(long); extern void put(void *);\
        void *malloc(long n) { return n < 0 ? 0 : get(n); }\
        void free(void *p) { if (p) put(p); }";
    let options = [
        "-O2",
        "-shared",
        "-fPIC",
        "-nostdlib",
        "-fcf-protection=full",
    ];
    let path = scratch.build(source, &options);
    let found = points(&path);
    let shown: Vec<_> = found
        .iter()
        .map(|(name, at, what)| (*name, *at, what.as_str()))
        .collect();
    // test rdi, rdi is three bytes more.
    assert_eq!(shown, [("free", 7, "je"), ("malloc", 7, "js")]);
}

/// Check that a static program is found by its symbol table.
#[test]
fn static_program() {
    let scratch = Scratch::new("static");
    let source = "#include <stdlib.h>\nint main() { free(malloc(1)); }";
    let path = scratch.build(source, &["-static"]);
    let module = Finder::default().find(&mapped(&path)).unwrap();
    site(&module, Function::Realloc);
}

/// Check that a static program which can be at any address is found, where linkers make
/// local symbols of hidden functions; in every way that such programs are linked.
#[test]
fn standalone_programs() {
    let scratch = Scratch::new("standalone");
    let source = "#include <stdlib.h>\nint main() { free(realloc(malloc(1), 9)); }";
    for options in [
        &["-static-pie"][..],
        &["-static-pie", "-flto"],
        &["-static-pie", "-ffunction-sections", "-Wl,--gc-sections"],
        &["-static-pie", "-Wl,--exclude-libs,ALL"],
        &["-static", "-Wl,--exclude-libs,ALL"],
    ] {
        let path = scratch.build(source, options);
        let module = Finder::default().find(&mapped(&path));
        let module = module.unwrap_or_else(|| panic!("{options:?}"));
        for function in [Function::Malloc, Function::Realloc, Function::Free] {
            site(&module, function);
        }
    }
}

/// Check that local functions of an allocator's names are none: in a program with a loader,
/// in a library, beside one that all can see, and where there are several.
#[test]
fn unrelated_local_functions() {
    let scratch = Scratch::new("local");
    let source = "static __attribute__((used, noinline)) void *malloc(long n) { return (void *)n; }\
        static __attribute__((used, noinline)) void free(void *p) { *(volatile char *)p; }\
        int main() { return 0; }";
    for options in [&["-pie"][..], &["-no-pie"], &["-shared", "-fPIC"]] {
        let path = scratch.build(source, options);
        assert!(
            Finder::default().find(&mapped(&path)).is_none(),
            "{options:?}"
        );
    }
    // The C library has its own besides.
    let path = scratch.build(source, &["-static"]);
    let module = Finder::default().find(&mapped(&path)).unwrap();
    let bytes = fs::read(&path).unwrap();
    let object = object::File::parse(&*bytes).unwrap();
    use object::read::{Object, ObjectSymbol};
    let global = object
        .symbols()
        .find(|symbol| symbol.name() == Ok("malloc") && !symbol.is_local())
        .unwrap();
    let layout = ElfLayout::read(&File::open(&path).unwrap()).unwrap();
    let place = layout.code_offset(VirtOffset(global.address())).unwrap();
    assert_eq!(site(&module, Function::Malloc).file_offset, place);
    // There, it is local too: nobody knows which of the two.
    let path = scratch.build(source, &["-static-pie"]);
    let definitions = Definitions::read(&File::open(&path).unwrap()).unwrap();
    assert_eq!(definitions.ambiguous, ["malloc"]);
    assert!(Finder::default().find(&mapped(&path)).is_none());
}

/// Check that an executable which takes the address of an imported malloc, and
/// so has a value for it, does not count as defining it.
#[test]
fn imported_with_a_value() {
    let scratch = Scratch::new("plt");
    let source = "#include <stdlib.h>\nvoid *(*volatile m)(size_t) = malloc;\n\
        void (*volatile f)(void *) = free;\nint main() { f(m(1)); }";
    let path = scratch.build(source, &["-no-pie"]);
    assert!(Finder::default().find(&mapped(&path)).is_none());
}

/// Check that allocators with names of their own are found also where these are local, that
/// what linkers have left out is not missed, and that names of two allocators are none.
#[test]
fn own_names() {
    let scratch = Scratch::new("own");
    let names = |source: &str, options: &[&str]| {
        let path = scratch.build(source, options);
        let module = Finder::default().find(&mapped(&path));
        let sites = module.map(|module| module.sites).unwrap_or_default();
        let mut names: Vec<_> = sites.iter().map(|site| site.symbol).collect();
        names.sort_unstable();
        names
    };
    let of = |class: &str, prefix: &str| {
        format!(
            "{class} __attribute__((used, noinline)) void *{prefix}mallocx(long n, int f) {{\
             __asm__ volatile(\"\"); return (void *)n; }}\
             {class} __attribute__((used, noinline)) void {prefix}sdallocx(void *p, long n, int f)\
             {{ __asm__ volatile(\"\"); }}"
        )
    };
    let main = "int main() { return 0; }";
    for class in ["", "static"] {
        for prefix in ["_rjem_", "je_"] {
            let source = format!("{}{main}", of(class, prefix));
            let expected = [format!("{prefix}mallocx"), format!("{prefix}sdallocx")];
            assert_eq!(names(&source, &["-pie"]), expected);
        }
    }
    assert!(names(&format!("{}{main}", of("", "")), &["-pie"]).is_empty());
    let half = of("", "je_").replace("je_sdallocx", "_rjem_sdallocx") + main;
    assert!(names(&half, &["-pie"]).is_empty());
}

/// Check that a malloc which may call another function of the file is told from those that
/// call none.
#[test]
fn malloc_by_others() {
    let scratch = Scratch::new("others");
    let rest = "void *calloc(long n, long m) { return (void *)(n * m); } void free(void *p) {}";
    for (body, function) in [
        ("return (void *)n;", Function::Malloc),
        ("return n > 9 ? calloc(1, n) : 0;", Function::Valloc),
    ] {
        let source = format!("void *calloc(long, long); void *malloc(long n) {{ {body} }} {rest}");
        for options in [
            &["-shared", "-fPIC"][..],
            &["-shared", "-fPIC", "-Wl,-Bsymbolic"],
        ] {
            let path = scratch.build(&source, options);
            let module = Finder::default().find(&mapped(&path)).unwrap();
            assert_eq!(site(&module, Function::Malloc).function, function, "{body}");
        }
    }
}

/// Check what counts as an allocator: not malloc without free, not static
/// functions, not variables, not the stub in an old glibc's loader; a function
/// chosen at run time is told.
#[test]
fn what_counts() {
    let find = |name: &str, source: &str| {
        let scratch = Scratch::new(name);
        let path = scratch.build(source, &["-shared", "-fPIC", "-nostdlib"]);
        Finder::default().find(&mapped(&path))
    };
    let malloc = "void *malloc(long n) { return (void *)n; }";
    let free = "void free(void *p) { *(volatile char *)p; }";
    assert!(find("both", &format!("{malloc}{free}")).is_some());
    assert!(find("only", malloc).is_none());
    assert!(
        find(
            "static",
            &format!("__attribute__((used)) static {malloc}{free}")
        )
        .is_none()
    );
    assert!(find("variable", &format!("int malloc = 1;{free}")).is_none());
    let mark = "int _rtld_global = 1;";
    assert!(find("stub", &format!("{mark}{malloc}{free}")).is_none());
    let ifunc = "void *r(long n) { return 0; } void *(*pick())(long) { return r; }\
        void *realloc(long) __attribute__((ifunc(\"pick\")));";
    let module = find("ifunc", &format!("{malloc}{free}{ifunc}")).unwrap();
    assert_eq!(module.indirect, ["realloc"]);
    assert_eq!(module.sites.len(), 2);
}

/// Check that names are found across the pieces in which they are read and at
/// the ends of other names.
#[test]
fn names_across_chunks() {
    let scratch = Scratch::new("names");
    for shift in 0..24 {
        let mut bytes = vec![b'x'; CHUNK_BYTES - shift];
        bytes.extend(b"malloc\0free_sized\0mallocs\0free");
        let path = scratch.0.path().join("names");
        fs::write(&path, &bytes).unwrap();
        let table = SymbolTable {
            offset: FileOffset(0),
            size: 0,
            names_offset: FileOffset(0),
            names_size: bytes.len() as u64,
        };
        let names = find_names(&File::open(&path).unwrap(), &table).unwrap();
        let at = (CHUNK_BYTES - shift) as u32;
        let function = |name| {
            let order = known().iter().position(|known| known.symbol == name);
            Name::Function(order.unwrap())
        };
        let expected = HashMap::from([(at, function("malloc")), (at + 7, function("free_sized"))]);
        assert_eq!(names, expected, "{shift}");
    }
}

/// Check that a file cannot make the search hold any number of names.
#[test]
fn repeated_names() {
    let scratch = Scratch::new("repeated");
    let path = scratch.0.path().join("names");
    let bytes = b"malloc\0".repeat(names::MAX_NAMES + 1);
    fs::write(&path, &bytes).unwrap();
    let table = SymbolTable {
        offset: FileOffset(0),
        size: 0,
        names_offset: FileOffset(0),
        names_size: bytes.len() as u64,
    };
    assert!(find_names(&File::open(&path).unwrap(), &table).is_err());
}

/// Check that a library each byte of whose headers, symbols and names is set to
/// bad values in turn never panics the search.
#[test]
fn hostile_files() {
    let scratch = Scratch::new("hostile");
    let source = "void *malloc(long n) { return (void *)n; } void free(void *p) {}";
    let path = scratch.build(source, &["-shared", "-fPIC", "-nostdlib", "-s"]);
    let good = fs::read(&path).unwrap();
    let layout = ElfLayout::read(&File::open(&path).unwrap()).unwrap();
    let table = layout.symbol_tables[0];
    let sections = Fields(&good).u64(40) as usize;
    let symbols = table.offset.0 as usize..(table.names_offset.0 + table.names_size) as usize;
    let broken = scratch.0.path().join("broken");
    for at in (0..64).chain(symbols).chain(sections..good.len()) {
        for bad in [0x00, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = bad;
            fs::write(&broken, &bytes).unwrap();
            let _ = Definitions::read(&File::open(&broken).unwrap());
        }
    }
}

/// Check that a process without an allocator is an error that says where it was
/// looked for.
#[test]
fn no_allocator() {
    let error = Finder::default()
        .find_all(7, &MappingTable::default())
        .unwrap_err();
    assert!(error.to_string().contains("pid 7 has no known allocator"));
    let mut table = MappingTable::default();
    table.insert(Mapping {
        start: crate::address::AbsAddr(0x1000),
        end: crate::address::AbsAddr(0x2000),
        file_offset: FileOffset(0),
        file: Some(mapped(Path::new("/bin/true"))),
        name: String::new(),
    });
    let error = Finder::default().find_all(7, &table).unwrap_err();
    assert!(error.to_string().ends_with("in /bin/true"), "{error}");
}
