//! Where a server listens: a TCP port or a Unix socket.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::task::{Context, Poll};

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};

use crate::testing::{BACKLOG, reserve};

/// An address that a server listens on, also while it refuses connections.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub(super) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Place {
    /// Keeps it while nobody listens here.
    pub(super) fn reserve(&self) -> Option<TcpSocket> {
        match self {
            // Failing that, it is tried again when it is to listen.
            Self::Tcp(address) => reserve(*address).ok(),
            Self::Unix(_) => None,
        }
    }

    /// Listens here again, on the current runtime.
    pub(super) fn listen_again(&self, reserved: Option<TcpSocket>) -> io::Result<Listener> {
        match self {
            Self::Tcp(address) => {
                let socket = reserved.map_or_else(|| reserve(*address), Ok)?;
                Ok(Listener::Tcp(socket.listen(BACKLOG)?))
            }
            Self::Unix(path) => {
                // The file outlives whoever listened on it, and nobody can listen on it once more.
                self.remove();
                Ok(Listener::Unix(UnixListener::bind(path)?))
            }
        }
    }

    /// Removes what a listener leaves behind.
    pub(super) fn remove(&self) {
        if let Self::Unix(path) = self {
            // It may be gone with its directory.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    pub(super) fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        match self {
            Self::Tcp(listener) => {
                let accepted = listener.poll_accept(context);
                accepted.map_ok(|(stream, _)| Accepted::Tcp(stream))
            }
            Self::Unix(listener) => {
                let accepted = listener.poll_accept(context);
                accepted.map_ok(|(stream, _)| Accepted::Unix(stream))
            }
        }
    }
}
