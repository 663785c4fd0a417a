//! The thread that finds names.
//!
//! Naming reads files, takes seconds for large debug information, and needs one
//! thread; so requests go to it through a channel, and answers come back.

use std::{
    collections::HashMap,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    address::{AbsAddr, FileOffset, FrameAddress},
    ledger::snapshot::StackTrace,
    process::mapping::{MappedFile, MappingLookup},
    symbolize::{
        cache::NameCache,
        frame::{Frame, FrameName, FunctionLine, UnknownReason},
        normalize::{Normalized, normalize},
        resolve::{FileKey, Resolver},
    },
};

/// Requests that may wait. Those who ask wait for the answer anyway.
const QUEUE: usize = 8;

/// Names that are remembered: of about 200 bytes each.
const CACHED_NAMES: usize = 1 << 18;

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

struct Request {
    stacks: Vec<Arc<StackTrace>>,
    mappings: Mappings,
    answer: oneshot::Sender<Vec<Vec<Arc<Frame>>>>,
}

/// Asks the thread for names. The thread ends with the last handle.
#[derive(Clone)]
pub struct SymbolizeHandle {
    requests: mpsc::Sender<Request>,
}

impl fmt::Debug for SymbolizeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SymbolizeHandle")
    }
}

impl SymbolizeHandle {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// If the operating system gives none.
    pub fn start() -> Result<Self, SymbolizeError> {
        let (requests, receiver) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("memprof-symbolize".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(receiver))
            .map_err(SymbolizeError::Spawn)?;
        Ok(Self { requests })
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
        let request = Request {
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
fn serve(mut requests: mpsc::Receiver<Request>) {
    let mut namer = Namer::new();
    while let Some(request) = requests.blocking_recv() {
        let Request {
            stacks,
            mappings,
            answer,
        } = request;
        if answer.is_closed() {
            continue;
        }
        // After a panic the namer is dropped, so nobody sees what it left.
        match catch_unwind(AssertUnwindSafe(|| namer.name(&stacks, &*mappings))) {
            // Who asked may have gone.
            Ok(frames) => drop(answer.send(frames)),
            Err(_) => {
                tracing::error!("the symbolizer failed on a request and starts afresh");
                namer = Namer::new();
            }
        }
    }
}

/// A file of a request and its places without a name yet.
struct Unnamed {
    file: Arc<MappedFile>,
    offsets: Vec<FileOffset>,
}

/// Names stacks, and remembers names from request to request.
struct Namer {
    resolver: Resolver,
    cache: NameCache,
}

impl Namer {
    fn new() -> Self {
        Self {
            resolver: Resolver::new(),
            cache: NameCache::new(CACHED_NAMES),
        }
    }

    fn name(
        &mut self,
        stacks: &[Arc<StackTrace>],
        mappings: &dyn MappingLookup,
    ) -> Vec<Vec<Arc<Frame>>> {
        let mut places: HashMap<FrameAddress, Normalized> = HashMap::new();
        for &address in stacks.iter().flat_map(|stack| &stack.frames) {
            places
                .entry(address)
                .or_insert_with(|| normalize(address, |address| mappings.lookup(address)));
        }
        let names = self.find_names(&places);
        let frames: HashMap<FrameAddress, Arc<Frame>> = places
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
                if stack.frames.is_empty() {
                    return vec![Arc::clone(&no_stack)];
                }
                stack
                    .frames
                    .iter()
                    .filter_map(|address| frames.get(address).map(Arc::clone))
                    .collect()
            })
            .collect()
    }

    /// The names of all places that are in readable files: those known, and the
    /// others file by file.
    fn find_names(&mut self, places: &HashMap<FrameAddress, Normalized>) -> Names {
        let mut names = Names::default();
        let mut unnamed: HashMap<FileKey, Unnamed> = HashMap::new();
        for place in places.values() {
            let Normalized::InFile {
                file, file_offset, ..
            } = place
            else {
                continue;
            };
            let Some(key) = names.key(file) else {
                continue;
            };
            if names.found.contains_key(&(key, *file_offset)) {
                continue;
            }
            if let Some(name) = self.cache.get((key, *file_offset)) {
                names.found.insert((key, *file_offset), name);
            } else {
                unnamed
                    .entry(key)
                    .or_insert_with(|| Unnamed {
                        file: Arc::clone(file),
                        offsets: Vec::new(),
                    })
                    .offsets
                    .push(*file_offset);
            }
        }
        for (key, Unnamed { file, mut offsets }) in unnamed {
            offsets.sort_unstable();
            offsets.dedup();
            let resolved = self.resolver.resolve(&file, &offsets);
            for (offset, name) in offsets.into_iter().zip(resolved) {
                let name = Arc::new(name);
                self.cache.insert((key, offset), Arc::clone(&name));
                names.found.insert((key, offset), name);
            }
        }
        names
    }
}

/// The names of one request.
#[derive(Default)]
struct Names {
    found: HashMap<(FileKey, FileOffset), Arc<FrameName>>,
    /// The key of each file by its address in memory, where it stays for as
    /// long as the request does; none if it cannot be read.
    keys: HashMap<*const MappedFile, Option<FileKey>>,
}

impl Names {
    fn key(&mut self, file: &Arc<MappedFile>) -> Option<FileKey> {
        *self
            .keys
            .entry(Arc::as_ptr(file))
            .or_insert_with(|| FileKey::of(file.file.as_ref()?).ok())
    }

    fn get(&self, file: &Arc<MappedFile>, file_offset: FileOffset) -> Option<&Arc<FrameName>> {
        let key = (*self.keys.get(&Arc::as_ptr(file))?)?;
        self.found.get(&(key, file_offset))
    }
}

fn frame(
    address: FrameAddress,
    place: Normalized,
    names: &Names,
    mappings: &dyn MappingLookup,
) -> Frame {
    let address = address.call_site();
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
