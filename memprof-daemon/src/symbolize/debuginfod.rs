//! Debug files from debuginfod servers, for files that have none on this host.
//!
//! Nobody waits for a server: a file that is asked for is downloaded by a thread of its
//! own, and whoever asks after it has come has it. What is known of a build id:
//!
//! ```text
//!          ask                       download
//! nothing ─────► pending ──────────────────────────► here
//!    ▲             │  every server has none
//!    │             ├───────────────► absent ─┐ ten minutes, also on disk
//!    │             └─ no answer ───► failed ─┤ one minute
//!    └───────────────────────────────────────┘
//! ```

mod cache;
mod fetch;
pub mod settings;

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use self::{
    cache::{ABSENT_FOR, Cache, Cached},
    fetch::{Fetcher, Outcome},
    settings::Settings,
};

/// Files that may wait for their download. A file for which there is no room is asked
/// for again by the next who needs it.
const QUEUE: usize = 256;

/// How long a download that failed is not tried again.
const FAILED_FOR: Duration = Duration::from_secs(60);

/// Nobody minds that much of a download's time.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Build ids of which something is remembered. Files choose their build ids.
const REMEMBERED: usize = 4096;

/// Why the thread does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No place to keep files.
    #[error("cannot keep debug files in {directory}")]
    Cache {
        /// Where.
        directory: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The operating system gives no thread.
    #[error("cannot start the thread for debuginfod")]
    Spawn(#[source] io::Error),
}

/// What became of those files that were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Not here yet.
    pub pending: u64,
    /// Downloaded.
    pub downloaded: u64,
    /// Every server said that it has none.
    pub absent: u64,
    /// No server had it, and one did not answer, or not with what was asked for.
    pub failed: u64,
    /// Not asked for, as too many waited.
    pub queue_full: u64,
}

/// Asks for debug files. The thread ends with the last of its clones.
#[derive(Clone)]
pub struct Debuginfod {
    queue: SyncSender<Vec<u8>>,
    known: Arc<Known>,
}

impl fmt::Debug for Debuginfod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Debuginfod")
    }
}

/// What is shared with the thread.
struct Known {
    state: Mutex<State>,
    cache: Cache,
}

#[derive(Default)]
struct State {
    files: HashMap<Vec<u8>, Entry>,
    counts: Counts,
}

enum Entry {
    Pending,
    Here(Arc<File>),
    Unavailable { until: Instant },
}

impl Debuginfod {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// Without a cache directory or a thread.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let cache = Cache::open(settings.cache.clone()).map_err(|source| StartError::Cache {
            directory: settings.cache.display().to_string(),
            source,
        })?;
        let (queue, requests) = sync_channel(QUEUE);
        let known = Arc::new(Known {
            state: Mutex::default(),
            cache,
        });
        let fetcher = Fetcher::new(settings);
        thread::Builder::new()
            .name("memprof-fetch".to_owned())
            .spawn({
                let known = Arc::clone(&known);
                move || known.serve(&requests, fetcher)
            })
            .map_err(StartError::Spawn)?;
        Ok(Self { queue, known })
    }

    /// The debug file of the file with this build id, if it is here. If not, it is on its
    /// way when this returns, unless there is none.
    #[must_use]
    pub fn find(&self, build_id: &[u8]) -> Option<Arc<File>> {
        let mut state = self.known.lock();
        match state.files.get(build_id) {
            Some(Entry::Here(file)) => return Some(Arc::clone(file)),
            Some(Entry::Pending) => return None,
            Some(Entry::Unavailable { until }) if Instant::now() < *until => return None,
            Some(Entry::Unavailable { .. }) | None => {}
        }
        let entry = match self.known.cache.look_up(build_id) {
            Cached::Here(file) => Entry::Here(Arc::new(file)),
            Cached::Absent(left) => Entry::Unavailable {
                until: Instant::now() + left,
            },
            Cached::Unknown => match self.queue.try_send(build_id.to_owned()) {
                Ok(()) => {
                    state.counts.pending += 1;
                    Entry::Pending
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    state.counts.queue_full += 1;
                    return None;
                }
            },
        };
        state.remember(build_id, entry)
    }

    /// What became of the files so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.known.lock().counts
    }

    /// Until nothing is pending.
    pub async fn settled(&self) {
        while self.counts().pending > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl State {
    /// Remembers what has become of a build id, and says what there is of it.
    fn remember(&mut self, build_id: &[u8], entry: Entry) -> Option<Arc<File>> {
        if self.files.len() >= REMEMBERED {
            // The rest is on disk, or is asked for again.
            self.files
                .retain(|_, entry| matches!(entry, Entry::Pending));
        }
        let file = match &entry {
            Entry::Here(file) => Some(Arc::clone(file)),
            Entry::Pending | Entry::Unavailable { .. } => None,
        };
        self.files.insert(build_id.to_owned(), entry);
        file
    }
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Downloads until nobody can ask any more.
    fn serve(&self, requests: &Receiver<Vec<u8>>, mut fetcher: Fetcher) {
        while let Ok(build_id) = requests.recv() {
            let outcome = fetcher.fetch(&build_id, &self.cache);
            if matches!(outcome, Outcome::Absent)
                && let Err(error) = self.cache.remember_absent(&build_id)
            {
                tracing::warn!(%error, "cannot remember that no server has a debug file");
            }
            let mut state = self.lock();
            let unavailable = |time| Entry::Unavailable {
                until: Instant::now() + time,
            };
            let entry = match outcome {
                Outcome::Here(file) => {
                    state.counts.downloaded += 1;
                    Entry::Here(Arc::new(file))
                }
                Outcome::Absent => {
                    state.counts.absent += 1;
                    unavailable(ABSENT_FOR)
                }
                Outcome::Failed => {
                    state.counts.failed += 1;
                    unavailable(FAILED_FOR)
                }
            };
            state.counts.pending = state.counts.pending.saturating_sub(1);
            state.remember(&build_id, entry);
        }
    }
}

#[cfg(test)]
mod tests;
