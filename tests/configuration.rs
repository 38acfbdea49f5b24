//! Promises of the configuration: what wins, what is refused and how, and what the command prints.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use blipstream::caption::Backend;
use blipstream::command::config::{ConfigAction, ConfigArgs, print_json, print_text, run};
use blipstream::config::{ConfigErrors, ConfigOptions, Keys, Kind, Loaded, Origin};
use blipstream::settings::{Input, OWNED_OPTIONS, SecurityProtocol, Settings};
use bytesize::ByteSize;
use clap::Parser;

/// One configuration: files, environment and flags, in a folder of its own.
#[derive(Default)]
struct Case {
    folder: Option<tempfile::TempDir>,
    options: ConfigOptions,
    environment: Vec<(OsString, OsString)>,
}

impl Case {
    fn new() -> Self {
        Self::default()
    }

    fn write(&mut self, name: &str, text: &str) -> PathBuf {
        let folder = self.folder.get_or_insert_with(|| tempfile::tempdir().unwrap());
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn file(mut self, name: &str, text: &str) -> Self {
        let path = self.write(name, text);
        self.options.files.push(path);
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn set(mut self, assignment: &str) -> Self {
        self.options.set.push(assignment.into());
        self
    }

    fn load(&self) -> Result<Loaded, ConfigErrors> {
        self.options.load_with(self.environment.clone())
    }

    fn settings(&self) -> Settings {
        self.load().unwrap().settings
    }

    /// The errors as `key: message`.
    fn errors(&self) -> Vec<String> {
        let errors = self.load().unwrap_err();
        errors.all().iter().map(|error| format!("{}: {}", error.key, error.message)).collect()
    }

    fn only_error(&self) -> String {
        let errors = self.errors();
        assert_eq!(errors.len(), 1, "{errors:#?}");
        errors.into_iter().next().unwrap()
    }
}

#[test]
fn without_any_source_the_settings_are_the_defaults_and_valid() {
    let loaded = Case::new().env("PATH", "/bin").env("BLIPSTREAM_PORT", "tcp://10.0.0.1:9464").load().unwrap();
    assert_eq!(loaded.settings, Settings::default());
    assert_eq!(loaded.origin("flow.max_rows"), &Origin::Default);
    assert_eq!(loaded.warnings(), Vec::<String>::new());
}

#[test]
fn flags_win_over_environment_over_later_files_over_earlier_files_over_defaults() {
    let case = Case::new()
        .file("one.toml", "[fetch]\nconcurrency = 1\nper_host = 1\nattempts = 1\nmax_redirects = 1\n")
        .file("two.toml", "[fetch]\n# a comment\nconcurrency = 2\nper_host = 2\nattempts = 2\n")
        .env("BLIPSTREAM_FETCH__CONCURRENCY", "3")
        .env("BLIPSTREAM_FETCH__PER_HOST", "3")
        .set("fetch.concurrency=4")
        .set("fetch.concurrency=5");
    let loaded = case.load().unwrap();
    let fetch = &loaded.settings.fetch;
    assert_eq!((fetch.concurrency, fetch.per_host, fetch.attempts, fetch.max_redirects), (5, 3, 2, 1));
    assert_eq!(fetch.max_body, ByteSize::mib(20));

    let file = |index: usize, line| Origin::File { path: case.options.files[index].clone(), line: Some(line) };
    assert_eq!(loaded.origin("fetch.concurrency"), &Origin::Flag);
    assert_eq!(loaded.origin("fetch.per_host"), &Origin::Environment("BLIPSTREAM_FETCH__PER_HOST".into()));
    assert_eq!(loaded.origin("fetch.attempts"), &file(1, 5));
    assert_eq!(loaded.origin("fetch.max_redirects"), &file(0, 5));
    assert_eq!(loaded.origin("fetch.max_body"), &Origin::Default);
}

#[test]
fn durations_and_sizes_are_written_for_people() {
    let file = "[batch]\nlinger = \"250ms\"\n[flow]\nmax_message_bytes = \"48MiB\"\nmax_image_bytes = 1000000\n";
    let settings = Case::new()
        .file("a.toml", file)
        .env("BLIPSTREAM_FLOW__DRAIN_TIMEOUT", "1m 30s")
        .set("kafka.prefetch=500kB")
        .settings();
    assert_eq!(settings.batch.linger, Duration::from_millis(250));
    assert_eq!(settings.flow.drain_timeout, Duration::from_secs(90));
    assert_eq!(settings.flow.max_message_bytes, ByteSize::mib(48));
    assert_eq!(settings.flow.max_image_bytes, ByteSize::b(1_000_000));
    assert_eq!(settings.kafka.prefetch, ByteSize::kb(500));
}

#[test]
fn text_from_environment_and_flags_stays_text_where_a_text_is_wanted() {
    let settings = Case::new()
        .env("BLIPSTREAM_KAFKA__GROUP_ID", "123")
        .env("BLIPSTREAM_OUTPUT__WORKER", "true")
        .env("BLIPSTREAM_OUTPUT__FULL_URL", "true")
        .set("model.prompt=a photo of = \"x\"")
        .settings();
    assert_eq!(settings.kafka.group_id, "123");
    assert_eq!(settings.output.worker.as_deref(), Some("true"));
    assert!(settings.output.full_url);
    assert_eq!(settings.model.prompt.as_deref(), Some("a photo of = \"x\""));
}

#[test]
fn lists_may_be_written_as_toml_or_with_commas() {
    let input = |topic: &str, weight| Input { topic: topic.into(), weight };
    let inputs = |case: Case| case.settings().kafka.inputs;
    let variable = "BLIPSTREAM_KAFKA__INPUTS";
    assert_eq!(inputs(Case::new().env(variable, "live, bulk")), [input("live", 1), input("bulk", 1)]);
    assert_eq!(
        inputs(Case::new().env(variable, r#"[{topic = "live", weight = 5}, "bulk"]"#)),
        [input("live", 5), input("bulk", 1)]
    );
    assert_eq!(inputs(Case::new().file("a.toml", "kafka.inputs = [\"live\"]\n")), [input("live", 1)]);
    assert_eq!(Case::new().set("model.devices=cuda:0,cuda:1").settings().model.devices, ["cuda:0", "cuda:1"]);
    let networks = Case::new().env("BLIPSTREAM_FETCH__ALLOW_NETWORKS", "10.1.0.0/16,fd00::/8").settings();
    assert_eq!(networks.fetch.allow_networks.len(), 2);
}

#[test]
fn an_empty_variable_is_not_set() {
    let loaded = Case::new().env("BLIPSTREAM_MODEL__PROMPT", "").env("BLIPSTREAM_FLOW__MAX_ROWS", "").load().unwrap();
    assert_eq!(loaded.settings, Settings::default());
}

#[test]
fn every_key_can_be_set_by_its_variable() {
    for key in Keys::new().all().iter().filter(|key| key.kind != Kind::Map) {
        let name = key.variable();
        let named = |loaded: Loaded| loaded.origin(&key.path).clone();
        match Case::new().env(&name, "?").load().map(named) {
            Ok(origin) => assert_eq!(origin, Origin::Environment(name)),
            Err(errors) => assert!(errors.all().iter().all(|error| error.key == key.path), "{errors}"),
        }
    }
}

#[test]
fn free_options_of_librdkafka_merge_entry_by_entry() {
    let case = Case::new()
        .file("a.toml", "[kafka.options]\n\"fetch.wait.max.ms\" = 100\nsocket.keepalive.enable = true\n")
        .env("BLIPSTREAM_KAFKA__OPTIONS__CLIENT_RACK", "eu-1a")
        .set("kafka.options.fetch.wait.max.ms=50");
    let loaded = case.load().unwrap();
    let expected = [("client.rack", "eu-1a"), ("fetch.wait.max.ms", "50"), ("socket.keepalive.enable", "true")];
    let expected: BTreeMap<String, String> = expected.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    assert_eq!(loaded.settings.kafka.options, expected);
    assert_eq!(loaded.origin("kafka.options.fetch.wait.max.ms"), &Origin::Flag);
}

#[test]
fn options_that_the_promise_of_delivery_depends_on_are_refused() {
    let errors = Case::new()
        .file("a.toml", "[kafka.options]\n\"group.id\" = \"x\"\nacks = 1\n\"sasl.password\" = \"hunter2\"\n")
        .set("kafka.options={\"enable.auto.commit\" = true}")
        .errors();
    assert_eq!(errors.len(), 4, "{errors:#?}");
    assert!(errors.iter().all(|error| error.contains("blipstream sets this option")));
    assert!(errors.iter().any(|error| error.starts_with("kafka.options.group.id") && error.contains("kafka.group_id")));
}

#[test]
fn every_option_that_the_client_owns_is_refused_already_by_the_configuration() {
    assert!(!OWNED_OPTIONS.is_empty());
    for (pattern, reason) in OWNED_OPTIONS {
        let option = pattern.replace('*', "x");
        let error = Case::new().set(&format!("kafka.options.{option}=x")).only_error();
        assert!(error.contains("blipstream sets this option") && error.contains(reason), "{error}");
    }
}

#[test]
fn all_errors_are_reported_at_once_each_with_key_and_origin() {
    let file = "[flow]\nmax_rows = \"many\"\npause_at = 0.3\n\n[kafak]\ngroup_id = \"x\"\n[batch]\nlinger = \"soon\"\n";
    let case = Case::new()
        .file("a.toml", file)
        .env("BLIPSTREAM_FETCH__ATEMPTS", "3")
        .env("BLIPSTREAM_FLOW__MAX_IMAGE_BYTES", "64 bananas")
        .set("log.format=xml")
        .set("model.max_new_tokens=0");
    let text = case.load().unwrap_err().to_string();
    let file = case.options.files[0].display();
    let expected = [
        "the configuration has 8 errors:",
        &format!("flow.max_rows ({file}:2): invalid type: string \"many\", expected usize"),
        &format!("flow.pause_at ({file}:3): flow.resume_at (0.4) must be below flow.pause_at (0.3)"),
        &format!("kafak.group_id ({file}:6): there is no such key; did you mean kafka.group_id?"),
        &format!("batch.linger ({file}:8): \"soon\" is no duration; write it like \"250ms\""),
        "fetch.atempts (BLIPSTREAM_FETCH__ATEMPTS): there is no such key; did you mean BLIPSTREAM_FETCH__ATTEMPTS?",
        "flow.max_image_bytes (BLIPSTREAM_FLOW__MAX_IMAGE_BYTES): \"64 bananas\" is no size; write it like \"64MiB\"",
        "log.format (--set): unknown variant `xml`, expected one of `auto`, `human`, `json`",
        "model.max_new_tokens (--set): must be at least 1",
    ];
    for expected in expected {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
}

#[test]
fn a_broken_file_is_named_with_its_line_and_does_not_hide_other_errors() {
    let errors = Case::new()
        .file("a.toml", "[flow]\nmax_rows = = 3\n")
        .file("b.toml", "[flow]\nmax_row = 3\n")
        .env("BLIPSTREAM_LOG__FORMAT", "xml");
    let text = errors.load().unwrap_err().to_string();
    assert!(text.contains("a.toml:2"), "{text}");
    assert!(text.contains("did you mean flow.max_rows?"), "{text}");
    assert!(text.contains("BLIPSTREAM_LOG__FORMAT"), "{text}");

    let mut missing = Case::new();
    missing.options.files.push("/nonexistent/blipstream.toml".into());
    assert!(missing.load().unwrap_err().to_string().contains("/nonexistent/blipstream.toml: cannot read"));
}

#[test]
fn unknown_keys_are_refused_in_every_layer() {
    for (case, hint) in [
        (Case::new().file("a.toml", "max_rows = 3\n"), "flow.max_rows"),
        (Case::new().file("a.toml", "[flow]\nmax_body = \"1MiB\"\n"), "fetch.max_body"),
        (Case::new().file("a.toml", "[weather]\nsunshine = 1\n"), "`blipstream config` lists"),
        (Case::new().file("a.toml", "[weather]\n"), "there is no such key"),
        (Case::new().file("a.toml", "flow = 3\n"), "write [flow]"),
        (Case::new().env("BLIPSTREAM_KAFKA__BOOTSTRAP_SERVER", "x"), "BLIPSTREAM_KAFKA__BOOTSTRAP_SERVERS"),
        (Case::new().env("BLIPSTREAM_FLOW_MAX_ROWS", "3"), "BLIPSTREAM_FLOW__MAX_ROWS"),
        (Case::new().set("kafka.group=x"), "kafka.group_id"),
        (Case::new().set("kafka.group_id"), "write --set section.key=value"),
        (Case::new().set("flow.max_rows.x=3"), "there is no such key"),
    ] {
        let error = case.only_error();
        assert!(error.contains(hint), "no {hint:?} in {error:?}");
    }
}

#[test]
fn secrets_come_from_files_without_their_line_end() {
    let mut case = Case::new();
    let password = case.write("password", "hunter2\n");
    let token = case.write("token", "abc123\r\n");
    let case = case
        .set(&format!("kafka.sasl_password_file={}", password.display()))
        .set(&format!("admin.token_file={}", token.display()))
        .set("kafka.security_protocol=sasl_ssl")
        .set("kafka.sasl_mechanism=PLAIN")
        .set("kafka.sasl_username=me");
    let loaded = case.load().unwrap();
    assert_eq!(loaded.settings.kafka.sasl_password.as_deref(), Some("hunter2"));
    assert_eq!(loaded.settings.admin.token.as_deref(), Some("abc123"));
    assert_eq!(loaded.origin("admin.token"), &Origin::File { path: token, line: None });

    let empty = Case::new().set("admin.token_file=/dev/null").set("admin.listen=0.0.0.0:1").only_error();
    assert!(empty.contains("admin.token_file: /dev/null is empty"), "{empty}");
    let missing = Case::new().set("admin.token_file=/nonexistent/token").only_error();
    assert!(missing.contains("cannot read /nonexistent/token"), "{missing}");
    let both = Case::new().set("admin.token_file=/dev/null").env("BLIPSTREAM_ADMIN__TOKEN", "hunter2").only_error();
    assert!(both.contains("admin.token is set too (BLIPSTREAM_ADMIN__TOKEN)"), "{both}");
}

#[test]
fn secrets_are_never_shown() {
    let secret = "hunter2";
    let good = Case::new()
        .set(&format!("admin.token={secret}"))
        .set(&format!("kafka.options.ssl.key.password={secret}"))
        .set("kafka.security_protocol=sasl_ssl")
        .set("kafka.sasl_mechanism=PLAIN")
        .set("kafka.sasl_username=me")
        .env("BLIPSTREAM_KAFKA__SASL_PASSWORD", secret);
    let loaded = good.load().unwrap();
    let mut shown = format!("{loaded:?}");
    let mut out = Vec::new();
    print_text(&loaded.entries(), &mut out).unwrap();
    print_json(&loaded.entries(), &mut out).unwrap();
    write!(shown, "{}", String::from_utf8(out).unwrap()).unwrap();
    assert!(!shown.contains(secret), "{shown}");
    assert_eq!(shown.matches("***").count(), 9);

    let bad = Case::new()
        .file("a.toml", "[admin]\ntoken = [\"hunter2\"]\n[kafka.options]\n\"ssl.key.password\" = [\"hunter2\"]\n")
        .env("BLIPSTREAM_ADMIN__TOKE", secret)
        .env("BLIPSTREAM_KAFKA__SASL_PASSWORD", secret)
        .set("hunter2")
        .set("kafka.sasl_pasword=hunter2");
    let errors = bad.load().unwrap_err();
    assert_eq!(errors.all().len(), 6, "{errors}");
    assert!(!errors.to_string().contains(secret), "{errors}");
    let token = Case::new().set("admin.token=hunter2 with a space").only_error();
    assert!(!token.contains(secret), "{token}");
}

#[test]
fn values_out_of_range_are_refused() {
    for (assignment, expected) in [
        ("flow.pause_at=1.5", "from 0 to 1, not 1.5"),
        ("decode.jpeg_reducing_gap=0.5", "must be 0 (JPEGs are decoded whole) or from 1 to 64, not 0.5"),
        ("flow.resume_at=0.8", "must be below flow.pause_at"),
        ("flow.resume_at=-0.1", "from 0 to 1"),
        ("flow.max_span=0", "at least 1"),
        ("flow.max_rows=0", "at least 1"),
        ("flow.max_rows=-1", "invalid value: integer `-1`"),
        ("flow.max_images=0", "at least 1"),
        ("flow.max_image_bytes=0", "at least 1"),
        ("fetch.concurrency=0", "at least 1"),
        ("fetch.attempts=0", "at least 1"),
        ("fetch.connect_timeout=0s", "longer than 0"),
        ("fetch.backoff=1m", "must not be longer than fetch.max_backoff"),
        ("fetch.user_agent=a\nb", "printable ASCII"),
        ("fetch.allow_networks=10.0.0.0/99", "invalid"),
        ("fetch.file_roots=/nonexistent", "cannot read /nonexistent"),
        ("fetch.file_roots=/dev/null", "is no folder"),
        ("fetch.stores=https://bucket/", "no address of a bucket"),
        ("fetch.stores=s3://photos/../private", "an empty part"),
        ("fetch.store_options.aws_secret_access_key=x", "may not be set here"),
        ("fetch.store_options.aws_endpiont=http://m:9000", "aws_endpoint, "),
        ("decode.max_pixels=0", "at least 1"),
        ("model.replicas=0", "at least 1"),
        ("model.min_new_tokens=21", "must not be over model.max_new_tokens"),
        ("model.max_new_tokens=201", "must not be over model.max_new_tokens_limit"),
        ("model.max_new_tokens_limit=10", "must not be over model.max_new_tokens_limit"),
        ("model.dtype=f64", "one of auto, f32, bf16, f16"),
        ("model.devices=gpu", "\"gpu\" is no device"),
        ("model.devices=cpu,cpu", "twice"),
        ("model.devices=auto,cpu", "stand alone"),
        ("model.devices=cuda:0,all", "stand alone"),
        ("model.devices=", "at least one device"),
        ("model.hub_endpoint=ftp://x", "http or https"),
        ("model.hub_token_file=/", "is a folder"),
        ("batch.queue=0", "at least 1"),
        ("output.flag_terms_file=/nonexistent", "cannot read"),
        ("log.filter=a=b=c", "is no filter"),
        ("admin.listen=localhost", "invalid"),
        ("kafka.bootstrap_servers=a:9092,,b", "must be a list like"),
        ("kafka.bootstrap_servers=http://a:9092", "must be a list like"),
        ("kafka.bootstrap_servers=a:99999", "must be a list like"),
        ("kafka.prefetch=4GiB", "must be from"),
        ("kafka.max_message_size=1B", "must be from"),
        ("kafka.session_timeout=10m", "must not be longer than kafka.max_poll_interval"),
        ("kafka.max_poll_interval=2days", "at most 1day"),
    ] {
        let error = Case::new().set(assignment).only_error();
        assert!(error.contains(expected), "no {expected:?} in {error:?} of {assignment:?}");
        let key = assignment.split('=').next().unwrap();
        assert!(error.starts_with(&format!("{key}: ")), "{error:?} blames another key than {key}");
    }
    assert!(Case::new().set("flow.pause_at=nan").load().is_err());
    assert!(Case::new().set("decode.jpeg_reducing_gap=nan").load().is_err());
}

#[test]
fn every_backend_that_the_captioner_knows_can_be_configured_and_no_other() {
    let known: Vec<_> = Backend::all().map(|backend| backend.to_string()).collect();
    for name in &known {
        assert!(Case::new().set(&format!("model.backend={name}")).load().is_ok(), "{name}");
    }
    let error = Case::new().set("model.backend=mkl").only_error();
    let listed = error.split("one of ").nth(1).unwrap().split(", not ").next().unwrap();
    let listed: BTreeSet<_> = listed.split(", ").collect();
    assert_eq!(listed, known.iter().map(String::as_str).collect());
}

#[test]
fn topics_must_be_valid_distinct_and_free_of_loops() {
    for (assignment, expected) in [
        ("kafka.inputs=", "at least one topic"),
        ("kafka.inputs=a,b,a", "a is named twice"),
        ("kafka.inputs=[{topic = \"a\", weight = 0}]", "the weight of a must be at least 1"),
        ("kafka.inputs=[{topic = \"a\", wieght = 1}]", "unknown field `wieght`"),
        ("kafka.inputs=a b", "no topic name"),
        ("kafka.inputs=..", "no topic name"),
        ("kafka.captions_topic=blipstream.requests", "also an input"),
        ("kafka.dead_letter_topic=blipstream.requests", "also an input"),
        ("kafka.dead_letter_topic=blipstream.captions", "a topic each"),
    ] {
        let error = Case::new().set(assignment).only_error();
        assert!(error.contains(expected), "no {expected:?} in {error:?}");
    }
    assert!(Case::new().set(&format!("kafka.captions_topic={}", "a".repeat(250))).only_error().contains("249"));
}

#[test]
fn security_settings_come_complete_or_not_at_all() {
    let errors = Case::new().set("kafka.security_protocol=sasl_ssl").errors();
    let missing = |key: &str| errors.iter().any(|error| error.contains(&format!("needs kafka.{key}")));
    assert!(missing("sasl_mechanism") && missing("sasl_username") && missing("sasl_password"), "{errors:?}");
    assert!(Case::new().set("kafka.sasl_username=me").only_error().contains("has no effect"));
    assert!(Case::new().set("kafka.ssl_ca_file=/dev/null").only_error().contains("has no effect"));
    let sasl = |mechanism: &str| {
        Case::new()
            .set("kafka.security_protocol=sasl_plaintext")
            .set("kafka.sasl_username=me")
            .set("kafka.sasl_password=x")
            .set(&format!("kafka.sasl_mechanism={mechanism}"))
    };
    assert!(sasl("GSSAPI").only_error().contains("SCRAM-SHA-512"));
    assert_eq!(sasl("SCRAM-SHA-256").settings().kafka.security_protocol, SecurityProtocol::SaslPlaintext);
    let tls = || Case::new().set("kafka.security_protocol=ssl");
    assert!(tls().set("kafka.ssl_key_file=/dev/null").only_error().contains("needs both"));
    assert!(tls().set("kafka.ssl_ca_file=/nonexistent").only_error().contains("cannot read /nonexistent"));
}

#[test]
fn the_admin_port_opens_to_other_machines_only_with_a_token() {
    for listen in ["127.0.0.1:0", "[::1]:9464"] {
        assert!(Case::new().set(&format!("admin.listen={listen}")).load().is_ok());
    }
    let refused = Case::new().set("admin.listen=[::]:9464").only_error();
    assert!(refused.starts_with("admin.listen: ") && refused.contains("admin.token_file"), "{refused}");
    assert!(Case::new().set("admin.listen=0.0.0.0:9464").set("admin.token=abc").load().is_ok());
}

#[test]
fn an_item_larger_than_its_pool_is_allowed_with_a_warning() {
    let small = ["flow.max_message_bytes=1MiB", "flow.max_image_bytes=1MiB", "endpoint.listen=127.0.0.1:0"];
    let warnings = small.into_iter().fold(Case::new(), Case::set).load().unwrap().warnings();
    let of = ["kafka.max_message_size", "fetch.max_body", "endpoint.max_body"];
    assert!(warnings.len() == 3 && warnings.iter().zip(of).all(|(text, of)| text.contains(of)), "{warnings:?}");
}

#[test]
fn a_goal_for_a_size_that_is_given_is_a_warning() {
    let sized = Case::new().set("batch.max_size=8").set("batch.latency_goal=250ms").load().unwrap();
    let [warning] = &sized.warnings()[..] else { panic!("{:?}", sized.warnings()) };
    assert!(warning.contains("batch.latency_goal has no effect"), "{warning}");
    assert!(Case::new().set("batch.latency_goal=250ms").load().unwrap().warnings().is_empty());
}

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    args: ConfigArgs,
}

fn printed(arguments: &[&str]) -> String {
    let args = Cli::parse_from([&["config"], arguments].concat()).args;
    let mut out = Vec::new();
    run(&args, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn the_command_prints_every_value_with_its_origin_as_a_file_that_means_the_same() {
    let text = printed(&["--set", "fetch.concurrency=7", "--set", "kafka.options.client.rack=eu-1a"]);
    let line = |start: &str, origin: &str| text.lines().any(|line| line.starts_with(start) && line.ends_with(origin));
    assert!(line("concurrency = 7 ", " # --set"), "{text}");
    assert!(line("options.\"client.rack\" = \"eu-1a\" ", " # --set"), "{text}");
    assert!(line("max_image_bytes = \"512MiB\" ", " # default"), "{text}");
    assert!(line("# sasl_username is not set ", " # default"), "{text}");
    let settings = Case::new().file("printed.toml", &text).settings();
    assert_eq!(settings, Case::new().set("fetch.concurrency=7").set("kafka.options.client.rack=eu-1a").settings());
}

#[test]
fn the_command_prints_json_and_the_schema() {
    let json: serde_json::Value = serde_json::from_str(&printed(&["--json", "--set", "fetch.concurrency=7"])).unwrap();
    let concurrency = &json["fetch.concurrency"];
    assert_eq!(*concurrency, serde_json::json!({"value": 7, "origin": {"kind": "flag", "name": "--set"}}));
    assert!(json["kafka.sasl_username"]["value"].is_null());
    let schema: serde_json::Value = serde_json::from_str(&printed(&["schema"])).unwrap();
    let properties = schema["properties"].as_object().unwrap();
    assert!(properties.contains_key("kafka") && properties.contains_key("log"));
    assert_eq!(Cli::parse_from(["config", "schema"]).args.action, Some(ConfigAction::Schema));
}

#[test]
fn the_command_refuses_a_wrong_configuration_and_prints_nothing() {
    let args = Cli::parse_from(["config", "--set", "flow.max_rows=0"]).args;
    let mut out = Vec::new();
    let error = run(&args, &mut out).unwrap_err();
    assert!(error.to_string().contains("flow.max_rows (--set): must be at least 1"), "{error}");
    assert!(out.is_empty());
}
