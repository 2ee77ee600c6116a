//! The servers of the cells, started for one of them each.

use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedKey, KeyPair};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tower_memcached::testing::{self, Dialect, Memcached};
use tower_memcached::{Client, ClientBuilder, Credentials, Executor, TlsSettings};

use crate::cells::{Cell, Connection, Server};
use crate::support::{Directory, PATIENCE};
use crate::twemproxy::Twemproxy;

const USER: &str = "user";
const PASSWORD: &str = "correct-horse";

/// A server, and how a client reaches it.
pub(crate) struct Site {
    /// For all that need nothing special.
    pub(crate) client: Client,
    cell: Cell,
    node: String,
    certificate: CertifiedKey<KeyPair>,
    backend: Backend,
    _directory: Directory,
}

enum Backend {
    /// With what decrypts for it, if need be.
    InProcess(
        testing::Server,
        #[expect(dead_code, reason = "its drop ends it")] Option<Decryption>,
    ),
    Memcached(Memcached),
    Twemproxy(Twemproxy),
}

impl Site {
    /// Starts the server of a cell.
    pub(crate) async fn start(cell: Cell) -> Self {
        let directory = Directory::new();
        let socket = directory.file("socket");
        let certificate = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]);
        let certificate = certificate.expect("a certificate");
        let (backend, node) = match cell.server {
            Server::InProcess | Server::InProcess1439 | Server::InProcessProxy => {
                let server = in_process(&cell);
                if cell.connection == Connection::Tls {
                    let (node, decryption) = decrypting(&server, &certificate).await;
                    (Backend::InProcess(server, Some(decryption)), node)
                } else {
                    let node = listen(&server, cell.connection, &socket).await;
                    (Backend::InProcess(server, None), node)
                }
            }
            Server::Memcached => {
                let memcached = memcached(cell.connection, &certificate);
                let node = memcached.address();
                (Backend::Memcached(memcached), node)
            }
            Server::Twemproxy => {
                let unix = (cell.connection == Connection::Unix).then_some(&*socket);
                let proxy = Twemproxy::start(&directory, unix).await;
                let node = proxy.address();
                (Backend::Twemproxy(proxy), node)
            }
        };
        let client = builder(&cell, &node, &certificate);
        Self {
            client: client.build().expect("a client"),
            cell,
            node,
            certificate,
            backend,
            _directory: directory,
        }
    }

    /// A client whose time a busy machine does not use up.
    pub(crate) fn builder(&self) -> ClientBuilder {
        builder(&self.cell, &self.node, &self.certificate)
    }

    /// Another client, as another process would have one.
    pub(crate) fn another(&self) -> Client {
        self.builder().build().expect("a client")
    }

    /// From here on the server takes everything and answers nothing.
    pub(crate) fn stop(&self) {
        match &self.backend {
            Backend::InProcess(server, _) => server.stall(),
            Backend::Memcached(memcached) => memcached.stop().expect("it runs"),
            Backend::Twemproxy(proxy) => proxy.stop(),
        }
    }

    /// Ends [`stop`](Self::stop).
    pub(crate) fn cont(&self) {
        match &self.backend {
            Backend::InProcess(server, _) => server.resume(),
            Backend::Memcached(memcached) => memcached.cont().expect("it runs"),
            Backend::Twemproxy(proxy) => proxy.cont(),
        }
    }
}

fn builder(cell: &Cell, node: &str, certificate: &CertifiedKey<KeyPair>) -> ClientBuilder {
    let builder = Client::builder()
        .nodes([node])
        .protocol(cell.protocol)
        .executor(Executor::current())
        .timeout(PATIENCE)
        .attempt_timeout(PATIENCE / 2)
        .connect_timeout(PATIENCE / 2)
        .load_timeout(PATIENCE);
    match cell.connection {
        Connection::Tcp | Connection::Unix => builder,
        Connection::Tls => {
            let tls = TlsSettings::default().ca_pem(certificate.cert.pem());
            builder.tls(tls.connect_timeout(PATIENCE / 2))
        }
        Connection::Password => builder.credentials(Credentials::new(USER, PASSWORD)),
    }
}

fn in_process(cell: &Cell) -> testing::Server {
    let builder = testing::Server::builder();
    let builder = match cell.connection {
        Connection::Password => builder.authentication(USER, PASSWORD),
        Connection::Tcp | Connection::Unix | Connection::Tls => builder,
    };
    match cell.server {
        Server::InProcess1439 => builder.version("1.4.39").dialect(Dialect::Classic),
        Server::InProcessProxy => builder.dialect(Dialect::Proxy),
        _ => builder,
    }
    .build()
}

async fn listen(server: &testing::Server, connection: Connection, socket: &Path) -> String {
    match connection {
        Connection::Tcp | Connection::Tls | Connection::Password => {
            let address = server.listen().await;
            address.expect("a free port").to_string()
        }
        Connection::Unix => {
            server.listen_unix(socket).await.expect("a new file");
            format!("unix:{}", socket.display())
        }
    }
}

/// Takes connections off TLS, for a server that knows nothing of it. It ends when this is dropped.
struct Decryption(JoinHandle<()>);

impl Drop for Decryption {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn decrypting(
    server: &testing::Server,
    certificate: &CertifiedKey<KeyPair>,
) -> (String, Decryption) {
    let key = PrivateKeyDer::Pkcs8(certificate.signing_key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key)
        .expect("a certificate and its key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let server = server.clone();
    let accepting = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a socket option");
            let (acceptor, server) = (acceptor.clone(), server.clone());
            tokio::spawn(async move {
                // Who is not content with the certificate says so to its own test.
                if let Ok(stream) = acceptor.accept(stream).await {
                    server.serve(stream).await;
                }
            });
        }
    });
    (address, Decryption(accepting))
}

fn memcached(connection: Connection, certificate: &CertifiedKey<KeyPair>) -> Memcached {
    let builder = Memcached::builder();
    match connection {
        Connection::Tcp => builder,
        Connection::Unix => builder.unix_socket(),
        Connection::Tls => builder.tls(
            &certificate.cert.pem(),
            &certificate.signing_key.serialize_pem(),
        ),
        Connection::Password => builder.authentication(USER, PASSWORD),
    }
    .spawn()
    .expect("memcached starts")
}
