//! A change of the rules while processes are traced.
//!
//! Whether probes are shared follows from the rules ([`Filters::names_few`]), so a change may
//! have to go over from the one to the other.

use std::mem;

use tracing::warn;

use super::{Tracer, config::ConfigError, rules::OneByOne};
use crate::{filter::Filters, pipeline::scan::Scanner};

impl Tracer {
    /// Why rules cannot be put in force.
    pub(super) fn check_filters(&self, filters: &Filters) -> Result<(), ConfigError> {
        match &self.system {
            None => Err(ConfigError::Refused(
                "rules choose among all processes, and memprof was started without -a",
            )),
            Some(system) if filters.may_write() && !system.may_write => Err(ConfigError::Refused(
                "memprof was started with a --probe that never writes to a process: no rule can \
                 ask for the prefilter",
            )),
            Some(_) => Ok(()),
        }
    }

    /// Puts rules in force, for the processes that there are too.
    pub(super) fn set_filters(&mut self, filters: &Filters) {
        if self.options.filters == *filters {
            return;
        }
        self.options.filters = filters.clone();
        let names_few = filters.names_few();
        let Some(system) = &mut self.system else {
            return;
        };
        if system.one_by_one.is_some() == names_few {
            self.decide_anew();
        } else {
            self.change_manner(names_few);
        }
    }

    /// Lets go who is left out by now, and looks at all others.
    fn decide_anew(&mut self) {
        let decisions: Vec<(u32, bool)> = self
            .targets
            .iter()
            .filter(|(_, target)| target.is_live() && target.is_by_rule)
            .filter_map(|(&pid, target)| {
                let info = &target.images.last()?.info;
                Some((pid, self.is_as_wanted(target, info)))
            })
            .collect();
        for (pid, stays) in decisions {
            if !stays {
                self.begin_to_leave(pid);
            }
        }
        if !self.is_shared() {
            self.look_through_all();
            return;
        }
        // At once: who has changed the rules may rely on it from the answer on.
        let left_alone: Vec<u32> = self
            .system
            .iter()
            .flat_map(|system| &system.left_alone)
            .copied()
            .collect();
        for pid in left_alone {
            if let Some(info) = Scanner::info(pid) {
                self.decide_about(&info);
            }
        }
        self.sweep_all();
    }

    /// Goes over from probes that all share to probes of each process, or back. Probes of both
    /// kinds in one process would count each call twice, and one that all share beside a
    /// prefilter crashes the process: so all are let go first.
    fn change_manner(&mut self, names_few: bool) {
        if let Some(system) = &mut self.system {
            system.one_by_one = names_few.then(OneByOne::default);
            system.is_changing = true;
        }
        self.go_on_changing();
    }

    /// Goes on with a change of manner, once all are let go and no probe is shared.
    pub(super) fn go_on_changing(&mut self) {
        if !self
            .system
            .as_ref()
            .is_some_and(|system| system.is_changing)
        {
            return;
        }
        // Those in the middle of being taken on are asked again.
        let live: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| target.is_live())
            .map(|(&pid, _)| pid)
            .collect();
        for &pid in &live {
            self.begin_to_leave(pid);
        }
        self.share_no_files();
        if !live.is_empty() || !self.shares_nothing() {
            return;
        }
        let Some(system) = &mut self.system else {
            return;
        };
        system.is_changing = false;
        // All are decided about anew.
        for pid in mem::take(&mut system.left_alone) {
            // BPF may have done it.
            let _ = self.slot_map.remove(&pid);
        }
        if !self.is_shared() {
            self.look_through_all();
            return;
        }
        if let Err(error) = self.set_left_alone(std::process::id()) {
            warn!(%error, "memprof traces itself");
        }
        // A call of theirs would have them taken for new ones, and their profiles forgotten.
        let left_out: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| target.is_leaving())
            .filter(|(_, target)| {
                let image = target.images.last();
                image.is_some_and(|image| self.admit(&image.info).is_none())
            })
            .map(|(&pid, _)| pid)
            .collect();
        for pid in left_out {
            self.stop_sharing(pid);
        }
        self.fill_stock();
        self.sweep_all();
    }
}
