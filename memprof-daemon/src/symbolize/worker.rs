//! The thread that finds names.
//!
//! Naming reads files, takes seconds for large debug information, and needs one
//! thread; so requests go to it through a channel, and answers come back.

use std::{
    collections::HashMap,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    address::{AbsAddr, FileOffset},
    ledger::snapshot::StackTrace,
    process::mapping::{MappedFile, MappingLookup},
    symbolize::{
        cache::NameCache,
        debuginfod::Debuginfod,
        frame::{Frame, FrameName, FunctionLine, UnknownReason},
        names::{NamedFile, Source},
        normalize::{Normalized, normalize},
        resolve::Resolver,
        site::Sites,
    },
};

/// Requests that may wait. Those who ask wait for the answer anyway.
const QUEUE: usize = 8;

/// Names that are remembered: of about 200 bytes each.
const CACHED_NAMES: usize = 1 << 18;

/// So much that names may take is so much for what a file stays parsed to, too.
const BYTES_A_PARSED_FILE: u64 = 1 << 20;

/// blazesym follows nested debug information by recursion. Untouched, a large
/// stack costs address space only.
const STACK_BYTES: usize = 64 << 20;

/// Why names could not be had. A name that is not found is none of these: that
/// is [`FrameName::Unknown`].
#[derive(Debug, thiserror::Error)]
pub enum SymbolizeError {
    /// The thread could not be started.
    #[error("cannot start the symbolizer's thread")]
    Spawn(#[source] io::Error),
    /// The request met a bug. The thread goes on with empty caches.
    #[error("the symbolizer failed on this request")]
    Failed,
    /// The thread has ended.
    #[error("the symbolizer has stopped")]
    Stopped,
}

/// The mappings of one process at one time.
pub type Mappings = Arc<dyn MappingLookup + Send + Sync>;

enum Request {
    Name {
        stacks: Vec<Arc<StackTrace>>,
        mappings: Mappings,
        answer: oneshot::Sender<Vec<Vec<Arc<Frame>>>>,
    },
    /// Forget all that can be found again.
    Forget,
}

/// What remembered names take, and may.
#[derive(Debug)]
struct Memory {
    bytes: AtomicU64,
    max_bytes: AtomicU64,
}

/// Asks the thread for names. The thread ends with the last handle.
#[derive(Clone)]
pub struct SymbolizeHandle {
    requests: mpsc::Sender<Request>,
    debuginfod: Option<Debuginfod>,
    memory: Arc<Memory>,
}

impl fmt::Debug for SymbolizeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SymbolizeHandle")
    }
}

impl SymbolizeHandle {
    /// Starts the thread. What has no debug information on this host is asked for from
    /// `debuginfod`, if that is wanted.
    ///
    /// # Errors
    ///
    /// If the operating system gives none.
    pub fn start(debuginfod: Option<Debuginfod>) -> Result<Self, SymbolizeError> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let memory = Arc::new(Memory {
            bytes: AtomicU64::new(0),
            max_bytes: AtomicU64::new(u64::MAX),
        });
        thread::Builder::new()
            .name("memprof-symbolize".to_owned())
            .stack_size(STACK_BYTES)
            .spawn({
                let debuginfod = debuginfod.clone();
                let memory = Arc::clone(&memory);
                move || serve(receiver, debuginfod, &memory)
            })
            .map_err(SymbolizeError::Spawn)?;
        Ok(Self {
            requests,
            debuginfod,
            memory,
        })
    }

    /// What remembered names take, roughly.
    #[must_use]
    pub fn name_bytes(&self) -> u64 {
        self.memory.bytes.load(Ordering::Relaxed)
    }

    /// Lets remembered names take so many bytes, roughly.
    pub fn limit_names(&self, max_bytes: u64) {
        self.memory.max_bytes.store(max_bytes, Ordering::Relaxed);
    }

    /// Has all forgotten that can be found again: names, and what was parsed of files. Not
    /// while requests wait.
    pub fn forget(&self) {
        let _ = self.requests.try_send(Request::Forget);
    }

    /// Who asks servers for debug information, if anyone does.
    #[must_use]
    pub const fn debuginfod(&self) -> Option<&Debuginfod> {
        self.debuginfod.as_ref()
    }

    /// Names the frames of a process's stacks: as many as stacks, in their
    /// order, none of them empty.
    ///
    /// # Errors
    ///
    /// If the thread met a bug or has ended.
    pub async fn symbolize(
        &self,
        stacks: Vec<Arc<StackTrace>>,
        mappings: Mappings,
    ) -> Result<Vec<Vec<Arc<Frame>>>, SymbolizeError> {
        let (answer, answered) = oneshot::channel();
        let request = Request::Name {
            stacks,
            mappings,
            answer,
        };
        self.requests
            .send(request)
            .await
            .map_err(|_| SymbolizeError::Stopped)?;
        answered.await.map_err(|_| SymbolizeError::Failed)
    }
}

/// Answers until the last handle is gone.
fn serve(mut requests: mpsc::Receiver<Request>, debuginfod: Option<Debuginfod>, memory: &Memory) {
    let mut namer = Namer::new(debuginfod.clone());
    while let Some(request) = requests.blocking_recv() {
        match request {
            Request::Forget => namer = Namer::new(debuginfod.clone()),
            Request::Name { answer, .. } if answer.is_closed() => {}
            Request::Name {
                stacks,
                mappings,
                answer,
            } => {
                namer.limit(memory.max_bytes.load(Ordering::Relaxed));
                // After a panic the namer is dropped, so nobody sees what it left.
                match catch_unwind(AssertUnwindSafe(|| namer.name(&stacks, &*mappings))) {
                    // Who asked may have gone.
                    Ok(frames) => drop(answer.send(frames)),
                    Err(_) => {
                        tracing::error!("the symbolizer failed on a request and starts afresh");
                        namer = Namer::new(debuginfod.clone());
                    }
                }
            }
        }
        memory.bytes.store(namer.cache.bytes(), Ordering::Relaxed);
    }
}

/// A file of a request and its places without a name yet.
struct Unnamed {
    source: Source,
    offsets: Vec<FileOffset>,
}

/// Names stacks, and remembers names from request to request.
struct Namer {
    resolver: Resolver,
    cache: NameCache,
    /// What that may take.
    max_bytes: u64,
    debuginfod: Option<Debuginfod>,
}

impl Namer {
    fn new(debuginfod: Option<Debuginfod>) -> Self {
        Self {
            debuginfod,
            resolver: Resolver::new(),
            cache: NameCache::new(CACHED_NAMES),
            max_bytes: u64::MAX,
        }
    }

    /// Lets remembered names take so much, and parsed files in proportion.
    fn limit(&mut self, max_bytes: u64) {
        self.max_bytes = max_bytes;
        let files = max_bytes / BYTES_A_PARSED_FILE;
        self.resolver
            .limit(usize::try_from(files).unwrap_or(usize::MAX));
    }

    fn name(
        &mut self,
        stacks: &[Arc<StackTrace>],
        mappings: &dyn MappingLookup,
    ) -> Vec<Vec<Arc<Frame>>> {
        let mut sites = Sites::new(mappings);
        let stacks: Vec<Vec<AbsAddr>> = stacks.iter().map(|stack| sites.of(stack)).collect();
        let mut places: HashMap<AbsAddr, Normalized> = HashMap::new();
        for &address in stacks.iter().flatten() {
            places
                .entry(address)
                .or_insert_with(|| normalize(address, |address| mappings.lookup(address)));
        }
        let names = self.find_names(&places);
        let frames: HashMap<AbsAddr, Arc<Frame>> = places
            .into_iter()
            .map(|(address, place)| (address, Arc::new(frame(address, place, &names, mappings))))
            .collect();

        let no_stack = Arc::new(Frame {
            address: AbsAddr(0),
            mapping: None,
            file_offset: None,
            name: FrameName::Unknown(UnknownReason::NoStack),
        });
        stacks
            .iter()
            .map(|stack| {
                if stack.is_empty() {
                    return vec![Arc::clone(&no_stack)];
                }
                stack
                    .iter()
                    .filter_map(|address| frames.get(address).map(Arc::clone))
                    .collect()
            })
            .collect()
    }

    /// The names of all places that are in readable files: those known, and the
    /// others file by file.
    fn find_names(&mut self, places: &HashMap<AbsAddr, Normalized>) -> Names {
        let mut names = Names::default();
        let mut unnamed: HashMap<NamedFile, Unnamed> = HashMap::new();
        for place in places.values() {
            let Normalized::InFile {
                file, file_offset, ..
            } = place
            else {
                continue;
            };
            let Some(source) = names.source(file, self.debuginfod.as_ref()) else {
                continue;
            };
            let key = source.key;
            if names.found.contains_key(&(key, *file_offset)) {
                continue;
            }
            if let Some(name) = self.cache.get((key, *file_offset)) {
                names.found.insert((key, *file_offset), name);
            } else {
                unnamed
                    .entry(key)
                    .or_insert_with(|| Unnamed {
                        source: source.clone(),
                        offsets: Vec::new(),
                    })
                    .offsets
                    .push(*file_offset);
            }
        }
        for (
            key,
            Unnamed {
                source,
                mut offsets,
            },
        ) in unnamed
        {
            offsets.sort_unstable();
            offsets.dedup();
            let resolved = self.resolver.resolve(&source, &offsets);
            for (offset, name) in offsets.into_iter().zip(resolved) {
                let name = Arc::new(name);
                self.cache
                    .insert((key, offset), Arc::clone(&name), self.max_bytes);
                names.found.insert((key, offset), name);
            }
        }
        names
    }
}

/// The names of one request.
#[derive(Default)]
struct Names {
    found: HashMap<(NamedFile, FileOffset), Arc<FrameName>>,
    /// The source of each file's names by the file's address in memory, where it stays for
    /// as long as the request does; none if it cannot be read.
    sources: HashMap<*const MappedFile, Option<Source>>,
}

impl Names {
    fn source(
        &mut self,
        file: &Arc<MappedFile>,
        debuginfod: Option<&Debuginfod>,
    ) -> Option<Source> {
        self.sources
            .entry(Arc::as_ptr(file))
            .or_insert_with(|| Source::of(file, debuginfod))
            .clone()
    }

    fn get(&self, file: &Arc<MappedFile>, file_offset: FileOffset) -> Option<&Arc<FrameName>> {
        let source = self.sources.get(&Arc::as_ptr(file))?.as_ref()?;
        self.found.get(&(source.key, file_offset))
    }
}

fn frame(
    address: AbsAddr,
    place: Normalized,
    names: &Names,
    mappings: &dyn MappingLookup,
) -> Frame {
    match place {
        Normalized::InFile {
            mapping,
            file,
            file_offset,
        } => Frame {
            address,
            mapping: Some(mapping),
            file_offset: Some(file_offset),
            name: names
                .get(&file, file_offset)
                .map_or(FrameName::Unknown(UnknownReason::FileUnreadable), |name| {
                    FrameName::clone(name)
                }),
        },
        Normalized::Nowhere { mapping, reason } => Frame {
            address,
            mapping,
            file_offset: None,
            name: match reason {
                UnknownReason::Anonymous => mappings.generated_name(address).map_or(
                    FrameName::Unknown(reason),
                    |function| {
                        FrameName::Known(vec![FunctionLine {
                            function,
                            file: None,
                            line: None,
                        }])
                    },
                ),
                _ => FrameName::Unknown(reason),
            },
        },
    }
}

#[cfg(test)]
mod tests;
