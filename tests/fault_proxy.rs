//! The proxy's toxics do what they say, to plain sockets on both of its sides.
#![cfg(feature = "testing")]

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};
use tower_memcached::testing::{Ending, Flow, Proxy, Server, Toxics};

const HOUR: Duration = Duration::from_secs(3_600);
const LONG: Duration = Duration::from_secs(30);

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A proxy, and what it connects to.
struct Line {
    proxy: Proxy,
    upstream: TcpListener,
}

impl Line {
    async fn new() -> Self {
        let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let address = upstream.local_addr().expect("an address");
        let proxy = Proxy::listen(address).await.expect("a free port");
        Self { proxy, upstream }
    }

    /// Both ends of a connection: the client's and the server's.
    async fn connect(&self) -> (TcpStream, TcpStream) {
        let client = connect(self.proxy.address()).await;
        let accepted = timeout(LONG, self.upstream.accept()).await;
        let (server, _) = accepted
            .expect("the proxy connects")
            .expect("it is accepted");
        (client, server)
    }
}

async fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("it listens")
}

async fn send(stream: &mut TcpStream, bytes: &[u8]) {
    let written = timeout(LONG, stream.write_all(bytes)).await;
    written.expect("space in time").expect("it can be written");
}

async fn expect(stream: &mut TcpStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    let read = timeout(LONG, stream.read_exact(&mut bytes)).await;
    read.expect("bytes in time").expect("bytes");
    assert_eq!(
        bytes.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );
}

/// Reads to the end, however it comes.
async fn rest(stream: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = timeout(LONG, stream.read_to_end(&mut bytes)).await;
    let end = end.expect("an end in time");
    (bytes, end.err().map(|error| error.kind()))
}

fn fin(bytes: &[u8]) -> (Vec<u8>, Option<ErrorKind>) {
    (bytes.to_vec(), None)
}

fn reset(bytes: &[u8]) -> (Vec<u8>, Option<ErrorKind>) {
    (bytes.to_vec(), Some(ErrorKind::ConnectionReset))
}

/// No byte comes and no end either. What would come takes microseconds.
async fn is_silent(stream: &mut TcpStream) -> bool {
    timeout(ms(60), stream.read_u8()).await.is_err()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LONG, "{what} never came");
        tokio::time::sleep(ms(2)).await;
    }
}

/// Waits until the proxy has so many bytes from the client.
async fn has_received(proxy: &Proxy, bytes: u64) {
    until("the bytes", || {
        proxy.bytes_received(Flow::Upstream) == bytes
    })
    .await;
}

/// Bytes of which no two parts look alike.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    bytes
}

#[tokio::test]
async fn without_toxics_it_forwards_and_counts() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    send(&mut client, b"question").await;
    expect(&mut server, b"question").await;
    send(&mut server, b"yes").await;
    expect(&mut client, b"yes").await;
    let proxy = &line.proxy;
    until("the count", || proxy.bytes_forwarded(Flow::Both) == 11).await;
    assert_eq!(proxy.bytes_received(Flow::Upstream), 8);
    assert_eq!(proxy.bytes_forwarded(Flow::Upstream), 8);
    assert_eq!(proxy.bytes_received(Flow::Downstream), 3);
    assert_eq!(proxy.bytes_forwarded(Flow::Downstream), 3);
    assert_eq!(
        (proxy.connections_accepted(), proxy.open_connections()),
        (1, 1)
    );

    let (mut other, mut others_server) = line.connect().await;
    assert_eq!(
        (proxy.connections_accepted(), proxy.open_connections()),
        (2, 2)
    );
    // The end goes through as anything else, in one direction at a time.
    other.shutdown().await.expect("a socket");
    assert_eq!(rest(&mut others_server).await, fin(b""));
    send(&mut others_server, b"last").await;
    drop(others_server);
    assert_eq!(rest(&mut other).await, fin(b"last"));
    until("the end", || proxy.open_connections() == 1).await;
    assert_eq!(proxy.connections_accepted(), 2);
    assert!(format!("{proxy:?}").contains("open_connections: 1"));
}

#[tokio::test]
async fn large_transfers_go_both_ways_at_once() {
    let line = Line::new().await;
    let (client, server) = line.connect().await;
    let bytes = noise(10 << 20);
    let exchange = |stream: TcpStream| {
        let bytes = bytes.clone();
        async move {
            let (mut reader, mut writer) = stream.into_split();
            let sent = bytes.clone();
            tokio::spawn(async move { writer.write_all(&sent).await.expect("it can be written") });
            let mut received = vec![0; bytes.len()];
            timeout(LONG, reader.read_exact(&mut received))
                .await
                .expect("in time")
                .expect("all bytes");
            assert!(received == bytes, "bytes were lost, changed or reordered");
        }
    };
    tokio::join!(exchange(client), exchange(server));
}

#[tokio::test]
async fn latency_delays_without_limiting_throughput() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().latency(ms(300), ms(0)));
    let started = Instant::now();
    // Each is a chunk of its own.
    for sent in 1..=20 {
        send(&mut client, &[sent]).await;
        has_received(&line.proxy, sent.into()).await;
    }
    for sent in 1..=20 {
        expect(&mut server, &[sent]).await;
        assert!(started.elapsed() >= ms(300));
    }
    assert!(started.elapsed() < ms(20 * 300 / 2), "one after the other");
    // The other direction is not late.
    let started = Instant::now();
    send(&mut server, b"back").await;
    expect(&mut client, b"back").await;
    assert!(started.elapsed() < ms(250));
}

#[tokio::test]
async fn jitter_keeps_the_order() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Both, Toxics::new().latency(ms(5), ms(50)));
    let bytes = noise(500);
    for (sent, byte) in bytes.iter().enumerate() {
        send(&mut client, &[*byte]).await;
        has_received(&line.proxy, sent as u64 + 1).await;
    }
    expect(&mut server, &bytes).await;
}

#[tokio::test]
async fn the_end_is_as_late_as_the_bytes() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().latency(ms(200), ms(0)));
    let started = Instant::now();
    send(&mut client, b"bye").await;
    drop(client);
    assert_eq!(rest(&mut server).await, fin(b"bye"));
    assert!(started.elapsed() >= ms(200));
}

#[tokio::test]
async fn healing_releases_what_is_late() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Both, Toxics::new().latency(Duration::MAX, ms(0)));
    send(&mut client, b"hello").await;
    has_received(&line.proxy, 5).await;
    assert!(is_silent(&mut server).await);
    line.proxy.heal().expect("it listens");
    expect(&mut server, b"hello").await;

    line.proxy.set(Flow::Both, Toxics::new().slice(1, HOUR));
    send(&mut client, b"again").await;
    expect(&mut server, b"a").await;
    assert!(is_silent(&mut server).await);
    line.proxy.set(Flow::Both, Toxics::new());
    expect(&mut server, b"gain").await;
}

#[tokio::test]
async fn every_nth_chunk_is_late() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().late_every(3, HOUR));
    for sent in 1..=4 {
        send(&mut client, b"x").await;
        has_received(&line.proxy, sent).await;
    }
    expect(&mut server, b"xx").await;
    // The fourth waits for the third.
    assert!(is_silent(&mut server).await);
    line.proxy.heal().expect("it listens");
    expect(&mut server, b"xx").await;
}

#[tokio::test]
async fn a_blackhole_delivers_late() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy.set(Flow::Upstream, Toxics::new().blackhole());
    send(&mut client, b"zombie").await;
    has_received(&line.proxy, 6).await;
    // The other direction works.
    send(&mut server, b"hello").await;
    expect(&mut client, b"hello").await;
    // The client gives up, and the server does not get to know.
    drop(client);
    assert!(is_silent(&mut server).await);
    assert_eq!(line.proxy.bytes_forwarded(Flow::Upstream), 0);
    assert_eq!(line.proxy.open_connections(), 1);
    line.proxy.heal().expect("it listens");
    assert_eq!(rest(&mut server).await, fin(b"zombie"));

    // A reset does not overtake the bytes either.
    let (mut client, mut server) = line.connect().await;
    line.proxy.set(Flow::Upstream, Toxics::new().blackhole());
    send(&mut client, b"zombie").await;
    has_received(&line.proxy, 12).await;
    client.set_zero_linger().expect("a socket option");
    drop(client);
    assert!(is_silent(&mut server).await);
    line.proxy.heal().expect("it listens");
    assert_eq!(rest(&mut server).await, reset(b"zombie"));
}

#[tokio::test]
async fn zombies_survive_that_replies_meet_a_closed_socket() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy.set(Flow::Upstream, Toxics::new().blackhole());
    send(&mut client, b"zombie").await;
    has_received(&line.proxy, 6).await;
    drop(client);
    // The first is answered with RST, so that later ones fail.
    for sent in 1..=3 {
        send(&mut server, b"reply").await;
        let proxy = &line.proxy;
        until("the reply", || {
            proxy.bytes_received(Flow::Downstream) == 5 * sent
        })
        .await;
        assert!(is_silent(&mut server).await);
    }
    line.proxy.heal().expect("it listens");
    let mut bytes = [0; 6];
    let read = timeout(LONG, server.read_exact(&mut bytes)).await;
    read.expect("bytes in time").expect("bytes");
    assert_eq!(&bytes, b"zombie");
}

#[tokio::test]
async fn in_a_blackhole_connects_succeed_and_nothing_comes() {
    let line = Line::new().await;
    let (mut open, mut opens_server) = line.connect().await;
    line.proxy.set(Flow::Both, Toxics::new().blackhole());
    send(&mut open, b"1").await;
    send(&mut opens_server, b"2").await;
    let mut new = connect(line.proxy.address()).await;
    send(&mut new, b"3").await;
    assert!(is_silent(&mut new).await);
    assert!(is_silent(&mut open).await);
    assert!(is_silent(&mut opens_server).await);
    line.proxy.heal().expect("it listens");
    expect(&mut open, b"2").await;
    expect(&mut opens_server, b"1").await;
    let (mut news_server, _) = line.upstream.accept().await.expect("a connection");
    expect(&mut news_server, b"3").await;
}

#[tokio::test]
async fn a_dead_server_behind_a_blackhole_is_silent_too() {
    let Line { proxy, upstream } = Line::new().await;
    drop(upstream);
    proxy.set(Flow::Downstream, Toxics::new().blackhole());
    let mut client = connect(proxy.address()).await;
    assert!(is_silent(&mut client).await);
    proxy.heal().expect("it listens");
    assert_eq!(rest(&mut client).await, reset(b""));
    until("the end", || proxy.open_connections() == 0).await;
}

#[tokio::test]
async fn discarded_bytes_are_lost_and_the_end_is_not() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    // Those on their way are lost as well.
    line.proxy
        .set(Flow::Upstream, Toxics::new().latency(HOUR, ms(0)));
    send(&mut client, b"late").await;
    has_received(&line.proxy, 4).await;
    line.proxy.set(Flow::Upstream, Toxics::new().discard());
    send(&mut client, b"lost").await;
    has_received(&line.proxy, 8).await;
    line.proxy.heal().expect("it listens");
    send(&mut client, b"kept").await;
    expect(&mut server, b"kept").await;
    assert_eq!(line.proxy.bytes_forwarded(Flow::Upstream), 4);

    line.proxy.set(Flow::Both, Toxics::new().discard());
    drop(client);
    assert!(is_silent(&mut server).await);
    line.proxy.heal().expect("it listens");
    assert_eq!(rest(&mut server).await, fin(b""));
}

#[tokio::test]
async fn bandwidth_is_capped_and_nothing_is_lost() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().bandwidth(100_000));
    let bytes = noise(50_000);
    let started = Instant::now();
    send(&mut client, &bytes).await;
    expect(&mut server, &bytes).await;
    // The last write, a fiftieth of a second's, and the credit for late timers, as long, are not waited for.
    assert!(started.elapsed() >= ms(455));
    assert!(started.elapsed() < ms(5_000));
}

#[tokio::test]
async fn slices_are_paused_between_and_nothing_is_lost() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().slice(1, ms(10)));
    let started = Instant::now();
    send(&mut client, b"slow drip").await;
    expect(&mut server, b"slow drip").await;
    assert!(started.elapsed() >= ms(8 * 10));

    line.proxy
        .set(Flow::Upstream, Toxics::new().slice(7, ms(0)));
    let bytes = noise(100_000);
    send(&mut client, &bytes).await;
    expect(&mut server, &bytes).await;
}

#[tokio::test]
async fn corruption_is_exact() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    let toxics = Toxics::new().corrupt_every(3, 0x20);
    line.proxy.set(Flow::Upstream, toxics);
    // Counted over chunks and slices.
    for (sent, expected) in [(b"aaaa", b"aaAa"), (b"bbbb", b"bBbb"), (b"cccc", b"CccC")] {
        send(&mut client, sent).await;
        expect(&mut server, expected).await;
    }
    // And from when the toxics were set.
    line.proxy.set(Flow::Upstream, toxics.slice(2, ms(0)));
    send(&mut client, b"dddddddd").await;
    expect(&mut server, b"ddDddDdd").await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().corrupt_at(2, 0x01));
    send(&mut client, b"00000000").await;
    expect(&mut server, b"00100000").await;
    send(&mut server, b"11111111").await;
    expect(&mut client, b"11111111").await;
}

#[tokio::test]
async fn data_limits_end_connections_at_the_byte() {
    let line = Line::new().await;
    for (ending, seen) in [
        (Ending::Close, fin(b"12345")),
        (Ending::Reset, reset(b"12345")),
    ] {
        let (mut client, mut server) = line.connect().await;
        send(&mut server, b"before").await;
        expect(&mut client, b"before").await;
        line.proxy
            .set(Flow::Downstream, Toxics::new().limit_data(5, ending));
        send(&mut server, b"123456789").await;
        assert_eq!(rest(&mut client).await, seen);
        let end = rest(&mut server).await.1;
        assert_eq!(end, seen.1);
        until("the end", || line.proxy.open_connections() == 0).await;
        line.proxy.heal().expect("it listens");
    }
    // At the very byte, or at once.
    let (mut client, mut server) = line.connect().await;
    line.proxy
        .set(Flow::Downstream, Toxics::new().limit_data(3, Ending::Close));
    send(&mut server, b"123").await;
    assert_eq!(rest(&mut client).await, fin(b"123"));
    line.proxy.heal().expect("it listens");
    let (mut client, _server) = line.connect().await;
    line.proxy
        .set(Flow::Upstream, Toxics::new().limit_data(0, Ending::Reset));
    assert_eq!(rest(&mut client).await, reset(b""));
    line.proxy.heal().expect("it listens");
    let (mut client, _server) = line.connect().await;
    let limit = Toxics::new().limit_data(0, Ending::Close);
    line.proxy.set(Flow::Upstream, limit.blackhole());
    assert!(
        is_silent(&mut client).await,
        "an end came through a blackhole"
    );
    line.proxy.set(Flow::Upstream, limit);
    assert_eq!(rest(&mut client).await, fin(b""));
}

#[tokio::test]
async fn a_close_is_an_end_even_with_bytes_unread() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    // More than the proxy takes, so that some remains in its socket, for which the kernel would send RST.
    line.proxy.set(Flow::Upstream, Toxics::new().blackhole());
    while timeout(ms(200), client.write_all(&[0; 65_536]))
        .await
        .is_ok()
    {}
    send(&mut server, b"bye").await;
    expect(&mut client, b"bye").await;
    line.proxy.close_connections();
    assert_eq!(rest(&mut client).await, fin(b""));
    assert_eq!(rest(&mut server).await, fin(b""));
}

#[tokio::test]
async fn the_end_comes_after_a_full_reply() {
    let server = Server::new();
    let address = server.listen().await.expect("a free port");
    let proxy = Proxy::listen(address).await.expect("a free port");
    let mut client = connect(proxy.address()).await;
    proxy.set(
        Flow::Downstream,
        Toxics::new().limit_chunks(1, Ending::HalfClose),
    );
    send(&mut client, b"set k 0 0 1\r\n1\r\n").await;
    assert_eq!(rest(&mut client).await, fin(b"STORED\r\n"));
    // The other direction stays open, and its replies are lost.
    send(&mut client, b"set k 0 0 1\r\n2\r\n").await;
    until("the write", || server.peek("k").as_deref() == Some(b"2")).await;
    assert_eq!(proxy.open_connections(), 1);
    drop(client);
    until("the end", || proxy.open_connections() == 0).await;
}

#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    let line = Line::new().await;
    for flow in [Flow::Upstream, Flow::Downstream] {
        let (client, server) = line.connect().await;
        let (mut sender, mut receiver) = match flow {
            Flow::Upstream => (client, server),
            _ => (server, client),
        };
        line.proxy.set(flow, Toxics::new().latency(ms(100), ms(0)));
        let expected = line.proxy.bytes_received(flow) + 10;
        send(&mut sender, b"on its way").await;
        until("the bytes", || line.proxy.bytes_received(flow) == expected).await;
        line.proxy.half_close(flow);
        assert_eq!(rest(&mut receiver).await, fin(b"on its way"));
        send(&mut sender, b"lost").await;
        send(&mut receiver, b"back").await;
        expect(&mut sender, b"back").await;
        drop(receiver);
        assert_eq!(rest(&mut sender).await, fin(b""));
        drop(sender);
        line.proxy.heal().expect("it listens");
        until("the end", || line.proxy.open_connections() == 0).await;
    }
    // Only those that were open.
    let (mut client, mut server) = line.connect().await;
    send(&mut client, b"new").await;
    expect(&mut server, b"new").await;
}

#[tokio::test]
async fn open_connections_are_reset_or_closed() {
    let line = Line::new().await;
    for toxics in [
        Toxics::new(),
        Toxics::new().blackhole(),
        Toxics::new().slice(1, HOUR),
    ] {
        line.proxy.set(Flow::Both, toxics);
        let (mut client, mut server) = line.connect().await;
        line.proxy.reset_connections();
        assert_eq!(rest(&mut client).await, reset(b""));
        assert_eq!(rest(&mut server).await, reset(b""));
        let (mut client, mut server) = line.connect().await;
        assert_eq!(line.proxy.open_connections(), 1);
        line.proxy.close_connections();
        assert_eq!(rest(&mut client).await, fin(b""));
        assert_eq!(rest(&mut server).await, fin(b""));
        until("the end", || line.proxy.open_connections() == 0).await;
    }
}

#[tokio::test]
async fn new_connections_are_reset() {
    let line = Line::new().await;
    let (mut open, mut opens_server) = line.connect().await;
    line.proxy.reset_new();
    let mut new = connect(line.proxy.address()).await;
    assert_eq!(rest(&mut new).await, reset(b""));
    assert_eq!(line.proxy.connections_accepted(), 2);
    send(&mut open, b"still").await;
    expect(&mut opens_server, b"still").await;
    line.proxy.accept().expect("it listens");
    let (mut client, mut server) = line.connect().await;
    send(&mut client, b"again").await;
    expect(&mut server, b"again").await;
}

#[tokio::test]
async fn refused_and_accepted_on_the_same_port() {
    let line = Line::new().await;
    line.proxy.refuse();
    let squatter = TcpSocket::new_v4().expect("a socket");
    let error = squatter.bind(line.proxy.address()).expect_err("reserved");
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    line.proxy.heal().expect("the port is free");

    let (mut open, mut opens_server) = line.connect().await;
    for _ in 0..3 {
        line.proxy.refuse();
        line.proxy.refuse();
        for _ in 0..10 {
            let error = TcpStream::connect(line.proxy.address()).await;
            let error = error.expect_err("nobody listens").kind();
            assert_eq!(error, ErrorKind::ConnectionRefused);
        }
        send(&mut open, b"still").await;
        expect(&mut opens_server, b"still").await;
        line.proxy.accept().expect("the port is free");
        line.proxy.accept().expect("once more does nothing");
        let (mut client, mut server) = line.connect().await;
        send(&mut client, b"again").await;
        expect(&mut server, b"again").await;
    }
}

#[tokio::test]
async fn another_upstream_is_for_new_connections() {
    let line = Line::new().await;
    let (mut open, mut opens_server) = line.connect().await;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .expect("a free port");
    line.proxy
        .set_upstream(other.local_addr().expect("an address"));
    let mut new = connect(line.proxy.address()).await;
    let (mut news_server, _) = other.accept().await.expect("a connection");
    send(&mut new, b"new").await;
    expect(&mut news_server, b"new").await;
    send(&mut open, b"old").await;
    expect(&mut opens_server, b"old").await;
}

#[tokio::test]
async fn resets_go_through() {
    let line = Line::new().await;
    for while_writing in [false, true] {
        let (mut client, server) = line.connect().await;
        if while_writing {
            // It is the proxy's write that meets the reset, or its read.
            while timeout(ms(200), client.write_all(&[0; 65_536]))
                .await
                .is_ok()
            {}
        }
        server.set_zero_linger().expect("a socket option");
        drop(server);
        assert_eq!(rest(&mut client).await, reset(b""));
        let (client, mut server) = line.connect().await;
        client.set_zero_linger().expect("a socket option");
        drop(client);
        assert_eq!(rest(&mut server).await, reset(b""));
    }
    until("the end", || line.proxy.open_connections() == 0).await;
    let proxy = line.proxy;
    drop(line.upstream);
    assert_eq!(rest(&mut connect(proxy.address()).await).await, reset(b""));
}

#[tokio::test]
async fn it_takes_no_more_than_its_bound() {
    for toxics in [
        Toxics::new().blackhole(),
        Toxics::new().latency(HOUR, ms(0)),
        Toxics::new(),
    ] {
        let line = Line::new().await;
        let (mut client, mut server) = line.connect().await;
        line.proxy.set(Flow::Upstream, toxics);
        let bytes = noise(64 << 20);
        let mut sent = 0;
        // The kernel's buffers are some megabytes.
        while let Ok(written) = timeout(ms(300), client.write(&bytes[sent..])).await {
            sent += written.expect("it can be written");
            assert!(sent < bytes.len(), "it takes everything");
        }
        let held =
            line.proxy.bytes_received(Flow::Upstream) - line.proxy.bytes_forwarded(Flow::Upstream);
        let one_chunk_more = 2 * 16_384;
        assert!(held <= (4 << 20) + one_chunk_more, "it holds {held} bytes");
        line.proxy.heal().expect("it listens");
        let mut received = vec![0; sent];
        let read = timeout(LONG, server.read_exact(&mut received)).await;
        read.expect("bytes in time").expect("bytes");
        assert!(
            received == bytes[..sent],
            "bytes were lost, changed or reordered"
        );
    }
}

#[tokio::test]
async fn dropping_the_handle_closes_everything() {
    for toxics in [
        Toxics::new(),
        Toxics::new().blackhole(),
        Toxics::new().latency(HOUR, ms(0)),
    ] {
        let line = Line::new().await;
        line.proxy.set(Flow::Both, toxics);
        let mut open = Vec::new();
        for _ in 0..10 {
            open.push(line.connect().await);
        }
        let address = line.proxy.address();
        drop(line.proxy);
        let error = TcpStream::connect(address)
            .await
            .expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        for (mut client, mut server) in open {
            assert_eq!(rest(&mut client).await, fin(b""));
            assert_eq!(rest(&mut server).await, fin(b""));
        }
        let metrics = tokio::runtime::Handle::current().metrics();
        until("the end of all tasks", || metrics.num_alive_tasks() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn toxics_hold_at_once_on_any_thread() {
    let line = Line::new().await;
    let (mut client, mut server) = line.connect().await;
    for round in 1..=200 {
        line.proxy.set(Flow::Upstream, Toxics::new().blackhole());
        send(&mut client, b"x").await;
        has_received(&line.proxy, round).await;
        assert_eq!(line.proxy.bytes_forwarded(Flow::Upstream), round - 1);
        line.proxy.heal().expect("it listens");
        expect(&mut server, b"x").await;
        until("the count", || {
            line.proxy.bytes_forwarded(Flow::Upstream) == round
        })
        .await;
    }
}
