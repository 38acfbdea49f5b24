//! What can go wrong between a reference and its bytes.

use std::error::Error;
use std::io;
use std::time::Duration;

use bytesize::ByteSize;
use jiff::Timestamp;
use reqwest::StatusCode;

use super::guard::{LookupError, Refused};
use crate::disposition::{Code, Disposed, Disposition, Failure, Stage};

/// Why an image was not fetched. The text says what happened and what to do; [`FailedFetch`] says to which reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The reference cannot be read.
    #[error("the reference is broken: {0}")]
    BadReference(String),
    /// The address is not to be reached.
    #[error(transparent)]
    Blocked(#[from] Refused),
    /// A redirect that leaves http and https.
    #[error("the host redirects to a {0}: address, and only http: and https: are followed")]
    BlockedScheme(String),
    /// The name does not resolve.
    #[error("the host name does not resolve: {0}")]
    Dns(LookupError),
    /// No connection, or it broke.
    #[error("the connection failed: {0}")]
    Connect(String),
    /// The TLS handshake failed.
    #[error("TLS failed: {cause}")]
    Tls {
        /// Whether the certificate is at fault, which another try does not change.
        certificate: bool,
        /// What the TLS library says.
        cause: String,
    },
    /// A time limit passed.
    #[error("it took longer than {}, the limit of {setting}", humantime::format_duration(*.limit))]
    Timeout {
        /// The setting whose limit passed.
        setting: &'static str,
        /// That limit.
        limit: Duration,
    },
    /// The host answered with something else than an image.
    #[error("the host answered {status}: {}", advice(*.status))]
    Status {
        /// The answer.
        status: StatusCode,
        /// Wait that the host asked for.
        retry_after: Option<Duration>,
    },
    /// A store answered with something else than the object.
    #[error("the store answered {status}{}: {}", in_brackets(.said), store_advice(*.status, .said))]
    Store {
        /// The answer.
        status: StatusCode,
        /// The store's own code and words, where it gave any.
        said: String,
        /// Wait that the store asked for.
        retry_after: Option<Duration>,
    },
    /// A store's answer is none that can be used: it is no object, say, or has no length.
    #[error("the store's answer cannot be used: {0}")]
    StoreAnswer(String),
    /// The bucket is not open to references.
    #[error("it lies in no bucket or folder of fetch.stores, which says what is read with the worker's credentials")]
    StoreClosed,
    /// Nothing was asked of the store, since the worker cannot say who it is.
    #[error(
        "the worker has no credentials for the store: {0}. They come from its environment (AWS_*, GOOGLE_*, AZURE_*) or the \
         machine's role; AWS_SKIP_SIGNATURE=true (or GOOGLE_, AZURE_) reads a public bucket without"
    )]
    NoCredentials(String),
    /// A body that drips.
    #[error("it comes more slowly than {} a second, the limit of fetch.min_rate", ByteSize(*.limit))]
    TooSlow {
        /// The limit, in bytes a second.
        limit: u64,
    },
    /// A body in a coding that was not asked for.
    #[error("the host sends it packed ({0}), which was not asked for, and it is not unpacked")]
    Packed(String),
    /// The owner does not want models to read it.
    #[error("its owner opts out of use by models (X-Robots-Tag); fetch.robots_tag = false would not ask")]
    OptedOut,
    /// The redirects lead nowhere.
    #[error("the host's redirects lead nowhere: {0}")]
    Redirect(String),
    /// No such file.
    #[error("there is no such file")]
    NoFile,
    /// The file may not be read.
    #[error("the file is not read: {0}")]
    FileDenied(&'static str),
    /// Reading the file failed.
    #[error("the file could not be read: {0}")]
    FileBroken(String),
    /// The body is over the limit.
    #[error("it is larger than {}, the limit of fetch.max_body", ByteSize(*.limit as u64))]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The head of an answer has no end.
    #[error("the head of its answer is over-long")]
    HeadTooLarge,
    /// There is nothing in it.
    #[error("it is empty, so it is no image")]
    Empty,
    /// Not tried: the host failed too often of late, or asked for a wait.
    #[error(
        "its host failed again and again, or asked for a long wait ({last}), and is left alone for {} more, so it comes back \
         from a retry topic; fetch.per_host and fetch.per_host_rate ask less of a host",
        humantime::format_duration(Duration::from_secs(.left.as_secs()))
    )]
    LeftAlone {
        /// For so long yet.
        left: Duration,
        /// How it failed last.
        last: Code,
    },
    /// Not tried: an outage of our own surroundings is on, and the message is held. It becomes no dead letter.
    #[error("it was not tried, since an outage is on")]
    Halted,
    /// The request's deadline passed.
    #[error("its deadline passed before it was there{}", last_words(.0.as_deref()))]
    Deadline(Option<Box<FetchError>>),
}

fn advice(status: StatusCode) -> &'static str {
    match status.as_u16() {
        404 | 410 => "the link is dead",
        401 | 403 | 451 => "the image is not open to everybody, or not to this User-Agent",
        429 => "it asks for fewer requests; lower fetch.per_host if this happens often",
        408 | 500..=599 => "the fault is on its side; send the request again later",
        _ => "it has no image for this address",
    }
}

fn in_brackets(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(" ({said})") }
}

/// What stores say when the worker's own credentials or settings are at fault: nothing is wrong with the message. (Error
/// codes of S3, and of Azure's Blob service.)
const REFUSALS: [&str; 27] = [
    "AccountIsDisabled",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "AuthorizationHeaderMalformed",
    "AuthorizationPermissionMismatch",
    "AuthorizationProtocolMismatch",
    "AuthorizationResourceTypeMismatch",
    "AuthorizationServiceMismatch",
    "AuthorizationSourceIPMismatch",
    "ContainerBeingDeleted",
    "ContainerDisabled",
    "ContainerNotFound",
    "ExpiredToken",
    "IllegalLocationConstraintException",
    "InsufficientAccountPermissions",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidToken",
    "KeyBasedAuthenticationNotPermitted",
    "NoSuchBucket",
    "NotSignedUp",
    "PublicAccessNotPermitted",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
];

/// Whether a store refuses the worker, and not the object.
fn refuses_worker(status: StatusCode, said: &str) -> bool {
    let code = said.split(':').next().unwrap_or_default();
    status == StatusCode::UNAUTHORIZED || status.is_redirection() || REFUSALS.contains(&code)
}

fn store_advice(status: StatusCode, said: &str) -> &'static str {
    match status.as_u16() {
        300..=399 => "the bucket is in another region; see aws_region in fetch.store_options, or AWS_REGION",
        _ if refuses_worker(status, said) => {
            "the worker is at fault: its credentials (environment, or the machine's role), region, clock, or fetch.stores"
        }
        404 => "there is no such object",
        403 => {
            "the worker's credentials do not open this object; where they may not list the bucket, a missing one looks alike"
        }
        429 | 503 => "it asks for fewer requests; lower fetch.per_host if this happens often",
        500..=599 => "the fault is on its side; send the request again later",
        _ => "it does not take the request",
    }
}

fn last_words(error: Option<&FetchError>) -> String {
    error.map_or_else(String::new, |error| format!("; the last try: {error}"))
}

impl Disposed for FetchError {
    fn disposition(&self) -> Disposition {
        let transient = match self {
            Self::Status { status, .. } => status.is_server_error() || matches!(status.as_u16(), 408 | 429),
            Self::Store { status, said, .. } => {
                refuses_worker(*status, said) || status.is_server_error() || matches!(status.as_u16(), 408 | 429)
            }
            Self::Dns(lookup) => !lookup.unknown_name,
            Self::Tls { certificate, .. } => !certificate,
            Self::Connect(_)
            | Self::Timeout { .. }
            | Self::TooSlow { .. }
            | Self::FileBroken(_)
            | Self::NoCredentials(_)
            | Self::Halted
            | Self::LeftAlone { .. } => true,
            _ => false,
        };
        let (Self::Status { retry_after, .. } | Self::Store { retry_after, .. }) = self else {
            return if transient { Disposition::Transient { retry_after: None } } else { Disposition::Permanent };
        };
        if transient { Disposition::Transient { retry_after: *retry_after } } else { Disposition::Permanent }
    }

    fn code(&self) -> Code {
        match self {
            Self::BadReference(_) => Code::BadReference,
            Self::Blocked(_) | Self::BlockedScheme(_) => Code::BlockedAddress,
            Self::Dns(_) => Code::Dns,
            // A disk that fails is to a file what a broken connection is to a URL.
            Self::Connect(_) | Self::FileBroken(_) | Self::NoCredentials(_) | Self::Halted => Code::Connect,
            Self::Tls { .. } => Code::Tls,
            Self::Timeout { .. } | Self::TooSlow { .. } => Code::Timeout,
            Self::LeftAlone { last, .. } => *last,
            Self::OptedOut => Code::RobotsOptout,
            // As where there is no way to it: neither the message nor the object is to blame.
            Self::Store { status, said, .. } if refuses_worker(*status, said) => Code::Connect,
            Self::Status { status, .. } | Self::Store { status, .. } => status_code(*status),
            // Like an odd 4xx, it is an answer that no retry will improve.
            Self::Redirect(_) | Self::StoreAnswer(_) => Code::Http4xx,
            Self::NoFile => Code::NotFound,
            Self::FileDenied(_) | Self::StoreClosed => Code::AccessDenied,
            Self::TooLarge { .. } | Self::HeadTooLarge => Code::TooLarge,
            Self::Empty | Self::Packed(_) => Code::UnsupportedMedia,
            Self::Deadline(_) => Code::Deadline,
        }
    }
}

/// The code of an answer that is not 2xx. What is neither 4xx nor 5xx (300, 304, 305, 306) was not asked for, and counts
/// as an odd 4xx.
fn status_code(status: StatusCode) -> Code {
    match status.as_u16() {
        404 | 410 => Code::NotFound,
        401 | 403 | 451 => Code::AccessDenied,
        408 => Code::Timeout,
        429 => Code::Http429,
        500.. => Code::Http5xx,
        _ => Code::Http4xx,
    }
}

impl FetchError {
    /// Whether it came without anybody having been asked, so that it tells nothing of hosts and of the way to them.
    pub(super) fn came_unasked(&self) -> bool {
        matches!(self, Self::BadReference(_) | Self::Blocked(_) | Self::StoreClosed | Self::Halted)
    }

    /// What an error of the HTTP client means, while the connection may take `connect`.
    pub(super) fn from_client(error: &reqwest::Error, connect: Duration) -> Self {
        if let Some(refused) = find::<Refused>(error) {
            Self::Blocked(*refused)
        } else if let Some(lookup) = find::<LookupError>(error) {
            Self::Dns(lookup.clone())
        } else if let Some(tls) = find::<rustls::Error>(error) {
            let certificate = matches!(tls, rustls::Error::InvalidCertificate(_));
            Self::Tls { certificate, cause: tls.to_string() }
        } else if find::<hyper::Error>(error).is_some_and(hyper::Error::is_parse_too_large) {
            Self::HeadTooLarge
        } else if error.is_builder() {
            Self::BadReference("no HTTP request can be made for this URL".into())
        } else if error.is_timeout() && error.is_connect() {
            Self::Timeout { setting: "fetch.connect_timeout", limit: connect }
        } else {
            Self::Connect(deepest(error))
        }
    }
}

/// The first error of a type in a chain of causes.
pub(super) fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    std::iter::successors(Some(error), |error| cause(*error)).find_map(|error| error.downcast_ref())
}

/// The text of the innermost cause. The outer ones only repeat "error sending request", and the outermost one the URL
/// with its secrets.
pub(super) fn deepest(error: &reqwest::Error) -> String {
    let chain = std::iter::successors(error.source(), |error| cause(*error));
    chain.last().map_or_else(|| "the HTTP client gave no reason".into(), ToString::to_string)
}

fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    // An I/O error hides what it wraps from `source`.
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    wrapped.map_or_else(|| error.source(), |inner| Some(inner as &(dyn Error + 'static)))
}

/// The end of a fetch that failed, after all its tries.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reference}: {error}")]
pub struct FailedFetch {
    /// The reference, fit for logs: no user-info, no query string, no inline data, and not over-long.
    pub reference: String,
    /// The last error.
    pub error: FetchError,
    /// Tries made; 0 where the deadline had passed before the first.
    pub attempts: u32,
    /// When the first try failed.
    pub first_failed_at: Timestamp,
}

impl Disposed for FailedFetch {
    fn disposition(&self) -> Disposition {
        self.error.disposition()
    }

    fn code(&self) -> Code {
        self.error.code()
    }
}

impl FailedFetch {
    /// What it means for its row.
    pub fn failure(&self) -> Failure {
        Failure::new(Stage::Fetch, self).after(self.attempts, self.first_failed_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: u16) -> FetchError {
        FetchError::Status { status: StatusCode::from_u16(status).unwrap(), retry_after: None }
    }

    #[test]
    fn an_answer_has_the_code_of_the_contract() {
        for (status, code, transient) in [
            (300, Code::Http4xx, false),
            (304, Code::Http4xx, false),
            (400, Code::Http4xx, false),
            (401, Code::AccessDenied, false),
            (403, Code::AccessDenied, false),
            (404, Code::NotFound, false),
            (408, Code::Timeout, true),
            (410, Code::NotFound, false),
            (418, Code::Http4xx, false),
            (429, Code::Http429, true),
            (451, Code::AccessDenied, false),
            (500, Code::Http5xx, true),
            (503, Code::Http5xx, true),
            (599, Code::Http5xx, true),
        ] {
            let error = answered(status);
            let is_transient = matches!(error.disposition(), Disposition::Transient { .. });
            assert_eq!((error.code(), is_transient), (code, transient), "{status}");
        }
    }

    #[test]
    fn an_error_inside_an_io_error_is_found() {
        let hidden = io::Error::other(io::Error::other(Refused::NotPublic([10, 0, 0, 1].into())));
        assert_eq!(find::<Refused>(&hidden), Some(&Refused::NotPublic([10, 0, 0, 1].into())));
        assert_eq!(find::<LookupError>(&hidden), None);
    }

    #[test]
    fn a_passed_deadline_still_says_what_went_wrong() {
        let text = FetchError::Deadline(Some(Box::new(answered(503)))).to_string();
        assert!(text.contains("deadline") && text.contains("503"), "{text}");
    }
}
