//! What the parser promises: four forms, one request; errors that name their place; no panic on any bytes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::message::Headers;

const ADDRESS: &str = "https://h.example/p.jpg";

fn message_with(payload: impl Into<Bytes>, headers: &[(&str, &str)]) -> Message {
    let headers: Headers =
        headers.iter().map(|(name, value)| ((*name).to_owned(), Some(Bytes::from((*value).to_owned())))).collect();
    Message { payload: Some(payload.into()), headers, ..Message::empty("blipstream.requests", 0, 7) }
}

fn rows(payload: impl Into<Bytes>) -> Result<Vec<ParsedRow>, ParseError> {
    parse(&message_with(payload, &[]), 100)
}

fn one(payload: impl Into<Bytes>) -> Result<Request, ParseError> {
    let mut rows = rows(payload)?;
    assert_eq!(rows.len(), 1);
    rows.remove(0).map_err(|(error, _)| error)
}

fn address() -> ImageRef {
    ImageRef::Http(Url::parse(ADDRESS).unwrap())
}

fn full() -> Value {
    json!({
        "image": ADDRESS, "id": "a1", "prompt": "a photo of", "deadline": "2030-01-31T12:00:00Z",
        "params": {"max_new_tokens": 30, "num_beams": 3, "length_penalty": 1.1}, "meta": {"album": 12},
        "text": ["a lake", "for sale: 3 boats"], "tasks": ["caption", "filter", "answer", "embed"],
        "questions": "how many boats?",
    })
}

fn full_request() -> Request {
    Request {
        id: Some("a1".into()),
        image: address(),
        prompt: Some("a photo of".into()),
        params: RequestParams {
            max_new_tokens: Some(30),
            num_beams: Some(3),
            length_penalty: Some(1.1),
            ..RequestParams::default()
        },
        texts: vec!["a lake".into(), "for sale: 3 boats".into()],
        questions: vec!["how many boats?".into()],
        tasks: Tasks { caption: true, filter: true, answer: true, embed: true },
        deadline: Some("2030-01-31T12:00:00Z".parse().unwrap()),
        meta: Map::from_iter([("album".to_owned(), json!(12))]),
    }
}

#[test]
fn every_form_gives_the_same_request() {
    let table = json!({"input_data": {
        "columns": ["image", "id", "prompt", "deadline", "params", "album", "text", "questions", "tasks"],
        "index": [0],
        "data": [[ADDRESS, "a1", "a photo of", "2030-01-31T12:00:00Z", {"max_new_tokens": 30, "num_beams": 3, "length_penalty": 1.1}, 12,
            ["a lake", "for sale: 3 boats"], ["how many boats?"], ["embed", "answer", "filter", "caption"]]],
    }});
    for (form, value) in [
        ("native", full()),
        ("table", table.clone()),
        ("event", json!({"specversion": "1.0", "id": "e1", "source": "s", "type": "t", "data": full()})),
        ("table in an event", json!({"specversion": "1.0", "id": "e1", "data": table})),
        (
            "event in base64",
            json!({"specversion": "1.0", "id": "e1", "data_base64": STANDARD.encode(full().to_string())}),
        ),
    ] {
        assert_eq!(one(value.to_string()), Ok(full_request()), "{form}");
    }
    let binary = message_with(full().to_string(), &[("ce_specversion", "1.0"), ("ce_id", "e1")]);
    assert_eq!(parse(&binary, 1), Ok(vec![Ok(full_request())]), "event in binary mode");
}

#[test]
fn a_bare_reference_is_a_request_raw_or_as_json_or_in_an_event() {
    let expected = Request::of(address());
    assert_eq!(one(ADDRESS), Ok(expected.clone()));
    assert_eq!(one(format!(" {ADDRESS}\n")), Ok(expected.clone()));
    assert_eq!(one(format!("\u{feff}\"{ADDRESS}\"")), Ok(expected.clone()));
    let with_id = Request { id: Some("e1".into()), ..expected };
    assert_eq!(one(json!({"specversion": "1.0", "id": "e1", "data": ADDRESS}).to_string()), Ok(with_id.clone()));
    let encoded = STANDARD.encode(ADDRESS);
    assert_eq!(one(json!({"specversion": "1.0", "id": "e1", "data_base64": encoded}).to_string()), Ok(with_id));
}

#[test]
fn the_id_of_an_event_serves_a_single_request_and_never_a_row_of_a_table() {
    let single = json!({"image": ADDRESS});
    let table = json!({"input_data": {"columns": ["image"], "data": [[ADDRESS]]}});
    let event = |data: &Value| json!({"specversion": "1.0", "id": "e1", "data": data}).to_string();
    let headers = [("ce_specversion", "1.0"), ("ce_id", "e1")];
    let binary = |data: &Value| parse(&message_with(data.to_string(), &headers), 1).unwrap().remove(0).unwrap();
    assert_eq!(one(event(&single)).unwrap().id.as_deref(), Some("e1"));
    assert_eq!(binary(&single).id.as_deref(), Some("e1"));
    assert_eq!(one(event(&table)).unwrap().id, None);
    assert_eq!(binary(&table).id, None);
    let replayed = [headers[0], headers[1], ("blipstream-origin", "blipstream.requests/0/3/1")];
    let replayed = parse(&message_with(single.to_string(), &replayed), 1).unwrap().remove(0).unwrap();
    assert_eq!(replayed.id, None, "a row of a table, dead-lettered and replayed");
}

#[test]
fn a_table_fans_out_in_order_and_a_bad_row_fails_alone_with_its_native_form() {
    let table = json!({"input_data": {"columns": ["image", "album", "id"], "index": [5, 6, 7, 8], "data": [
        [ADDRESS, null, "a"], ["hdfs://bucket/key", 3, null], [9, null, "c"], [ADDRESS, 4, null],
    ]}});
    let rows = rows(table.to_string()).unwrap();
    assert_eq!(rows[0], Ok(Request { id: Some("a".into()), ..Request::of(address()) }));
    let (error, native) = rows[1].clone().unwrap_err();
    assert_eq!(error.code(), Code::BadReference);
    assert!(error.to_string().starts_with("input_data.data[1].image: `hdfs://bucket/key`"), "{error}");
    let native: Value = serde_json::from_slice(&native.unwrap()).unwrap();
    assert_eq!(native, json!({"image": "hdfs://bucket/key", "meta": {"album": 3}}));
    let (error, _) = rows[2].clone().unwrap_err();
    assert_eq!(error, ParseError::Message("input_data.data[2].image: expected a string, found a number".into()));
    assert_eq!(rows[3].clone().unwrap().meta["album"], 4);
    assert_eq!(rows.len(), 4);
}

#[test]
fn an_empty_table_asks_for_nothing() {
    assert_eq!(rows(r#"{"input_data":{"columns":["image"],"index":[],"data":[]},"params":{}}"#), Ok(Vec::new()));
}

#[test]
fn a_null_field_is_as_good_as_absent_and_an_unknown_one_is_ignored() {
    let text = format!(
        r#"{{"image":"{ADDRESS}","id":null,"prompt":null,"params":{{"max_new_tokens":null}},"deadline":null,"meta":null,"new":1}}"#
    );
    assert_eq!(one(text), Ok(Request::of(address())));
}

#[test]
fn a_wrong_message_is_refused_by_code_and_place() {
    let table = |body: &str| format!(r#"{{"input_data":{body}}}"#);
    let with = |field: &str| format!(r#"{{"image":"{ADDRESS}",{field}}}"#);
    let long = format!(r#""prompt":"{}""#, "x".repeat(MAX_PROMPT_BYTES + 1));
    for (payload, code, why) in [
        (String::new(), Code::BadMessage, "empty"),
        ("{".into(), Code::BadMessage, "not valid JSON"),
        ("{} {}".into(), Code::BadMessage, "trailing characters"),
        ("[1]".into(), Code::BadMessage, "found a list"),
        ("null".into(), Code::BadMessage, "found `null`"),
        ("12345678".into(), Code::BadMessage, "found `12345678`"),
        ("hello world".into(), Code::BadReference, "`hello world` is neither an address nor base64"),
        ("{}".into(), Code::BadMessage, "missing `image` (or `input_data`"),
        (r#"{"imge":"x"}"#.into(), Code::BadMessage, "did you mean it by `imge`"),
        (r#"{"image":7}"#.into(), Code::BadMessage, "image: expected a string, found a number"),
        (r#"{"image":"x","input_data":{}}"#.into(), Code::BadMessage, "both `image` and `input_data`"),
        (with(r#""id":7"#), Code::BadMessage, "id: expected a string, found a number"),
        (with(r#""meta":[]"#), Code::BadMessage, "meta: expected an object, found a list"),
        (with(r#""deadline":"soon""#), Code::BadMessage, "deadline: `soon` is no RFC 3339 time"),
        (with(r#""prompt":true"#), Code::BadParams, "prompt: expected a string, found true or false"),
        (with(&long), Code::BadParams, "prompt: 4097 bytes; at most 4096"),
        (with(r#""params":"x""#), Code::BadParams, "params: expected an object, found a string"),
        (with(r#""params":{"max_tokens":1}"#), Code::BadParams, "`max_tokens`; did you mean `max_new_tokens`?"),
        (with(r#""params":{"zzz":1}"#), Code::BadParams, "Known are max_new_tokens, min_new_tokens"),
        (
            with(r#""params":{"max_new_tokens":-1}"#),
            Code::BadParams,
            "params.max_new_tokens: expected a whole number from 0 on, found -1",
        ),
        (with(r#""params":{"max_new_tokens":1.5}"#), Code::BadParams, "found 1.5"),
        (with(r#""params":{"min_new_tokens":"3"}"#), Code::BadParams, "found a string"),
        (with(r#""params":{"min_new_tokens":99999999999999999999}"#), Code::BadParams, "found 1e+20"),
        (with(r#""params":{"seed":-1}"#), Code::BadParams, "params.seed: expected a whole number from 0 on, found -1"),
        (with(r#""params":{"top_p":"0.9"}"#), Code::BadParams, "params.top_p: expected a number, found a string"),
        (with(r#""params":{"do_sample":1}"#), Code::BadParams, "params.do_sample: expected true or false, found 1"),
        (with(r#""tasks":"filter""#), Code::BadParams, "tasks: expected a list of names, found a string"),
        (with(r#""tasks":[]"#), Code::BadParams, "tasks: the list is empty; known are caption, filter, answer, embed"),
        (
            with(r#""tasks":["caption","filtre"]"#),
            Code::BadParams,
            "tasks[1]: unknown task `filtre` (did you mean `filter`?)",
        ),
        (with(r#""tasks":[1]"#), Code::BadParams, "tasks[0]: expected a name, found a number"),
        (with(r#""tasks":["filter"]"#), Code::BadParams, "text: missing; the task `filter` without `caption`"),
        (with(r#""text":"a""#), Code::BadParams, "text: has no effect without the tasks `filter` or `embed`"),
        (with(r#""text":7,"tasks":["filter"]"#), Code::BadParams, "text: expected a string or a list of them"),
        (with(r#""text":["a",7],"tasks":["filter"]"#), Code::BadParams, "text[1]: expected a string, found a number"),
        (
            with(r#""text":"a","tasks":["filter"],"prompt":"b""#),
            Code::BadParams,
            "prompt: has no effect without the task `caption`",
        ),
        (
            with(r#""text":"a","tasks":["filter"],"params":{"seed":1}"#),
            Code::BadParams,
            "params: has no effect without the tasks `caption` or `answer`",
        ),
        (with(r#""tasks":["answer"]"#), Code::BadParams, "questions: missing; the task `answer` answers them"),
        (with(r#""questions":"a""#), Code::BadParams, "questions: has no effect without the task `answer`"),
        (
            with(r#""questions":["a",7],"tasks":["answer"]"#),
            Code::BadParams,
            "questions[1]: expected a string, found a number",
        ),
        (
            with(&format!(r#""questions":{:?},"tasks":["answer"]"#, ["a"; MAX_TEXTS + 1])),
            Code::BadParams,
            "questions: 65 questions; at most 64",
        ),
        (
            with(&format!(r#""questions":["a","{}"],"tasks":["answer"]"#, "x".repeat(MAX_PROMPT_BYTES + 1))),
            Code::BadParams,
            "questions[1]: 4097 bytes; at most 4096",
        ),
        (
            with(r#""questions":"a","tasks":["answer"],"prompt":"b""#),
            Code::BadParams,
            "prompt: has no effect without the task `caption`",
        ),
        (
            with(r#""questions":"a","tasks":["answer"],"params":{"num_return_sequences":2}"#),
            Code::BadParams,
            "params.num_return_sequences: has no effect without the task `caption`",
        ),
        (table("[]"), Code::BadMessage, "input_data: expected an object, found a list"),
        (table(r#"{"data":[]}"#), Code::BadMessage, "input_data.columns: missing"),
        (table(r#"{"columns":["image"]}"#), Code::BadMessage, "input_data.data: missing"),
        (table(r#"{"columns":["image",1],"data":[]}"#), Code::BadMessage, "input_data.columns[1]: expected a string"),
        (table(r#"{"columns":["image","image"],"data":[]}"#), Code::BadMessage, "`image` stands there twice"),
        (
            table(r#"{"columns":["images"],"data":[]}"#),
            Code::BadMessage,
            "`image` is missing; did you mean it by `images`",
        ),
        (table(r#"{"columns":["image"],"data":[7]}"#), Code::BadMessage, "input_data.data[0]: expected a list"),
        (table(r#"{"columns":["image","id"],"data":["x"]}"#), Code::BadMessage, "input_data.data[0]: expected a list"),
        (
            table(r#"{"columns":["image"],"data":[["x"],[]]}"#),
            Code::BadMessage,
            "input_data.data[1]: 0 values for 1 columns",
        ),
        (
            table(r#"{"columns":["image"],"index":[0],"data":[]}"#),
            Code::BadMessage,
            "input_data.index: 1 values for 0 rows",
        ),
        (
            r#"{"input_data":{"columns":["image"],"data":[]},"prompt":"x"}"#.into(),
            Code::BadParams,
            "prompt: has no effect beside",
        ),
        (r#"{"specversion":"1.0","id":"x"}"#.into(), Code::BadMessage, "neither `data` nor `data_base64`"),
        (r#"{"specversion":"1.0","id":1,"data":{}}"#.into(), Code::BadMessage, "id: expected a string"),
        (
            r#"{"specversion":"1.0","data":{},"data_base64":"e30="}"#.into(),
            Code::BadMessage,
            "both `data` and `data_base64`",
        ),
        (r#"{"specversion":"1.0","data_base64":"*"}"#.into(), Code::BadMessage, "data_base64: not base64"),
        (r#"{"specversion":"1.0","data_base64":"/w=="}"#.into(), Code::BadMessage, "data_base64: neither JSON nor"),
        (
            r#"{"specversion":"1.0","data":7}"#.into(),
            Code::BadMessage,
            "data: expected an object or an image reference",
        ),
        (r#"{"specversion":"1.0","data":{"image":7}}"#.into(), Code::BadMessage, "data.image: expected a string"),
        (
            r#"{"specversion":"1.0","data":{"specversion":"1.0","data":"x"}}"#.into(),
            Code::BadMessage,
            "an event inside an event",
        ),
    ] {
        let error = one(payload.clone()).unwrap_err();
        assert!(error.to_string().contains(why), "{payload} gave: {error}");
        assert_eq!(error.code(), code, "{payload} gave: {error}");
    }
    assert!(one(vec![0xff, 0xd8, 0xff]).unwrap_err().to_string().contains("not UTF-8 from byte 0 on"));
}

#[test]
fn more_rows_than_the_limit_are_refused_and_as_many_are_not() {
    let table = |rows: usize| json!({"input_data": {"columns": ["image"], "data": vec![[ADDRESS]; rows]}}).to_string();
    assert_eq!(parse(&message_with(table(3), &[]), 3).unwrap().len(), 3);
    let error = parse(&message_with(table(4), &[]), 3).unwrap_err();
    assert_eq!(error.to_string(), "input_data.data: 4 rows; at most 3 are allowed in one message");
}

#[test]
fn inline_images_are_slices_of_the_payload_in_every_form_that_needs_no_unescaping() {
    let image = "iVBORw0KGgo=";
    for payload in [
        image.to_owned(),
        format!("\"{image}\""),
        format!(r#"{{"image":"{image}"}}"#),
        format!(r#"{{"image":"data:image/png;base64,{image}"}}"#),
        format!(r#"{{"input_data":{{"columns":["image"],"data":[["{image}"]]}}}}"#),
        format!(r#"{{"specversion":"1.0","data":{{"image":"{image}"}}}}"#),
    ] {
        let message = message_with(payload, &[]);
        let request = parse(&message, 1).unwrap().remove(0).unwrap();
        let ImageRef::Base64(slice) = request.image else { panic!("not base64") };
        assert_eq!(slice, image);
        assert!(message.payload.as_ref().unwrap().as_ptr_range().contains(&slice.as_ptr()));
    }
}

#[test]
fn base64_with_escaped_line_breaks_is_joined() {
    let request = one(r#"{"input_data":{"columns":["image"],"data":[["iVBO\nRw0K\nGgo=\n"]]}}"#).unwrap();
    assert_eq!(request.image, ImageRef::Base64(Bytes::from_static(b"iVBORw0KGgo=")));
}

#[test]
fn the_names_of_params_are_those_of_the_struct() {
    let all = RequestParams {
        max_new_tokens: Some(1),
        min_new_tokens: Some(1),
        repetition_penalty: Some(1.0),
        num_beams: Some(1),
        length_penalty: Some(1.0),
        do_sample: Some(true),
        temperature: Some(1.0),
        top_k: Some(1),
        top_p: Some(1.0),
        seed: Some(1),
        num_return_sequences: Some(1),
    };
    let names: Vec<_> = serde_json::to_value(&all).unwrap().as_object().unwrap().keys().cloned().collect();
    let mut known = native::PARAMS;
    known.sort_unstable();
    assert_eq!(names, known);
}

fn any_image() -> impl Strategy<Value = ImageRef> {
    prop_oneof![
        "https?://([a-z]{1,8}(:[a-z]{0,3})?@)?[a-z]{1,10}\\.example(:[1-9][0-9]{1,3})?/[a-zA-Z0-9%20./é ]{0,20}(\\?[a-z=&]{0,10})?"
            .prop_filter_map("an address", |text| Url::parse(&text).ok().map(ImageRef::Http)),
        "(/[a-zA-Z0-9_é?#% ]{1,10}){1,4}".prop_map(|path| ImageRef::File(path.into())),
        "([A-Za-z0-9+/]{4}){1,10}(|[A-Z]{2}==|[A-Z]{3}=)".prop_map(|text| ImageRef::Base64(text.into())),
        "([A-Za-z0-9_-]{4}){1,10}(|[A-Z]{2}|[A-Z]{3})".prop_map(|text| ImageRef::Base64(text.into())),
        "[a-zA-Z0-9%,;:+é]{1,30}".prop_map(|text| ImageRef::Percent(text.into())),
    ]
}

prop_compose! {
    fn any_params()(
        max_new_tokens in proptest::option::of(any::<usize>()),
        num_beams in proptest::option::of(any::<usize>()),
        length_penalty in proptest::option::of(proptest::num::f64::NORMAL),
        do_sample in proptest::option::of(any::<bool>()),
        top_p in proptest::option::of(0.0..1.0),
        seed in proptest::option::of(any::<u64>()),
    ) -> RequestParams {
        RequestParams { max_new_tokens, num_beams, length_penalty, do_sample, top_p, seed, ..RequestParams::default() }
    }
}

/// Texts, questions and tasks that go together.
fn any_tasks() -> impl Strategy<Value = (Vec<String>, Vec<String>, Tasks)> {
    let texts = |least: usize| proptest::collection::vec("[a-zé \"]{0,9}[a-z]", least..4);
    any::<[bool; 4]>().prop_flat_map(move |[caption, filter, answer, embed]| {
        let tasks = Tasks { caption: caption || !(filter || answer || embed), filter, answer, embed };
        let least = usize::from(filter && !tasks.caption);
        let found = if filter || embed { texts(least).boxed() } else { Just(Vec::new()).boxed() };
        let questions = if answer { texts(1).boxed() } else { Just(Vec::new()).boxed() };
        (found, questions, Just(tasks))
    })
}

prop_compose! {
    fn any_request()(
        image in any_image(),
        id in proptest::option::of(".{0,20}"),
        prompt in proptest::option::of(".{0,40}"),
        params in any_params(),
        asked in any_tasks(),
        deadline in proptest::option::of((-60_000_000_000_000i64..200_000_000_000_000).prop_map(|ms| Timestamp::from_millisecond(ms).unwrap())),
        meta in proptest::collection::btree_map("[a-z\"\\\\]{1,6}", any_meta(), 0..4),
    ) -> Request {
        let meta = meta.into_iter().collect();
        let (texts, questions, tasks) = asked;
        // They would have no effect.
        let prompt = prompt.filter(|_| tasks.caption);
        let params = if tasks.caption || tasks.answer { params } else { RequestParams::default() };
        Request { id, image, prompt, params, texts, questions, tasks, deadline, meta }
    }
}

fn any_meta() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,10}".prop_map(Value::from),
        Just(json!({"deep": [1, {"er": null}]})),
    ]
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![Just("image".to_owned()), Just(ADDRESS.to_owned()), Just("iVBORw0K".to_owned()), ".{0,12}".boxed()]
            .prop_map(Value::from),
    ];
    let names = proptest::sample::select(vec![
        "image",
        "input_data",
        "columns",
        "index",
        "data",
        "id",
        "prompt",
        "params",
        "deadline",
        "meta",
        "specversion",
        "data_base64",
        "max_new_tokens",
        "other",
    ]);
    leaf.prop_recursive(5, 48, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::btree_map(names.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Like `any_json`, but shaped so that most of it gets past the first check.
fn nearly_a_message() -> impl Strategy<Value = Value> {
    prop_oneof![
        any_json(),
        (any_json(), any_json()).prop_map(|(image, params)| json!({"image": image, "params": params})),
        (any_json(), any_json())
            .prop_map(|(a, b)| json!({"input_data": {"columns": ["image", "x"], "data": [[a, b]]}})),
        any_json().prop_map(|data| json!({"specversion": "1.0", "data": data})),
        any_json().prop_map(|data| json!({"specversion": "1.0", "data_base64": STANDARD.encode(data.to_string())})),
    ]
}

proptest! {
    #[test]
    fn a_request_survives_being_written_and_read(request in any_request()) {
        prop_assert_eq!(one(request.to_native()), Ok(request));
    }

    #[test]
    fn what_was_read_once_survives_being_written_and_read(json in nearly_a_message()) {
        for request in rows(json.to_string()).unwrap_or_default().into_iter().flatten() {
            // serde_json reads a number back to within its last digit, so numbers in `meta` are left out of this.
            let request = Request { meta: Map::new(), ..request };
            prop_assert_eq!(one(request.to_native()), Ok(request));
        }
    }

    #[test]
    fn the_native_form_of_a_failed_row_is_json(json in nearly_a_message()) {
        for (error, native) in rows(json.to_string()).unwrap_or_default().into_iter().filter_map(Result::err) {
            prop_assert!(native.is_some_and(|native| serde_json::from_slice::<Value>(&native).unwrap().is_object()), "{}", error);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64), max_rows in 0usize..4) {
        let _ = parse(&message_with(bytes, &[("ce_specversion", "1.0"), ("ce_id", "x")]), max_rows);
    }

    #[test]
    fn no_json_makes_it_panic_and_no_error_is_long(json in nearly_a_message()) {
        match rows(json.to_string()) {
            Ok(rows) => for (error, _) in rows.into_iter().filter_map(Result::err) {
                prop_assert!(error.to_string().len() < 700);
            },
            Err(error) => prop_assert!(error.to_string().len() < 700),
        }
    }

    #[test]
    fn a_damaged_message_never_panics(request in any_request(), at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = request.to_native().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = rows(bytes.clone());
        bytes.truncate(at);
        let _ = rows(bytes);
    }
}
