use std::io::IoSlice;
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::time::Instant;

use super::{Batch, Limits, Parser, Pipeline, Reply, Ticket, Violation, encode};
use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::key::Key;
use crate::request::{Direction, LeaseTerms, Operation, StoreMode};
use crate::response::{CasOutcome, Found, LeaseState, Response};
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload};

const LIMITS: Limits = Limits {
    value: 1 << 20,
    requests: 1000,
    queued_bytes: 1 << 20,
};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn get(text: &str) -> Operation {
    Operation::Get {
        key: key(text),
        with_cas: false,
    }
}

fn set(text: &str, value: impl Into<Bytes>) -> Operation {
    Operation::Store {
        mode: StoreMode::Set,
        key: key(text),
        payload: value.into().into(),
        ttl: Ttl::secs(60),
    }
}

fn many(keys: &[&str]) -> Operation {
    Operation::GetMany {
        keys: keys.iter().map(|text| key(text)).collect(),
    }
}

fn encoded(operation: &Operation) -> String {
    let mut bytes = BytesMut::new();
    if let Some(body) = encode(operation, 7, &mut bytes) {
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(b"\r\n");
    }
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A connection without a socket: a pipeline, a parser, and a clock that stands still.
struct Conversation {
    pipeline: Pipeline<usize>,
    parser: Parser,
    input: BytesMut,
    woken: Vec<usize>,
    now: Instant,
}

impl Conversation {
    fn new() -> Self {
        let mut pipeline = Pipeline::new(LIMITS, NonZeroU32::MIN);
        pipeline.connected(1, true);
        Self {
            pipeline,
            parser: Parser::new(LIMITS.value),
            input: BytesMut::new(),
            woken: Vec::new(),
            now: Instant::now(),
        }
    }

    fn queue(&mut self, operation: &Operation) -> Ticket {
        let deadline = self.now + Duration::from_millis(30);
        self.pipeline
            .enqueue(operation, deadline, deadline, Some(0))
            .unwrap()
    }

    /// What goes on the wire now.
    fn write(&mut self) -> Vec<u8> {
        let mut batch = Batch::default();
        self.pipeline
            .take(&mut batch, self.now, Duration::ZERO, 1, &mut self.woken);
        let bytes = drain(&mut batch, usize::MAX);
        self.pipeline.wrote(bytes.len());
        bytes
    }

    fn send(&mut self, operation: &Operation) -> Ticket {
        let ticket = self.queue(operation);
        self.write();
        ticket
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.input.extend_from_slice(bytes);
        while let Some(reply) = self.parser.parse(&mut self.input)? {
            self.pipeline.reply(reply, &mut self.woken)?;
        }
        Ok(())
    }

    fn close(&mut self, violation: Violation) {
        self.pipeline.close(&violation.into(), &mut self.woken);
    }

    fn outcome(&mut self, ticket: &Ticket) -> Option<Result<Response>> {
        self.pipeline.poll(ticket, |_| {})
    }

    fn value(&mut self, ticket: &Ticket) -> Option<Vec<u8>> {
        match self.outcome(ticket) {
            Some(Ok(Response::Value(value))) => value.map(|value| value.to_vec()),
            other => panic!("{other:?}"),
        }
    }
}

/// Writes a batch out, at most so many bytes at a time.
fn drain(batch: &mut Batch, at_once: usize) -> Vec<u8> {
    let mut written = Vec::new();
    while !batch.is_empty() {
        let mut slices = [IoSlice::new(&[]); 4];
        let filled = batch.slices(&mut slices);
        let part: Vec<u8> = slices[..filled]
            .iter()
            .flat_map(|slice| slice.to_vec())
            .collect();
        let part = &part[..part.len().min(at_once)];
        written.extend_from_slice(part);
        let part = part.len();
        batch.advance(part);
    }
    written
}

#[test]
fn writes_each_operation_as_memcached_reads_it() {
    assert_eq!(encoded(&get("k")), "mg k v f O7\r\n");
    let gets = Operation::Get {
        key: key("k"),
        with_cas: true,
    };
    assert_eq!(encoded(&gets), "mg k v f c O7\r\n");
    assert_eq!(
        encoded(&many(&["a", "b"])),
        "mg a v f q O7\r\nmg b v f q O8\r\nmn\r\n"
    );
    assert_eq!(encoded(&set("k", "v")), "ms k 1 T60 O7\r\nv\r\n");
    let flagged = Operation::Store {
        mode: StoreMode::Add,
        key: key("k"),
        payload: crate::Payload::from("v").with_flags(9),
        ttl: Ttl::NEVER,
    };
    assert_eq!(encoded(&flagged), "ms k 1 F9 ME T0 O7\r\nv\r\n");
    let append = Operation::Store {
        mode: StoreMode::Append,
        key: key("k"),
        payload: "v".into(),
        ttl: Ttl::NEVER,
    };
    assert_eq!(encoded(&append), "ms k 1 MA O7\r\nv\r\n");
    let cas = Operation::CompareAndSwap {
        key: key("k"),
        payload: "v".into(),
        ttl: Ttl::secs(1),
        token: CasToken {
            node: NonZeroU32::MIN,
            connection: 1,
            unique: 42,
        },
    };
    assert_eq!(encoded(&cas), "ms k 1 T1 C42 O7\r\nv\r\n");
    assert_eq!(encoded(&Operation::Delete { key: key("k") }), "md k O7\r\n");
    let touch = Operation::Touch {
        key: key("k"),
        ttl: Ttl::secs(0),
    };
    assert_eq!(encoded(&touch), "mg k T-1 O7\r\n");
    let gat = Operation::GetAndTouch {
        key: key("k"),
        ttl: Ttl::secs(9),
    };
    assert_eq!(encoded(&gat), "mg k v f T9 O7\r\n");
    let down = Operation::Arithmetic {
        key: key("k"),
        delta: 3,
        direction: Direction::Down,
    };
    assert_eq!(encoded(&down), "ma k v MD D3 O7\r\n");
    let binary = Operation::Delete {
        key: Key::binary(b"\x00").unwrap(),
    };
    assert_eq!(encoded(&binary), "md AA== b O7\r\n");
    let large = "x".repeat(5000);
    assert_eq!(
        encoded(&set("k", large.clone())),
        format!("ms k 5000 T60 O7\r\n{large}\r\n")
    );
}

#[test]
fn there_is_room_for_the_longest_line() {
    let key = Key::binary([b'k'; 186]).unwrap();
    let (length, latest) = (1 << 26, i64::from(i32::MAX));
    let operation = Operation::CompareAndSwap {
        key: key.clone(),
        payload: Payload::from(vec![0; length]).with_flags(u32::MAX),
        ttl: Ttl::secs(u64::MAX),
        token: CasToken {
            node: NonZeroU32::MIN,
            connection: 1,
            unique: u64::MAX,
        },
    };
    let mut out = BytesMut::new();
    encode(&operation, u32::MAX, &mut out).unwrap();
    let (flags, unique) = (u32::MAX, u64::MAX);
    let expected = format!("ms {key} {length} F{flags} T{latest} C{unique} b O{flags}\r\n");
    assert_eq!(out, expected.as_bytes());
}

#[test]
fn each_reply_answers_its_request() {
    let mut talk = Conversation::new();
    let hit = talk.send(&get("a"));
    let miss = talk.send(&get("b"));
    let stored = talk.send(&set("c", "v"));
    let not_stored = talk.send(&set("d", "v"));
    let deleted = talk.send(&Operation::Delete { key: key("e") });
    let version = talk.send(&Operation::Version);
    let stats = talk.send(&Operation::Stats);
    talk.receive(
        b"VA 3 f5 O1\r\na\r\n\r\nEN O2\r\nHD O3\r\nNS O4\r\nNF O5\r\nVERSION 1.6.18\r\n\
          STAT pid 1\r\nSTAT rusage 0.1 x\r\nEND\r\n",
    )
    .unwrap();
    match talk.outcome(&hit) {
        Some(Ok(Response::Value(Some(value)))) => {
            assert_eq!(value, "a\r\n");
            assert_eq!(value.flags(), 5);
            assert_eq!(value.cas(), None);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(talk.value(&miss), None);
    assert!(matches!(
        talk.outcome(&stored),
        Some(Ok(Response::Stored(true)))
    ));
    assert!(matches!(
        talk.outcome(&not_stored),
        Some(Ok(Response::Stored(false)))
    ));
    assert!(matches!(
        talk.outcome(&deleted),
        Some(Ok(Response::Deleted(false)))
    ));
    assert!(
        matches!(talk.outcome(&version), Some(Ok(Response::Version(text))) if text == "1.6.18")
    );
    match talk.outcome(&stats) {
        Some(Ok(Response::Stats(stats))) => assert_eq!(stats["rusage"], "0.1 x"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn arithmetic_tolerates_the_spaces_decr_leaves() {
    let mut talk = Conversation::new();
    let down = Operation::Arithmetic {
        key: key("k"),
        delta: 1,
        direction: Direction::Down,
    };
    let (first, second) = (talk.send(&down), talk.send(&down));
    talk.receive(b"VA 2 O1\r\n9 \r\n").unwrap();
    let text = b"CLIENT_ERROR cannot increment or decrement non-numeric value\r\n";
    talk.receive(text).unwrap();
    assert!(matches!(
        talk.outcome(&first),
        Some(Ok(Response::Counter(Some(9))))
    ));
    let error = talk.outcome(&second).unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::NotANumber, Sent::Yes)
    );
}

#[test]
fn a_multi_key_read_gives_each_key_its_own_outcome() {
    let mut talk = Conversation::new();
    let ticket = talk.send(&many(&["a", "b", "c"]));
    let next = talk.send(&get("d"));
    talk.receive(b"VA 1 f0 O1\r\nA\r\nVA 1 f0 O3\r\nC\r\nMN\r\nEN O4\r\n")
        .unwrap();
    match talk.outcome(&ticket) {
        Some(Ok(Response::Values(outcomes))) => {
            let values: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
            assert_eq!(values[0].as_deref(), Some(&b"A"[..]));
            assert_eq!(values[1], None);
            assert_eq!(values[2].as_deref(), Some(&b"C"[..]));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(talk.value(&next), None);
}

#[test]
fn a_multi_key_read_that_runs_out_of_time_keeps_what_has_come() {
    let mut talk = Conversation::new();
    let ticket = talk.send(&many(&["a", "b", "c", "d"]));
    talk.receive(b"VA 1 f0 O2\r\nB\r\n").unwrap();
    let late = talk.now + Duration::from_secs(1);
    talk.pipeline
        .expire(late, Charge::Node, &mut talk.woken, |_| {});
    match talk.outcome(&ticket) {
        Some(Ok(Response::Values(outcomes))) => {
            assert!(matches!(outcomes[0], Ok(None)), "passed over, so a miss");
            assert!(matches!(&outcomes[1], Ok(Some(value)) if *value == "B"));
            for outcome in &outcomes[2..] {
                let error = outcome.as_ref().unwrap_err();
                assert_eq!(
                    (error.kind(), error.sent()),
                    (ErrorKind::Timeout, Sent::Maybe)
                );
            }
        }
        other => panic!("{other:?}"),
    }
    // The rest comes late and belongs to nobody; the next request is not confused by it.
    let next = talk.send(&get("e"));
    talk.receive(b"VA 1 f0 O4\r\nD\r\nMN\r\nVA 1 f0 O5\r\nE\r\n")
        .unwrap();
    assert_eq!(talk.value(&next).as_deref(), Some(&b"E"[..]));
}

/// What is read from these pieces, and how it ends.
fn read(pieces: &[&[u8]]) -> (Vec<Reply>, Option<Violation>) {
    let (mut parser, mut input) = (Parser::new(30), BytesMut::new());
    let mut replies = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match parser.parse(&mut input) {
                Ok(Some(reply)) => replies.push(reply),
                Ok(None) => break,
                Err(violation) => return (replies, Some(violation)),
            }
        }
    }
    (replies, None)
}

/// What replies are made of, and what they are not.
fn scrap() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![
        "VA ",
        "HD",
        "EN",
        "NF",
        "MN",
        "OK",
        "\r\n",
        "\r\n",
        "\r",
        "\n",
        " ",
        "0",
        "1",
        "31",
        "xy",
        " O1",
        " O7",
        " f0",
        " c5",
        " t9",
        " t-1",
        " W",
        " Z",
        " X",
        " b",
        " k",
        "VA 2 f1 O1\r\nxy\r\n",
        "EN O1\r\n",
    ])
}

/// What must never be taken for an answer, and what it is called.
#[test]
fn a_stream_out_of_step_is_a_violation_and_fails_what_is_in_flight() {
    let absurd = (1u64 << 31).to_string();
    let absurd = format!("VA {absurd} f0 O1\r\n");
    let endless = vec![b'x'; super::MAX_LINE + 1];
    let endless_flags = format!("EN{} O1\r\n", " f1".repeat(super::MAX_LINE / 3));
    type Expected = fn(&Violation) -> bool;
    let cases: Vec<(&[u8], Expected)> = vec![
        (b"VA 1 f0 O2\r\nx\r\n", |v| {
            matches!(
                v,
                Violation::WrongOpaque {
                    expected: 1,
                    found: Some(2)
                }
            )
        }),
        (b"VA 1 f0\r\nx\r\n", |v| {
            matches!(v, Violation::WrongOpaque { found: None, .. })
        }),
        (b"EN\r\n", |v| {
            matches!(v, Violation::WrongOpaque { found: None, .. })
        }),
        (b"VA 1 f0 kother O1\r\nx\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"VA 1 f0 O1 O2\r\nx\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"HD O1\r\n", |v| matches!(v, Violation::WrongKind { .. })),
        (b"END\r\n", |v| matches!(v, Violation::WrongKind { .. })),
        (b"ERROR\r\n", |v| {
            matches!(v, Violation::WrongKind { found: "ERROR", .. })
        }),
        (absurd.as_bytes(), |v| {
            *v == Violation::AbsurdLength(1 << 31)
        }),
        (b"VA -1 f0 O1\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"VA 99999999999999999999999 O1\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"VA 1 f0 O1\r\nxyz", |v| *v == Violation::UnterminatedValue),
        (b"VA 000000000000000000001 O1\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"VA\r\n", |v| matches!(v, Violation::Unparsable(_))),
        (b"VA 1f0 O1\r\nx\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"ENO1\r\n", |v| matches!(v, Violation::Unparsable(_))),
        (b"EN O4294967296\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"EN O1 W1\r\n", |v| matches!(v, Violation::Unparsable(_))),
        (b"EN O1\r \n", |v| matches!(v, Violation::Unparsable(_))),
        (&endless, |v| *v == Violation::LineTooLong),
        (endless_flags.as_bytes(), |v| *v == Violation::LineTooLong),
        (b"HTTP/1.1 400 Bad Request\r\n", |v| {
            matches!(v, Violation::Unparsable(_))
        }),
        (b"EN O1\n", |v| matches!(v, Violation::Unparsable(_))),
        (b"\n", |v| matches!(v, Violation::Unparsable(_))),
    ];
    for (bytes, expected) in cases {
        let mut talk = Conversation::new();
        let ticket = talk.send(&get("k"));
        let violation = talk.receive(bytes).unwrap_err();
        assert!(
            expected(&violation),
            "{:?}: {violation:?}",
            bytes.escape_ascii().to_string()
        );
        talk.close(violation);
        let error = talk.outcome(&ticket).unwrap().unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Protocol, Sent::Maybe)
        );
    }
}

#[test]
fn what_nobody_asked_for_is_a_violation() {
    for bytes in [
        &b"EN O1\r\n"[..],
        b"HD\r\n",
        b"VA 1 O1\r\nx\r\n",
        b"ERROR\r\n",
        b"MN\r\n",
    ] {
        let violation = Conversation::new().receive(bytes).unwrap_err();
        assert!(
            matches!(violation, Violation::Unsolicited(_)),
            "{violation:?}"
        );
        // A second answer is one that nobody asked for, too.
        let mut talk = Conversation::new();
        let ticket = talk.send(&get("k"));
        talk.receive(b"EN O1\r\n").unwrap();
        assert!(talk.receive(bytes).is_err());
        assert_eq!(talk.value(&ticket), None, "the first answer stands");
    }
    // Queued is not asked yet.
    let mut talk = Conversation::new();
    talk.queue(&get("k"));
    assert!(talk.receive(b"EN O1\r\n").is_err());
}

#[test]
fn an_error_in_a_multi_key_read_cannot_be_attributed() {
    let mut talk = Conversation::new();
    let ticket = talk.send(&many(&["a", "b"]));
    let violation = talk.receive(b"SERVER_ERROR out of memory writing get response\r\n");
    assert!(matches!(violation, Err(Violation::ErrorInBatch(_))));
    talk.close(violation.unwrap_err());
    assert!(talk.outcome(&ticket).unwrap().is_err());
    // Nor can a hit that goes back in the order of keys.
    let mut talk = Conversation::new();
    talk.send(&many(&["a", "b"]));
    talk.receive(b"VA 1 f0 O2\r\nx\r\n").unwrap();
    assert!(talk.receive(b"VA 1 f0 O1\r\nx\r\n").is_err());
}

#[test]
fn a_rejected_write_ends_the_connection_after_telling_its_caller() {
    let mut talk = Conversation::new();
    let (write, next) = (talk.send(&set("k", "v")), talk.send(&get("k")));
    let violation = talk
        .receive(b"CLIENT_ERROR bad data chunk\r\n")
        .unwrap_err();
    assert!(matches!(violation, Violation::FramingLost(_)));
    talk.close(violation);
    let error = talk.outcome(&write).unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Rejected, Sent::Yes)
    );
    let error = talk.outcome(&next).unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Protocol, Sent::Maybe)
    );
}

#[test]
fn a_server_error_is_one_requests_failure() {
    let mut talk = Conversation::new();
    let (full, large, next) = (
        talk.send(&set("k", "v")),
        talk.send(&set("k", "v")),
        talk.send(&get("k")),
    );
    talk.receive(
        b"SERVER_ERROR out of memory storing object\r\n\
          SERVER_ERROR object too large for cache\r\nEN O3\r\n",
    )
    .unwrap();
    assert_eq!(
        talk.outcome(&full).unwrap().unwrap_err().kind(),
        ErrorKind::Server
    );
    assert_eq!(
        talk.outcome(&large).unwrap().unwrap_err().kind(),
        ErrorKind::ValueTooLarge
    );
    assert_eq!(talk.value(&next), None);
}

#[test]
fn a_value_over_the_limit_is_skipped_without_being_kept() {
    let mut talk = Conversation::new();
    talk.parser = Parser::new(1000);
    let (large, next) = (talk.send(&get("k")), talk.send(&get("k")));
    talk.receive(b"VA 5000000 f0 O1\r\n").unwrap();
    let piece = vec![b'x'; 10_000];
    for _ in 0..500 {
        talk.receive(&piece).unwrap();
        assert!(talk.input.is_empty() && talk.input.capacity() < 100_000);
    }
    talk.receive(b"\r\nVA 1 f0 O2\r\nv\r\n").unwrap();
    let error = talk.outcome(&large).unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::ValueTooLarge, Sent::Yes)
    );
    assert_eq!(talk.value(&next).as_deref(), Some(&b"v"[..]));
}

#[test]
fn somebody_elses_lease_placeholder_is_a_miss() {
    let mut talk = Conversation::new();
    let (placeholder, empty) = (talk.send(&get("k")), talk.send(&get("k")));
    talk.receive(b"VA 0 f0 O1 Z\r\n\r\nVA 0 f0 O2\r\n\r\n")
        .unwrap();
    assert_eq!(talk.value(&placeholder), None);
    assert_eq!(talk.value(&empty).as_deref(), Some(&b""[..]));
}

#[test]
fn a_lookup_asks_for_what_a_read_through_has_to_know() {
    let lookup = |lease| Operation::Lookup {
        key: key("k"),
        lease,
    };
    assert_eq!(encoded(&lookup(None)), "mg k v f c t O7\r\n");
    let terms = LeaseTerms::new(Duration::from_millis(1_001));
    assert_eq!(encoded(&lookup(Some(terms))), "mg k v f c t N2 O7\r\n");
    let terms = terms.recache(Duration::from_secs(30));
    assert_eq!(encoded(&lookup(Some(terms))), "mg k v f c t N2 R30 O7\r\n");
    // 0 would be for ever.
    let none = LeaseTerms::new(Duration::ZERO);
    assert_eq!(encoded(&lookup(Some(none))), "mg k v f c t N1 O7\r\n");
}

#[test]
fn a_lookup_tells_nothing_absent_and_a_value_apart_and_whose_the_lease_is() {
    use LeaseState::{Free, Taken, Won};
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let absent = "VA 23 f1313820229 c5 t9 O1\r\ntower-memcached: absent\r\n";
    let classic = "VA 24 f1212501060 c5 t2 O1\r\ntower-memcached: lease 0\r\n";
    let recached = "VA 24 f1212501060 c5 t2 O1 W\r\ntower-memcached: lease 0\r\n";
    let value = |left| Found::Value {
        value: crate::value::Value::new("v", 3),
        left,
    };
    for (reply, found, cas, lease) in [
        ("EN O1\r\n", Found::Nothing, None, Free),
        ("VA 0 f0 c5 t2 W O1\r\n\r\n", Found::Nothing, Some(5), Won),
        ("VA 0 f0 c5 t2 O1 Z\r\n\r\n", Found::Nothing, Some(5), Taken),
        (
            "VA 1 f3 c5 t9 O1\r\nv\r\n",
            value(seconds(9)),
            Some(5),
            Free,
        ),
        ("VA 1 f3 c5 t-1 O1\r\nv\r\n", value(None), Some(5), Free),
        (
            "VA 1 f3 c5 t1 O1 W\r\nv\r\n",
            value(seconds(1)),
            Some(5),
            Won,
        ),
        (
            "VA 1 f3 c5 t0 O1 Z\r\nv\r\n",
            value(seconds(0)),
            Some(5),
            Taken,
        ),
        // Marked as outdated by somebody: never served.
        (
            "VA 1 f3 c5 t9 O1 W X\r\nv\r\n",
            Found::Nothing,
            Some(5),
            Won,
        ),
        (
            "VA 1 f3 c5 t9 O1 X Z\r\nv\r\n",
            Found::Nothing,
            Some(5),
            Taken,
        ),
        (absent, Found::Absent { left: seconds(9) }, Some(5), Free),
        // Of somebody who asks in the classic protocol, whatever the server tells us to do.
        (classic, Found::Nothing, Some(5), Taken),
        (recached, Found::Nothing, Some(5), Taken),
    ] {
        let mut connection = Conversation::new();
        let ticket = connection.send(&Operation::Lookup {
            key: key("k"),
            lease: None,
        });
        connection.receive(reply.as_bytes()).unwrap();
        let Some(Ok(Response::Found(lookup))) = connection.outcome(&ticket) else {
            panic!("{reply:?} is not what was found");
        };
        assert_eq!(lookup.found, found, "{reply:?}");
        assert_eq!(lookup.token.map(|token| token.unique), cas, "{reply:?}");
        assert_eq!(lookup.lease, lease, "{reply:?}");
    }
}

#[test]
fn to_a_plain_read_what_is_absent_or_outdated_is_a_miss() {
    for reply in [
        "VA 23 f1313820229 O1\r\ntower-memcached: absent\r\n",
        "VA 24 f1212501060 O1\r\ntower-memcached: lease 0\r\n",
        "VA 1 f3 O1 W X\r\nv\r\n",
    ] {
        let mut connection = Conversation::new();
        let ticket = connection.send(&get("k"));
        connection.receive(reply.as_bytes()).unwrap();
        assert_eq!(connection.value(&ticket), None, "{reply:?}");
    }
    // It takes both the flags and the bytes.
    for reply in [
        "VA 23 f0 O1\r\ntower-memcached: absent\r\n",
        "VA 1 f1313820229 O1\r\nv\r\n",
    ] {
        let mut connection = Conversation::new();
        let ticket = connection.send(&get("k"));
        connection.receive(reply.as_bytes()).unwrap();
        assert!(connection.value(&ticket).is_some(), "{reply:?}");
    }
    let absent = Payload::absent();
    assert_eq!((absent.data().len(), absent.flags()), (23, 1_313_820_229));
}

#[test]
fn older_servers_may_miss_without_an_opaque() {
    let mut talk = Conversation::new();
    talk.pipeline.connected(1, false);
    let (miss, hit) = (talk.send(&get("a")), talk.send(&get("b")));
    talk.receive(b"EN\r\nVA 1 f0 O2\r\nb\r\n").unwrap();
    assert_eq!(talk.value(&miss), None);
    assert_eq!(talk.value(&hit).as_deref(), Some(&b"b"[..]));
    assert!(talk.receive(b"EN O9\r\n").is_err());
}

#[test]
fn who_gives_up_before_it_is_written_costs_nothing() {
    let mut talk = Conversation::new();
    let kept = talk.queue(&get("kept"));
    let dropped = talk.queue(&set("dropped", "v".repeat(9000)));
    let last = talk.queue(&get("last"));
    talk.pipeline.abandon(dropped);
    assert_eq!(talk.write(), b"mg kept v f O1\r\nmg last v f O3\r\n");
    talk.receive(b"EN O1\r\nEN O3\r\n").unwrap();
    assert_eq!(talk.value(&kept), None);
    assert_eq!(talk.value(&last), None);
}

#[test]
fn callers_that_come_and_go_do_not_fill_the_queue() {
    let mut talk = Conversation::new();
    let kept = talk.queue(&get("kept"));
    for _ in 0..10 * LIMITS.requests {
        let ticket = talk.queue(&set("k", "v".repeat(5000)));
        talk.pipeline.abandon(ticket);
    }
    let wire = talk.write();
    assert_eq!(wire, b"mg kept v f O1\r\n");
    talk.receive(b"EN O1\r\n").unwrap();
    assert_eq!(talk.value(&kept), None);
}

#[test]
fn who_gives_up_after_it_is_written_keeps_its_place_and_its_reply_is_discarded() {
    let mut talk = Conversation::new();
    let dropped = talk.send(&get("a"));
    talk.pipeline.abandon(dropped);
    let next = talk.send(&get("b"));
    assert!(
        talk.pipeline.oldest_sent_at().is_some(),
        "still awaited, for the stall detector"
    );
    talk.receive(b"VA 1 f0 O1\r\na\r\nVA 1 f0 O2\r\nb\r\n")
        .unwrap();
    assert_eq!(talk.value(&next).as_deref(), Some(&b"b"[..]));
}

#[test]
fn a_full_queue_is_an_immediate_error_and_is_usable_after() {
    let mut talk = Conversation::new();
    let tickets: Vec<_> = (0..LIMITS.requests)
        .map(|_| talk.queue(&get("k")))
        .collect();
    let deadline = talk.now;
    let full = |talk: &mut Conversation, operation: &Operation| {
        let error = talk
            .pipeline
            .enqueue(operation, deadline, deadline, None)
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Overloaded, Sent::No)
        );
    };
    full(&mut talk, &get("k"));
    talk.write();
    full(&mut talk, &get("k"));
    talk.receive(b"EN O1\r\n").unwrap();
    talk.queue(&get("k"));
    assert!(
        tickets
            .iter()
            .skip(1)
            .all(|ticket| talk.outcome(ticket).is_none())
    );
    // In bytes, too.
    let mut talk = Conversation::new();
    talk.queue(&set("k", "v".repeat(LIMITS.queued_bytes / 2)));
    full(&mut talk, &set("k", "v".repeat(LIMITS.queued_bytes / 2)));
}

#[test]
fn the_end_of_a_connection_says_what_may_have_been_executed() {
    let mut talk = Conversation::new();
    let written = talk.send(&get("a"));
    // Taken, but the kernel has none of it yet.
    let taken = talk.queue(&get("b"));
    let (mut batch, now) = (Batch::default(), talk.now);
    talk.pipeline
        .take(&mut batch, now, Duration::ZERO, 1, &mut talk.woken);
    let queued = talk.queue(&get("c"));
    let error = Error::new(ErrorKind::ConnectionLost, "gone");
    talk.pipeline.close(&error, &mut talk.woken);
    assert_eq!(
        talk.outcome(&written).unwrap().unwrap_err().sent(),
        Sent::Maybe
    );
    assert_eq!(talk.outcome(&taken).unwrap().unwrap_err().sent(), Sent::No);
    assert!(
        talk.outcome(&queued).is_none(),
        "it goes over the next connection"
    );
    talk.pipeline.connected(2, true);
    assert_eq!(talk.write(), b"mg c v f O3\r\n");
    // One byte of it with the kernel is enough for doubt.
    let taken = talk.queue(&get("d"));
    let mut batch = Batch::default();
    talk.pipeline
        .take(&mut batch, now, Duration::ZERO, 1, &mut talk.woken);
    talk.pipeline.wrote(1);
    talk.pipeline.close(&error, &mut talk.woken);
    assert_eq!(
        talk.outcome(&taken).unwrap().unwrap_err().sent(),
        Sent::Maybe
    );
}

#[test]
fn a_time_out_is_charged_only_for_what_was_sent() {
    let mut talk = Conversation::new();
    let sent = talk.send(&get("a"));
    let queued = talk.queue(&get("b"));
    let late = talk.now + Duration::from_millis(30);
    let mut charged = 0;
    talk.pipeline
        .expire(late, Charge::Node, &mut talk.woken, |_| charged += 1);
    assert_eq!(charged, 1);
    let error = talk.outcome(&sent).unwrap().unwrap_err();
    assert_eq!((error.sent(), error.charge()), (Sent::Maybe, Charge::Node));
    let error = talk.outcome(&queued).unwrap().unwrap_err();
    assert_eq!((error.sent(), error.charge()), (Sent::No, Charge::Nobody));
    assert!(
        talk.write().is_empty(),
        "what timed out in the queue is not sent"
    );
    talk.receive(b"VA 1 f0 O1\r\na\r\n").unwrap();
}

#[test]
fn who_finds_the_deadline_first_is_told_whether_it_was_sent() {
    let mut talk = Conversation::new();
    let sent = talk.send(&get("a"));
    let error = talk.pipeline.give_up(sent).0.unwrap_err();
    assert_eq!(
        (error.sent(), error.charge()),
        (Sent::Maybe, Charge::Nobody)
    );
    // The connection's own timer still judges it.
    let mut charged = 0;
    let late = talk.now + Duration::from_secs(1);
    talk.pipeline
        .expire(late, Charge::Node, &mut talk.woken, |_| charged += 1);
    assert_eq!(charged, 1);
    // An answer that is there already wins.
    let answered = talk.send(&get("b"));
    talk.receive(b"EN O1\r\nEN O2\r\n").unwrap();
    assert!(talk.pipeline.give_up(answered).0.is_ok());
}

#[test]
fn a_cas_token_is_not_used_over_a_newer_connection() {
    let mut talk = Conversation::new();
    let gets = Operation::Get {
        key: key("k"),
        with_cas: true,
    };
    let read = talk.send(&gets);
    talk.receive(b"VA 1 f0 c1 O1\r\nv\r\n").unwrap();
    let token = match talk.outcome(&read) {
        Some(Ok(Response::Value(Some(value)))) => value.cas().unwrap(),
        other => panic!("{other:?}"),
    };
    let swap = Operation::CompareAndSwap {
        key: key("k"),
        payload: "w".into(),
        ttl: Ttl::NEVER,
        token,
    };
    let same = talk.send(&swap);
    talk.receive(b"HD O2\r\n").unwrap();
    assert!(matches!(
        talk.outcome(&same),
        Some(Ok(Response::Swapped(CasOutcome::Stored)))
    ));
    // Queued, and the connection is replaced before it leaves: a restarted server counts anew.
    let queued = talk.queue(&swap);
    talk.pipeline.connected(2, true);
    assert!(talk.write().is_empty());
    assert!(matches!(
        talk.outcome(&queued),
        Some(Ok(Response::Swapped(CasOutcome::Exists)))
    ));
}

/// A request with the reply a server would give, and what the caller must then see.
fn exchange() -> impl Strategy<Value = Exchange> {
    let name = "[a-z]{1,40}";
    let data = vec(any::<u8>(), 0..300);
    prop_oneof![
        (name, data.clone()).prop_map(|(key, data)| Exchange::Hit(key, data)),
        name.prop_map(Exchange::Miss),
        (name, data).prop_map(|(key, data)| Exchange::Set(key, data)),
        vec(proptest::option::of(vec(any::<u8>(), 0..40)), 0..8).prop_map(Exchange::Many),
        Just(Exchange::Version),
    ]
}

#[derive(Clone, Debug)]
enum Exchange {
    Hit(String, Vec<u8>),
    Miss(String),
    Set(String, Vec<u8>),
    Many(Vec<Option<Vec<u8>>>),
    Version,
}

impl Exchange {
    fn operation(&self) -> Operation {
        match self {
            Self::Hit(key, _) | Self::Miss(key) => get(key),
            Self::Set(key, data) => set(key, data.clone()),
            Self::Many(values) => Operation::GetMany {
                keys: vec![key("k"); values.len()].into(),
            },
            Self::Version => Operation::Version,
        }
    }

    /// Appends the reply, and says how many opaques the request used.
    fn reply(&self, opaque: u32, out: &mut Vec<u8>) -> u32 {
        let mut hit = |opaque: u32, data: &[u8]| {
            out.extend(format!("VA {} f3 O{opaque}\r\n", data.len()).bytes());
            out.extend_from_slice(data);
            out.extend_from_slice(b"\r\n");
        };
        match self {
            Self::Hit(_, data) => hit(opaque, data),
            Self::Miss(_) => out.extend(format!("EN O{opaque}\r\n").bytes()),
            Self::Set(..) => out.extend(format!("HD O{opaque}\r\n").bytes()),
            Self::Many(values) => {
                for (value, opaque) in values.iter().zip(opaque..) {
                    if let Some(data) = value {
                        hit(opaque, data);
                    }
                }
                out.extend_from_slice(b"MN\r\n");
                return values.len() as u32;
            }
            Self::Version => out.extend_from_slice(b"VERSION 1.6.18\r\n"),
        }
        1
    }

    fn check(&self, outcome: Result<Response>) {
        let value = |value: Option<crate::Value>| value.map(|value| value.to_vec());
        match (self, outcome.unwrap()) {
            (Self::Hit(_, data), Response::Value(found)) => {
                assert_eq!(value(found).as_ref(), Some(data));
            }
            (Self::Miss(_), Response::Value(found)) => assert_eq!(value(found), None),
            (Self::Set(..), Response::Stored(true)) | (Self::Version, Response::Version(_)) => {}
            (Self::Many(expected), Response::Values(found)) => {
                let found: Vec<_> = found
                    .into_iter()
                    .map(|found| value(found.unwrap()))
                    .collect();
                assert_eq!(found, *expected);
            }
            (asked, answer) => panic!("{asked:?}: {answer:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the stream is cut, each request ends with its own reply.
    #[test]
    fn replies_cut_anywhere_give_the_same_outcomes(exchanges in vec(exchange(), 1..12)) {
        let mut stream = Vec::new();
        let mut opaque = 1;
        for exchange in &exchanges {
            opaque += exchange.reply(opaque, &mut stream);
        }
        // Coalesced, byte by byte, and in two pieces at every place.
        let cuts = std::iter::once(vec![&stream[..]])
            .chain([stream.chunks(1).collect()])
            .chain((1..stream.len()).map(|at| {
                let (left, right) = stream.split_at(at);
                vec![left, right]
            }));
        for pieces in cuts {
            let mut talk = Conversation::new();
            let tickets: Vec<_> = exchanges.iter().map(|one| talk.send(&one.operation())).collect();
            for piece in pieces {
                talk.receive(piece).unwrap();
            }
            prop_assert!(talk.input.is_empty());
            for (ticket, exchange) in tickets.iter().zip(&exchanges) {
                exchange.check(talk.outcome(ticket).unwrap());
            }
        }
    }

    /// However the stream is cut, and whatever is in it.
    #[test]
    fn what_makes_no_sense_is_read_alike_wherever_it_is_cut(scraps in vec(scrap(), 1..16)) {
        let stream = scraps.concat();
        let stream = stream.as_bytes();
        let whole = read(&[stream]);
        prop_assert_eq!(&read(&stream.chunks(1).collect::<Vec<_>>()), &whole);
        for at in 1..stream.len() {
            let (left, right) = stream.split_at(at);
            prop_assert_eq!(&read(&[left, right]), &whole);
        }
    }

    /// However little the socket takes at a time, the bytes are those of the requests in order.
    #[test]
    fn a_batch_is_written_whole_whatever_the_socket_takes(
        sizes in vec(prop_oneof![0..50_usize, 4000..6000_usize], 1..10),
        at_once in 1..5000_usize,
    ) {
        let mut talk = Conversation::new();
        let mut expected = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let data = vec![b'a' + index as u8; *size];
            let operation = set("k", data.clone());
            talk.queue(&operation);
            expected.extend(format!("ms k {size} T60 O{}\r\n", index + 1).bytes());
            expected.extend(data);
            expected.extend(b"\r\n");
        }
        let (mut batch, now) = (Batch::default(), talk.now);
        prop_assert!(talk.pipeline.take(&mut batch, now, Duration::ZERO, 1, &mut talk.woken));
        prop_assert_eq!(drain(&mut batch, at_once), expected);
    }
}
