use super::*;

fn target(pid: u32, state: &'static str, seconds: u64) -> TargetMetrics {
    TargetMetrics {
        pid,
        comm: "a \"b\\\n".to_owned(),
        state,
        engine: "uprobe",
        traced: Duration::from_secs(seconds),
        samples: u64::from(pid) * 10,
        ..TargetMetrics::default()
    }
}

fn told(format: MetricsFormat, max_targets: usize) -> String {
    let metrics = Metrics {
        version: "1",
        losses: BTreeMap::from([("ring_full", 3)]),
        targets: vec![
            target(1, "tracing", 5),
            target(2, "ended", 100),
            target(3, "tracing", 50),
        ],
        ..Metrics::default()
    };
    let dumps = DumpTimes::default();
    dumps.observe(Duration::from_millis(20));
    write(format, metrics, &dumps, max_targets).unwrap()
}

/// Check both formats: counters have their suffix, names are escaped, and OpenMetrics has
/// its end.
#[test]
fn formats() {
    let open = told(MetricsFormat::OpenMetrics, 10);
    assert!(open.ends_with("# EOF\n"), "{open}");
    assert!(open.contains("# TYPE memprof_losses counter\n"), "{open}");
    assert!(open.contains("memprof_losses_total{cause=\"ring_full\"} 3\n"));
    let series = r#"memprof_target_samples_total{pid="1",comm="a \"b\\\n"} 10"#;
    assert!(open.contains(series), "{open}");
    assert!(open.contains("memprof_dump_seconds_bucket{le=\"0.03\"} 1\n"));
    let prometheus = told(MetricsFormat::Prometheus, 10);
    assert!(prometheus.contains("# TYPE memprof_losses_total counter\n"));
    assert!(!prometheus.contains("# EOF"), "{prometheus}");
}

/// Check that no more targets than wanted have series, those first that have been traced
/// for longest and still are, and that the others are counted.
#[test]
fn bounded_targets() {
    let of = |max| {
        let text = told(MetricsFormat::OpenMetrics, max);
        let pids = [1, 2, 3]
            .map(|pid| text.contains(&format!("memprof_target_samples_total{{pid=\"{pid}\"")));
        let unlisted = format!("memprof_targets_unlisted {}\n", 3 - max);
        assert!(text.contains(&unlisted), "{text}");
        pids
    };
    assert_eq!(of(0), [false; 3]);
    assert_eq!(of(1), [false, false, true]);
    assert_eq!(of(2), [true, false, true]);
    assert_eq!(of(3), [true; 3]);
}

/// Check that OpenMetrics is for those who ask for it.
#[test]
fn accepted() {
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,\
                      text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
    assert_eq!(
        MetricsFormat::accepted(prometheus),
        MetricsFormat::OpenMetrics
    );
    for other in ["", "*/*", "text/plain", "application/json"] {
        assert_eq!(MetricsFormat::accepted(other), MetricsFormat::Prometheus);
    }
}
