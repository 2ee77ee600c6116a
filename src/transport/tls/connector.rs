//! [`TlsConnector`]: encrypted streams over another connector's.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::{CONNECT_TIMEOUT, TlsSettings};
use crate::error::{Error, Invalid, Result};
use crate::transport::{Address, BoxStream, Connecting, Connector};

/// TLS over the streams of another [`Connector`], by rustls.
///
/// [`ClientBuilder::tls`](crate::ClientBuilder::tls) puts it around the client's connector; made by hand it
/// is for stacks made by hand, and goes around a connector of one's own.
///
/// The handshake is part of the connect. A certificate that is not trusted, has expired or is for somebody
/// else fails it, and counts against the node as any failed connect.
#[derive(Clone)]
pub struct TlsConnector {
    inner: Arc<dyn Connector>,
    config: Arc<ClientConfig>,
    server_name: Option<ServerName<'static>>,
    connect_timeout: Duration,
}

impl TlsConnector {
    /// Reads the files that the settings name. Blocks for as long as that takes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if a file cannot be
    /// read, is not what it should be, or there is no certificate to trust.
    pub fn new(inner: impl Connector, settings: &TlsSettings) -> Result<Self> {
        Self::over(Arc::new(inner), settings).map_err(Error::from)
    }

    pub(crate) fn over(inner: Arc<dyn Connector>, settings: &TlsSettings) -> Result<Self, Invalid> {
        settings.validate()?;
        let named = settings.server_name.clone().map(ServerName::try_from);
        let named = named.transpose();
        // What needs longer than that without TLS does with it, too.
        let own_timeout = inner.connect_timeout().unwrap_or_default();
        let connect_timeout = CONNECT_TIMEOUT.max(own_timeout);
        Ok(Self {
            inner,
            config: Arc::new(settings.client_config()?),
            server_name: named
                .map_err(|_| Invalid::new("tls.server_name", "is no name of a host, and no IP"))?,
            connect_timeout: settings.connect_timeout.unwrap_or(connect_timeout),
        })
    }
}

impl fmt::Debug for TlsConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnector")
            .field("server_name", &self.server_name)
            .field("connect_timeout", &self.connect_timeout)
            .finish_non_exhaustive()
    }
}

impl Connector for TlsConnector {
    fn connect(&self, address: &Address) -> Connecting {
        let name = match &self.server_name {
            Some(name) => Ok(name.clone()),
            None => server_name(address),
        };
        let connecting = self.inner.connect(address);
        let tls = tokio_rustls::TlsConnector::from(self.config.clone());
        Box::pin(async move {
            let name = name?;
            let stream = Beginning::of(connecting.await?);
            match tls.connect(name, stream).into_fallible().await {
                Ok(stream) => Ok(Box::new(stream) as BoxStream),
                Err((_, stream)) if stream.says_that_it_is_full() => Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "Too many open connections",
                )),
                Err((error, _)) => Err(io::Error::new(error.kind(), Handshake(error))),
            }
        })
    }

    fn connect_timeout(&self) -> Option<Duration> {
        Some(self.connect_timeout)
    }
}

/// Whom a certificate must be for.
fn server_name(address: &Address) -> io::Result<ServerName<'static>> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    let Some((host, _)) = address.host_and_port() else {
        return Err(invalid(
            "TLS over a Unix socket needs the name that its certificate is for (server_name)",
        ));
    };
    let name = ServerName::try_from(host.to_owned());
    name.map_err(|_| invalid("no certificate can be for a host of that name (server_name)"))
}

/// A handshake that failed.
#[derive(Debug)]
struct Handshake(io::Error);

impl fmt::Display for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the TLS handshake failed: {}", self.0)
    }
}

impl std::error::Error for Handshake {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

impl TlsSettings {
    fn client_config(&self) -> Result<ClientConfig, Invalid> {
        // Ours, whatever the process has installed.
        let provider = Arc::new(ring::default_provider());
        let unsupported = |error: rustls::Error| Invalid::new("tls", error.to_string());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unsupported)?
            .with_root_certificates(self.roots()?);
        let (certificates, key) = match (
            &self.client_pem,
            &self.client_cert_file,
            &self.client_key_file,
        ) {
            (Some((certificates, key)), ..) => (Cow::from(&*certificates.0), Cow::from(&*key.0)),
            (None, Some(certificates), Some(key)) => (
                read("tls.client_cert_file", certificates)?,
                read("tls.client_key_file", key)?,
            ),
            _ => return Ok(config.with_no_client_auth()),
        };
        let certificates = parse("tls.client_cert_file", &certificates)?;
        // Not even what is wrong with a key is said.
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| {
            let why = "has no key that can be read: PKCS#8, PKCS#1 or SEC1, not encrypted";
            Invalid::new("tls.client_key_file", why)
        })?;
        let config = config.with_client_auth_cert(certificates, key);
        config.map_err(|error| {
            let why = format!("does not do with its certificate: {error}");
            Invalid::new("tls.client_key_file", why)
        })
    }

    fn roots(&self) -> Result<RootCertStore, Invalid> {
        let mut roots = RootCertStore::empty();
        let file = self.ca_file.as_deref();
        let file = file.map(|path| read("tls.ca_file", path)).transpose()?;
        let bytes = self.ca_pem.as_ref().map(|pem| Cow::from(&*pem.0));
        let own = [file, bytes];
        for pem in own.iter().flatten() {
            for certificate in parse("tls.ca_file", pem)? {
                let added = roots.add(certificate);
                added.map_err(|error| Invalid::new("tls.ca_file", error.to_string()))?;
            }
        }
        if self.system_roots || own.iter().all(Option::is_none) {
            let system = rustls_native_certs::load_native_certs();
            let (added, _unusable) = roots.add_parsable_certificates(system.certs);
            if added == 0 {
                let why = match system.errors.first() {
                    Some(error) => format!("the system has none: {error}"),
                    None => "the system has none".to_owned(),
                };
                return Err(Invalid::new("tls.system_roots", why));
            }
        }
        Ok(roots)
    }
}

fn read(setting: &str, path: &Path) -> Result<Cow<'static, [u8]>, Invalid> {
    let read = fs::read(path).map(Cow::from);
    read.map_err(|error| Invalid::new(setting, format!("{}: {error}", path.display())))
}

fn parse(setting: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Invalid> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(Invalid::new(setting, "is no PEM with certificates")),
    }
}

/// What memcached says in plain text, whatever it was to speak, when it has all the connections that it
/// can take.
const FULL: &[u8] = b"ERROR Too many open connections";

/// A stream that remembers what it began with.
struct Beginning {
    stream: BoxStream,
    bytes: [u8; FULL.len()],
    length: usize,
}

impl Beginning {
    fn of(stream: BoxStream) -> Self {
        Self {
            stream,
            bytes: [0; FULL.len()],
            length: 0,
        }
    }

    fn says_that_it_is_full(&self) -> bool {
        self.bytes == FULL
    }
}

impl AsyncRead for Beginning {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let length = self.length;
        if length < FULL.len() {
            let read = &into.filled()[before..];
            let read = &read[..read.len().min(FULL.len() - length)];
            self.bytes[length..length + read.len()].copy_from_slice(read);
            self.length += read.len();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Beginning {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
