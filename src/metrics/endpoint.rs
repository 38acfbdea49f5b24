//! The endpoint: who asks, and how long they wait.

use std::time::Duration;

use prometheus::{HistogramVec, IntCounterVec, IntGauge};

use super::registrar::Registrar;
use super::{Metrics, SECONDS};
use crate::disposition::{Code, names};

/// Value of the label `code` of rows that have a record.
const OK: &str = "ok";

names! {
    /// What is asked for.
    Route {
        /// `POST /score`.
        Score = "score",
        /// Inference of the Open Inference Protocol.
        Infer = "infer",
    }
}

/// Its families.
#[derive(Debug)]
pub(super) struct EndpointMetrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    rows: IntCounterVec,
    in_flight: IntGauge,
}

impl EndpointMetrics {
    /// Registers them; all series with closed labels are there from the start, but for failures.
    pub(super) fn new(r: &mut Registrar) -> Self {
        let metrics = Self {
            requests: r.counters(
                "endpoint_requests_total",
                &["route", "status"],
                "Requests to the endpoint, by what they ask for and the status of the answer.",
            ),
            seconds: r.histograms(
                "endpoint_request_seconds",
                &["route"],
                SECONDS,
                "From the head of a request to its answer, those that were refused left out.",
            ),
            rows: r.counters(
                "endpoint_rows_total",
                &["code"],
                "Rows that the endpoint answered: ok, or the code of the error.",
            ),
            in_flight: r.gauge("endpoint_rows_in_flight", "Rows of the endpoint under way."),
        };
        for route in Route::ALL {
            metrics.seconds.with_label_values(&[route.as_str()]);
            metrics.requests.with_label_values(&[route.as_str(), "200"]);
        }
        metrics.rows.with_label_values(&[OK]);
        metrics
    }
}

impl Metrics {
    /// A request was answered with this status; `took` is `None` where it was refused.
    pub fn asked(&self, route: Route, status: u16, took: Option<Duration>) {
        let EndpointMetrics { requests, seconds, .. } = &self.endpoint;
        requests.with_label_values(&[route.as_str(), &status.to_string()]).inc();
        if let Some(took) = took {
            seconds.with_label_values(&[route.as_str()]).observe(took.as_secs_f64());
        }
    }

    /// A row was answered, with an error of this code or with a record.
    pub fn row_answered(&self, code: Option<Code>) {
        self.endpoint.rows.with_label_values(&[code.map_or(OK, |code| code.as_str())]).inc();
    }

    /// Rows of the endpoint that are under way now.
    pub fn endpoint_in_flight(&self, rows: usize) {
        self.endpoint.in_flight.set(rows as i64);
    }
}
