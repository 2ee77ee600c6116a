//! From requests to sockets.
//!
//! [`Transport`] is one node's: it asks the server in whichever protocol that speaks, over
//! [`Pipelined`] connections (the meta protocol: many requests share few of them) or over the pool of
//! `classic` ones (one request at a time each). A [`Connector`] makes the byte streams, to the place
//! an [`Address`] names; the `greeting` finds out who is there; what comes of it all is told to an
//! `Observer`, and connections that were given up with writes unanswered `linger`.

mod address;
#[cfg(feature = "classic")]
mod classic;
mod connector;
mod credentials;
mod dispatch;
mod greeting;
mod linger;
mod observer;
mod pipelined;
mod protocol;
mod site;
mod socket;
mod tls;

pub use address::Address;
#[cfg(all(feature = "classic", feature = "testing"))]
#[doc(hidden)]
pub use classic::fuzz_classic_reply;
pub use connector::{BoxStream, ByteStream, Connecting, Connector, SystemConnector};
pub use credentials::Credentials;
pub use dispatch::{Transport, TransportFuture};
pub(crate) use observer::{ConnectFailure, Event, Observer};
pub use pipelined::{Pipelined, PipelinedFuture, PipelinedSettings};
pub use protocol::Protocol;
pub(crate) use site::Parts;
pub use socket::SocketSettings;
#[cfg(feature = "tls")]
pub use tls::TlsConnector;
pub use tls::TlsSettings;
