//! What is stored, and as what: typed values, and compressed ones.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer as _, ServiceExt as _};
use tower_memcached::testing::Server;
use tower_memcached::{
    Algorithm, CasOutcome, Client, ClientBuilder, Codec, CompressionLayer, CompressionSettings,
    Config, Error, ErrorKind, Format, GroupSettings, Json, Key, LoadGuard, LoadLimits, Loader,
    Operation, Outcome, Payload, Postcard, Protocol, ReadThroughLayer, ReadThroughSettings,
    Request, Response, Sent, Ttl, Typed, Value,
};

use crate::read_through::{BoxError, TTL, exact, secs};
use crate::support::{eventually, in_memory};

const LZ4: u32 = 0x1000_0000;
const ZSTD: u32 = 0x2000_0000;
const JSON: u32 = 0x0010_0000;
const POSTCARD: u32 = 0x0020_0000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct User {
    name: String,
    visits: u64,
}

fn user(name: &str, visits: u64) -> User {
    let name = name.repeat(1000);
    User { name, visits }
}

fn compressing(algorithm: Algorithm) -> CompressionSettings {
    CompressionSettings::default().algorithm(algorithm)
}

fn builder(server: &Server) -> ClientBuilder {
    in_memory(std::slice::from_ref(server)).read_through(exact())
}

/// One that sees what is there.
fn plain(server: &Server) -> Client {
    builder(server).build().unwrap()
}

fn compressed(server: &Server, algorithm: Algorithm) -> Client {
    let builder = builder(server).compression(compressing(algorithm));
    builder.build().unwrap()
}

async fn flags_of(client: &Client, key: &str) -> u32 {
    client.get(key).await.unwrap().unwrap().flags()
}

/// Waits until what is put back behind an answer is there, with such flags.
async fn until_stored(client: &Client, key: &str, flags: u32) -> Value {
    let until = Instant::now() + secs(20);
    loop {
        match client.get(key).await.unwrap() {
            Some(value) if value.flags() == flags => return value,
            other => assert!(Instant::now() < until, "never stored: {other:?}"),
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn every_operation_is_typed_and_compressed() {
    for (algorithm, compression) in [(Algorithm::Lz4, LZ4), (Algorithm::Zstd, ZSTD)] {
        let server = Server::new();
        let (raw, client) = (plain(&server), compressed(&server, algorithm));
        let json: Typed<User, Json> = client.typed(Json::default()).unwrap();
        every_operation(&raw, &json, JSON | compression).await;
        raw.flush_all().await.unwrap();
        let postcard: Typed<User, Postcard> = client.typed(Postcard::default()).unwrap();
        every_operation(&raw, &postcard, POSTCARD | compression).await;
    }
}

async fn every_operation<C: Codec>(raw: &Client, users: &Typed<User, C>, flags: u32) {
    let versions: Vec<User> = (0..7).map(|visits| user("ann", visits)).collect();
    assert_eq!(users.get("ann").await.unwrap(), None);
    assert!(users.gets("ann").await.unwrap().is_none());
    assert!(!users.replace("ann", &versions[0], TTL).await.unwrap());
    assert!(users.add("ann", &versions[0], TTL).await.unwrap());
    assert!(!users.add("ann", &versions[1], TTL).await.unwrap());
    let stored = raw.get("ann").await.unwrap().unwrap();
    assert_eq!(stored.flags(), flags);
    assert!(stored.len() < 200, "{stored:?}");
    assert_eq!(users.get("ann").await.unwrap().as_ref(), Some(&versions[0]));
    users.set("ann", &versions[2], TTL).await.unwrap();
    assert!(users.replace("ann", &versions[3], TTL).await.unwrap());
    let (found, token) = users.gets("ann").await.unwrap().unwrap();
    assert_eq!(found, versions[3]);
    let swapped = users.cas("ann", &versions[4], TTL, token).await.unwrap();
    assert_eq!(swapped, CasOutcome::Stored);
    let swapped = users.cas("ann", &versions[5], TTL, token).await.unwrap();
    assert_eq!(swapped, CasOutcome::Exists);
    assert_eq!(flags_of(raw, "ann").await, flags);
    let touched = users.get_and_touch("ann", Ttl::secs(5)).await.unwrap();
    assert_eq!(touched.as_ref(), Some(&versions[4]));
    let load = async || Ok::<_, Error>(Some(versions[6].clone()));
    let loaded = users.get_or_load("bob", TTL, load).await.unwrap();
    assert_eq!(loaded.as_ref(), Some(&versions[6]));
    until_stored(raw, "bob", flags).await;

    let many = users.get_many(["bob", "nobody", "", "ann"]).await;
    assert!(matches!(&many.outcomes()[0], Outcome::Hit(bob) if *bob == versions[6]));
    assert!(matches!(&many.outcomes()[1], Outcome::Miss));
    assert!(matches!(&many.outcomes()[2], Outcome::Error(error) if error.is_caller_mistake()));
    assert!(matches!(&many.outcomes()[3], Outcome::Hit(ann) if *ann == versions[4]));
    let load = |missing: Vec<Key>| {
        let found = missing.into_iter().map(|key| (key, versions[1].clone()));
        std::future::ready(Ok::<_, Error>(found.collect::<Vec<_>>()))
    };
    let many = users.get_many_or_load(["cid", "ann"], TTL, load).await;
    assert_eq!(many.get("cid").unwrap().value(), Some(&versions[1]));
    assert_eq!(many.get("ann").unwrap().value(), Some(&versions[4]));
    until_stored(raw, "cid", flags).await;
}

#[tokio::test(start_paused = true)]
async fn groups_have_compressions_of_their_own() {
    let server = Server::new();
    let small = compressing(Algorithm::Lz4).threshold(64).lz4_flag(1 << 4);
    let group = |prefix: &str| GroupSettings::default().prefix(prefix);
    let client = builder(&server)
        .compression(compressing(Algorithm::Zstd))
        .group("same", group("s:"))
        .group("own", group("o:").compression(small))
        .group(
            "reads",
            group("r:").compression(compressing(Algorithm::None)),
        )
        .build()
        .unwrap();
    let raw = plain(&server);
    let (short, long) = ("a".repeat(100), "a".repeat(2000));
    for (name, prefix, expected) in [
        ("same", "s:", [0, ZSTD]),
        ("own", "o:", [1 << 4, 1 << 4]),
        ("reads", "r:", [0, 0]),
    ] {
        let group = client.group(name).unwrap();
        let load = async || Ok::<_, Error>(Some(long.clone()));
        group.set("short", &short, TTL).await.unwrap();
        group.get_or_load("long", TTL, load).await.unwrap();
        assert_eq!(
            flags_of(&raw, &format!("{prefix}short")).await,
            expected[0],
            "{name}"
        );
        until_stored(&raw, &format!("{prefix}long"), expected[1]).await;
        for (key, value) in [("short", &short), ("long", &long)] {
            let found = group.get(key).await.unwrap().unwrap();
            assert_eq!(
                (found.flags(), &found),
                (0, &Value::new(value.clone(), 0)),
                "{name}"
            );
        }
    }
    // What others write is read by who writes none of it.
    client.set("r:theirs", &long, TTL).await.unwrap();
    assert_eq!(flags_of(&raw, "r:theirs").await, ZSTD);
    let theirs = client.group("reads").unwrap().get("theirs").await.unwrap();
    assert_eq!(theirs.unwrap(), *long.as_bytes());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_decompressed_is_an_error_and_never_a_value() {
    let server = Server::new();
    let raw = plain(&server);
    let settings = compressing(Algorithm::Zstd).max_decompressed(1 << 20);
    let client = builder(&server).compression(settings).build().unwrap();
    let bomb = compressed(&server, Algorithm::Lz4);
    bomb.set("bomb", vec![0; 2 << 20], TTL).await.unwrap();
    let flagged = |flags| Payload::from("no frame").with_flags(flags);
    raw.set("corrupt", flagged(ZSTD), TTL).await.unwrap();
    raw.set("neither", flagged(LZ4 | ZSTD), TTL).await.unwrap();
    raw.set("good", "good", TTL).await.unwrap();
    for (key, kind) in [
        ("bomb", ErrorKind::ValueTooLarge),
        ("corrupt", ErrorKind::Codec),
        ("neither", ErrorKind::Codec),
    ] {
        let error = client.get(key).await.unwrap_err();
        assert_eq!((error.kind(), error.sent()), (kind, Sent::Yes), "{error}");
        assert_eq!(client.gets(key).await.unwrap_err().kind(), kind);
        let touched = client.get_and_touch(key, TTL).await;
        assert_eq!(touched.unwrap_err().kind(), kind);
    }
    let many = client.get_many(["bomb", "good", "corrupt"]).await;
    let good = many.get("good").unwrap().value();
    assert_eq!(good.unwrap(), "good");
    assert_eq!(many.errors().count(), 2);
    // None of it is held against the node.
    assert_eq!(
        client.nodes()[0].state,
        tower_memcached::BreakerState::Closed
    );
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_decompressed_is_loaded_anew_and_replaced() {
    let server = Server::new();
    let (raw, client) = (plain(&server), compressed(&server, Algorithm::Lz4));
    let long = "a".repeat(2000);
    let corrupt = Payload::from("no frame").with_flags(LZ4);
    let bomb = builder(&server)
        .compression(compressing(Algorithm::Zstd).max_decompressed(32 << 20))
        .build()
        .unwrap();
    raw.set("corrupt", corrupt, TTL).await.unwrap();
    bomb.set("bomb", vec![0; 9 << 20], TTL).await.unwrap();
    for key in ["corrupt", "bomb"] {
        let load = async || Ok::<_, Error>(Some(long.clone()));
        let loaded = client.get_or_load(key, TTL, load).await.unwrap();
        assert_eq!(loaded.unwrap(), *long.as_bytes());
        until_stored(&raw, key, LZ4).await;
        let unasked = async || Err::<Option<String>, _>("asked again");
        let found = client.get_or_load(key, TTL, unasked).await.unwrap();
        assert_eq!(found.unwrap(), *long.as_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_be_compressed_is_neither_appended_to_nor_sent_so() {
    let server = Server::new();
    let client = compressed(&server, Algorithm::Lz4);
    client.set("k", "a".repeat(2000), TTL).await.unwrap();
    client.set("n", "18446744073709551615", TTL).await.unwrap();
    let (before, there) = (server.commands(), server.peek("k"));
    for refused in [
        client.append("k", "b").await,
        client.prepend("k", "b").await,
    ] {
        let error = refused.unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Unsupported, Sent::No)
        );
    }
    let flagged = Payload::from("v").with_flags(ZSTD);
    let error = client.set("k", flagged, TTL).await.unwrap_err();
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::No));
    assert_eq!((server.commands(), server.peek("k")), (before, there));
    // Numbers are not compressed, and count.
    assert_eq!(client.increment("n", 2).await.unwrap(), Some(1));
}

#[tokio::test(start_paused = true)]
async fn another_format_is_an_error_that_names_both() {
    let server = Server::new();
    let client = plain(&server);
    let json: Typed<u32, Json> = client.typed(Json::default()).unwrap();
    let postcard: Typed<u32, Postcard> = client.typed(Postcard::default()).unwrap();
    json.set("k", &7, TTL).await.unwrap();
    let error = postcard.get("k").await.unwrap_err();
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::Yes));
    let said = error.to_string();
    assert!(said.contains("json") && said.contains("postcard"), "{said}");
    client.set("bytes", "7", TTL).await.unwrap();
    let error = json.get("bytes").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Codec);
    let many = json.get_many(["bytes", "k"]).await;
    assert_eq!(many.outcomes()[1].value(), Some(&7));
    assert_eq!(many.errors().count(), 1);
    // Unless it is told that those are JSON, too.
    let format = Json::FORMAT.or_untagged();
    let either = client.typed::<u32, _>(Json::default().with_format(format));
    assert_eq!(either.unwrap().get("bytes").await.unwrap(), Some(7));
    // Postcard does not look behind what it wants.
    let payload = Payload::from(b"\x07\x08").with_flags(POSTCARD);
    client.set("more", payload, TTL).await.unwrap();
    assert_eq!(
        postcard.get("more").await.unwrap_err().kind(),
        ErrorKind::Codec
    );
}

#[tokio::test(start_paused = true)]
async fn values_are_shared_with_clients_that_have_other_flags() {
    let server = Server::new();
    let client = plain(&server);
    // As php-memcached writes it with SERIALIZER_JSON.
    let stored = Payload::from(r#"{"name":"ann","visits":3}"#).with_flags(6);
    client.set("php", stored.clone(), TTL).await.unwrap();
    let php = Json::default().with_format(Format::new(0xf, 6));
    let users: Typed<User, Json> = client.typed(php).unwrap();
    let ann = users.get("php").await.unwrap().unwrap();
    assert_eq!((&*ann.name, ann.visits), ("ann", 3));
    users.set("ours", &ann, TTL).await.unwrap();
    let ours = client.get("ours").await.unwrap().unwrap();
    assert_eq!(Payload::from(ours), stored);
    // A group reads frames of another client, which calls them something else.
    let frame = include_bytes!("../data/frames/python.zst");
    let settings = compressing(Algorithm::Lz4).zstd_flag(1 << 3);
    let reader = builder(&server).compression(settings).build().unwrap();
    let stored = Payload::from(frame).with_flags(1 << 3 | 1 << 4);
    client.set("python", stored, TTL).await.unwrap();
    let read = reader.get("python").await.unwrap().unwrap();
    assert!(read.starts_with(b"{\"id\":0,\"name\":\"user-0\"}\n"));
    assert_eq!(read.flags(), 1 << 4);
}

#[tokio::test(start_paused = true)]
async fn formats_and_settings_that_collide_are_refused() {
    let server = Server::new();
    let client = compressed(&server, Algorithm::Lz4);
    for format in [
        Format::new(0x0f, 0x10),
        Format::new(u32::MAX, 0x4e4f_4e45),
        Format::new(0xf000_0000, 0),
    ] {
        let typed = client.typed::<u32, _>(Json::default().with_format(format));
        assert_eq!(typed.unwrap_err().kind(), ErrorKind::InvalidConfiguration);
    }
    let settings = compressing(Algorithm::Lz4).threshold(1);
    let group = GroupSettings::default().compression(settings);
    let error = builder(&server).group("g", group).build().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("groups.g.compression.threshold: is under 64")
    );
}

#[tokio::test(start_paused = true)]
async fn loads_with_a_codec_and_compression_keep_negative_and_old_values() {
    let server = Server::new();
    let settings = ReadThroughSettings::negative_ttl(exact(), secs(30));
    let client = builder(&server)
        .read_through(settings.stale_if_error(secs(600)))
        .compression(compressing(Algorithm::Zstd))
        .build()
        .unwrap();
    let users: Typed<User, Json> = client.typed(Json::default()).unwrap();
    let ann = user("ann", 1);
    let nothing = async || Ok::<_, Error>(None);
    assert_eq!(users.get_or_load("k", TTL, nothing).await.unwrap(), None);
    eventually("absence is stored", || {
        server.peek("k").is_some_and(|it| !it.is_empty())
    })
    .await;
    let unasked = async || Err::<Option<User>, _>("asked");
    assert_eq!(users.get_or_load("k", TTL, unasked).await.unwrap(), None);
    assert_eq!(users.get("k").await.unwrap(), None);
    advance(secs(31)).await;
    let load = async || Ok::<_, Error>(Some(ann.clone()));
    assert_eq!(
        users.get_or_load("k", TTL, load).await.unwrap().as_ref(),
        Some(&ann)
    );
    eventually("it is stored", || {
        server.peek("k").is_some_and(|it| it.len() > 40)
    })
    .await;
    advance(secs(61)).await;
    let down = async || Err::<Option<User>, _>("down");
    assert_eq!(users.get_or_load("k", TTL, down).await.unwrap(), Some(ann));
}

/// The type before it was changed.
#[derive(Serialize, Deserialize)]
struct OldUser {
    full_name: String,
}

#[tokio::test(start_paused = true)]
async fn a_value_of_an_old_schema_is_an_error_or_loaded_anew_and_replaced() {
    let server = Server::new();
    let client = compressed(&server, Algorithm::Lz4);
    let old: Typed<OldUser, Json> = client.typed(Json::default()).unwrap();
    let new: Typed<User, Json> = client.typed(Json::default()).unwrap();
    let lenient = new.clone().undecodable_is_miss();
    let old_ann = OldUser {
        full_name: "ann".repeat(1000),
    };
    for key in ["a", "b", "c"] {
        old.set(key, &old_ann, Ttl::NEVER).await.unwrap();
    }
    let (ann, loads) = (user("ann", 1), AtomicUsize::new(0));
    let load = async || {
        loads.fetch_add(1, Ordering::Relaxed);
        Ok::<_, Error>(Some(ann.clone()))
    };
    assert_eq!(new.get("a").await.unwrap_err().kind(), ErrorKind::Codec);
    let error = new.get_or_load("a", TTL, load).await.unwrap_err();
    assert_eq!(
        (error.kind(), loads.load(Ordering::Relaxed)),
        (ErrorKind::Codec, 0)
    );
    assert!(std::error::Error::source(&error).is_some());

    assert_eq!(lenient.get("a").await.unwrap(), None);
    assert!(lenient.gets("a").await.unwrap().is_none());
    assert_eq!(lenient.get_many(["a"]).await.errors().count(), 0);
    assert_eq!(
        lenient.get_or_load("a", TTL, load).await.unwrap().as_ref(),
        Some(&ann)
    );
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    // The value that replaces it is one of the new schema.
    let until = Instant::now() + secs(20);
    while new.get("a").await.ok().flatten().as_ref() != Some(&ann) {
        assert!(Instant::now() < until, "never replaced");
        sleep(Duration::from_millis(1)).await;
    }
    let unasked = async || Err::<Option<User>, _>("asked again");
    assert_eq!(
        lenient
            .get_or_load("a", TTL, unasked)
            .await
            .unwrap()
            .as_ref(),
        Some(&ann)
    );

    let asked = std::sync::Mutex::new(Vec::new());
    let load = |keys: Vec<Key>| {
        asked.lock().unwrap().push(keys.clone());
        let loaded = keys.into_iter().map(|key| (key, ann.clone()));
        std::future::ready(Ok::<_, Error>(loaded.collect::<HashMap<_, _>>()))
    };
    let many = lenient
        .get_many_or_load(["b", "a", "none", "c"], TTL, load)
        .await;
    assert_eq!(many.errors().count(), 0);
    assert_eq!(many.into_hits().len(), 4);
    let asked = asked.into_inner().unwrap();
    let key = |key: &str| Key::new(key).unwrap();
    assert_eq!(asked, [vec![key("none")], vec![key("b"), key("c")]]);
}

#[tokio::test(start_paused = true)]
async fn of_all_clients_one_loads_anew_what_none_can_read() {
    let server = Server::new();
    let old = plain(&server).typed::<OldUser, _>(Json::default()).unwrap();
    let full_name = "ann".to_owned();
    old.set("k", &OldUser { full_name }, Ttl::secs(3600))
        .await
        .unwrap();
    let loads = Arc::new(AtomicUsize::new(0));
    let callers = (0..20).map(|_| {
        let users = plain(&server).typed::<User, _>(Json::default()).unwrap();
        let (users, loads) = (users.undecodable_is_miss(), loads.clone());
        async move {
            let load = async || {
                loads.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(50)).await;
                Ok::<_, Error>(Some(user("ann", 1)))
            };
            users.get_or_load("k", TTL, load).await.unwrap().unwrap()
        }
    });
    for found in join_all(callers).await {
        assert_eq!(found, user("ann", 1));
    }
    assert_eq!(loads.load(Ordering::Relaxed), 1);
}

/// A value that cannot be encoded: the keys of JSON objects are texts.
type Unencodable = HashMap<Vec<u8>, u8>;

#[tokio::test(start_paused = true)]
async fn what_cannot_be_encoded_is_not_sent_and_no_failure_of_the_database() {
    let server = Server::new();
    let guard = LoadGuard::new("table", LoadLimits::default()).unwrap();
    let settings = exact().guard(guard.clone());
    let client = builder(&server).read_through(settings).build().unwrap();
    let typed: Typed<Unencodable, Json> = client.typed(Json::default()).unwrap();
    let value = Unencodable::from([(vec![1], 1)]);
    let error = typed.set("k", &value, TTL).await.unwrap_err();
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::No));
    assert_eq!(server.commands_named("ms"), 0);
    for _ in 0..50 {
        let load = async || Ok::<_, Error>(Some(value.clone()));
        let error = typed.get_or_load("k", TTL, load).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Codec, "{error}");
    }
    assert_eq!(guard.status().rejection_probability, 0.0);
}

struct Rows;

impl Loader for Rows {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, BoxError> {
        Ok(Some("a".repeat(2000).into()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_layer_under_a_loader_compresses_what_is_put_back() {
    let server = Server::new();
    let raw = plain(&server);
    let corrupt = Payload::from("no frame").with_flags(LZ4);
    raw.set("corrupt", corrupt, TTL).await.unwrap();
    let client = builder(&server)
        .layer(ReadThroughLayer::new(Rows, TTL).settings(exact()).unwrap())
        .layer(CompressionLayer::new(compressing(Algorithm::Lz4)).unwrap())
        .build()
        .unwrap();
    for key in ["missing", "corrupt"] {
        let value = client.get(key).await.unwrap().unwrap();
        assert_eq!(value, *"a".repeat(2000));
        until_stored(&raw, key, LZ4).await;
        let value = client.get(key).await.unwrap().unwrap();
        assert_eq!((value.len(), value.flags()), (2000, 0));
    }
    let error = client.append("missing", "b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn the_layer_is_a_service_like_any_other() {
    let echo = tower::service_fn(|request: Request| async move {
        match request.into_operation() {
            Operation::Store { payload, .. } => Ok(Response::Value(Some(payload.into()))),
            _ => Err(BoxError::from("not that")),
        }
    });
    let layer = CompressionLayer::new(compressing(Algorithm::Zstd)).unwrap();
    let client = Client::from_service(layer.layer(echo));
    let key = || Key::new("k").unwrap();
    let store = Request::new(Operation::Store {
        mode: tower_memcached::StoreMode::Set,
        key: key(),
        payload: "a".repeat(2000).into(),
        ttl: TTL,
    });
    let echoed = layer.layer(echo).oneshot(store).await.unwrap();
    assert!(matches!(echoed, Response::Value(Some(value)) if value.len() == 2000));
    let error = client.delete("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Layer);
}

#[tokio::test(start_paused = true)]
async fn compression_is_changed_while_the_client_runs() {
    let server = Server::new();
    let (raw, long) = (plain(&server), "a".repeat(2000));
    let group = GroupSettings::default().prefix("g:");
    let client = builder(&server).group("g", group.clone()).build().unwrap();
    let grouped = client.group("g").unwrap();
    let written = async |flags: u32| {
        for key in ["k", "g:k"] {
            match key {
                "k" => client.set("k", &long, TTL).await.unwrap(),
                _ => grouped.set("k", &long, TTL).await.unwrap(),
            }
            assert_eq!(flags_of(&raw, key).await, flags);
        }
        assert_eq!(client.get("k").await.unwrap().unwrap(), *long.as_bytes());
        assert_eq!(grouped.get("k").await.unwrap().unwrap(), *long.as_bytes());
    };
    written(0).await;
    let mut config = Config::default();
    config.groups.insert("g".into(), group);
    for (algorithm, flags) in [(Algorithm::Lz4, LZ4), (Algorithm::Zstd, ZSTD)] {
        config.compression = Some(compressing(algorithm));
        client.reconfigure(config.clone()).unwrap();
        written(flags).await;
    }
    // What was compressed is still read.
    config.compression = Some(compressing(Algorithm::None));
    client.reconfigure(config.clone()).unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), *long.as_bytes());
    // And without any, flags are the caller's alone.
    config.compression = None;
    client.reconfigure(config).unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap().flags(), ZSTD);
    client.append("k", "more").await.unwrap();
}

/// Without leases, and without the TTL that is left: the token is all there is to replace it by.
#[cfg(feature = "classic")]
#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_replaced_in_the_classic_protocol_too() {
    let server = Server::new();
    let raw = plain(&server);
    let classic = |builder: ClientBuilder| builder.protocol(Protocol::Classic).build().unwrap();
    let client = classic(builder(&server).compression(compressing(Algorithm::Lz4)));
    let long = "a".repeat(2000);
    let corrupt = Payload::from("no frame").with_flags(LZ4);
    raw.set("corrupt", corrupt, TTL).await.unwrap();
    let load = async || Ok::<_, Error>(Some(long.clone()));
    let loaded = client.get_or_load("corrupt", TTL, load).await.unwrap();
    assert_eq!(loaded.unwrap(), *long.as_bytes());
    until_stored(&raw, "corrupt", LZ4).await;
    let unasked = async || Err::<Option<String>, _>("asked again");
    let found = client.get_or_load("corrupt", TTL, unasked).await.unwrap();
    assert_eq!(found.unwrap(), *long.as_bytes());

    let old = plain(&server).typed::<OldUser, _>(Json::default()).unwrap();
    let full_name = "ann".to_owned();
    old.set("k", &OldUser { full_name }, TTL).await.unwrap();
    let users: Typed<User, Json> = client.typed(Json::default()).unwrap();
    let users = users.undecodable_is_miss();
    let load = async || Ok::<_, Error>(Some(user("ann", 1)));
    let found = users.get_or_load("k", TTL, load).await.unwrap();
    assert_eq!(found, Some(user("ann", 1)));
    until_stored(&raw, "k", JSON | LZ4).await;
}

/// To a service built by hand a look may be a get.
#[tokio::test(start_paused = true)]
async fn what_a_service_built_by_hand_has_is_a_miss_as_well_if_it_cannot_be_decoded() {
    let service = tower::service_fn(|request: Request| async move {
        Ok::<_, BoxError>(match request.into_operation() {
            Operation::Lookup { .. } | Operation::Get { .. } => {
                Response::Value(Some(Value::new(r#"{"full_name":"ann"}"#, JSON)))
            }
            _ => Response::Stored(false),
        })
    });
    let users: Typed<User, Json, _> = Client::from_service(service)
        .typed(Json::default())
        .unwrap();
    let load = async || Ok::<_, Error>(Some(user("ann", 1)));
    let users = users.undecodable_is_miss();
    let found = users.get_or_load("k", TTL, load).await.unwrap();
    assert_eq!(found, Some(user("ann", 1)));
}

/// Postcard takes what it finds: the frame's first byte for the length of what follows.
#[tokio::test(start_paused = true)]
async fn what_is_compressed_is_not_decoded_as_it_is_by_who_does_not_decompress() {
    let server = Server::new();
    let writer: Typed<Vec<u8>, Postcard> = compressed(&server, Algorithm::Zstd)
        .typed(Postcard::default())
        .unwrap();
    let reader: Typed<Vec<u8>, Postcard> = plain(&server).typed(Postcard::default()).unwrap();
    let mut likely = 0;
    for distinct in 1..=40_u8 {
        let mut value: Vec<u8> = (0..distinct).map(|n| n.wrapping_mul(37) ^ n).collect();
        value.resize(2000, 7);
        writer.set("k", &value, TTL).await.unwrap();
        let stored = server.peek("k").unwrap();
        likely += usize::from(usize::from(stored[0]) + 1 == stored.len());
        let error = reader.get("k").await.unwrap_err();
        assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::Yes));
        assert_eq!(writer.get("k").await.unwrap(), Some(value));
    }
    assert!(likely > 0, "none of them would have been decoded");
    // What has no compression has no bits of it either, unless they are the format's own.
    let own = Postcard::default().with_format(Format::new(0x3000_0000, 0x3000_0000));
    let own: Typed<u32, Postcard> = plain(&server).typed(own).unwrap();
    own.set("own", &7, TTL).await.unwrap();
    assert_eq!(own.get("own").await.unwrap(), Some(7));
}

#[tokio::test(start_paused = true)]
async fn what_is_loaded_and_could_not_be_read_again_is_not_put_back() {
    let server = Server::new();
    let typed: Typed<f64, Json> = plain(&server).typed(Json::default()).unwrap();
    // To JSON that is `null`.
    let load = async || Ok::<_, Error>(Some(f64::NAN));
    for typed in [typed.clone(), typed.clone().undecodable_is_miss()] {
        let error = typed.get_or_load("k", TTL, load).await.unwrap_err();
        assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::No));
        let load = async |keys: Vec<Key>| {
            let nan = keys.into_iter().map(|key| (key, f64::NAN));
            Ok::<_, Error>(nan.collect::<Vec<_>>())
        };
        let many = typed.get_many_or_load(["k"], TTL, load).await;
        assert_eq!(many.errors().count(), 1);
    }
    let load = async || Ok::<_, Error>(Some(0.5));
    assert_eq!(typed.get_or_load("k", TTL, load).await.unwrap(), Some(0.5));
}

/// Holds each read back until it is let go.
#[derive(Clone)]
struct Held<S>(S, Arc<tokio::sync::Semaphore>);

impl<S> tower::Service<Request> for Held<S>
where
    S: tower::Service<Request, Response = Response> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = BoxError;
    type Future = futures::future::BoxFuture<'static, Result<Response, BoxError>>;

    fn poll_ready(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let ready = self.0.clone();
        let mut inner = std::mem::replace(&mut self.0, ready);
        let held = self.1.clone();
        Box::pin(async move {
            if matches!(request.operation(), Operation::Get { .. }) {
                held.acquire().await?.forget();
            }
            inner.call(request).await.map_err(Into::into)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_under_way_understands_what_is_written_by_new_settings() {
    let server = Server::new();
    let held = Arc::new(tokio::sync::Semaphore::new(0));
    let client = builder(&server)
        .timeout(secs(5))
        .layer(tower::layer::layer_fn(|inner| Held(inner, held.clone())))
        .build()
        .unwrap();
    let long = "a".repeat(2000);
    let mut read = Box::pin(client.get("k"));
    assert!(futures::poll!(&mut read).is_pending());
    let mut config = Config::default();
    config.compression = Some(compressing(Algorithm::Lz4));
    client.reconfigure(config).unwrap();
    client.set("k", &long, TTL).await.unwrap();
    held.add_permits(1);
    let value = read.await.unwrap().unwrap();
    assert_eq!((&*value, value.flags()), (long.as_bytes(), 0));
}
