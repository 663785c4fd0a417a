use super::*;
use crate::prefilter::{
    remote,
    testing::{Target, soon, trace},
};

/// A thread in one of two loops of the same instructions.
struct Twins(Target);

impl Twins {
    fn start() -> Self {
        Self(Target::hazard(&["twins"]))
    }

    fn word(&self, number: u64) -> u64 {
        remote::read_word(self.0.pid(), self.0.counter() + 8 * number).unwrap()
    }

    /// From the first loop to the second.
    fn distance(&self) -> u64 {
        self.word(3) - self.word(2)
    }

    fn is_in(&self, twin: u64, place: u64) -> bool {
        (self.word(2 + twin)..self.word(2 + twin) + self.distance()).contains(&place)
    }

    /// Checks that it turns in one loop, and not in the other.
    #[track_caller]
    fn turns_in(&self, twin: u64) {
        let before = [self.word(0), self.word(1)];
        self.0
            .until("turns", |_| self.word(twin) != before[twin as usize]);
        assert_eq!(self.word(1 - twin), before[1 - twin as usize]);
    }

    /// As the thread that turns has moved to the second loop.
    fn goal(&self, place: u64) -> Option<u64> {
        self.is_in(0, place).then(|| place + self.distance())
    }
}

/// Check that a thread goes on where it is set to, that others stay, and that it goes on as
/// before if it is set back in the same stop.
#[test]
fn moved_and_back() {
    let twins = Twins::start();
    twins.turns_in(0);
    let stopped = |go_back: bool| {
        trace(|tracer| {
            let mut stopped = Stopped::all(tracer, twins.0.pid(), soon()).unwrap();
            let before: Vec<u64> = stopped.threads().map(|each| each.registers.rip).collect();
            let moved = stopped.move_threads(|place| twins.goal(place)).unwrap();
            assert_eq!(moved.0.len(), 1);
            let after: Vec<u64> = stopped.threads().map(|each| each.registers.rip).collect();
            let differ = before.iter().zip(&after).filter(|(a, b)| a != b);
            let distance = twins.distance();
            assert!(differ.map(|(a, b)| b - a).eq([distance]));
            if go_back {
                stopped.move_back(moved).unwrap();
            }
            stopped.release().unwrap();
        });
    };
    stopped(true);
    twins.turns_in(0);
    stopped(false);
    twins.turns_in(1);
    twins.0.finish_well();
}

/// Check that a thread runs for a moment while the others stand, and stands again; that one
/// that stays in the way does not keep the process from going on; and that nothing runs that
/// is not in the way.
#[test]
fn run_for_a_moment() {
    let target = Target::hazard(&["spinners", "3"]);
    target.until_it_works();
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let before = target.counter();
        assert!(!stopped.let_run(|_| false).unwrap());
        assert_eq!(target.counter(), before);
        let spinner = stopped.threads().find(|each| each.tid != target.pid());
        let spinner = spinner.unwrap().tid;
        let ran = stopped.let_run(|each| each.tid == spinner && target.counter() == before);
        assert!(ran.unwrap());
        assert!(target.counter() != before);
        let count = stopped.threads().count();
        assert_eq!(count, 4);
        let begun = Instant::now();
        assert!(stopped.let_run(|each| each.tid == spinner).unwrap());
        // The bound, and what the machine does besides.
        assert!(begun.elapsed() < 20 * MOST, "{:?}", begun.elapsed());
        let before = target.counter();
        thread::sleep(Duration::from_millis(5));
        assert_eq!(target.counter(), before);
        assert_eq!(stopped.threads().count(), count);
        stopped.release().unwrap();
    });
    target.until_it_works();
    target.finish_well();
}

/// Check that a thread which waits for the kernel once it runs is said to be in the way, not
/// to be unstoppable, and that the process goes on.
#[test]
fn waits_for_the_kernel() {
    let target = Target::hazard(&["vfork-soon"]);
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        remote::write(target.pid(), target.counter_at, &1_u64.to_ne_bytes()).unwrap();
        let error = loop {
            // On to vfork(2), whose caller waits for the child.
            match stopped.let_run(|_| true) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StopError::InTheWay { .. }), "{error}");
        stopped.release().unwrap();
    });
    target.finish_well();
}
