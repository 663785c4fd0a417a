use std::{
    collections::{BTreeMap, HashSet},
    io::Read as _,
};

use super::*;
use crate::{export::testing, process::cgroup::Cgroup};

/// The message as a reader has it.
fn decoded(profile: &Profile) -> proto::Profile {
    let mut out = Vec::new();
    write(profile, Options::default(), &mut out).unwrap();
    let mut encoded = Vec::new();
    flate2::read::GzDecoder::new(&out[..])
        .read_to_end(&mut encoded)
        .unwrap();
    proto::Profile::decode(&encoded[..]).unwrap()
}

fn string(message: &proto::Profile, index: i64) -> &str {
    &message.string_table[usize::try_from(index).unwrap()]
}

/// The functions of a sample with their lines, leaf first.
fn functions<'a>(message: &'a proto::Profile, sample: &proto::Sample) -> Vec<(&'a str, i64)> {
    let locations = sample.location_id.iter();
    locations
        .flat_map(|&id| &message.location[id as usize - 1].line)
        .map(|line| {
            let function = &message.function[line.function_id as usize - 1];
            (string(message, function.name), line.line)
        })
        .collect()
}

/// Check sample types, default, period and times.
#[test]
fn header() {
    let message = decoded(&testing::profile());
    let types: Vec<_> = message
        .sample_type
        .iter()
        .map(|value| (string(&message, value.r#type), string(&message, value.unit)))
        .collect();
    assert_eq!(
        types,
        [
            ("alloc_objects", "count"),
            ("alloc_space", "bytes"),
            ("inuse_objects", "count"),
            ("inuse_space", "bytes"),
        ]
    );
    assert_eq!(string(&message, message.default_sample_type), "inuse_space");
    let period_type = message.period_type.unwrap();
    assert_eq!(string(&message, period_type.r#type), "space");
    assert_eq!(string(&message, period_type.unit), "bytes");
    assert_eq!(message.period, 524_288);
    assert_eq!(message.time_nanos, 1_790_000_000_123_000_000);
    assert_eq!(message.duration_nanos, 30_042_000_000);
    assert_eq!(message.string_table[0], "");
    let comments: Vec<_> = message
        .comment
        .iter()
        .map(|&c| string(&message, c))
        .collect();
    assert!(matches!(comments[..], [loss] if loss.starts_with("process 4242: 12 late")));
}

/// Check values, stacks and labels of the samples, and that one that rounds to
/// nothing is left out.
#[test]
fn samples() {
    let message = decoded(&testing::profile());
    let samples: Vec<_> = message
        .sample
        .iter()
        .map(|sample| {
            let labels: BTreeMap<_, _> = sample
                .label
                .iter()
                .map(|label| (string(&message, label.key), label))
                .collect();
            let process = (
                labels["pid"].num,
                string(&message, labels["comm"].str).to_owned(),
            );
            (process, functions(&message, sample), sample.value.clone())
        })
        .collect();
    let leaky = (4242, "leaky;app".to_owned());
    let leak = vec![("xmalloc", 7), ("leak_buffers", 42), ("main", 80)];
    assert_eq!(
        samples,
        [
            (
                leaky.clone(),
                leak.clone(),
                vec![1024, 10_485_760, 819, 8_388_608]
            ),
            (
                leaky.clone(),
                vec![
                    ("[unmapped 0xdead]", 0),
                    ("leaky.so+0x1234", 0),
                    ("vec<[u8; 4]>::push", 0)
                ],
                vec![1, 4096, 1, 4096]
            ),
            (leaky.clone(), vec![("[no stack]", 0)], vec![4, 64, 4, 64]),
            (
                leaky,
                vec![("churn", 50), ("main", 81)],
                vec![1000, 99_999, 0, 0]
            ),
            ((4243, "other".to_owned()), leak, vec![2, 200, 1, 100]),
        ]
    );
}

/// Check that equal addresses of different files are different locations, that
/// ids are whole, and that the program's own mapping is the first.
#[test]
fn locations_have_their_mapping() {
    let message = decoded(&testing::profile());
    let at = |address| -> Vec<_> {
        let locations = message.location.iter();
        locations
            .filter(|location| location.address == address)
            .map(|location| {
                let mapping = &message.mapping[location.mapping_id as usize - 1];
                string(&message, mapping.filename)
            })
            .collect()
    };
    assert_eq!(at(0x40_1010), ["/opt/leaky/app", "/opt/other/app"]);

    let unique: HashSet<_> = message.location.iter().map(|l| l.id).collect();
    assert_eq!(unique.len(), message.location.len());
    for (place, mapping) in message.mapping.iter().enumerate() {
        assert_eq!(mapping.id, place as u64 + 1);
    }
    let program = &message.mapping[0];
    assert_eq!(string(&message, program.filename), "/opt/leaky/app");
    assert_eq!(string(&message, program.build_id), "ab01");
    assert!(program.has_functions && program.has_filenames && program.has_line_numbers);
    let library = message.mapping.last().unwrap();
    assert!(!library.has_functions && !library.has_line_numbers);
}

/// Check that samples of a single process need no labels to tell them apart, but say which
/// container or unit they are of.
#[test]
fn labels_of_one_process() {
    let mut profile = testing::profile();
    let process = profile.processes.remove(0);
    profile.processes = vec![process];
    let labels = |profile: &Profile| {
        let message = decoded(profile);
        let texts = |sample: &proto::Sample| -> Vec<(String, String)> {
            let texts = sample.label.iter().map(|label| {
                let text = |place| string(&message, place).to_owned();
                (text(label.key), text(label.str))
            });
            texts.collect()
        };
        let mut all: Vec<_> = message.sample.iter().map(texts).collect();
        all.dedup();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    };
    let id = "0123456789abcdef".repeat(4);
    let expected = [
        ("container_id", id.as_str()),
        ("pod_uid", "0e7d3c1a-94b8-4f6c-8d21-5a0b9c7e6f32"),
        ("unit", &format!("crio-{id}.scope")),
    ];
    let expected = expected.map(|(key, text)| (key.to_owned(), text.to_owned()));
    assert_eq!(labels(&profile), expected);
    profile.processes[0].origin.cgroup = Cgroup::default();
    assert_eq!(labels(&profile), []);
}
