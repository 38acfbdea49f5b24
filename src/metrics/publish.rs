//! What the brokers refuse or do not confirm, and transactions.

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter};

use super::registrar::{Registrar, opts};
use super::{Metrics, SECONDS};

/// Their families.
#[derive(Debug)]
pub(super) struct PublishMetrics {
    refusals: IntCounter,
    unconfirmed: IntCounter,
    transaction: Histogram,
    aborts: IntCounter,
    fences: IntCounter,
}

impl PublishMetrics {
    /// Registers them.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let help = "Records that the brokers refused and that are tried again; the flow waits meanwhile.";
        let refusals = r.counter("publish_refusals_total", help);
        let help = "Records sent once more, since no broker had confirmed them: they may be there twice.";
        let unconfirmed = r.counter("publish_unconfirmed_total", help);
        let help = "Time of a transaction that was committed (exactly-once delivery).";
        let transaction = HistogramOpts::from(opts("transaction_seconds", help)).buckets(SECONDS.to_vec());
        let transaction = r.add(Histogram::with_opts(transaction));
        let help = "Transactions that were aborted; their records are sent again from memory.";
        let aborts = r.counter("transaction_aborts_total", help);
        let help = "Times that another producer, or the brokers after a time-out, took over our transactional id.";
        let fences = r.counter("transaction_fences_total", help);
        Self { refusals, unconfirmed, transaction, aborts, fences }
    }
}

impl Metrics {
    /// The brokers refused a record, which is tried again.
    pub fn publish_refused(&self) {
        self.publish.refusals.inc();
    }

    /// A record is sent once more, since no broker had confirmed it.
    pub fn publish_unconfirmed(&self) {
        self.publish.unconfirmed.inc();
    }

    /// A transaction was committed after this time.
    pub fn transaction(&self, took: Duration) {
        self.publish.transaction.observe(took.as_secs_f64());
    }

    /// A transaction was aborted.
    pub fn transaction_aborted(&self) {
        self.publish.aborts.inc();
    }

    /// The producer of transactions was fenced.
    pub fn transaction_fenced(&self) {
        self.publish.fences.inc();
    }
}
