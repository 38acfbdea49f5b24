use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::command::batch::identity::Input;
use crate::message::RequestParams;

fn identity() -> Identity {
    Identity {
        version: "1".into(),
        inputs: vec![Input { name: "a.csv".into(), files: 1, bytes: 2, modified: None, digest: None }],
        column: None,
        model: "demo".into(),
        dtype: "auto".into(),
        prompt: None,
        params: RequestParams::default(),
    }
}

fn ended(row: u64, error: Option<&str>) -> Ended {
    let failed = error.map(|code| Failed { code: code.into(), message: "why\nso".into() });
    let cells = Cells(vec![("z".into(), "ä".into()), ("a".into(), row.into())]);
    let caption = error.is_none().then(|| Caption { text: format!("text {row}"), ..Caption::default() });
    Ended { row, place: format!("a.csv:{row}"), second: row as f64, tries: 1, cells, caption, error: failed }
}

fn open(folder: &TempDir) -> Result<Journal, JournalError> {
    Journal::open(&folder.path().join("journal"), &identity(), false)
}

fn results(journal: &Journal) -> Vec<Ended> {
    journal.results().unwrap().collect::<io::Result<_>>().unwrap()
}

#[test]
fn results_come_in_the_order_of_the_rows_and_the_last_one_of_a_row_counts() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(&folder).unwrap();
    for row in [ended(3, None), ended(0, Some("dns")), ended(1, None), ended(0, None), ended(2, Some("dns"))] {
        journal.record(&row).unwrap();
    }
    let expected = [ended(0, None), ended(1, None), ended(2, Some("dns")), ended(3, None)];
    assert_eq!(results(&journal), expected);
    assert_eq!((journal.index().done(), journal.index().failed()), (4, 1));
    drop(journal);
    let again = open(&folder).unwrap();
    assert_eq!(results(&again), expected);
    assert_eq!((again.index().done(), again.index().failed(), again.earlier()), (4, 1, 3.0));
}

#[test]
fn a_second_writer_another_job_and_a_foreign_file_are_refused_and_stay_as_they_are() {
    let folder = TempDir::new().unwrap();
    let first = open(&folder).unwrap();
    assert!(matches!(open(&folder), Err(JournalError::Locked(_))));
    drop(first);
    let path = folder.path().join("journal");
    let other = Identity { model: "other".into(), ..identity() };
    let refused = Journal::open(&path, &other, false).unwrap_err();
    assert!(refused.to_string().contains("model: other now, demo then"), "{refused}");
    assert!(open(&folder).is_ok());
    std::fs::write(&path, "a letter\n").unwrap();
    assert!(matches!(open(&folder), Err(JournalError::Damaged { line: 1, .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a letter\n");
    Journal::open(&path, &other, true).unwrap();
    assert!(Journal::open(&path, &other, false).is_ok());
}

#[test]
fn a_damaged_line_is_the_end_of_the_journal_only_where_nothing_follows() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(&folder).unwrap();
    journal.record(&ended(0, None)).unwrap();
    drop(journal);
    let path = folder.path().join("journal");
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{whole}\0\0\0\n")).unwrap();
    assert_eq!(results(&open(&folder).unwrap()), [ended(0, None)]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
    std::fs::write(&path, format!("{whole}\0\0\0\n{{}}\n")).unwrap();
    assert!(matches!(open(&folder), Err(JournalError::Damaged { line: 3, .. })));
}

#[test]
fn a_retry_opens_the_failed_rows_once_and_is_gone_on_with_after_a_stop() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(&folder).unwrap();
    for row in [ended(0, Some("dns")), ended(1, None), ended(2, Some("dns"))] {
        journal.record(&row).unwrap();
    }
    journal.mark(Mark::Finished).unwrap();
    assert!(journal.is_finished());
    assert_eq!(journal.retry_failed().unwrap(), 2);
    assert!(!journal.is_finished());
    journal.record(&ended(0, Some("tls"))).unwrap();
    drop(journal);

    let mut journal = open(&folder).unwrap();
    assert_eq!(journal.retry_failed().unwrap(), 1, "row 0 was tried anew already");
    let done = journal.index().done_rows();
    assert_eq!([0, 1, 2, 3].map(|row| done.has(row)), [true, true, false, false]);
    assert_eq!(results(&journal).len(), 3, "the old result counts until there is a new one");
    journal.record(&ended(2, None)).unwrap();
    journal.mark(Mark::Finished).unwrap();
    assert_eq!((journal.index().failed(), journal.index().reopened()), (1, 0));
    assert_eq!(journal.retry_failed().unwrap(), 1);
}

#[test]
fn a_job_keeps_its_id_and_its_rounds_and_a_new_one_has_another_id() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(&folder).unwrap();
    let id = journal.id().to_owned();
    assert_eq!(journal.round(), 0);
    journal.record(&ended(0, Some("dns"))).unwrap();
    journal.retry_failed().unwrap();
    assert_eq!(journal.round(), 1);
    drop(journal);
    let mut journal = open(&folder).unwrap();
    assert_eq!((journal.id(), journal.round()), (id.as_str(), 1));
    journal.retry_failed().unwrap();
    assert_eq!(journal.round(), 1, "the retry goes on");
    drop(journal);
    let anew = Journal::open(&folder.path().join("journal"), &identity(), true).unwrap();
    assert!(anew.id() != id && anew.round() == 0 && anew.was_read().is_empty());
}

#[test]
fn positions_are_those_noted_last_of_each_partition_and_change_nothing_else() {
    let folder = TempDir::new().unwrap();
    let mut journal = open(&folder).unwrap();
    let positions =
        |topic: &str, all: &[(i32, i64)]| Positions::from([(topic.to_owned(), all.iter().copied().collect())]);
    journal.record(&ended(0, Some("dns"))).unwrap();
    journal.retry_failed().unwrap();
    journal.note_read(positions("captions", &[(0, 5), (1, 7)])).unwrap();
    journal.note_read(positions("dlq", &[(0, 1)])).unwrap();
    journal.note_read(positions("captions", &[(1, 9)])).unwrap();
    let mut expected = positions("captions", &[(0, 5), (1, 9)]);
    merge(&mut expected, positions("dlq", &[(0, 1)]));
    assert_eq!(journal.was_read(), &expected);
    drop(journal);
    let mut journal = open(&folder).unwrap();
    assert_eq!(journal.was_read(), &expected);
    assert_eq!((journal.retry_failed().unwrap(), journal.round()), (1, 1), "the retry goes on");
    assert_eq!(results(&journal), [ended(0, Some("dns"))]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_crash_cuts_off_the_journal_goes_on_with_all_whole_lines(
        rows in proptest::collection::vec((0u64..20, any::<bool>()), 1..30), cut in 0.0..1.0f64
    ) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("journal");
        let mut journal = open(&folder).unwrap();
        let begin = std::fs::metadata(&path).unwrap().len();
        for (row, fails) in &rows {
            journal.record(&ended(*row, fails.then_some("dns"))).unwrap();
        }
        drop(journal);
        let bytes = std::fs::read(&path).unwrap();
        let length = begin as usize + ((bytes.len() - begin as usize) as f64 * cut) as usize;
        std::fs::write(&path, &bytes[..length]).unwrap();
        let whole = bytes[..length].split(|byte| *byte == b'\n').count() - 2;

        let mut journal = open(&folder).unwrap();
        let mut expected = std::collections::BTreeMap::new();
        for (row, fails) in &rows[..whole] {
            expected.insert(*row, ended(*row, fails.then_some("dns")));
        }
        prop_assert_eq!(results(&journal), expected.values().cloned().collect::<Vec<_>>());
        for (row, fails) in &rows[whole..] {
            journal.record(&ended(*row, fails.then_some("dns"))).unwrap();
            expected.insert(*row, ended(*row, fails.then_some("dns")));
        }
        prop_assert_eq!(results(&journal), expected.into_values().collect::<Vec<_>>());
    }
}
