//! Which dead letters are meant.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use jiff::Timestamp;
use url::Host;

use super::letter::Letter;
use crate::command::Usage;
use crate::disposition::Code;
use crate::message::Origin;

/// What a dead letter must have to be meant. All that is given must hold; of several values of one option, any.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Filter {
    /// With one of these codes
    #[arg(long, value_name = "CODE,…", value_delimiter = ',', value_parser = codes())]
    code: Vec<Code>,
    /// Written at this time or later: RFC 3339, or so long ago (2h, 15m, 7d)
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Written before this time: RFC 3339, or so long ago
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
    /// Whose image is at one of these hosts, exactly
    #[arg(long, value_name = "HOST,…", value_delimiter = ',', value_parser = host)]
    host: Vec<String>,
    /// Whose request has this id; may be given several times
    #[arg(long, value_name = "ID")]
    id: Vec<String>,
    /// Of this origin: topic/partition/offset, with all rows, or topic/partition/offset/row
    #[arg(long, value_name = "ORIGIN")]
    origin: Vec<Origin>,
}

impl Filter {
    /// One that only asks for an id.
    pub fn of_id(id: String) -> Self {
        Self { id: vec![id], ..Self::default() }
    }

    /// # Errors
    /// No dead letter can ever be meant.
    pub fn check(&self) -> Result<(), Usage> {
        match (self.since, self.until) {
            (Some(since), Some(until)) if since >= until => {
                Err(Usage(format!("--since {since} is not before --until {until}")))
            }
            _ => Ok(()),
        }
    }

    /// Whether every dead letter is meant.
    pub fn is_empty(&self) -> bool {
        let Self { code, since, until, host, id, origin } = self;
        let times = since.is_none() && until.is_none();
        times && code.is_empty() && host.is_empty() && id.is_empty() && origin.is_empty()
    }

    /// Whether this one is meant. One of an unknown time is meant only where no time is asked for.
    pub fn matches(&self, letter: &Letter) -> bool {
        let Self { code, since, until, host, id, origin } = self;
        let any = |wanted: bool, found: bool| !wanted || found;
        any(!code.is_empty(), code.iter().any(|code| code.as_str() == letter.code))
            && any(since.is_some(), letter.time.zip(*since).is_some_and(|(time, since)| time >= since))
            && any(until.is_some(), letter.time.zip(*until).is_some_and(|(time, until)| time < until))
            && any(!host.is_empty(), letter.host.as_ref().is_some_and(|found| host.contains(found)))
            && any(!id.is_empty(), id.contains(&letter.id))
            && any(!origin.is_empty(), origin.iter().any(|origin| is_of(&letter.origin, origin)))
    }
}

/// Whether an origin is the wanted one, or one of its rows.
fn is_of(origin: &Origin, wanted: &Origin) -> bool {
    let row = wanted.index.is_none() || wanted.index == origin.index;
    row && (&origin.topic, origin.partition, origin.offset) == (&wanted.topic, wanted.partition, wanted.offset)
}

/// Knows the closed list, so that another name is refused with all of them, and shells complete it.
fn codes() -> impl TypedValueParser<Value = Code> {
    let names = PossibleValuesParser::new(Code::ALL.iter().map(|code| code.as_str()));
    names.try_map(|name| Code::ALL.iter().copied().find(|code| code.as_str() == name).ok_or("no code"))
}

/// The host as it stands in an address that was parsed: lower case, international names in their ASCII form.
fn host(text: &str) -> Result<String, String> {
    Host::parse(text.trim())
        .map(|host| host.to_string())
        .map_err(|error| format!("{error}; write only the host's name"))
}

fn moment(text: &str) -> Result<Timestamp, String> {
    moment_from(text, Timestamp::now())
}

fn moment_from(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let length = text.trim().trim_end_matches("ago").trim_end();
    if let Ok(length) = humantime::parse_duration(length) {
        return now.checked_sub(length).map_err(|_| "that is too long ago".into());
    }
    text.trim().parse().map_err(|_| "neither a time (2026-11-23T12:00:00Z) nor how long ago (2h, 15m, 7d)".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::letter::tests::dead;
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        filter: Filter,
    }

    fn filter(arguments: &[&str]) -> Result<Filter, String> {
        let line = Line::try_parse_from([&["x"], arguments].concat()).map_err(|error| error.to_string())?;
        line.filter.check().map_err(|error| error.to_string())?;
        Ok(line.filter)
    }

    fn letter(host: &str, code: Code, offset: i64, index: Option<usize>) -> Letter {
        let value = format!(r#"{{"id":"id {offset}","image":"https://{host}/a.jpg"}}"#);
        Letter::read(&dead(&value, code, offset, index)).unwrap()
    }

    #[test]
    fn all_that_is_asked_for_must_hold_and_any_of_several_values() {
        // Written at 14:13:27.
        let letter = letter("images.example", Code::Dns, 7, Some(2));
        for (arguments, matches) in [
            (&[][..], true),
            (&["--code", "dns"], true),
            (&["--code", "connect,dns"], true),
            (&["--code", "connect"], false),
            (&["--host", "images.example"], true),
            (&["--host", "IMAGES.example,other.example"], true),
            (&["--host", "example"], false),
            (&["--id", "id 7"], true),
            (&["--id", "id"], false),
            (&["--id", "id", "--id", "id 7"], true),
            (&["--origin", "requests/1/7"], true),
            (&["--origin", "requests/1/7/2"], true),
            (&["--origin", "requests/1/7/1"], false),
            (&["--origin", "requests/0/7"], false),
            (&["--since", "2026-09-21T14:13:27Z"], true),
            (&["--since", "2026-09-21T14:13:28Z"], false),
            (&["--until", "2026-09-21T14:13:27Z"], false),
            (&["--until", "2026-09-21T16:13:28+02:00"], true),
            (&["--code", "dns", "--host", "images.example", "--id", "id 7"], true),
            (&["--code", "dns", "--host", "other.example"], false),
        ] {
            assert_eq!(filter(arguments).unwrap().matches(&letter), matches, "{arguments:?}");
            assert_eq!(filter(arguments).unwrap().is_empty(), arguments.is_empty());
        }
    }

    #[test]
    fn a_dead_letter_of_an_unknown_time_or_host_is_meant_only_where_none_is_asked_for() {
        let nowhere = Letter { time: None, host: None, ..letter("images.example", Code::Dns, 7, None) };
        assert!(filter(&["--code", "dns"]).unwrap().matches(&nowhere));
        for arguments in [["--since", "1y"], ["--until", "0s"], ["--host", "images.example"]] {
            assert!(!filter(&arguments).unwrap().matches(&nowhere), "{arguments:?}");
        }
    }

    #[test]
    fn an_unknown_code_is_refused_with_the_closed_list() {
        let error = filter(&["--code", "dns,conect"]).unwrap_err();
        for code in Code::ALL {
            assert!(error.contains(code.as_str()), "{error}");
        }
    }

    #[test]
    fn a_time_is_a_date_or_how_long_ago() {
        let now: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        for (text, expected) in [
            ("2h", "2026-11-23T10:00:00Z"),
            ("2h ago", "2026-11-23T10:00:00Z"),
            ("1h 30m", "2026-11-23T10:30:00Z"),
            ("7d", "2026-11-16T12:00:00Z"),
            ("2026-11-23T08:00:00+01:00", "2026-11-23T07:00:00Z"),
        ] {
            assert_eq!(moment_from(text, now).unwrap().to_string(), expected, "{text}");
        }
        for text in ["", "yesterday", "2", "2026-11-23", "9999999y"] {
            assert!(moment_from(text, now).is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_that_never_was_is_refused() {
        let error = filter(&["--since", "1h", "--until", "2h"]).unwrap_err();
        assert!(error.contains("--since") && error.contains("--until"), "{error}");
        assert!(filter(&["--since", "2h", "--until", "1h"]).is_ok());
        assert!(filter(&["--host", "https://images.example/a.jpg"]).unwrap_err().contains("only the host's name"));
    }
}
