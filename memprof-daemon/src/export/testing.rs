//! A profile with everything in it that a format has to cope with.

use memprof_common::unwind::walk::StackEnd;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    address::{AbsAddr, FileOffset},
    export::{
        profile::{
            ChildOf, Engine, Inherited, Origin, ProbeInfo, ProbeSite, ProcessMemory,
            ProcessProfile, Profile, StackProfile,
        },
        totals::{CallTotals, ExactTotals, SizeClass},
    },
    ledger::snapshot::StackCounters,
    process::{
        cgroup::Cgroup,
        debug_info::DebugInfo,
        mapping::{MappedFile, Mapping},
    },
    symbolize::frame::{Frame, FrameName, FunctionLine, UnknownReason},
};

/// Two processes that map different files at the same addresses.
pub(crate) fn profile() -> Profile {
    let program = mapping("/opt/leaky/app", Some(vec![0xab, 0x01]), 0x40_0000);
    let other_program = mapping("/opt/other/app", None, 0x40_0000);
    let mut odd_path = b"/opt/leaky/\xff/".to_vec();
    odd_path.extend(b"leaky.so");
    let library = mapping(OsString::from_vec(odd_path), None, 0x7f00_0000);

    let leak = |program: &Arc<Mapping>| {
        vec![
            known(
                program,
                0x1010,
                &[
                    ("xmalloc", "src/x.h", 7),
                    ("leak_buffers", "src/leak.c", 42),
                ],
            ),
            known(program, 0x1100, &[("main", "src/leak.c", 80)]),
        ]
    };
    let stacks = vec![
        stack(
            leak(&program),
            [1024.0, 10_485_760.0, 205.0, 2_097_152.0],
            (8, 7),
        ),
        stack(
            vec![
                known(&program, 0x1040, &[("churn", "src/leak.c", 50)]),
                known(&program, 0x1104, &[("main", "src/leak.c", 81)]),
            ],
            [1000.0, 99_999.4, 999.999_999, 99_999.399],
            (1000, 0),
        ),
        StackProfile {
            end: StackEnd::NoUnwindInfo,
            by_frame_pointer: false,
            ..stack(
                vec![
                    unknown(None, 0xdead, None, UnknownReason::Unmapped),
                    unknown(
                        Some(&library),
                        0x7f00_1234,
                        Some(0x1234),
                        UnknownReason::NoSymbol,
                    ),
                    known(&program, 0x1200, &[("vec<[u8; 4]>::push", "", 0)]),
                ],
                [1.0, 4096.0, 0.0, 0.0],
                (1, 1),
            )
        },
        stack(
            vec![unknown(None, 0, None, UnknownReason::NoStack)],
            [4.0, 64.0, 0.0, 0.0],
            (4, 4),
        ),
        // Too little to show after rounding.
        stack(
            vec![known(&program, 0x1300, &[("tiny", "src/leak.c", 99)])],
            [0.3, 0.3, 0.0, 0.0],
            (1, 1),
        ),
    ];
    Profile {
        captured_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_790_000_000_123),
        duration: Duration::from_millis(30_042),
        window: None,
        kernel: "6.18.0".to_owned(),
        arch: "x86_64".to_owned(),
        sample_interval_bytes: 524_288,
        coarsest_interval_bytes: 524_288,
        probe: ProbeInfo {
            mode: "perf".to_owned(),
            sites: vec![ProbeSite {
                module: "/usr/lib/libc.so.6".to_owned(),
                function: "malloc".to_owned(),
                file_offset: 0x9_a0d0,
                offset: 4,
                instruction: "push r12".to_owned(),
                emulated: true,
            }],
        },
        processes: vec![
            ProcessProfile {
                pid: 4242,
                comm: "leaky;app".to_owned(),
                exe: "/opt/leaky/app".to_owned(),
                origin: contained(),
                start_time: SystemTime::UNIX_EPOCH + Duration::from_secs(1_789_999_000),
                exited: false,
                engine: Engine::Prefilter,
                memory: Some(ProcessMemory {
                    rss_bytes: 50_000_000,
                    rss_anon_bytes: 42_000_000,
                    rss_file_bytes: 8_000_000,
                    rss_peak_bytes: 51_000_000,
                    swap_bytes: 0,
                    virtual_bytes: 900_000_000,
                }),
                traced: Duration::from_millis(30_042),
                inherited: None,
                child_of: None,
                totals: Some(totals()),
                losses: BTreeMap::from([("alloc_ring_full", 12), ("live_map_full", 0)]),
                go: None,
                go_refusal: None,
                stacks,
            },
            ProcessProfile {
                pid: 4243,
                comm: "other".to_owned(),
                exe: "/opt/other/app".to_owned(),
                origin: Origin {
                    namespace_pids: vec![4243],
                    ..Origin::default()
                },
                start_time: SystemTime::UNIX_EPOCH,
                exited: true,
                engine: Engine::UprobeSince("it is traced by gdb (pid 7)".to_owned()),
                memory: None,
                traced: Duration::from_millis(12),
                inherited: Some(Inherited {
                    parent_pid: 4242,
                    objects: 3,
                    bytes: 4096,
                }),
                child_of: Some(ChildOf {
                    parent_pid: 4242,
                    untraced_s: Some(0.0174),
                }),
                totals: None,
                losses: BTreeMap::new(),
                go: None,
                go_refusal: None,
                stacks: vec![stack(
                    leak(&other_program),
                    [2.0, 200.0, 1.0, 100.0],
                    (2, 1),
                )],
            },
        ],
    }
}

/// Of a pod's container.
fn contained() -> Origin {
    let id = "0123456789abcdef".repeat(4);
    let pod = "0e7d3c1a_94b8_4f6c_8d21_5a0b9c7e6f32";
    Origin {
        uid: 33,
        namespace_pids: vec![4242, 7],
        cgroup: Cgroup::at(format!(
            "/kubepods.slice/kubepods-pod{pod}.slice/crio-{id}.scope"
        )),
    }
}

fn totals() -> ExactTotals {
    let class = |min_bytes, max_bytes, calls| SizeClass {
        min_bytes,
        max_bytes,
        calls,
    };
    ExactTotals {
        calls: CallTotals {
            alloc_calls: 2029,
            alloc_bytes: 10_585_915,
            free_calls: 1205,
        },
        size_histogram: vec![
            class(0, Some(0), 3),
            class(64, Some(127), 1000),
            class(1024, Some(2047), 1),
            class(8192, Some(16_383), 1024),
            class(1 << 42, None, 1),
        ],
    }
}

/// One process that made no samples.
pub(crate) fn empty_profile() -> Profile {
    let mut profile = profile();
    profile.processes.truncate(1);
    for process in &mut profile.processes {
        process.stacks.clear();
        process.losses.clear();
        process.totals = Some(ExactTotals::default());
    }
    profile
}

fn mapping(path: impl Into<PathBuf>, build_id: Option<Vec<u8>>, start: u64) -> Arc<Mapping> {
    let path = path.into();
    Arc::new(Mapping {
        start: AbsAddr(start),
        end: AbsAddr(start + 0x10_0000),
        file_offset: FileOffset(0),
        name: path.to_string_lossy().into_owned(),
        file: Some(Arc::new(MappedFile {
            path,
            device: 1,
            inode: start,
            build_id,
            debug_info: DebugInfo::Missing,
            file: None,
        })),
    })
}

/// A frame of functions, leaf first; no file and line 0 stand for unknown ones.
fn known(mapping: &Arc<Mapping>, offset: u64, functions: &[(&str, &str, u32)]) -> Arc<Frame> {
    let functions = functions
        .iter()
        .map(|&(function, file, line)| FunctionLine {
            function: function.to_owned(),
            file: (!file.is_empty()).then(|| file.to_owned()),
            line: (line != 0).then_some(line),
        });
    Arc::new(Frame {
        address: AbsAddr(mapping.start.0 + offset),
        mapping: Some(Arc::clone(mapping)),
        file_offset: Some(FileOffset(offset)),
        name: FrameName::Known(functions.collect()),
    })
}

fn unknown(
    mapping: Option<&Arc<Mapping>>,
    address: u64,
    file_offset: Option<u64>,
    reason: UnknownReason,
) -> Arc<Frame> {
    Arc::new(Frame {
        address: AbsAddr(address),
        mapping: mapping.map(Arc::clone),
        file_offset: file_offset.map(FileOffset),
        name: FrameName::Unknown(reason),
    })
}

fn stack(frames: Vec<Arc<Frame>>, counts: [f64; 4], samples: (u64, u64)) -> StackProfile {
    let [alloc_objects, alloc_bytes, free_objects, free_bytes] = counts;
    let (samples, live_samples) = samples;
    StackProfile {
        counters: StackCounters {
            alloc_objects,
            alloc_bytes,
            free_objects,
            free_bytes,
            // As if all samples weighed the same.
            alloc_variance: alloc_bytes * alloc_bytes / samples.max(1) as f64,
            free_variance: (alloc_bytes * alloc_bytes / samples.max(1) as f64)
                * (samples - live_samples) as f64
                / samples.max(1) as f64,
            coarsest_interval_bytes: 524_288,
            samples,
            live_samples,
            is_change: false,
        },
        frames,
        end: StackEnd::Complete,
        by_frame_pointer: false,
    }
}
