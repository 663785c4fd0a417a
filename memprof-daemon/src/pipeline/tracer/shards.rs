//! Shards of the prefilter whose threads have ended: given back when other threads find none.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::{Command, Tracer, prefilter::Choice};
use crate::{
    pipeline::{
        install::{give_back, on_a_thread},
        stats::milliseconds,
        target::State,
    },
    prefilter::{reclaim::GivenBack, stop_error::StopError},
};

impl Tracer {
    /// Has those given back of processes in which calls were not counted for lack of one.
    pub(super) fn give_shards_back(&mut self) {
        let now = Instant::now();
        for (&pid, target) in &mut self.targets {
            // While something is put in or taken out, the process is stopped often enough.
            let is_steady = matches!(target.state, State::Tracing)
                && !target.is_hooking
                && !target.is_being_taken_out();
            let Choice::Prefilter(prefilter) = &mut target.choice else {
                continue;
            };
            if !is_steady || !prefilter.pace.is_due(prefilter.data.unsharded(), now) {
                continue;
            }
            let (serial, outline) = (target.serial, prefilter.image.outline());
            let myself = self.myself.clone();
            on_a_thread(Box::new(move || {
                let result = give_back(pid, &outline);
                if let Some(sender) = myself.upgrade() {
                    let _ = sender.blocking_send(Command::ShardsGivenBack {
                        pid,
                        serial,
                        result,
                    });
                }
            }));
        }
    }

    /// It was done, or could not be.
    pub(super) fn shards_given_back(
        &mut self,
        pid: u32,
        serial: u64,
        result: Result<GivenBack, StopError>,
    ) {
        match result {
            Ok(GivenBack { shards, stopped }) => {
                let stopped_ms = milliseconds(stopped.last);
                debug!(
                    pid,
                    shards, stopped_ms, "shards of threads that have ended are given back"
                );
                if let Some(target) = self.target_of(pid, serial)
                    && stopped.max > Duration::ZERO
                {
                    target.stopped.join(stopped);
                    target.shards_given_back += shards;
                }
            }
            Err(StopError::Ended { .. }) => {}
            // Taken out meanwhile, it has none.
            Err(error) => {
                if let Some(target) = self.target_of(pid, serial)
                    && matches!(target.choice, Choice::Prefilter(_))
                {
                    warn!(pid, %error, "calls of its new threads are not counted");
                }
            }
        }
    }
}
