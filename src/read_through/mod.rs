//! Database fallback: what the cache does not have, or cannot give, is loaded and put back; and
//! however bad the cache's day is, the database sees a bounded number of loads at once, and if you say
//! which, a bounded rate of them.
//!
//! [`Client::get_or_load`](crate::Client::get_or_load) and
//! [`get_many_or_load`](crate::Client::get_many_or_load) load with a closure of the caller's;
//! [`ReadThroughLayer`] puts a shared [`Loader`] under a whole stack. All are the same engine
//! (`engine`), and [`ReadThroughSettings`] are the same for all:
//!
//! - of all who miss on a key in this process at once one loads (`flight.rs`), and with leases of all
//!   processes one;
//! - a [`LoadGuard`] limits the loads at once and their rate, and sheds them when the database fails;
//! - what was loaded is written behind the answer, unless the key was written or invalidated during
//!   the load ([`Client::invalidate`](crate::Client::invalidate));
//! - a value that is old may stand in while it is loaded anew, or if it cannot be loaded.
//!
//! `docs/DATABASE_FALLBACK.md` says how to choose the settings.

mod blocking;
mod elsewhere;
mod engine;
mod flight;
mod freshness;
mod guard;
mod layer;
mod loads;
mod settings;

pub use blocking::BlockingLoader;
pub use engine::Cache;
pub(crate) use engine::{Engine, Means, Query};
pub use guard::{LoadGuard, LoadLimits, LoadStatus, LoadsShed};
pub use layer::{Loader, ReadThrough, ReadThroughLayer};
pub(crate) use loads::Loads;
pub use settings::ReadThroughSettings;
