//! How metrics are registered.

use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::Family;

/// Registers families and remembers what they are.
#[derive(Default)]
pub(super) struct Registrar {
    pub(super) registry: Registry,
    pub(super) families: Vec<Family>,
}

impl Registrar {
    pub(super) fn add<C: Collector + Clone + 'static>(&mut self, metric: prometheus::Result<C>) -> C {
        // The names are constants of this file: a test registers them all.
        let metric = metric.expect("a metric of this file is malformed");
        for desc in metric.desc() {
            let labels =
                desc.variable_labels.iter().cloned().chain(desc.const_label_pairs.iter().map(|p| p.name().to_owned()));
            self.families.push(Family {
                name: desc.fq_name.clone(),
                labels: labels.collect(),
                help: desc.help.clone(),
            });
        }
        self.registry.register(Box::new(metric.clone())).expect("a metric of this file is registered twice");
        metric
    }

    pub(super) fn counter(&mut self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(opts(name, help)))
    }

    pub(super) fn counters(&mut self, name: &str, labels: &[&str], help: &str) -> IntCounterVec {
        self.add(IntCounterVec::new(opts(name, help), labels))
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(opts(name, help)))
    }

    pub(super) fn gauges(&mut self, name: &str, labels: &[&str], help: &str) -> IntGaugeVec {
        self.add(IntGaugeVec::new(opts(name, help), labels))
    }

    pub(super) fn histograms(&mut self, name: &str, labels: &[&str], buckets: &[f64], help: &str) -> HistogramVec {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        self.add(HistogramVec::new(opts, labels))
    }
}

pub(super) fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("blipstream")
}
