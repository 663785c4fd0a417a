//! The thread that attaches and detaches, and the handle to it.

use std::{
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::probe::attach::{AttachError, FileId, ImageSite, Prober, Site};

enum Request {
    Attach {
        slot: u16,
        pid: u32,
        sites: Vec<Site>,
        reply: oneshot::Sender<Result<Duration, AttachError>>,
    },
    AttachImage {
        slot: u16,
        pid: u32,
        path: PathBuf,
        sites: Vec<ImageSite>,
        reply: oneshot::Sender<Result<(), AttachError>>,
    },
    AttachShared {
        file: FileId,
        sites: Vec<Site>,
        reply: oneshot::Sender<Result<Duration, AttachError>>,
    },
    DetachShared {
        file: FileId,
        reply: oneshot::Sender<Duration>,
    },
    Detach {
        slot: u16,
        reply: oneshot::Sender<Duration>,
    },
    DetachAll {
        reply: oneshot::Sender<Duration>,
    },
}

/// Talks to the thread that owns the [`Prober`]. When the last handle is gone,
/// the thread takes every probe off and ends.
#[derive(Clone, Debug)]
pub(super) struct ProberHandle {
    requests: mpsc::Sender<Request>,
}

impl ProberHandle {
    /// Moves `prober` to a thread of its own.
    ///
    /// # Errors
    ///
    /// If the system has no thread left.
    pub(super) fn spawn(mut prober: Prober) -> std::io::Result<Self> {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("memprof-probe".to_owned())
            .spawn(move || {
                for request in inbox {
                    serve(&mut prober, request);
                }
                prober.detach_all();
            })?;
        Ok(Self { requests })
    }

    /// Probes all `sites` or none; how long it took.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub(super) async fn attach(
        &self,
        slot: u16,
        pid: u32,
        sites: Vec<Site>,
    ) -> Result<Duration, AttachError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Attach {
                slot,
                pid,
                sites,
                reply,
            })
            .map_err(|_| AttachError::Gone)?;
        answer.await.map_err(|_| AttachError::Gone)?
    }

    /// Probes all `sites` of a file or none, for every process; how long it took.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub(super) async fn attach_shared(
        &self,
        file: FileId,
        sites: Vec<Site>,
    ) -> Result<Duration, AttachError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::AttachShared { file, sites, reply })
            .map_err(|_| AttachError::Gone)?;
        answer.await.map_err(|_| AttachError::Gone)?
    }

    /// Takes the probes off that are every process's in a file; when it is done, or if there
    /// is no thread to do it.
    pub(super) async fn detach_shared(&self, file: FileId) {
        let (reply, answer) = oneshot::channel();
        if self
            .requests
            .send(Request::DetachShared { file, reply })
            .is_ok()
        {
            let _ = answer.await;
        }
    }

    /// Probes the sites of a prefilter's image, for a thread outside of the runtime.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub(super) fn attach_image(
        &self,
        slot: u16,
        pid: u32,
        path: PathBuf,
        sites: Vec<ImageSite>,
    ) -> Result<(), AttachError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::AttachImage {
                slot,
                pid,
                path,
                sites,
                reply,
            })
            .map_err(|_| AttachError::Gone)?;
        answer.blocking_recv().map_err(|_| AttachError::Gone)?
    }

    /// Takes the probes of one target off; how long it took, none if there is
    /// no thread to do it (then the kernel has).
    pub(super) async fn detach(&self, slot: u16) -> Option<Duration> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Detach { slot, reply }).ok()?;
        answer.await.ok()
    }

    /// As [`Self::detach`], for whom need not know when: before anything that is
    /// asked for later.
    pub(super) fn detach_soon(&self, slot: u16) {
        let (reply, _) = oneshot::channel();
        // Without the thread there are no probes either.
        let _ = self.requests.send(Request::Detach { slot, reply });
    }

    /// Takes every probe off.
    pub(super) async fn detach_all(&self) -> Option<Duration> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::DetachAll { reply }).ok()?;
        answer.await.ok()
    }
}

fn serve(prober: &mut Prober, request: Request) {
    let start = Instant::now();
    // Whoever asked may have stopped waiting; the work is done all the same.
    match request {
        Request::Attach {
            slot,
            pid,
            sites,
            reply,
        } => {
            let result = prober.attach(slot, pid, &sites);
            let _ = reply.send(result.map(|()| start.elapsed()));
        }
        Request::AttachImage {
            slot,
            pid,
            path,
            sites,
            reply,
        } => {
            let _ = reply.send(prober.attach_image(slot, pid, &path, &sites));
        }
        Request::AttachShared { file, sites, reply } => {
            let result = prober.attach_shared(file, &sites);
            let _ = reply.send(result.map(|()| start.elapsed()));
        }
        Request::DetachShared { file, reply } => {
            prober.detach_shared(file);
            let _ = reply.send(start.elapsed());
        }
        Request::Detach { slot, reply } => {
            prober.detach(slot);
            let _ = reply.send(start.elapsed());
        }
        Request::DetachAll { reply } => {
            prober.detach_all();
            let _ = reply.send(start.elapsed());
        }
    }
}
