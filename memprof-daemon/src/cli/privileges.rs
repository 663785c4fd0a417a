//! What the daemon may do once it has started: no more than tracing needs. `docs/service.md`
//! has how that was found out.

use anyhow::Context as _;
use caps::{CapSet, Capability, CapsHashSet};

use crate::probe::mode::{ModeChoice, ProbeMode};

/// What is kept, and what for.
const KEPT: [Capability; 6] = [
    // Loading programs and making maps: tables of programs that are met later need new ones.
    Capability::CAP_BPF,
    // Probing, and records about mappings.
    Capability::CAP_PERFMON,
    // Reading of processes of other users; the prefilter's ptrace.
    Capability::CAP_SYS_PTRACE,
    // Opening mapped files by /proc/PID/map_files.
    Capability::CAP_CHECKPOINT_RESTORE,
    // Programs, debug information and directories that root may not read by their mode.
    Capability::CAP_DAC_READ_SEARCH,
    // Buffers of records about mappings, where other tracers have used up what perf lets each
    // user lock.
    Capability::CAP_IPC_LOCK,
];

/// Capabilities that a daemon keeps.
#[derive(Clone, Debug)]
pub(super) struct Kept(CapsHashSet);

impl Kept {
    /// Of those that it has now, what a way to attach needs.
    ///
    /// # Errors
    ///
    /// The kernel does not say what it has.
    pub(super) fn of(choice: ModeChoice) -> anyhow::Result<Self> {
        let held = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
        let is_held = |one: &Capability| held.contains(one);
        let mut kept: CapsHashSet = KEPT.into_iter().filter(is_held).collect();
        // It stands for this one, and was the only one before Linux 5.9.
        let stands_in = !kept.contains(&Capability::CAP_CHECKPOINT_RESTORE);
        // A process's seccomp filter is suspended while the prefilter is put in
        // (`ptrace_setoptions` in kernel/ptrace.c wants it), and who has stopped a process must
        // not wait for a processor (`can_nice` in kernel/sched/syscalls.c).
        let stops = choice.may_write();
        // aya attaches by perf events a program that it finds by its number, which the kernel
        // lets nobody else do (`bpf_prog_get_fd_by_id` in kernel/bpf/syscall.c).
        let by_perf = choice.resolve().is_ok_and(|mode| mode == ProbeMode::Perf);
        let more = [
            (Capability::CAP_SYS_ADMIN, stands_in || stops || by_perf),
            (Capability::CAP_SYS_NICE, stops),
        ];
        let more = more
            .into_iter()
            .filter(|(one, wanted)| *wanted && is_held(one));
        kept.extend(more.map(|(one, _)| one));
        Ok(Self(kept))
    }

    /// Gives everything else up, for the thread that calls and those that it starts; and for
    /// programs that they might execute, where root would have it back.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(super) fn give_up_others(&self) -> anyhow::Result<()> {
        let refused = "cannot give up capabilities";
        // As long as there is CAP_SETPCAP. Without it, none can be taken from this set.
        if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).context(refused)? {
            for capability in caps::all().difference(&self.0) {
                // Kernels do not know all of them.
                if caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false) {
                    caps::drop(None, CapSet::Bounding, *capability).context(refused)?;
                }
            }
        }
        caps::clear(None, CapSet::Ambient).context(refused)?;
        caps::clear(None, CapSet::Inheritable).context(refused)?;
        // First: the permitted set cannot be smaller.
        caps::set(None, CapSet::Effective, &self.0).context(refused)?;
        caps::set(None, CapSet::Permitted, &self.0).context(refused)
    }
}
