//! The bulkhead: so many at once, so many waiting behind them, each for so long, and nobody else.
//!
//! [`Limit`] is the core, without time: a node has one for its requests in flight. A [`Room`] is one
//! that is shared, and gives out places: what guards a database has one for its loads. The
//! [`BulkheadLayer`] puts one around any service: a functional group is built on it.

mod layer;
mod limit;
#[cfg(test)]
mod limit_tests;
mod room;
#[cfg(test)]
mod tests;

pub use self::layer::{Bulkhead, BulkheadFuture, BulkheadLayer};
pub(crate) use self::limit::Limit;
pub(crate) use self::room::{Limits, Place, Room};

/// What [`limit`] synchronises with.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    pub(super) use std::sync::{Mutex, MutexGuard};
}
