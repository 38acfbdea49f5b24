//! What a dead letter promises.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::disposition::{Code, Stage};

const LIMIT: usize = 1 << 20;

fn message(key: Option<&[u8]>, payload: &[u8], headers: &[(&str, &str)]) -> Message {
    Message {
        key: key.map(Bytes::copy_from_slice),
        payload: Some(Bytes::copy_from_slice(payload)),
        headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
        ..Message::empty("blipstream.requests", 3, 1842)
    }
}

fn failure(text: &str) -> Failure {
    Failure::with_message(Stage::Fetch, Code::Timeout, text.into()).after(4, "2026-11-23T08:00:00Z".parse().unwrap())
}

fn letter(message: &Message, text: &str, max_bytes: usize) -> DeadLetter {
    DeadLetter::new(message, &message.origin(), None, &failure(text), "w1", max_bytes)
}

/// The letter as the message that a replay would read.
fn consumed(letter: &DeadLetter) -> Message {
    Message { headers: letter.headers.clone(), payload: letter.value.clone(), ..message(None, b"", &[]) }
}

#[test]
fn keeps_the_message_as_it_came_and_says_what_happened() {
    let message = message(Some(b"k"), b"\x00not json", &[("traceparent", "00-1"), ("twice", "a"), ("twice", "b")]);
    let letter = letter(&message, "no answer within 30 s", LIMIT);
    assert_eq!((letter.key.as_deref(), letter.value.as_deref()), (Some(&b"k"[..]), Some(&b"\x00not json"[..])));
    let headers: Vec<(&str, &str)> =
        letter.headers.iter().map(|(n, v)| (n.as_str(), std::str::from_utf8(v.as_ref().unwrap()).unwrap())).collect();
    assert_eq!(
        headers,
        [
            ("traceparent", "00-1"),
            ("twice", "a"),
            ("twice", "b"),
            ("blipstream-origin", "blipstream.requests/3/1842"),
            ("blipstream-error-code", "timeout"),
            ("blipstream-error-message", "no answer within 30 s"),
            ("blipstream-stage", "fetch"),
            ("blipstream-attempts", "4"),
            ("blipstream-first-failed-at", "2026-11-23T08:00:00Z"),
            ("blipstream-worker", "w1"),
        ]
    );
}

#[test]
fn a_second_life_keeps_origin_and_first_failure_and_adds_up_the_attempts() {
    let first = letter(&message(None, b"x", &[("blipstream-other", "kept")]), "first", LIMIT);
    let again = Message { offset: 9, topic: Arc::from("blipstream.dlq"), ..consumed(&first) };
    let later = failure("second").after(2, "2026-12-01T00:00:00Z".parse().unwrap());
    let second = consumed(&DeadLetter::new(&again, &again.origin(), None, &later, "w2", LIMIT));
    assert_eq!(second.header(ORIGIN_HEADER), Some("blipstream.requests/3/1842"));
    assert_eq!(second.header(FIRST_FAILED_AT_HEADER), Some("2026-11-23T08:00:00Z"));
    assert_eq!(second.header(ATTEMPTS_HEADER), Some("6"));
    assert_eq!(second.header(ERROR_MESSAGE_HEADER), Some("second"));
    assert_eq!(second.header("blipstream-other"), Some("kept"));
    let mut names: Vec<_> = second.headers.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), second.headers.len(), "no header is repeated");
}

#[test]
fn a_replay_keeps_who_it_is_and_its_earlier_lives_and_loses_the_error() {
    let first = consumed(&letter(&message(None, b"x", &[("traceparent", "00-1"), ("twice", "a")]), "first", LIMIT));
    let replayed = Message { headers: replay_headers(&first), ..first };
    let names: Vec<_> = replayed.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["traceparent", "twice", ORIGIN_HEADER, ATTEMPTS_HEADER, FIRST_FAILED_AT_HEADER]);
    // The tries of both lives, neither forgotten nor counted twice.
    let second = consumed(&letter(&replayed, "second", LIMIT));
    assert_eq!((replayed.header(ATTEMPTS_HEADER), second.header(ATTEMPTS_HEADER)), (Some("4"), Some("8")));
    assert_eq!(second.origin(), replayed.origin());
}

#[test]
fn unreadable_headers_of_an_earlier_life_count_as_none() {
    let message =
        message(None, b"x", &[(ATTEMPTS_HEADER, "many"), (FIRST_FAILED_AT_HEADER, "once"), (ORIGIN_HEADER, "?")]);
    let letter = consumed(&letter(&message, "", LIMIT));
    assert_eq!(letter.header(ATTEMPTS_HEADER), Some("4"));
    assert_eq!(letter.header(FIRST_FAILED_AT_HEADER), Some("2026-11-23T08:00:00Z"));
    assert_eq!(letter.header(ORIGIN_HEADER), Some("blipstream.requests/3/1842"));
}

#[test]
fn one_row_of_several_is_rewritten_with_its_origin() {
    let message = message(Some(b"k"), b"a table", &[]);
    let row = Bytes::from_static(br#"{"image":"x"}"#);
    let origin = message.origin_of(Some(2));
    let letter = DeadLetter::new(&message, &origin, Some(row.clone()), &failure(""), "w1", LIMIT);
    assert_eq!(letter.value, Some(row));
    assert_eq!(consumed(&letter).header(ORIGIN_HEADER), Some("blipstream.requests/3/1842/2"));
}

#[test]
fn the_error_text_has_no_credentials_and_no_control_characters() {
    let text = "GET https://user:S3CRET@h.example/p?sig=T0KEN\nfailed\u{0}";
    let letter = consumed(&letter(&message(None, b"x", &[]), text, LIMIT));
    assert_eq!(letter.header(ERROR_MESSAGE_HEADER), Some("GET https://…@h.example/p?… failed "));
}

#[test]
fn an_over_long_value_becomes_a_pointer_to_it() {
    let value = vec![b'x'; 10_000];
    let message = message(Some(b"k"), &value, &[("a", "b")]);
    let letter = DeadLetter::new(&message, &message.origin_of(Some(5)), Some(value.into()), &failure(""), "w1", 4096);
    assert!(is_pointer(letter.value.as_ref().unwrap()) && !is_pointer(br#"{"image":"x"}"#));
    let pointer: Value = serde_json::from_slice(letter.value.as_ref().unwrap()).unwrap();
    // SHA-256 of ten thousand times the letter x, from sha256sum.
    let sha256 = "e4ee97ec252749d2096447e849628d0d7734f51700416eefbb33574bf0b3ee75";
    assert_eq!(
        pointer,
        json!({
            "blipstream_pointer": {"length": 10_000, "sha256": sha256},
            "origin": {"topic": "blipstream.requests", "partition": 3, "offset": 1842}, "index": 5,
        })
    );
    assert_eq!(letter.key.as_deref(), Some(&b"k"[..]));
    assert_eq!(letter.headers[0], header("a", "b"));
}

#[test]
fn over_long_headers_are_dropped_from_the_last_one_on_and_counted() {
    let long = "h".repeat(1500);
    let message = message(Some(b"k"), b"v", &[("first", &long), ("second", &long), ("third", &long), ("fourth", "")]);
    let letter = letter(&message, "", 4096);
    let read = consumed(&letter);
    assert_eq!(letter.headers[0].0, "first");
    assert_eq!(read.header("second"), Some(long.as_str()));
    assert_eq!((read.header("third"), read.header("fourth")), (None, None));
    assert_eq!(read.header(DROPPED_HEADERS_HEADER), Some("2"));
    assert_eq!((letter.key.as_deref(), letter.value.as_deref()), (Some(&b"k"[..]), Some(&b"v"[..])));
}

#[test]
fn an_over_long_key_is_dropped_last_of_all_so_that_the_record_can_be_sent() {
    let message = message(Some(&[b'k'; 5000]), b"v", &[("a", "b")]);
    let letter = letter(&message, "", 4096);
    assert_eq!(letter.key, None);
    assert_eq!(consumed(&letter).header(DROPPED_KEY_HEADER), Some("5000"));
    assert!(letter.size() <= 4096);
}

proptest! {
    #[test]
    fn no_dead_letter_is_over_its_limit(
        key in proptest::option::of(0usize..6000),
        payload in 0usize..20_000,
        headers in proptest::collection::vec((0usize..40, 0usize..3000), 0..6),
        max_bytes in 4096usize..30_000,
        text in ".{0,2000}",
    ) {
        let mut message = message(key.map(|n| vec![b'k'; n]).as_deref(), &vec![b'v'; payload], &[]);
        message.headers = headers.iter().map(|(n, v)| header(&"n".repeat(*n), &"v".repeat(*v))).collect();
        let whole = letter(&message, &text, usize::MAX);
        let letter = letter(&message, &text, max_bytes);
        prop_assert!(letter.size() <= max_bytes);
        prop_assert!(consumed(&letter).header(ERROR_MESSAGE_HEADER).unwrap().len() <= MAX_MESSAGE_BYTES);
        if whole.size() <= max_bytes {
            prop_assert_eq!((letter.key, letter.value, letter.headers), (whole.key, whole.value, whole.headers));
        }
    }
}
