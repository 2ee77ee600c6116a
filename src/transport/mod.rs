//! From requests to sockets.
//!
//! [`Pipelined`] is the transport: many requests share few connections, each connection one task
//! on the I/O executor. A [`Connector`] makes the byte streams, to the place an [`Address`] names.

mod address;
mod connector;
mod pipelined;

pub use address::Address;
pub use connector::{BoxStream, ByteStream, Connecting, Connector, SystemConnector};
pub(crate) use pipelined::{ConnectFailure, Event, Observer, Parts};
pub use pipelined::{Pipelined, PipelinedFuture, PipelinedSettings};
