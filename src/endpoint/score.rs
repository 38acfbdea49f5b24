//! `POST /score`: the table of the model card, a text for each of its rows.

use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::Desk;
use super::problem::Problem;
use crate::disposition::Failure;
use crate::message::{self, Candidate, CaptionRecord, Message, parse};
use crate::metrics::Route;
use crate::pipeline::endpoint::Answer;

/// What the address may ask for beside the body.
#[derive(Debug, Deserialize)]
pub(super) struct Form {
    /// Whole records instead of their texts.
    #[serde(default)]
    records: bool,
}

pub(super) async fn score(
    State(desk): State<Desk>,
    form: Result<Query<Form>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let begun = Instant::now();
    let form = form.map_err(|error| Problem::unreadable(format!("{}; known is records=true", error.body_text())));
    let answer = async {
        let Query(Form { records }) = form?;
        let (admitted, body) = desk.read(&headers, body).await?;
        // Cheap: inline images stay slices of the body.
        let message = Message { payload: Some(body), ..Message::empty("", 0, 0) };
        let rows = parse(&message, desk.settings.max_rows)?;
        let answers = desk.ask(admitted, rows).await?;
        let rows: Vec<Row> = answers.into_iter().map(|answer| row(answer, records)).collect();
        Ok(Json(rows).into_response())
    };
    desk.answer(Route::Score, begun, answer.await)
}

/// What `/score` answers to a row.
#[derive(Serialize)]
#[serde(untagged)]
enum Row {
    Record(Box<CaptionRecord>),
    Text {
        text: String,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        candidates: Vec<Candidate>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        answers: Vec<message::Answer>,
        #[serde(skip_serializing_if = "Option::is_none")]
        embeddings: Option<message::Embeddings>,
    },
    /// The text is null.
    Failed {
        text: Option<String>,
        error: Error,
    },
}

#[derive(Serialize)]
struct Error {
    code: &'static str,
    stage: &'static str,
    message: String,
}

/// The card's `{"text": …}`, with what was asked for beyond it; or an error.
fn row(answer: Answer, records: bool) -> Row {
    match answer {
        Ok(record) if records => Row::Record(record),
        Ok(record) => {
            let CaptionRecord { text, candidates, answers, embeddings, .. } = *record;
            Row::Text { text, candidates, answers, embeddings }
        }
        Err(Failure { code, stage, message, .. }) => {
            let error = Error { code: code.as_str(), stage: stage.as_str(), message };
            Row::Failed { text: None, error }
        }
    }
}
