//! Database fallback: what the cache does not have, or cannot give, is loaded and put back.
//!
//! Loads are coalesced: of all who miss on a key in this process at once, one loads. With
//! [`Client::get_or_load`](crate::Client::get_or_load) the loader is a closure of the caller's;
//! [`ReadThroughLayer`] puts a shared [`Loader`] under a whole stack. Both are the same engine
//! (`flight.rs`).
//!
//! A value that is loaded is given to everybody who waits before it is written to the cache; a
//! write that fails costs the next reader a load and is counted
//! ([`telemetry::REFILLS_FAILED`](crate::telemetry::REFILLS_FAILED)).

mod flight;
mod layer;

pub(crate) use flight::Flights;
pub use layer::{Loader, ReadThrough, ReadThroughLayer};

use crate::error::{ErrorKind, Result};
use crate::value::Value;

/// What a read of the cache settles by itself: hits, and errors that a load cannot mend. A miss
/// and a failing cache are for the loader.
pub(crate) fn settled(cached: Result<Option<Value>>) -> Option<Result<Option<Value>>> {
    match cached {
        Ok(Some(value)) => Some(Ok(Some(value))),
        Ok(None) => None,
        Err(error) if error.is_caller_mistake() && error.kind() != ErrorKind::ValueTooLarge => {
            Some(Err(error))
        }
        Err(error) if error.kind() == ErrorKind::Shutdown => Some(Err(error)),
        Err(_) => None,
    }
}
