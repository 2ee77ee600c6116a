//! TLS: what it is told, and with the feature `tls` the connector that speaks it.

#[cfg(feature = "tls")]
mod connector;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "tls")]
pub use connector::TlsConnector;

use crate::error::{Invalid, not_zero};

/// A handshake is a round trip more, or two, and a millisecond of each side's processor; after a restart
/// a server has one to make with each of its clients at once.
#[cfg(feature = "tls")]
const CONNECT_TIMEOUT: Duration = Duration::from_millis(250);

/// How connections are encrypted: see [`ClientBuilder::tls`](crate::ClientBuilder::tls). TLS 1.2 or 1.3,
/// and always with a server whose certificate is good.
///
/// Needs the feature `tls`. Without it, building a client with this is an error.
///
/// Files are read when the client is built, which blocks for as long as that takes, and not again: with
/// other certificates build another client. All of them are PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct TlsSettings {
    ca_file: Option<PathBuf>,
    system_roots: bool,
    client_cert_file: Option<PathBuf>,
    client_key_file: Option<PathBuf>,
    server_name: Option<String>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(crate) connect_timeout: Option<Duration>,
    #[cfg_attr(feature = "serde", serde(skip))]
    ca_pem: Option<Pem>,
    #[cfg_attr(feature = "serde", serde(skip))]
    client_pem: Option<(Pem, Pem)>,
}

/// There may be a key in it.
#[derive(Clone, PartialEq, Eq)]
struct Pem(Arc<[u8]>);

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pem(..)")
    }
}

impl TlsSettings {
    /// A file of certificates: a server's has to be signed by one of these. Without it, and without
    /// [`ca_pem`](Self::ca_pem), by one that the system trusts.
    #[must_use]
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// The same as bytes. As data there is only [`ca_file`](Self::ca_file).
    #[must_use]
    pub fn ca_pem(mut self, certificates: impl AsRef<[u8]>) -> Self {
        self.ca_pem = Some(Pem(certificates.as_ref().into()));
        self
    }

    /// Whether what the system trusts is good beside certificates of one's own; not by default. Without
    /// those it is in any case. The environment variables `SSL_CERT_FILE` and `SSL_CERT_DIR` say where
    /// the system's are, if they are elsewhere.
    #[must_use]
    pub fn system_roots(mut self, trusted: bool) -> Self {
        self.system_roots = trusted;
        self
    }

    /// A file of this client's certificate, and those between it and one that the server trusts. None by
    /// default. Needs [`client_key_file`](Self::client_key_file).
    #[must_use]
    pub fn client_cert_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.client_cert_file = Some(path.into());
        self
    }

    /// A file of the key of [`client_cert_file`](Self::client_cert_file): PKCS#8, PKCS#1 or SEC1, not
    /// encrypted.
    #[must_use]
    pub fn client_key_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.client_key_file = Some(path.into());
        self
    }

    /// The certificate and the key as bytes, instead of files. As data there are only files.
    #[must_use]
    pub fn client_pem(mut self, certificates: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        let (certificates, key) = (certificates.as_ref().into(), key.as_ref().into());
        self.client_pem = Some((Pem(certificates), Pem(key)));
        self
    }

    /// The name or IP that every server's certificate must be for. By default it is the host as it is
    /// written in the node's address, so it is needed for nodes on Unix sockets, and for those that are
    /// written as an IP that is not in their certificate, as are all that
    /// [are found by a DNS name](crate::discovery).
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// How long connecting may take, the handshake and the server's first answer included. By default as
    /// long as [`ClientBuilder::connect_timeout`](crate::ClientBuilder::connect_timeout) says, over which
    /// this goes; and 250 ms if that says nothing, since a handshake takes longer than a plain connect, or
    /// what a [connector of one's own](crate::Connector::connect_timeout) below it says, if that is longer.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// What can be told without a file, and without the feature.
    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        if cfg!(not(feature = "tls")) {
            return Err(Invalid::new("tls", "needs the feature `tls`"));
        }
        let zero = self
            .connect_timeout
            .is_some_and(|timeout| timeout.is_zero());
        not_zero("tls.connect_timeout", zero)?;
        let (cert, key) = (&self.client_cert_file, &self.client_key_file);
        let why = match (cert, key) {
            (Some(_), None) => "needs client_key_file",
            (None, Some(_)) => "needs client_cert_file",
            (Some(_), Some(_)) if self.client_pem.is_some() => "is given as bytes as well",
            _ => return Ok(()),
        };
        let setting = match cert {
            Some(_) => "tls.client_cert_file",
            None => "tls.client_key_file",
        };
        Err(Invalid::new(setting, why))
    }
}
