//! What the head of an answer means: a body, another address, or an error.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::Response;
use reqwest::header::{CONTENT_ENCODING, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use url::Url;

use super::FetchError;

/// The header by which owners of images say what machines may do with them.
const ROBOTS: &str = "x-robots-tag";

/// The name that a robots rule can address us by: the product of the default User-Agent (RFC 9309 has the same idea).
const PRODUCT: &str = "blipstream";

/// What `X-Robots-Tag` says where a picture is not to be read by a model.
const OPT_OUT: [&str; 2] = ["noai", "noimageai"];

/// Rules that have a colon, which looks like a name's.
const WITH_COLONS: [&str; 4] = ["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"];

/// Where an answer leads: nowhere else if it is a body, or to another address; everything but those is an error, and so is
/// a body that may not be taken, or was packed unasked. `robots` says whether owners' wishes are kept to.
pub(super) fn leads_to(response: &Response, here: &Url, first: &Url, robots: bool) -> Result<Option<Url>, FetchError> {
    let status = response.status();
    if status.is_success() {
        let headers = response.headers();
        may_be_used(headers, robots)?;
        check_unpacked(headers.get_all(CONTENT_ENCODING).iter().map(HeaderValue::as_bytes))?;
        return Ok(None);
    }
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Err(FetchError::Status { status, retry_after: retry_after(response.headers(), Timestamp::now()) });
    }
    let location = response.headers().get(LOCATION).ok_or_else(|| FetchError::Redirect("no Location".into()))?;
    let location = std::str::from_utf8(location.as_bytes()).ok();
    let location = location.ok_or_else(|| FetchError::Redirect("the Location is not text".into()))?;
    next_hop(here, first, location).map(Some)
}

/// Whether the owner lets a model read what comes with these headers, if owners' wishes are kept to.
pub(super) fn may_be_used(headers: &HeaderMap, robots: bool) -> Result<(), FetchError> {
    if robots && opts_out(headers) { Err(FetchError::OptedOut) } else { Ok(()) }
}

/// The address that `location` names, seen from `here`. Like curl, a redirect may lead from https to http. User-info
/// goes along only to the origin (scheme, host, port) that it was written for, and none is taken from a host.
fn next_hop(here: &Url, first: &Url, location: &str) -> Result<Url, FetchError> {
    let mut next = here.join(location).map_err(|error| FetchError::Redirect(format!("a bad Location: {error}")))?;
    if !matches!(next.scheme(), "http" | "https") {
        return Err(FetchError::BlockedScheme(next.scheme().chars().take(20).collect()));
    }
    let (name, password) =
        if next.origin() == first.origin() { (first.username(), first.password()) } else { ("", None) };
    // These fail only for URLs without a host, which http URLs have.
    let _ = next.set_username(name);
    let _ = next.set_password(password);
    Ok(next)
}

/// The wait that a host asks for, in seconds or until a date (RFC 9110, 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    parse_retry_after(headers.get(RETRY_AFTER)?.to_str().ok()?.trim(), now)
}

fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

/// Refuses a body that is packed, by what says so: nothing was asked to be, and what it unpacks to has no bound.
pub(super) fn check_unpacked<'v>(codings: impl Iterator<Item = &'v [u8]>) -> Result<(), FetchError> {
    for value in codings {
        let value = String::from_utf8_lossy(value);
        let mut codings = value.split(',').map(str::trim);
        if let Some(coding) = codings.find(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case("identity")) {
            return Err(FetchError::Packed(coding.chars().take(20).collect()));
        }
    }
    Ok(())
}

/// Whether an `X-Robots-Tag` for everybody, or for us, opts out. `name: rule, rule` is for that name alone.
fn opts_out(headers: &HeaderMap) -> bool {
    headers.get_all(ROBOTS).iter().any(|value| {
        let value = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        let (name, rules) = match value.split_once(':') {
            Some((name, rules)) if !name.contains([',', ' ']) && !WITH_COLONS.contains(&name) => (name, rules),
            _ => ("*", value.as_str()),
        };
        let ours = name == "*" || name == PRODUCT;
        ours && rules.split(',').any(|rule| OPT_OUT.contains(&rule.trim()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderName;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn headers(name: HeaderName, values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn user_info_goes_only_where_it_was_written_for() {
        let first = url("https://user:pw@a.example/x?y");
        let hop = |here: &str, location: &str| next_hop(&url(here), &first, location).unwrap().to_string();
        assert_eq!(hop("https://user:pw@a.example/x", "/z"), "https://user:pw@a.example/z");
        assert_eq!(hop("https://user:pw@a.example/x", "https://b.example/"), "https://b.example/");
        assert_eq!(hop("https://user:pw@a.example/x", "http://a.example/"), "http://a.example/");
        assert_eq!(hop("https://user:pw@a.example/x", "//a.example:444/"), "https://a.example:444/");
        assert_eq!(hop("https://user:pw@a.example/x", "https://eve:1@b.example/"), "https://b.example/");
        assert_eq!(hop("https://b.example/", "https://a.example/q"), "https://user:pw@a.example/q");
    }

    #[test]
    fn a_redirect_to_another_scheme_is_refused() {
        let here = url("https://a.example/");
        for location in ["file:///etc/passwd", "ftp://a.example/", "data:,x", "gopher://a"] {
            let error = next_hop(&here, &here, location).unwrap_err();
            assert!(matches!(error, FetchError::BlockedScheme(_)), "{location}");
        }
        assert!(matches!(next_hop(&here, &here, "http://[bad"), Err(FetchError::Redirect(_))));
    }

    #[test]
    fn retry_after_is_read_in_both_its_forms() {
        let now: Timestamp = "2026-11-06T08:49:00Z".parse().unwrap();
        for (value, wait) in [
            ("0", Some(0)),
            ("120", Some(120)),
            ("Fri, 06 Nov 2026 08:49:37 GMT", Some(37)),
            ("Fri, 06 Nov 2026 08:48:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(parse_retry_after(value, now), wait.map(Duration::from_secs), "{value:?}");
        }
    }

    #[test]
    fn a_wish_of_the_owner_is_read_where_it_is_for_everybody_or_for_us() {
        for (values, expected) in [
            (&["noai"][..], true),
            (&["NoImageAI"], true),
            (&["noindex, noai"], true),
            (&["noindex", "nofollow,noimageai"], true),
            (&["blipstream: noai"], true),
            (&["*: noai"], true),
            (&["otherbot: noai"], false),
            (&["noindex, noarchive"], false),
            (&["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], true),
            (&["max-image-preview:large, noai"], true),
            (&["noaim"], false),
            (&[""], false),
            (&[], false),
        ] {
            assert_eq!(opts_out(&headers(HeaderName::from_static(ROBOTS), values)), expected, "{values:?}");
        }
    }

    #[test]
    fn a_body_that_is_packed_unasked_is_told_by_its_coding() {
        for (values, expected) in [
            (&["gzip"][..], Some("gzip")),
            (&["identity"], None),
            (&["identity, br"], Some("br")),
            (&[""], None),
            (&[], None),
        ] {
            let headers = headers(CONTENT_ENCODING, values);
            let refused = check_unpacked(headers.get_all(CONTENT_ENCODING).iter().map(HeaderValue::as_bytes)).err();
            assert_eq!(refused, expected.map(|coding: &str| FetchError::Packed(coding.into())), "{values:?}");
        }
    }
}
