use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::executor::block_on;
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::check::Check;
use super::lease::{Company, Looking, Next};
use super::script::Script;
use super::wire::Wire;
use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::key::Key;
use crate::request::{Direction, LeaseTerms, Operation, StoreMode};
#[cfg(feature = "testing")]
use crate::response::CasOutcome;
use crate::response::{Found, LeaseState, Lookup, Response};
use crate::ttl::Ttl;
use crate::value::{ABSENT_FLAGS, CasToken, Payload, Value};

const MAX_VALUE: usize = 64;

/// What a test may take that should not take any time.
const PATIENCE: Duration = Duration::from_secs(20);

fn token(unique: u64) -> CasToken {
    CasToken {
        node: NonZeroU32::MIN,
        connection: 3,
        unique,
    }
}

fn base() -> CasToken {
    token(0)
}

fn key(text: impl AsRef<[u8]>) -> Key {
    Key::new(text).unwrap()
}

fn get(text: &str) -> Operation {
    Operation::Get {
        key: key(text),
        with_cas: false,
    }
}

fn gets(text: &str) -> Operation {
    Operation::Get {
        key: key(text),
        with_cas: true,
    }
}

fn many(keys: &[&str]) -> Operation {
    Operation::GetMany {
        keys: keys.iter().map(key).collect(),
    }
}

fn store(mode: StoreMode, value: impl Into<Payload>) -> Operation {
    Operation::Store {
        mode,
        key: key("k"),
        payload: value.into(),
        ttl: Ttl::secs(60),
    }
}

fn set() -> Operation {
    store(StoreMode::Set, Payload::from("v").with_flags(7))
}

fn swap(unique: u64) -> Operation {
    Operation::CompareAndSwap {
        key: key("k"),
        payload: "v".into(),
        ttl: Ttl::NEVER,
        token: token(unique),
    }
}

fn delete() -> Operation {
    Operation::Delete { key: key("k") }
}

fn touch() -> Operation {
    Operation::Touch {
        key: key("k"),
        ttl: Ttl::secs(60),
    }
}

fn get_and_touch() -> Operation {
    Operation::GetAndTouch {
        key: key("k"),
        ttl: Ttl::secs(60),
    }
}

fn count(direction: Direction) -> Operation {
    Operation::Arithmetic {
        key: key("k"),
        delta: 2,
        direction,
    }
}

/// What came of a request, in a form that can be compared.
#[derive(Debug, PartialEq)]
struct Outcome {
    result: String,
    error: Option<(ErrorKind, Sent, Charge)>,
    dirty: bool,
    writes: Vec<Vec<u8>>,
}

fn show(result: &Result<Response>) -> String {
    match result {
        Ok(Response::Values(outcomes)) => format!(
            "{:?}",
            outcomes
                .iter()
                .map(|outcome| outcome.as_ref().map_err(ToString::to_string))
                .collect::<Vec<_>>()
        ),
        Ok(response) => format!("{response:?}"),
        Err(error) => error.to_string(),
    }
}

/// One request, and an answer that arrives in these pieces.
fn exchange(operation: &Operation, pieces: Vec<Bytes>, ends: bool) -> Outcome {
    let (script, writes) = Script::new(pieces);
    let script = if ends { script.ending() } else { script };
    let mut wire = Wire::new(Box::new(script), MAX_VALUE);
    let result = wire
        .exchange(operation, base())
        .now_or_never()
        .unwrap_or_else(|| Err(Error::new(ErrorKind::Timeout, "it waits for more")));
    let error = result
        .as_ref()
        .err()
        .map(|error| (error.kind(), error.sent(), error.charge()));
    Outcome {
        result: show(&result),
        error,
        dirty: wire.is_dirty(),
        writes: writes.lock().unwrap().clone(),
    }
}

fn whole(reply: &str) -> Vec<Bytes> {
    vec![Bytes::copy_from_slice(reply.as_bytes())]
}

/// Cut in two at each place, and into single bytes.
fn cuts(reply: &str) -> impl Iterator<Item = Vec<Bytes>> {
    let reply = Bytes::copy_from_slice(reply.as_bytes());
    let bytes = reply.chunks(1).map(Bytes::copy_from_slice).collect();
    let halves = (0..reply.len()).map({
        let reply = reply.clone();
        move |at| vec![reply.slice(..at), reply.slice(at..)]
    });
    halves.chain([bytes]).collect::<Vec<_>>().into_iter()
}

/// Requests with how they are said, an answer, and what that means.
fn conversations() -> Vec<(Operation, String, &'static str, &'static str)> {
    let said = |text: &str| text.to_owned();
    let large = "x".repeat(MAX_VALUE + 1);
    let too_large: &'static str = format!(
        "VALUE a 0 {}\r\n{large}\r\nVALUE b 9 1\r\nB\r\nEND\r\n",
        large.len()
    )
    .leak();
    let absent: &'static str = format!(
        "VALUE k {} 23\r\ntower-memcached: absent\r\nEND\r\n",
        0x4e4f_4e45
    )
    .leak();
    let appended = store(StoreMode::Append, Payload::from("v").with_flags(0));
    vec![
        (get("k"), said("get k\r\n"), "END\r\n", "Value(None)"),
        (
            get("k"),
            said("get k\r\n"),
            "VALUE k 4294967295 3\r\nabc\r\nEND\r\n",
            "Value(Some(Value { data: b\"abc\", flags: 4294967295, cas: None, stale: false }))",
        ),
        (
            get("k"),
            said("get k\r\n"),
            "VALUE k 0 0\r\n\r\nEND\r\n",
            "Value(Some(Value { data: b\"\", flags: 0, cas: None, stale: false }))",
        ),
        (
            get("k"),
            said("get k\r\n"),
            "VALUE k 0 13\r\nA\r\nEND\r\nVALUE\r\nEND\r\n",
            "Value(Some(Value { data: b\"A\\r\\nEND\\r\\nVALUE\", flags: 0, cas: None, stale: false }))",
        ),
        (get("k"), said("get k\r\n"), absent, "Value(None)"),
        (
            gets("k"),
            said("gets k\r\n"),
            "VALUE k 1 3 18446744073709551615\r\nabc\r\nEND\r\n",
            "Value(Some(Value { data: b\"abc\", flags: 1, cas: Some(CasToken { node: 1, \
             connection: 3, unique: 18446744073709551615 }), stale: false }))",
        ),
        (gets("k"), said("gets k\r\n"), "END\r\n", "Value(None)"),
        (
            many(&["a", "b", "a"]),
            said("get a b a\r\n"),
            "VALUE a 1 1\r\n1\r\nVALUE b 2 1\r\n2\r\nVALUE a 3 1\r\n3\r\nEND\r\n",
            "[Ok(Some(Value { data: b\"1\", flags: 1, cas: None, stale: false })), \
             Ok(Some(Value { data: b\"2\", flags: 2, cas: None, stale: false })), \
             Ok(Some(Value { data: b\"3\", flags: 3, cas: None, stale: false }))]",
        ),
        // A proxy in front of several servers.
        (
            many(&["a", "b", "c"]),
            said("get a b c\r\n"),
            "VALUE c 0 1\r\n3\r\nVALUE a 0 1\r\n1\r\nEND\r\n",
            "[Ok(Some(Value { data: b\"1\", flags: 0, cas: None, stale: false })), Ok(None), \
             Ok(Some(Value { data: b\"3\", flags: 0, cas: None, stale: false }))]",
        ),
        (
            many(&["a", "b"]),
            said("get a b\r\n"),
            too_large,
            "[Err(\"value too large: the stored value has 65 bytes, over this client's limit\"), \
             Ok(Some(Value { data: b\"B\", flags: 9, cas: None, stale: false }))]",
        ),
        (many(&["a"]), said("get a\r\n"), "END\r\n", "[Ok(None)]"),
        (
            set(),
            said("set k 7 60 1\r\nv\r\n"),
            "STORED\r\n",
            "Stored(true)",
        ),
        (
            store(StoreMode::Add, "v"),
            said("add k 0 60 1\r\nv\r\n"),
            "NOT_STORED\r\n",
            "Stored(false)",
        ),
        (
            store(StoreMode::Claim, "v"),
            said("add k 0 60 1\r\nv\r\n"),
            "STORED\r\n",
            "Stored(true)",
        ),
        (
            store(StoreMode::Replace, "v"),
            said("replace k 0 60 1\r\nv\r\n"),
            "NOT_STORED\r\n",
            "Stored(false)",
        ),
        (
            appended,
            said("append k 0 0 1\r\nv\r\n"),
            "STORED\r\n",
            "Stored(true)",
        ),
        (
            store(StoreMode::Prepend, ""),
            said("prepend k 0 0 0\r\n\r\n"),
            "NOT_STORED\r\n",
            "Stored(false)",
        ),
        (
            swap(9),
            said("cas k 0 0 1 9\r\nv\r\n"),
            "STORED\r\n",
            "Swapped(Stored)",
        ),
        (
            swap(9),
            said("cas k 0 0 1 9\r\nv\r\n"),
            "EXISTS\r\n",
            "Swapped(Exists)",
        ),
        (
            swap(9),
            said("cas k 0 0 1 9\r\nv\r\n"),
            "NOT_FOUND\r\n",
            "Swapped(NotFound)",
        ),
        (
            delete(),
            said("delete k\r\n"),
            "DELETED\r\n",
            "Deleted(true)",
        ),
        (
            delete(),
            said("delete k\r\n"),
            "NOT_FOUND\r\n",
            "Deleted(false)",
        ),
        (
            touch(),
            said("touch k 60\r\n"),
            "TOUCHED\r\n",
            "Touched(true)",
        ),
        (
            touch(),
            said("touch k 60\r\n"),
            "NOT_FOUND\r\n",
            "Touched(false)",
        ),
        (
            get_and_touch(),
            said("touch k 60\r\nget k\r\n"),
            "TOUCHED\r\nVALUE k 5 1\r\nv\r\nEND\r\n",
            "Value(Some(Value { data: b\"v\", flags: 5, cas: None, stale: false }))",
        ),
        (
            get_and_touch(),
            said("touch k 60\r\nget k\r\n"),
            "TOUCHED\r\nEND\r\n",
            "Value(None)",
        ),
        // Somebody has written it in between: it was not there to be touched.
        (
            get_and_touch(),
            said("touch k 60\r\nget k\r\n"),
            "NOT_FOUND\r\nVALUE k 5 1\r\nv\r\nEND\r\n",
            "Value(None)",
        ),
        (
            count(Direction::Up),
            said("incr k 2\r\n"),
            "18446744073709551615\r\n",
            "Counter(Some(18446744073709551615))",
        ),
        (
            count(Direction::Up),
            said("incr k 2\r\n"),
            "NOT_FOUND\r\n",
            "Counter(None)",
        ),
        (
            count(Direction::Down),
            said("decr k 2\r\n"),
            "9 \r\n",
            "Counter(Some(9))",
        ),
        (
            Operation::Version,
            said("version\r\n"),
            "VERSION 1.4.0-\u{e9}\r\n",
            "Version(\"1.4.0-\u{e9}\")",
        ),
        (
            Operation::FlushAll,
            said("flush_all\r\n"),
            "OK\r\n",
            "Flushed",
        ),
        (
            Operation::Stats,
            said("stats\r\n"),
            "STAT pid 1\r\nSTAT libevent \r\nSTAT version 1.4 b\r\nEND\r\n",
            "Stats({\"libevent\": \"\", \"pid\": \"1\", \"version\": \"1.4 b\"})",
        ),
    ]
}

#[test]
fn each_request_is_one_write_and_its_answer_means_the_same_however_it_arrives() {
    for (operation, said, reply, meaning) in conversations() {
        let expected = Outcome {
            result: meaning.to_owned(),
            error: None,
            dirty: false,
            writes: vec![said.into_bytes()],
        };
        for pieces in cuts(reply).chain([whole(reply)]) {
            let outcome = exchange(&operation, pieces.clone(), false);
            assert_eq!(outcome, expected, "{operation:?}: {pieces:?}");
        }
    }
}

proptest! {
    #[test]
    fn pieces_of_any_size_make_the_same_answer(
        sizes in vec(1..40_usize, 1..60),
        which in any::<prop::sample::Index>(),
    ) {
        let conversations = conversations();
        let (operation, _, reply, _) = which.get(&conversations);
        let mut rest = Bytes::copy_from_slice(reply.as_bytes());
        let mut pieces = Vec::new();
        for size in sizes.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            pieces.push(rest.split_to(size.min(rest.len())));
        }
        prop_assert_eq!(
            exchange(operation, pieces, true),
            exchange(operation, whole(reply), true)
        );
    }
}

#[test]
fn an_answer_that_breaks_off_is_a_lost_connection() {
    for (operation, _, reply, _) in conversations() {
        for end in 0..reply.len() {
            let Some(cut) = reply.get(..end) else {
                continue;
            };
            let outcome = exchange(&operation, whole(cut), true);
            let lost = (ErrorKind::ConnectionLost, Sent::Maybe, Charge::Node);
            assert_eq!(outcome.error, Some(lost), "{operation:?}: {cut:?}");
            assert!(outcome.dirty);
            let outcome = exchange(&operation, whole(cut), false);
            assert_eq!(outcome.result, "timed out: it waits for more (not sent)");
            assert!(outcome.dirty, "{operation:?}: {cut:?}");
        }
    }
}

#[test]
fn what_does_not_answer_the_request_ends_the_connection() {
    let large = "x".repeat(MAX_VALUE + 1);
    let skipped: &'static str = format!("VALUE k 0 65\r\n{large}END\r\n").leak();
    let endless: &'static str = "x".repeat(2100).leak();
    let cases = [
        // Another one's answer.
        (get("k"), "VALUE kk 0 1\r\nv\r\nEND\r\n"),
        (get("kk"), "VALUE k 0 1\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE K 0 1\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1\r\nv\r\nVALUE k 0 1\r\nv\r\nEND\r\n"),
        (
            many(&["a", "b"]),
            "VALUE a 0 1\r\nv\r\nVALUE a 0 1\r\nv\r\nEND\r\n",
        ),
        (many(&["a", "b"]), "VALUE c 0 1\r\nv\r\nEND\r\n"),
        (get("k"), "STORED\r\n"),
        (get("k"), "OK\r\n"),
        (get("k"), "9\r\n"),
        (set(), "END\r\n"),
        (set(), "DELETED\r\n"),
        (set(), "EXISTS\r\n"),
        (set(), "NOT_STORED\r\n"),
        (set(), "VALUE k 0 1\r\nv\r\nEND\r\n"),
        (store(StoreMode::Add, "v"), "NOT_FOUND\r\n"),
        (swap(1), "NOT_STORED\r\n"),
        (swap(1), "DELETED\r\n"),
        (delete(), "STORED\r\n"),
        (delete(), "TOUCHED\r\n"),
        (touch(), "DELETED\r\n"),
        (touch(), "END\r\n"),
        (get_and_touch(), "VALUE k 0 1\r\nv\r\nEND\r\n"),
        (get_and_touch(), "TOUCHED\r\nTOUCHED\r\n"),
        (get_and_touch(), "TOUCHED\r\nVALUE j 0 1\r\nv\r\nEND\r\n"),
        (count(Direction::Up), "OK\r\n"),
        (count(Direction::Up), "STORED\r\n"),
        (count(Direction::Up), "-1\r\n"),
        (count(Direction::Up), " 9\r\n"),
        (count(Direction::Up), "9\t\r\n"),
        (count(Direction::Up), "\r\n"),
        (count(Direction::Up), "18446744073709551616\r\n"),
        (Operation::Version, "OK\r\n"),
        (Operation::Version, "END\r\n"),
        (Operation::FlushAll, "VERSION 1\r\n"),
        (Operation::Stats, "OK\r\n"),
        (Operation::Stats, "VALUE k 0 1\r\nv\r\nEND\r\n"),
        // What only the meta protocol says.
        (get("k"), "VA 1\r\nv\r\n"),
        (get("k"), "EN\r\n"),
        (set(), "HD\r\n"),
        (many(&["a"]), "MN\r\n"),
        // Not the protocol at all.
        (get("k"), "VALUE k 0 -1\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1x\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k 0\r\nEND\r\n"),
        (get("k"), "VALUE k 4294967296 1\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1 5\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k  0 1\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1 \r\nv\r\nEND\r\n"),
        (get("k"), "VALUE\r\n"),
        (gets("k"), "VALUE k 0 1\r\nv\r\nEND\r\n"),
        (gets("k"), "VALUE k 0 1 5 6\r\nv\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1073741825\r\n"),
        (get("k"), "VALUE k 0 18446744073709551615\r\n"),
        (get("k"), "VALUE k 0 99999999999999999999999\r\n"),
        (get("k"), "VALUE k 0 1\r\nvvEND\r\n"),
        (get("k"), "VALUE k 0 1\r\nv\rEND\r\n"),
        (get("k"), skipped),
        (get("k"), "END\n"),
        (get("k"), "END \r\n"),
        (get("k"), "end\r\n"),
        (get("k"), "\r\n"),
        (get("k"), "HTTP/1.1 400 Bad Request\r\n"),
        (set(), "STORED \r\n"),
        (set(), "\0STORED\r\n"),
        (get("k"), endless),
        // More than was asked for.
        (get("k"), "END\r\nEND\r\n"),
        (get("k"), "VALUE k 0 1\r\nv\r\nEND\r\nE"),
        (set(), "STORED\r\nSTORED\r\n"),
        (delete(), "DELETED\r\n\0"),
        (Operation::Version, "VERSION 1\r\n\r\n"),
    ];
    for (operation, reply) in cases {
        let outcome = exchange(&operation, whole(reply), true);
        let violation = (ErrorKind::Protocol, Sent::Maybe, Charge::Node);
        assert_eq!(
            outcome.error,
            Some(violation),
            "{operation:?}: {reply:?}: {outcome:?}"
        );
        assert!(outcome.dirty, "{operation:?}: {reply:?}");
    }
}

#[test]
fn what_is_too_early_to_be_an_answer_is_none() {
    // The next request finds what was one answer too many, or is dirty by then.
    let (script, _) = Script::new(whole("END\r\n").into_iter().chain(whole("END\r\n")));
    let mut wire = Wire::new(Box::new(script), MAX_VALUE);
    let first = wire.exchange(&get("a"), base()).now_or_never().unwrap();
    assert!(first.is_ok() && !wire.is_dirty());
    let second = wire.exchange(&get("b"), base()).now_or_never().unwrap();
    let error = second.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Protocol, Sent::No)
    );
    assert!(wire.is_dirty() && !wire.has_sent());
    let third = wire.exchange(&get("c"), base()).now_or_never().unwrap();
    assert_eq!(
        third.unwrap_err().sent(),
        Sent::No,
        "it is never used again"
    );
}

#[test]
fn a_server_that_says_no_is_understood() {
    use ErrorKind::*;
    let non_numeric = "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n";
    let (no, yes) = (false, true);
    let cases = [
        (
            set(),
            "SERVER_ERROR object too large for cache\r\n",
            ValueTooLarge,
            Sent::Yes,
            no,
        ),
        (
            set(),
            "SERVER_ERROR out of memory storing object\r\n",
            Server,
            Sent::Yes,
            no,
        ),
        // A proxy's: its server may have done it, or may still do so.
        (
            set(),
            "SERVER_ERROR Connection timed out\r\n",
            Server,
            Sent::Maybe,
            no,
        ),
        (
            delete(),
            "SERVER_ERROR Connection refused\r\n",
            Server,
            Sent::Maybe,
            no,
        ),
        (
            get("k"),
            "SERVER_ERROR Connection refused\r\n",
            Server,
            Sent::Yes,
            no,
        ),
        (
            many(&["a", "b"]),
            "SERVER_ERROR Connection refused\r\n",
            Server,
            Sent::Yes,
            yes,
        ),
        // Its value is being run as commands.
        (
            set(),
            "CLIENT_ERROR bad data chunk\r\n",
            Rejected,
            Sent::Yes,
            yes,
        ),
        (
            swap(1),
            "CLIENT_ERROR bad command line format\r\n",
            Rejected,
            Sent::Yes,
            yes,
        ),
        (set(), "ERROR\r\n", Unsupported, Sent::Yes, yes),
        (swap(1), "ERROR\r\n", Unsupported, Sent::Yes, yes),
        // A line is all that these are.
        (
            delete(),
            "CLIENT_ERROR bad command line format\r\n",
            Rejected,
            Sent::Yes,
            no,
        ),
        (
            get("k"),
            "CLIENT_ERROR bad command line format\r\n",
            Rejected,
            Sent::Yes,
            no,
        ),
        (touch(), "ERROR\r\n", Unsupported, Sent::Yes, no),
        (Operation::Stats, "ERROR\r\n", Unsupported, Sent::Yes, no),
        (
            get_and_touch(),
            "ERROR\r\nEND\r\n",
            Unsupported,
            Sent::Yes,
            no,
        ),
        (
            get_and_touch(),
            "ERROR\r\nVALUE k 0 1\r\nv\r\nEND\r\n",
            Unsupported,
            Sent::Yes,
            no,
        ),
        (
            get_and_touch(),
            "SERVER_ERROR x\r\nSERVER_ERROR x\r\n",
            Server,
            Sent::Maybe,
            no,
        ),
        (
            get_and_touch(),
            "TOUCHED\r\nSERVER_ERROR x\r\n",
            Server,
            Sent::Maybe,
            no,
        ),
        (count(Direction::Up), non_numeric, NotANumber, Sent::Yes, no),
        (
            count(Direction::Down),
            non_numeric,
            NotANumber,
            Sent::Yes,
            no,
        ),
        (
            count(Direction::Up),
            "SERVER_ERROR out of memory in incr\r\n",
            Server,
            Sent::Yes,
            no,
        ),
        // Does more follow?
        (
            many(&["a", "b"]),
            "VALUE a 0 1\r\nv\r\nSERVER_ERROR x\r\n",
            Server,
            Sent::Yes,
            yes,
        ),
        (
            Operation::Stats,
            "STAT a 1\r\nERROR\r\n",
            Unsupported,
            Sent::Yes,
            yes,
        ),
        (
            get("k"),
            "ERROR Too many open connections\r\n",
            Server,
            Sent::Yes,
            yes,
        ),
        (
            delete(),
            "CLIENT_ERROR x\r\nERROR\r\n",
            Rejected,
            Sent::Yes,
            yes,
        ),
    ];
    for (operation, reply, kind, sent, dirty) in cases {
        for pieces in cuts(reply).chain([whole(reply)]) {
            let outcome = exchange(&operation, pieces.clone(), false);
            let expected = Some((kind, sent, Charge::Nobody));
            assert_eq!(
                outcome.error, expected,
                "{operation:?}: {pieces:?}: {outcome:?}"
            );
            // Whether more has come already depends on the pieces.
            if !reply.ends_with("x\r\nERROR\r\n") || pieces.len() == 1 {
                assert_eq!(outcome.dirty, dirty, "{operation:?}: {pieces:?}");
            }
        }
    }
}

#[test]
fn what_the_protocol_cannot_say_is_not_sent() {
    let binary = || Key::binary([0]).unwrap();
    let cases = [
        (Operation::Delete { key: binary() }, ErrorKind::Unsupported),
        (
            Operation::GetMany {
                keys: Arc::from([key("k"), binary()]),
            },
            ErrorKind::Unsupported,
        ),
        (
            store(StoreMode::Set, vec![b'v'; MAX_VALUE + 1]),
            ErrorKind::ValueTooLarge,
        ),
    ];
    for (operation, kind) in cases {
        let outcome = exchange(&operation, Vec::new(), true);
        assert_eq!(outcome.error, Some((kind, Sent::No, Charge::Nobody)));
        assert!(!outcome.dirty && outcome.writes.is_empty());
    }
    let nothing = exchange(&many(&[]), Vec::new(), true);
    assert_eq!(nothing.result, "[]");
    assert!(nothing.writes.is_empty());
}

fn leased() -> Operation {
    Operation::Lookup {
        key: key("k"),
        lease: Some(LeaseTerms::new(Duration::from_millis(1500))),
    }
}

/// A look-up for a lease, whose questions get these replies: the questions, and its answer. What it
/// takes the lease with is `{ours}`.
fn look_up(company: Company, replies: &[&str]) -> (Vec<String>, Lookup) {
    let mut looking = Looking::new(&leased(), company, MAX_VALUE).unwrap();
    let (mut said, mut ours) = (Vec::new(), String::new());
    for reply in replies {
        let (script, writes) = Script::new(whole(&reply.replace("{ours}", &ours)));
        let mut wire = Wire::new(Box::new(script), MAX_VALUE);
        let answer = block_on(wire.exchange(looking.question(), base())).unwrap();
        assert!(!wire.is_dirty());
        let question = String::from_utf8(writes.lock().unwrap().concat()).unwrap();
        let mut lines = question.lines();
        if let Some(value) = lines.nth(1) {
            ours = value.to_owned();
            said.push(question.replace(&ours, "{ours}"));
        } else {
            said.push(question);
        }
        if let Next::Answer(answer) = looking.answered(&answer) {
            assert_eq!(said.len(), replies.len(), "it asks no more");
            let Response::Found(lookup) = answer else {
                panic!("{answer:?}");
            };
            assert!(lookup.untimed);
            return (said, *lookup);
        }
    }
    panic!("it asks for more than {replies:?}");
}

const OTHERS: &str = "VALUE k 1212501060 55 9\r\n\
    tower-memcached: lease 00000000000000000000000000000000\r\nEND\r\n";

#[test]
fn a_lease_is_taken_by_a_placeholder_that_is_still_there() {
    let ours = "VALUE k 1212501060 55 7\r\n{ours}\r\nEND\r\n";
    let value = "VALUE k 3 1 8\r\nv\r\nEND\r\n";
    let absent = format!("VALUE k {ABSENT_FLAGS} 23 8\r\ntower-memcached: absent\r\nEND\r\n");
    let found = Found::Value {
        value: Value::new("v", 3).with_cas(Some(token(8))),
        left: None,
    };
    let (look, take) = ("gets k\r\n", "add k 1212501060 2 55\r\n{ours}\r\n");
    let (none, stored, not_stored) = ("END\r\n", "STORED\r\n", "NOT_STORED\r\n");
    let (first, all) = (&[look][..], &[look, take, look][..]);
    type Case<'a> = (&'a [&'a str], &'a [&'a str], Found, Option<u64>, LeaseState);
    let cases: [Case<'_>; 10] = [
        (
            &[none, stored, ours],
            all,
            Found::Nothing,
            Some(7),
            LeaseState::Won,
        ),
        // Somebody has been faster, or has written or deleted it in between.
        (
            &[none, not_stored, OTHERS],
            all,
            Found::Nothing,
            Some(9),
            LeaseState::Taken,
        ),
        (
            &[none, not_stored, value],
            all,
            found.clone(),
            Some(8),
            LeaseState::Free,
        ),
        (
            &[none, not_stored, none],
            all,
            Found::Nothing,
            None,
            LeaseState::Free,
        ),
        (
            &[none, stored, OTHERS],
            all,
            Found::Nothing,
            Some(9),
            LeaseState::Taken,
        ),
        (
            &[none, stored, value],
            all,
            found.clone(),
            Some(8),
            LeaseState::Free,
        ),
        (
            &[none, stored, none],
            all,
            Found::Nothing,
            None,
            LeaseState::Free,
        ),
        (&[OTHERS], first, Found::Nothing, Some(9), LeaseState::Taken),
        (&[value], first, found, Some(8), LeaseState::Free),
        (
            &[&absent],
            first,
            Found::Absent { left: None },
            Some(8),
            LeaseState::Free,
        ),
    ];
    for (replies, questions, found, unique, lease) in cases {
        for company in [Company::Classic, Company::Mixed] {
            let (said, lookup) = look_up(company, replies);
            assert_eq!(said, questions, "{replies:?}");
            assert_eq!(lookup.found, found, "{replies:?}");
            assert_eq!(lookup.token, unique.map(token), "{replies:?}");
            assert_eq!(lookup.lease, lease, "{replies:?}");
        }
    }
}

#[test]
fn through_a_proxy_a_lookup_is_one_question_and_takes_no_lease() {
    for (reply, found) in [("END\r\n", None), (OTHERS, Some(token(9)))] {
        let (said, lookup) = look_up(Company::Proxied, &[reply]);
        assert_eq!(said, ["gets k\r\n"]);
        assert_eq!(lookup.found, Found::Nothing);
        assert_eq!((lookup.token, lookup.lease), (found, LeaseState::Unknown));
    }
}

#[test]
fn what_may_be_a_lease_of_the_meta_protocol_is_not_relied_on() {
    let empty = "VALUE k 0 0 8\r\n\r\nEND\r\n";
    let (_, lookup) = look_up(Company::Mixed, &[empty]);
    assert_eq!(
        (lookup.found, lookup.token),
        (Found::Unreadable, Some(token(8)))
    );
    let (_, lookup) = look_up(Company::Classic, &[empty]);
    assert!(matches!(lookup.found, Found::Value { value, .. } if value.is_empty()));
    // Nobody's lease has flags.
    let (_, lookup) = look_up(Company::Mixed, &["VALUE k 1 0 8\r\n\r\nEND\r\n"]);
    assert!(matches!(lookup.found, Found::Value { .. }));
}

#[test]
fn a_lease_lasts_a_second_at_least_and_is_not_taken_where_it_has_no_room() {
    let mut operation = leased();
    operation.cap_ttl(Duration::ZERO);
    let nothing = Response::Found(Box::new(Lookup::NOTHING));
    let mut looking = Looking::new(&operation, Company::Classic, MAX_VALUE).unwrap();
    assert!(matches!(looking.answered(&nothing), Next::Question));
    let Operation::Store { ttl, .. } = looking.question() else {
        panic!("{looking:?}");
    };
    assert_eq!(*ttl, Ttl::secs(1));
    let mut looking = Looking::new(&operation, Company::Classic, 54).unwrap();
    assert!(matches!(looking.answered(&nothing), Next::Answer(_)));
    assert!(Looking::new(&get("k"), Company::Classic, MAX_VALUE).is_none());
}

#[test]
fn to_every_read_a_placeholder_is_a_miss_whatever_was_appended_to_it() {
    let data = "head tower-memcached: lease 0 tail";
    for (operation, cas) in [(get("k"), ""), (gets("k"), " 9"), (many(&["k", "l"]), "")] {
        let reply = format!(
            "VALUE k 1212501060 {}{cas}\r\n{data}\r\nEND\r\n",
            data.len()
        );
        let meaning = match operation {
            Operation::GetMany { .. } => "[Ok(None), Ok(None)]",
            _ => "Value(None)",
        };
        assert_eq!(exchange(&operation, whole(&reply), false).result, meaning);
    }
    let reply = format!(
        "TOUCHED\r\nVALUE k 1212501060 {}\r\n{data}\r\nEND\r\n",
        data.len()
    );
    let touched = exchange(&get_and_touch(), whole(&reply), false);
    assert_eq!(touched.result, "Value(None)");
    // It takes the flags and the words.
    let reply = format!("VALUE k 0 {}\r\n{data}\r\nEND\r\n", data.len());
    let value = exchange(&get("k"), whole(&reply), false);
    assert!(value.result.contains("Some"), "{}", value.result);
}

#[test]
fn a_request_that_is_dropped_leaves_the_connection_dirty_once_it_was_sent() {
    for (operation, _, reply, _) in conversations() {
        let mut ended = false;
        for polls in 0.. {
            let pieces = reply.as_bytes().chunks(5).map(Bytes::copy_from_slice);
            let (script, writes) = Script::new(pieces);
            let mut wire = Wire::new(Box::new(script.waiting()), MAX_VALUE);
            let mut exchange = Box::pin(wire.exchange(&operation, base()));
            ended = (0..polls).any(|_| exchange.as_mut().now_or_never().is_some());
            drop(exchange);
            let sent = !writes.lock().unwrap().is_empty();
            assert_eq!(wire.has_sent(), sent);
            if ended {
                assert!(!wire.is_dirty(), "{operation:?}");
                break;
            }
            assert!(
                wire.is_dirty() || !sent,
                "{operation:?} after {polls} polls"
            );
        }
        assert!(ended);
    }
}

#[tokio::test]
async fn a_connection_that_has_ended_meanwhile_is_found_out_before_anything_is_sent() {
    let (ours, theirs) = tokio::io::duplex(64);
    drop(theirs);
    let mut wire = Wire::new(Box::new(ours), MAX_VALUE);
    let error = wire.exchange(&set(), base()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent(), error.charge()),
        (ErrorKind::ConnectionLost, Sent::No, Charge::Nobody)
    );
    assert!(wire.is_dirty() && !wire.has_sent());

    let (ours, mut theirs) = tokio::io::duplex(64);
    theirs.write_all(b"E").await.unwrap();
    let mut wire = Wire::new(Box::new(ours), MAX_VALUE);
    let error = wire.exchange(&set(), base()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Protocol, Sent::No)
    );
    assert!(wire.is_dirty() && !wire.has_sent());
}

/// A server behind so small a pipe that each side waits for the other to read.
async fn narrow<F>(
    operation: &Operation,
    server: impl FnOnce(tokio::io::DuplexStream) -> F,
) -> (Result<Response>, bool)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (ours, theirs) = tokio::io::duplex(16);
    let server = tokio::spawn(server(theirs));
    let mut wire = Wire::new(Box::new(ours), 1 << 20);
    let exchange = wire.exchange(operation, base());
    let outcome = timeout(PATIENCE, exchange)
        .await
        .expect("they wait for each other");
    let dirty = wire.is_dirty();
    drop(wire);
    timeout(PATIENCE, server).await.unwrap().unwrap();
    (outcome, dirty)
}

fn large() -> Operation {
    store(StoreMode::Set, vec![b'v'; 100_000])
}

const LARGE: usize = "set k 0 60 100000\r\n".len() + 100_000 + 2;

#[tokio::test]
async fn a_server_may_refuse_a_value_before_it_has_read_it() {
    let reply = b"SERVER_ERROR object too large for cache\r\n";
    let (outcome, dirty) = narrow(&large(), |mut stream| async move {
        // Longer than what the pipe holds: it reads on only once this is read.
        stream.write_all(reply).await.unwrap();
        let mut request = vec![0; LARGE];
        stream.read_exact(&mut request).await.unwrap();
        assert!(
            request.ends_with(b"v\r\n"),
            "the value is sent all the same"
        );
    })
    .await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::ValueTooLarge);
    assert!(!dirty);
}

#[tokio::test]
async fn what_a_server_takes_for_commands_is_not_sent_any_further() {
    for reply in ["CLIENT_ERROR bad command line format\r\n", "ERROR\r\n"] {
        let (outcome, dirty) = narrow(&large(), move |mut stream| async move {
            stream.write_all(reply.as_bytes()).await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            assert!(rest.len() < 1000, "{} bytes", rest.len());
        })
        .await;
        let kind = outcome.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Rejected | ErrorKind::Unsupported));
        assert!(dirty);
    }
}

#[tokio::test]
async fn an_answer_to_half_a_request_is_somebody_elses() {
    let (outcome, dirty) = narrow(&large(), |mut stream| async move {
        stream.write_all(b"STORED\r\n").await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    })
    .await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Protocol);
    assert!(dirty);
}

#[tokio::test]
async fn a_server_that_talks_and_does_not_listen_is_no_server() {
    let (outcome, dirty) = narrow(&large(), |mut stream| async move {
        while stream.write_all(&[b'x'; 100]).await.is_ok() {}
    })
    .await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Protocol);
    assert!(dirty);
}

#[tokio::test]
async fn why_a_server_closes_is_read_when_it_takes_no_more() {
    let (outcome, dirty) = narrow(&large(), |mut stream| async move {
        let mut some = [0; 64];
        stream.read_exact(&mut some).await.unwrap();
        stream.write_all(b"ERROR x\r\n").await.unwrap();
    })
    .await;
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(dirty);

    let (outcome, dirty) = narrow(&large(), |stream| async move { drop(stream) }).await;
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
    assert!(dirty || error.sent() == Sent::No);
}

#[tokio::test]
async fn both_halves_of_a_get_and_touch_fit_through_any_pipe() {
    let (outcome, dirty) = narrow(&get_and_touch(), |mut stream| async move {
        let mut request = [0; 12];
        stream.read_exact(&mut request).await.unwrap();
        assert_eq!(&request, b"touch k 60\r\n");
        stream.write_all(b"TOUCHED\r\n").await.unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).await.unwrap();
        assert_eq!(&request, b"get k\r\n");
        stream
            .write_all(b"VALUE k 0 1\r\nv\r\nEND\r\n")
            .await
            .unwrap();
    })
    .await;
    assert!(matches!(outcome, Ok(Response::Value(Some(value))) if value == "v"));
    assert!(!dirty);
}

#[test]
fn a_value_of_a_length_that_is_not_allowed_is_never_announced_to_memcache_async() {
    for (length, allowed) in [
        (0, true),
        (MAX_VALUE as u64, true),
        (MAX_VALUE as u64 + 1, false),
        (1 << 30, false),
    ] {
        let operation = get("k");
        let mut check = Check::new(&operation, MAX_VALUE);
        let mut input = BytesMut::from(format!("VALUE k 0 {length}\r\n").as_str());
        assert!(check.advance(&mut input).unwrap().is_none());
        assert_eq!(!check.approved().is_empty(), allowed, "{length}");
        let announced = if allowed { length as usize } else { 0 };
        assert_eq!(check.data(), announced);
    }
}

proptest! {
    #[test]
    fn each_value_is_given_to_a_key_it_came_for(
        asked in vec(0..5_u8, 1..12),
        answered in vec(any::<(bool, prop::sample::Index)>(), 12),
    ) {
        // Some of the places asked for, in any order.
        let mut places: Vec<_> = (0..asked.len()).filter(|&place| answered[place].0).collect();
        for (from, (_, to)) in answered.iter().enumerate().take(places.len()) {
            let to = to.index(places.len());
            places.swap(from, to);
        }
        let mut reply = String::new();
        for (nth, &place) in places.iter().enumerate() {
            let key = asked[place];
            reply += &format!("VALUE k{key} {nth} 2\r\nv{key}\r\n");
        }
        reply += "END\r\n";
        let keys = asked.iter().map(|nth| key(format!("k{nth}"))).collect();
        let operation = Operation::GetMany { keys };
        let (script, _) = Script::new(whole(&reply));
        let mut wire = Wire::new(Box::new(script), MAX_VALUE);
        let response = block_on(wire.exchange(&operation, base())).unwrap();
        let Response::Values(outcomes) = response else {
            panic!("{response:?}");
        };
        let mut found: Vec<_> = Vec::new();
        for (key, outcome) in asked.iter().zip(outcomes) {
            if let Some(value) = outcome.unwrap() {
                let expected = format!("v{key}");
                prop_assert!(value == *expected.as_str());
                found.push(value.flags() as usize);
            }
        }
        found.sort_unstable();
        prop_assert_eq!(found, (0..places.len()).collect::<Vec<_>>(), "each of them once");
    }
}

#[test]
fn a_key_need_not_be_text() {
    let name = b"\xff\xfe\x80";
    let operation = Operation::Get {
        key: key(name),
        with_cas: false,
    };
    let reply = [b"VALUE ", &name[..], b" 1 1\r\nv\r\nEND\r\n"].concat();
    let (script, _) = Script::new([Bytes::from(reply)]);
    let mut wire = Wire::new(Box::new(script), MAX_VALUE);
    let response = block_on(wire.exchange(&operation, base())).unwrap();
    assert!(matches!(response, Response::Value(Some(value)) if value == "v" && value.flags() == 1));
}

/// A whole life of a key, against anything that is a memcached.
#[cfg(feature = "testing")]
async fn converse(wire: &mut Wire) {
    let mut ask = async |operation: Operation| {
        let answer = timeout(PATIENCE, wire.exchange(&operation, base())).await;
        let answer = answer.expect("an answer");
        assert!(!wire.is_dirty(), "{operation:?}: {answer:?}");
        answer
    };
    macro_rules! answers {
        ($operation:expr, $expected:pat) => {
            let answer = ask($operation).await;
            assert!(matches!(answer, Ok($expected)), "{answer:?}");
        };
    }
    answers!(get("k"), Response::Value(None));
    answers!(store(StoreMode::Replace, "v"), Response::Stored(false));
    answers!(store(StoreMode::Append, "v"), Response::Stored(false));
    answers!(touch(), Response::Touched(false));
    answers!(get_and_touch(), Response::Value(None));
    answers!(delete(), Response::Deleted(false));
    answers!(count(Direction::Up), Response::Counter(None));
    answers!(swap(1), Response::Swapped(CasOutcome::NotFound));
    answers!(set(), Response::Stored(true));
    answers!(store(StoreMode::Add, "w"), Response::Stored(false));
    answers!(store(StoreMode::Append, "b"), Response::Stored(true));
    answers!(store(StoreMode::Prepend, "a"), Response::Stored(true));
    answers!(touch(), Response::Touched(true));
    let Ok(Response::Value(Some(value))) = ask(get_and_touch()).await else {
        panic!("it is there");
    };
    assert_eq!((&value[..], value.flags()), (&b"avb"[..], 7));
    let Ok(Response::Value(Some(value))) = ask(gets("k")).await else {
        panic!("it is there");
    };
    let token = value.cas().unwrap();
    assert_eq!(
        (token.node, token.connection),
        (base().node, base().connection)
    );
    let swap = |token| Operation::CompareAndSwap {
        key: key("k"),
        payload: Payload::from("10").with_flags(3),
        ttl: Ttl::secs(60),
        token,
    };
    answers!(swap(token), Response::Swapped(CasOutcome::Stored));
    answers!(swap(token), Response::Swapped(CasOutcome::Exists));
    answers!(count(Direction::Up), Response::Counter(Some(12)));
    answers!(count(Direction::Down), Response::Counter(Some(10)));
    answers!(count(Direction::Down), Response::Counter(Some(8)));
    answers!(set(), Response::Stored(true));
    let error = ask(count(Direction::Up)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotANumber);

    let bytes: Vec<u8> = (0..500_000_u32).map(|n| n as u8).collect();
    let large = |name: &str| Operation::Store {
        mode: StoreMode::Set,
        key: key(name),
        payload: Payload::from(&bytes[..]).with_flags(u32::MAX),
        ttl: Ttl::NEVER,
    };
    answers!(large("large"), Response::Stored(true));
    let Ok(Response::Values(outcomes)) = ask(many(&["k", "large", "none", "large", "k"])).await
    else {
        panic!("values");
    };
    let found: Vec<_> = outcomes
        .into_iter()
        .map(|outcome| {
            outcome
                .unwrap()
                .map(|value| (value.flags(), value.into_bytes()))
        })
        .collect();
    let small = Some((7, Bytes::from_static(b"v")));
    let large = Some((u32::MAX, Bytes::from(bytes)));
    assert_eq!(found, [small.clone(), large.clone(), None, large, small]);

    let names: Vec<_> = (0..2000).map(|n| format!("{n:0>250}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let Ok(Response::Values(outcomes)) = ask(many(&names)).await else {
        panic!("values");
    };
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(None))));

    answers!(delete(), Response::Deleted(true));

    // A lease: somebody else has to wait, until it is given up.
    macro_rules! lease {
        ($found:pat, $lease:ident) => {{
            let mut looking = Looking::new(&leased(), Company::Classic, 1 << 20).unwrap();
            loop {
                let answer = ask(looking.question().clone()).await.unwrap();
                if let Next::Answer(answer) = looking.answered(&answer) {
                    let Response::Found(lookup) = answer else {
                        panic!("{answer:?}");
                    };
                    assert!(matches!(lookup.found, $found), "{lookup:?}");
                    assert_eq!(lookup.lease, LeaseState::$lease);
                    break lookup.token;
                }
            }
        }};
    }
    let won = lease!(Found::Nothing, Won).unwrap();
    assert_eq!(lease!(Found::Nothing, Taken), Some(won));
    answers!(get("k"), Response::Value(None));
    answers!(get_and_touch(), Response::Value(None));
    answers!(store(StoreMode::Add, "w"), Response::Stored(false));
    let error = ask(count(Direction::Up)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotANumber);
    let removal = |token| Operation::CompareAndSwap {
        key: key("k"),
        payload: "".into(),
        ttl: Ttl::secs(0),
        token,
    };
    answers!(removal(won), Response::Swapped(CasOutcome::Stored));
    answers!(touch(), Response::Touched(false));
    let next = lease!(Found::Nothing, Won).unwrap();
    assert_ne!(next, won);
    answers!(removal(won), Response::Swapped(CasOutcome::Exists));
    answers!(delete(), Response::Deleted(true));
    answers!(swap(next), Response::Swapped(CasOutcome::NotFound));
    let won = lease!(Found::Nothing, Won).unwrap();
    answers!(store(StoreMode::Append, "tail"), Response::Stored(true));
    answers!(get("k"), Response::Value(None));
    assert_ne!(lease!(Found::Nothing, Taken), Some(won));
    answers!(swap(won), Response::Swapped(CasOutcome::Exists));
    answers!(delete(), Response::Deleted(true));
    let won = lease!(Found::Nothing, Won).unwrap();
    answers!(swap(won), Response::Swapped(CasOutcome::Stored));
    assert!(lease!(Found::Value { .. }, Free).is_some());
    answers!(delete(), Response::Deleted(true));

    answers!(Operation::Version, Response::Version(_));
    let Ok(Response::Stats(stats)) = ask(Operation::Stats).await else {
        panic!("counters");
    };
    assert!(stats.contains_key("curr_items"));
    answers!(Operation::FlushAll, Response::Flushed);
    answers!(get("large"), Response::Value(None));
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn converses_with_the_in_process_server() {
    let server = crate::testing::Server::new();
    let (ours, theirs) = tokio::io::duplex(4096);
    let serving = tokio::spawn(server.serve(theirs));
    let mut wire = Wire::new(Box::new(ours), 1 << 20);
    converse(&mut wire).await;
    drop(wire);
    timeout(PATIENCE, serving).await.unwrap().unwrap();
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn converses_with_a_real_memcached() {
    let memcached = crate::testing::Memcached::spawn(&[]).unwrap();
    let stream = tokio::net::TcpStream::connect(memcached.socket_address());
    let mut wire = Wire::new(Box::new(stream.await.unwrap()), 2 << 20);
    converse(&mut wire).await;

    // One byte more than it takes: the value is swallowed, and the connection good.
    let oversized = store(StoreMode::Set, vec![b'v'; 1 << 20]);
    let error = wire.exchange(&oversized, base()).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::ValueTooLarge, Sent::Yes)
    );
    assert!(!wire.is_dirty());
    assert!(matches!(
        wire.exchange(&get("k"), base()).await,
        Ok(Response::Value(None))
    ));
}
