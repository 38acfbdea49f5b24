//! From references to bytes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

/// Longest time that a host is left alone, by its own failures or by its own wish.
pub const LONGEST_BREAK: Duration = Duration::from_secs(10 * 60);

/// Whether an address is of the web, and names nobody: it is a setting, which is printed.
pub fn is_web_address(url: &Url) -> bool {
    matches!(url.scheme(), "http" | "https") && url.has_host() && url.username().is_empty() && url.password().is_none()
}

/// How images are fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Fetches under way at once.
    pub concurrency: usize,
    /// Fetches under way at once to one host.
    pub per_host: usize,
    /// Whether references to the same address that are in flight together are fetched once.
    pub share: bool,
    /// Memory for bodies that hosts let be kept (RFC 9111): an address that comes again is answered from it while it is
    /// fresh, and else the host is asked whether it has changed (`ETag`, `Last-Modified`). 0 keeps none.
    #[schemars(with = "String")]
    pub cache: ByteSize,
    /// Requests a second to one host, up to a second's worth of them at once; 0 sets no limit.
    pub per_host_rate: f64,
    /// Failed tries in a row after which a host is left alone, its messages going to the retry topics at once; 0 never does.
    pub breaker_failures: u32,
    /// How long it is left alone at first; twice as long whenever it is not back, up to ten minutes.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub breaker_wait: Duration,
    /// Time limit for the connection.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub connect_timeout: Duration,
    /// Time limit between two reads.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub read_timeout: Duration,
    /// Time limit for one try, from the connection to the last byte.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub total_timeout: Duration,
    /// Largest body.
    #[schemars(with = "String")]
    pub max_body: ByteSize,
    /// Redirects followed.
    pub max_redirects: usize,
    /// Tries in all for a transient error.
    pub attempts: u32,
    /// Upper bound of the first wait between tries; it doubles from there (full jitter).
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub backoff: Duration,
    /// Upper bound of any wait between tries.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_backoff: Duration,
    /// How far back fetches are looked at for an outage: when most fetches of most hosts fail, at least five hosts, for
    /// reasons that may be the worker's own surroundings, it pauses and holds what it has. 0 never does.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub outage_window: Duration,
    /// Slowest average rate of a body, a second, once it has taken five seconds; 0 takes any.
    #[schemars(with = "String")]
    pub min_rate: ByteSize,
    /// Networks that may be reached although they are not public, e.g. `["10.1.0.0/16"]`.
    #[schemars(with = "Vec<String>")]
    pub allow_networks: Vec<IpNet>,
    /// Ports that public hosts are asked on; none named means all. Networks of `allow_networks` are open on every port.
    pub allow_ports: Vec<u16>,
    /// An HTTP proxy that everything goes through, e.g. `http://proxy.internal:3128`. It resolves the names, and has to
    /// guard what they lead to. None is taken from the environment.
    pub proxy: Option<Url>,
    /// Whether images are left alone whose `X-Robots-Tag` says `noai` or `noimageai`.
    pub robots_tag: bool,
    /// Folders below which `file://` references may be read; none by default.
    pub file_roots: Vec<PathBuf>,
    /// Buckets, and folders in them, that `s3://`, `gs://` and `az://` references may be read from, e.g.
    /// `["s3://photos", "gs://scans/2024/"]`; none by default, since they are read with the worker's credentials.
    pub stores: Vec<String>,
    /// Options of the stores by their names in the crate object_store, over those of the environment, e.g.
    /// `aws_endpoint = "http://minio:9000"`. Secrets belong into the environment.
    pub store_options: BTreeMap<String, String>,
    /// The User-Agent sent to image hosts.
    pub user_agent: String,
    /// Where a host's owner can reach you, a page or an address of mail; it is added to the User-Agent.
    pub contact: Option<String>,
}

/// The options of stores that a configuration may set. Secrets are not among them: a configuration file is no place for them,
/// and is printed.
pub const STORE_OPTIONS: [&str; 22] = [
    "aws_endpoint",
    "aws_imdsv1_fallback",
    "aws_metadata_endpoint",
    "aws_region",
    "aws_request_payer",
    "aws_role_arn",
    "aws_role_session_name",
    "aws_s3_express",
    "aws_skip_signature",
    "aws_virtual_hosted_style_request",
    "aws_web_identity_token_file",
    "azure_client_id",
    "azure_endpoint",
    "azure_federated_token_file",
    "azure_skip_signature",
    "azure_storage_account_name",
    "azure_tenant_id",
    "azure_use_azure_cli",
    "google_application_credentials",
    "google_base_url",
    "google_service_account",
    "google_skip_signature",
];

impl Default for Fetch {
    fn default() -> Self {
        Self {
            concurrency: 64,
            per_host: 16,
            share: true,
            cache: ByteSize::b(0),
            per_host_rate: 0.0,
            breaker_failures: 20,
            breaker_wait: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(10),
            total_timeout: Duration::from_secs(30),
            max_body: ByteSize::mib(20),
            max_redirects: 5,
            attempts: 4,
            backoff: Duration::from_millis(250),
            max_backoff: Duration::from_secs(5),
            outage_window: Duration::from_secs(30),
            min_rate: ByteSize::kib(1),
            allow_networks: Vec::new(),
            allow_ports: vec![80, 443, 8080, 8443],
            proxy: None,
            robots_tag: true,
            file_roots: Vec::new(),
            stores: Vec::new(),
            store_options: BTreeMap::new(),
            user_agent: concat!("blipstream/", env!("CARGO_PKG_VERSION")).into(),
            contact: None,
        }
    }
}
