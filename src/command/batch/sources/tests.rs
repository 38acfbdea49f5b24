use std::fs;

use tempfile::TempDir;

use super::*;
use crate::message::RequestParams;

fn rows(column: Option<&str>) -> Rows {
    Rows { column: column.map(str::to_owned), params: RequestParams::default(), max_body: 1000 }
}

fn file(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn read(sources: &Sources) -> Vec<Row> {
    let mut all = Vec::new();
    let _ = sources.read(&mut |row| {
        all.push(row.unwrap_or_else(Row::from));
        ControlFlow::Continue(())
    });
    all
}

#[test]
fn rows_come_in_the_order_of_the_inputs_and_bad_ones_keep_their_place() {
    let folder = TempDir::new().unwrap();
    let csv = file(&folder, "a.csv", "image,n\nhttps://e.com/a,1\nhttps://e.com/b,2,3\n,4\n");
    let jsonl = file(&folder, "b.jsonl", "{\"url\":\"https://e.com/c\",\"n\":5}\n\n{\n\"https://e.com/d\"\n");
    file(&folder, "e.png", "");
    let folder_name = folder.path().display().to_string();
    let arguments = [csv, jsonl, folder_name.clone(), "https://e.com/f".into()];
    let sources = Sources::new(&arguments, rows(None)).unwrap();
    let all = read(&sources);
    let found: Vec<_> = all.iter().map(|row| (row.place.replace(&folder_name, "."), row.request.is_ok())).collect();
    let expected = [
        ("./a.csv:2", true),
        ("./a.csv:3", false),
        ("./a.csv:4", false),
        ("./b.jsonl:1", true),
        ("./b.jsonl:3", false),
        ("./b.jsonl:4", true),
        ("./e.png", true),
        ("https://e.com/f", true),
    ];
    assert_eq!(found, expected.map(|(place, good)| (place.to_owned(), good)));
    assert_eq!(serde_json::to_string(&all[2].cells).unwrap(), r#"{"image":null,"n":"4"}"#);
    // A blank line is counted, too: it is for a bar.
    assert_eq!(sources.count(), Some(9));
}

#[test]
fn what_cannot_be_an_input_is_refused_before_anything_is_loaded() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(folder.path().join("empty")).unwrap();
    for (argument, column, why) in [
        (path("missing.csv"), None, "cannot be read"),
        (path("missing.png"), None, "no such file"),
        (path("missing.parquet"), None, "cannot be read"),
        (path("missing.tar"), None, "cannot be read"),
        (path("missing"), None, "neither a file nor an address"),
        (path("empty"), None, "no images in this folder"),
        (file(&folder, "notes.docx", "x"), None, "what is this?"),
        (file(&folder, "a.csv", "a,b\n1,2\n"), None, "none of the columns (a, b)"),
        (file(&folder, "b.csv", "a,image\n1,2\n"), Some("photo"), "no column photo (--column); it has a, image"),
        (file(&folder, "c.csv", "image,a,a\n1,2,3\n"), None, "has two columns a"),
        (file(&folder, "d.jsonl", "# so\n{\"img\":1,\"b\":2}\n"), None, "none of the columns (img, b)"),
        (file(&folder, "e.parquet", "no table"), None, "no Parquet table"),
        (file(&folder, "f.tar", "no tar"), None, "no tar archive"),
        ("-".into(), None, "standard input cannot be read again"),
    ] {
        let Err(Usage(text)) = Sources::new(std::slice::from_ref(&argument), rows(column)) else {
            panic!("{argument} is no error")
        };
        assert!(text.contains(why) && text.starts_with(&argument), "{argument} gave: {text}");
    }
}
