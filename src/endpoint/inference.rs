//! The Open Inference Protocol, version 2, over HTTP (KServe's `inference_rest`): what servers of models have in common, so that
//! its clients and its health checks work here.
//!
//! Models are named by what they do: `caption` writes a text for each image, `filter` judges pairs of images and texts, `vqa`
//! answers a question about each image.

use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Desk;
use super::problem::{Problem, status_of};
use crate::caption::ModelInfo;
use crate::message::{Judged, ParsedRow, Request, RequestParams, parse_object, read_json};
use crate::metrics::Route;
use crate::pipeline::endpoint::Answer;

/// A header of the binary extension, which is not offered.
const BINARY: &str = "inference-header-content-length";
/// Parameters of clients that change nothing here.
const IDLE: [&str; 2] = ["binary_data_output", "binary_data"];

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Caption,
    Filter,
    Answer,
}

impl Task {
    fn of(name: &str) -> Option<Self> {
        match name {
            "caption" => Some(Self::Caption),
            "filter" => Some(Self::Filter),
            "vqa" => Some(Self::Answer),
            _ => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Filter => "filter",
            Self::Answer => "vqa",
        }
    }

    /// Names of the inputs, all of type BYTES; the first `required` have to be there.
    const fn inputs(self) -> (&'static [&'static str], usize) {
        match self {
            Self::Caption => (&["image", "prompt"], 1),
            Self::Filter => (&["image", "text"], 2),
            Self::Answer => (&["image", "question"], 2),
        }
    }

    /// The field of a request that an input is.
    fn field(name: &str) -> &str {
        if name == "question" { "questions" } else { name }
    }

    /// What a request asks for, and whether it may have parameters.
    fn asks(self) -> (&'static str, bool) {
        match self {
            Self::Caption => ("caption", true),
            Self::Filter => ("filter", false),
            Self::Answer => ("answer", true),
        }
    }

    /// Names and types of the outputs. Those of `error` come only where they are asked for.
    const fn outputs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Caption | Self::Answer => &[("text", "BYTES"), ("logprob", "FP32"), ("error", "BYTES")],
            Self::Filter => &[("itm", "FP32"), ("itc", "FP32"), ("kept", "BOOL"), ("error", "BYTES")],
        }
    }
}

#[derive(Deserialize)]
struct InferRequest {
    id: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
    inputs: Vec<Object<Tensor>>,
    outputs: Option<Vec<Object<Wanted>>>,
}

/// A JSON object that is a `T`: structs alone would be read from lists, too.
#[derive(Deserialize)]
#[serde(try_from = "Map<String, Value>", bound = "T: serde::de::DeserializeOwned")]
struct Object<T>(T);

impl<T: serde::de::DeserializeOwned> TryFrom<Map<String, Value>> for Object<T> {
    type Error = serde_json::Error;

    fn try_from(fields: Map<String, Value>) -> Result<Self, serde_json::Error> {
        serde_json::from_value(fields.into()).map(Self)
    }
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
    datatype: String,
    data: Vec<Value>,
}

#[derive(Deserialize)]
struct Wanted {
    name: String,
}

#[derive(Serialize)]
struct InferResponse {
    model_name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    model_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    outputs: Vec<Value>,
}

/// The form of the protocol's errors.
pub(super) fn error(problem: Problem) -> Response {
    problem.headers((problem.status, Json(json!({"error": problem.message}))).into_response())
}

pub(super) async fn server() -> Json<Value> {
    Json(json!({"name": "blipstream", "version": env!("CARGO_PKG_VERSION"), "extensions": []}))
}

pub(super) async fn live(State(desk): State<Desk>) -> Response {
    health(desk.control.alive())
}

pub(super) async fn ready(State(desk): State<Desk>) -> Response {
    health(desk.control.answers())
}

fn health(well: bool) -> Response {
    if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }.into_response()
}

pub(super) async fn model(State(desk): State<Desk>, Path(name): Path<String>) -> Response {
    match loaded(&desk, &name) {
        Ok((task, info)) => {
            let (inputs, _) = task.inputs();
            let tensor = |name: &str, datatype: &str| json!({"name": name, "datatype": datatype, "shape": [-1]});
            Json(json!({
                "name": task.name(),
                "versions": info.revision.into_iter().collect::<Vec<_>>(),
                "platform": format!("blipstream {} ({}, {})", info.id, info.dtype, info.backend),
                "inputs": inputs.iter().map(|name| tensor(name, "BYTES")).collect::<Vec<_>>(),
                "outputs": task.outputs().iter().map(|(name, kind)| tensor(name, kind)).collect::<Vec<_>>(),
            }))
            .into_response()
        }
        Err(problem) => error(problem),
    }
}

pub(super) async fn model_ready(State(desk): State<Desk>, Path(name): Path<String>) -> Response {
    match loaded(&desk, &name) {
        Ok(_) => health(desk.control.answers()),
        Err(problem) => error(problem),
    }
}

/// The loaded model of a name.
fn loaded(desk: &Desk, name: &str) -> Result<(Task, ModelInfo), Problem> {
    let unknown = |what: String| Problem::new(StatusCode::NOT_FOUND, "model_unavailable", what);
    let task = Task::of(name).ok_or_else(|| unknown("no such model; there are caption, filter and vqa".into()))?;
    let info = match task {
        Task::Caption => desk.control.model(),
        Task::Filter => desk.control.filter(),
        Task::Answer => desk.control.answerer(),
    };
    match info {
        Some(info) => Ok((task, info)),
        // What is not wired yet has no models at all.
        None if desk.control.model().is_none() => Err(Problem::loading()),
        None if task == Task::Filter => Err(unknown("no model that judges texts is loaded (filter.source)".into())),
        None => Err(unknown("no model that answers questions is loaded (answerer.source)".into())),
    }
}

pub(super) async fn infer(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let begun = Instant::now();
    let answer = async {
        let (task, info) = loaded(&desk, &name)?;
        if headers.contains_key(BINARY) {
            return Err(Problem::unreadable(
                "tensors in binary form are not taken; send JSON (binary_data=False in Triton's client)",
            ));
        }
        let (admitted, body) = desk.read(&headers, body).await?;
        let request = read_json(&body)?;
        // Its values are copies.
        drop(body);
        let request: Object<InferRequest> =
            serde_json::from_value(request).map_err(|error| Problem::unreadable(error.to_string()))?;
        let InferRequest { id, parameters, inputs, outputs } = request.0;
        let wanted = wanted(task, outputs.as_deref())?;
        let rows = rows(task, parameters, inputs, desk.settings.max_rows)?;
        let answers = desk.ask(admitted, rows).await?;
        if !wanted.contains(&"error") {
            refuse_failed(&answers)?;
        }
        let outputs = wanted.iter().map(|name| output(name, &answers)).collect();
        let response = InferResponse { model_name: task.name(), model_version: info.revision, id, outputs };
        Ok(Json(response).into_response())
    };
    desk.answer(Route::Infer, begun, answer.await)
}

/// Names of the outputs that are asked for, or those that everybody gets.
fn wanted(task: Task, names: Option<&[Object<Wanted>]>) -> Result<Vec<&'static str>, Problem> {
    let Some(names) = names.filter(|names| !names.is_empty()) else {
        return Ok(match task {
            Task::Caption | Task::Answer => vec!["text"],
            Task::Filter => vec!["itm", "itc", "kept"],
        });
    };
    let known = |Object(wanted): &Object<Wanted>| {
        let found = task.outputs().iter().find(|(name, _)| *name == wanted.name).map(|(name, _)| *name);
        found.ok_or_else(|| {
            let all: Vec<_> = task.outputs().iter().map(|(name, _)| *name).collect();
            Problem::unreadable(format!("outputs: the model has no {:?}; it has {}", wanted.name, all.join(", ")))
        })
    };
    names.iter().map(known).collect()
}

/// The requests of the flow that the tensors make, which may be long: their values are moved.
fn rows(
    task: Task,
    mut params: Map<String, Value>,
    inputs: Vec<Object<Tensor>>,
    most: usize,
) -> Result<Vec<ParsedRow>, Problem> {
    let (names, required) = task.inputs();
    let mut columns: Vec<Option<Tensor>> = names.iter().map(|_| None).collect();
    for Object(tensor) in inputs {
        let Some(at) = names.iter().position(|name| *name == tensor.name) else {
            let text = format!("inputs: the model has no {:?}; it has {}", tensor.name, names.join(", "));
            return Err(Problem::unreadable(text));
        };
        if columns[at].replace(tensor).is_some() {
            return Err(Problem::unreadable(format!("inputs: {} stands there twice", names[at])));
        }
    }
    if let Some(missing) = (0..required).find(|at| columns[*at].is_none()) {
        return Err(Problem::unreadable(format!("inputs: {} is missing", names[missing])));
    }
    let count = columns[0].as_ref().map_or(0, |tensor| tensor.data.len());
    if count > most {
        return Err(Problem::unreadable(format!("inputs: {count} images; at most {most} are allowed in one request")));
    }
    for tensor in columns.iter().flatten() {
        check(tensor, count)?;
    }
    params.retain(|name, _| !IDLE.contains(&name.as_str()));
    let (asked, takes_params) = task.asks();
    if let Some(name) = params.keys().next().filter(|_| !takes_params) {
        let text = format!("parameters: {name:?} has no effect on the model {}", task.name());
        return Err(Problem::unreadable(text));
    }
    // Once, however many rows there are.
    let params = RequestParams::read(&params, "parameters")?;
    let row = |at: usize| -> ParsedRow {
        let mut fields = Map::new();
        for (name, tensor) in names.iter().zip(&mut columns) {
            if let Some(tensor) = tensor {
                fields.insert(Task::field(name).to_owned(), tensor.data[at].take());
            }
        }
        fields.insert("tasks".into(), json!([asked]));
        let request = parse_object(fields).map_err(|error| (error, None))?;
        Ok(Request { params: params.clone(), ..request })
    };
    Ok((0..count).map(row).collect())
}

/// A tensor of so many texts, in one dimension or in rows of one.
fn check(tensor: &Tensor, count: usize) -> Result<(), Problem> {
    let Tensor { name, shape, datatype, data } = tensor;
    let wrong = |what: String| Err(Problem::unreadable(format!("inputs: {name}: {what}")));
    if datatype != "BYTES" {
        return wrong(format!("its datatype is {datatype}; BYTES is taken: an address or base64"));
    }
    if data.len() != count {
        return wrong(format!("{} values for {count} images", data.len()));
    }
    if !matches!(shape[..], [rows] | [rows, 1] if rows == count as u64) {
        return wrong(format!("its shape is {shape:?}, with {count} values; [{count}] is meant"));
    }
    match data.iter().position(|value| !value.is_string()) {
        Some(at) => wrong(format!("data[{at}] is no string")),
        None => Ok(()),
    }
}

/// The protocol knows no errors of rows: one fails all, unless their errors are asked for.
fn refuse_failed(answers: &[Answer]) -> Result<(), Problem> {
    let failed = |(at, answer): (usize, &Answer)| Some((at, answer.as_ref().err()?.clone()));
    match answers.iter().enumerate().find_map(failed) {
        None => Ok(()),
        Some((at, failure)) => {
            let text = format!(
                "row {at}: {}: {}. Ask for the output `error` to have the others' answers all the same",
                failure.code, failure.message
            );
            Err(Problem::new(status_of(failure.code), failure.code.as_str(), text))
        }
    }
}

/// An output over all rows; those that failed have an empty value.
fn output(name: &str, answers: &[Answer]) -> Value {
    let judged = |answer: &Answer| -> Option<Judged> {
        answer.as_ref().ok()?.candidates.first().and_then(|candidate| candidate.judged.clone())
    };
    let texts = |of: &dyn Fn(&Answer) -> String| answers.iter().map(|answer| of(answer).into()).collect();
    let numbers = |of: &dyn Fn(&Answer) -> Option<f32>| {
        answers.iter().map(|answer| of(answer).unwrap_or_default().into()).collect::<Vec<Value>>()
    };
    let (datatype, data): (_, Vec<Value>) = match name {
        "text" => ("BYTES", texts(&|answer| answer.as_ref().map(|record| record.text.clone()).unwrap_or_default())),
        "logprob" => ("FP32", numbers(&|answer| answer.as_ref().ok()?.generated.logprob)),
        "itm" => ("FP32", numbers(&|answer| judged(answer)?.itm)),
        "itc" => ("FP32", numbers(&|answer| judged(answer)?.itc)),
        "kept" => {
            ("BOOL", answers.iter().map(|answer| judged(answer).is_some_and(|judged| judged.kept).into()).collect())
        }
        _ => {
            let error = |answer: &Answer| {
                answer
                    .as_ref()
                    .err()
                    .map(|failure| format!("{}: {}", failure.code, failure.message))
                    .unwrap_or_default()
            };
            ("BYTES", texts(&error))
        }
    };
    json!({"name": name, "datatype": datatype, "shape": [answers.len()], "data": data})
}
