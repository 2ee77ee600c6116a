//! What a client does, one behaviour after the other. Each has keys of its own, and leaves the client as it found it.

use std::any::Any;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use futures::future::{FutureExt as _, LocalBoxFuture, join_all};
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::{
    CasOutcome, Claim, Client, Error, ErrorKind, Key, NodeResult, OnFailure, Outcome, Payload,
    ReadThroughSettings, Result, Sent, Ttl,
};

use crate::cells::Expected;
use crate::sites::Site;
use crate::support::PATIENCE;

const TTL: Ttl = Ttl::secs(600);
/// Ends while a test waits, and no sooner than it can look: one of a second may end at once.
const SHORT: Ttl = Ttl::secs(4);
/// What memcached stores at most, all that it counts besides included.
const LARGEST_ITEM: usize = 1 << 20;

/// What is run, and what the document calls it.
pub(crate) struct Behaviour {
    pub(crate) name: &'static str,
    pub(crate) run: fn(Arc<Site>) -> LocalBoxFuture<'static, Result<(), Trouble>>,
}

/// What a behaviour came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Works,
    /// An error said so, and nothing was sent.
    Unsupported,
    /// It is done without, and nobody is told.
    Lacks,
    /// What was wrong.
    Fails(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Works => "yes",
            Self::Unsupported => "unsupported",
            Self::Lacks => "no",
            Self::Fails(_) => "**fails**",
        })
    }
}

/// Why a behaviour did not work as it should.
pub(crate) enum Trouble {
    Error(Error),
    Lacks,
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<Expected> for Verdict {
    fn from(expected: Expected) -> Self {
        match expected {
            Expected::Works => Self::Works,
            Expected::Unsupported => Self::Unsupported,
            Expected::Lacks => Self::Lacks,
        }
    }
}

/// What a behaviour came to, however it ends.
pub(crate) async fn judge(behaviour: LocalBoxFuture<'static, Result<(), Trouble>>) -> Verdict {
    let behaviour = timeout(6 * PATIENCE, AssertUnwindSafe(behaviour).catch_unwind());
    let Ok(ended) = behaviour.await else {
        return Verdict::Fails("it has not ended".to_owned());
    };
    match ended {
        Ok(Ok(())) => Verdict::Works,
        Ok(Err(Trouble::Lacks)) => Verdict::Lacks,
        Ok(Err(Trouble::Error(error)))
            if error.kind() == ErrorKind::Unsupported && error.sent() == Sent::No =>
        {
            Verdict::Unsupported
        }
        Ok(Err(Trouble::Error(error))) => Verdict::Fails(format!("{error} ({:?})", error.sent())),
        Err(panic) => Verdict::Fails(message(panic)),
    }
}

fn message(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic
            .downcast_ref::<&str>()
            .map_or("it panicked", |message| message)
            .to_owned(),
    }
}

macro_rules! suite {
    ($($name:literal => $behaviour:ident,)*) => {
        /// In the order of the document.
        pub(crate) const SUITE: &[Behaviour] = &[$(Behaviour {
            name: $name,
            run: |site| async move { $behaviour(&site).await.map_err(Trouble::from) }.boxed_local(),
        }),*];
    };
}

suite! {
    "`set`, `get`" => set_and_get,
    "`add`" => add,
    "`replace`" => replace,
    "`append`, `prepend`" => append_and_prepend,
    "`gets`, `cas`" => compare_and_swap,
    "`delete`" => delete,
    "`touch`" => touch,
    "`get_and_touch`" => get_and_touch,
    "`increment`, `decrement`" => counters,
    "`get_many`: 500 keys, some twice, some not there" => many_keys,
    "client flags of 32 bits" => flags,
    "values of any bytes, and of none" => any_bytes,
    "keys of 1 and of 250 bytes" => shortest_and_longest_keys,
    "keys that are not UTF-8" => keys_of_other_encodings,
    "`Key::binary`" => binary_keys,
    "the largest value the server takes" => largest_value,
    "a value too large for the server: an error, the old one gone" => too_large_for_the_server,
    "a value too large for the client: an error either way" => too_large_for_the_client,
    "TTLs: a second, for ever, 60 days, a date, none" => times_to_live,
    "`get_or_load`, `get_many_or_load`" => loads,
    "`invalidate` during a load" => invalidation,
    "`stale_if_error`: an old value, marked as such, for none" => stale_values,
    "one load among several processes (leases)" => leases,
    "`claim`" => claims,
    "`version`" => version,
    "`stats`" => stats,
    "`flush_all`" => flush_all,
    "64 tasks at once: never another one's value" => many_tasks,
    "futures dropped at any moment harm nobody" => dropped_futures,
    "a server that hangs: an error in time, and all is well after" => deadlines,
}

async fn set_and_get(site: &Site) -> Result<()> {
    let client = &site.client;
    assert_eq!(client.get("set").await?, None);
    client.set("set", "one", TTL).await?;
    client.set("set", "two", TTL).await?;
    let value = client.get("set").await?.expect("it was set");
    assert_eq!(
        (&*value, value.flags(), value.cas()),
        (&b"two"[..], 0, None)
    );
    Ok(())
}

async fn add(site: &Site) -> Result<()> {
    let client = &site.client;
    assert!(client.add("add", "one", TTL).await?);
    assert!(!client.add("add", "two", TTL).await?);
    holds(client, "add", "one").await
}

async fn replace(site: &Site) -> Result<()> {
    let client = &site.client;
    assert!(!client.replace("replace", "one", TTL).await?);
    assert_eq!(client.get("replace").await?, None);
    client.set("replace", "one", TTL).await?;
    assert!(client.replace("replace", "two", TTL).await?);
    holds(client, "replace", "two").await
}

async fn append_and_prepend(site: &Site) -> Result<()> {
    let client = &site.client;
    assert!(!client.append("append", "x").await?);
    assert!(!client.prepend("append", "x").await?);
    let payload = Payload::from("b").with_flags(7);
    client.set("append", payload, TTL).await?;
    assert!(client.append("append", "c\r\n").await?);
    assert!(client.prepend("append", "\r\na").await?);
    let value = client.get("append").await?.expect("it was set");
    assert_eq!((&*value, value.flags()), (&b"\r\nabc\r\n"[..], 7));
    Ok(())
}

async fn compare_and_swap(site: &Site) -> Result<()> {
    let client = &site.client;
    assert_eq!(client.gets("cas").await?, None);
    client.set("cas", "one", TTL).await?;
    let token = async || {
        let value = client.gets("cas").await?.expect("it was set");
        Ok::<_, Error>(value.cas().expect("a token was asked for"))
    };
    let first = token().await?;
    let swap = |value: &'static str, token| client.cas("cas", value, TTL, token);
    assert_eq!(swap("two", first).await?, CasOutcome::Stored);
    assert_eq!(swap("three", first).await?, CasOutcome::Exists);
    holds(client, "cas", "two").await?;
    let second = token().await?;
    assert!(client.delete("cas").await?);
    assert_eq!(swap("four", second).await?, CasOutcome::NotFound);
    assert_eq!(client.get("cas").await?, None);
    Ok(())
}

async fn delete(site: &Site) -> Result<()> {
    let client = &site.client;
    assert!(!client.delete("delete").await?);
    client.set("delete", "one", TTL).await?;
    assert!(client.delete("delete").await?);
    assert_eq!(client.get("delete").await?, None);
    Ok(())
}

async fn touch(site: &Site) -> Result<()> {
    let client = &site.client;
    assert!(!client.touch("touch", TTL).await?);
    client.set("touch", "one", SHORT).await?;
    client.set("untouched", "one", TTL).await?;
    assert!(client.touch("touch", TTL).await?);
    assert!(client.touch("untouched", SHORT).await?);
    until_gone(client, "untouched").await?;
    holds(client, "touch", "one").await
}

async fn get_and_touch(site: &Site) -> Result<()> {
    let client = &site.client;
    assert_eq!(client.get_and_touch("gat", TTL).await?, None);
    client.set("gat", "one", SHORT).await?;
    client.set("gat-soon", "two", TTL).await?;
    let value = client.get_and_touch("gat", TTL).await?;
    assert_eq!(value.expect("it was set"), "one");
    let value = client.get_and_touch("gat-soon", SHORT).await?;
    assert_eq!(value.expect("it was set"), "two");
    until_gone(client, "gat-soon").await?;
    holds(client, "gat", "one").await
}

async fn counters(site: &Site) -> Result<()> {
    let client = &site.client;
    assert_eq!(client.increment("count", 1).await?, None);
    assert_eq!(client.decrement("count", 1).await?, None);
    client.set("count", "10", TTL).await?;
    assert_eq!(client.increment("count", 5).await?, Some(15));
    assert_eq!(client.decrement("count", 7).await?, Some(8));
    assert_eq!(client.decrement("count", 100).await?, Some(0));
    assert_eq!(client.increment("count", u64::MAX).await?, Some(u64::MAX));
    assert_eq!(client.increment("count", 3).await?, Some(2));
    client.set("count", "no number", TTL).await?;
    for changed in [
        client.increment("count", 1).await,
        client.decrement("count", 1).await,
    ] {
        let error = supported(changed)?.expect_err("that is no number");
        assert_eq!(error.kind(), ErrorKind::NotANumber, "{error}");
    }
    holds(client, "count", "no number").await
}

async fn many_keys(site: &Site) -> Result<()> {
    let client = &site.client;
    let keys: Vec<String> = (0..500).map(|n| format!("many:{n}")).collect();
    let value = |n: usize| format!("value {n}").repeat(n % 30);
    let sets = (0..500).step_by(2);
    let sets = sets.map(|n| client.set(&keys[n], value(n), TTL));
    for set in join_all(sets).await {
        set?;
    }
    let asked = keys.iter().chain(&keys[..100]);
    let asked = asked.map(String::as_str).chain(["not a key"]);
    let many = client.get_many(asked).await;
    assert_eq!(many.len(), 601);
    for (place, outcome) in many.into_outcomes().into_iter().enumerate() {
        let n = if place < 500 { place } else { place - 500 };
        match outcome {
            Outcome::Hit(found) => assert!(n % 2 == 0 && found == value(n).as_str(), "{n}"),
            Outcome::Miss => assert!(n % 2 == 1, "{n} is missing"),
            Outcome::Error(error) if place == 600 => {
                assert_eq!(error.kind(), ErrorKind::InvalidKey)
            }
            Outcome::Error(error) => return Err(error),
        }
    }
    assert!(client.get_many([] as [&str; 0]).await.is_empty());
    Ok(())
}

async fn flags(site: &Site) -> Result<()> {
    let client = &site.client;
    for flags in [0, 1, 0x8000_0001, u32::MAX] {
        let payload = Payload::from("flagged").with_flags(flags);
        client.set("flags", payload, TTL).await?;
        let value = client.get("flags").await?.expect("it was set");
        assert_eq!((&*value, value.flags()), (&b"flagged"[..], flags));
    }
    Ok(())
}

async fn any_bytes(site: &Site) -> Result<()> {
    let client = &site.client;
    let every: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    for value in [
        &b""[..],
        b"\r\n",
        b"END\r\n",
        b"\r\nVALUE bytes 0 1\r\nx\r\nEND\r\n",
        b"\0",
        &every,
    ] {
        client.set("bytes", value, TTL).await?;
        holds(client, "bytes", value).await?;
        let many = client.get_many(["bytes"]).await.into_outcomes().remove(0);
        assert_eq!(many.into_result()?.expect("it was set"), value);
    }
    Ok(())
}

async fn shortest_and_longest_keys(site: &Site) -> Result<()> {
    everything_with(&site.client, Key::new("k")?).await?;
    everything_with(&site.client, Key::new("k".repeat(250))?).await?;
    let error = site.client.get("k".repeat(251)).await;
    let error = error.expect_err("that is too long");
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::InvalidKey, Sent::No)
    );
    Ok(())
}

async fn keys_of_other_encodings(site: &Site) -> Result<()> {
    let every: Vec<u8> = (0x80..=0xff).collect();
    everything_with(&site.client, Key::new(every)?).await?;
    everything_with(&site.client, Key::new("schlüssel")?).await
}

async fn binary_keys(site: &Site) -> Result<()> {
    let every: Vec<u8> = (0..=127).collect();
    everything_with(&site.client, Key::binary(every)?).await?;
    everything_with(&site.client, Key::binary(" k\r\n")?).await
}

/// Most operations on one key.
async fn everything_with(client: &Client, key: Key) -> Result<()> {
    client.set(&key, "1", TTL).await?;
    assert_eq!(client.increment(&key, 1).await?, Some(2));
    assert!(client.append(&key, "!").await?);
    assert!(client.replace(&key, "3", TTL).await?);
    assert!(!client.add(&key, "4", TTL).await?);
    assert!(client.touch(&key, TTL).await?);
    let many = client.get_many([&key]).await.into_outcomes().remove(0);
    assert_eq!(many.into_result()?.expect("it was set"), "3");
    holds(client, &key, "3").await?;
    assert!(client.delete(&key).await?);
    assert_eq!(client.get(&key).await?, None);
    Ok(())
}

async fn largest_value(site: &Site) -> Result<()> {
    let client = &site.client;
    // Header, CAS unique, the key and its end, and the value's CR LF.
    let most = LARGEST_ITEM - (48 + 8 + "largest".len() + 1 + 2);
    for size in [4_096, 65_536, 524_288, most] {
        let value: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        client.set("largest", value.clone(), TTL).await?;
        holds(client, "largest", &value).await?;
    }
    client.delete("largest").await.map(drop)
}

async fn too_large_for_the_server(site: &Site) -> Result<()> {
    let client = site.builder().max_value_size(4 << 20).build()?;
    client.set("too-large", "small", TTL).await?;
    let set = client.set("too-large", vec![b'x'; 2 << 20], TTL).await;
    let error = supported(set)?.expect_err("the server refuses it");
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::ValueTooLarge, Sent::Yes)
    );
    assert_eq!(client.get("too-large").await?, None);
    Ok(())
}

async fn too_large_for_the_client(site: &Site) -> Result<()> {
    let small = site.builder().max_value_size(1_000).build()?;
    let set = small.set("large", vec![b'x'; 1_001], TTL).await;
    let error = set.expect_err("it is over the limit");
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::ValueTooLarge, Sent::No)
    );
    let client = &site.client;
    client.set("large", vec![b'x'; 500_000], TTL).await?;
    client.set("small", "small", TTL).await?;
    for _ in 0..3 {
        let error = small.get("large").await.expect_err("it is over the limit");
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::ValueTooLarge, Sent::Yes)
        );
        let many = small.get_many(["small", "large"]).await.into_outcomes();
        assert_eq!(many[0].value().expect("it was set"), &"small");
        assert!(many[1].value().is_none());
        holds(&small, "small", "small").await?;
    }
    Ok(())
}

async fn times_to_live(site: &Site) -> Result<()> {
    let client = &site.client;
    let days = |days: u64| 60 * 60 * 24 * days;
    let later = SystemTime::now() + Duration::from_secs(days(400));
    let past = SystemTime::now() - Duration::from_secs(days(1));
    let living = [
        ("ttl:never", Ttl::NEVER),
        ("ttl:month", Ttl::secs(days(30))),
        ("ttl:60-days", Ttl::secs(days(60))),
        ("ttl:date", Ttl::until(later)),
    ];
    for (key, ttl) in living {
        client.set(key, "lives", ttl).await?;
    }
    for (key, ttl) in [("ttl:0", Ttl::secs(0)), ("ttl:past", Ttl::until(past))] {
        client.set(key, "never lives", ttl).await?;
        assert_eq!(client.get(key).await?, None, "{key}");
    }
    client
        .set("ttl:1", "lives for a second", Ttl::secs(1))
        .await?;
    let added = client.add("ttl:1-added", "the same", Ttl::secs(1)).await?;
    assert!(added);
    until_gone(client, "ttl:1").await?;
    until_gone(client, "ttl:1-added").await?;
    for (key, _) in living {
        holds(client, key, "lives").await?;
    }
    Ok(())
}

async fn loads(site: &Site) -> Result<()> {
    let client = &site.client;
    let count = AtomicUsize::new(0);
    let load = || async {
        count.fetch_add(1, Ordering::Relaxed);
        // Longer than it takes all of them to be told that it is not there.
        sleep(Duration::from_millis(500)).await;
        Ok::<_, Error>(Some("loaded"))
    };
    let callers = (0..50).map(|_| client.get_or_load("load", TTL, load));
    for loaded in join_all(callers).await {
        assert_eq!(loaded?.expect("it is there"), "loaded");
    }
    assert_eq!(count.load(Ordering::Relaxed), 1);
    // It is put back behind the answer.
    eventually(async || Ok(client.get("load").await?.is_some())).await?;
    let again = client.get_or_load("load", TTL, load).await?;
    assert_eq!(again.expect("a hit"), "loaded");
    assert_eq!(count.load(Ordering::Relaxed), 1);
    let nothing = || async { Ok::<Option<&str>, Error>(None) };
    assert_eq!(client.get_or_load("nothing", TTL, nothing).await?, None);

    let many = client.get_many_or_load(
        ["load", "load:2", "nothing"],
        TTL,
        |missing: Vec<Key>| async move {
            let there = missing
                .into_iter()
                .filter(|key| key.as_bytes() == b"load:2");
            Ok::<_, Error>(there.map(|key| (key, "loaded, too")).collect::<Vec<_>>())
        },
    );
    let many = many.await.into_outcomes();
    assert_eq!(many[0].value().expect("a hit"), &"loaded");
    assert_eq!(many[1].value().expect("it is loaded"), &"loaded, too");
    assert!(matches!(many[2], Outcome::Miss));
    eventually(async || Ok(client.get("load:2").await?.is_some())).await
}

/// What was read from the database before is not put back after.
async fn invalidation(site: &Site) -> Result<()> {
    let client = &site.client;
    let load = || async {
        client.invalidate("invalidated").await?;
        Ok::<_, Error>(Some("old"))
    };
    let _ = client.get_or_load("invalidated", TTL, load).await?;
    let fresh = || async { Ok::<_, Error>(Some("new")) };
    let value = client.get_or_load("invalidated", TTL, fresh).await?;
    assert_eq!(value.expect("it is loaded"), "new");
    Ok(())
}

/// Past its TTL a value is given only as a stale one, and only while it cannot be loaded.
async fn stale_values(site: &Site) -> Result<(), Trouble> {
    let settings = ReadThroughSettings::default().stale_if_error(PATIENCE);
    let client = site.builder().read_through(settings).build()?;
    let (short, keys) = (SHORT, ["stale:1", "stale:2"]);
    for key in keys {
        let load = || async { Ok::<_, Error>(Some("old")) };
        client.get_or_load(key, short, load).await?;
        eventually(async || Ok(client.get(key).await?.is_some())).await?;
    }
    // A TTL ends with a second of the server's.
    sleep(Duration::from_millis(5_500)).await;
    let load = || async { Ok::<_, Error>(Some("new")) };
    let value = client.get_or_load(keys[0], short, load).await?;
    assert_eq!(value.expect("it is loaded"), "new");
    let fails = || async { Err::<Option<&str>, _>(std::io::Error::other("the database is down")) };
    match client.get_or_load(keys[1], short, fails).await {
        Ok(value) => {
            let value = value.expect("it was there");
            assert!(value.is_stale() && value == "old", "{value:?}");
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::Load => Err(Trouble::Lacks),
        Err(error) => Err(error.into()),
    }
}

async fn leases(site: &Site) -> Result<(), Trouble> {
    let clients: Vec<_> = (0..3).map(|_| site.another()).collect();
    let count = AtomicUsize::new(0);
    let load = || async {
        count.fetch_add(1, Ordering::Relaxed);
        // Until all of them load, or it is certain that they do not.
        let until = Instant::now() + Duration::from_secs(1);
        while count.load(Ordering::Relaxed) < clients.len() && Instant::now() < until {
            sleep(Duration::from_millis(5)).await;
        }
        Ok::<_, Error>(Some("loaded"))
    };
    for client in &clients {
        client.get("lease").await?;
    }
    let callers = clients
        .iter()
        .map(|client| client.get_or_load("lease", TTL, load));
    for loaded in join_all(callers).await {
        assert_eq!(loaded?.expect("it is there"), "loaded");
    }
    match count.load(Ordering::Relaxed) {
        1 => Ok(()),
        3 => Err(Trouble::Lacks),
        count => panic!("{count} loads by three processes"),
    }
}

async fn claims(site: &Site) -> Result<()> {
    let clients = [site.another(), site.another()];
    let claims = (0..100).map(|n| clients[n % 2].claim("claim", TTL, OnFailure::Deny));
    let mut first = 0;
    for claim in join_all(claims).await {
        match claim? {
            Claim::First => first += 1,
            Claim::Seen => {}
            Claim::Unanswered { error, .. } => return Err(error),
        }
    }
    assert_eq!(first, 1);
    Ok(())
}

async fn version(site: &Site) -> Result<()> {
    for version in each(site.client.version().await?)? {
        assert!(version.starts_with("1."), "{version}");
    }
    Ok(())
}

async fn stats(site: &Site) -> Result<()> {
    for stats in each(site.client.stats().await?)? {
        assert!(stats.contains_key("curr_items"), "{stats:?}");
    }
    Ok(())
}

async fn flush_all(site: &Site) -> Result<()> {
    let client = &site.client;
    client.set("flushed", "one", TTL).await?;
    each(client.flush_all().await?)?;
    assert_eq!(client.get("flushed").await?, None);
    client.set("flushed", "two", TTL).await?;
    holds(client, "flushed", "two").await
}

/// G1: what is read under a key was written under it, last.
async fn many_tasks(site: &Site) -> Result<()> {
    let client = site.builder().connections(2).build()?;
    let task = |task: u64| {
        let client = client.clone();
        tokio::spawn(async move {
            let mut random = Rng::with_seed(task);
            let mut versions = [None; 8];
            for n in 0..40 {
                let which = random.usize(..versions.len());
                let key = format!("task:{task}:{which}");
                if random.u8(..3) == 0 {
                    client.set(&key, value_of(&key, n), TTL).await?;
                    versions[which] = Some(n);
                } else if let Some(n) = versions[which] {
                    holds(&client, &key, value_of(&key, n)).await?;
                } else {
                    assert_eq!(client.get(&key).await?, None);
                }
            }
            Ok::<_, Error>(())
        })
    };
    join_all((0..64).map(task))
        .await
        .into_iter()
        .try_for_each(|ended| match ended {
            Ok(ended) => ended,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        })
}

/// G1 and G6: some give up at any moment, and others do not notice.
async fn dropped_futures(site: &Site) -> Result<()> {
    let client = &site.client;
    let hasty = async |task: u64| {
        let mut random = Rng::with_seed(task);
        for n in 0..100 {
            let key = format!("hasty:{task}:{}", random.u8(..4));
            let patience = Duration::from_micros(random.u64(..1_500));
            if random.bool() {
                // An operation that was given up has no result to look at.
                let _ = timeout(patience, client.set(&key, value_of(&key, n), TTL)).await;
            } else if let Ok(Ok(Some(value))) = timeout(patience, client.get(&key)).await {
                let written = (0..n).any(|n| value == value_of(&key, n).as_slice());
                assert!(written, "{key} has {value:?}");
            }
        }
        Ok(())
    };
    let patient = async |task: u64| {
        for n in 0..60 {
            let key = format!("patient:{task}");
            client.set(&key, value_of(&key, n), TTL).await?;
            holds(client, &key, value_of(&key, n)).await?;
        }
        Ok::<_, Error>(())
    };
    let hasty = join_all((0..16).map(hasty));
    let patient = join_all((0..8).map(patient));
    let (hasty, patient) = tokio::join!(hasty, patient);
    hasty.into_iter().chain(patient).collect()
}

async fn deadlines(site: &Site) -> Result<()> {
    const DEADLINE: Duration = Duration::from_millis(300);
    let builder = site.builder().timeout(DEADLINE).attempt_timeout(DEADLINE);
    let client = builder.build()?;
    site.client.set("deadline", "before", TTL).await?;
    eventually(async || Ok(client.get("deadline").await.is_ok())).await?;
    site.stop();
    let hung = async || {
        let begun = Instant::now();
        let error = client.get("deadline").await.expect_err("nobody answers");
        let elapsed = begun.elapsed();
        assert!(
            elapsed < DEADLINE + PATIENCE / 4,
            "{error} after {elapsed:?}"
        );
        let expected = matches!(
            error.kind(),
            ErrorKind::Timeout
                | ErrorKind::Unresponsive
                | ErrorKind::NodeUnavailable
                | ErrorKind::ConnectionFailed
        );
        assert!(expected, "{error}");
    };
    for _ in 0..4 {
        hung().await;
    }
    site.cont();
    eventually(async || {
        let read = client.get("deadline").await;
        if let Ok(value) = &read {
            assert_eq!(value.as_ref().expect("nobody deleted it"), &"before");
        }
        Ok(read.is_ok())
    })
    .await
}

/// What is stored under a key by its nth write: something else for each of both, of any length.
fn value_of(key: &str, n: u64) -> Vec<u8> {
    let mut value = format!("{n} of {key}: ").into_bytes();
    let mut random = Rng::with_seed(
        value
            .iter()
            .fold(n, |seed, byte| seed.rotate_left(5) ^ u64::from(*byte)),
    );
    let length = 1 << random.u32(..11);
    value.extend((0..length).map(|_| random.u8(..)));
    value
}

async fn holds<K: tower_memcached::IntoKey>(
    client: &Client,
    key: K,
    value: impl AsRef<[u8]>,
) -> Result<()> {
    let found = client.get(key).await?.expect("it should be there");
    assert!(*found == *value.as_ref(), "{found:?}");
    Ok(())
}

/// An error of the behaviour's own making, unless it says that there is no such thing.
fn supported<T>(result: Result<T>) -> Result<Result<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::Unsupported => Err(error),
        result => Ok(result),
    }
}

/// Each node's answer.
fn each<T>(answers: Vec<NodeResult<T>>) -> Result<Vec<T>> {
    assert!(!answers.is_empty());
    answers.into_iter().map(|answer| answer.result).collect()
}

async fn eventually(holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !holds().await? {
        assert!(Instant::now() < until, "it never came");
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn until_gone(client: &Client, key: &str) -> Result<()> {
    eventually(async || Ok(client.get(key).await?.is_none())).await
}
