//! `blipstream dlq show`: dead letters whole.

use std::io::{self, Write};

use anyhow::anyhow;
use bytes::Bytes;
use serde_json::Value;

use super::Common;
use super::filter::Filter;
use super::letter::{Letter, Place};
use super::reading::{Reading, Wanted, progress};
use crate::command::collect::answer::one_line;
use crate::command::{Exit, Usage, telemetry};
use crate::disposition::Code;
use crate::message::Message;

/// Longest text inside a value that is shown whole, in characters: longer ones are images.
const LONGEST: usize = 400;
/// What is shown of a longer one.
const SHOWN: usize = 60;

/// Arguments of `dlq show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  blipstream dlq show 0/17 2/4
  blipstream dlq show --id photo-4711                    reads the whole topic for it
  blipstream dlq show 0/17 --raw > value.json            the bytes of the value and nothing else

Addresses are shown as they came, with their query strings: mind who reads along. Texts of more than 400
characters, such as inline images, are cut, and it is said so. Exit code 1 if one is not found.")]
pub struct ShowArgs {
    /// The places of the dead letters, partition/offset, as `dlq ls` prints them
    #[arg(value_name = "PLACE", required_unless_present = "id", conflicts_with = "id")]
    places: Vec<Place>,
    /// All dead letters of the request with this id
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// The exact bytes of the value of one dead letter
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    common: Common,
}

/// Runs the command.
pub fn run(args: ShowArgs) -> anyhow::Result<Exit> {
    if args.raw && args.places.len() > 1 {
        return Err(Usage("--raw shows one dead letter: name one place".into()).into());
    }
    let settings = args.common.config.load()?.settings;
    telemetry::init(&telemetry::quiet(&settings.log))?;
    let filter = args.id.clone().map_or_else(Filter::default, Filter::of_id);
    let wanted = Wanted { places: args.places, filter, limit: None };
    let topic = &settings.kafka.dead_letter_topic;
    let mut reading = Reading::open(&settings.kafka, wanted, args.common.timeout, progress(!args.raw))?;
    let mut out = io::stdout().lock();
    let found = if args.raw { raw(&mut reading, &mut out)? } else { whole(&mut reading, topic, &mut out)? };
    out.flush()?;
    reading.bar.finish_and_clear();
    if reading.tell_missing(topic) {
        return Ok(Exit::Failed);
    }
    match args.id {
        Some(id) if found == 0 => Err(anyhow!("no dead letter of the id `{}` is in {topic}", one_line(&id))),
        _ => Ok(Exit::Done),
    }
}

fn raw(reading: &mut Reading, out: &mut impl Write) -> anyhow::Result<usize> {
    let Some((letter, message)) = reading.next()? else { return Ok(0) };
    // Two values in a row would be neither's exact bytes.
    if let Some((other, _)) = reading.next()? {
        let (first, second) = (letter.place, other.place);
        return Err(Usage(format!("--raw shows one dead letter, and there are more: {first}, {second}, …")).into());
    }
    out.write_all(&message.payload.unwrap_or_default())?;
    Ok(1)
}

fn whole(reading: &mut Reading, topic: &str, out: &mut impl Write) -> anyhow::Result<usize> {
    let mut found = 0;
    while let Some((letter, message)) = reading.next()? {
        if found > 0 {
            writeln!(out)?;
        }
        write(&letter, &message, topic, out)?;
        found += 1;
    }
    Ok(found)
}

fn write(letter: &Letter, message: &Message, topic: &str, out: &mut impl Write) -> io::Result<()> {
    let time = letter.time.map_or_else(|| "at an unknown time".to_owned(), |time| time.to_string());
    writeln!(out, "dead letter {} of {topic}, {time}", letter.place)?;
    writeln!(out, "id: {}", one_line(&letter.id))?;
    let code = Code::ALL.iter().find(|code| code.as_str() == letter.code);
    let meaning = code.map_or("a code that this version does not know", |code| code.meaning());
    writeln!(out, "{}: {meaning}", one_line(&letter.code))?;
    writeln!(out, "what happened: {}", one_line(&letter.message))?;
    if let Some(code) = code {
        writeln!(out, "what to do: {}", code.advice())?;
    }
    if letter.pointer {
        writeln!(
            out,
            "The value was too long for a dead letter: the request is at {}, if it still is.",
            letter.origin
        )?;
    }
    writeln!(out, "\nkey: {}", message.key.as_ref().map_or_else(|| "none".into(), readable))?;
    for (name, value) in &message.headers {
        let value = value.as_ref().map_or_else(|| "null".into(), readable);
        writeln!(out, "header {}: {value}", one_line(name))?;
    }
    match &message.payload {
        None => writeln!(out, "value: none"),
        Some(value) => writeln!(out, "value, {} bytes:\n{}", value.len(), pretty(value)),
    }
}

fn readable(bytes: &Bytes) -> String {
    shortened(&one_line(&String::from_utf8_lossy(bytes)))
}

/// The value for a person: JSON in its lines, long texts in it cut. What is no JSON is one text.
fn pretty(value: &Bytes) -> String {
    let Ok(mut json) = serde_json::from_slice::<Value>(value) else { return readable(value) };
    shorten(&mut json);
    // JSON escapes the control characters of ASCII; the others move a cursor, too.
    let text = format!("{json:#}");
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

fn shorten(value: &mut Value) {
    match value {
        Value::String(text) => *text = shortened(text),
        Value::Array(values) => values.iter_mut().for_each(shorten),
        Value::Object(fields) => fields.values_mut().for_each(shorten),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn shortened(text: &str) -> String {
    let length = text.chars().count();
    if length <= LONGEST {
        return text.to_owned();
    }
    let head: String = text.chars().take(SHOWN).collect();
    format!("{head}… (cut: {length} characters; --raw has the whole value)")
}

#[cfg(test)]
mod tests {
    use super::super::letter::tests::dead;
    use super::*;

    fn shown(message: &Message) -> String {
        let mut out = Vec::new();
        write(&Letter::read(message).unwrap(), message, "dlq", &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_dead_letter_is_shown_whole_with_what_to_do() {
        let mut message = dead(r#"{"id":"cat","image":"https://e.com/a.jpg?sig=1"}"#, Code::NotFound, 7, None);
        message.key = Some("album\u{1b}[2J".into());
        message.headers.push(("trace".into(), None));
        let text = shown(&message);
        for part in [
            "dead letter 1/7 of dlq, 2026-09-21T14:13:27Z\n",
            "id: cat\n",
            "not_found: 404 or 410, or no such file\n",
            "what happened: it failed\n",
            "what to do: Replay once the image is there",
            "key: album [2J\n",
            "header blipstream-origin: requests/1/7\n",
            "header blipstream-worker: worker-1\n",
            "header trace: null\n",
            "value, 48 bytes:\n{\n  \"id\": \"cat\",\n  \"image\": \"https://e.com/a.jpg?sig=1\"\n}\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn inline_data_is_cut_and_it_is_said_so() {
        let image = "A".repeat(5000);
        for value in [format!(r#"{{"rows":[{{"image":"{image}"}}]}}"#), image.clone()] {
            let text = shown(&dead(&value, Code::Decode, 7, None));
            assert!(text.contains(&format!("{}… (cut: 5000 characters", "A".repeat(SHOWN))), "{text}");
            assert!(text.len() < 2000, "{text}");
        }
    }

    #[test]
    fn a_pointer_and_an_unknown_code_are_named() {
        let value = r#"{"blipstream_pointer":{"length":9,"sha256":"0"},"origin":{}}"#;
        let mut message = dead(value, Code::TooLarge, 7, None);
        let code = message.headers.iter_mut().find(|(name, _)| name == "blipstream-error-code").unwrap();
        code.1 = Some("of_tomorrow".into());
        let text = shown(&message);
        assert!(text.contains("of_tomorrow: a code that this version does not know\n"), "{text}");
        assert!(text.contains("too long for a dead letter: the request is at requests/1/7"), "{text}");
    }
}
