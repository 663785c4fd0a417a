use super::*;
use crate::{
    prefilter::{
        attach::{FindHooks, Grip},
        check::check,
        map,
        testing::{Target, soon, trace},
    },
    probe::find::Finder,
    process::{exit::ExitWatch, files::FileStore, maps::read_mappings},
};

/// A process that waits.
#[derive(Debug)]
struct Waiting {
    pid: u32,
}

impl FindHooks for Waiting {
    fn find(&self) -> Result<Vec<ModuleHooks>, PrefilterError> {
        let mappings = read_mappings(self.pid, &FileStore::default())?;
        let modules = Finder::default().find_all(self.pid, &mappings);
        check(self.pid, &mappings, &modules.unwrap())
    }
}

/// Runs `work` with an order for a process, and the plan for it.
fn planned(work: impl FnOnce(&Target, &Order<'_>, &Plan) + Send) {
    let target = Target::interrupted("read");
    let waiting = Waiting { pid: target.pid() };
    let process = ExitWatch::open(target.pid()).unwrap();
    let order = Order {
        process: &process,
        grip: Grip::Seize,
        find: &waiting,
        image: None,
        geometry: Geometry::for_process(1, 0),
        interval_bytes: 1 << 19,
        seed: 1,
        deadline: soon(),
    };
    let plan = plan(&order, &waiting.find().unwrap()).unwrap();
    work(&target, &order, &plan);
    target.finish_well();
}

/// What a process maps.
fn maps(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}

/// How many files it has open.
fn files(pid: u32) -> usize {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
    files.unwrap().count()
}

/// Check that a plan is right for the process that it was made for, and not once the code to
/// be changed is another; nor for another process of the same program, with its code elsewhere.
#[test]
fn right_for_its_program() {
    planned(|target, _, plan| {
        trace(|tracer| {
            let stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
            assert!(plan.is_right_for(&stopped).unwrap());
            for patch in &plan.patches {
                let other = [0x90; 5];
                let write = |from, to| stopped.write_code(patch.address, from, to).unwrap();
                write(&patch.original, &other);
                assert!(!plan.is_right_for(&stopped).unwrap());
                write(&other, &patch.original);
            }
            assert!(plan.is_right_for(&stopped).unwrap());
        });
        let another = Target::interrupted("read");
        trace(|tracer| {
            let stopped = Stopped::all(tracer, another.pid(), soon()).unwrap();
            assert!(!plan.is_right_for(&stopped).unwrap());
        });
        another.finish_well();
    });
}

/// Check that a plan for a module that comes later is not right if the data that it relies on
/// is not there, as after an exec(2).
#[test]
fn data_that_is_gone() {
    planned(|target, order, first| {
        let later = Order {
            image: Some(first.place.clone()),
            grip: Grip::Seize,
            geometry: order.geometry,
            ..*order
        };
        let modules = order.find.find().unwrap();
        let plan = plan(&later, &modules).unwrap();
        assert!(!plan.owns_data);
        trace(|tracer| {
            let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
            assert!(!plan.is_right_for(&stopped).unwrap());
            map::map(order, first, &mut stopped).unwrap();
            assert!(plan.is_right_for(&stopped).unwrap());
        });
    });
}

/// Check that nothing of the process's own is replaced by what is mapped, wherever it has
/// mapped something since; that the plan is out of date then, and nothing of it stays.
#[test]
fn memory_that_was_taken() {
    planned(|target, order, plan| {
        let data = &plan.place;
        let ends = |range: &Range<u64>| [range.start, range.end - 4096];
        let mut places: Vec<u64> = ends(&data.range).into();
        places.push(data.private);
        places.extend(plan.code.iter().flat_map(|code| ends(&code.range)));
        for place in places {
            trace(|tracer| {
                let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
                let call = |stopped: &mut Stopped, number, arguments| {
                    stopped
                        .inject(|calls| calls.call(number, arguments))
                        .unwrap();
                };
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                let flags = flags.unsigned_abs().into();
                call(
                    &mut stopped,
                    libc::SYS_mmap,
                    [place, 4096, 1, flags, u64::MAX, 0],
                );
                let (before, open) = (maps(target.pid()), files(target.pid()));
                let mapped = map::map(order, plan, &mut stopped);
                assert!(matches!(mapped, Err(PrefilterError::Stale)), "{mapped:?}");
                assert_eq!(maps(target.pid()), before);
                assert_eq!(files(target.pid()), open);
                call(&mut stopped, libc::SYS_munmap, [place, 4096, 0, 0, 0, 0]);
                stopped.release().unwrap();
            });
        }
    });
}
