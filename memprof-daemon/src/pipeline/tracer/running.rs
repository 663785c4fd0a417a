//! The loop: what happens, one thing after the other.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::MissedTickBehavior;
use tracing::{error, warn};

use super::{Tracer, handle::Command};
use crate::{
    decode::decode,
    ring::{log::LogReader, mmap_events::MmapAlarm},
    sample::Sample,
};

/// Records of the ring that are taken before other work gets its turn.
const DRAIN_LIMIT: usize = 4096;

/// After new mappings were looked at, others wait so long: programs that start one after the
/// other keep nobody busy.
const MMAP_REST: Duration = Duration::from_millis(5);

/// How long files that no process maps any more are held, in case that another one does.
const HOLD_FILES: Duration = Duration::from_secs(10);

/// How often what nobody announces is looked after: new mappings, lost events.
const TICK: Duration = Duration::from_millis(100);

/// How many ticks pass between rounds of what costs more: sweeps, and readings
/// of the targets' memory.
const SLOW_TICKS: u32 = 10;

impl Tracer {
    pub(super) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0_u32;
        let mut batch: Vec<Sample> = Vec::with_capacity(DRAIN_LIMIT);
        loop {
            let mut undecodable = 0;
            // Where waiting ends and work begins.
            let begun;
            let next_child = self.next_child();
            tokio::select! {
                drained = self.ring.drain(DRAIN_LIMIT, |record| match decode(record) {
                    Ok(sample) => batch.push(sample),
                    Err(_) => undecodable += 1,
                }) => {
                    begun = Instant::now();
                    if let Err(error) = drained {
                        // Without its ring the tracer is blind; a sweep at each
                        // tick would still keep in-use right, but say so.
                        error!(%error, "cannot wait for the event ring");
                        tokio::time::sleep(TICK).await;
                    }
                }
                command = self.commands.recv() => match command {
                    Some(Command::Stop { reply }) => {
                        self.settle_hooking().await;
                        self.take_all_out().await;
                        let time = self.prober.detach_all().await;
                        let _ = reply.send(time);
                        return;
                    }
                    Some(command) => {
                        begun = Instant::now();
                        self.serve(command);
                    }
                    None => {
                        self.take_all_out().await;
                        self.prober.detach_all().await;
                        return;
                    }
                },
                result = mapped(self.mmap_alarm.as_ref(), self.mmap_rest) => {
                    begun = Instant::now();
                    if let Err(error) = result {
                        warn!(%error, "new mappings are looked after ten times a second only");
                        self.mmap_alarm = None;
                    }
                    self.drain_mmap_events();
                    self.mmap_rest = Some(Instant::now() + MMAP_REST);
                }
                () = reached(self.publish_at) => {
                    begun = Instant::now();
                    self.publish_ready();
                }
                () = reached(next_child) => {
                    begun = Instant::now();
                    self.take_on_children();
                }
                () = flush_log(&mut self.log) => begun = Instant::now(),
                _ = tick.tick() => {
                    ticks = ticks.wrapping_add(1);
                    begun = Instant::now();
                    self.look_after(ticks.is_multiple_of(SLOW_TICKS));
                }
            }
            self.undecodable_events += undecodable;
            self.apply_all(&batch);
            batch.clear();
            self.bound_blocks();
            self.close_replaced();
            self.let_unwanted_go();
            self.write_stack_copies();
            self.work.longest_round = self.work.longest_round.max(begun.elapsed());
            // There is more, and there will be: let others have their turn, the signal that
            // ends all of this among them.
            tokio::task::yield_now().await;
        }
    }

    fn serve(&mut self, command: Command) {
        match command {
            Command::Attach { pid, holder, reply } => self.begin_attach(pid, holder, reply),
            Command::Scanned { pid, result } => self.scanned(pid, result),
            Command::Rescanned { image, result } => self.rescanned(image, result),
            Command::Found(found) => self.found(found),
            Command::ReadGo { pid, done } => self.read_go_now(pid, &done),
            Command::GoRead(read) => self.go_read(*read),
            Command::AttachDone { pid, batch, result } => self.attach_done(pid, batch, result),
            Command::Hooked(hooked) => self.hooked(*hooked),
            Command::ShardsGivenBack {
                pid,
                serial,
                result,
            } => {
                self.shards_given_back(pid, serial, result);
            }
            Command::Detached { pid, serial, time } => {
                if let Some(target) = self.target_of(pid, serial) {
                    // The thread that detaches may have ended, and all probes with it.
                    target.detach_time = time.or(Some(Duration::ZERO));
                }
            }
            Command::Exited { pid, serial } => self.exited(pid, serial),
            Command::TraceAll { reply } => self.trace_all(reply),
            Command::Swept(swept) => self.swept(&swept),
            Command::Considered(considered) => self.considered(considered),
            Command::Unshared => self.unshared(),
            Command::ChildScanned {
                pid,
                serial,
                result,
            } => self.child_scanned(pid, serial, result),
            Command::Parents(parents) => self.parents_looked(&parents),
            Command::ChildrenSettled { reply } => self.when_settled(reply),
            Command::RuleAttach { pid, result } => self.taken_on_by_rule(pid, result),
            Command::Looked(looked) => self.looked(looked),
            Command::GoAttach { pid, runs, result } => self.go_taken_on(pid, runs, result),
            Command::Shared { file, result } => self.shared(file, result),
            Command::Met { pid, serial, scan } => self.met(pid, serial, scan),
            Command::SlotFree { slot, pid } => {
                tracing::debug!(pid, slot, "the slot is free");
                self.give_back(slot, true);
            }
            Command::Compiled { pid, file, table } => self.compiled(pid, file, table),
            Command::Capture { pid, since, reply } => {
                let capture = self.capture(pid, since.as_deref());
                let _ = reply.send(capture);
            }
            Command::Mark { reply } => {
                let _ = reply.send(Arc::new(self.mark()));
            }
            Command::Reset { reply } => {
                let _ = reply.send(self.reset());
            }
            Command::Detach { pid, reply } => self.detach_for_good(pid, reply),
            Command::TakenOut(taken_out) => self.taken_out(*taken_out),
            Command::Left { pid, serial, time } => self.left(pid, serial, time),
            Command::Processes { reply } => {
                let processes = self.processes();
                let _ = reply.send(processes);
            }
            Command::Config { reply } => {
                let _ = reply.send(self.config());
            }
            Command::SetConfig { change, reply } => {
                let result = self.set_config(change);
                let _ = reply.send(result);
            }
            Command::Stats { reply } => {
                let stats = self.stats();
                let _ = reply.send(stats);
            }
            // Served by the loop, which it ends.
            Command::Stop { reply } => drop(reply),
        }
    }

    /// The regular round.
    fn look_after(&mut self, slow: bool) {
        self.drain_mmap_events();
        // BPF wakes the reader of the ring for little.
        self.drain_ring();
        self.refill();
        self.give_shards_back();
        self.look_after_all(slow);
        self.look_after_children(slow);
        if slow {
            self.scanner.forget_files(HOLD_FILES);
            self.forget_kept();
            self.look_after_memory();
            // Reads the whole live map: not at every tick while events get lost.
            self.sweep_if_lossy();
            self.refresh_memory_in_turn();
            self.read_go_in_turn();
        }
    }
}

/// Waits for a new mapping, of any process, after a moment's rest; for ever without an alarm.
async fn mapped(alarm: Option<&MmapAlarm>, rest: Option<Instant>) -> io::Result<()> {
    if let Some(rest) = rest.filter(|rest| *rest > Instant::now()) {
        tokio::time::sleep_until(rest.into()).await;
    }
    match alarm {
        Some(alarm) => alarm.recorded().await,
        None => std::future::pending().await,
    }
}

/// Waits for a moment; for ever without one.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Passes on what the BPF side has logged; never returns without a log.
async fn flush_log(log: &mut Option<LogReader>) {
    match log {
        Some(reader) => {
            if let Err(error) = reader.flush().await {
                warn!(%error, "cannot wait for the log of the BPF programs");
                *log = None;
            }
        }
        None => std::future::pending().await,
    }
}
