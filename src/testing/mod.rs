//! What to test against: an in-process memcached that fails on demand, a network that does, and real memcached processes.
//!
//! A cache client is tested by what it does when the cache misbehaves. Three tools make it misbehave:
//!
//! - [`Server`] is a memcached inside the test process. It answers like memcached 1.6.18, byte for byte, and can be told
//!   at run time to hang, to be late, to refuse, to close or reset connections, to cut replies short, or to answer
//!   nonsense. It needs nothing installed, starts in microseconds, works over in-memory streams under tokio's paused
//!   clock, and says how many connections and which commands it saw. Use it for most tests.
//! - [`Proxy`] is a network between a client and any server on TCP. It adds latency or loses packets in either
//!   direction, narrows the bandwidth, cuts the stream into slices, corrupts it, closes half of it, or resets it, at run
//!   time and without either side's help. Use it for what no server does: replies that are lost after the write was
//!   executed, writes that arrive long after their client gave up, the end of one direction only.
//! - [`Memcached`] is a real memcached process on a free port of the loopback interface, or a Unix socket, with TLS or
//!   passwords if need be, which can be stopped, continued, killed and restarted. Use it to learn whether memcached itself behaves as you think.
//!
//! A chaos test runs the calls under test, changes the faults of the [`Server`] or the [`Proxy`] in between, and asserts
//! what must always hold: every call ends in time, a miss or a fallback rather than somebody else's value, and full
//! service soon after [`Server::heal`] or [`Proxy::heal`].
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
//!
//! # A chaos test
//!
//! One of a network that misbehaves, to be grown with calls and toxics of your own:
//!
//! ```
//! use std::time::Duration;
//!
//! use tokio::time::{Instant, sleep, timeout};
//! use tower_memcached::testing::{Ending, Flow, Proxy, Server, Toxics};
//! use tower_memcached::{Client, Ttl};
//!
//! const DEADLINE: Duration = Duration::from_millis(100);
//! // What a busy machine may add.
//! const SLACK: Duration = Duration::from_secs(2);
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::new();
//! let proxy = Proxy::listen(server.listen().await?).await?;
//! let client = Client::builder()
//!     .nodes([proxy.address().to_string()])
//!     .timeout(DEADLINE)
//!     .build()?;
//! client.set("user:1", "Ada", Ttl::secs(60)).await?;
//!
//! let ms = Duration::from_millis;
//! for (flow, toxics) in [
//!     (Flow::Both, Toxics::new().latency(ms(1), ms(5))),
//!     (Flow::Both, Toxics::new().slice(1, ms(0))),
//!     (Flow::Upstream, Toxics::new().blackhole()),
//!     (Flow::Downstream, Toxics::new().blackhole()),
//!     (Flow::Downstream, Toxics::new().late_every(3, ms(200))),
//!     (Flow::Downstream, Toxics::new().limit_data(7, Ending::Close)),
//!     (Flow::Both, Toxics::new().limit_chunks(2, Ending::Reset)),
//! ] {
//!     proxy.set(flow, toxics);
//!     for _ in 0..10 {
//!         let began = Instant::now();
//!         // An error or a miss is what a cache may answer at any time. Another value is not.
//!         if let Ok(Some(name)) = client.get("user:1").await {
//!             assert_eq!(name, "Ada");
//!         }
//!         assert!(began.elapsed() < DEADLINE + SLACK, "late under {toxics:?}");
//!     }
//!
//!     proxy.heal()?;
//!     let recovered = async {
//!         while client.get("user:1").await.is_err() {
//!             sleep(ms(5)).await;
//!         }
//!     };
//!     timeout(Duration::from_secs(10), recovered).await?;
//! }
//! # Ok(())
//! # }
//! ```

mod memcached;
mod proxy;
mod server;

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpSocket;

pub use self::memcached::{Memcached, MemcachedBuilder, NotInstalled};
pub use self::proxy::{Ending, Flow, Proxy, Toxics};
#[doc(hidden)]
pub use self::server::fuzz_server_parser;
pub use self::server::{Admission, Dialect, Server, ServerBuilder};

/// Connections that the kernel keeps until they are accepted, as tokio has it.
const BACKLOG: u32 = 1_024;

/// A socket for `address` that does not listen yet. Nobody else gets its port.
fn reserve(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // There may be connections of a listener that was here before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}
