use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::*;

/// A backend that is never asked.
#[derive(Clone)]
struct Nobody;

impl Told for Value {
    fn pid(&self) -> u32 {
        0
    }
    fn comm(&self) -> &str {
        ""
    }
    fn state(&self) -> &str {
        ""
    }
}

impl Backend for Nobody {
    type Stats = Value;
    type Process = Value;

    async fn profile(&self, _: Option<u32>, _: Option<Duration>) -> Result<Profile, BackendError> {
        Err(BackendError::Ended)
    }
    async fn stats(&self) -> Answer {
        Err(BackendError::Ended)
    }
    async fn metrics(&self) -> Result<Metrics, BackendError> {
        Err(BackendError::Ended)
    }
    async fn config(&self) -> Result<Config, BackendError> {
        Err(BackendError::Ended)
    }
    async fn set_config(&self, _: ConfigChange) -> Result<Config, BackendError> {
        Err(BackendError::Ended)
    }
    async fn processes(&self) -> Result<Vec<Value>, BackendError> {
        Err(BackendError::Ended)
    }
    async fn attach(&self, _: u32) -> Answer {
        Err(BackendError::Ended)
    }
    async fn detach(&self, _: u32) -> Answer {
        Err(BackendError::Ended)
    }
    async fn reset(&self) -> Answer {
        Err(BackendError::Ended)
    }
}

/// Check that the description has every path that is served, and none that is not; which
/// methods each has, the end-to-end tests ask the daemon itself.
#[test]
fn description_has_every_path() {
    let description: Value = serde_json::from_str(OPENAPI).unwrap();
    let described: BTreeSet<&str> = description["paths"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let served = routes::<Nobody>();
    let served: BTreeSet<&str> = served.iter().map(|(path, _)| *path).collect();
    assert_eq!(described, served);
}

/// Check that parameters out of range are refused.
#[test]
fn parameters() {
    assert!(matches!(parse_pid(""), Ok(None)));
    assert!(matches!(parse_pid("7"), Ok(Some(7))));
    for text in ["0", "-1", "x", "4294967296"] {
        assert!(parse_pid(text).is_err(), "{text}");
    }
    assert!(matches!(parse_seconds(""), Ok(None)));
    assert!(parse_seconds("3600").is_ok_and(|window| window == Some(MAX_WINDOW)));
    for text in ["0", "-1", "1.5", "3601", "x"] {
        assert!(parse_seconds(text).is_err(), "{text}");
    }
}

/// Check that only so many profiles are made at a time, those of windows apart, and that
/// there is room again when one is done.
#[test]
fn gates() {
    let gates = Gates::default();
    let mut places: BTreeMap<bool, Vec<_>> = BTreeMap::new();
    for is_window in [false, true] {
        for _ in 0..limits::PROFILES {
            let place = gates.enter(is_window, usize::MAX).ok().unwrap();
            places.entry(is_window).or_default().push(place);
        }
        assert!(gates.enter(is_window, usize::MAX).is_err());
    }
    drop(places.remove(&false));
    assert!(gates.enter(false, usize::MAX).is_ok());
    assert!(gates.enter(true, usize::MAX).is_err());
}

/// Check that fewer profiles are made at a time where memory is short, and one always.
#[test]
fn gates_where_memory_is_short() {
    let gates = Gates::default();
    let first = gates.enter(false, 2).ok().unwrap();
    let second = gates.enter(false, 2).ok().unwrap();
    assert!(gates.enter(false, 2).is_err());
    drop((first, second));
    let only = gates.enter(false, 0).ok().unwrap();
    assert!(gates.enter(false, 1).is_err());
    // What was refused has kept no place.
    assert!(gates.enter(false, 2).is_ok());
    drop(only);
}
