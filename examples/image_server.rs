//! Serves the files of a folder from memory, on a free port of loopback, until its standard input ends: the server of
//! `benches/fetching.py`.
//!
//! ```text
//! cargo run --example image_server -- FOLDER
//! ```

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

type Files = Arc<HashMap<String, Bytes>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("name the folder")?;
    let mut files = HashMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), Bytes::from(std::fs::read(entry.path())?));
    }
    // One thread: the cores are for whoever is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let app = axum::Router::new().route("/{name}", get(file)).with_state(Arc::new(files));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        writeln!(std::io::stdout(), "http://{}", listener.local_addr()?)?;
        let (mut input, mut read) = (tokio::io::stdin(), Vec::new());
        tokio::select! {
            served = async { axum::serve(listener, app).await } => served?,
            _ = input.read_to_end(&mut read) => {}
        }
        Ok(())
    })
}

async fn file(State(files): State<Files>, Path(name): Path<String>) -> Response {
    match files.get(&name) {
        Some(bytes) => ([(header::CONTENT_TYPE, "image/jpeg")], bytes.clone()).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
