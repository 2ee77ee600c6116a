//! [`Proxy`]: a network that misbehaves, between a client and whatever listens on TCP.
//!
//! The state of the proxy is one value in a watch channel. Each connection is a task with a `pump` for each direction,
//! which applies the `toxics`. What happens once ("reset the connections now") is a counter in that state: a connection
//! obeys when it is no longer what it was when the connection began.

mod pump;
mod toxics;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;

use self::pump::Pump;
use self::toxics::Gate;
pub use self::toxics::{Ending, Flow, Toxics};
use super::{BACKLOG, reserve};

/// A TCP proxy on a port of 127.0.0.1 that makes the network between a client and a server misbehave.
///
/// What is wrong in a direction is its [`Toxics`]. They are set without `await`, from any thread, and hold at once for
/// open and new connections and for what is already on its way. Each connection has one to the server, so a client that
/// connects while the server refuses sees its connection accepted and then reset.
///
/// When this is dropped, the listener and all connections are closed.
///
/// # Example
///
/// ```
/// use std::time::Duration;
///
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use tokio::net::TcpStream;
/// use tower_memcached::testing::{Flow, Proxy, Server, Toxics};
///
/// # #[tokio::main]
/// # async fn main() -> std::io::Result<()> {
/// let server = Server::new();
/// let proxy = Proxy::listen(server.listen().await?).await?;
/// let mut stream = TcpStream::connect(proxy.address()).await?;
///
/// // Only replies do not come through: the write is executed, and the client does not know.
/// proxy.set(Flow::Downstream, Toxics::new().blackhole());
/// stream.write_all(b"set greeting 0 0 5\r\nhello\r\n").await?;
/// let mut reply = [0; 8];
/// let answer = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut reply)).await;
/// assert!(answer.is_err());
/// assert_eq!(server.peek("greeting").unwrap(), "hello");
///
/// // The network is back, and so is the reply.
/// proxy.heal()?;
/// stream.read_exact(&mut reply).await?;
/// assert_eq!(&reply, b"STORED\r\n");
/// # Ok(())
/// # }
/// ```
pub struct Proxy {
    address: SocketAddr,
    runtime: Handle,
    state: watch::Sender<State>,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards what connects to `upstream`, in tasks on the current runtime.
    ///
    /// # Errors
    ///
    /// When no port can be bound.
    pub async fn listen(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (state, receiver) = watch::channel(State {
            upstream,
            resets_new: false,
            lanes: Default::default(),
            closes: 0,
            resets: 0,
        });
        let shared = Arc::new(Shared {
            port: Mutex::new(Port::Listening(listener)),
            counters: Counters::default(),
        });
        tokio::spawn(accept_connections(Arc::clone(&shared), receiver));
        Ok(Self {
            address,
            runtime: Handle::current(),
            state,
            shared,
        })
    }

    /// Where it listens, even while it [refuses](Self::refuse) connections.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects new connections to another server. Open ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        self.state.send_modify(|state| state.upstream = upstream);
    }
}

/// Faults. [`heal`](Self::heal) ends them all.
impl Proxy {
    /// Replaces the toxics of one direction, or of both; none, by [`Toxics::new`], is a sound network.
    pub fn set(&self, flow: Flow, toxics: Toxics) {
        self.state.send_modify(|state| {
            for lane in &mut state.lanes[flow.lanes()] {
                lane.toxics = toxics;
                lane.generation += 1;
            }
        });
    }

    /// Stops listening, so that connects fail with `ECONNREFUSED`. The port stays reserved, and open connections stay
    /// open.
    pub fn refuse(&self) {
        let mut port = self.shared.port();
        if matches!(*port, Port::Listening(_)) {
            // Closed before its port is bound again.
            *port = Port::Closed;
            if let Ok(socket) = reserve(self.address) {
                *port = Port::Reserved(socket);
            }
        }
    }

    /// Resets new connections as soon as they are accepted.
    pub fn reset_new(&self) {
        self.state.send_modify(|state| state.resets_new = true);
    }

    /// Serves new connections again, on the same port as before: ends [`refuse`](Self::refuse) and
    /// [`reset_new`](Self::reset_new).
    ///
    /// # Errors
    ///
    /// When the port has been taken by somebody else meanwhile.
    pub fn accept(&self) -> io::Result<()> {
        let mut port = self.shared.port();
        let socket = match std::mem::replace(&mut *port, Port::Closed) {
            Port::Closed => Some(reserve(self.address)?),
            Port::Reserved(socket) => Some(socket),
            listening @ Port::Listening(_) => {
                *port = listening;
                None
            }
        };
        if let Some(socket) = socket {
            let _context = self.runtime.enter();
            *port = Port::Listening(socket.listen(BACKLOG)?);
        }
        drop(port);
        // This wakes the accepting task, too.
        self.state.send_modify(|state| state.resets_new = false);
        Ok(())
    }

    /// Closes all open connections on both sides (FIN). What was on its way is lost.
    pub fn close_connections(&self) {
        self.state.send_modify(|state| state.closes += 1);
    }

    /// Resets all open connections on both sides (RST): the peers see `ECONNRESET`. What was on its way is lost.
    pub fn reset_connections(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }

    /// Ends the stream in one direction of all open connections, after what is already on its way: the receiver sees the
    /// end (FIN), and what the sender goes on to send is lost. The other direction stays open.
    pub fn half_close(&self, flow: Flow) {
        self.state.send_modify(|state| {
            for lane in &mut state.lanes[flow.lanes()] {
                lane.half_closes += 1;
            }
        });
    }

    /// Ends all faults: no toxics, and new connections are served. Connections that were closed stay closed.
    ///
    /// # Errors
    ///
    /// When the proxy had refused connections and its port has been taken by somebody else meanwhile.
    pub fn heal(&self) -> io::Result<()> {
        self.set(Flow::Both, Toxics::new());
        self.accept()
    }
}

/// Observation.
impl Proxy {
    /// How many connections were ever accepted, whatever became of them.
    pub fn connections_accepted(&self) -> u64 {
        self.shared.counters.accepted.load(Ordering::SeqCst)
    }

    /// How many connections are open. One whose client has closed it counts until the server has closed it too, which
    /// takes until the end of a [blackhole](Toxics::blackhole).
    pub fn open_connections(&self) -> usize {
        self.shared.counters.open.load(Ordering::SeqCst)
    }

    /// How many bytes arrived in this direction, on all connections there ever were.
    pub fn bytes_received(&self, flow: Flow) -> u64 {
        sum(&self.shared.counters.received[flow.lanes()])
    }

    /// How many bytes were sent on in this direction, on all connections there ever were.
    pub fn bytes_forwarded(&self, flow: Flow) -> u64 {
        sum(&self.shared.counters.forwarded[flow.lanes()])
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.borrow();
        formatter
            .debug_struct("Proxy")
            .field("address", &self.address)
            .field("upstream", &state.upstream)
            .field("open_connections", &self.open_connections())
            .field("toxics", &[state.lanes[0].toxics, state.lanes[1].toxics])
            .finish_non_exhaustive()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *self.shared.port() = Port::Closed;
        // All tasks end with the state, which is dropped next.
    }
}

/// What the handle wants.
#[derive(Debug)]
struct State {
    upstream: SocketAddr,
    resets_new: bool,
    lanes: [Lane; 2],
    closes: u64,
    resets: u64,
}

/// What it wants of one direction.
#[derive(Debug, Default)]
struct Lane {
    toxics: Toxics,
    /// How often the toxics were set.
    generation: u64,
    half_closes: u64,
}

/// The listening socket. It lives here and not in the accepting task, so that [`Proxy::refuse`] closes it at once.
enum Port {
    Listening(TcpListener),
    /// Bound, so that nobody else gets the port, and not listening.
    Reserved(TcpSocket),
    Closed,
}

/// What the handle and the tasks share.
struct Shared {
    port: Mutex<Port>,
    counters: Counters,
}

impl Shared {
    /// A panic leaves no port half changed.
    fn port(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Counters {
    accepted: AtomicU64,
    open: AtomicUsize,
    received: [AtomicU64; 2],
    forwarded: [AtomicU64; 2],
    chunks: [AtomicU64; 2],
}

/// A connection from a client.
struct Connection {
    number: u64,
    client: TcpStream,
    state: watch::Receiver<State>,
    /// Counters of orders, as of when it began.
    closes: u64,
    resets: u64,
    half_closes: [u64; 2],
    /// Dropped last, when the sockets are closed.
    registration: Registration,
}

/// A connection's place among the open ones.
struct Registration {
    shared: Arc<Shared>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared.counters.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connection {
    async fn run(mut self) {
        let mut ordered = pin!(ordered_ending(self.state.clone(), self.closes, self.resets));
        let mut connecting = pin!(connect(self.state.clone()));
        let connected = tokio::select! {
            biased;
            ending = &mut ordered => {
                end(ending, self.client).await;
                // The server may have accepted already.
                if let Some(server) = connecting.await {
                    end(ending, server).await;
                }
                return;
            }
            connected = &mut connecting => connected,
        };
        let Some(mut server) = connected else {
            // The client gets to know if anything comes back at all.
            let passes = |state: &State| state.lanes[1].toxics.gate == Gate::Open;
            let ending = tokio::select! {
                biased;
                ending = ordered => ending,
                _ = self.state.wait_for(passes) => Ending::Reset,
            };
            return end(ending, self.client).await;
        };
        let was_reset = Default::default();
        let pump = |lane| {
            let half_closes = self.half_closes[lane];
            let (state, counters) = (self.state.clone(), &self.registration.shared.counters);
            Pump::new(lane, self.number, state, half_closes, counters, &was_reset)
        };
        let (upstream, downstream) = (pump(0), pump(1));
        let (from_client, to_client) = self.client.split();
        let (from_server, to_server) = server.split();
        let ending = tokio::select! {
            biased;
            ending = ordered => ending,
            ended = async {
                tokio::try_join!(
                    upstream.run(from_client, to_server),
                    downstream.run(from_server, to_client),
                )
            } => ended.err().unwrap_or(Ending::Close),
        };
        end(ending, self.client).await;
        end(ending, server).await;
    }
}

/// Accepts until the proxy is dropped, over however many listeners.
async fn accept_connections(shared: Arc<Shared>, mut state: watch::Receiver<State>) {
    loop {
        let accepted = std::future::poll_fn(|context| match &*shared.port() {
            Port::Listening(listener) => listener.poll_accept(context),
            Port::Reserved(_) | Port::Closed => Poll::Pending,
        });
        let accepted = tokio::select! {
            biased;
            changed = state.changed() => match changed {
                // There may be another listener.
                Ok(()) => continue,
                Err(_) => return,
            },
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((client, _)) => serve(&shared, &state, client),
            // Out of file descriptors, most likely: others need time to close some.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

fn serve(shared: &Arc<Shared>, state: &watch::Receiver<State>, client: TcpStream) {
    let counters = &shared.counters;
    let now = state.borrow();
    if now.resets_new {
        // Failing that, the peer sees an ordinary close.
        let _ = client.set_zero_linger();
        counters.accepted.fetch_add(1, Ordering::SeqCst);
        return;
    }
    // What is forwarded must not wait for more.
    let _ = client.set_nodelay(true);
    // Counted while the state cannot change: whoever sees it and closes all connections closes this one.
    counters.open.fetch_add(1, Ordering::SeqCst);
    let connection = Connection {
        number: counters.accepted.fetch_add(1, Ordering::SeqCst) + 1,
        client,
        state: state.clone(),
        closes: now.closes,
        resets: now.resets,
        half_closes: [now.lanes[0].half_closes, now.lanes[1].half_closes],
        registration: Registration {
            shared: Arc::clone(shared),
        },
    };
    tokio::spawn(connection.run());
}

/// Waits for an order that ends all connections.
async fn ordered_ending(mut state: watch::Receiver<State>, closes: u64, resets: u64) -> Ending {
    let is_ordered = |state: &State| state.closes != closes || state.resets != resets;
    match state.wait_for(is_ordered).await {
        Ok(state) if state.resets != resets => Ending::Reset,
        // Closed, or the handle is gone.
        _ => Ending::Close,
    }
}

/// Connects to the server, unless that fails or the handle is gone.
async fn connect(mut state: watch::Receiver<State>) -> Option<TcpStream> {
    let upstream = state.borrow().upstream;
    tokio::select! {
        server = TcpStream::connect(upstream) => {
            let server = server.ok()?;
            // As with the client.
            let _ = server.set_nodelay(true);
            Some(server)
        }
        _ = state.wait_for(|_| false) => None,
    }
}

/// Ends the stream like this.
async fn end(ending: Ending, mut stream: TcpStream) {
    // Failing that, the peer has gone or sees an ordinary close.
    let _ = match ending {
        Ending::Reset => stream.set_zero_linger(),
        // Dropping it alone would send RST if there is something unread.
        Ending::Close | Ending::HalfClose => stream.shutdown().await,
    };
}

fn sum(counters: &[AtomicU64]) -> u64 {
    counters
        .iter()
        .map(|counter| counter.load(Ordering::SeqCst))
        .sum()
}
