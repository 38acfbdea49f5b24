use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn columns() -> Vec<Column> {
    let kinds = [
        ("flag", Kind::Boolean),
        ("count", Kind::Integer),
        ("score", Kind::Number),
        ("text", Kind::Text),
        ("nothing", Kind::Unknown),
    ];
    kinds.map(|(name, kind)| Column { name: name.into(), kind }).into()
}

fn written(form: Form, rows: Vec<Vec<Value>>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out");
    write_whole(&file, |to| write(form, to, &columns(), rows.into_iter().map(Ok))).unwrap();
    (folder, file)
}

fn rows() -> Vec<Vec<Value>> {
    vec![
        vec![true.into(), 1.into(), 2.into(), "a \"dog\"\n, there".into(), Value::Null],
        vec![Value::Null, Value::Null, 0.5.into(), json!({"a": [1]}), Value::Null],
    ]
}

#[test]
fn json_lines_and_csv_keep_columns_and_order() {
    let (_folder, file) = written(Form::JsonLines, rows());
    let text = std::fs::read_to_string(file).unwrap();
    let expected = concat!(
        r#"{"flag":true,"count":1,"score":2,"text":"a \"dog\"\n, there","nothing":null}"#,
        "\n",
        r#"{"flag":null,"count":null,"score":0.5,"text":{"a":[1]},"nothing":null}"#,
        "\n"
    );
    assert_eq!(text, expected);
    let (_folder, file) = written(Form::Csv, rows());
    let text = std::fs::read_to_string(file).unwrap();
    let expected = "flag,count,score,text,nothing\ntrue,1,2,\"a \"\"dog\"\"\n, there\",\n,,0.5,\"{\"\"a\"\":[1]}\",\n";
    assert_eq!(text, expected);
}

#[test]
fn what_cannot_be_written_whole_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.csv");
    std::fs::write(&file, "before").unwrap();
    let broken = std::iter::once(Err(io::Error::other("the journal is gone")));
    assert!(write_whole(&file, |to| write(Form::Csv, to, &columns(), broken)).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "before");
}

#[test]
fn the_form_is_that_of_the_name() {
    let form = |name: &str| Form::of(Path::new(name));
    assert_eq!(form("a.CSV"), Ok(Form::Csv));
    assert_eq!((form("a.jsonl"), form("b.parquet")), (Ok(Form::JsonLines), Ok(Form::Parquet)));
    assert!(form("a.json").unwrap_err().contains("x.parquet"));
}

fn cell() -> impl Strategy<Value = (Value, Value, Value, Value)> {
    let some = |values: BoxedStrategy<Value>| prop_oneof![1 => Just(Value::Null), 3 => values];
    (
        some(any::<bool>().prop_map(Value::from).boxed()),
        some(any::<i64>().prop_map(Value::from).boxed()),
        some((-1e9..1e9f64).prop_map(Value::from).boxed()),
        some(".{0,20}".prop_map(Value::from).boxed()),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_parquet_table_reads_back_as_what_was_written(cells in proptest::collection::vec(cell(), 0..60)) {
        let rows: Vec<Vec<Value>> = cells.into_iter().map(|(a, b, c, d)| vec![a, b, c, d, Value::Null]).collect();
        let (_folder, file) = written(Form::Parquet, rows.clone());
        let reader = SerializedFileReader::new(File::open(file).unwrap()).unwrap();
        let value = |field: Field| match field {
            Field::Null => Value::Null,
            Field::Bool(value) => value.into(),
            Field::Long(value) => value.into(),
            Field::Double(value) => value.into(),
            Field::Str(text) => text.into(),
            other => panic!("{other:?}"),
        };
        let read: Vec<Vec<Value>> = reader
            .get_row_iter(None)
            .unwrap()
            .map(|row| row.unwrap().into_columns().into_iter().map(|(_, field)| value(field)).collect())
            .collect();
        prop_assert_eq!(read, rows);
    }
}
