//! The payload of a message. What is read from it survives being written and read again, as a replayed dead letter is.

#![no_main]

use blipstream::disposition::Disposed;
use blipstream::message::{Message, ParseError, ParsedRow, parse};
use libfuzzer_sys::fuzz_target;

const MAX_ROWS: usize = 100;
/// Errors stand in headers and logs; they quote a stranger's text, but never at length.
const MAX_ERROR_BYTES: usize = 1000;

fuzz_target!(|payload: &[u8]| {
    match read(payload) {
        Ok(rows) => {
            assert!(rows.len() <= MAX_ROWS);
            rows.into_iter().for_each(check);
        }
        Err(error) => assert_short(&error),
    }
});

fn read(payload: &[u8]) -> Result<Vec<ParsedRow>, ParseError> {
    parse(&Message { payload: Some(payload.to_vec().into()), ..Message::empty("requests", 0, 0) }, MAX_ROWS)
}

fn check(row: ParsedRow) {
    match row {
        Ok(request) => assert_eq!(read(&request.to_native()), Ok(vec![Ok(request)])),
        Err((error, native)) => {
            assert_short(&error);
            let native = native.expect("a row of a table has a native form");
            assert_eq!(read(&native).map_err(|again| again.code()), Err(error.code()), "of {native:?}");
        }
    }
}

fn assert_short(error: &ParseError) {
    let text = error.to_string();
    assert!(text.len() <= MAX_ERROR_BYTES, "{text}");
}
