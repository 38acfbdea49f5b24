//! The OpenAPI document, and the program as schemathesis holds it to it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::Server;
use super::serving::Serving;
use super::support::http::http;

#[tokio::test(flavor = "multi_thread")]
async fn what_the_document_names_is_there() {
    let server = Server::start().await;
    let document = server.get("/openapi.json").await.json();
    for (path, route) in document["paths"].as_object().unwrap() {
        let method = if route["post"].is_object() { "POST" } else { "GET" };
        let path = path.replace("{name}", "caption");
        let reply = http(server.at, &format!("{method} {path}"), "").await;
        assert!(![404, 405].contains(&reply.status), "{method} {path}: {reply:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_document_allows_is_answered_as_it_says_and_what_it_forbids_is_refused() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/schemathesis/bin/schemathesis");
    if !tool.exists() {
        assert!(std::env::var_os("CI").is_none(), "schemathesis is not installed: make test-setup");
        eprintln!("skipped: schemathesis is not installed (make test-setup)");
        return;
    }
    // Made-up names are not looked up: nothing of this leaves the machine.
    let more = ["--set", "fetch.attempts=1", "--set", "endpoint.timeout=5s", "--set", "log.filter=warn"];
    let serving = Serving::start(&[&["--model", "demo", "--filter", "demo"], &more[..]].concat()).await;
    let at = serving.at;
    let report = tempfile::tempdir().unwrap();
    let ran = Command::new(tool)
        .args(["run", &format!("http://{at}/openapi.json"), "--seed", "1", "--max-examples", "40", "--workers", "1"])
        .args(["--phases", "examples,coverage,fuzzing", "--checks", "all", "--generation-database", "none"])
        .args([
            "--exclude-checks",
            "positive_data_acceptance,unsupported_method",
            "--no-color",
            "--continue-on-failure",
        ])
        .current_dir(report.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(ran.status.success(), "{text}\n{}", String::from_utf8_lossy(&ran.stderr));
    println!("{}", text.lines().rev().take(25).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n"));
    let value: Value = http(at, "GET /openapi.json", "").await.json();
    assert_eq!(value["openapi"], "3.1.0", "it still answers");
}
