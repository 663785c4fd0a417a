//! Taking the prefilter out of processes that are not let go by themselves: at the daemon's end,
//! and where a program was replaced.

use std::time::Duration;

use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::{Command, Tracer, prefilter::Choice};
use crate::{
    pipeline::{
        install::{on_a_thread, take_out},
        stats::milliseconds,
        target::Target,
    },
    prefilter::attach::Image,
};

impl Tracer {
    /// Takes an image out that is not wanted any more. It may be gone.
    pub(super) fn discard(&self, pid: u32, image: Image) {
        let time_limit = self.options.attach_timeout;
        on_a_thread(Box::new(move || {
            if let Err(error) = take_out(pid, &image, time_limit) {
                warn!(pid, %error, "cannot take the prefilter out");
            }
        }));
    }

    /// Takes the prefilter out of every target.
    pub(super) async fn take_all_out(&mut self) {
        let time_limit = self.options.attach_timeout;
        let mut outcomes = Vec::new();
        for (&pid, target) in self.targets.iter_mut() {
            if !target.is_live() {
                continue;
            }
            let Choice::Prefilter(prefilter) = std::mem::take(&mut target.choice) else {
                continue;
            };
            let (sender, outcome) = oneshot::channel();
            on_a_thread(Box::new(move || {
                let result = prefilter.take_out(pid, time_limit);
                // A lock on its files says that they are in use.
                drop(prefilter);
                let _ = sender.send(result);
            }));
            outcomes.push((pid, outcome));
        }
        for (pid, outcome) in outcomes {
            match outcome.await {
                Ok(Ok(stopped)) => {
                    let longest_stopped_ms = milliseconds(stopped.max);
                    debug!(pid, longest_stopped_ms, "the prefilter is out");
                }
                Ok(Err(error)) => warn!(pid, %error, "cannot take the prefilter out"),
                Err(_) => warn!(pid, "no thread was left to take the prefilter out"),
            }
        }
    }

    /// Waits for what is being hooked, so that it can be taken out, and for what is being taken
    /// out: no process may be left half-way.
    pub(super) async fn settle_hooking(&mut self) {
        let is_busy = |target: &Target| target.is_hooking || target.is_being_taken_out();
        while self.targets.values().any(is_busy) {
            // Twice what one may take, for stopping and for undoing, and as long for one that
            // it has to wait for.
            let limit = 4 * self.options.attach_timeout + Duration::from_secs(1);
            match tokio::time::timeout(limit, self.commands.recv()).await {
                Ok(Some(Command::Hooked(hooked))) => self.hooked(*hooked),
                Ok(Some(Command::TakenOut(taken_out))) => self.taken_out(*taken_out),
                // Who else asks hears that the tracer has ended.
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}
