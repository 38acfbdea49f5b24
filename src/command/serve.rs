//! `blipstream serve`: captions over HTTP while clients wait, without Kafka.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::worker::drain_on_signal;
use super::{Exit, models, runtime, telemetry};
use crate::config::ConfigOptions;
use crate::metrics::Metrics;
use crate::pipeline::{Budget, Control, Parts, server};
use crate::settings::{self, Settings};
use crate::web::Port;
use crate::{admin, endpoint};

/// How long a client that keeps its connection open may keep the process.
const LEAVE: Duration = Duration::from_secs(1);

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream serve --model Salesforce/blip-image-captioning-base
  blipstream serve --model demo --filter demo --listen 127.0.0.1:8080
  blipstream serve --answerer Salesforce/blip-vqa-base

  curl http://127.0.0.1:8080/score -H 'Content-Type: application/json' -d \\
    '{\"input_data\": {\"columns\": [\"image\"], \"index\": [0], \"data\": [[\"https://example.com/a.jpg\"]]}}'
  [{\"text\":\"a stream in the middle of a forest\"}]

Routes: POST /score; the Open Inference Protocol below /v2; GET /openapi.json. Health and metrics for operators are on the
admin port as with a worker (admin.listen). A worker answers beside its stream where endpoint.listen is set.
SIGTERM or SIGINT drains: new requests are told to go elsewhere (503), what is under way is answered within
flow.drain_timeout. A second signal stops at once.")]
pub struct ServeArgs {
    /// Address to listen on; else endpoint.listen, or else 127.0.0.1:8080
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Folder, hub id, or `demo` for the small bundled model; else model.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: Option<String>,
    /// Folder, hub id, or `demo`: a model that judges texts; else filter.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    filter: Option<String>,
    /// Folder or hub id: a model that answers questions; else answerer.source
    #[arg(long, value_name = "DIR|HUB-ID")]
    answerer: Option<String>,
    #[command(flatten)]
    config: ConfigOptions,
}

/// Runs the command.
pub fn run(mut args: ServeArgs) -> anyhow::Result<Exit> {
    let set = [
        ("endpoint.listen", args.listen.map(|address| address.to_string())),
        ("model.source", args.model),
        ("filter.source", args.filter),
        ("answerer.source", args.answerer),
    ];
    args.config.set.extend(set.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))));
    let loaded = args.config.load()?;
    telemetry::init(&loaded.settings.log)?;
    for warning in loaded.warnings() {
        tracing::warn!("{warning}");
    }
    let runtime = runtime()?;
    let exit = runtime.block_on(work(loaded.settings));
    runtime.shutdown_background();
    exit
}

async fn work(settings: Settings) -> anyhow::Result<Exit> {
    // All of the budget, since there is no stream.
    let budget = Budget::new(&settings.flow).with_endpoint(1.0);
    let control = Control::without_stream(budget, Arc::new(Metrics::new()));
    drain_on_signal(&control)?;
    let ports = Ports::open(&settings, Some(&settings.endpoint), &control).await?;
    let loading = {
        let settings = settings.clone();
        tokio::task::spawn_blocking(move || models::load(&settings).and_then(|model| models::parts(&settings, model)))
    };
    let parts: Parts = tokio::select! {
        biased; // a signal counts more than a model that is loaded in the same moment
        () = control.draining().cancelled() => return Ok(Exit::Done),
        parts = loading => parts.context("loading the model panicked")??,
    };
    let served = server::run(&settings, parts, &control).await;
    ports.close().await;
    served?;
    tracing::info!("stopped");
    Ok(Exit::Done)
}

/// The ports of a process: for operators, and for who waits for captions.
pub struct Ports {
    open: Vec<Port>,
    stop: CancellationToken,
}

impl Ports {
    /// Opens them. They answer while the model is loaded: /livez says alive, /readyz says not yet.
    ///
    /// # Errors
    /// An address is taken or may not be bound.
    pub async fn open(
        settings: &Settings,
        endpoint: Option<&settings::Endpoint>,
        control: &Control,
    ) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let (admin, token) = (&settings.admin, settings.admin.token.clone());
        let port = admin::serve(admin.listen, token, control.clone(), stop.clone()).await?;
        tracing::info!(address = %port.address, "admin port: /livez /readyz /metrics /status");
        let mut open = vec![port];
        if let Some(endpoint) = endpoint {
            let port = endpoint::serve(endpoint, control.clone(), stop.clone()).await?;
            tracing::info!(address = %port.address, "endpoint: POST /score, /v2, /openapi.json");
            open.push(port);
        }
        Ok(Self { open, stop })
    }

    /// Closes them when what is being answered is answered, or after a moment.
    pub async fn close(self) {
        self.stop.cancel();
        for port in self.open {
            let _ = tokio::time::timeout(LEAVE, port.task).await;
        }
    }
}
