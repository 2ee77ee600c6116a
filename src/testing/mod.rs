//! Servers to test against: an in-process memcached that fails on demand, and real memcached processes.
//!
//! A cache client is tested by what it does when the cache misbehaves. Two tools make it misbehave:
//!
//! - [`Server`] is a memcached inside the test process. It answers like memcached 1.6.18, byte for byte, and can be told
//!   at run time to hang, to be late, to refuse, to close or reset connections, to cut replies short, or to answer
//!   nonsense. It needs nothing installed, starts in microseconds, works over in-memory streams under tokio's paused
//!   clock, and says how many connections and which commands it saw. Use it for most tests.
//! - [`Memcached`] is a real memcached process on a free port of the loopback interface, which can be stopped,
//!   continued, killed and restarted. Use it to learn whether memcached itself behaves as you think.
//!
//! A chaos test runs the calls under test, changes the faults of the [`Server`] in between, and asserts what must always
//! hold: every call ends in time, a miss or a fallback rather than somebody else's value, and full service soon after
//! [`Server::heal`].
//!
//! ```
//! use std::time::Duration;
//!
//! use tower_memcached::testing::Server;
//!
//! # #[tokio::main]
//! # async fn main() -> std::io::Result<()> {
//! let server = Server::new();
//! let address = server.listen().await?;
//! // ... point the code under test at `address` ...
//! server.stall(); // hangs
//! server.resume();
//! server.delay_every(2, Duration::from_millis(300)); // half of the replies are late
//! server.refuse(); // ECONNREFUSED
//! server.accept()?;
//! server.close_after_bytes(3); // every reply breaks off
//! server.rewrite_replies(|_, reply| [reply.clone(), reply].concat()); // every reply comes twice
//! server.heal()?;
//! assert_eq!(server.address(), Some(address));
//! # Ok(())
//! # }
//! ```

mod memcached;
mod proxy;
mod server;

pub use self::memcached::{Memcached, NotInstalled};
pub use self::proxy::{Ending, Flow, Proxy, Toxics};
#[doc(hidden)]
pub use self::server::fuzz_server_parser;
pub use self::server::{Admission, Server, ServerBuilder};
