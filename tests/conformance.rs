//! One suite, two servers: the in-process server must answer every byte as memcached 1.6.18 does.
//!
//! Each case is a sequence of requests. It runs on a fresh in-process server and on a freshly started memcached, so that
//! CAS uniques are comparable, as one write and again step by step: the replies must be the same bytes. What differs by
//! nature is left out of the cases, except for remaining times, which may differ by a second.
//!
//! Without memcached this suite fails: an unproven server would silently weaken every other test.
#![cfg(feature = "testing")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower_memcached::testing::{Memcached, Server};

/// Ends what a case provokes: everything before it has been answered once this is.
const SENTINEL: &[u8] = b"mg ~ k O~\r\n";
const SENTINEL_REPLY: &[u8] = b"EN k~ O~\r\n";

struct Case {
    name: &'static str,
    /// Sent one by one; each is one or more complete requests.
    steps: Vec<Vec<u8>>,
}

fn case(name: &'static str, steps: &[&str]) -> Case {
    Case {
        name,
        steps: steps.iter().map(|step| step.as_bytes().to_vec()).collect(),
    }
}

/// Sends `request` and the sentinel; the reply is everything up to the sentinel's answer, or the end of the connection.
async fn exchange(stream: &mut TcpStream, request: &[u8]) -> Vec<u8> {
    let (mut reader, mut writer) = stream.split();
    // Both ways at once: a large value does not fit into the socket buffers.
    let send = async {
        // A connection that is closed meanwhile shows in what is read.
        let _ = writer.write_all(request).await;
        let _ = writer.write_all(SENTINEL).await;
    };
    let receive = async {
        let mut reply = Vec::new();
        while !reply.ends_with(SENTINEL_REPLY) {
            match tokio::time::timeout(Duration::from_secs(30), reader.read_buf(&mut reply)).await {
                Ok(Ok(0) | Err(_)) => {
                    reply.extend_from_slice(b"<end>");
                    break;
                }
                Ok(Ok(_)) => {}
                // Then the case itself is wrong: it leaves a request incomplete.
                Err(_) => panic!("no answer to {} but {}", shown(request), shown(&reply)),
            }
        }
        reply
    };
    tokio::join!(send, receive).1
}

/// The replies to each step.
async fn run(case: &Case, address: &str) -> Vec<Vec<u8>> {
    let mut replies = Vec::new();
    let mut stream = TcpStream::connect(address)
        .await
        .expect("the server listens");
    for step in &case.steps {
        let reply = exchange(&mut stream, step).await;
        if reply.ends_with(b"<end>") {
            stream = TcpStream::connect(address)
                .await
                .expect("the server listens");
        }
        replies.push(reply);
    }
    replies
}

/// `t` flags, replaced by their place in `times`.
fn without_times(reply: &[u8], times: &mut Vec<i64>) -> Vec<u8> {
    let text: Vec<&[u8]> = reply.split(|&byte| byte == b' ').collect();
    let words = text.iter().map(|word| {
        let end = word
            .iter()
            .position(|&byte| byte == b'\r')
            .unwrap_or(word.len());
        let seconds = word[..end]
            .strip_prefix(b"t")
            .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        match seconds {
            Some(seconds) if seconds > 0 => {
                times.push(seconds);
                [b"t*", &word[end..]].concat()
            }
            _ => word.to_vec(),
        }
    });
    words.collect::<Vec<_>>().join(&b' ')
}

fn same(ours: &[u8], theirs: &[u8]) -> bool {
    let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
    without_times(ours, &mut our_times) == without_times(theirs, &mut their_times)
        && our_times.len() == their_times.len()
        && our_times
            .iter()
            .zip(&their_times)
            .all(|(ours, theirs)| ours.abs_diff(*theirs) <= 1)
}

fn shown(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() <= 1_500 {
        text
    } else {
        format!(
            "{} ... {} ({} bytes)",
            &text[..300],
            &text[text.len() - 200..],
            bytes.len()
        )
    }
}

/// Runs every case on both servers and panics with all differences.
async fn compare(cases: Vec<Case>) {
    let mut differences = Vec::new();
    let mut memcached = Memcached::spawn(&["-m", "64"]).expect("the suite needs memcached 1.6.18");
    let mut stream = TcpStream::connect(memcached.address())
        .await
        .expect("it listens");
    let version = exchange(&mut stream, b"version\r\n").await;
    assert!(
        version.starts_with(b"VERSION 1.6.18"),
        "this is about 1.6.18, not {}",
        shown(&version)
    );
    for case in cases {
        let joined = Case {
            name: case.name,
            steps: vec![case.steps.concat()],
        };
        for case in [case, joined] {
            differences.extend(difference(&case, &mut memcached).await);
        }
    }
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// What `case` shows to differ. memcached's own background threads touch items now and then, which changes whether a
/// number is written in place: a difference counts if it is there each time.
async fn difference(case: &Case, memcached: &mut Memcached) -> Option<String> {
    let mut found = None;
    for _ in 0..3 {
        memcached.restart().expect("memcached restarts");
        let server = Server::new();
        let address = server.listen().await.expect("a free port").to_string();
        let their_address = memcached.address();
        let (ours, theirs) = tokio::join!(run(case, &address), run(case, &their_address));
        let mut steps = case.steps.iter().zip(ours.iter().zip(&theirs));
        let (step, (ours, theirs)) = steps.find(|(_, (ours, theirs))| !same(ours, theirs))?;
        found = Some(format!(
            "{}\n  request   {}\n  ours      {}\n  memcached {}",
            case.name,
            shown(step),
            shown(ours),
            shown(theirs)
        ));
    }
    found
}

fn key_of(length: usize) -> String {
    "k".repeat(length)
}

fn value_of(length: usize) -> String {
    "v".repeat(length)
}

#[tokio::test]
async fn classic_reads_and_writes() {
    let (longest, overlong) = (key_of(250), key_of(251));
    compare(vec![
        case("get misses", &["get a\r\n", "gets a b c\r\n", "gat 0 a\r\n", "gats 0 a b\r\n", "bget a\r\n"]),
        case("get hits", &["set a 5 0 2\r\nhi\r\n", "get a\r\n", "gets a\r\n", "gat 0 a\r\n", "gats 0 a\r\n", "bget a\r\n"]),
        case("get many", &["set a 0 0 1\r\n1\r\n", "set c 7 0 0\r\n\r\n", "get a b c a\r\n", "gets c  b   a \r\n"]),
        case("get without keys", &["get\r\n", "get \r\n", "gets\r\n", "gat\r\n", "gat 0\r\n", "gats\r\n", "gats 1\r\n", "bget\r\n"]),
        case("get of more keys than tokens", &[&format!("set k29 0 0 1\r\nx\r\nget {}\r\n", (0..30).map(|n| format!("k{n} ")).collect::<String>())]),
        case("gat with a wrong time", &["gat x a\r\n", "gats 1x a\r\n", "gat a\r\n"]),
        case("a lone LF ends a line too", &["get a\nset a 0 0 1\nx\r\nget a\n"]),
        case("set and its flags", &["set a 0 0 1\r\nx\r\nset b 4294967295 0 1\r\nx\r\nget a b\r\n"]),
        case("flags beyond 32 bits are cut", &["set a 4294967297 0 1\r\nx\r\nget a\r\nset a 18446744073709551615 0 1\r\nx\r\nget a\r\n"]),
        case("flags beyond 64 bits", &["set a 18446744073709551616 0 1\r\n", "set a -1 0 1\r\n", "set a 1x 0 1\r\n", "set a 0x1 0 1\r\n"]),
        case("odd numbers", &["set a +1 0 +1\r\nx\r\nget a\r\n", "set a 01 0 01\r\nx\r\nget a\r\n", "set a -0 -0 1\r\nx\r\nget a\r\n"]),
        case("too few and too many words", &["set a 0 0\r\n", "set a 0 0 1 2 3\r\n", "set\r\n", "add a\r\n", "cas a 0 0 1\r\n", "cas a 0 0 1 2 3 4\r\n"]),
        case("a sixth word need not be noreply", &["set a 0 0 1 foo\r\nx\r\nget a\r\n", "cas a 0 0 1 1 foo\r\ny\r\nget a\r\n"]),
        case("add and replace", &["replace a 0 0 1\r\n1\r\n", "add a 1 0 1\r\n2\r\n", "add a 2 0 1\r\n3\r\n", "replace a 3 0 1\r\n4\r\n", "gets a\r\n"]),
        case("append and prepend", &["append a 0 0 1\r\n1\r\n", "prepend a 0 0 1\r\n1\r\n", "set a 5 100 1\r\n2\r\n", "append a 9 0 2\r\n34\r\n", "prepend a 9 0 2\r\n01\r\n", "gets a\r\n", "mg a t\r\n"]),
        case("cas", &["cas a 0 0 1 1\r\nx\r\n", "set a 0 0 1\r\n1\r\n", "cas a 0 0 1 1\r\n2\r\n", "cas a 0 0 1 1\r\n3\r\n", "gets a\r\n", "cas a 0 0 1 x\r\n", "cas a 0 0 1 -1\r\n"]),
        case("cas 0", &["set a 0 0 1\r\n1\r\n", "cas a 0 0 1 0\r\n2\r\n", "cas b 0 0 1 0\r\n2\r\n", "get a b\r\n"]),
        case("delete", &["delete a\r\n", "set a 0 0 1\r\nx\r\ndelete a\r\n", "delete a 0\r\n", "delete a 5\r\n", "delete a x noreply\r\n", "delete a 0 noreply\r\n", "delete a 0 x\r\n", "delete a noreply x\r\n", "delete a 1 2 3\r\n", "delete\r\n"]),
        case("touch", &["touch a 0\r\n", "set a 0 0 1\r\nx\r\ntouch a 100\r\nmg a t\r\n", "touch a x\r\n", "touch a\r\n", "touch a 0 x\r\n", "touch a 1 2 3\r\n", "touch a 0 noreply\r\nmg a t\r\n"]),
        case("gat touches", &["set a 0 0 1\r\nx\r\n", "gat 100 a\r\n", "mg a t\r\n", "gats -1 a\r\n", "get a\r\n"]),
        case("longest key", &[&format!("set {longest} 0 0 1\r\nx\r\n"), &format!("get {longest}\r\n"), &format!("mg {longest} k v\r\n"), &format!("delete {longest}\r\n")]),
        case("overlong keys", &[&format!("get {overlong}\r\n"), &format!("gat 0 {overlong}\r\n"), &format!("delete {overlong}\r\n"), &format!("touch {overlong} 0\r\n"), &format!("incr {overlong} 1\r\n"), &format!("incr {overlong} 1 noreply\r\n")]),
        case("the value after an overlong key is executed", &[&format!("set {overlong} 0 0 7\r\nversion\r\n"), &format!("add {overlong} 0 0 7 noreply\r\nversion\r\n"), &format!("cas {overlong} 0 0 7 1\r\nversion\r\n"), &format!("ms {overlong} 7\r\nversion\r\n")]),
        case("an overlong key loses the replies before it", &[&format!("set a 0 0 1\r\nx\r\nversion\r\nget a {overlong}\r\n"), &format!("version\r\nmn\r\nversion\r\nget {overlong}\r\nget a\r\n"), &format!("version\r\nget a\r\nmg a\r\nget a {overlong} a\r\nversion\r\n")]),
        case("an overlong key loses at most 20 replies", &[&format!("{}get {overlong}\r\n", "version\r\n".repeat(24))]),
        case("the value after a wrong length is executed", &["set a 0 0 -1\r\nversion\r\n", "set a 0 0 2147483646\r\nversion\r\n", "set a 0 0 2147483647\r\nversion\r\n", "set a 0 0 x\r\nversion\r\n", "set a 0 0 4294967295\r\nversion\r\n"]),
        case("lengths are cut to 32 bits", &["set a 0 0 4294967297\r\nx\r\nget a\r\n", "set a 0 0 9223372036854775808\r\nversion\r\n"]),
        case("the value after a wrong time is executed", &["set a 0 x 7\r\nversion\r\n", "set a x 0 7 noreply\r\nversion\r\n"]),
        case("bad data chunk", &["set a 0 0 1\r\nx\r\n", "set a 0 0 1\r\nxyz\r\n", "get a\r\n", "set a 0 0 3\r\nabcde\r\n", "set a 0 0 5\r\nab\r\n\r\n\r\n", "get a\r\n"]),
        case("bad data chunk in a large value", &[&format!("set a 0 0 600000\r\n{}\r\nget a\r\n", value_of(600_001))]),
        case("bad data chunk under noreply", &["set a 0 0 3 noreply\r\nabcde\r\n", "get a\r\n"]),
        case("noreply", &["set a 0 0 1 noreply\r\n5\r\n", "add a 0 0 1 noreply\r\nx\r\n", "incr a 1 noreply\r\ntouch a 0 noreply\r\n", "get a\r\n", "delete a noreply\r\nget a\r\n", "flush_all noreply\r\n", "verbosity 0 noreply\r\n"]),
        case("noreply hides most errors", &["set a x 0 1 noreply\r\n", "incr a x noreply\r\n", "touch a x noreply\r\n", "cas a 0 0 1 x noreply\r\n", "flush_all x noreply\r\n", "set a 0 0 noreply\r\n"]),
        case("noreply as a key", &["get noreply\r\n", "delete noreply\r\n", "set noreply 0 0 1\r\nx\r\nget noreply\r\n", "touch noreply 0\r\n", "incr noreply noreply\r\n"]),
        case("many spaces", &["set   a  1  0   1  \r\nx\r\n", " get a\r\n", "get  a   b \r\n"]),
    ])
    .await;
}

#[tokio::test]
async fn sizes() {
    let ours = |length: usize| format!("set a 0 0 {length}\r\n{}\r\n", value_of(length));
    let appended = value_of(50_000);
    compare(vec![
        case(
            "the largest value",
            &[
                &ours(1_048_516),
                "mg a s\r\n",
                &ours(1_048_517),
                "mg a s\r\n",
            ],
        ),
        case(
            "the largest value with flags",
            &[
                &format!("set a 1 0 1048512\r\n{}\r\n", value_of(1_048_512)),
                &format!("set a 1 0 1048513\r\n{}\r\n", value_of(1_048_513)),
            ],
        ),
        case(
            "the largest value with a longer key",
            &[
                &format!("set aa 0 0 1048515\r\n{}\r\n", value_of(1_048_515)),
                &format!(
                    "set aa 0 0 1048516\r\n{}\r\nget aa\r\n",
                    value_of(1_048_516)
                ),
            ],
        ),
        case(
            "the largest value comes back",
            &[&ours(1_048_516), "get a\r\n"],
        ),
        case(
            "too large: the old value of set and ms is gone",
            &[
                "set a 0 0 1\r\nx\r\n",
                &ours(1_100_000),
                "get a\r\n",
                "set a 0 0 1\r\nx\r\n",
                &format!("ms a 1100000 ME k Ox\r\n{}\r\n", value_of(1_100_000)),
                "get a\r\n",
            ],
        ),
        case(
            "too large: add, replace, append leave it",
            &[
                "set a 0 0 1\r\nx\r\n",
                &format!("add a 0 0 1100000\r\n{}\r\n", value_of(1_100_000)),
                &format!("append a 0 0 1100000\r\n{}\r\n", value_of(1_100_000)),
                &format!("cas a 0 0 1100000 1\r\n{}\r\n", value_of(1_100_000)),
                "get a\r\n",
            ],
        ),
        case(
            "too large, quietly",
            &[
                &format!("set a 0 0 1100000 noreply\r\n{}\r\n", value_of(1_100_000)),
                &format!("ms a 1100000 q Ox\r\n{}\r\n", value_of(1_100_000)),
            ],
        ),
        case(
            "append beyond the limit",
            &[
                "set b 0 0 1\r\nx\r\n",
                &ours(1_000_000),
                &format!("append a 0 0 50000\r\n{appended}\r\n"),
                &format!("ms a 50000 MP c Oa\r\n{appended}\r\n"),
                "mg a s c\r\n",
            ],
        ),
        case(
            "a swallowed value is not executed",
            &["ms a 9 ?\r\nversion\r\n\r\nversion\r\n"],
        ),
        case(
            "a long line in one piece",
            &[
                &format!("{}\r\n", value_of(2_049)),
                &format!("{}\r\n", value_of(8_000)),
            ],
        ),
        case(
            "a long multi-get",
            &[
                &format!("set k 0 0 1\r\nx\r\nget {}\r\n", "q ".repeat(20_000)),
                &format!("get {}k\r\n", "q ".repeat(3_000)),
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn numbers() {
    // A number is written in place only while memcached itself holds no reference to the item. A second read makes its
    // LRU hold one for a while, so these cases read with `u`, and a reply that is not yet sent holds one, hence `mn`.
    compare(vec![
        case(
            "incr and decr",
            &[
                "incr a 1\r\n",
                "decr a 1\r\n",
                "set a 0 0 2\r\n10\r\n",
                "incr a 5\r\n",
                "decr a 3\r\n",
                "incr a 0\r\n",
                "gets a\r\n",
            ],
        ),
        case(
            "incr wraps",
            &[
                "set a 0 0 20\r\n18446744073709551615\r\n",
                "incr a 1\r\n",
                "get a\r\n",
                "incr a 18446744073709551615\r\n",
                "get a\r\n",
            ],
        ),
        case(
            "decr stops at 0",
            &["set a 0 0 1\r\n5\r\n", "decr a 100\r\n", "get a\r\n"],
        ),
        case(
            "decr leaves spaces",
            &[
                "set a 0 0 3\r\n100\r\n",
                "decr a 1\r\n",
                "get a\r\n",
                "mg a s v u\r\n",
                "mn\r\nincr a 1\r\n",
                "get a\r\n",
            ],
        ),
        case(
            "wrong deltas",
            &[
                "set a 0 0 1\r\n1\r\n",
                "incr a -1\r\n",
                "incr a x\r\n",
                "incr a 1x\r\n",
                "incr a +1\r\n",
                "incr a 18446744073709551616\r\n",
                "incr a\r\n",
                "incr a 1 2\r\n",
                "incr a 1 2 3\r\n",
                "incr\r\n",
            ],
        ),
        case(
            "not numbers",
            &[
                "set a 0 0 3\r\nabc\r\nincr a 1\r\n",
                "set a 0 0 0\r\n\r\nincr a 1\r\n",
                "set a 0 0 2\r\n-1\r\ndecr a 1\r\n",
                "set a 0 0 3\r\n12x\r\nincr a 1\r\n",
                "set a 0 0 20\r\n18446744073709551616\r\nincr a 1\r\n",
                "set a 0 0 1\r\n+\r\nincr a 1\r\n",
            ],
        ),
        case(
            "almost numbers",
            &[
                "set a 0 0 3\r\n 12\r\nincr a 1\r\nget a\r\n",
                "set a 0 0 3\r\n12 \r\nincr a 1\r\nget a\r\n",
                "set a 0 0 2\r\n+1\r\nincr a 1\r\nget a\r\n",
                "set a 0 0 5\r\n99  x\r\nincr a 1\r\nget a\r\n",
                "set a 0 0 4\r\n9\t 9\r\nincr a 1\r\nget a\r\n",
                "set a 0 0 25\r\n0000000000000000000000012\r\nincr a 1\r\nget a\r\n",
                "set a 0 0 2\r\n1\0\r\nincr a 1\r\nget a\r\n",
            ],
        ),
        case(
            "a longer number keeps flags and time",
            &["set a 7 100 1\r\n9\r\n", "incr a 1\r\n", "mg a f t c s\r\n"],
        ),
        case(
            "ma",
            &[
                "ma a\r\n",
                "ma a k Ox q\r\n",
                "set a 0 0 1\r\n1\r\n",
                "ma a\r\n",
                "ma a v\r\n",
                "ma a D5 v c t k Ox\r\n",
                "ma a q\r\n",
                "ma a v q\r\n",
                "mn\r\nget a\r\n",
            ],
        ),
        case(
            "ma modes",
            &[
                "set a 0 0 2\r\n50\r\n",
                "ma a MI v\r\n",
                "ma a M+ v\r\n",
                "ma a MD v\r\n",
                "ma a M- D100 v\r\n",
                "ma a Mi\r\n",
                "ma a MX Ox\r\n",
                "ma a M\r\n",
                "ma a MII\r\n",
            ],
        ),
        case(
            "ma vivifies",
            &[
                "ma a N0\r\n",
                "ma a v t\r\n",
                "ma b N30 J13 v t c\r\n",
                "ma c N30 J13 D5 v t c T99 k Oq\r\n",
                "mg c t v\r\n",
                "ma d J7\r\n",
                "ma e N30 q\r\n",
                "ma e q v\r\n",
                "mg e v t\r\n",
                "ma f N-1 v\r\n",
                "mg f\r\n",
            ],
        ),
        case(
            "ma compares",
            &[
                "set a 0 0 2\r\n10\r\n",
                "ma a C9 Ox k\r\n",
                "ma a C9 q\r\n",
                "ma a C1 c v\r\n",
                "ma a C0 c v\r\n",
                "ma b C1\r\n",
                "ma b C1 N0 v c\r\n",
            ],
        ),
        case(
            "ma wraps and stops",
            &[
                "set a 0 0 2\r\n10\r\n",
                "ma a D18446744073709551615 v\r\n",
                "mg a v s u\r\n",
                "mn\r\nma a MD D99 v\r\n",
                "get a\r\n",
            ],
        ),
        case(
            "ma sets times",
            &[
                "set a 0 100 2\r\n10\r\n",
                "mn\r\nma a T50 t\r\n",
                "mg a t u\r\n",
                "mn\r\nma a t T0\r\n",
                "mg a t u\r\n",
                "mn\r\nma a T-1\r\n",
                "mg a u\r\n",
            ],
        ),
        case(
            "ma forgets the time of a number that grew",
            &["set a 0 100 1\r\n9\r\n", "ma a T50 t v\r\n", "mg a t v\r\n"],
        ),
        case(
            "ma errors",
            &[
                "set a 0 0 1\r\nx\r\n",
                "ma a Ox k v\r\n",
                "ma a q\r\n",
                "ma a Dx\r\n",
                "ma a Jx\r\n",
                "ma a D-1\r\n",
                "ma a D\r\n",
                "ma a v v\r\n",
                "ma a ?\r\n",
                "ma a E5\r\n",
                "ma a Tx\r\n",
                "ma\r\n",
            ],
        ),
        case(
            "ma and flags it does not answer",
            &["set a 0 0 1\r\n1\r\n", "ma a s f h l I P L u v\r\n"],
        ),
        case(
            "numbers stay stale in place",
            &[
                "set a 0 0 2\r\n10\r\n",
                "md a I\r\n",
                "incr a 1\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "numbers that grow are fresh",
            &[
                "set a 0 0 1\r\n9\r\n",
                "md a I\r\n",
                "incr a 1\r\n",
                "mg a v c\r\n",
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn meta_reads() {
    let (opaque, overlong_opaque) = ("o".repeat(31), "o".repeat(32));
    let (longest, overlong) = (key_of(250), key_of(251));
    let many = [
        "k", "s", "v", "f", "c", "t", "h", "l", "q", "u", "I", "P0", "L0", "T0", "N0", "R0", "M1",
        "C1",
    ];
    compare(vec![
        case(
            "mg misses",
            &[
                "mg a\r\n",
                "mg a v\r\n",
                "mg a k Ox v\r\n",
                "mg a Ox k q\r\n",
                "mg a s v f c t h l\r\n",
            ],
        ),
        case(
            "mg hits",
            &[
                "set a 5 0 2\r\nhi\r\n",
                "mg a\r\n",
                "mg a v\r\n",
                "mg a s v f c t k Oabc\r\n",
                "mg a Oabc k t c f v s\r\n",
                "mg a q\r\n",
                "mg a v q\r\n",
            ],
        ),
        case(
            "mg of an empty value",
            &["set a 0 0 0\r\n\r\n", "mg a v s\r\n"],
        ),
        case(
            "mg without a key",
            &[
                "mg\r\n",
                "mg \r\n",
                "md\r\n",
                "ms\r\n",
                "ma\r\n",
                "me\r\n",
                "mz\r\n",
                "m\r\n",
                "mgx a\r\n",
                "MG a\r\n",
            ],
        ),
        case(
            "mn",
            &[
                "mn\r\n",
                "mn x\r\n",
                "mn q\r\n",
                "mg a q\r\nmg b q\r\nmn\r\n",
            ],
        ),
        case(
            "mg tells of earlier reads",
            &[
                "set a 0 0 1\r\nx\r\n",
                "mg a h l u\r\n",
                "mg a h u\r\n",
                "mg a h\r\n",
                "mg a h\r\n",
                "set a 0 0 1\r\ny\r\n",
                "get a\r\n",
                "mg a h l\r\n",
            ],
        ),
        case(
            "touch and gat count as reads",
            &[
                "set a 0 0 1\r\nx\r\ntouch a 0\r\n",
                "mg a h u\r\n",
                "set a 0 0 1\r\nx\r\ngat 0 a\r\n",
                "mg a h u\r\n",
                "set a 0 0 1\r\n1\r\nincr a 1\r\n",
                "mg a h u\r\n",
                "append a 0 0 1\r\n1\r\n",
                "mg a h u\r\n",
                "add a 0 0 1\r\n1\r\n",
                "mg a h u\r\n",
            ],
        ),
        case(
            "duplicate flags",
            &[
                "mg a v v\r\n",
                "mg a k Ox Oy\r\n",
                "mg a \x7f\r\n",
                "mg a \u{e9}\r\n",
            ],
        ),
        case(
            "unknown flags",
            &[
                "set a 0 0 1\r\nx\r\n",
                "mg a ?\r\n",
                "mg a E5\r\n",
                "mg a S5\r\n",
                "mg a d\r\n",
                "mg a 1\r\n",
                "mg a a\r\n",
                "mg a x\r\n",
                "mg a foo\r\n",
                "mg a vvv\r\n",
            ],
        ),
        case(
            "flags mg ignores",
            &[
                "set a 0 0 1\r\nx\r\n",
                "mg a C1\r\n",
                "mg a F1\r\n",
                "mg a I\r\n",
                "mg a MX\r\n",
                "mg a J1 D1\r\n",
                "mg a P Lx\r\n",
                "mg a v\r\n",
            ],
        ),
        case(
            "wrong flag arguments",
            &[
                "mg a Nx\r\n",
                "mg a N\r\n",
                "mg a Tx\r\n",
                "mg a Rx\r\n",
                "mg a Cx\r\n",
                "mg a Dx\r\n",
                "mg a Jx\r\n",
                "mg a Fx\r\n",
                "mg a M\r\n",
                "mg a Mxx\r\n",
                "mg a Nx Ob k\r\n",
                "mg a Nx q\r\n",
            ],
        ),
        case(
            "the last wrong argument is told",
            &[
                "mg a Fx Cx\r\n",
                "mg a Cx Fx\r\n",
                "mg a Cx Dx\r\n",
                "mg a Jx Dx\r\n",
                "mg a Mxx Fx\r\n",
                "mg a Fx ?\r\n",
                "mg a Cx v v\r\n",
            ],
        ),
        case(
            "opaques",
            &[
                "set a 0 0 1\r\nx\r\n",
                "mg a O\r\n",
                "mg b O\r\n",
                &format!("mg a O{opaque}\r\n"),
                &format!("mg b O{opaque}\r\n"),
            ],
        ),
        case(
            "opaques too long",
            &[
                "set a 0 0 1\r\n1\r\n",
                &format!("mg a O{overlong_opaque}\r\n"),
                &format!("mg b O{overlong_opaque}\r\n"),
                &format!("mg a q O{overlong_opaque}\r\n"),
                &format!("ms a 7 O{overlong_opaque}\r\nversion\r\n"),
                &format!("md a O{overlong_opaque}\r\n"),
                &format!("ma b O{overlong_opaque}\r\n"),
                "mg a v\r\n",
            ],
        ),
        case(
            "opaques too long come after the deed",
            &[
                "set a 0 0 1\r\n1\r\n",
                &format!("ma a O{overlong_opaque}\r\n"),
                "mg a v\r\n",
                &format!("ma b N0 O{overlong_opaque}\r\n"),
                "mg b v\r\n",
            ],
        ),
        case(
            "key lengths",
            &[
                &format!("mg {longest}\r\n"),
                &format!("mg {overlong}\r\n"),
                &format!("mg {overlong} k Oa\r\n"),
                &format!("md {overlong} k Oa\r\n"),
                &format!("ma {overlong} Oa\r\n"),
                &format!("me {overlong}\r\n"),
            ],
        ),
        case(
            "as many flags as there may be",
            &[
                "set a 0 0 1\r\nx\r\n",
                &format!("mg a {}\r\n", many[..17].join(" ")),
                &format!("mg a {}\r\n", many.join(" ")),
                &format!("ms a 1 {}\r\nx\r\n", many[..17].join(" ")),
                &format!("md a {}\r\n", many.join(" ")),
                &format!("ma a {}\r\n", many.join(" ")),
                &format!("mg a {}\r\n", "v ".repeat(40)),
            ],
        ),
        case(
            "binary keys",
            &[
                "mg YWJj b k v\r\n",
                "ms YWJj 2 b k c\r\nhi\r\n",
                "mg abc v k\r\n",
                "mg YWJj b k v\r\n",
                "mg YWJj k b v\r\n",
                "get abc\r\n",
                "me abc\r\n",
                "me YWJj b\r\n",
                "md YWJj b k Ox\r\n",
                "md YWJj b k Ox\r\n",
            ],
        ),
        case(
            "binary keys of text items",
            &[
                "set abc 0 0 1\r\nx\r\n",
                "mg YWJj b k\r\n",
                "ms YWJj 1 b\r\ny\r\n",
                "mg abc k\r\n",
                "append abc 0 0 1\r\nz\r\n",
                "mg abc k v\r\n",
                "ma enp6 N0 b k\r\n",
                "mg enp6 b k v\r\n",
                "mg enp3 N30 b k v\r\n",
                "mg enp3 b k\r\n",
            ],
        ),
        case(
            "binary keys in quiet and errors",
            &[
                "ms YWJj 1 b k q\r\nx\r\n",
                "ms YWJj 1 b k ME q\r\nx\r\n",
                "ms YWJj 1 k b MR c\r\nx\r\n",
                "ma YWJj b k Ox\r\n",
                "md YWJj b q k\r\n",
            ],
        ),
        case(
            "odd base64",
            &[
                "mg YR== b k\r\n",
                "mg YQ==YQ== b k\r\n",
                "mg ==== b k\r\n",
                "mg YWJjZA b k\r\n",
                "mg YWJjZ=== b k\r\n",
                "mg Y-_j b k\r\n",
                "mg Y+/j b k\r\n",
                "mg Y===  b k\r\n",
                "mg a b\r\n",
                "mg !!!! b\r\n",
                "mg Y!Q= b k\r\n",
                "mg YWJ= b k\r\n",
                "mg YQ=a b k\r\n",
                "mg =QQQ b k\r\n",
                "mg Y!Q== b k\r\n",
                "mg !Y!Q!Ux b k\r\n",
            ],
        ),
        case(
            "odd base64 elsewhere",
            &[
                "ms !! 2 b\r\nhi\r\n",
                "md !! b\r\n",
                "ma !! b\r\n",
                "me !! b\r\n",
                "me YQ b\r\n",
            ],
        ),
        case(
            "longest binary key",
            &[
                &format!("ms {} 1 b\r\nx\r\n", "QUFB".repeat(62)),
                &format!("mg {} b k v\r\n", "QUFB".repeat(62)),
                &format!("mg {} b\r\n", "QUFB".repeat(63)),
            ],
        ),
        case(
            "me",
            &[
                "me a\r\n",
                "set a 0 0 1\r\nx\r\n",
                "me a\r\n",
                "get a\r\n",
                "me a\r\n",
                "me a v\r\n",
                "me a b\r\n",
                "ms c 5 F1 T100\r\nhello\r\n",
                "mg c u\r\n",
            ],
        ),
        case(
            "me classes",
            &[&(0..20)
                .map(|n| format!("set k 0 0 {}\r\n{}\r\nme k\r\n", 1 << n, value_of(1 << n)))
                .collect::<String>()],
        ),
        case(
            "mg sets times",
            &[
                "set a 0 0 1\r\nx\r\n",
                "mg a T100 t\r\n",
                "mg a t\r\n",
                "mg a t T50\r\n",
                "mg a t\r\n",
                "mg a T0 t\r\n",
                "mg a T-1\r\n",
                "mg a\r\n",
                "mg b T30\r\n",
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn meta_writes() {
    compare(vec![
        case(
            "ms",
            &[
                "ms a 2\r\nhi\r\n",
                "mg a v f t c\r\n",
                "ms a 2 c k Ox F5 T100\r\nho\r\n",
                "mg a v f t c\r\n",
                "ms a 0\r\n\r\n",
                "mg a v\r\n",
            ],
        ),
        case(
            "ms flags in their order",
            &[
                "ms a 1 Ox k c\r\nx\r\n",
                "ms a 1 c Ox k\r\nx\r\n",
                "ms a 1 s v f t h l u\r\nx\r\n",
                "ms a 1 J1 D1 N0 R0 P L\r\nx\r\n",
            ],
        ),
        case(
            "ms is quiet about success only",
            &[
                "ms a 1 q k Ox\r\nx\r\n",
                "ms a 1 ME q Ox\r\nx\r\n",
                "ms b 1 MR q k\r\nx\r\n",
                "ms a 1 C99 q\r\nx\r\n",
                "ms b 1 C99 q\r\nx\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "ms modes",
            &[
                "ms a 1 MR\r\n1\r\n",
                "ms a 1 MA c k\r\n1\r\n",
                "ms a 1 MP c Ox\r\n1\r\n",
                "ms a 1 ME\r\n2\r\n",
                "ms a 1 ME c\r\n3\r\n",
                "ms a 1 MA c\r\n4\r\n",
                "ms a 1 MP\r\n5\r\n",
                "mg a v\r\n",
                "ms a 1 MR F9\r\n6\r\n",
                "ms a 1 MS\r\n7\r\n",
                "mg a v f\r\n",
            ],
        ),
        case(
            "ms appends keep flags and time",
            &[
                "ms a 1 F5 T100\r\n1\r\n",
                "ms a 1 MA F9 T9\r\n2\r\n",
                "mg a f t v\r\n",
            ],
        ),
        case(
            "ms wrong modes",
            &[
                "ms a 1 MX\r\nx\r\n",
                "ms a 1 M\r\nx\r\n",
                "ms a 1 MEE\r\nx\r\n",
                "ms a 1 Ma\r\nx\r\n",
                "ms a 1 MX q\r\nx\r\n",
            ],
        ),
        case(
            "ms compares",
            &[
                "ms a 1 C1 c k Ox\r\n0\r\n",
                "ms a 1\r\n1\r\n",
                "ms a 1 C1 c\r\n2\r\n",
                "ms a 1 C1 c k\r\n3\r\n",
                "ms a 1 C0\r\n4\r\n",
                "ms a 1 MR C2 c\r\n5\r\n",
                "ms a 1 MR C2 c\r\n6\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "ms compares in other modes",
            &[
                "ms a 1 ME C5 c\r\n1\r\n",
                "ms a 1 MA C9 c\r\n2\r\n",
                "ms a 1 MA C1 c\r\n3\r\n",
                "ms a 1 MP C2\r\n4\r\n",
                "ms a 1 MA C0\r\n5\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "ms wrong lines without a length",
            &[
                "ms a\r\n",
                "ms a x\r\nversion\r\n",
                "ms a -1\r\nversion\r\n",
                "ms a 2147483646\r\nversion\r\n",
                "ms a 2x\r\nversion\r\n",
                "ms a S2\r\nversion\r\n",
                "ms a b 2\r\nversion\r\n",
            ],
        ),
        case(
            "ms wrong lines with a length",
            &[
                "ms a 7 ?\r\nversion\r\n",
                "ms a 7 c c\r\nversion\r\n",
                "ms a 7 Tx\r\nversion\r\n",
                "ms a 7 Fx\r\nversion\r\n",
                "ms a 7 F-1\r\nversion\r\n",
                "ms a 7 Cx\r\nversion\r\n",
                "ms a 7 E5\r\nversion\r\n",
                "ms a 7 S5\r\nversion\r\n",
                "ms a 7 Nx q\r\nversion\r\n",
                "ms a 7 Jx Oa k\r\nversion\r\n",
            ],
        ),
        case(
            "ms odd lengths",
            &[
                "ms a 02\r\nhi\r\n",
                "ms a +2\r\nhi\r\n",
                "ms a 4294967298\r\nhi\r\n",
                "mg a v\r\n",
            ],
        ),
        case(
            "ms flags beyond 32 bits",
            &[
                "ms a 1 F4294967297\r\nx\r\n",
                "mg a f\r\n",
                "ms a 1 F4294967296\r\nx\r\n",
                "mg a f\r\n",
            ],
        ),
        case(
            "ms bad data chunk",
            &[
                "ms a 1\r\nx\r\n",
                "ms a 2\r\nabcd\r\n",
                "ms a 2 q Ox\r\nabcd\r\n",
                "ms a 2 k Ox\r\nabcdefgh\r\n",
                "mg a v\r\n",
            ],
        ),
        case(
            "ms and a too long line of flags",
            &[&format!("ms a 7 {}\r\nversion\r\n", "v ".repeat(20))],
        ),
        case(
            "md",
            &[
                "md a\r\n",
                "md a q\r\n",
                "md a k Ox q\r\n",
                "ms a 1\r\nx\r\n",
                "md a k Ox\r\n",
                "ms a 1\r\nx\r\n",
                "md a q\r\n",
                "mg a\r\n",
            ],
        ),
        case(
            "md compares",
            &[
                "ms a 1\r\nx\r\n",
                "md a C9 Ox k\r\n",
                "md a C9 q\r\n",
                "md a C0\r\n",
                "md b C1\r\n",
                "md a C1 k Ox\r\n",
            ],
        ),
        case(
            "md errors",
            &[
                "md a ?\r\n",
                "md a k k\r\n",
                "md a Cx\r\n",
                "md a Tx\r\n",
                "md a T\r\n",
                "md a x\r\n",
                "md a E5 k\r\n",
                "md a Mxx\r\n",
                "md a MI\r\n",
                "md a v\r\n",
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn leases_and_stale_items() {
    compare(vec![
        case(
            "a miss is vivified once",
            &[
                "mg a v c N30 t s f k Ox h l\r\n",
                "mg a v c N30 t h\r\n",
                "mg a\r\n",
                "get a\r\n",
                "gets a\r\n",
                "add a 0 0 1\r\nx\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "the winner stores",
            &[
                "mg a v c N30\r\n",
                "ms a 2 C1 T100 c\r\nhi\r\n",
                "mg a v c N30 t\r\n",
            ],
        ),
        case(
            "a delete in between blocks the winner",
            &[
                "mg a c N30\r\n",
                "md a\r\n",
                "ms a 2 C1\r\nhi\r\n",
                "mg a\r\n",
            ],
        ),
        case(
            "a set in between blocks the winner",
            &[
                "mg a c N30\r\n",
                "set a 0 0 1\r\nx\r\n",
                "ms a 2 C1 c k Ox\r\nhi\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "vivified for ever or not at all",
            &[
                "mg a N0 t c\r\n",
                "mg a c\r\n",
                "mg b N-1 v\r\n",
                "mg b v\r\n",
                "mg c q N5\r\n",
                "mg c q N5\r\n",
                "mg d N30 T60 t\r\n",
                "mg e T60 N30 t\r\n",
            ],
        ),
        case(
            "recache",
            &[
                "ms a 1 T100\r\nx\r\n",
                "mg a R30 t\r\n",
                "mg a R200 v c\r\n",
                "mg a R200 v c\r\n",
                "mg a v\r\n",
                "ms b 1\r\nx\r\n",
                "mg b R30\r\n",
                "mg c N30 R60\r\n",
            ],
        ),
        case(
            "invalidated",
            &[
                "ms a 1 F3\r\nx\r\n",
                "md a I T30 k Ox\r\n",
                "mg a v c t\r\n",
                "mg a v c f\r\n",
                "get a\r\n",
                "gets a\r\n",
                "md a I\r\n",
                "mg a c t\r\n",
                "md a I q\r\n",
                "mg a c\r\n",
            ],
        ),
        case(
            "invalidated with compare",
            &[
                "ms a 1\r\nx\r\n",
                "md a I C9\r\n",
                "md a I C1\r\n",
                "mg a c v\r\n",
                "md b I\r\n",
            ],
        ),
        case(
            "an older value may be stored as stale",
            &[
                "ms a 1 T100\r\nx\r\n",
                "md a I T30\r\n",
                "mg a v c\r\n",
                "ms a 1 C1\r\ny\r\n",
                "ms a 1 C1 I c\r\ny\r\n",
                "mg a v c t\r\n",
                "ms a 1 C9 I c\r\nz\r\n",
                "ms a 1 C3 I c\r\nz\r\n",
                "mg a v c t\r\n",
            ],
        ),
        case(
            "an older value keeps the win open",
            &[
                "ms a 1\r\nx\r\n",
                "ms a 1\r\ny\r\n",
                "md a I T50\r\n",
                "ms a 1 C1 I\r\nz\r\n",
                "mg a v c t\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "I without compare",
            &[
                "ms a 1 I c\r\nx\r\n",
                "mg a v\r\n",
                "ms a 1 I MA C9\r\nx\r\n",
            ],
        ),
        case(
            "stale items and other writes",
            &[
                "ms a 1\r\n1\r\n",
                "md a I T30\r\n",
                "touch a 0\r\n",
                "mg a t v\r\n",
                "append a 0 0 1\r\n2\r\n",
                "mg a v c\r\n",
                "md a I\r\n",
                "set a 0 0 1\r\n3\r\n",
                "mg a v c\r\n",
            ],
        ),
        case(
            "writes on a vivified item",
            &[
                "mg a N30 c\r\n",
                "ma a\r\n",
                "incr a 1\r\n",
                "append a 0 0 1\r\n7\r\n",
                "mg a v c t\r\n",
                "mg b N30\r\n",
                "delete b\r\n",
                "mg b\r\n",
            ],
        ),
        case(
            "a lease, as a read-through takes, fills, loses and gives it up",
            &[
                "mg a v f c t N2 R5 O1\r\n",
                "mg a v f c t N2 R5 O2\r\n",
                "ms a 1 T60 C0 O3\r\nx\r\n",
                "mg b v f c t N2 O4\r\n",
                "md b O5\r\n",
                "ms b 1 T60 C1 O6\r\nx\r\n",
                "mg b v f c t O7\r\n",
                "set c 0 0 1\r\nv\r\n",
                "mg c v f c t N2 R5 O8\r\n",
                "touch c 3\r\n",
                "mg c v f c t N2 R5 O9\r\n",
                "mg c v f c t N2 R5 O10\r\n",
                "mg c v f c t O11\r\n",
            ],
        ),
        case(
            "a lease is given up by a value that has expired",
            &[
                "mg a v f c t N20 O1\r\n",
                "ms a 0 T-1 C1 O2\r\n\r\n",
                "ms a 0 T-1 C2 O2\r\n\r\n",
                "mg a v f c t O3\r\n",
                "mg a v f c t N20 O4\r\n",
            ],
        ),
        case(
            "stale and recache",
            &[
                "ms a 1 T20\r\nx\r\n",
                "md a I\r\n",
                "mg a R100 v\r\n",
                "mg a R100 v\r\n",
            ],
        ),
    ])
    .await;
}

#[tokio::test]
async fn flush_version_stats_and_nonsense() {
    let browser = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    compare(vec![
        case(
            "flush_all",
            &[
                "set a 0 0 1\r\nx\r\n",
                "flush_all\r\n",
                "get a\r\n",
                "set a 0 0 1\r\ny\r\n",
                "gets a\r\n",
                "flush_all 0\r\n",
                "gets a\r\n",
                "flush_all -1\r\n",
                "set a 0 0 1\r\ny\r\ngets a\r\n",
            ],
        ),
        case(
            "flush_all arguments",
            &[
                "flush_all x\r\n",
                "flush_all 0 noreply\r\n",
                "flush_all noreply\r\n",
                "flush_all 100 2\r\n",
                "flush_all 1 2 3\r\n",
                "flush_all noreply noreply\r\n",
            ],
        ),
        case(
            "flush_all of the future",
            &[
                "set a 0 0 1\r\nx\r\n",
                "flush_all 100\r\n",
                "gets a\r\n",
                "set b 0 0 1\r\ny\r\n",
                "gets a b\r\n",
            ],
        ),
        case(
            "flush_all in one second is at once, and eats this second's stores",
            &["set a 0 0 1\r\nx\r\nflush_all 1\r\nget a\r\nset a 0 0 1\r\ny\r\nget a\r\n"],
        ),
        case(
            "flush_all and other commands",
            &[
                "ms a 1 T30\r\n5\r\n",
                "flush_all\r\n",
                "incr a 1\r\n",
                "append a 0 0 1\r\n6\r\n",
                "cas a 0 0 1 1\r\n7\r\n",
                "touch a 0\r\n",
                "delete a\r\n",
                "mg a N30 c\r\n",
                "add a 0 0 1\r\n5\r\n",
            ],
        ),
        case(
            "version and verbosity",
            &[
                "version\r\n",
                "version x\r\n",
                "version noreply\r\n",
                "verbosity\r\n",
                "verbosity 0\r\n",
                "verbosity x\r\n",
                "verbosity 0 x\r\n",
                "verbosity 1 2 3\r\n",
                "verbosity noreply\r\n",
                "verbosity -1\r\n",
                "verbosity 0 \r\n",
            ],
        ),
        case(
            "quit",
            &[
                "quit\r\nversion\r\n",
                "version\r\nquit\r\nversion\r\n",
                "mg a q\r\nquit x\r\n",
                "quit noreply\r\n",
                "quit a b c\r\n",
            ],
        ),
        case(
            "shutdown is off",
            &["shutdown\r\n", "shutdown graceful\r\n"],
        ),
        case(
            "stats that are not numbers",
            &[
                "stats foo\r\n",
                "stats reset\r\n",
                "stats detail\r\n",
                "stats detail off\r\n",
                "stats detail dump\r\n",
                "stats detail x\r\n",
                "stats noreply\r\n",
            ],
        ),
        case("empty lines", &["\r\n", "\n", " \r\n", "\r\r\n", "   \n"]),
        case(
            "unknown commands",
            &[
                "foo\r\n",
                "x\r\n",
                "GET a\r\n",
                "Version\r\n",
                "version\t\r\n",
                "\rversion\r\n",
                "version\r\r\n",
                "setx a\r\n",
                "gett a\r\n",
                "mgg a\r\n",
                "deletee a\r\n",
                "flush_allx\r\n",
            ],
        ),
        case(
            "NUL ends a line early",
            &[
                "set a 0 0 1\r\nx\r\nget a\0b\r\n",
                "version\0\r\n",
                "vers\0ion\r\n",
                "\0\r\n",
                "version \0 x\r\n",
            ],
        ),
        case(
            "a browser",
            &[
                browser,
                "foo HTTP/1.1\r\n",
                "foo HTTP/1.1 bar\r\n",
                "get HTTP/1.1\r\n",
                "post HTTP/1.0\r\nversion\r\n",
                "version HTTP/1.1\r\n",
                "POST / HTTP/1.0\r\n\r\n",
            ],
        ),
        case("an endless line", &[&value_of(20_000)]),
        case("not text", &["\u{80}\u{81}\r\n", "\u{1}\u{2}\u{3}\r\n"]),
    ])
    .await;
}

fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("now is after 1970")
        .as_secs()
}

#[tokio::test]
async fn expiry_without_waiting() {
    let now = unix_time();
    compare(vec![
        case(
            "negative times are over",
            &[
                "set a 0 -1 1\r\nx\r\n",
                "get a\r\n",
                "ms b 1 T-1\r\nx\r\n",
                "mg b\r\n",
                "set a 0 0 1\r\nx\r\ntouch a -1\r\n",
                "get a\r\n",
                "set a 0 -2147483648 1\r\nx\r\nget a\r\n",
            ],
        ),
        case(
            "30 days are relative",
            &["set a 0 2592000 1\r\nx\r\n", "mg a t\r\n"],
        ),
        case(
            "more is a Unix time, long over",
            &[
                "set a 0 2592001 1\r\nx\r\n",
                "get a\r\n",
                "ms b 1 T2592001\r\nx\r\n",
                "mg b\r\n",
                "mg c N2592001\r\n",
                "mg c\r\n",
            ],
        ),
        case(
            "a Unix time to come",
            &[
                &format!("set a 0 {} 1\r\nx\r\n", now + 100),
                "mg a t\r\n",
                &format!("touch a {}\r\n", now + 500),
                "mg a t\r\n",
                &format!("gat {} a\r\n", now + 900),
                "mg a t\r\n",
            ],
        ),
        case(
            "a Unix time just over",
            &[
                &format!("set a 0 {} 1\r\nx\r\n", now - 5),
                "get a\r\n",
                &format!("set a 0 {} 1\r\nx\r\n", now - 100),
                "get a\r\n",
            ],
        ),
        case(
            "times are cut to 32 bits",
            &[
                "set a 0 4294967296 1\r\nx\r\n",
                "mg a t\r\n",
                "set a 0 4294967396 1\r\nx\r\n",
                "mg a t\r\n",
                "set a 0 2147483648 1\r\nx\r\n",
                "mg a t\r\n",
                "set a 0 9223372036854775808 1\r\n",
            ],
        ),
        case(
            "expired items and writes",
            &[
                "set a 0 -1 1\r\n1\r\n",
                "incr a 1\r\n",
                "set a 0 -1 1\r\n1\r\nappend a 0 0 1\r\n2\r\n",
                "set a 0 -1 1\r\n1\r\nreplace a 0 0 1\r\n2\r\n",
                "set a 0 -1 1\r\n1\r\nadd a 0 0 1\r\n2\r\n",
                "get a\r\n",
                "set a 0 -1 1\r\n1\r\ndelete a\r\n",
                "set a 0 -1 1\r\n1\r\ntouch a 0\r\n",
                "ms a 1 T-1 c\r\n1\r\nms a 1 C1\r\n2\r\n",
            ],
        ),
        case(
            "recache of absolute times",
            &[
                "ms a 1 T100\r\nx\r\n",
                &format!("mg a R{}\r\n", now + 50),
                &format!("mg a R{}\r\n", now + 500),
                "mg a R-1\r\n",
                "mg a R0\r\n",
            ],
        ),
    ])
    .await;
}

/// Asks until `key` is gone; how long that took.
async fn time_until_gone(address: &str, key: &str) -> Duration {
    let mut stream = TcpStream::connect(address)
        .await
        .expect("the server listens");
    let asked = tokio::time::Instant::now();
    loop {
        let reply = exchange(&mut stream, format!("get {key}\r\n").as_bytes()).await;
        if reply == b"END\r\nEN k~ O~\r\n" {
            return asked.elapsed();
        }
        assert!(
            asked.elapsed() < Duration::from_secs(10),
            "{key} never expired"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn expiry_takes_its_time_on_both() {
    let memcached = Memcached::spawn(&[]).expect("the suite needs memcached");
    let server = Server::new();
    let ours = server.listen().await.expect("a free port").to_string();
    let check = async |address: String| {
        let mut stream = TcpStream::connect(&address)
            .await
            .expect("the server listens");
        let requests = "set a 0 2 1\r\nx\r\nset b 0 0 1\r\nx\r\ntouch b 2\r\nms c 1 T2\r\nx\r\nset d 0 0 1\r\nx\r\nmg e N2\r\nset f 0 9 1\r\nx\r\n";
        let reply = exchange(&mut stream, requests.as_bytes()).await;
        assert_eq!(
            reply,
            b"STORED\r\nSTORED\r\nTOUCHED\r\nHD\r\nSTORED\r\nHD W\r\nSTORED\r\nEN k~ O~\r\n"
        );
        // The clock ticks in whole seconds, so 2 is more than 1 and, polling included, not much more than 2.
        for key in ["a", "b", "c", "e"] {
            let waited = time_until_gone(&address, key).await;
            assert!(
                waited < Duration::from_millis(3_500),
                "{key} lived for {waited:?}"
            );
        }
        assert_eq!(
            exchange(&mut stream, b"get a b c d e f\r\n").await,
            b"VALUE d 0 1\r\nx\r\nVALUE f 0 1\r\nx\r\nEND\r\nEN k~ O~\r\n"
        );
    };
    tokio::join!(check(ours), check(memcached.address()));
}

#[tokio::test]
async fn flush_all_comes_later_on_both() {
    let memcached = Memcached::spawn(&[]).expect("the suite needs memcached");
    let server = Server::new();
    let ours = server.listen().await.expect("a free port").to_string();
    let check = async |address: String| {
        let mut stream = TcpStream::connect(&address)
            .await
            .expect("the server listens");
        let reply = exchange(&mut stream, b"set a 0 0 1\r\nx\r\nflush_all 3\r\nget a\r\n").await;
        assert_eq!(
            reply,
            b"STORED\r\nOK\r\nVALUE a 0 1\r\nx\r\nEND\r\nEN k~ O~\r\n"
        );
        let waited = time_until_gone(&address, "a").await;
        assert!(
            waited > Duration::from_millis(900) && waited < Duration::from_millis(4_500),
            "flushed after {waited:?}"
        );
    };
    tokio::join!(check(ours), check(memcached.address()));
}

#[tokio::test]
async fn replies_wait_for_an_incomplete_value_on_both() {
    let memcached = Memcached::spawn(&[]).expect("the suite needs memcached");
    let server = Server::new();
    let ours = server.listen().await.expect("a free port").to_string();
    for address in [ours, memcached.address()] {
        for incomplete in [
            "version\r\nset a 0 0 5\r\nab",
            "version\r\nset a 0 0 5\r\n",
            "version\r\nset a 0 0 2000000\r\nabc",
        ] {
            let mut stream = TcpStream::connect(&address)
                .await
                .expect("the server listens");
            stream
                .write_all(incomplete.as_bytes())
                .await
                .expect("it is taken");
            let early = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
            assert!(early.is_err(), "{address} answered {incomplete:?} early");
        }
        let mut stream = TcpStream::connect(&address)
            .await
            .expect("the server listens");
        stream
            .write_all(b"version\r\nget")
            .await
            .expect("it is taken");
        let mut reply = [0; 16];
        stream
            .read_exact(&mut reply)
            .await
            .expect("an incomplete line holds nothing back");
    }
}

#[tokio::test]
async fn a_line_is_waited_for_up_to_a_limit_on_both() {
    let memcached = Memcached::spawn(&[]).expect("the suite needs memcached");
    let server = Server::new();
    let ours = server.listen().await.expect("a free port").to_string();
    for address in [ours, memcached.address()] {
        for (length, closed) in [(2_048, false), (2_049, true), (8_191, true)] {
            let mut stream = TcpStream::connect(&address)
                .await
                .expect("the server listens");
            stream
                .write_all(&vec![b'x'; length])
                .await
                .expect("it is taken");
            let end = tokio::time::timeout(Duration::from_millis(300), stream.read_u8()).await;
            assert_eq!(end.is_ok(), closed, "{address}, {length} bytes");
        }
    }
}

/// Replies that are not flushed give way to the next one, so what is answered depends on what arrives at once. Each
/// step is sent when the one before it has been answered.
#[tokio::test]
async fn authentication_is_the_same_on_both() {
    const REFUSED: &str = "CLIENT_ERROR unauthenticated\r\n";
    const FAILED: &str = "CLIENT_ERROR authentication failure\r\n";
    const FORMAT: &str = "CLIENT_ERROR bad authentication token format\r\n";
    const END: &str = "<end>";
    const LOGIN: &str = "set x 0 0 13\r\nuser password\r\n";
    let password = |length: usize| {
        let text = format!("user {}", "p".repeat(length - 5));
        format!("set x 0 0 {length}\r\n{text}\r\n")
    };
    let then = |request: &str| format!("{LOGIN}{request}");
    let cases: Vec<Vec<(String, String)>> = [
        vec![
            ("version\r\n", REFUSED),
            ("mn\r\n", REFUSED),
            ("quit\r\n", REFUSED),
            ("\r\n", REFUSED),
        ],
        vec![("\n", ""), ("x", REFUSED), ("\r\n", REFUSED)],
        vec![("set k 0 0 1\r\n1\r\n", FORMAT), ("get k\r\n", REFUSED)],
        vec![
            ("set k 0 0 0\r\n\r\n", FORMAT),
            ("set k 0 0 1 \r\n \r\n", FORMAT),
        ],
        vec![
            (LOGIN, "STORED\r\n"),
            ("mn\r\n", "MN\r\n"),
            (LOGIN, "STORED\r\n"),
            ("get x\r\n", "VALUE x 0 13\r\nuser password\r\nEND\r\n"),
        ],
        vec![(&then("mn\r\n"), "STORED\r\nMN\r\n")],
        vec![(&format!("mn\r\nmn\r\n{LOGIN}mn\r\n"), "STORED\r\nMN\r\n")],
        vec![(&"mn\r\n".repeat(60), &REFUSED.repeat(3))],
        vec![
            ("set x 0 0 13\r\nuser passwork\r\n", FAILED),
            (LOGIN, "STORED\r\n"),
        ],
        vec![
            ("set x 0 0 13\r\nusex password\r\n", FAILED),
            ("set x 0 0 9\r\nuser pass\r\n", FAILED),
        ],
        vec![
            ("set x 0 0 13\r\nuser\0password\r\n", FORMAT),
            ("set x 0 0 15\r\nuser password\0x\r\n", "STORED\r\n"),
        ],
        vec![("set x 0 0 13\nuser password\r\n", "STORED\r\n")],
        vec![("set x y z 13 noreply\r\nuser password\r\n", "STORED\r\n")],
        vec![("  set x 0 0 16 a b c\r\n  user  password\r\n", "STORED\r\n")],
        vec![
            ("set x 0 0 13 \r\nother secret \r\n", FAILED),
            ("set x 0 0 15\r\nuser password x\r\n", "STORED\r\n"),
        ],
        vec![(
            "set x 0 0 2\r\nuserxx",
            "CLIENT_ERROR bad command line termination\r\n",
        )],
        vec![
            ("set x 0 0 13\r\nuser passwordxx\r\n", REFUSED),
            (LOGIN, "STORED\r\n"),
        ],
        vec![
            ("set x 0 0 13\r\nuser", ""),
            (" password", ""),
            ("\r\nmn\r\n", "STORED\r\nMN\r\n"),
        ],
        vec![
            ("mn\r\nset x 0 0 13\r\nuser", REFUSED),
            (" password\r\n", "STORED\r\n"),
        ],
        vec![
            ("set x 0 0\r\n", REFUSED),
            ("set x 0 0 -1\r\n", REFUSED),
            ("set x 0 0 x\r\n", REFUSED),
            ("set x 0 0 13x\r\n", REFUSED),
        ],
        vec![
            ("ms x 13\r\n", REFUSED),
            ("add x 0 0 13\r\n", REFUSED),
            ("GET / HTTP/1.0\r\n", REFUSED),
        ],
        vec![
            (&password(10_000), FAILED),
            (&password(16_300), FAILED),
            (&password(17_000), END),
        ],
        vec![
            (&format!("{}\r\n", "x".repeat(2_000)), REFUSED),
            (&format!("get {}", "k ".repeat(2_000)), END),
        ],
    ]
    .into_iter()
    .map(|case| {
        case.into_iter()
            .map(|(request, reply)| (request.to_owned(), reply.to_owned()))
            .collect()
    })
    .collect();

    let users = std::env::temp_dir().join(format!("tower-memcached-users-{}", std::process::id()));
    std::fs::write(&users, "user:password\n").expect("a file");
    let memcached = Memcached::spawn(&["-Y", users.to_str().expect("a name in UTF-8")]);
    let server = Server::builder().authentication("user", "password").build();
    let ours = server.listen().await.expect("a free port").to_string();
    let theirs = memcached.as_ref().map(Memcached::address);
    std::fs::remove_file(&users).expect("it is there");
    let theirs = theirs.expect("memcached with authentication starts");
    for case in &cases {
        for (name, address) in [("in-process", &ours), ("memcached", &theirs)] {
            let mut stream = TcpStream::connect(address).await.expect("it listens");
            stream.set_nodelay(true).expect("a socket option");
            for (request, expected) in case {
                // A connection that is closed meanwhile shows in what is read.
                let _ = stream.write_all(request.as_bytes()).await;
                let mut reply = vec![0; expected.len()];
                let read =
                    tokio::time::timeout(Duration::from_secs(30), stream.read_exact(&mut reply));
                if read.await.expect("an answer in time").is_err() {
                    reply = END.as_bytes().to_vec();
                }
                assert_eq!(
                    shown(&reply),
                    shown(expected.as_bytes()),
                    "{name}: {}",
                    shown(request.as_bytes())
                );
            }
        }
    }
}
