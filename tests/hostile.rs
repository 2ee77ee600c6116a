//! A server that answers the greeting and then does what it likes: absurd lengths, lines without end, floods, a byte now
//! and then. Every call ends by its deadline with a typed error, nothing wrong is ever read, memory stays within a bound,
//! the connection is closed, the node beside it is not disturbed, and all is well once the server is.
//!
//! Memory is counted for the whole process, so there is one test only, which does one thing after the other.
#![cfg(all(feature = "testing", feature = "classic"))]

use std::alloc::System;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cap::Cap;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    Client, Error, ErrorKind, Executor, FailureMode, Key, NodeSpec, Protocol, Ring, Ttl,
};

/// Counts the bytes that are allocated.
#[global_allocator]
static ALLOCATED: Cap<System> = Cap::new(System, usize::MAX);

const PATIENCE: Duration = Duration::from_secs(30);
const DEADLINE: Duration = Duration::from_millis(600);
const ATTEMPT: Duration = Duration::from_millis(200);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(3);
/// The largest value that the client takes.
const LARGEST: usize = 256 * 1024;
/// What a client and all of its buffers may take while it is being flooded.
const MEMORY: usize = 4 << 20;

const VALUE: &str = "right";

/// What is asked of the hostile server.
#[derive(Clone, Copy, Debug)]
enum Call {
    Get,
    GetMany,
    Gets,
    Set,
    Increment,
    Stats,
    Version,
}

/// What it answers to whatever it is asked after the greeting.
#[derive(Clone, Debug)]
enum Answer {
    /// Then nothing.
    Once(Vec<u8>),
    ThenClose(Vec<u8>),
    /// The second for ever, as fast as it is taken.
    ThenForEver(Vec<u8>, Vec<u8>),
    /// A byte for ever, every 5 ms.
    ThenDrip(Vec<u8>),
}

/// What is known of the request that is answered.
struct Asked<'a> {
    meta: bool,
    words: Vec<&'a str>,
}

impl Asked<'_> {
    fn key(&self) -> &str {
        self.words.get(1).copied().unwrap_or_default()
    }

    /// The line before a value.
    fn header(&self, length: &str) -> String {
        self.header_for(self.key(), length)
    }

    fn header_for(&self, key: &str, length: &str) -> String {
        if !self.meta {
            let unique = if self.words[0] == "gets" { " 7" } else { "" };
            return format!("VALUE {key} 0 {length}{unique}\r\n");
        }
        let flags = self.words.iter().skip(2).filter_map(|flag| match *flag {
            "f" => Some("f0".to_owned()),
            "c" => Some("c7".to_owned()),
            "k" => Some(format!("k{key}")),
            "t" => Some("t-1".to_owned()),
            // It is by this that a reply says whose it is.
            opaque if opaque.starts_with('O') && key != self.key() => Some("O4000000".to_owned()),
            opaque if opaque.starts_with('O') => Some(opaque.to_owned()),
            _ => None,
        });
        let flags: Vec<_> = flags.collect();
        format!("VA {length} {}\r\n", flags.join(" "))
    }

    fn opaque(&self) -> &str {
        let opaque = self.words.iter().skip(2).find(|flag| flag.starts_with('O'));
        opaque.copied().unwrap_or("O0")
    }

    fn end(&self) -> &'static str {
        match self.meta {
            true => "",
            false => "END\r\n",
        }
    }

    fn right(&self) -> String {
        let header = self.header(&VALUE.len().to_string());
        format!("{header}{VALUE}\r\n{}", self.end())
    }

    fn miss(&self) -> String {
        match self.meta {
            true => format!("EN {}\r\n", self.opaque()),
            false => "END\r\n".to_owned(),
        }
    }
}

/// One way to misbehave.
struct Scenario {
    name: &'static str,
    call: Call,
    answer: fn(&Asked<'_>) -> Answer,
    /// The right value may be given all the same.
    may_be_right: bool,
}

const fn wrong(name: &'static str, call: Call, answer: fn(&Asked<'_>) -> Answer) -> Scenario {
    Scenario {
        name,
        call,
        answer,
        may_be_right: false,
    }
}

const fn odd(name: &'static str, call: Call, answer: fn(&Asked<'_>) -> Answer) -> Scenario {
    Scenario {
        may_be_right: true,
        ..wrong(name, call, answer)
    }
}

fn once(reply: impl Into<Vec<u8>>) -> Answer {
    Answer::Once(reply.into())
}

fn for_ever(before: impl Into<Vec<u8>>, what: &str) -> Answer {
    // Large writes, so that it is the client and not the server that is busy.
    let times = (16 * 1024 / what.len()).max(1);
    Answer::ThenForEver(before.into(), what.repeat(times).into_bytes())
}

/// Whatever the greeting, all of these come after it.
const SCENARIOS: &[Scenario] = &[
    wrong("a length of 2^31", Call::Get, |asked| {
        once(asked.header("2147483648"))
    }),
    wrong("a length of 2^63", Call::Get, |asked| {
        once(asked.header("9223372036854775808"))
    }),
    wrong("a length of 2^64 and 5", Call::Get, |asked| {
        once(format!(
            "{}{VALUE}\r\n{}",
            asked.header("18446744073709551621"),
            asked.end()
        ))
    }),
    wrong("a length of -1", Call::Get, |asked| {
        once(asked.header("-1"))
    }),
    wrong("a length of 20 digits", Call::GetMany, |asked| {
        once(asked.header("99999999999999999999"))
    }),
    wrong("a length of many digits", Call::Get, |asked| {
        once(asked.header(&"9".repeat(1_000)))
    }),
    odd("a length with zeros before it", Call::Get, |asked| {
        once(format!(
            "{}{VALUE}\r\n{}",
            asked.header("0000000000000000000005"),
            asked.end()
        ))
    }),
    wrong("a value over the limit, for ever", Call::Get, |asked| {
        for_ever(asked.header("2000000000"), "x")
    }),
    wrong(
        "a value of 1 GB that is to be skipped",
        Call::Get,
        |asked| for_ever(asked.header("1000000000"), "x"),
    ),
    wrong("values over the limit, for ever", Call::GetMany, |asked| {
        let value = format!("{}{}\r\n", asked.header("300000"), "x".repeat(300_000));
        Answer::ThenForEver(Vec::new(), value.into_bytes())
    }),
    wrong("a value that never comes", Call::Get, |asked| {
        once(asked.header("200000"))
    }),
    wrong("a value that comes byte by byte", Call::Get, |asked| {
        Answer::ThenDrip(asked.header("200000").into_bytes())
    }),
    wrong("a line that comes byte by byte", Call::Get, |_| {
        Answer::ThenDrip(Vec::new())
    }),
    wrong("a line without end", Call::Get, |_| for_ever("", "x")),
    wrong("a header without end", Call::Get, |asked| {
        for_ever(asked.header("5").trim_end(), " x")
    }),
    wrong("a line feed without end", Call::Get, |_| {
        for_ever("", "\r\n")
    }),
    wrong("zeros without end", Call::Get, |_| for_ever("", "\0")),
    wrong("counters without end", Call::Stats, |_| {
        for_ever("", "STAT a 1\r\nSTAT b 2\r\nSTAT c 3\r\n")
    }),
    wrong("counters of any length", Call::Stats, |_| {
        let counters = (0..1_000).map(|n| format!("STAT {n}{} 1\r\n", "n".repeat(900)));
        for_ever("", &counters.collect::<String>())
    }),
    wrong("counters instead of a value", Call::Get, |_| {
        for_ever("", "STAT a 1\r\n")
    }),
    odd("values without end", Call::Get, |asked| {
        for_ever("", &format!("{}{VALUE}\r\n", asked.header("5")))
    }),
    odd("values without end to many keys", Call::GetMany, |asked| {
        for_ever("", &format!("{}{VALUE}\r\n", asked.header("5")))
    }),
    wrong(
        "other keys' values without end to many keys",
        Call::GetMany,
        |asked| for_ever("", &format!("{}wrong\r\n", asked.header_for("other", "5"))),
    ),
    wrong("meta values without end", Call::Get, |_| {
        for_ever("", "VA 5 f0 O0\r\nwrong\r\n")
    }),
    wrong("a value larger than announced", Call::Get, |asked| {
        once(format!(
            "{}{VALUE} and more\r\n{}",
            asked.header("5"),
            asked.end()
        ))
    }),
    wrong("a value smaller than announced", Call::Get, |asked| {
        once(format!("{}{VALUE}\r\n{}", asked.header("50"), asked.end()))
    }),
    wrong(
        "a value smaller than announced, and others",
        Call::Get,
        |asked| {
            let reply = format!("{}{VALUE}\r\n{}", asked.header("50"), asked.end());
            for_ever(reply, "x\n")
        },
    ),
    wrong("a value without its end", Call::Get, |asked| {
        once(format!("{}{VALUE}{}", asked.header("5"), asked.end()))
    }),
    wrong("another key's value", Call::Get, |asked| {
        once(format!(
            "{}wrong\r\n{}",
            asked.header_for("other", "5"),
            asked.end()
        ))
    }),
    wrong(
        "another key's value with a cas unique",
        Call::Gets,
        |asked| {
            once(format!(
                "{}wrong\r\n{}",
                asked.header_for("other", "5"),
                asked.end()
            ))
        },
    ),
    odd("two values", Call::Get, |asked| {
        let value = format!("{}{VALUE}\r\n", asked.header("5"));
        once(format!("{}{}", value.repeat(2), asked.end()))
    }),
    odd(
        "the right value, and what nobody asked for",
        Call::Get,
        |asked| {
            once(format!(
                "{}VA 5 f0 O1\r\nwrong\r\nVALUE key 0 5\r\nwrong\r\nEND\r\n",
                asked.right()
            ))
        },
    ),
    odd("the right value for ever", Call::Get, |asked| {
        for_ever("", &asked.right())
    }),
    odd("100,000 misses at once", Call::Get, |asked| {
        once(asked.miss().repeat(100_000))
    }),
    wrong("100,000 answers to something else", Call::Get, |_| {
        once("HD\r\n".repeat(100_000))
    }),
    wrong("STORED to a read", Call::Get, |_| once("STORED\r\n")),
    wrong("STORED for ever to a write", Call::Set, |_| {
        for_ever("MAYBE\r\n", "STORED\r\n")
    }),
    wrong("a value to a write", Call::Set, |asked| once(asked.right())),
    wrong("a number of many digits", Call::Increment, |_| {
        once(format!("{}\r\n", "9".repeat(1_000)))
    }),
    wrong("digits for ever", Call::Increment, |_| for_ever("", "9")),
    wrong("a number over 2^64", Call::Increment, |asked| {
        match asked.meta {
            true => once(format!(
                "VA 20 {}\r\n99999999999999999999\r\n",
                asked.opaque()
            )),
            false => once("99999999999999999999\r\n"),
        }
    }),
    wrong("a version without end", Call::Version, |_| {
        for_ever("VERSION ", "1")
    }),
    wrong("the end in a header", Call::Get, |asked| {
        Answer::ThenClose(asked.header("5").as_bytes()[..6].to_vec())
    }),
    wrong("the end in a value", Call::Get, |asked| {
        Answer::ThenClose(format!("{}righ", asked.header("5")).into_bytes())
    }),
    wrong("the end instead of an answer", Call::Get, |_| {
        Answer::ThenClose(Vec::new())
    }),
    wrong("HTTP", Call::Get, |_| {
        once("HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n")
    }),
];

type Greets = fn() -> Answer;

/// What it answers to the greeting.
const GREETINGS: &[(&str, Greets)] = &[
    ("a greeting without end", || for_ever("VERSION ", "1")),
    ("greetings without end", || {
        for_ever("VERSION 1.6.18\r\n", "VERSION 1.6.18\r\n")
    }),
    ("a greeting byte by byte", || {
        Answer::ThenDrip(b"VERSION ".to_vec())
    }),
    ("values instead of a greeting", || {
        for_ever("", "VALUE key 0 5\r\nwrong\r\nEND\r\n")
    }),
    ("counters instead of a greeting", || {
        for_ever("", "STAT a 1\r\n")
    }),
    ("a greeting of nothing", || once("\r\n")),
    ("a version of many digits", || {
        once(format!("VERSION {}\r\n", "9".repeat(1_500)))
    }),
];

/// How the server behaves just now.
#[derive(Clone)]
enum Mood {
    Good,
    Bad(fn(&Asked<'_>) -> Answer),
    Rude(Greets),
}

/// A hostile server, until it is told to be good.
struct Hostile {
    address: SocketAddr,
    mood: watch::Sender<Mood>,
    /// Connections on which it has misbehaved and that are still open.
    open: Arc<AtomicUsize>,
    misbehaved: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Hostile {
    async fn listen(good: Server, protocol: Protocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, moods) = watch::channel(Mood::Good);
        let open = Arc::new(AtomicUsize::new(0));
        let misbehaved = Arc::new(AtomicUsize::new(0));
        let counts = (open.clone(), misbehaved.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (mood, good, counts) = (moods.clone(), good.clone(), counts.clone());
                tokio::spawn(async move {
                    let now = mood.borrow().clone();
                    match now {
                        Mood::Good => good.serve(stream).await,
                        bad => misbehave(stream, bad, protocol, counts).await,
                    }
                });
            }
        });
        Self {
            address,
            mood,
            open,
            misbehaved,
            task,
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Greets, and misbehaves until the client closes the connection.
async fn misbehave(
    stream: TcpStream,
    mood: Mood,
    protocol: Protocol,
    (open, misbehaved): (Arc<AtomicUsize>, Arc<AtomicUsize>),
) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(512, reader);
    let (mut line, mut greeted) = (String::new(), false);
    let answer = loop {
        line.clear();
        // A value that is not text ends the conversation, too.
        if !matches!(reader.read_line(&mut line).await, Ok(1..)) {
            return;
        }
        let greeting = match line.trim_end() {
            "version" if !std::mem::replace(&mut greeted, true) => "VERSION 1.6.18\r\n",
            "mn" => "MN\r\n",
            _ => "",
        };
        match &mood {
            Mood::Rude(answer) => break answer(),
            // The second `version` of a connection is a question like any other.
            Mood::Bad(_) if !greeting.is_empty() => {
                if writer.write_all(greeting.as_bytes()).await.is_err() {
                    return;
                }
            }
            Mood::Bad(answer) => {
                break answer(&Asked {
                    meta: protocol == Protocol::Meta,
                    words: line.split_ascii_whitespace().collect(),
                });
            }
            Mood::Good => unreachable!("it is served elsewhere"),
        }
    };
    open.fetch_add(1, Ordering::SeqCst);
    misbehaved.fetch_add(1, Ordering::SeqCst);
    // It does not care whether anybody reads: only a connection that is closed ends a flood. A drip costs so little
    // that the client may wait for its end, to know what became of a write, once it has said that no more will come.
    let floods = matches!(answer, Answer::ThenForEver(..));
    let write = async {
        match answer {
            Answer::Once(reply) => {
                writer.write_all(&reply).await?;
                std::future::pending().await
            }
            Answer::ThenClose(reply) => writer.write_all(&reply).await,
            Answer::ThenForEver(before, what) => {
                writer.write_all(&before).await?;
                loop {
                    writer.write_all(&what).await?;
                }
            }
            Answer::ThenDrip(before) => {
                writer.write_all(&before).await?;
                loop {
                    sleep(Duration::from_millis(5)).await;
                    writer.write_all(b"x").await?;
                }
            }
        }
    };
    let read = async {
        let mut sink = [0; 512];
        while matches!(reader.read(&mut sink).await, Ok(1..)) {}
        if floods {
            std::future::pending().await
        }
    };
    tokio::select! {
        _ = write => {}
        () = read => {}
    }
    open.fetch_sub(1, Ordering::SeqCst);
}

/// A client of a hostile node and of a good one, and a key of each.
struct Pair {
    client: Client,
    hostile: Key,
    good: Key,
}

fn pair(nodes: &[String; 2], protocol: Protocol) -> Pair {
    let client = Client::builder()
        .nodes(nodes)
        .protocol(protocol)
        .executor(Executor::current())
        // Nobody else answers for it, so that what it does is seen.
        .failure_mode(FailureMode::Cancel)
        .max_attempts(1)
        .timeout(DEADLINE)
        .attempt_timeout(ATTEMPT)
        .max_value_size(LARGEST)
        .build()
        .unwrap();
    let specs = nodes.each_ref().map(|node| NodeSpec::new(node).unwrap());
    let key_of = |node| {
        let mut keys = (0..).map(|n| Key::new(format!("key:{n}")).unwrap());
        keys.find(|key| Ring::default().node_of(&specs, key) == Some(node))
    };
    Pair {
        client,
        hostile: key_of(0).unwrap(),
        good: key_of(1).unwrap(),
    }
}

impl Pair {
    /// What the hostile node is asked comes to: the values that were read, or an error.
    async fn ask(&self, call: Call) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let (client, key) = (&self.client, &self.hostile);
        let read = |value: Option<tower_memcached::Value>| vec![value.map(|value| value.to_vec())];
        match call {
            Call::Get => client.get(key).await.map(read),
            Call::Gets => client.gets(key).await.map(read),
            Call::GetMany => {
                let outcomes = client.get_many([key, key]).await.into_outcomes();
                let results = outcomes.into_iter().map(|outcome| outcome.into_result());
                let (values, errors): (Vec<_>, Vec<_>) = results.partition(Result::is_ok);
                let values = values.into_iter().flatten().flat_map(read).collect();
                errors
                    .into_iter()
                    .find_map(Result::err)
                    .map_or(Ok(values), Err)
            }
            Call::Set => client
                .set(key, VALUE, Ttl::NEVER)
                .await
                .map(|()| Vec::new()),
            Call::Increment => client.increment(key, 1).await.map(|_| Vec::new()),
            Call::Stats => self.node(client.stats().await?),
            Call::Version => self.node(client.version().await?),
        }
    }

    /// The hostile node's own answer.
    fn node<T>(
        &self,
        results: Vec<tower_memcached::NodeResult<T>>,
    ) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let hostile = results.into_iter().next().expect("it is the first");
        hostile.result.map(|_| Vec::new())
    }

    /// The good node is never disturbed, as long as this is not dropped.
    async fn watch_the_other(&self) {
        loop {
            let read = self.client.get(&self.good).await;
            match read {
                Ok(Some(value)) => assert_eq!(value, VALUE),
                other => panic!("the other node: {other:?}"),
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Asks until it has misbehaved, and then some.
async fn suffer(pair: &Pair, hostile: &Hostile, call: Call, may_be_right: bool) {
    let before = hostile.misbehaved.load(Ordering::SeqCst);
    let until = Instant::now() + PATIENCE;
    for asked in 1.. {
        let began = Instant::now();
        let outcome = pair.ask(call).await;
        let elapsed = began.elapsed();
        assert!(elapsed < DEADLINE + SLACK, "{outcome:?} after {elapsed:?}");
        match outcome {
            Ok(values) => {
                assert!(may_be_right, "{values:?}");
                let right = |value: &Vec<u8>| *value == VALUE.as_bytes();
                assert!(values.iter().flatten().all(right), "{values:?}");
            }
            Err(error) => {
                let expected = matches!(
                    error.kind(),
                    ErrorKind::Protocol
                        | ErrorKind::Timeout
                        | ErrorKind::Unresponsive
                        | ErrorKind::ConnectionFailed
                        | ErrorKind::ConnectionLost
                        | ErrorKind::NodeUnavailable
                        | ErrorKind::ValueTooLarge
                );
                assert!(expected, "{error}");
            }
        }
        let misbehaved = hostile.misbehaved.load(Ordering::SeqCst) > before;
        if misbehaved && asked >= 4 {
            return;
        }
        assert!(Instant::now() < until, "it was never asked");
        sleep(Duration::from_millis(5)).await;
    }
}

/// One scenario, from a good server to a good server.
async fn survive(name: &str, hostile: &Hostile, pair: &Pair, mood: Mood, call: Call, odd: bool) {
    hostile.mood.send_replace(mood);
    tokio::select! {
        () = suffer(pair, hostile, call, odd) => {}
        () = pair.watch_the_other() => {}
    }
    hostile.mood.send_replace(Mood::Good);
    let until = Instant::now() + PATIENCE;
    loop {
        let read = pair.client.get(&pair.hostile).await;
        if let Ok(Some(value)) = &read {
            assert_eq!(value, VALUE, "{name}");
        }
        // What may have been written is deleted, lest it be old.
        if matches!((call, &read), (Call::Set, Ok(None))) {
            let _ = pair.client.set(&pair.hostile, VALUE, Ttl::NEVER).await;
        }
        let open = hostile.open.load(Ordering::SeqCst);
        if open == 0 && matches!(read, Ok(Some(_))) {
            return;
        }
        assert!(
            Instant::now() < until,
            "{name}: {open} are open, and {read:?}"
        );
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_server_does_costs_its_own_requests_an_error_in_time_and_bounded_memory() {
    for protocol in [Protocol::Meta, Protocol::Classic] {
        let (behind, good) = (Server::new(), Server::new());
        let hostile = Hostile::listen(behind.clone(), protocol).await;
        let nodes = [
            hostile.address.to_string(),
            good.listen().await.unwrap().to_string(),
        ];
        let scenarios = SCENARIOS.iter().map(|scenario| {
            let Scenario {
                name,
                call,
                answer,
                may_be_right,
            } = scenario;
            (*name, Mood::Bad(*answer), *call, *may_be_right)
        });
        let greetings = GREETINGS
            .iter()
            .map(|(name, answer)| (*name, Mood::Rude(*answer), Call::Get, false));
        // So that it is known to be taken for a server.
        let right: fn(&Asked<'_>) -> Answer = |asked| once(asked.right());
        for call in [Call::Get, Call::Gets] {
            hostile.mood.send_replace(Mood::Bad(right));
            let read = pair(&nodes, protocol).ask(call).await;
            assert_eq!(read.unwrap(), [Some(VALUE.into())], "{protocol}: {call:?}");
        }
        for (name, mood, call, odd) in scenarios.chain(greetings) {
            let pair = pair(&nodes, protocol);
            behind.insert(pair.hostile.as_bytes(), VALUE);
            good.insert(pair.good.as_bytes(), VALUE);
            let (before, began) = (ALLOCATED.allocated(), Instant::now());
            let survived = survive(name, &hostile, &pair, mood, call, odd);
            let survived = std::panic::AssertUnwindSafe(survived);
            let survived = timeout(4 * PATIENCE, futures::FutureExt::catch_unwind(survived)).await;
            assert!(matches!(survived, Ok(Ok(()))), "{protocol}: {name}");
            let most = ALLOCATED.max_allocated().saturating_sub(before);
            println!("{protocol}: {name}: {:?}, {most} bytes", began.elapsed());
            assert!(most < MEMORY, "{protocol}: {name}: {most} bytes at once");
        }
    }
}
