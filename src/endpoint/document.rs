//! The OpenAPI document of the endpoint. Tests send what it allows and what it forbids, and hold the answers to it.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Desk;
use crate::message::{MAX_TEXTS, RequestParams};

/// A picture for examples, so that they can be sent as they are: a green field below a blue sky.
const PICTURE: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGElEQVR42mOoP/IJK2KgooRVvzdWREUJABHYaSFdW+BnAAAAAElFTkSuQmCC";

pub(super) async fn document(State(desk): State<Desk>) -> Json<Value> {
    Json(openapi(desk.settings.max_rows, desk.settings.token.is_some()))
}

/// The document for an endpoint that takes so many rows, and asks for a token or not.
pub(super) fn openapi(max_rows: usize, token: bool) -> Value {
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "blipstream",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
            "description": "Image captions while you wait. Images are addresses (http, https, data, and what the worker \
                            is allowed to read beyond them) or base64."
        },
        "paths": {
            "/score": {"post": {
                "operationId": "score",
                "summary": "Captions for the images of a table, or of one request",
                "parameters": [{"name": "records", "in": "query", "description": "Whole records instead of their texts",
                                "schema": {"type": "boolean", "default": false}}],
                "requestBody": {"required": true, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Score"},
                    "example": {"input_data": {"columns": ["image"], "index": [0, 1],
                                               "data": [[PICTURE], [PICTURE]]}}}}},
                "responses": answers(&json!({"description": "A text or an error for each row, in their order",
                    "content": {"application/json": {"schema": {"type": "array", "items": {"$ref": "#/components/schemas/Row"}},
                        "example": [{"text": "a stream in the middle of a forest"}]}}}), "Problem")
            }},
            "/v2": {"get": {
                "operationId": "server", "summary": "What this server is", "security": [],
                "responses": {"200": {"description": "Name and version", "content": {"application/json": {"schema": {
                    "type": "object", "required": ["name", "version", "extensions"],
                    "properties": {"name": {"type": "string"}, "version": {"type": "string"},
                                   "extensions": {"type": "array", "items": {"type": "string"}}}}}}}}
            }},
            "/v2/health/live": {"get": health("live", "Whether the process and its devices are alive")},
            "/v2/health/ready": {"get": health("ready", "Whether requests are answered")},
            "/v2/models/{name}": {"parameters": [name()], "get": {
                "operationId": "model", "summary": "Inputs and outputs of a model",
                "responses": with_errors(json!({"200": {"description": "The model", "content": {"application/json": {
                    "schema": {"$ref": "#/components/schemas/Model"}}}}}), &["401", "403", "404", "503"], "Error")
            }},
            "/v2/models/{name}/ready": {"parameters": [name()], "get": {
                "operationId": "modelReady", "summary": "Whether a model answers",
                "responses": with_errors(json!({"200": {"description": "Yes"}}), &["401", "403", "404", "503"], "Error")
            }},
            "/v2/models/{name}/infer": {"parameters": [name()], "post": {
                "operationId": "infer", "summary": "Inference of the Open Inference Protocol",
                "requestBody": {"required": true, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Infer"}}}},
                "responses": answers(&json!({"description": "The outputs", "content": {"application/json": {
                    "schema": {"$ref": "#/components/schemas/Inferred"}}}}), "Error")
            }}
        },
        "components": {"schemas": schemas(max_rows)}
    });
    if token {
        document["components"]["securitySchemes"] = json!({"token": {"type": "http", "scheme": "bearer"}});
        document["security"] = json!([{"token": []}]);
    }
    document
}

fn name() -> Value {
    json!({"name": "name", "in": "path", "required": true, "description": "What the model does",
           "schema": {"type": "string", "enum": ["caption", "filter", "vqa"]}})
}

fn health(id: &str, summary: &str) -> Value {
    json!({"operationId": id, "summary": summary, "security": [],
           "responses": {"200": {"description": "Yes"}, "503": {"description": "No"}}})
}

/// A good answer, and everything that may come instead of it.
fn answers(good: &Value, error: &str) -> Value {
    let errors = ["400", "401", "403", "404", "408", "413", "429", "500", "502", "503", "504"];
    with_errors(json!({"200": good}), &errors, error)
}

fn with_errors(mut responses: Value, statuses: &[&str], schema: &str) -> Value {
    for &status in statuses {
        let description = match status {
            "400" => "The request cannot be read, or its only row is no good",
            "401" => "The token of endpoint.token is missing or wrong",
            "403" => "A web page asks, and there is no token",
            "404" => "No such model is loaded",
            "408" => "The body did not come in time",
            "413" => "The body is too long",
            "429" => "There is no room now; Retry-After says when to come again",
            "502" => "An image could not be fetched",
            "503" => "The model is being loaded, or the worker is shutting down",
            "504" => "A row took too long",
            _ => "The fault is not the request's",
        };
        responses[status] = match status {
            "401" | "403" => {
                json!({"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}})
            }
            _ => json!({"description": description, "content": {"application/json": {
                "schema": {"$ref": format!("#/components/schemas/{schema}")}}}}),
        };
    }
    responses
}

fn schemas(max_rows: usize) -> Value {
    let params = serde_json::to_value(schemars::schema_for!(RequestParams)).unwrap_or_default();
    let cells = json!({"type": "array", "items": {}});
    let point = json!({"type": "array", "items": {"type": "number"}});
    let several =
        json!({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_TEXTS}]});
    json!({
        "Score": {"oneOf": [
            {"type": "object", "required": ["input_data"], "properties": {"input_data": {
                "type": "object", "required": ["columns", "data"],
                "properties": {
                    "columns": {"type": "array", "uniqueItems": true, "contains": {"const": "image"}, "items": {"type": "string"}},
                    "index": {"type": ["array", "null"], "items": {}, "maxItems": max_rows},
                    "data": {"type": "array", "items": {"oneOf": [cells, {"type": "string"}]}, "maxItems": max_rows}
                }}}},
            {"type": "object", "required": ["image"], "properties": {
                "image": {"type": "string"}, "id": {"type": "string"}, "prompt": {"type": "string"}, "params": params,
                "text": several, "questions": several,
                "tasks": {"type": "array", "items": {"type": "string"}},
                "deadline": {"type": "string", "format": "date-time"}, "meta": {"type": "object"}}}
        ]},
        "Row": {"type": "object", "required": ["text"], "properties": {
            "text": {"type": ["string", "null"]},
            "candidates": {"type": "array", "items": {"type": "object"}},
            "answers": {"type": "array", "items": {"type": "object", "required": ["question", "text"], "properties": {
                "question": {"type": "string"}, "text": {"type": ["string", "null"]}, "logprob": {"type": ["number", "null"]},
                "tokens": {"type": ["integer", "null"]}, "finish": {"type": ["string", "null"]}, "error": {"type": "string"}}}},
            "embeddings": {"type": "object", "required": ["image", "text"], "properties": {
                "image": point, "text": {"type": "array", "items": {"oneOf": [point, {"type": "null"}]}},
                "errors": {"type": "object"}}},
            "error": {"type": "object", "required": ["code", "stage", "message"], "properties": {
                "code": {"type": "string"}, "stage": {"type": "string"}, "message": {"type": "string"}}}}},
        "Problem": {"type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}}},
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
        "Model": {"type": "object", "required": ["name", "platform", "inputs", "outputs"], "properties": {
            "name": {"type": "string"}, "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Described"}},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Described"}}}},
        "Described": {"type": "object", "required": ["name", "datatype", "shape"], "properties": {
            "name": {"type": "string"}, "datatype": {"type": "string"}, "shape": {"type": "array", "items": {"type": "integer"}}}},
        "Infer": {"type": "object", "required": ["inputs"], "properties": {
            "id": {"type": "string"},
            "parameters": params,
            "inputs": {"type": "array", "minItems": 1, "items": {"type": "object",
                "required": ["name", "shape", "datatype", "data"], "properties": {
                    "name": {"enum": ["image", "prompt", "text", "question"]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"const": "BYTES"}, "data": {"type": "array", "items": {"type": "string"}, "maxItems": max_rows}}}},
            "outputs": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {
                "name": {"enum": ["text", "logprob", "itm", "itc", "kept", "error"]}}}}}},
        "Inferred": {"type": "object", "required": ["model_name", "outputs"], "properties": {
            "model_name": {"type": "string"}, "model_version": {"type": "string"}, "id": {"type": "string"},
            "outputs": {"type": "array", "items": {"type": "object", "required": ["name", "datatype", "shape", "data"], "properties": {
                "name": {"type": "string"}, "datatype": {"enum": ["BYTES", "FP32", "BOOL"]},
                "shape": {"type": "array", "items": {"type": "integer"}}, "data": {"type": "array"}}}}}}
    })
}
