use serde_json::json;

use super::*;

fn rows() -> Rows {
    Rows { column: None, params: RequestParams::default(), max_body: 100 }
}

fn object(text: &str) -> Vec<Row> {
    rows().object("l.jsonl:1", Bytes::copy_from_slice(text.as_bytes()), None).unwrap()
}

fn one(text: &str) -> Row {
    object(text).remove(0)
}

fn shown(row: &Row) -> String {
    serde_json::to_string(&row.cells).unwrap()
}

#[test]
fn the_fields_of_an_object_are_the_columns_and_name_image_prompt_and_parameters() {
    let text = r#"{"z":1,"image":"https://e.com/a.png","prompt":"a photo of","params":{"num_beams":2},"a":null}"#;
    let row = one(text);
    assert_eq!(shown(&row), text);
    let request = row.request.unwrap();
    assert_eq!(request.id.as_deref(), Some("l.jsonl:1"));
    assert_eq!(request.prompt.as_deref(), Some("a photo of"));
    assert_eq!(request.params.num_beams, Some(2));
    let ImageRef::Http(url) = request.image else { panic!("{:?}", request.image) };
    assert_eq!(url.as_str(), "https://e.com/a.png");
}

#[test]
fn an_inline_image_is_captioned_and_not_kept() {
    let row = one(r#"{"url":"iVBORw0KGgo=","label":"x"}"#);
    assert_eq!(shown(&row), r#"{"url":null,"label":"x"}"#);
    assert!(matches!(row.request.unwrap().image, ImageRef::Base64(_)));
    let slip = format!("{{\"url\":\"*{}\"}}", "A".repeat(LONGEST_REFERENCE));
    assert_eq!(shown(&one(&slip)), r#"{"url":null}"#, "base64 with a slip");
}

#[test]
fn what_is_wrong_with_a_row_is_told_and_its_columns_are_kept() {
    for (text, code, why) in [
        (r#"{"imgae":"https://e.com/a","b":1}"#, Code::BadMessage, "none of the columns (imgae, b)"),
        (r#"{"image":7}"#, Code::BadReference, "image: expected a string"),
        (r#"{"image":null}"#, Code::BadReference, "the column image is empty"),
        (r#"{"image":"two words"}"#, Code::BadReference, "neither an address nor base64"),
        (r#"{"image":"ftp://e.com/a"}"#, Code::BadReference, "unsupported scheme"),
        (r#"{"image":"http://e.com","params":{"beams":1}}"#, Code::BadParams, "unknown field `beams`"),
    ] {
        let row = one(text);
        assert_eq!(shown(&row), text);
        let problem = row.request.unwrap_err();
        assert_eq!(problem.code, code, "{text}");
        assert!(problem.message.contains(why), "{text} gave {}", problem.message);
    }
    assert!(rows().object("x:1", Bytes::from_static(b"{\"image\":"), None).unwrap_err().why.contains("no JSON"));
}

#[test]
fn a_table_of_the_model_card_is_a_row_for_each_image() {
    let data = json!([["https://e.com/a", 1], ["https://e.com/b"], ["", 3]]);
    let table = json!({"input_data": {"columns": ["image", "n"], "index": [0, 1, 2], "data": data}});
    let rows = object(&table.to_string());
    let found: Vec<_> = rows.iter().map(|row| (row.place.as_str(), row.request.is_ok())).collect();
    assert_eq!(found, [("l.jsonl:1[0]", true), ("l.jsonl:1[1]", false), ("l.jsonl:1[2]", false)]);
    assert_eq!(shown(&rows[0]), r#"{"image":"https://e.com/a","n":1}"#);
}

#[test]
fn a_table_of_one_column_may_be_a_list_of_its_values_and_none_has_a_column_twice() {
    let flat = |columns: &[&str], data| json!({"input_data": {"columns": columns, "data": data}}).to_string();
    let both = object(&flat(&["image"], json!(["https://e.com/a", ["https://e.com/b"], 7])));
    assert_eq!(both.iter().map(|row| row.request.is_ok()).collect::<Vec<_>>(), [true, true, false]);
    assert_eq!(shown(&both[0]), r#"{"image":"https://e.com/a"}"#);
    assert!(object(&flat(&["image", "n"], json!(["https://e.com/a"])))[0].request.is_err(), "which column?");
    let twice = flat(&["image", "n", "n"], json!([["https://e.com/a", 1, 2]]));
    let bad = rows().object("l.json", twice.into(), None).unwrap_err();
    assert_eq!(bad.why, "input_data.columns: n stands there twice");
}

#[test]
fn bytes_over_the_limit_are_refused_and_a_name_beside_bytes_is_kept() {
    let cells = || Cells(vec![("image".into(), "a.png".into())]);
    let row = rows().row("p", cells(), 0, Image::Bytes(Bytes::from_static(&[1; 10])), None);
    assert_eq!(shown(&row), r#"{"image":"a.png"}"#);
    assert!(row.request.is_ok());
    let long = rows().row("p", cells(), 0, Image::Bytes(Bytes::from_static(&[1; 101])), None);
    assert_eq!(long.request.unwrap_err().code, Code::TooLarge);
}

#[test]
fn a_packed_row_has_the_bytes_of_its_file_or_an_error_and_keeps_its_columns() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let parcel = Parcel { max_bytes: 100 };
    let packed = |image: &str| one(&format!(r#"{{"image":"{image}","n":1}}"#)).packed(parcel);
    let path = file("a.png", b"abc");
    let row = packed(&path);
    assert_eq!(row.request.as_ref().unwrap().image, ImageRef::Base64(Bytes::from_static(b"YWJj")));
    assert_eq!(row.cells.get("image"), Some(&json!(path)));
    let missing = folder.path().join("missing.png").display().to_string();
    for (path, code) in [
        (missing, Code::NotFound),
        (file("empty.png", b""), Code::UnsupportedMedia),
        (file("long.png", &[0; 200]), Code::TooLarge),
        (folder.path().display().to_string(), Code::AccessDenied),
    ] {
        let row = packed(&path);
        let problem = row.request.unwrap_err();
        assert_eq!(problem.code, code, "{}", problem.message);
        assert!(problem.message.starts_with(&format!("{path}: ")), "{}", problem.message);
        assert_eq!(row.cells.get("n"), Some(&json!(1)));
    }
    let address = one(r#"{"image":"https://e.com/a.png"}"#);
    assert_eq!(address.clone().packed(parcel), address);
}
