//! A store from the settings and the environment, and what is wrong with them before anything is asked: `object_store` looks
//! at some of it only when it asks, and then it panics.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ObjectStore, RetryConfig};
use reqwest::{Client, NoProxy};
use url::Url;

use super::super::http::{IDLE_CONNECTION, user_agent};
use super::note::Telling;
use crate::message::{ObjectRoot, StoreKind};
use crate::settings;

/// Where a machine is told who it is: never behind a proxy. The addresses of EC2, ECS, EKS and Azure, and Google's names.
const METADATA: &str =
    "169.254.169.254,169.254.170.2,169.254.170.23,fd00:ec2::254,fd00:ec2::23,metadata.google.internal,metadata";

/// A client without a guard, for the operator's own addresses; no redirect leads elsewhere.
pub(super) fn client(settings: &settings::Fetch) -> Result<Client, reqwest::Error> {
    let mut client = Client::builder()
        .user_agent(user_agent(settings))
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(settings.connect_timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .pool_max_idle_per_host(settings.per_host);
    if let Some(proxy) = &settings.proxy {
        client = client.proxy(reqwest::Proxy::all(proxy.clone())?.no_proxy(NoProxy::from_string(METADATA)));
    }
    client.build()
}

/// The store of a root. Its errors say what is wrong with the options or the environment.
pub(super) fn build(
    root: &ObjectRoot,
    options: &BTreeMap<String, String>,
    client: &Client,
) -> Result<Arc<dyn ObjectStore>, String> {
    // The fetcher tries again by itself.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let connector = Telling(client.clone());
    let bucket = root.bucket.as_str();
    let built: Result<Arc<dyn ObjectStore>, _> = match root.kind {
        StoreKind::S3 => {
            let mut builder = s3_from_environment();
            for (key, value) in given(options, "aws_")? {
                // An endpoint of S3 in the environment would go before a general one.
                if matches!(key, AmazonS3ConfigKey::Endpoint) {
                    builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, value);
                }
                builder = builder.with_config(key, value);
            }
            check_s3(&builder)?;
            let builder = builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
            builder.build().map(|store| Arc::new(store) as _)
        }
        StoreKind::Google => {
            let mut builder = GoogleCloudStorageBuilder::from_env();
            for (key, value) in given(options, "google_")? {
                builder = builder.with_config(key, value);
            }
            check_address("google_base_url", builder.get_config_value(&GoogleConfigKey::BaseUrl).as_deref())?;
            let builder = builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(connector);
            builder.build().map(|store| Arc::new(store) as _)
        }
        StoreKind::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env();
            for (key, value) in given(options, "azure_")? {
                builder = builder.with_config(key, value);
            }
            check_address("azure_endpoint", builder.get_config_value(&AzureConfigKey::Endpoint).as_deref())?;
            let builder = builder.with_container_name(bucket).with_retry(retry).with_http_connector(connector);
            builder.build().map(|store| Arc::new(store) as _)
        }
    };
    built.map_err(|error| error.to_string())
}

/// The options of one store, whose names begin so.
fn given<'o, K: FromStr>(options: &'o BTreeMap<String, String>, prefix: &str) -> Result<Vec<(K, &'o String)>, String> {
    let own = options.iter().filter(|(name, _)| name.starts_with(prefix));
    own.map(|(name, value)| Ok((name.parse().map_err(|_| format!("there is no option {name:?}"))?, value))).collect()
}

/// As `AmazonS3Builder::from_env`, but that a variable without a value is as good as none.
fn s3_from_environment() -> AmazonS3Builder {
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let own = all.filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty());
    own.fold(AmazonS3Builder::new(), |builder, (name, value)| match name.to_ascii_lowercase().parse() {
        Ok(key) => builder.with_config(key, value),
        Err(_) => builder,
    })
}

/// What would make the store panic, or ask another bucket than the one that is open.
fn check_s3(builder: &AmazonS3Builder) -> Result<(), String> {
    use AmazonS3ConfigKey as Key;
    let value = |key| builder.get_config_value(&key);
    let endpoints = [("aws_endpoint", value(Key::Endpoint)), ("AWS_ENDPOINT_URL_S3", value(Key::S3Endpoint))];
    for (name, endpoint) in &endpoints {
        check_address(name, endpoint.as_deref())?;
    }
    let sts = value(Key::StsEndpoint).filter(|_| value(Key::AccessKeyId).is_none());
    check_address("AWS_ENDPOINT_URL_STS", sts.as_deref())?;
    if sts.is_some_and(|sts| !sts.starts_with("https://")) {
        return Err("AWS_ENDPOINT_URL_STS must be an https address: a token is sent there".into());
    }
    let has_endpoint = endpoints.iter().any(|(_, endpoint)| endpoint.is_some());
    let hosted = value(Key::VirtualHostedStyleRequest).unwrap_or_default().to_ascii_lowercase();
    if has_endpoint && !matches!(&*hosted, "" | "0" | "false" | "off" | "no" | "n") {
        return Err(
            "aws_virtual_hosted_style_request and an endpoint do not go together: the bucket would not be named".into(),
        );
    }
    for (name, secret) in [("AWS_ACCESS_KEY_ID", value(Key::AccessKeyId)), ("AWS_SESSION_TOKEN", value(Key::Token))] {
        if secret.is_some_and(|text| !text.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(format!(
                "{name} holds white space or other characters that no key has; a line break at its end, maybe"
            ));
        }
    }
    Ok(())
}

/// Whether an address that was given can be asked.
fn check_address(name: &str, address: Option<&str>) -> Result<(), String> {
    let Some(text) = address else { return Ok(()) };
    let plain = |url: &Url| settings::is_web_address(url) && url.query().is_none() && url.fragment().is_none();
    if Url::parse(text).is_ok_and(|url| plain(&url)) {
        return Ok(());
    }
    Err(format!("{name} must be an http or https address without a user name, like http://minio.internal:9000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(root: &str, options: &[(&str, &str)]) -> String {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let built = build(&ObjectRoot::parse(root).unwrap(), &options, &Client::new());
        built.err().unwrap_or_default()
    }

    #[test]
    fn what_would_fail_at_the_first_message_is_told_at_the_start() {
        // The client wants a provider of cryptography.
        let _ = rustls::crypto::ring::default_provider().install_default();
        for (root, options, tells) in [
            ("s3://photos", &[("aws_endpiont", "x")][..], "aws_endpiont"),
            ("s3://photos", &[("aws_endpoint", "minio:9000")], "http or https"),
            ("s3://photos", &[("aws_endpoint", "")], "http or https"),
            ("s3://photos", &[("aws_endpoint", "http://user:pw@minio")], "http or https"),
            ("s3://photos", &[("aws_endpoint", "http://m"), ("aws_virtual_hosted_style_request", "true")], "bucket"),
            ("s3://photos", &[("aws_endpoint", "http://m"), ("aws_virtual_hosted_style_request", "Yes")], "bucket"),
            ("s3://photos", &[("aws_endpoint_url_sts", "http://sts")], "https"),
            ("s3://photos", &[("aws_access_key_id", "key\n"), ("aws_secret_access_key", "s")], "line break"),
            ("gs://photos", &[("google_base_url", "storage")], "http or https"),
            ("az://photos", &[("azure_storage_account_name", "a"), ("azure_endpoint", "blob")], "http or https"),
            ("az://photos", &[], "ccount"),
        ] {
            let problem = problem(root, options);
            assert!(problem.contains(tells), "{root} {options:?}: {problem:?}");
            assert!(!problem.contains("pw@"), "{problem}");
        }
        assert_eq!(problem("s3://photos", &[("aws_endpoint", "http://127.0.0.1:9000"), ("google_base_url", "x")]), "");
    }
}
