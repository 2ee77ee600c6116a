//! The in-process server's faults do what they say, and its handles see what happens.
#![cfg(feature = "testing")]

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tower_memcached::testing::{Admission, Dialect, Server};

const VERSION: &[u8] = b"VERSION 1.6.18\r\n";

async fn connect(server: &Server) -> TcpStream {
    let address = match server.address() {
        Some(address) => address,
        None => server.listen().await.expect("a free port"),
    };
    TcpStream::connect(address)
        .await
        .expect("the server listens")
}

fn in_memory(server: &Server) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(server.serve(theirs));
    ours
}

/// Sends and reads until `expected.len()` bytes came.
async fn ask<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, request: &[u8], expected: &[u8]) {
    stream.write_all(request).await.expect("it can be written");
    expect(stream, expected).await;
}

async fn expect<S: AsyncRead + Unpin>(stream: &mut S, expected: &[u8]) {
    let mut reply = vec![0; expected.len()];
    let read = timeout(Duration::from_secs(60), stream.read_exact(&mut reply)).await;
    read.expect("an answer in time").expect("an answer");
    assert_eq!(
        reply.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );
}

async fn is_silent<S: AsyncRead + Unpin>(stream: &mut S) -> bool {
    timeout(Duration::from_millis(60), stream.read_u8())
        .await
        .is_err()
}

/// Reads to the end, however it comes.
async fn rest<S: AsyncRead + Unpin>(stream: &mut S) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes))
        .await
        .expect("an end");
    (bytes, end.err().map(|error| error.kind()))
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{what} never came"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_stalled_server_executes_everything_after_resume() {
    let server = Server::new();
    let mut open = connect(&server).await;
    ask(&mut open, b"set k 0 0 1\r\n1\r\n", b"STORED\r\n").await;
    server.stall();
    open.write_all(b"set k 0 0 1\r\n2\r\nversion\r\n")
        .await
        .expect("the kernel takes it");
    let mut new = connect(&server).await;
    new.write_all(b"set n 0 0 1\r\nx\r\n")
        .await
        .expect("the kernel takes it");
    let mut zombie = connect(&server).await;
    zombie
        .write_all(b"set z 0 0 1\r\nx\r\n")
        .await
        .expect("the kernel takes it");
    drop(zombie);
    assert!(is_silent(&mut open).await && is_silent(&mut new).await);
    assert_eq!(server.peek("k").expect("still there"), "1");
    assert_eq!(server.commands(), 1);

    server.resume();
    expect(&mut open, b"STORED\r\nVERSION 1.6.18\r\n").await;
    expect(&mut new, b"STORED\r\n").await;
    until("the zombie write", || server.peek("z").is_some()).await;
    assert_eq!(server.peek("k").expect("still there"), "2");
}

#[tokio::test]
async fn a_stall_holds_for_replies_that_wait_to_be_sent() {
    let server = Server::new();
    let mut stream = in_memory(&server);
    server.delay(Duration::from_millis(20));
    stream
        .write_all(b"version\r\n")
        .await
        .expect("it can be written");
    until("the command", || server.commands() == 1).await;
    server.stall();
    assert!(is_silent(&mut stream).await);
    server.unsolicited("more");
    assert!(is_silent(&mut stream).await);
    server.resume();
    expect(&mut stream, b"VERSION 1.6.18\r\nmore").await;
}

#[tokio::test(start_paused = true)]
async fn replies_are_delayed_from_their_requests_arrival() {
    let server = Server::new();
    let mut stream = in_memory(&server);
    server.delay(Duration::from_secs(5));
    let asked = Instant::now();
    ask(
        &mut stream,
        b"version\r\nversion\r\nversion\r\n",
        &VERSION.repeat(3),
    )
    .await;
    let waited = asked.elapsed();
    assert!(
        (Duration::from_secs(5)..Duration::from_millis(5_010)).contains(&waited),
        "{waited:?}"
    );
    server.delay(Duration::ZERO);
    ask(&mut stream, b"version\r\n", VERSION).await;
    assert!(asked.elapsed() - waited < Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn every_second_reply_is_late() {
    let server = Server::new();
    let mut stream = in_memory(&server);
    server.delay_every(2, Duration::from_secs(1));
    let mut late = Vec::new();
    for _ in 0..6 {
        let asked = Instant::now();
        ask(&mut stream, b"mn\r\n", b"MN\r\n").await;
        late.push(asked.elapsed() >= Duration::from_secs(1));
    }
    assert_eq!(late, [false, true, false, true, false, true]);
}

#[tokio::test]
async fn while_it_refuses_nobody_else_gets_its_port() {
    for admission in [Admission::Serve, Admission::Refuse] {
        let server = Server::new();
        server
            .set_admission(admission)
            .expect("it listens nowhere yet");
        // Without connections, which would keep the port as well.
        let address = server.listen().await.expect("a free port");
        server.refuse();
        let taken = TcpSocket::new_v4().and_then(|socket| socket.bind(address));
        assert_eq!(
            taken.map_err(|error| error.kind()),
            Err(ErrorKind::AddrInUse)
        );
        server.accept().expect("the port is kept");
        ask(&mut connect(&server).await, b"version\r\n", VERSION).await;
    }
}

#[tokio::test]
async fn refusing_is_connection_refused_until_the_same_port_accepts() {
    let server = Server::new();
    let mut open = connect(&server).await;
    ask(&mut open, b"version\r\n", VERSION).await;
    let address = server.address().expect("it listens");
    server.refuse();
    let refused = TcpStream::connect(address)
        .await
        .expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(rest(&mut open).await, (Vec::new(), None));
    assert_eq!(server.address(), Some(address));

    // From another thread, without a runtime.
    let handle = server.clone();
    std::thread::spawn(move || handle.accept())
        .join()
        .expect("no panic")
        .expect("the port is free");
    let mut again = TcpStream::connect(address)
        .await
        .expect("the server listens");
    ask(&mut again, b"version\r\n", VERSION).await;
    server.refuse();
    server.refuse();
    server.heal().expect("the port is free");
    ask(&mut connect(&server).await, b"version\r\n", VERSION).await;
    assert_eq!(server.connections_accepted(), 3);
}

#[tokio::test]
async fn new_connections_can_be_silent_or_too_many() {
    let server = Server::new();
    let mut open = connect(&server).await;
    ask(&mut open, b"version\r\n", VERSION).await;
    server.set_admission(Admission::Silent).expect("it listens");
    let mut silent = connect(&server).await;
    silent
        .write_all(b"version\r\n")
        .await
        .expect("the kernel takes it");
    assert!(is_silent(&mut silent).await);
    server
        .set_admission(Admission::TooMany)
        .expect("it listens");
    let mut surplus = connect(&server).await;
    assert_eq!(
        rest(&mut surplus).await.0,
        b"ERROR Too many open connections\r\n"
    );
    ask(&mut open, b"version\r\n", VERSION).await;
    server.close_connections();
    assert_eq!(rest(&mut silent).await.0, b"");
}

#[tokio::test]
async fn connections_are_closed_or_reset() {
    let server = Server::new();
    let (mut closed, mut reset) = (connect(&server).await, in_memory(&server));
    ask(&mut closed, b"version\r\n", VERSION).await;
    ask(&mut reset, b"version\r\n", VERSION).await;
    server.close_connections();
    assert_eq!(rest(&mut closed).await, (Vec::new(), None));
    assert_eq!(rest(&mut reset).await.0, b"");

    let mut reset = connect(&server).await;
    ask(&mut reset, b"version\r\n", VERSION).await;
    server.reset_connections();
    assert_eq!(
        rest(&mut reset).await,
        (Vec::new(), Some(ErrorKind::ConnectionReset))
    );
    until("the end", || server.open_connections() == 0).await;
    assert_eq!(server.connections_accepted(), 3);
}

#[tokio::test]
async fn a_reply_is_cut_at_every_byte() {
    let server = Server::new();
    server.insert("k", "value");
    let whole = b"VALUE k 0 5\r\nvalue\r\nEND\r\n";
    for bytes in 0..=whole.len() {
        server.close_after_bytes(bytes);
        let mut stream = connect(&server).await;
        stream
            .write_all(b"get k\r\n")
            .await
            .expect("it can be written");
        assert_eq!(rest(&mut stream).await.0, &whole[..bytes]);
    }
    server.heal().expect("it listens");
    ask(
        &mut connect(&server).await,
        b"get k\r\nversion\r\n",
        &[&whole[..], VERSION].concat(),
    )
    .await;
}

#[tokio::test]
async fn replies_are_rewritten() {
    let server = Server::new();
    let mut stream = in_memory(&server);
    server.rewrite_replies(|line, reply| match line {
        b"mg twice" => [reply.clone(), reply].concat(),
        b"mg never" => Vec::new(),
        b"mg a k" => b"EN kb\r\n".to_vec(),
        _ => reply,
    });
    let request = b"mg twice\r\nmg never\r\nmg a k\r\nmg quiet q\r\nversion\r\n";
    ask(
        &mut stream,
        request,
        b"EN\r\nEN\r\nEN kb\r\nVERSION 1.6.18\r\n",
    )
    .await;
    server.answer_garbage("garbage");
    ask(
        &mut stream,
        b"version\r\nset k 0 0 1 noreply\r\nx\r\nversion\r\n",
        b"garbagegarbage",
    )
    .await;
    server.heal().expect("nothing to listen on");
    ask(&mut stream, b"mg quiet q\r\nversion\r\n", VERSION).await;
}

#[tokio::test]
async fn unsolicited_bytes_reach_all_open_connections() {
    let server = Server::new();
    let (mut one, mut two) = (connect(&server).await, in_memory(&server));
    ask(&mut one, b"version\r\n", VERSION).await;
    ask(&mut two, b"version\r\n", VERSION).await;
    server.unsolicited("END\r\n");
    server.unsolicited("again");
    expect(&mut one, b"END\r\nagain").await;
    expect(&mut two, b"END\r\nagain").await;
    ask(&mut one, b"version\r\n", VERSION).await;
}

#[tokio::test]
async fn a_restart_loses_items_and_cas_uniques_and_connections() {
    let server = Server::new();
    let mut old = connect(&server).await;
    ask(
        &mut old,
        b"ms a 1 c\r\nx\r\nms b 1 c\r\nx\r\n",
        b"HD c1\r\nHD c2\r\n",
    )
    .await;
    server.stall();
    old.write_all(b"set late 0 0 1\r\nx\r\n")
        .await
        .expect("the kernel takes it");
    server.restart_empty();
    server.resume();
    rest(&mut old).await;
    assert!(server.is_empty());
    ask(
        &mut connect(&server).await,
        b"mg a\r\nms a 1 c\r\nx\r\n",
        b"EN\r\nHD c1\r\n",
    )
    .await;
}

#[tokio::test]
async fn the_last_handle_stops_everything() {
    let server = Server::new();
    let (mut tcp, mut memory) = (connect(&server).await, in_memory(&server));
    ask(&mut tcp, b"version\r\n", VERSION).await;
    ask(&mut memory, b"version\r\n", VERSION).await;
    let address = server.address().expect("it listens");
    let clone = server.clone();
    drop(server);
    ask(&mut tcp, b"version\r\n", VERSION).await;
    drop(clone);
    assert!(TcpStream::connect(address).await.is_err());
    assert_eq!(rest(&mut tcp).await.0, b"");
    assert_eq!(rest(&mut memory).await.0, b"");
}

#[tokio::test]
async fn shutdown_is_for_good() {
    let server = Server::new();
    let mut stream = connect(&server).await;
    ask(&mut stream, b"version\r\n", VERSION).await;
    server.stall();
    server.shutdown();
    assert_eq!(rest(&mut stream).await.0, b"");
    server.heal().expect("nothing is bound");
    assert!(
        TcpStream::connect(server.address().expect("it has listened"))
            .await
            .is_err()
    );
    assert_eq!(rest(&mut in_memory(&server)).await.0, b"");
}

#[tokio::test]
async fn commands_and_requests_are_counted() {
    let server = Server::builder().version("1.6.40").build();
    let mut stream = in_memory(&server);
    ask(
        &mut stream,
        b"mg a\r\nmg b v\r\nset a 0 0 1\r\nx\r\nfoo\r\nversion\r\n",
        b"EN\r\nEN\r\nSTORED\r\nERROR\r\nVERSION 1.6.40\r\n",
    )
    .await;
    assert_eq!(
        (
            server.commands(),
            server.commands_named("mg"),
            server.commands_named("unknown")
        ),
        (5, 2, 1)
    );
    assert_eq!(
        server.requests(),
        ["mg a", "mg b v", "set a 0 0 1", "foo", "version"]
    );
    assert_eq!((server.len(), server.open_connections()), (1, 1));
    for _ in 0..3_000 {
        ask(&mut stream, b"mn\r\n", b"MN\r\n").await;
    }
    assert_eq!(server.requests().len(), 1_024);
}

#[tokio::test(start_paused = true)]
async fn items_expire_under_a_paused_clock() {
    let server = Server::new();
    let mut stream = in_memory(&server);
    ask(
        &mut stream,
        b"set a 0 100 1\r\nx\r\nmg a t\r\n",
        b"STORED\r\nHD t100\r\n",
    )
    .await;
    tokio::time::sleep(Duration::from_millis(40_500)).await;
    ask(&mut stream, b"mg a t\r\n", b"HD t60\r\n").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(server.peek("a"), None);
    ask(&mut stream, b"mg a t\r\n", b"EN\r\n").await;
}

#[tokio::test]
async fn full_memory_evicts_or_refuses() {
    let value = "v".repeat(1_000);
    let set = |key: u8| format!("set {key} 0 0 1000\r\n{value}\r\n");
    let evicting = Server::builder().memory_limit(10_000).build();
    let mut stream = in_memory(&evicting);
    for key in 0..50 {
        ask(&mut stream, set(key).as_bytes(), b"STORED\r\n").await;
        assert_eq!(
            evicting.peek(key.to_string()).expect("just stored").len(),
            1_000
        );
    }
    assert_eq!(evicting.len(), 9);

    let refusing = Server::builder()
        .memory_limit(10_000)
        .evictions(false)
        .build();
    let mut stream = in_memory(&refusing);
    for key in 0..9 {
        ask(&mut stream, set(key).as_bytes(), b"STORED\r\n").await;
    }
    // As memcached -M: the old value goes, the opaque does not come, the framing holds.
    let refused = format!("{}ms 1 1000 Ox q\r\n{value}\r\nget 1\r\n", set(0));
    let error = "SERVER_ERROR out of memory storing object\r\n";
    ask(&mut stream, set(10).as_bytes(), error.as_bytes()).await;
    ask(&mut stream, set(0).as_bytes(), error.as_bytes()).await;
    ask(&mut stream, b"get 0\r\nmg 1\r\n", b"END\r\nHD\r\n").await;
    ask(
        &mut stream,
        refused.as_bytes(),
        format!("STORED\r\n{error}END\r\n").as_bytes(),
    )
    .await;
}

#[tokio::test]
async fn a_fault_takes_effect_between_two_requests_of_one_write() {
    // What the hook does happens while the first request is answered, so the second has been read already.
    for (name, fault) in [
        ("stall", Server::stall as fn(&Server)),
        ("restart", Server::restart_empty),
    ] {
        let server = Server::new();
        let mut stream = in_memory(&server);
        let handle = server.clone();
        server.rewrite_replies(move |line, reply| {
            if line.starts_with(b"set a") {
                fault(&handle);
            }
            reply
        });
        stream
            .write_all(b"set a 0 0 1\r\nx\r\nset b 0 0 1\r\nx\r\n")
            .await
            .expect("it can be written");
        until("the first request", || server.commands() == 1).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(server.commands(), 1, "{name}");
        assert_eq!(server.peek("b"), None, "{name}");
        server.shutdown();
    }
}

#[tokio::test]
async fn many_unsent_bytes_do_not_block_an_incomplete_value() {
    let server = Server::new();
    server.insert("k", "v".repeat(900_000));
    let mut stream = connect(&server).await;
    stream
        .write_all(b"mg k v\r\nmg k v\r\nset a 0 0 5\r\nhe")
        .await
        .expect("it is read");
    until("the requests", || server.commands() == 2).await;
    stream.write_all(b"llo\r\n").await.expect("it is read");
    let mut replies = vec![0; 2 * 900_013 + 8];
    let read = timeout(Duration::from_secs(10), stream.read_exact(&mut replies)).await;
    read.expect("replies in time").expect("replies");
    assert!(replies.ends_with(b"STORED\r\n"));
}

#[tokio::test]
async fn a_peer_that_only_writes_is_held_back_and_then_served() {
    let server = Server::new();
    server.insert("k", "v".repeat(100_000));
    let mut stream = connect(&server).await;
    let (mut reader, mut writer) = stream.split();
    let requests = b"get k\r\n".repeat(2_000);
    let write = async {
        writer
            .write_all(&requests)
            .await
            .expect("it is read in the end")
    };
    let read = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let executed = server.commands_named("get");
        assert!(
            executed < 500,
            "{executed} replies are kept for a peer that does not read"
        );
        let mut replies = vec![0; 2_000 * (18 + 100_000 + 2 + 5)];
        reader.read_exact(&mut replies).await.expect("all replies");
    };
    tokio::join!(write, read);
    assert_eq!(server.commands_named("get"), 2_000);
}

#[tokio::test]
async fn an_older_server_does_not_know_what_came_later() {
    const STORE: &[u8] = b"ms k 5\r\nmn\r\n1\r\n";
    let server = Server::new();
    let mut stream = in_memory(&server);
    server.insert("k", "1");
    for (version, unknown, known) in [
        ("1.6.18", &[][..], &["gat 0 k", "gats 0 k", "touch k 0"][..]),
        ("1.5.3", &[], &["gat 0 k", "gats 0 k", "touch k 0"]),
        ("1.5.2", &["gat 0 k", "gats 0 k"], &["touch k 0"]),
        ("1.4.8_4", &["gat 0 k"], &["touch k 0"]),
        ("1.4.7", &["gat 0 k", "touch k 0"], &["get k"]),
        ("unheard of", &[], &["gat 0 k", "touch k 0"]),
    ] {
        server.set_version(version);
        server.set_dialect(Dialect::Classic);
        let expected = format!("VERSION {version}\r\n");
        ask(&mut stream, b"version\r\n", expected.as_bytes()).await;
        for line in ["mn", "mg k v", "md k", "ma k", "me k"]
            .iter()
            .chain(unknown)
        {
            ask(&mut stream, format!("{line}\r\n").as_bytes(), b"ERROR\r\n").await;
        }
        // The trap: the value is executed, line by line.
        ask(&mut stream, STORE, &b"ERROR\r\n".repeat(3)).await;
        for line in known {
            let request = format!("{line}\r\nset n 0 0 1\r\n0\r\n");
            let expected = match (line.split_once(' '), version) {
                (Some(("touch", _)), _) => "TOUCHED\r\n".to_owned(),
                (Some(("gats", _)), _) => "VALUE k 0 1 1\r\n1\r\nEND\r\n".to_owned(),
                _ => "VALUE k 0 1\r\n1\r\nEND\r\n".to_owned(),
            };
            ask(
                &mut stream,
                request.as_bytes(),
                format!("{expected}STORED\r\n").as_bytes(),
            )
            .await;
        }
        server.heal().expect("nothing to listen on");
        ask(&mut stream, b"mn\r\n", b"ERROR\r\n").await;
        server.set_dialect(Dialect::Meta);
        ask(&mut stream, b"mn\r\n", b"MN\r\n").await;
    }
}

/// What twemproxy 0.5.0 was seen to do.
#[tokio::test]
async fn a_proxy_forwards_or_closes() {
    let server = Server::builder().dialect(Dialect::Proxy).build();
    let long = "k".repeat(250);
    let mut stream = in_memory(&server);
    for (request, expected) in [
        ("version\r\n", "VERSION 1.6.18\r\n"),
        ("set k 7 0 1\r\n1\r\n", "STORED\r\n"),
        (
            "set k 7 0 1 noreply\r\n1\r\nget k k\r\n",
            "VALUE k 7 1\r\n1\r\nVALUE k 7 1\r\n1\r\nEND\r\n",
        ),
        ("gets k\r\n", "VALUE k 7 1 2\r\n1\r\nEND\r\n"),
        ("cas k 0 0 1 9\r\nx\r\n", "EXISTS\r\n"),
        ("incr k 4\r\ndecr k 9\r\n", "5\r\n0\r\n"),
        (
            "touch k 0\r\ntouch k 0 noreply\r\ntouch k -1\r\n",
            "TOUCHED\r\nTOUCHED\r\n",
        ),
        ("add k 0 0 1\r\nx\r\n", "STORED\r\n"),
        (
            "replace k 0 0 1\r\nx\r\nappend k 0 0 1\r\ny\r\nprepend k 0 0 1\r\nw\r\n",
            "STORED\r\nSTORED\r\nSTORED\r\n",
        ),
        (
            "delete k\r\ndelete k\r\ndelete k noreply\r\n",
            "DELETED\r\nNOT_FOUND\r\n",
        ),
        (&format!("get {long}\r\n"), "END\r\n"),
    ] {
        ask(&mut stream, request.as_bytes(), expected.as_bytes()).await;
    }
    for line in [
        "mn",
        "mg k",
        "ms k 1",
        "md k",
        "ma k",
        "me k",
        "gat 1 k",
        "gats 1 k",
        "bget k",
        "stats",
        "flush_all",
        "verbosity 1",
        "shutdown",
        "lru_crawler",
        "foo",
        "",
        "quit",
        "get",
        "GET k",
        "version foo",
        "delete k 0",
        "incr k x",
        "incr k -1",
        "set k 0 0 x",
        "set k -1 0 1",
        "set k 0 -1 1",
        "set k 0 0 1\r\n12",
        &format!("get {long}k"),
        &format!("set {long}k 0 0 1\r\n1"),
        &format!("version\r\nget {long}k"),
    ] {
        let mut stream = in_memory(&server);
        stream
            .write_all(format!("{line}\r\n").as_bytes())
            .await
            .expect("it can be written");
        assert_eq!(rest(&mut stream).await, (Vec::new(), None), "{line}");
    }
}

#[tokio::test]
async fn authentication_is_asked_of_new_connections() {
    const REFUSED: &[u8] = b"CLIENT_ERROR unauthenticated\r\n";
    const FAILED: &[u8] = b"CLIENT_ERROR authentication failure\r\n";
    const CREDENTIALS: &[u8] = b"set x 0 0 13\r\nuser password\r\n";
    let server = Server::builder().authentication("user", "password").build();
    let mut early = in_memory(&server);
    ask(&mut early, b"get k\r\n", REFUSED).await;
    ask(&mut early, b"set x 0 0 13\r\nuser passw0rd\r\n", FAILED).await;
    ask(&mut early, CREDENTIALS, b"STORED\r\n").await;
    ask(
        &mut early,
        b"version\r\nget x\r\n",
        &[VERSION, b"END\r\n"].concat(),
    )
    .await;
    assert_eq!(server.commands_named("auth"), 2);
    assert_eq!(server.commands_named("unauthenticated"), 1);

    server.require_authentication("user", "other");
    ask(&mut early, b"version\r\n", VERSION).await;
    let mut late = in_memory(&server);
    ask(&mut late, CREDENTIALS, FAILED).await;
    ask(
        &mut late,
        b"set x 0 0 10\r\nuser other\r\nmn\r\n",
        b"STORED\r\nMN\r\n",
    )
    .await;

    server.heal().expect("nothing to listen on");
    ask(&mut in_memory(&server), b"mn\r\n", REFUSED).await;
    server.allow_everybody();
    ask(&mut in_memory(&server), CREDENTIALS, b"STORED\r\n").await;
    assert_eq!(
        server.peek("x").expect("a key like any other"),
        "user password"
    );
    assert!(!format!("{server:?}").contains("password"));
}

#[tokio::test]
async fn a_unix_socket_is_refused_and_accepted_and_removed_like_a_port() {
    let path = std::env::temp_dir().join(format!("tower-memcached-{}.sock", std::process::id()));
    let server = Server::new();
    server.listen_unix(&path).await.expect("a new file");
    let taken = Server::new().listen_unix(&path).await;
    assert_eq!(taken.expect_err("it is there").kind(), ErrorKind::AddrInUse);
    let twice = server.listen().await.expect_err("one place is enough");
    assert_eq!(twice.kind(), ErrorKind::AddrInUse);
    assert_eq!(server.address(), None);

    let mut open = UnixStream::connect(&path).await.expect("it listens");
    ask(&mut open, b"version\r\n", VERSION).await;
    server.refuse();
    assert_eq!(rest(&mut open).await.0, b"");
    let refused = UnixStream::connect(&path).await;
    let refused = refused.expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    server.heal().expect("the file can be made again");
    let mut open = UnixStream::connect(&path).await.expect("it listens");
    ask(&mut open, b"version\r\n", VERSION).await;
    drop(server);
    assert_eq!(rest(&mut open).await.0, b"");
    assert!(!path.exists());
}
