//! The endpoint that answers while its clients wait.

#![allow(clippy::print_stderr, clippy::print_stdout)] // what a test tells a person

mod beside;
mod document;
mod limits;
mod protocol;
mod score;
mod serving;
#[path = "../support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::sync::Arc;

use blipstream::caption::fake::{FakeAnswerer, FakeEngine, FakeFilter, FakeOptions};
use blipstream::caption::preprocess::Preprocessor;
use blipstream::endpoint;
use blipstream::metrics::Metrics;
use blipstream::pipeline::{Budget, Control, Loaded, Parts, server};
use blipstream::settings::Settings;
use tokio_util::sync::CancellationToken;

use support::http::{Reply, http};

/// An endpoint in this process, without a stream, on a fake captioner.
struct Server {
    at: SocketAddr,
    control: Control,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    stop: CancellationToken,
}

impl Server {
    async fn start() -> Self {
        Self::with(settings(), FakeOptions::default()).await
    }

    /// With a filter where `filter.source` is set, and an answerer where `answerer.source` is.
    async fn with(settings: Settings, options: FakeOptions) -> Self {
        let budget = Budget::new(&settings.flow).with_endpoint(1.0);
        let control = Control::without_stream(budget, Arc::new(Metrics::new()));
        let stop = CancellationToken::new();
        let port = endpoint::serve(&settings.endpoint, control.clone(), stop.clone()).await.unwrap();
        let parts = Parts {
            preprocessor: Preprocessor::blip(options.image_size),
            engines: vec![Loaded {
                engine: Box::new(FakeEngine::new(options)),
                filter: settings.filter.source.as_ref().map(|_| Box::new(FakeFilter::default()) as _),
                answerer: settings.answerer.source.as_ref().map(|_| Box::new(FakeAnswerer::default()) as _),
                canary: None,
                batch_size: 4,
                replica: None,
            }],
            flag_terms: Vec::new(),
            worker: "test".into(),
            load: None,
        };
        let handle = control.clone();
        let task = tokio::spawn(async move { server::run(&settings, parts, &handle).await });
        while !control.answers() {
            tokio::task::yield_now().await;
        }
        Self { at: port.address, control, task, stop }
    }

    async fn post(&self, path: &str, body: &str) -> Reply {
        http(self.at, &format!("POST {path}"), body).await
    }

    async fn get(&self, path: &str) -> Reply {
        http(self.at, &format!("GET {path}"), "").await
    }

    /// A series of the metrics, by its name and labels as Prometheus writes them.
    fn metric(&self, series: &str) -> u64 {
        let text = self.control.render_metrics();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
    }

    /// Drains, and says how that went.
    async fn stop(self) {
        self.control.drain("the test is over");
        self.task.await.unwrap().unwrap();
        self.stop.cancel();
    }
}

/// A free port of loopback.
fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.endpoint.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    settings.model.caption_cache = bytesize::ByteSize::b(0);
    settings
}

/// The same with an answerer.
fn with_answerer() -> Settings {
    let mut settings = settings();
    settings.answerer.source = Some("fake".into());
    settings
}

/// The same with a filter.
fn with_filter() -> Settings {
    let mut settings = settings();
    settings.filter.source = Some("fake".into());
    settings
}
