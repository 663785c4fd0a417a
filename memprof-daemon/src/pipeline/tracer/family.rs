//! Who is a child of a process that somebody has named, and what has become of it.
//!
//! Nothing is asked here, and nobody is traced: the kernel's records about forks, programs and
//! ends tell, and looks through `/proc`, in whatever order they come. A child's children are
//! followed whether it could be traced itself or not: a shell may be gone before that.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::children::SettledReply;
use crate::pipeline::stats::ChildTally;

/// Members that are known at a time, at most; further children are refused.
const MAX_MEMBERS: usize = 1 << 13;

/// Forks of others that are remembered. Each CPU has a buffer of records, and they are emptied
/// one after the other: so a child's fork may be told of before its own birth.
const MAX_STRANGERS: usize = 256;

/// A forked child is left alone so long: most replace their program within, and what was put
/// into the copy would be for nothing.
const FORK_REST: Duration = Duration::from_millis(3);

/// After this, a child that could not be traced is tried again ...
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// ... at most so often.
const TRIES: u32 = 5;

/// A process that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Birth {
    pub(super) pid: u32,
    pub(super) parent: u32,
    pub(super) at_ns: u64,
}

/// A process of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Whose child it is; none of one that somebody has named.
    pub(super) parent: Option<u32>,
    /// When it was made; none if it was there before.
    pub(super) born_ns: Option<u64>,
    /// It has its parent's memory: it has not replaced its program since.
    pub(super) is_copy: bool,
    state: State,
    tries: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is to be taken on then.
    Waiting(Instant),
    /// It has its parent's memory, not a copy of it, until it replaces its program.
    Sharing,
    /// It is a target.
    Taken,
    /// It cannot be traced, until it replaces its program.
    Failed,
    /// There was no room for it.
    Refused,
    /// Somebody has let it go.
    LetGo,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Family {
    members: HashMap<u32, Member>,
    /// Those that wait, by when they are due.
    queue: BTreeSet<(Instant, u32)>,
    strangers: VecDeque<Birth>,
    pub(super) tally: ChildTally,
    /// How many are being read.
    pub(super) scanning: usize,
    /// All processes are being looked through.
    pub(super) is_looking: bool,
    /// When they were looked through last.
    pub(super) looked: Instant,
    /// Who waits for all children that there are to have had their turn.
    pub(super) settled: Option<SettledReply>,
    /// Records that were lost when they were counted last.
    pub(super) lost_seen: u64,
    /// That there is no room was said.
    pub(super) has_refused: bool,
}

impl Family {
    pub(super) fn new() -> Self {
        Self {
            members: HashMap::new(),
            queue: BTreeSet::new(),
            strangers: VecDeque::new(),
            tally: ChildTally::default(),
            scanning: 0,
            is_looking: false,
            looked: Instant::now(),
            settled: None,
            lost_seen: 0,
            has_refused: false,
        }
    }

    /// Somebody has named a process: from now on its children are followed.
    pub(super) fn name(&mut self, pid: u32) {
        let known = self.members.get(&pid).copied();
        if known.is_some_and(|known| matches!(known.state, State::Waiting(_))) {
            // It would have been taken on as a child.
            self.tally.found = self.tally.found.saturating_sub(1);
        }
        let member = Member {
            parent: known.and_then(|known| known.parent),
            born_ns: known.and_then(|known| known.born_ns),
            is_copy: false,
            state: State::Taken,
            tries: 0,
        };
        self.put(pid, member);
    }

    /// A process was made. Whatever had its pid is gone.
    pub(super) fn fork(&mut self, birth: Birth, now: Instant) {
        self.end(birth.pid);
        if !self.is_followed(birth.parent) {
            if self.strangers.len() >= MAX_STRANGERS {
                self.strangers.pop_front();
            }
            self.strangers.push_back(birth);
            return;
        }
        let mut births = vec![birth];
        while let Some(birth) = births.pop() {
            let is_known = self.add(
                birth.pid,
                Member {
                    parent: Some(birth.parent),
                    born_ns: Some(birth.at_ns),
                    is_copy: true,
                    state: State::Waiting(now + FORK_REST),
                    tries: 0,
                },
            );
            if is_known {
                let is_its =
                    |other: &Birth| other.parent == birth.pid && other.at_ns >= birth.at_ns;
                births.extend(self.strangers.iter().filter(|other| is_its(other)));
                self.strangers.retain(|other| !is_its(other));
            }
        }
    }

    /// A process has replaced its program.
    pub(super) fn exec(&mut self, pid: u32, now: Instant) {
        let Some(mut member) = self.members.get(&pid).copied() else {
            return;
        };
        member.is_copy = false;
        if !matches!(member.state, State::Taken | State::LetGo) {
            member.state = State::Waiting(now);
            member.tries = 0;
        }
        self.put(pid, member);
    }

    /// The first thread of a process has ended. One that is traced is looked after as long as
    /// it has others; one that is not cannot be traced any more.
    pub(super) fn exit(&mut self, pid: u32) {
        if self
            .members
            .get(&pid)
            .is_some_and(|member| member.state != State::Taken)
        {
            self.end(pid);
        }
    }

    /// All processes were looked through: those that there were, each with its parent. True if
    /// there are children among them that were not known. Which of them are still there,
    /// `is_there` says.
    pub(super) fn look(
        &mut self,
        parents: &HashMap<u32, u32>,
        now: Instant,
        is_there: impl Fn(u32) -> bool,
    ) -> bool {
        let gone: Vec<u32> = self
            .members
            .iter()
            .filter(|(pid, member)| member.state != State::Taken && !parents.contains_key(pid))
            .map(|(&pid, _)| pid)
            .filter(|&pid| !is_there(pid))
            .collect();
        for pid in gone {
            self.end(pid);
        }
        let own = std::process::id();
        let mut has_found = false;
        loop {
            let children: Vec<(u32, u32)> = parents
                .iter()
                .map(|(&pid, &parent)| (pid, parent))
                .filter(|&(pid, parent)| {
                    pid != own && !self.members.contains_key(&pid) && self.is_followed(parent)
                })
                .filter(|&(pid, _)| is_there(pid))
                .collect();
            let mut has_added = false;
            for (pid, parent) in children {
                has_added |= self.add(
                    pid,
                    Member {
                        parent: Some(parent),
                        born_ns: None,
                        is_copy: false,
                        state: State::Waiting(now),
                        tries: 0,
                    },
                );
            }
            if !has_added {
                return has_found;
            }
            has_found = true;
        }
    }

    /// Gives those that could not be traced, or wait for their program, another try.
    pub(super) fn try_failed(&mut self, now: Instant) {
        let again: Vec<(u32, Member)> = self
            .members
            .iter()
            .filter(|(_, member)| {
                matches!(
                    member.state,
                    State::Failed | State::Refused | State::Sharing
                )
            })
            .map(|(&pid, member)| (pid, *member))
            .collect();
        for (pid, mut member) in again {
            member.state = State::Waiting(now);
            // One that has failed so often fails at once if it does so again.
            self.put(pid, member);
        }
    }

    /// When the next one is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.queue.first().map(|&(due, _)| due)
    }

    /// One that is due, and who it is. What becomes of it is to be told.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(u32, Member)> {
        let &(due, pid) = self.queue.first()?;
        if due > now {
            return None;
        }
        let mut member = self.members.get(&pid).copied()?;
        member.state = State::Taken;
        self.put(pid, member);
        Some((pid, member))
    }

    /// One that was due has its parent's memory.
    pub(super) fn is_sharing(&mut self, pid: u32) {
        self.set(pid, State::Sharing);
    }

    /// One that was due could not be taken on for a reason that may pass; false if it has had
    /// its tries.
    pub(super) fn try_again(&mut self, pid: u32, now: Instant) -> bool {
        let Some(mut member) = self.members.get(&pid).copied() else {
            return true;
        };
        if member.tries >= TRIES {
            self.set(pid, State::Failed);
            return false;
        }
        member.tries += 1;
        member.state = State::Waiting(now + TRY_AGAIN);
        self.put(pid, member);
        true
    }

    /// One that was due cannot be traced.
    pub(super) fn fail(&mut self, pid: u32) {
        self.set(pid, State::Failed);
    }

    /// There was no room for one that was due.
    pub(super) fn refuse(&mut self, pid: u32) {
        self.has_refused = true;
        self.set(pid, State::Refused);
    }

    /// Somebody has let a process go: it is not taken on again, nor are its children followed.
    pub(super) fn let_go(&mut self, pid: u32) {
        self.set(pid, State::LetGo);
    }

    /// A process has ended that was a target. The pid may be another's by now, which waits.
    pub(super) fn end_taken(&mut self, pid: u32) {
        if self
            .members
            .get(&pid)
            .is_some_and(|member| member.state == State::Taken)
        {
            self.remove(pid);
        }
    }

    /// One that was due has ended before it was read.
    pub(super) fn gone(&mut self, pid: u32) {
        self.end_taken(pid);
        self.tally.missed += 1;
    }

    /// How many are on their way.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether a process has not replaced its program since it was made.
    pub(super) fn is_copy(&self, pid: u32) -> bool {
        self.members.get(&pid).is_some_and(|member| member.is_copy)
    }

    fn is_followed(&self, pid: u32) -> bool {
        self.members
            .get(&pid)
            .is_some_and(|member| member.state != State::LetGo)
    }

    /// False if there is no room.
    fn add(&mut self, pid: u32, member: Member) -> bool {
        self.tally.found += 1;
        if self.members.len() >= MAX_MEMBERS {
            self.tally.refused += 1;
            return false;
        }
        self.put(pid, member);
        true
    }

    /// A member has ended, or another process has its pid.
    fn end(&mut self, pid: u32) {
        let Some(member) = self.remove(pid) else {
            return;
        };
        match member.state {
            State::Waiting(_) | State::Sharing | State::Failed => self.tally.missed += 1,
            State::Refused => self.tally.refused += 1,
            State::Taken | State::LetGo => {}
        }
    }

    fn set(&mut self, pid: u32, state: State) {
        if let Some(mut member) = self.members.get(&pid).copied() {
            member.state = state;
            self.put(pid, member);
        }
    }

    fn put(&mut self, pid: u32, member: Member) {
        self.remove(pid);
        if let State::Waiting(due) = member.state {
            self.queue.insert((due, pid));
        }
        self.members.insert(pid, member);
    }

    fn remove(&mut self, pid: u32) -> Option<Member> {
        let member = self.members.remove(&pid)?;
        if let State::Waiting(due) = member.state {
            self.queue.remove(&(due, pid));
        }
        Some(member)
    }
}

#[cfg(test)]
#[path = "family_tests.rs"]
mod tests;
