use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;

use super::*;
use crate::disposition::Code;
use crate::message::{ImageRef, RequestParams};

fn rows(column: Option<&str>) -> Rows {
    Rows { column: column.map(str::to_owned), params: RequestParams::default(), max_body: 1000 }
}

/// Values of a leaf column; every one is there, unless it is `None`.
enum Leaf<'a> {
    Bytes(Vec<Option<&'a [u8]>>),
    Long(Vec<i64>),
    Int(Vec<i32>),
    Float(Vec<f32>),
}

fn table(folder: &TempDir, schema: &str, leaves: Vec<Leaf<'_>>, levels: &[i16]) -> String {
    let path = folder.path().join("t.parquet");
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (leaf, most) in leaves.into_iter().zip(levels) {
        let mut column = group.next_column().unwrap().unwrap();
        match (column.untyped(), leaf) {
            (ColumnWriter::ByteArrayColumnWriter(to), Leaf::Bytes(values)) => {
                let levels: Vec<i16> = values.iter().map(|v| if v.is_some() { *most } else { most - 1 }).collect();
                let values: Vec<ByteArray> = values.into_iter().flatten().map(|v| v.to_vec().into()).collect();
                to.write_batch(&values, Some(&levels), None).unwrap();
            }
            (ColumnWriter::Int64ColumnWriter(to), Leaf::Long(values)) => {
                to.write_batch(&values, None, None).unwrap();
            }
            (ColumnWriter::Int32ColumnWriter(to), Leaf::Int(values)) => {
                to.write_batch(&values, None, None).unwrap();
            }
            (ColumnWriter::FloatColumnWriter(to), Leaf::Float(values)) => {
                to.write_batch(&values, None, None).unwrap();
            }
            _ => panic!("the leaf is of another type"),
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    path.display().to_string()
}

fn read_all(argument: &str, rows: &Rows) -> Vec<Row> {
    let mut all = Vec::new();
    let _ = read(argument, rows, &mut |row| {
        all.push(row.unwrap_or_else(Row::from));
        ControlFlow::Continue(())
    });
    all
}

fn shown(row: &Row) -> String {
    serde_json::to_string(&row.cells).unwrap()
}

#[test]
fn typed_columns_pass_through_and_bytes_are_images_or_left_out() {
    let folder = TempDir::new().unwrap();
    let schema = "message m {
        required int64 n; optional binary image; optional binary thumbnail; required int32 day (DATE);
        required float score; optional binary name (UTF8);
    }";
    let png: &[u8] = b"\x89PNG\r\n\xff\xfe";
    let leaves = vec![
        Leaf::Long(vec![1, 2, 3]),
        Leaf::Bytes(vec![Some(png), Some(b"https://e.com/a.png"), None]),
        Leaf::Bytes(vec![Some(png), None, None]),
        Leaf::Int(vec![0, 1, 2]),
        Leaf::Float(vec![0.1, 2.0, f32::NAN]),
        Leaf::Bytes(vec![Some("ä".as_bytes()), None, Some(b"b")]),
    ];
    let path = table(&folder, schema, leaves, &[0, 1, 1, 0, 0, 1]);
    assert_eq!(count(&path), Some(3));
    let all = read_all(&path, &rows(None));
    assert_eq!(all[2].place, format!("{path}[2]"));
    assert_eq!(shown(&all[0]), r#"{"n":1,"image":null,"day":"1970-01-01","score":0.1,"name":"ä"}"#);
    assert_eq!(shown(&all[1]), r#"{"n":2,"image":"https://e.com/a.png","day":"1970-01-02","score":2.0,"name":null}"#);
    assert_eq!(shown(&all[2]), r#"{"n":3,"image":null,"day":"1970-01-03","score":null,"name":"b"}"#);
    let image = |row: &Row| row.request.clone().map(|request| request.image);
    assert!(matches!(image(&all[0]), Ok(ImageRef::Base64(_))));
    assert!(matches!(image(&all[1]), Ok(ImageRef::Http(_))));
    assert_eq!(image(&all[2]).unwrap_err().code, Code::BadReference);
}

#[test]
fn a_group_of_bytes_and_path_is_an_image_as_data_sets_of_the_hub_have_it() {
    let folder = TempDir::new().unwrap();
    let schema = "message m {
        optional group picture { optional binary bytes; optional binary path (UTF8); }
        required int64 label;
    }";
    let leaves = vec![
        Leaf::Bytes(vec![Some(b"\xff\xd8\xff"), None]),
        Leaf::Bytes(vec![Some(b"a.jpg"), Some(b"https://e.com/b.jpg")]),
        Leaf::Long(vec![7, 8]),
    ];
    let path = table(&folder, schema, leaves, &[2, 2, 0]);
    assert!(check(&path, &rows(None)).unwrap_err().contains("none of the columns (picture, label)"));
    assert!(check(&path, &rows(Some("photo"))).unwrap_err().contains("no column photo"));
    let all = read_all(&path, &rows(Some("picture")));
    assert_eq!(shown(&all[0]), r#"{"picture":"a.jpg","label":7}"#);
    assert_eq!(shown(&all[1]), r#"{"picture":"https://e.com/b.jpg","label":8}"#);
    assert!(all.iter().all(|row| row.request.is_ok()), "{all:?}");
}

#[test]
fn a_torn_table_is_refused_before_anything_is_loaded() {
    let folder = TempDir::new().unwrap();
    let leaves = vec![Leaf::Bytes(vec![Some(b"https://e.com/a")])];
    let path = table(&folder, "message m { optional binary url (UTF8); }", leaves, &[1]);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    assert!(check(&path, &rows(None)).unwrap_err().contains("no Parquet table"));
}

#[test]
fn a_disk_that_fails_is_told_from_a_table_that_is_damaged() {
    let failed = ParquetError::from(std::io::Error::from_raw_os_error(libc::EIO));
    assert!(Bad::of("t.parquet", &failed, "why").unread);
    let damaged = ParquetError::from(std::io::Error::new(std::io::ErrorKind::InvalidData, "no such code"));
    assert!(!Bad::of("t.parquet", &damaged, "why").unread);
}
