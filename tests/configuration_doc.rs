//! `docs/CONFIGURATION.md` against the code: its settings, defaults, examples, errors and metrics.
#![cfg(all(feature = "serde", feature = "tls", feature = "lz4"))]

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, from_value, json, to_value};
use tower_memcached::{
    Client, ClientBuilder, CompressionSettings, Config, DiscoveryConfig, DiscoverySource,
    EjectionCause, Error, ExecutorConfig, GroupSettings, LoadLimits, NodeConfig,
    ReadThroughSettings, TlsSettings,
};

const GUIDE: &str = include_str!("../docs/CONFIGURATION.md");
const TELEMETRY: &str = include_str!("../src/telemetry.rs");
const THIS_TEST: &str = include_str!("configuration_doc.rs");

/// By their paths, the default of every setting; `None` for what has to be written.
type Defaults = BTreeMap<String, Option<Value>>;

fn json_of(settings: impl Serialize) -> Value {
    to_value(settings).expect("settings are data")
}

/// Every setting below `path`. What is a table in some configurations only is one setting.
fn collect(path: &str, settings: &Value, into: &mut Defaults) {
    match settings {
        Value::Object(fields) if !fields.is_empty() => {
            for (field, setting) in fields {
                let dot = if path.is_empty() { "" } else { "." };
                collect(&format!("{path}{dot}{field}"), setting, into);
            }
        }
        setting => {
            into.insert(path.to_owned(), Some(setting.clone()));
        }
    }
}

fn defaults() -> Defaults {
    let mut all = Defaults::new();
    collect("", &json_of(Config::default()), &mut all);
    collect(
        "databases.<name>",
        &json_of(LoadLimits::default()),
        &mut all,
    );
    collect(
        "groups.<name>",
        &json_of(GroupSettings::default()),
        &mut all,
    );
    let node: NodeConfig = from_value(json!({ "address": "a" })).expect("a node");
    collect("nodes[]", &json_of(node), &mut all);
    let executor: ExecutorConfig = from_value(json!({ "kind": "dedicated" })).expect("an executor");
    collect("executor", &json_of(executor), &mut all);
    collect("tls", &json_of(TlsSettings::default()), &mut all);
    let compression = json_of(CompressionSettings::default());
    collect("compression", &compression, &mut all);
    all.insert("compression".to_owned(), Some(Value::Null));
    let source = DiscoverySource::Dns("a".into());
    collect(
        "discovery",
        &json_of(DiscoveryConfig::new(source)),
        &mut all,
    );
    all.remove("discovery.source.dns");
    let required = [
        "nodes[].address",
        "executor.kind",
        "credentials.user",
        "credentials.password",
        "discovery.source",
    ];
    for required in required {
        all.insert(required.to_owned(), None);
    }
    all
}

/// A row of a table, by the names of its columns.
type Row<'a> = BTreeMap<&'a str, &'a str>;

/// The rows of all tables whose first column is called that.
fn rows(first_column: &str) -> Vec<Row<'static>> {
    let cells = |line: &'static str| -> Option<Vec<&'static str>> {
        let line = line.strip_prefix('|')?.strip_suffix('|')?;
        Some(line.split('|').map(str::trim).collect())
    };
    let (mut header, mut rows) = (None, Vec::new());
    for line in GUIDE.lines() {
        match (cells(line), &header) {
            (None, _) => header = None,
            (Some(names), None) => header = Some(names),
            (Some(cells), Some(_)) if cells[0].starts_with("---") => {}
            (Some(cells), Some(names)) if names[0] == first_column => {
                assert_eq!(cells.len(), names.len(), "{line}");
                rows.push(names.iter().copied().zip(cells).collect());
            }
            (Some(_), Some(_)) => {}
        }
    }
    assert!(!rows.is_empty(), "there is no table of {first_column:?}");
    rows
}

/// What a cell begins with, if that is code.
fn code(cell: &str) -> &str {
    let inner = cell.strip_prefix('`').and_then(|rest| rest.split_once('`'));
    inner.unwrap_or_else(|| panic!("no code: {cell}")).0
}

/// What a cell says that a default is: TOML, `none`, or `required`.
fn documented_default(cell: &str) -> Option<Value> {
    if cell.starts_with("required") {
        return None;
    }
    if cell.starts_with("none") {
        return Some(Value::Null);
    }
    let table: toml::Table = format!("it = {}", code(cell)).parse().expect(cell);
    Some(json_of(&table["it"]))
}

#[test]
fn every_setting_is_documented_with_its_default() {
    let mut documented = Defaults::new();
    for row in rows("setting") {
        let path = code(row["setting"]).to_owned();
        let default = documented_default(row["default"]);
        let before = documented.insert(path.clone(), default);
        assert!(before.is_none(), "{path} is documented twice");
        let empty = row.iter().find(|(_, cell)| cell.is_empty());
        assert_eq!(empty, None, "{path}");
    }
    let defaults = defaults();
    let absent = |a: &Defaults, b: &Defaults| -> Vec<String> {
        let paths = a.keys().filter(|path| !b.contains_key(*path));
        paths.cloned().collect()
    };
    let none = Vec::<String>::new();
    assert_eq!(absent(&defaults, &documented), none, "not documented");
    assert_eq!(absent(&documented, &defaults), none, "does not exist");
    for (path, default) in defaults {
        assert_eq!(documented[&path], default, "the default of {path}");
    }
}

fn build(config: Config) -> Result<Client, Error> {
    Client::builder().config(config).build()
}

/// The configuration with another value, whatever makes sense there.
fn changed(config: &Value, path: &str) -> Value {
    let candidates = [
        json!(3),
        json!(4),
        json!(0.5),
        json!(true),
        json!(false),
        json!("300ms"),
        json!("3s"),
        json!("cancel"),
        json!("spymemcached"),
        json!("serve"),
        json!("<name>"),
        json!({ "nodelay": false }),
        json!({}),
        json!("lz4"),
        json!("meta"),
        json!(64),
        json!(1 << 4),
        json!({ "kind": "dedicated" }),
        json!({ "user": "user", "password": "password" }),
        json!({ "source": { "dns": "localhost" } }),
        json!([{ "address": "127.0.0.1:1", "weight": 2 }]),
    ];
    let makes_sense = |candidate: Value| {
        let mut config = config.clone();
        let steps = path.split('.');
        let setting = steps.fold(&mut config, |settings, step| &mut settings[step]);
        if *setting == candidate {
            return None;
        }
        *setting = candidate;
        let parsed: Config = from_value(config.clone()).ok()?;
        build(parsed).is_ok().then_some(config)
    };
    let changed = candidates.into_iter().find_map(makes_sense);
    changed.unwrap_or_else(|| panic!("no other value makes sense for {path}"))
}

#[test]
fn what_can_be_changed_at_run_time_is_said_of_each_setting() {
    // Where every setting may have a value. Nothing is sent.
    let config: Config = from_value(json!({
        "nodes": ["127.0.0.1:1"],
        "executor": { "kind": "current" },
        "connections": 2,
        "compression": {},
        "databases": { "<name>": { "rate": 100 } },
        "groups": { "<name>": { "max_in_flight": 10, "rate": 100, "nodes": ["127.0.0.1:2"] } },
    }))
    .expect("a configuration");
    let client = build(config.clone()).expect("a client");
    let now = json_of(config.clone());
    for row in rows("setting") {
        let path = code(row["setting"]);
        // What is in a list, and the parts of these, are changed with the whole of it.
        let whole = match (path.split_once("[]"), path.split_once('.')) {
            (Some((list, _)), _) => list,
            (
                None,
                Some((whole @ ("executor" | "socket" | "tls" | "credentials" | "discovery"), _)),
            ) => whole,
            (None, _) => path,
        };
        let next = from_value(changed(&now, whole)).expect("it made sense");
        let outcome = client.reconfigure(next).map_err(|error| error.to_string());
        match row["at run time"].split([';', ',']).next() {
            Some("yes" | "new nodes") => assert_eq!(outcome, Ok(()), "{path}"),
            Some("no") => {
                let error = outcome.expect_err(path);
                let refused = format!("{whole}: cannot be changed while the client runs");
                assert!(error.contains(&refused), "{path}: {error}");
            }
            other => panic!("{path}: {other:?} is neither yes, no nor new nodes"),
        }
    }
    // The table says so of these.
    let mut without = now.clone();
    without["groups"]["<name>"]["nodes"] = Value::Null;
    let outcome = client.reconfigure(from_value(without).expect("a configuration"));
    let error = outcome.expect_err("it has nodes of its own").to_string();
    assert!(error.contains("groups.<name>.nodes: cannot"), "{error}");
    let mut without = now;
    without["nodes"] = json!([]);
    let nodes = |client: &Client| -> Vec<_> {
        let nodes = client.nodes().into_iter();
        nodes.map(|node| node.node).collect()
    };
    let before = nodes(&client);
    let outcome = client.reconfigure(from_value(without).expect("a configuration"));
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(nodes(&client), before);
    assert!(before.iter().any(|node| &**node == "127.0.0.1:1"));
}

/// The code blocks in that language.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let blocks = GUIDE.split(fence.as_str()).skip(1);
    let blocks: Vec<_> = blocks
        .map(|rest| rest.split_once("```").expect("the block ends").0)
        .collect();
    assert!(!blocks.is_empty(), "there is no {language}");
    blocks
}

#[test]
fn every_example_builds_a_client() {
    for example in blocks("toml") {
        let config: Config = toml::from_str(example).unwrap_or_else(|error| panic!("{error}"));
        let built = build(config);
        assert!(built.is_ok(), "{:?}\n{example}", built.err());
    }
}

/// The guide's example, to the letter.
#[rustfmt::skip]
fn with_the_builder() -> ClientBuilder {
    Client::builder()
        .nodes(["10.0.0.1:11211", "10.0.0.2:11211", "10.0.0.3:11211"])
        .timeout(Duration::from_millis(100))
        .attempt_timeout(Duration::from_millis(30))
        .database("items", LoadLimits::default()
            .max_concurrent(16)
            .rate(300)
            .max_queue(30)
            .max_wait(Duration::from_millis(100)))
        .read_through(ReadThroughSettings::default()
            .database("items")
            .load_timeout(Duration::from_secs(1))
            .stale_if_error(Duration::from_secs(600)))
        .group("sessions", GroupSettings::default()
            .prefix("session:")
            .timeout(Duration::from_millis(20))
            .max_in_flight(200))
}

#[test]
fn the_builder_says_the_same_as_the_file() {
    let config: Config = toml::from_str(blocks("toml")[0]).expect("a configuration");
    let from_file = format!("{:?}", Client::builder().config(config));
    assert_eq!(format!("{:?}", with_the_builder()), from_file);

    let in_guide = blocks("rust")[0].lines();
    let in_guide = in_guide.map(|line| line.trim().trim_start_matches("let client = "));
    let mut here = THIS_TEST.lines().map(str::trim);
    here.find(|line| line.starts_with("fn with_the_builder()"));
    for line in in_guide {
        assert_eq!(Some(line), here.next());
        if line == ".max_in_flight(200))" {
            return;
        }
    }
    panic!("the guide's example ends elsewhere");
}

#[test]
fn errors_say_what_the_guide_says_that_they_do() {
    for row in rows("written") {
        let (written, said) = (code(row["written"]), code(row["the error"]));
        let mut table: toml::Table = written.parse().expect(written);
        if !table.contains_key("nodes") {
            let nodes = vec![toml::Value::from("10.0.0.1:11211")];
            table.insert("nodes".to_owned(), nodes.into());
        }
        let error = match table.try_into::<Config>() {
            Ok(config) => match build(config) {
                Ok(_) => panic!("{written} builds a client"),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        assert!(error.contains(said), "{written}: {error}");
    }
}

/// What the documentation of each metric says, by the metric's name.
fn metrics() -> BTreeMap<&'static str, String> {
    let (mut metrics, mut documentation) = (BTreeMap::new(), String::new());
    for line in TELEMETRY.lines() {
        if let Some(text) = line.strip_prefix("/// ") {
            documentation.push_str(text);
            documentation.push(' ');
            continue;
        }
        if let Some((_, name)) = line.split_once(": &str = \"")
            && line.starts_with("pub const ")
        {
            let name = name.trim_end_matches("\";");
            metrics.insert(name, std::mem::take(&mut documentation));
        }
        documentation.clear();
    }
    metrics
}

fn is_cause(name: &str) -> bool {
    let causes = [
        EjectionCause::Refused,
        EjectionCause::ConnectFailed,
        EjectionCause::Unresponsive,
        EjectionCause::Timeouts,
        EjectionCause::FailureRate,
        EjectionCause::SlowCalls,
        EjectionCause::Probe,
        EjectionCause::Ramp,
        EjectionCause::Journal,
    ];
    causes.iter().any(|cause| cause.name() == name)
}

#[test]
fn every_metric_and_label_exists() {
    let metrics = metrics();
    assert!(metrics.len() > 20, "{metrics:?}");
    // Metrics are always code.
    let named = GUIDE
        .split('`')
        .filter(|code| code.starts_with("memcached_"));
    let mut seen = 0;
    for metric in named {
        seen += 1;
        let (name, labels) = metric.split_once('{').unwrap_or((metric, ""));
        let known = metrics.get(name);
        let documentation = known.unwrap_or_else(|| panic!("there is no metric {name}"));
        let labels = labels.trim_end_matches('}').split(',');
        for label in labels.filter(|label| !label.is_empty()) {
            let (label, value) = label.split_once('=').unwrap_or((label, ""));
            let value = value.trim_matches('"');
            let has = |word: &str| documentation.contains(&format!("`{word}`"));
            assert!(has(label), "{metric}: no label {label}");
            let exists = value.is_empty() || has(value) || (label == "cause" && is_cause(value));
            assert!(exists, "{metric}: {label} is never {value}");
        }
    }
    assert!(seen > 20, "only {seen} were found");
}
