//! The servers of the cells, started for one of them each.

use std::path::Path;

use tower_memcached::testing::{self, Dialect, Memcached};
use tower_memcached::{Client, ClientBuilder, Executor};

use crate::cells::{Cell, Connection, Server};
use crate::support::{Directory, PATIENCE};
use crate::twemproxy::Twemproxy;

/// A server, and how a client reaches it.
pub(crate) struct Site {
    /// For all that need nothing special.
    pub(crate) client: Client,
    cell: Cell,
    node: String,
    backend: Backend,
    _directory: Directory,
}

enum Backend {
    InProcess(testing::Server),
    Memcached(Memcached),
    Twemproxy(Twemproxy),
}

impl Site {
    /// Starts the server of a cell.
    pub(crate) async fn start(cell: Cell) -> Self {
        let directory = Directory::new();
        let socket = directory.file("socket");
        let (backend, node) = match cell.server {
            Server::InProcess | Server::InProcess1439 | Server::InProcessProxy => {
                let server = in_process(cell.server);
                let node = listen(&server, cell.connection, &socket).await;
                (Backend::InProcess(server), node)
            }
            Server::Memcached => {
                let memcached = memcached(cell.connection);
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
        let client = builder(&cell, &node).build().expect("a client");
        Self {
            client,
            cell,
            node,
            backend,
            _directory: directory,
        }
    }

    /// A client whose time a busy machine does not use up.
    pub(crate) fn builder(&self) -> ClientBuilder {
        builder(&self.cell, &self.node)
    }

    /// Another client, as another process would have one.
    pub(crate) fn another(&self) -> Client {
        self.builder().build().expect("a client")
    }

    /// From here on the server takes everything and answers nothing.
    pub(crate) fn stop(&self) {
        match &self.backend {
            Backend::InProcess(server) => server.stall(),
            Backend::Memcached(memcached) => memcached.stop().expect("it runs"),
            Backend::Twemproxy(proxy) => proxy.stop(),
        }
    }

    /// Ends [`stop`](Self::stop).
    pub(crate) fn cont(&self) {
        match &self.backend {
            Backend::InProcess(server) => server.resume(),
            Backend::Memcached(memcached) => memcached.cont().expect("it runs"),
            Backend::Twemproxy(proxy) => proxy.cont(),
        }
    }
}

fn builder(cell: &Cell, node: &str) -> ClientBuilder {
    Client::builder()
        .nodes([node])
        .protocol(cell.protocol)
        .executor(Executor::current())
        .timeout(PATIENCE)
        .attempt_timeout(PATIENCE / 2)
        .load_timeout(PATIENCE)
}

fn in_process(server: Server) -> testing::Server {
    let builder = testing::Server::builder();
    match server {
        Server::InProcess1439 => builder.version("1.4.39").dialect(Dialect::Classic),
        Server::InProcessProxy => builder.dialect(Dialect::Proxy),
        _ => builder,
    }
    .build()
}

async fn listen(server: &testing::Server, connection: Connection, socket: &Path) -> String {
    match connection {
        Connection::Tcp => {
            let address = server.listen().await;
            address.expect("a free port").to_string()
        }
        Connection::Unix => {
            server.listen_unix(socket).await.expect("a new file");
            format!("unix:{}", socket.display())
        }
    }
}

fn memcached(connection: Connection) -> Memcached {
    let builder = Memcached::builder();
    match connection {
        Connection::Tcp => builder,
        Connection::Unix => builder.unix_socket(),
    }
    .spawn()
    .expect("memcached starts")
}
