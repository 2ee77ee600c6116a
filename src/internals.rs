//! What benches measure and is not public, in thin wrappers. Not part of the public interface.

use bytes::BytesMut;

use crate::cluster::ring::Continuum;
use crate::cluster::{NodeSpec, Ring};
use crate::key::Key;
use crate::protocol::{Parser, encode};
use crate::request::Operation;

/// Writes what is sent for an operation at the end of `out`, but for a large value.
pub fn encode_request(operation: &Operation, opaque: u32, out: &mut BytesMut) {
    let _large_value = encode(operation, opaque, out);
}

/// The reply parser, and what has been received for it.
pub struct Replies {
    parser: Parser,
    received: BytesMut,
}

impl Replies {
    /// For values of up to so many bytes.
    #[must_use]
    pub fn new(max_value: usize) -> Self {
        Self {
            parser: Parser::new(max_value),
            received: BytesMut::new(),
        }
    }

    /// Receives these, and says how many replies they made whole.
    ///
    /// # Panics
    /// If they are none.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        self.received.extend_from_slice(bytes);
        let mut replies = 0;
        loop {
            match self.parser.parse(&mut self.received) {
                Ok(Some(_reply)) => replies += 1,
                Ok(None) => return replies,
                Err(violation) => panic!("{violation}"),
            }
        }
    }
}

/// A ring with nodes on it.
pub struct Placed(Continuum);

impl Placed {
    /// These nodes on that ring.
    #[must_use]
    pub fn new(ring: &Ring, nodes: &[NodeSpec]) -> Self {
        Self(ring.place(nodes))
    }

    /// The index of the node that a key belongs to.
    #[must_use]
    pub fn primary(&self, key: &Key) -> usize {
        self.0.primary(key.as_bytes())
    }
}
