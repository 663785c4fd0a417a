use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::export::testing;

fn document(profile: &Profile) -> Value {
    let mut out = Vec::new();
    write(profile, &mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

fn validator() -> jsonschema::Validator {
    let schema = include_str!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/memprof.profile-1.schema.json"
    ));
    let schema = serde_json::from_str(schema).unwrap();
    jsonschema::draft202012::meta::validate(&schema).unwrap();
    jsonschema::validator_for(&schema).unwrap()
}

/// A window in which more was freed than allocated.
fn window() -> Profile {
    let mut profile = testing::profile();
    profile.window = Some(Duration::from_secs(30));
    for stack in profile
        .processes
        .iter_mut()
        .flat_map(|process| &mut process.stacks)
    {
        stack.counters.is_change = true;
        stack.counters.free_bytes = stack.counters.alloc_bytes * 2.0;
        stack.counters.free_objects = stack.counters.alloc_objects * 2.0;
    }
    profile
}

/// Check that what is written is what the published schema promises, for a
/// profile with everything in it, for an empty one and for one of a window.
#[test]
fn output_validates() {
    let validator = validator();
    for profile in [testing::profile(), testing::empty_profile(), window()] {
        let document = document(&profile);
        let errors: Vec<_> = validator.iter_errors(&document).collect();
        assert!(errors.is_empty(), "{errors:?}\n{document:#}");
    }
}

/// Check that the schema refuses documents that break its promises.
#[test]
fn schema_refuses_broken_documents() {
    let validator = validator();
    let good = document(&testing::profile());
    for (pointer, broken) in [
        ("/schema", json!("memprof.profile/2")),
        ("/captured_at", json!("yesterday")),
        ("/sample_interval_bytes", json!(-1)),
        ("/probe/sites/0", json!({"module": "/lib/libc.so"})),
        ("/processes/0/pid", json!("4242")),
        ("/processes/0/namespace_pids", json!([])),
        ("/processes/0/container", json!({"id": "01"})),
        ("/processes/0/container/runtime", json!("rkt")),
        ("/processes/0/memory", json!({"rss_bytes": 1})),
        ("/processes/0/losses/alloc_ring_full", json!(1.5)),
        ("/processes/0/totals/free_calls", json!(-1)),
        ("/processes/0/estimates", json!({"samples": 1})),
        ("/processes/0/stacks/0/alloc_bytes_ci95", json!([1])),
        ("/processes/0/stacks/0/inuse_bytes_ci95", json!([1, 2.5])),
        ("/processes/0/size_histogram/0", json!({"calls": 1})),
        ("/processes/0/stacks/0/inuse_bytes", json!(8_388_608.25)),
        ("/processes/0/stacks/0/frames", json!([])),
        ("/processes/0/stacks/0/frames/0", json!({})),
        (
            "/processes/0/stacks/0/frames/0",
            json!({"function": "f", "inlined": false, "unknown": "no_symbol"}),
        ),
        (
            "/processes/0/stacks/0/frames/0",
            json!({"unknown": "tired"}),
        ),
        ("/processes", Value::Null),
    ] {
        let mut document = good.clone();
        *document.pointer_mut(pointer).unwrap() = broken.clone();
        assert!(!validator.is_valid(&document), "{pointer}: {broken}");
    }
    let mut window = document(&window());
    assert!(window["processes"][0]["estimates"]["inuse_bytes"].as_i64() < Some(0));
    assert_eq!(window["window_s"], 30.0);
    window["schema"] = json!(SCHEMA);
    assert!(!validator.is_valid(&window));
    window["window_s"].take();
    window["schema"] = json!(WINDOW_SCHEMA);
    assert!(!validator.is_valid(&window));
    let mut extra = good;
    extra["surprise"] = json!(1);
    assert!(!validator.is_valid(&extra));
}

/// Check the numbers and frames of each kind of stack, in their order.
#[test]
fn content() {
    let document = document(&testing::profile());
    assert_eq!(document["schema"], SCHEMA);
    assert_eq!(document["captured_at"], "2026-09-21T14:13:20.123Z");
    assert_eq!(document["duration_s"], 30.042);
    let leaky = &document["processes"][0];
    assert_eq!(leaky["start_time"], "2026-09-21T13:56:40.000Z");
    assert_eq!(
        leaky["losses"],
        json!({"alloc_ring_full": 12, "live_map_full": 0})
    );
    assert_eq!(leaky["uid"], 33);
    assert_eq!(leaky["namespace_pids"], json!([4242, 7]));
    assert_eq!(
        leaky["container"],
        json!({
            "runtime": "cri-o",
            "id": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "pod_uid": "0e7d3c1a-94b8-4f6c-8d21-5a0b9c7e6f32",
        })
    );
    assert_eq!(
        leaky["slice"],
        "kubepods-pod0e7d3c1a_94b8_4f6c_8d21_5a0b9c7e6f32.slice"
    );
    let other = &document["processes"][1];
    assert_eq!(other["namespace_pids"], json!([4243]));
    assert_eq!(other["container"], Value::Null);
    assert_eq!(
        (&other["cgroup"], &other["unit"]),
        (&json!(""), &Value::Null)
    );
    assert_eq!(leaky["memory"]["rss_anon_bytes"], 42_000_000);
    assert_eq!(document["processes"][1]["memory"], Value::Null);
    assert_eq!(leaky["traced_s"], 30.042);
    assert_eq!(
        leaky["totals"],
        json!({"alloc_calls": 2029, "alloc_bytes": 10_585_915, "free_calls": 1205})
    );
    assert_eq!(
        leaky["size_histogram"][1],
        json!({"min_bytes": 64, "max_bytes": 127, "calls": 1000})
    );
    assert_eq!(leaky["size_histogram"][4]["max_bytes"], Value::Null);
    assert_eq!(document["processes"][1]["totals"], Value::Null);
    assert_eq!(document["processes"][1]["size_histogram"], Value::Null);

    assert_eq!(
        leaky["stacks"][0],
        json!({
            "alloc_objects": 1024,
            "alloc_bytes": 10_485_760,
            "alloc_bytes_ci95": [4_157_198, 18_828_353],
            "inuse_objects": 819,
            "inuse_bytes": 8_388_608,
            "inuse_bytes_ci95": [2_524_589, 16_266_658],
            "samples": 8,
            "truncated": false,
            "end": "complete",
            "by_frame_pointer": false,
            "frames": [
                {
                    "function": "xmalloc", "module": "/opt/leaky/app", "build_id": "ab01",
                    "file_offset": 0x1010, "file": "src/x.h", "line": 7, "inlined": true,
                },
                {
                    "function": "leak_buffers", "module": "/opt/leaky/app", "build_id": "ab01",
                    "file_offset": 0x1010, "file": "src/leak.c", "line": 42, "inlined": false,
                },
                {
                    "function": "main", "module": "/opt/leaky/app", "build_id": "ab01",
                    "file_offset": 0x1100, "file": "src/leak.c", "line": 80, "inlined": false,
                },
            ],
        })
    );
    let estimates = &leaky["estimates"];
    assert_eq!(estimates["alloc_objects"], 2029);
    assert_eq!(estimates["inuse_bytes"], 8_392_768);
    assert_eq!(estimates["samples"], 1014);
    let unknown = &leaky["stacks"][1];
    assert_eq!(unknown["truncated"], true);
    assert_eq!(unknown["end"], "no_unwind_info");
    assert_eq!(
        unknown["frames"],
        json!([
            {"unknown": "unmapped", "address": "0xdead"},
            {
                "unknown": "no_symbol", "module": "/opt/leaky/\u{fffd}/leaky.so",
                "file_offset": 0x1234,
            },
            {
                "function": "vec<[u8; 4]>::push", "module": "/opt/leaky/app",
                "build_id": "ab01", "file_offset": 0x1200, "inlined": false,
            },
        ])
    );
    assert_eq!(
        leaky["stacks"][2]["frames"],
        json!([{"unknown": "no_stack"}])
    );
    // Freed to the last sample: nothing in use, whatever the sums leave.
    assert_eq!(leaky["stacks"][3]["alloc_bytes"], 99_999);
    assert_eq!(leaky["stacks"][3]["inuse_bytes"], 0);
}

/// Check that a clock that was never set makes no profile fail.
#[test]
fn time_before_1970() {
    let time = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    assert_eq!(rfc_3339(time), "1970-01-01T00:00:00.000Z");
}
