//! What is to be done with an image, and the texts and questions that it takes.

use super::json::{Fields, Json};
use super::native::{nearest, wrong};
use super::{ParseError, RequestParams};
use crate::message::redact::quote;

/// Longest prompt, text or question, in bytes. The text model of BLIP has 512 positions, and a token is seldom longer than
/// eight bytes.
pub const MAX_PROMPT_BYTES: usize = 4096;

/// Most texts of one image, and most questions about it, whatever a fleet allows.
pub const MAX_TEXTS: usize = 64;

/// What is to be done with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tasks {
    /// `caption`: captions are written.
    pub caption: bool,
    /// `filter`: the captions, and the texts that were found, are judged.
    pub filter: bool,
    /// `answer`: the questions are answered.
    pub answer: bool,
    /// `embed`: the image, and the texts that were found, are embedded.
    pub embed: bool,
}

impl Default for Tasks {
    fn default() -> Self {
        Self { caption: true, ..Self::NONE }
    }
}

/// Says where a task is noted.
type Switch = fn(&mut Tasks) -> &mut bool;

/// Names that `tasks` may have, each with its switch.
const TASKS: [(&str, Switch); 4] = [
    ("caption", |tasks| &mut tasks.caption),
    ("filter", |tasks| &mut tasks.filter),
    ("answer", |tasks| &mut tasks.answer),
    ("embed", |tasks| &mut tasks.embed),
];

impl Tasks {
    /// Nothing.
    pub const NONE: Self = Self { caption: false, filter: false, answer: false, embed: false };

    /// Their names.
    pub(super) fn names(mut self) -> Vec<&'static str> {
        TASKS.into_iter().filter(|(_, switch)| *switch(&mut self)).map(|(name, _)| name).collect()
    }
}

/// Reads the tasks of a request; `place` is where it stands, for errors.
pub(super) fn tasks(fields: &Fields<'_>, place: &str) -> Result<Tasks, ParseError> {
    let known = TASKS.map(|(name, _)| name);
    let refuse = |what: String| Err(ParseError::Params(format!("{place}tasks{what}; known are {}", known.join(", "))));
    let list = match fields.get("tasks") {
        Some(Json::List(list)) => list,
        Some(other) => return Err(wrong(place, "tasks", "a list of names", other, ParseError::Params)),
        None => return Ok(Tasks::default()),
    };
    let mut tasks = Tasks::NONE;
    for (at, name) in list.iter().enumerate() {
        let Json::Text(name) = name else {
            return refuse(format!("[{at}]: expected a name, found {}", name.kind()));
        };
        let Some((_, switch)) = TASKS.iter().find(|(known, _)| known == name) else {
            let hint = nearest(name, known.into_iter());
            let hint = hint.map_or_else(String::new, |near| format!(" (did you mean {near}?)"));
            return refuse(format!("[{at}]: unknown task {}{hint}", quote(name)));
        };
        *switch(&mut tasks) = true;
    }
    if tasks == Tasks::NONE {
        return refuse(": the list is empty".into());
    }
    Ok(tasks)
}

/// The texts that were found with the image.
pub(super) fn texts(fields: &Fields<'_>, place: &str, tasks: Tasks) -> Result<Vec<String>, ParseError> {
    let texts = several(fields, place, "text", "texts")?;
    if !(texts.is_empty() || tasks.filter || tasks.embed) {
        return refuse(place, "text: has no effect without the tasks `filter` or `embed`");
    }
    if texts.is_empty() && tasks.filter && !tasks.caption {
        return refuse(place, "text: missing; the task `filter` without `caption` judges texts");
    }
    Ok(texts)
}

/// The questions about the image.
pub(super) fn questions(fields: &Fields<'_>, place: &str, tasks: Tasks) -> Result<Vec<String>, ParseError> {
    let questions = several(fields, place, "questions", "questions")?;
    match (questions.is_empty(), tasks.answer) {
        (false, false) => refuse(place, "questions: has no effect without the task `answer`"),
        (true, true) => refuse(place, "questions: missing; the task `answer` answers them"),
        _ => Ok(questions),
    }
}

/// Refuses a prompt or parameters of what is not generated.
pub(super) fn check_effect(
    place: &str,
    tasks: Tasks,
    prompt: Option<&str>,
    params: &RequestParams,
) -> Result<(), ParseError> {
    if tasks.caption {
        return Ok(());
    }
    if prompt.is_some() {
        return refuse(place, "prompt: has no effect without the task `caption`");
    }
    if tasks.answer && params.num_return_sequences.is_some() {
        return refuse(place, "params.num_return_sequences: has no effect without the task `caption`");
    }
    if !tasks.answer && *params != RequestParams::default() {
        return refuse(place, "params: has no effect without the tasks `caption` or `answer`");
    }
    Ok(())
}

/// One text, or a list of them.
fn several(fields: &Fields<'_>, place: &str, name: &str, them: &str) -> Result<Vec<String>, ParseError> {
    let one = |name: String, text: &Json<'_>| match text {
        Json::Text(text) if text.len() > MAX_PROMPT_BYTES => {
            refuse(place, &format!("{name}: {} bytes; at most {MAX_PROMPT_BYTES} are allowed", text.len()))
        }
        Json::Text(text) => Ok(text.clone().into_owned()),
        other => Err(wrong(place, &name, "a string", other, ParseError::Params)),
    };
    match fields.get(name) {
        None => Ok(Vec::new()),
        Some(text @ Json::Text(_)) => Ok(vec![one(name.to_owned(), text)?]),
        Some(Json::List(list)) if list.len() > MAX_TEXTS => {
            refuse(place, &format!("{name}: {} {them}; at most {MAX_TEXTS} are allowed", list.len()))
        }
        Some(Json::List(list)) => {
            list.iter().enumerate().map(|(at, text)| one(format!("{name}[{at}]"), text)).collect()
        }
        Some(other) => Err(wrong(place, name, "a string or a list of them", other, ParseError::Params)),
    }
}

fn refuse<T>(place: &str, why: &str) -> Result<T, ParseError> {
    Err(ParseError::Params(format!("{place}{why}")))
}
