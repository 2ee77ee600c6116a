//! TLS, against a real memcached that speaks it (`-Z`), and against what only looks like one.

use std::error::Error as _;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tower_memcached::testing::Memcached;
use tower_memcached::{
    Address, BreakerState, Client, Connecting, Connector, Credentials, Error, ErrorKind, Executor,
    Pipelined, PipelinedSettings, SystemConnector, TlsConnector, TlsSettings, Ttl,
};

use crate::connectors::{eventually_set, hangs_and_comes_back, hasty, is_of_use, patient};
use crate::support::{PATIENCE, eventually, until_closed, until_open};

/// One who signs certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = key();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    fn signs(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = key();
        Identity {
            certificate: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    /// For what is on this machine.
    pub(crate) fn server(&self) -> Identity {
        self.signs(&["localhost", "127.0.0.1"], |_| {})
    }

    /// Trusts this one only.
    pub(crate) fn trusted(&self) -> TlsSettings {
        TlsSettings::default().ca_pem(&self.pem)
    }
}

fn speaking(identity: &Identity) -> Memcached {
    let builder = Memcached::builder().tls(&identity.certificate, &identity.key);
    builder.spawn().unwrap()
}

/// Why the only node of a client is out.
async fn refusal(address: impl AsRef<str>, tls: TlsSettings) -> Error {
    let client = patient(address).tls(tls).build().unwrap();
    assert!(client.get("k").await.is_err());
    until_open(&client, 0).await;
    let error = client.nodes()[0].last_cause.clone().unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert!(error.source().is_some(), "{error:?}");
    error
}

#[tokio::test]
async fn it_carries_whatever_a_plain_connection_does() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.server());
    // As it is written, an IP; as another name of the same; and with system roots beside.
    let name = node.address().replace("127.0.0.1", "localhost");
    for (address, tls) in [
        (node.address(), authority.trusted()),
        (name, authority.trusted().server_name("localhost")),
        (node.address(), authority.trusted().system_roots(true)),
    ] {
        let client = patient(address).tls(tls).connections(2).build().unwrap();
        is_of_use(&client).await;
    }
}

#[tokio::test]
async fn a_certificate_must_be_signed_by_who_is_trusted() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.server());
    for tls in [
        Authority::new("theirs").trusted(),
        // The same name, another key.
        Authority::new("ours").trusted(),
        // Only what the system trusts.
        TlsSettings::default(),
    ] {
        let error = refusal(node.address(), tls).await.to_string();
        assert!(error.contains("TLS handshake failed"), "{error}");
        assert!(error.contains("invalid peer certificate"), "{error}");
    }
}

#[tokio::test]
async fn a_certificate_must_be_for_the_server_that_is_asked() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.signs(&["cache-a.example"], |_| {}));
    let error = refusal(node.address(), authority.trusted()).await;
    assert!(error.to_string().contains("not valid for name"), "{error}");
    let tls = authority.trusted().server_name("cache-b.example");
    let error = refusal(node.address(), tls).await;
    assert!(error.to_string().contains("cache-b.example"), "{error}");
    let tls = authority.trusted().server_name("cache-a.example");
    let client = patient(node.address()).tls(tls).build().unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
}

#[tokio::test]
async fn an_expired_certificate_is_none() {
    let authority = Authority::new("ours");
    let expired = authority.signs(&["127.0.0.1"], |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let node = speaking(&expired);
    let error = refusal(node.address(), authority.trusted()).await;
    assert!(error.to_string().contains("expired"), "{error}");
}

#[tokio::test]
async fn a_server_may_demand_a_certificate_of_its_clients() {
    let (authority, clients) = (Authority::new("ours"), Authority::new("clients"));
    let server = authority.server();
    let builder = Memcached::builder().tls(&server.certificate, &server.key);
    let node = builder.client_ca(&clients.pem).spawn().unwrap();
    let client = clients.signs(&["service"], |_| {});
    let tls = authority.trusted();
    let shown = tls.clone().client_pem(&client.certificate, &client.key);
    is_of_use(&patient(node.address()).tls(shown).build().unwrap()).await;
    let stranger = authority.signs(&["service"], |_| {});
    let unknown = tls.clone().client_pem(&stranger.certificate, &stranger.key);
    for tls in [tls, unknown] {
        let error = refusal(node.address(), tls).await;
        assert!(!format!("{error:?}").contains("PRIVATE"), "{error:?}");
    }
}

/// Both at once, as it should be used; and the node's probes are made of the same.
#[tokio::test]
async fn a_node_that_hangs_comes_back_over_tls_and_with_its_password() {
    let authority = Authority::new("ours");
    let server = authority.server();
    let builder = Memcached::builder().authentication("user", "secret");
    let mut node = builder
        .tls(&server.certificate, &server.key)
        .spawn()
        .unwrap();
    let client = hasty(node.address())
        .tls(authority.trusted())
        .credentials(Credentials::new("user", "secret"))
        .build()
        .unwrap();
    hangs_and_comes_back(&client, &node).await;
    node.kill().unwrap();
    until_open(&client, 0).await;
    node.restart().unwrap();
    until_closed(&client, 0).await;
}

/// The kernel of a server that hangs accepts, and nobody ever says hello.
#[tokio::test]
async fn a_handshake_that_hangs_ends_by_its_own_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let authority = Authority::new("ours");
    let tls = authority.trusted();
    let own = tls.clone().connect_timeout(Duration::from_millis(150));
    // The attempt timeout is 2 s, so connecting would have 4 s without TLS.
    for (tls, said) in [(own, "150ms"), (tls, "250ms")] {
        let client = patient(&address).tls(tls).build().unwrap();
        let error = client.get("k").await.unwrap_err();
        assert!(error.is_unavailable(), "{error}");
        until_open(&client, 0).await;
        let error = client.nodes()[0].last_cause.clone().unwrap();
        assert_eq!(error.kind(), ErrorKind::ConnectionFailed);
        assert!(error.to_string().contains(said), "{error}");
    }
    // What the client is told goes over the default.
    let client = patient(&address)
        .tls(authority.trusted())
        .connect_timeout(Duration::from_millis(99))
        .build()
        .unwrap();
    assert!(client.get("k").await.is_err());
    until_open(&client, 0).await;
    let error = client.nodes()[0].last_cause.clone().unwrap();
    assert!(error.to_string().contains("99ms"), "{error}");
}

/// It says so in plain text, and closes: which is not TLS, but no reason to give it up.
#[tokio::test]
async fn a_server_that_is_full_is_not_condemned() {
    let authority = Authority::new("ours");
    let identity = authority.server();
    let node = Memcached::builder()
        .arguments(&["-c", "40", "-t", "1"])
        .tls(&identity.certificate, &identity.key)
        .spawn()
        .unwrap();
    let mut held = Vec::new();
    loop {
        let mut stream = TcpStream::connect(node.socket_address()).await.unwrap();
        let reading = tokio::time::timeout(Duration::from_millis(50), stream.read_u8());
        // It waits for us to begin, or does not want us.
        match reading.await {
            Err(_waits) => held.push(stream),
            Ok(_) => break,
        }
    }
    let client = patient(node.address())
        .tls(authority.trusted())
        .build()
        .unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert!(error.to_string().contains("Too many open"), "{error}");
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    held.clear();
    let until = Instant::now() + PATIENCE;
    while client.get("k").await.is_err() {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A plain server, and one that says anything.
#[tokio::test]
async fn what_does_not_speak_tls_is_out() {
    let authority = Authority::new("ours");
    let plain = Memcached::spawn(&[]).unwrap();
    refusal_of_any(plain.address(), &authority).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(&[0x5a; 700]).await;
        }
    });
    refusal_of_any(address, &authority).await;
    // Nor is one that wants TLS of any use without.
    let node = speaking(&authority.server());
    let client = patient(node.address()).build().unwrap();
    assert!(client.get("k").await.is_err());
    until_open(&client, 0).await;
}

async fn refusal_of_any(address: String, authority: &Authority) {
    let error = refusal(address, authority.trusted()).await.to_string();
    assert!(error.contains("TLS handshake failed"), "{error}");
}

/// A write whose answer is not waited for any longer lingers until the server has ended its connection,
/// and then is in doubt no more: TLS says farewell in a way of its own.
#[tokio::test]
async fn a_connection_that_was_given_up_ends_over_tls_too() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.server());
    let client = hasty(node.address())
        .tls(authority.trusted())
        .build()
        .unwrap();
    eventually_set(&client, "old").await;
    node.stop().unwrap();
    let error = client.set("k", "new", Ttl::NEVER).await.unwrap_err();
    assert!(error.sent() != tower_memcached::Sent::Yes, "{error}");
    until_open(&client, 0).await;
    assert!(client.nodes()[0].journal > 0);
    node.cont().unwrap();
    until_closed(&client, 0).await;
    // Only a connection that has ended, or 10 minutes, end it.
    eventually("its journal is empty", || client.nodes()[0].journal == 0).await;
}

/// Its futures are dropped wherever they are, and leave nobody else's answer behind.
#[tokio::test]
async fn who_leaves_takes_no_answer_along() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.server());
    let client = patient(node.address())
        .tls(authority.trusted())
        .build()
        .unwrap();
    for n in 0..64 {
        let value = vec![n; 20_000];
        client
            .set(format!("k{n}"), value, Ttl::NEVER)
            .await
            .unwrap();
    }
    for round in 0..200_u32 {
        let (n, other) = (round % 64, (round * 7 + 3) % 64);
        let leaves = client.get(format!("k{n}"));
        let leaves = tokio::time::timeout(Duration::from_micros(u64::from(round * 3)), leaves);
        let stays = client.get(format!("k{other}"));
        let (_, stays) = tokio::join!(leaves, stays);
        let value = stays.unwrap().unwrap();
        assert!(value.iter().all(|&byte| u32::from(byte) == other));
    }
}

/// A stack made by hand.
#[tokio::test]
async fn a_connector_of_ones_own_goes_below_it() {
    let authority = Authority::new("ours");
    let node = speaking(&authority.server());
    let tls = TlsConnector::new(SystemConnector::new(), &authority.trusted()).unwrap();
    let wrapped = patient(node.address())
        .connector(SystemConnector::new())
        .tls(authority.trusted());
    for builder in [wrapped, patient(node.address()).connector(tls.clone())] {
        let client = builder.build().unwrap();
        client.set("k", "v", Ttl::NEVER).await.unwrap();
    }
    let pipelined = Pipelined::new(
        node.address().parse().unwrap(),
        PipelinedSettings::default().attempt_timeout(Duration::from_secs(2)),
        std::sync::Arc::new(tls),
        &Executor::current(),
    );
    let client = Client::from_service(pipelined.unwrap());
    let client = client.with_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
}

#[tokio::test]
async fn a_unix_socket_needs_a_name() {
    let plain = Memcached::builder().unix_socket().spawn().unwrap();
    let authority = Authority::new("ours");
    let client = patient(plain.address())
        .tls(authority.trusted())
        .build()
        .unwrap();
    assert!(client.get("k").await.is_err());
    let error = client.nodes()[0].last_cause.clone().unwrap();
    assert!(error.to_string().contains("server_name"), "{error}");
}

#[test]
fn what_cannot_be_read_is_refused_by_its_setting() {
    let directory =
        std::env::temp_dir().join(format!("tower-memcached-tls-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let file = |name: &str, content: &str| -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let authority = Authority::new("ours");
    let (one, other) = (authority.server(), authority.server());
    let ca = file("ca", &authority.pem);
    let (cert, key) = (file("cert", &one.certificate), file("key", &one.key));
    let (others, garbage) = (file("other", &other.key), file("garbage", "secret garbage"));
    let missing = directory.join("missing");
    let tls = TlsSettings::default().ca_file(&ca);
    let shown = tls.clone().client_cert_file(&cert);
    let cases = [
        ("tls.ca_file", TlsSettings::default().ca_file(&missing)),
        ("tls.ca_file", TlsSettings::default().ca_file(&garbage)),
        ("tls.ca_file", TlsSettings::default().ca_pem(&one.key)),
        ("tls.client_cert_file", shown.clone()),
        ("tls.client_key_file", tls.clone().client_key_file(&key)),
        (
            "tls.client_key_file",
            shown.clone().client_key_file(&missing),
        ),
        (
            "tls.client_key_file",
            shown.clone().client_key_file(&garbage),
        ),
        (
            "tls.client_key_file",
            shown.clone().client_key_file(&others),
        ),
        (
            "tls.client_cert_file",
            tls.clone().client_cert_file(&garbage).client_key_file(&key),
        ),
        (
            "tls.client_cert_file",
            shown.clone().client_key_file(&key).client_pem("", ""),
        ),
        ("tls.server_name", tls.clone().server_name("not a name")),
        (
            "tls.connect_timeout",
            tls.clone().connect_timeout(Duration::ZERO),
        ),
    ];
    for (setting, tls) in cases {
        let error = patient("127.0.0.1:1").tls(tls.clone()).build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
        let said = error.to_string();
        assert!(
            said.contains(&format!(": {setting}: ")),
            "{setting}: {said}"
        );
        assert!(!said.contains("secret"), "{said}");
        let error = TlsConnector::new(SystemConnector::new(), &tls).unwrap_err();
        assert_eq!(error.to_string(), said);
    }
    let good = shown.client_key_file(&key);
    let client = patient("127.0.0.1:1").tls(good).build();
    fs::remove_dir_all(&directory).unwrap();
    client.unwrap();
}

#[test]
fn a_key_is_shown_to_nobody() {
    let identity = Authority::new("ours").server();
    let tls = TlsSettings::default().client_pem(&identity.certificate, &identity.key);
    let secret = identity.key.lines().nth(1).unwrap();
    let builder = patient("127.0.0.1:1").tls(tls.clone());
    let connector = TlsConnector::new(SystemConnector::new(), &tls).unwrap();
    let shown = format!("{tls:?} {builder:?} {connector:?}");
    assert!(
        !shown.contains(secret) && !shown.contains("PRIVATE"),
        "{shown}"
    );
}

/// One that takes its time, whatever goes around it.
struct Far;

impl Connector for Far {
    fn connect(&self, address: &Address) -> Connecting {
        SystemConnector::new().connect(address)
    }

    fn connect_timeout(&self) -> Option<Duration> {
        Some(Duration::from_secs(2))
    }
}

#[test]
fn it_takes_no_time_from_the_connector_below() {
    let trusted = Authority::new("ours").trusted();
    let told = trusted.clone().connect_timeout(Duration::from_secs(1));
    let within = |connector: Result<TlsConnector, Error>| connector.unwrap().connect_timeout();
    let near = within(TlsConnector::new(SystemConnector::new(), &trusted));
    assert_eq!(near, Some(Duration::from_millis(250)));
    let far = within(TlsConnector::new(Far, &trusted));
    assert_eq!(far, Some(Duration::from_secs(2)));
    let told = within(TlsConnector::new(Far, &told));
    assert_eq!(told, Some(Duration::from_secs(1)));
}
