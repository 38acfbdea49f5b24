use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::command::submit::request::Parcel;
use crate::message::RequestParams;

fn inputs() -> Inputs {
    let builder = Builder {
        prompt: None,
        params: RequestParams::default(),
        filter: false,
        text_column: None,
        meta: Map::new(),
        deadline: None,
        keyed: true,
        as_file_url: false,
        parcel: Parcel { max_bytes: 10_000 },
        max_rows: 5,
    };
    Inputs { builder, column: None }
}

fn read(inputs: &Inputs, argument: &str) -> Vec<Result<Item, Bad>> {
    let mut all = Vec::new();
    let flow = inputs.read(&[argument.to_owned()], &mut |item| {
        all.push(item);
        ControlFlow::Continue(())
    });
    assert_eq!(flow, ControlFlow::Continue(()));
    all
}

/// Writes a file into a folder and reads it; places are given without the folder.
fn read_file(inputs: &Inputs, folder: &TempDir, name: &str, text: &[u8]) -> Vec<Result<Item, Bad>> {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    let prefix = format!("{}/", folder.path().display());
    let mut all = read(inputs, path.to_str().unwrap());
    for item in &mut all {
        let place = item.as_mut().map_or_else(|bad| &mut bad.place, |item| &mut item.place);
        *place = place.strip_prefix(&prefix).unwrap().to_owned();
    }
    all
}

fn value(item: &Result<Item, Bad>) -> Value {
    serde_json::from_slice(&item.as_ref().unwrap().value).unwrap()
}

fn why(item: &Result<Item, Bad>) -> &str {
    &item.as_ref().unwrap_err().why
}

#[test]
fn an_address_goes_as_it_is_without_a_key() {
    let all = read(&inputs(), "https://example.com/a.jpg?size=big");
    assert_eq!(value(&all[0]), json!({"image": "https://example.com/a.jpg?size=big"}));
    assert_eq!(all[0].as_ref().unwrap().key, None);
}

#[test]
fn a_local_image_travels_inline_under_its_name() {
    let folder = TempDir::new().unwrap();
    let all = read_file(&inputs(), &folder, "cat.png", b"not decoded here");
    let id = folder.path().join("cat.png").display().to_string();
    assert_eq!(value(&all[0]), json!({"id": id, "image": STANDARD.encode("not decoded here")}));
    assert_eq!(all[0].as_ref().unwrap().key, Some(id.into_bytes()));
}

#[test]
fn a_local_image_goes_as_an_address_where_asked() {
    let folder = TempDir::new().unwrap();
    let mut inputs = inputs();
    inputs.builder.as_file_url = true;
    inputs.builder.keyed = false;
    // Longer than a message may be: the bytes stay here.
    let all = read_file(&inputs, &folder, "a cat.png", &vec![0; 20_000]);
    assert_eq!(value(&all[0])["image"], format!("file://{}/a%20cat.png", folder.path().display()));
    assert_eq!(all[0].as_ref().unwrap().key, None);
    let missing = folder.path().join("missing.png").display().to_string();
    assert_eq!(read(&inputs, &missing), [Err(Bad::new(missing, "no such file"))]);
}

#[test]
fn an_image_over_the_limit_is_named_with_the_alternatives() {
    let folder = TempDir::new().unwrap();
    let all = read_file(&inputs(), &folder, "cat.png", &[0; 7_600]);
    for word in ["as base64", "kafka.max_message_size", "--as-file-url", "URL"] {
        assert!(why(&all[0]).contains(word), "{}", why(&all[0]));
    }
    assert!(read_file(&inputs(), &folder, "dog.png", &[0; 7_000])[0].is_ok());
}

#[test]
fn a_folder_gives_its_images() {
    let folder = TempDir::new().unwrap();
    for name in ["b.jpg", "a.png", "notes.txt"] {
        std::fs::write(folder.path().join(name), name).unwrap();
    }
    let path = folder.path().display().to_string();
    let all = read(&inputs(), &path);
    let ids: Vec<_> = all.iter().map(|item| value(item)["id"].clone()).collect();
    assert_eq!(ids, [format!("{path}/a.png"), format!("{path}/b.jpg")]);
    let empty = TempDir::new().unwrap();
    assert!(why(&read(&inputs(), empty.path().to_str().unwrap())[0]).contains("no images"));
}

#[test]
fn a_csv_file_gives_ids_prompts_and_meta() {
    let folder = TempDir::new().unwrap();
    let text = "id,url,prompt,album,page\n7,https://e.com/a.jpg,a photo of,summer,\n8,https://e.com/b.jpg,,,2\n";
    let all = read_file(&inputs(), &folder, "list.csv", text.as_bytes());
    assert_eq!(
        value(&all[0]),
        json!({"id": "7", "image": "https://e.com/a.jpg", "prompt": "a photo of", "meta": {"album": "summer"}})
    );
    assert_eq!(value(&all[1]), json!({"id": "8", "image": "https://e.com/b.jpg", "meta": {"page": "2"}}));
    assert_eq!(all[1].as_ref().unwrap().place, "list.csv:3");
}

#[test]
fn the_column_is_the_only_one_or_the_named_one_or_asked_for() {
    let folder = TempDir::new().unwrap();
    let read = |inputs: &Inputs, text: &str| read_file(inputs, &folder, "list.csv", text.as_bytes());
    assert_eq!(value(&read(&inputs(), "photo\nhttps://e.com/a.jpg\n")[0])["image"], "https://e.com/a.jpg");
    let two = "photo,title\nhttps://e.com/a.jpg,A\n";
    assert!(why(&read(&inputs(), two)[0]).contains("--column"));
    let named = |name: &str| Inputs { column: Some(name.into()), ..inputs() };
    assert_eq!(value(&read(&named("photo"), two)[0])["meta"], json!({"title": "A"}));
    assert!(why(&read(&named("picture"), two)[0]).contains("photo, title"));
}

#[test]
fn a_bad_csv_row_is_named_by_its_line_and_the_rest_goes_on() {
    let folder = TempDir::new().unwrap();
    let text = b"image,note\nhttps://e.com/a.jpg,\"two\nlines\"\nhttps://e.com/b.jpg\n,x\nno sense,x\n\
                 https://e.com/c.jpg,\xff\nhttps://e.com/d.jpg,x\n";
    let all = read_file(&inputs(), &folder, "list.csv", text);
    let bad: Vec<_> = all.iter().filter_map(|item| item.as_ref().err()).map(|bad| bad.place.as_str()).collect();
    assert_eq!(bad, ["list.csv:4", "list.csv:5", "list.csv:6", "list.csv:7"]);
    assert_eq!(all.len(), 6);
    assert_eq!(value(&all[5])["image"], "https://e.com/d.jpg");
}

#[test]
fn json_lines_go_as_they_are_and_strings_are_references() {
    let folder = TempDir::new().unwrap();
    let native = r#"{"meta":{"z":1,"a":2},  "id":"x", "image":"https://e.com/a.jpg", "later":true}"#;
    let table = r#"{"input_data":{"columns":["image"],"data":[["https://e.com/a.jpg"],["https://e.com/b.jpg"]]}}"#;
    let text = format!("{native}\n\"https://e.com/b.jpg\"\n{{\"image\"}}\n7\n{table}\n{{\"imgae\":\"x\"}}\n");
    let all = read_file(&inputs(), &folder, "list.jsonl", text.as_bytes());
    let first = all[0].as_ref().unwrap();
    assert_eq!((first.value.as_ref(), first.key.as_deref(), first.rows), (native.as_bytes(), Some(&b"x"[..]), 1));
    assert_eq!(value(&all[1]), json!({"image": "https://e.com/b.jpg"}));
    assert_eq!(all[4].as_ref().map(|item| (item.rows, item.key.clone())), Ok((2, None)));
    let bad: Vec<_> = all.iter().filter_map(|item| item.as_ref().err()).map(|bad| bad.place.as_str()).collect();
    assert_eq!(bad, ["list.jsonl:3", "list.jsonl:4", "list.jsonl:6"]);
}

#[test]
fn a_json_file_is_one_message_or_an_array() {
    let folder = TempDir::new().unwrap();
    let rows: Vec<_> = (0..3).map(|n| json!([format!("https://e.com/{n}.jpg")])).collect();
    let table = json!({"input_data": {"columns": ["image"], "index": [0, 1, 2], "data": rows}});
    let pretty = format!("\n {table:#}\n");
    let all = read_file(&inputs(), &folder, "table.json", pretty.as_bytes());
    assert_eq!((all.len(), all[0].as_ref().unwrap().rows), (1, 3));
    assert_eq!(all[0].as_ref().unwrap().value, pretty.as_bytes());
    let array = json!(["https://e.com/a.jpg", {"id": "b", "image": "https://e.com/b.jpg"}, 7]);
    let all = read_file(&inputs(), &folder, "array.json", array.to_string().as_bytes());
    assert_eq!(value(&all[1])["id"], "b");
    assert_eq!(all[2].as_ref().unwrap_err().place, "array.json[2]");
    let rows = vec![json!(["https://e.com/a.jpg"]); 6];
    let long = json!({"input_data": {"columns": ["image"], "data": rows}});
    assert!(why(&read_file(&inputs(), &folder, "long.json", long.to_string().as_bytes())[0]).contains("at most 5"));
}

#[test]
fn a_text_list_looks_for_paths_beside_itself() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("cat.png"), "a cat").unwrap();
    let text = "# pictures\ncat.png\nhttps://e.com/a.jpg\ndog.png\n{\"image\":\"https://e.com/b.jpg\"}\n";
    let all = read_file(&inputs(), &folder, "list.txt", text.as_bytes());
    assert_eq!(value(&all[0]), json!({"id": "cat.png", "image": STANDARD.encode("a cat")}));
    assert_eq!(all[2].as_ref().unwrap_err().place, "list.txt:4");
    assert_eq!(value(&all[3])["image"], "https://e.com/b.jpg");
}

#[test]
fn what_the_command_line_asks_for_is_in_every_request_that_is_made_here() {
    let mut inputs = inputs();
    inputs.builder.prompt = Some("a photo of".into());
    inputs.builder.params.max_new_tokens = Some(9);
    inputs.builder.meta = Map::from_iter([("album".to_owned(), "summer".into())]);
    inputs.builder.deadline = Some(std::time::Duration::from_secs(600));
    let value = value(&read(&inputs, "https://e.com/a.jpg")[0]);
    assert_eq!(value["prompt"], "a photo of");
    assert_eq!(value["params"], json!({"max_new_tokens": 9}));
    assert_eq!(value["meta"], json!({"album": "summer"}));
    let deadline: jiff::Timestamp = value["deadline"].as_str().unwrap().parse().unwrap();
    let left = deadline.duration_since(jiff::Timestamp::now()).as_secs();
    assert!((590..=600).contains(&left), "{left}");
}

#[test]
fn a_list_that_is_not_there_is_named() {
    for name in ["missing.csv", "missing.jsonl", "missing.json", "missing.txt", "missing.png"] {
        let all = read(&inputs(), name);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].as_ref().unwrap_err().place, name);
    }
    assert!(read(&inputs(), "https://example.com/list.csv")[0].is_ok());
}

#[test]
fn reading_stops_when_nobody_wants_more() {
    let arguments = vec!["https://e.com/a.jpg".to_owned(); 5];
    let mut count = 0;
    let flow = inputs().read(&arguments, &mut |_| {
        count += 1;
        if count == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((flow, count), (ControlFlow::Break(()), 2));
}

proptest! {
    #[test]
    fn junk_in_a_list_is_no_panic(text in proptest::collection::vec(any::<u8>(), 0..300), form in 0usize..4) {
        let folder = TempDir::new().unwrap();
        let name = ["a.csv", "a.jsonl", "a.json", "a.txt"][form];
        for item in read_file(&inputs(), &folder, name, &text).iter().flatten() {
            prop_assert!(item.rows > 0 && item.value.len() <= 10_000);
        }
    }
}

/// A disk that fails.
struct Failing;

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

#[test]
fn a_disk_that_fails_is_told_from_a_list_that_is_wrong() {
    let (inputs, list) = (inputs(), List { name: "list", folder: None });
    let text = |wrong: &'static str| BufReader::new(wrong.as_bytes().chain(Failing));
    for form in [Form::Csv, Form::JsonLines, Form::Json, Form::Text] {
        let mut all = Vec::new();
        let mut emit = |item: Result<Item, Bad>| {
            all.extend(item.err());
            ControlFlow::Continue(())
        };
        let ended = match form {
            Form::Csv => inputs.csv(&list, text("image,n\na.png\n"), &mut emit),
            Form::JsonLines => inputs.json_lines(&list, text("7\n"), &mut emit),
            Form::Json => inputs.json(&list, text("[7,"), &mut emit),
            Form::Text => inputs.text(&list, text("no such reference\n"), &mut emit),
        };
        assert!(ended.is_continue() && all.last().unwrap().unread, "{all:?}");
        assert_eq!(all.iter().filter(|bad| bad.unread).count(), 1, "{all:?}");
    }
}
