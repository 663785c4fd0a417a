//! What a process has mapped of files, and the bytes of its allocator, in memory and in
//! its file.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};

/// The functions that are compared.
const FUNCTIONS: &[&str] = &[
    "malloc",
    "calloc",
    "realloc",
    "reallocarray",
    "posix_memalign",
    "aligned_alloc",
    "memalign",
    "valloc",
    "pvalloc",
    "free",
];

/// The mappings of files of process `pid`, which no allocation changes.
#[must_use]
pub fn file_maps(pid: u32) -> Vec<String> {
    fs::read_to_string(format!("/proc/{pid}/maps"))
        .expect("the target's maps")
        .lines()
        .filter(|line| line.contains('/') || line.contains("[v"))
        // Another test may have built the same program in its place.
        .map(|line| line.trim_end_matches(" (deleted)").to_owned())
        .collect()
}

/// The machine code of a process's allocator functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocatorCode(Vec<(String, Vec<u8>)>);

impl AllocatorCode {
    /// As it is in the memory of process `pid`.
    #[must_use]
    pub fn in_memory(pid: u32) -> Self {
        let libc = Libc::of(pid);
        let memory = File::open(format!("/proc/{pid}/mem")).expect("the target's memory");
        libc.read(|function, code| {
            let address = libc.start_of_file + function.virtual_address;
            memory.read_exact_at(code, address).expect("code in memory");
        })
    }

    /// As it is in the file that process `pid` maps.
    #[must_use]
    pub fn in_file(pid: u32) -> Self {
        let libc = Libc::of(pid);
        libc.read(|function, code| {
            let start = usize::try_from(function.file_offset).expect("a file offset");
            code.copy_from_slice(&libc.content[start..start + code.len()]);
        })
    }

    /// The functions that are otherwise than in `other`.
    #[must_use]
    pub fn changed_from(&self, other: &Self) -> Vec<String> {
        let pairs = self.0.iter().zip(&other.0);
        pairs
            .filter(|(one, other)| one != other)
            .map(|((name, _), _)| name.clone())
            .collect()
    }
}

struct Function {
    name: String,
    virtual_address: u64,
    file_offset: u64,
    size: usize,
}

/// The C library that a process maps.
struct Libc {
    content: Vec<u8>,
    /// Where its virtual address 0 is.
    start_of_file: u64,
}

impl Libc {
    fn of(pid: u32) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the target's maps");
        let (start, path) = maps
            .lines()
            .find_map(|line| {
                let mut fields = line.split_whitespace();
                let range = fields.next()?;
                let offset = fields.nth(1)?;
                let path = fields.nth(2)?;
                let is_libc = path.contains("/libc.so.6") || path.contains("/libc-2.");
                if !is_libc || u64::from_str_radix(offset, 16) != Ok(0) {
                    return None;
                }
                let start = range.split_once('-')?.0;
                Some((u64::from_str_radix(start, 16).ok()?, PathBuf::from(path)))
            })
            .unwrap_or_else(|| panic!("no C library in the target:\n{maps}"));
        Self {
            content: fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
            start_of_file: start,
        }
    }

    fn read(&self, mut fill: impl FnMut(&Function, &mut [u8])) -> AllocatorCode {
        let functions = self.functions();
        assert!(
            ["malloc", "free"]
                .iter()
                .all(|name| functions.iter().any(|function| function.name == *name)),
            "malloc and free are among the symbols"
        );
        let codes = functions.into_iter().map(|function| {
            let mut code = vec![0; function.size];
            fill(&function, &mut code);
            (function.name, code)
        });
        AllocatorCode(codes.collect())
    }

    fn functions(&self) -> Vec<Function> {
        let file = object::File::parse(&*self.content).expect("the C library is an ELF file");
        let mut functions: Vec<Function> = file
            .dynamic_symbols()
            .filter(|symbol| symbol.is_definition())
            .filter_map(|symbol| {
                let name = symbol.name().ok()?;
                FUNCTIONS.contains(&name).then_some(())?;
                let address = symbol.address();
                let file_offset = file.segments().find_map(|segment| {
                    let inside = address.checked_sub(segment.address())?;
                    (inside < segment.size()).then(|| segment.file_range().0 + inside)
                })?;
                Some(Function {
                    name: name.to_owned(),
                    virtual_address: address,
                    file_offset,
                    size: usize::try_from(symbol.size()).expect("a function's size"),
                })
            })
            .collect();
        functions.sort_by(|a, b| a.name.cmp(&b.name));
        functions
    }
}
