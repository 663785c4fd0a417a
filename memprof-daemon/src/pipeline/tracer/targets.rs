//! Letting a process go while it lives.
//!
//! The order is that of the daemon's own end: the prefilter is taken out, then the probes.
//! Only then are the books closed, since until then samples come. The profile stays, as that
//! of a process that has exited.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use thiserror::Error;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{
    Command, Tracer,
    prefilter::{Choice, Prefilter},
    rules::LetGo,
};
use crate::{
    pipeline::{
        image::Image,
        install::on_a_thread,
        target::{State, Target},
    },
    prefilter::{attach::StoppedTime, error::DetachError},
    sample::ImageId,
};

/// Why a process cannot be let go.
#[derive(Clone, Copy, Debug, Error)]
pub enum LeaveError {
    /// It is not traced, or not any more.
    #[error("process {0} is not traced")]
    NotTraced(u32),
    /// It is being attached to, or let go already.
    #[error("process {0} is being attached to or let go at this moment: try again")]
    Busy(u32),
    /// The tracer has ended.
    #[error("the tracer has ended")]
    Stopped,
}

/// What came of letting a process go.
#[derive(Clone, Debug)]
pub struct Left {
    /// The process.
    pub pid: u32,
    /// How long the kernel took to detach the probes, if it had to.
    pub detach_time: Option<Duration>,
    /// For how long it stood still for that.
    pub stopped: Duration,
    /// Why its prefilter is still in it, if that could not be taken out.
    pub remains: Option<String>,
}

/// The answer to a request to let a process go.
pub(in crate::pipeline) type LeaveReply = oneshot::Sender<Result<Left, LeaveError>>;

/// Whether a target is let go.
#[derive(Debug, Default)]
pub(in crate::pipeline) enum Leaving {
    /// It is traced.
    #[default]
    No,
    /// As soon as nothing is put into it.
    Asked(LeaveReply),
    /// The prefilter is being taken out, by a thread that must not end half-way.
    TakingOut(LeaveReply),
    /// The probes are being taken off.
    TakingOff {
        reply: LeaveReply,
        stopped: Duration,
        remains: Option<String>,
    },
    /// It is done.
    Left,
}

/// The prefilter has been taken out, or could not be.
pub(in crate::pipeline) struct TakenOut {
    image: ImageId,
    prefilter: Option<Box<Prefilter>>,
    result: Option<Result<StoppedTime, DetachError>>,
}

/// How long programs of BPF's are waited for that have looked a process up before it was
/// let go.
const GRACE: Duration = Duration::from_millis(20);

impl Tracer {
    /// Begins to let a process go, since somebody has asked for it: no rule takes it on again,
    /// until it runs another program.
    pub(super) fn detach_for_good(&mut self, pid: u32, reply: LeaveReply) {
        if let Some(target) = self.targets.get(&pid).filter(|target| target.is_live())
            && let Some(image) = target.images.last()
            && let Some(system) = &mut self.system
        {
            system.let_go.insert(pid, LetGo::of(&image.info));
        }
        if self.targets.get(&pid).is_some_and(Target::is_live)
            && let Some(family) = &mut self.family
        {
            family.let_go(pid);
        }
        self.detach(pid, reply);
    }

    /// Begins to let a process go.
    fn detach(&mut self, pid: u32, reply: LeaveReply) {
        let Some(target) = self.targets.get_mut(&pid) else {
            let _ = reply.send(Err(LeaveError::NotTraced(pid)));
            return;
        };
        match (&target.state, &target.leaving) {
            (State::Ended, Leaving::No | Leaving::Left) => {
                let _ = reply.send(Err(LeaveError::NotTraced(pid)));
            }
            (State::Tracing, Leaving::No) => {
                target.leaving = Leaving::Asked(reply);
                self.leave_if_asked(pid);
            }
            _ => {
                let _ = reply.send(Err(LeaveError::Busy(pid)));
            }
        }
    }

    /// Lets a process go that rules leave out by now.
    pub(super) fn begin_to_leave(&mut self, pid: u32) {
        let (reply, _) = oneshot::channel();
        self.detach(pid, reply);
    }

    /// Goes on with letting a process go, once nothing is being put into it.
    pub(super) fn leave_if_asked(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        if target.is_hooking || target.is_clearing || !matches!(target.leaving, Leaving::Asked(_)) {
            return;
        }
        target.refresh_stubs();
        let (Leaving::Asked(reply), Some(image)) = (
            std::mem::take(&mut target.leaving),
            target.images.last().map(|image| image.id),
        ) else {
            return;
        };
        match std::mem::take(&mut target.choice) {
            Choice::Prefilter(prefilter) => {
                target.leaving = Leaving::TakingOut(reply);
                self.begin_to_take_out(image, prefilter);
            }
            other => {
                target.choice = other;
                target.leaving = Leaving::TakingOff {
                    reply,
                    stopped: Duration::ZERO,
                    remains: None,
                };
                self.take_probes_off(pid);
            }
        }
    }

    fn begin_to_take_out(&self, image: ImageId, prefilter: Box<Prefilter>) {
        let time_limit = self.options.attach_timeout;
        // What it has counted is read once more afterwards; so it comes back, also if there
        // is no thread to have it.
        let place = Arc::new(Mutex::new(Some(prefilter)));
        let (sender, outcome) = oneshot::channel();
        on_a_thread(Box::new({
            let place = Arc::clone(&place);
            move || {
                let place = place.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(prefilter) = &*place {
                    let _ = sender.send(prefilter.take_out(image.pid, time_limit));
                }
            }
        }));
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let result = outcome.await.ok();
            let prefilter = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            let taken_out = Box::new(TakenOut {
                image,
                prefilter,
                result,
            });
            if let Some(sender) = myself.upgrade() {
                let _ = sender.send(Command::TakenOut(taken_out)).await;
            }
        });
    }

    /// The prefilter is out.
    pub(super) fn taken_out(&mut self, taken_out: TakenOut) {
        let TakenOut {
            image,
            prefilter,
            result,
        } = taken_out;
        let pid = image.pid;
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        // Of a program that was replaced meanwhile nothing is left to be read.
        if let Some(prefilter) = prefilter
            && target.images.last().is_some_and(|last| last.id == image)
        {
            target.choice = Choice::Prefilter(prefilter);
            drop(target.end_stubs());
        }
        target.image_bytes = 0;
        let (stopped, remains) = match result {
            Some(Ok(time)) => {
                target.stopped.join(time);
                (time.last, None)
            }
            Some(Err(error)) => (Duration::ZERO, Some(error.to_string())),
            None => {
                let error = "no thread was left to take it out".to_owned();
                (Duration::ZERO, Some(error))
            }
        };
        if let Some(error) = &remains {
            warn!(pid, error, "cannot take the prefilter out");
        }
        if let Leaving::TakingOut(reply) = std::mem::take(&mut target.leaving) {
            target.leaving = Leaving::TakingOff {
                reply,
                stopped,
                remains,
            };
        }
        self.take_probes_off(pid);
    }

    fn take_probes_off(&mut self, pid: u32) {
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        let (slot, serial, is_shared) = (target.slot, target.serial, target.is_shared);
        // As it is now, if it is one of Go.
        let image = target.images.last();
        let last_reading = image.and_then(|image| Some(image.go.as_ref()?.last_reading(image.id)));
        if is_shared {
            self.stop_sharing(pid);
        }
        let prober = self.prober.clone();
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let time = if is_shared {
                // Those programs that run now are done then.
                tokio::time::sleep(GRACE).await;
                None
            } else {
                prober.detach(slot).await
            };
            let read = match last_reading.flatten() {
                Some(reading) => tokio::task::spawn_blocking(reading).await.ok(),
                None => None,
            };
            if let Some(sender) = myself.upgrade() {
                if let Some(read) = read {
                    let _ = sender.send(Command::GoRead(Box::new(read))).await;
                }
                let _ = sender.send(Command::Left { pid, serial, time }).await;
            }
        });
    }

    /// Nothing of ours is in the process any more.
    pub(super) fn left(&mut self, pid: u32, serial: u64, detach_time: Option<Duration>) {
        // It may have exited meanwhile.
        if self
            .target_of(pid, serial)
            .is_some_and(|target| target.is_live())
        {
            self.close_target(pid);
            info!(pid, "the process has been let go");
        }
        let Some(target) = self.target_of(pid, serial) else {
            return;
        };
        target.detach_time = detach_time;
        if let Leaving::TakingOff {
            reply,
            stopped,
            remains,
        } = std::mem::replace(&mut target.leaving, Leaving::Left)
        {
            let _ = reply.send(Ok(Left {
                pid,
                detach_time,
                stopped,
                remains,
            }));
        }
        // Rules may want it otherwise.
        self.look_again(pid);
    }

    /// Lets a process go that turned up, or runs a program now, that is not to be traced.
    pub(super) fn let_unwanted_go(&mut self) {
        for pid in std::mem::take(&mut self.unwanted) {
            let Some(target) = self.targets.get(&pid).filter(|target| target.is_live()) else {
                continue;
            };
            // It may run another program by now.
            let is_wanted = target
                .images
                .last()
                .is_some_and(|image| self.is_as_wanted(target, &image.info));
            let is_shared = target.is_shared;
            let stays = is_wanted && self.is_sharing() == is_shared;
            let Some(target) = self.targets.get_mut(&pid) else {
                continue;
            };
            if stays {
                target.is_unwanted = false;
                continue;
            }
            if !is_shared {
                self.begin_to_leave(pid);
                continue;
            }
            target.leaving = Leaving::Left;
            self.stop_sharing(pid);
            self.close_target(pid);
        }
    }
}

impl Target {
    /// Whether it is a Go program of which nothing can be read.
    fn is_refused(&self) -> bool {
        self.images.last().is_some_and(Image::is_refused)
    }

    /// Whether it is not in the middle of being let go.
    pub(super) const fn has_settled(&self) -> bool {
        matches!(self.leaving, Leaving::No | Leaving::Left)
    }

    /// Whether it is let go, or is to be: nothing more is put into it.
    pub(super) const fn is_leaving(&self) -> bool {
        !matches!(self.leaving, Leaving::No)
    }

    /// Whether a thread is stopping it to take the prefilter out.
    pub(super) const fn is_being_taken_out(&self) -> bool {
        matches!(self.leaving, Leaving::TakingOut(_))
    }

    /// Where it is in its life, for those who ask.
    pub(super) fn state_name(&self) -> &'static str {
        match (&self.state, &self.leaving) {
            (State::Ended, Leaving::Left) => "detached",
            (State::Tracing, Leaving::No) if self.is_refused() => "refused",
            (State::Tracing, Leaving::No) => State::Tracing.name(),
            (State::Tracing, _) => "detaching",
            (state, _) => state.name(),
        }
    }
}
