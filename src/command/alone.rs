//! What the commands have in common that run one model without a captioner.

use crate::command::local::{self, Form, Print};
use crate::command::models::{self, LoadedModel};
use crate::command::{Exit, telemetry};
use crate::config::ConfigOptions;
use crate::message::Request;
use crate::settings::Settings;

/// Where the model runs, and what it may reach.
#[derive(Debug, clap::Args)]
pub struct AloneOptions {
    /// `auto`, `cpu` or `cuda:N`
    #[arg(long)]
    device: Option<String>,
    /// `auto`, `f32`, `bf16`, `f16` or `int8`
    #[arg(long)]
    dtype: Option<String>,
    /// A network that may be reached although it is not public, e.g. 10.0.0.0/8; may be given several times
    #[arg(long, value_name = "CIDR")]
    allow_network: Vec<ipnet::IpNet>,
    #[command(flatten)]
    config: ConfigOptions,
}

impl AloneOptions {
    /// The settings, with what the flags change of them, for these images.
    ///
    /// # Errors
    /// The configuration is wrong.
    pub fn settings(&self, images: &[String]) -> anyhow::Result<Settings> {
        let mut settings = self.config.load()?.settings;
        settings.model.devices = self.device.clone().map_or(settings.model.devices, |device| vec![device]);
        settings.model.dtype = self.dtype.clone().unwrap_or(settings.model.dtype);
        local::open_to_the_user(&mut settings, images, &self.allow_network);
        Ok(settings)
    }
}

/// Asks a model about one image, and prints what it says.
///
/// # Errors
/// The model cannot be loaded, or the flow broke down.
pub fn ask(
    settings: &Settings,
    load: impl FnOnce(&Settings) -> anyhow::Result<LoadedModel>,
    image: &str,
    asking: impl FnOnce(Request) -> Request,
    (form, text): (Form, Print),
) -> anyhow::Result<Exit> {
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let parts = models::parts(settings, load(settings)?)?;
    let request = local::request(image).map(asking);
    local::run(settings, parts, std::iter::once(Ok(request)), local::printing(form, text), 0.0)
}
