//! Another unwinder, framehop, over what memprof's walks saw (`--stack-copies`).
//!
//! framehop reads the files of the process itself: nothing of memprof's tables or of its
//! walk is used here.

use std::{collections::BTreeMap, fmt, fs, path::Path, sync::Arc};

use framehop::{
    ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder as _,
    x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64},
};
use object::{Object as _, ObjectSection as _, ObjectSegment as _};

/// One walk: where it began, what came of it, and the memory that it had before it.
#[derive(Debug)]
pub struct Walk {
    /// The process.
    pub pid: u32,
    ip: u64,
    sp: u64,
    bp: u64,
    /// Why it ended, without flags.
    pub end: u32,
    /// Some frames were found by frame pointers.
    pub by_frame_pointer: bool,
    /// Return addresses.
    pub frames: Vec<u64>,
    copy: Vec<u8>,
}

/// Reads a file of walks.
///
/// # Panics
///
/// If it is cut short.
#[must_use]
pub fn read_walks(path: impl AsRef<Path>) -> Vec<Walk> {
    let bytes = fs::read(path).expect("copies of stacks");
    let mut reader = Reader(&bytes);
    let mut walks = Vec::new();
    while !reader.0.is_empty() {
        let (pid, _epoch) = (reader.u32(), reader.u32());
        let [ip, sp, bp] = [(); 3].map(|()| reader.u64());
        let (end, depth) = (reader.u32(), reader.u32());
        let frames = (0..depth).map(|_| reader.u64()).collect();
        let (length, _reserved) = (reader.u32(), reader.u32());
        walks.push(Walk {
            pid,
            ip,
            sp,
            bp,
            end: end & 0xff,
            by_frame_pointer: end & 0x100 != 0,
            frames,
            copy: reader.take(length as usize).to_vec(),
        });
    }
    walks
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (part, rest) = self.0.split_at(count);
        self.0 = rest;
        part
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take(8).try_into().expect("8 bytes"))
    }
}

/// framehop may find so many frames more than memprof.
const STRAY_FRAMES: usize = 4;

/// The code of a process, for framehop.
pub struct Oracle {
    unwinder: UnwinderX86_64<Arc<[u8]>>,
    /// First address: path, and the address behind the last.
    modules: BTreeMap<u64, (String, u64)>,
}

/// How a walk compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Each frame is the same, and both end there.
    Agrees,
    /// As above, beside words that framehop takes for frames and that are no code, from
    /// which it comes back.
    AgreesOnCode,
    /// memprof says that it stopped before the end, and is right until there.
    Cut,
    /// The copy ends before the stack does; the same until there.
    CopyTooShort,
    /// framehop cannot go on, or goes on to where no code is; the same until there.
    OracleStopped,
    /// A frame differs, or one goes on where the other says that the stack ends.
    Differs,
}

impl Oracle {
    /// Reads what the lines of `/proc/PID/maps` name.
    #[must_use]
    pub fn new(maps: &str) -> Self {
        let mut oracle = Self {
            unwinder: UnwinderX86_64::new(),
            modules: BTreeMap::new(),
        };
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (Some(range), Some(permissions), Some(offset)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let Some(path) = fields.nth(2).filter(|path| path.starts_with('/')) else {
                continue;
            };
            if permissions.contains('x') {
                let (start, end) = range.split_once('-').expect("a range");
                let hex = |text| u64::from_str_radix(text, 16).expect("a number");
                oracle.add(path, hex(start), hex(end), hex(offset));
            }
        }
        oracle
    }

    fn add(&mut self, path: &str, start: u64, end: u64, offset: u64) {
        let Ok(bytes) = fs::read(path) else { return };
        let Ok(file) = object::File::parse(&*bytes) else {
            return;
        };
        let Some(segment) = file.segments().find(|segment| {
            let (first, size) = segment.file_range();
            first & !0xfff <= offset && offset < first + size
        }) else {
            return;
        };
        let address = segment.address() - segment.file_range().0 + offset;
        let section = |name: &str| {
            let section = file.section_by_name(name)?;
            let data: Arc<[u8]> = section.uncompressed_data().ok()?.into_owned().into();
            let range = section.address()..section.address() + section.size();
            Some((range, data))
        };
        let (text_svma, text) = section(".text").unzip();
        let (eh_frame_svma, eh_frame) = section(".eh_frame").unzip();
        self.unwinder.add_module(Module::new(
            path.to_owned(),
            start..end,
            start.wrapping_sub(address),
            ExplicitModuleSectionInfo {
                base_svma: 0,
                text_svma,
                text,
                eh_frame_svma,
                eh_frame,
                debug_frame: section(".debug_frame").map(|(_, data)| data),
                ..Default::default()
            },
        ));
        self.modules.insert(start, (path.to_owned(), end));
    }

    /// Walks again, and compares.
    ///
    /// # Panics
    ///
    /// Not to be expected: a walk without frames.
    #[must_use]
    pub fn compare(&self, walk: &Walk) -> (Verdict, Vec<u64>) {
        let mut cache = CacheX86_64::<_>::new();
        let mut is_short = false;
        let mut read = |address: u64| {
            let word = address
                .checked_sub(walk.sp)
                .and_then(|at| usize::try_from(at).ok())
                .and_then(|at| walk.copy.get(at..at.checked_add(8)?));
            match word {
                Some(bytes) => Ok(u64::from_ne_bytes(bytes.try_into().expect("8 bytes"))),
                None => {
                    is_short = true;
                    Err(())
                }
            }
        };
        let mut registers = UnwindRegsX86_64::new(walk.ip, walk.sp, walk.bp);
        let mut frames = vec![walk.ip];
        let mut address = FrameAddress::from_return_address(walk.ip).expect("not 0");
        let whole = loop {
            // memprof is asked for 127 frames.
            if frames.len() > walk.frames.len() + STRAY_FRAMES {
                break false;
            }
            match self
                .unwinder
                .unwind_frame(address, &mut registers, &mut cache, &mut read)
            {
                Ok(Some(next)) => {
                    frames.push(next);
                    match FrameAddress::from_return_address(next) {
                        Some(next) => address = next,
                        None => break true,
                    }
                }
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        let same = frames
            .iter()
            .zip(&walk.frames)
            .take_while(|(theirs, ours)| theirs == ours)
            .count();
        let shared = frames.len().min(walk.frames.len());
        let is_code = |frame: &u64| {
            let before = self.modules.range(..*frame).next_back();
            before.is_some_and(|(_, (_, end))| frame <= end)
        };
        let code: Vec<u64> = frames.iter().copied().filter(|at| is_code(at)).collect();
        let verdict = match () {
            () if same < shared && whole && walk.end == 0 && code == walk.frames => {
                Verdict::AgreesOnCode
            }
            () if same < shared && !frames.get(same).is_some_and(is_code) => Verdict::OracleStopped,
            () if same < shared => Verdict::Differs,
            () if whole && walk.end == 0 && frames.len() == walk.frames.len() => Verdict::Agrees,
            () if walk.end != 0 && frames.len() >= walk.frames.len() => Verdict::Cut,
            () if is_short => Verdict::CopyTooShort,
            () if !whole && frames.len() <= walk.frames.len() => Verdict::OracleStopped,
            () => Verdict::Differs,
        };
        (verdict, frames)
    }

    /// Addresses as module and distance from its code's first byte.
    #[must_use]
    pub fn show(&self, frames: &[u64]) -> String {
        frames
            .iter()
            .map(|frame| match self.modules.range(..=frame).next_back() {
                Some((start, (path, _))) => format!("  {path}+{:#x}\n", frame - start),
                None => format!("  {frame:#x}\n"),
            })
            .collect()
    }
}

/// The verdicts on one program's walks.
#[derive(Debug, Default)]
pub struct Summary {
    /// How many of each.
    pub verdicts: BTreeMap<Verdict, usize>,
    /// How many walks there are.
    pub walks: usize,
    /// How many of them memprof says are whole.
    pub complete: usize,
    /// The first of each that is not alike, in words.
    examples: BTreeMap<Verdict, String>,
}

impl Summary {
    /// Compares all of `walks`.
    #[must_use]
    pub fn of(walks: &[Walk], oracle: &Oracle) -> Self {
        let mut summary = Self::default();
        for walk in walks {
            let (verdict, theirs) = oracle.compare(walk);
            *summary.verdicts.entry(verdict).or_default() += 1;
            summary.walks += 1;
            summary.complete += usize::from(walk.end == 0);
            if verdict != Verdict::Agrees {
                summary.examples.entry(verdict).or_insert_with(|| {
                    format!(
                        "{verdict:?}: memprof (end {}):\n{}framehop:\n{}",
                        walk.end,
                        oracle.show(&walk.frames),
                        oracle.show(&theirs)
                    )
                });
            }
        }
        summary
    }

    /// One of each kind that is not alike, in words.
    #[must_use]
    pub fn examples(&self) -> String {
        let examples: Vec<&str> = self.examples.values().map(String::as_str).collect();
        examples.join("\n")
    }

    /// Percent of the walks.
    #[must_use]
    pub fn percent(&self, count: usize) -> f64 {
        count as f64 * 100.0 / self.walks.max(1) as f64
    }

    /// How many have this verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> usize {
        self.verdicts.get(&verdict).copied().unwrap_or(0)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} stacks, {:.2} % complete;",
            self.walks,
            self.percent(self.complete)
        )?;
        for (verdict, &count) in &self.verdicts {
            write!(f, " {verdict:?} {:.2} %", self.percent(count))?;
        }
        Ok(())
    }
}
