use super::*;

#[test]
fn every_family_has_the_prefix_a_help_and_the_names_that_promtool_asks_for() {
    let metrics = Metrics::new();
    for family in metrics.families() {
        assert!(family.name.starts_with("blipstream_"), "{}", family.name);
        assert!(family.help.ends_with('.'), "{}: the help is a sentence", family.name);
    }
    let text = metrics.render();
    for line in text.lines().filter(|l| l.starts_with("# TYPE") && l.ends_with("counter")) {
        assert!(line.split(' ').nth(2).unwrap().ends_with("_total"), "{line}");
    }
}

#[test]
fn the_series_of_a_revoked_partition_are_removed() {
    let metrics = Metrics::new();
    metrics.partition("requests", 3, Standing { lag: Some(7), committed: Some(1), incomplete: 2 });
    assert!(metrics.render().contains("kafka_consumer_lag{partition=\"3\",topic=\"requests\"} 7"));
    metrics.partition_gone("requests", 3);
    assert!(!metrics.render().contains("partition=\"3\""));
}

#[test]
fn a_latency_of_a_skewed_clock_is_clamped_and_counted() {
    let metrics = Metrics::new();
    metrics.end_to_end(-5000);
    let text = metrics.render();
    assert!(text.contains("blipstream_clock_skew_total 1"));
    assert!(text.contains("blipstream_end_to_end_seconds_sum 0"));
}

#[test]
fn names_and_labels_change_only_on_purpose() {
    let metrics = Metrics::new();
    let lines = metrics.families().iter().map(|f| format!("{}{{{}}} {}", f.name, f.labels.join(","), f.help));
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
}
