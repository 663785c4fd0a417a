//! The option to trace the children of the processes that are named.

use std::time::Duration;

use clap::{Args, builder::FalseyValueParser};

use super::signals::Interrupts;
use crate::pipeline::{stats::ChildTally, tracer::TracerHandle};

/// How long children that are there at the start are waited for. Where some are forked all the
/// time, all have never had their turn.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Whose children are traced.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct ChildrenArgs {
    /// Trace the children of these processes too, and theirs: those that there are, and those
    /// that are forked from then on
    #[arg(
        long,
        env = "MEMPROF_CHILDREN",
        value_parser = FalseyValueParser::new(),
        conflicts_with = "all"
    )]
    pub(super) children: bool,
}

/// Waits for the children that there are, and says how many are traced. False if a signal has
/// come first.
pub(super) async fn announce_children(tracer: &TracerHandle, interrupts: &mut Interrupts) -> bool {
    let settled = tokio::time::timeout(SETTLE_LIMIT, tracer.children_settled());
    tokio::select! {
        settled = settled => {
            let known = match settled {
                Ok(traced) => format!("{} by now", traced.unwrap_or_default()),
                Err(_) => "some are still on their way".to_owned(),
            };
            eprintln!("memprof: recording children too, {known}");
            true
        }
        _ = interrupts.next() => false,
    }
}

/// What is to be said of children of which nothing is in a profile.
pub(super) fn untraced_in_words(children: &ChildTally) -> Option<String> {
    let ChildTally {
        found,
        traced,
        missed,
        refused,
    } = *children;
    let others = found.saturating_sub(traced + missed + refused);
    let parts = [
        (missed, "ended before"),
        (refused, "found no room"),
        (others, "could not be, or not yet"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, what)| format!("{number} {what}"))
        .collect();
    let untraced = missed + refused + others;
    (untraced > 0).then(|| {
        format!(
            "{untraced} of {found} children were not traced: {}",
            parts.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that nothing is said if all were traced, and else each cause with its number.
    #[test]
    fn words() {
        let mut tally = ChildTally {
            found: 9,
            traced: 9,
            ..ChildTally::default()
        };
        assert_eq!(untraced_in_words(&tally), None);
        tally.traced = 3;
        tally.missed = 4;
        assert_eq!(
            untraced_in_words(&tally).as_deref(),
            Some("6 of 9 children were not traced: 4 ended before, 2 could not be, or not yet")
        );
    }
}
