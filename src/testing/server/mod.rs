//! [`Server`]: memcached 1.6.18 inside the test process, with faults that are set at run time.
//!
//! `parser` cuts the stream into requests, with all of memcached's traps; `command`, `meta` and `literal` read a line;
//! `manner` is what the server pretends to be; `store` holds the items; `execute` runs a command against the store and words the reply; `connection` moves bytes
//! and applies `faults`. The handle in this file ties them together. A conformance suite sends the same bytes to this
//! server and to a real memcached 1.6.18 and demands the same bytes back.

mod command;
mod connection;
mod execute;
mod faults;
mod literal;
mod manner;
mod meta;
mod parser;
#[cfg(test)]
mod round_trip;
mod socket;
mod store;

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use self::command::Request;
use self::execute::{Engine, Surroundings, Then};
pub use self::faults::Admission;
use self::faults::{Faults, Signal};
pub use self::manner::Dialect;
use self::manner::{Credentials, Manner};
#[doc(hidden)]
pub use self::parser::fuzz_server_parser;
use self::socket::{Accepted, Listener, Place};
use self::store::{Item, Store};

/// An in-process memcached that answers byte for byte like memcached 1.6.18, and fails on demand.
///
/// It serves TCP on the loopback interface ([`listen`](Self::listen)), a Unix socket
/// ([`listen_unix`](Self::listen_unix)) or any stream ([`serve`](Self::serve)), so it runs under tokio's paused clock too. All faults are set without `await`, from any thread, and hold at once for open and
/// future connections.
///
/// Clones are handles of the same server. When the last one is dropped, the listener and all connections are closed.
///
/// It speaks the classic text commands (`get gets gat gats set add replace append prepend cas delete incr decr touch
/// flush_all version verbosity stats quit`) and the meta commands (`mg ms md ma mn me`), or less, if it is to pretend to
/// be an older server or a proxy ([`set_dialect`](Self::set_dialect)). It has neither the binary protocol nor the
/// administration commands (`lru`, `slabs`, `watch` and so on, which answer `ERROR`), and `stats` shows a selection. What it evicts when memory runs out is arbitrary.
///
/// # Example
///
/// ```
/// use std::time::Duration;
///
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use tokio::net::TcpStream;
/// use tower_memcached::testing::Server;
///
/// # #[tokio::main]
/// # async fn main() -> std::io::Result<()> {
/// let server = Server::new();
/// let mut stream = TcpStream::connect(server.listen().await?).await?;
/// let mut reply = [0; 8];
///
/// stream.write_all(b"set greeting 0 0 5\r\nhello\r\n").await?;
/// stream.read_exact(&mut reply).await?;
/// assert_eq!(&reply, b"STORED\r\n");
/// assert_eq!(server.peek("greeting").unwrap(), "hello");
///
/// // Like SIGSTOP: the write arrives, and nothing answers.
/// server.stall();
/// stream.write_all(b"set greeting 0 0 3\r\nbye\r\n").await?;
/// let answer = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut reply)).await;
/// assert!(answer.is_err());
///
/// // Like SIGCONT: it is executed late.
/// server.resume();
/// stream.read_exact(&mut reply).await?;
/// assert_eq!(server.peek("greeting").unwrap(), "bye");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Server {
    handle: Arc<LastHandle>,
}

/// Settings of a [`Server`], from [`Server::builder`].
#[derive(Clone, Debug)]
#[must_use]
pub struct ServerBuilder {
    manner: Manner,
    largest_item: usize,
    memory_limit: usize,
    evictions: bool,
}

impl Server {
    /// A server with memcached's defaults. It neither does I/O nor needs a runtime.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Settings other than the defaults.
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            manner: Manner::default(),
            largest_item: 1 << 20,
            memory_limit: 64 << 20,
            evictions: true,
        }
    }

    /// Listens on a free port of 127.0.0.1 and serves what connects, in tasks on the current runtime.
    ///
    /// # Errors
    ///
    /// When the port cannot be bound, or the server listens already.
    pub async fn listen(&self) -> io::Result<SocketAddr> {
        self.listen_on(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
            .await
    }

    /// Listens on `address` and serves what connects, in tasks on the current runtime.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound, or the server listens already.
    pub async fn listen_on(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        self.listen_at(Place::Tcp(address), Listener::Tcp(listener))?;
        Ok(address)
    }

    /// Listens on a Unix socket that is made at `path`, and serves what connects, in tasks on the current runtime. The
    /// file is removed when the server is dropped or shut down.
    ///
    /// # Errors
    ///
    /// When there is a file already, the directory is missing, or the server listens already.
    pub async fn listen_unix(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let path = path.as_ref();
        let listener = Listener::Unix(UnixListener::bind(path)?);
        let place = Place::Unix(path.to_owned());
        self.listen_at(place.clone(), listener)
            .inspect_err(|_| place.remove())
    }

    fn listen_at(&self, place: Place, listener: Listener) -> io::Result<()> {
        let shared = &self.handle.shared;
        {
            let mut port = lock(&shared.port);
            if port.place.is_some() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "this server listens already",
                ));
            }
            *port = Port {
                place: Some(place),
                runtime: Some(Handle::current()),
                listener: Some(listener),
                ..Port::default()
            };
            // Whoever refuses connections before the server listens wants them refused afterwards.
            if shared.faults.borrow().admission == Admission::Refuse {
                port.refuse();
            }
        }
        tokio::spawn(accept_connections(Arc::clone(shared)));
        Ok(())
    }

    /// Where the server listens on TCP, even while it [refuses](Self::refuse) connections; `None` before it ever did.
    pub fn address(&self) -> Option<SocketAddr> {
        match &lock(&self.handle.shared.port).place {
            Some(Place::Tcp(address)) => Some(*address),
            Some(Place::Unix(_)) | None => None,
        }
    }

    /// Serves one connection over any stream; the future ends when the connection does. It does not keep the server
    /// alive: hold on to a handle.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the stream. What was executed stays executed.
    pub fn serve<S>(&self, stream: S) -> impl Future<Output = ()> + Send + 'static + use<S>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        connection::serve(Arc::clone(&self.handle.shared), stream, |_| {})
    }

    /// Closes the listener and all connections, for good.
    pub fn shutdown(&self) {
        self.handle.shared.shut_down();
    }

    /// What a crash and a restart leave: no items, CAS uniques from 1 again, and no connections. The listener goes on.
    /// Nothing sent on the old connections is executed any more.
    pub fn restart_empty(&self) {
        {
            let mut engine = lock(&self.handle.shared.engine);
            engine.store.restart();
            engine.epoch += 1;
        }
        self.signal(&Signal::Close);
    }
}

/// Faults. [`heal`](Self::heal) ends them all.
impl Server {
    /// Hangs like a process after SIGSTOP: connects succeed, bytes are taken by the kernel, nothing is executed or
    /// answered. What is sent meanwhile is executed after [`resume`](Self::resume), even if the sender has long closed
    /// the connection.
    pub fn stall(&self) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.stalled = true);
    }

    /// Ends [`stall`](Self::stall).
    pub fn resume(&self) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.stalled = false);
    }

    /// Sends every reply so much later, counted from the request's arrival; zero ends it. Requests are executed at once.
    pub fn delay(&self, by: Duration) {
        self.delay_every(1, by);
    }

    /// Sends every `nth` reply so much later, counted over all connections: with 2, half of them. What follows a late
    /// reply on the same connection waits for it. Zero, as either, ends it.
    pub fn delay_every(&self, nth: u32, by: Duration) {
        let delay = (nth > 0 && !by.is_zero()).then_some((nth, by));
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.delay = delay);
    }

    /// Stops listening, so that connects fail with `ECONNREFUSED`, and closes the open connections. The port is kept, so
    /// that nobody else gets it, and the file of a Unix socket stays.
    pub fn refuse(&self) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.admission = Admission::Refuse);
        lock(&self.handle.shared.port).refuse();
        self.signal(&Signal::Close);
    }

    /// Serves new connections again, on the same port as before.
    ///
    /// # Errors
    ///
    /// When the port has been taken by somebody else meanwhile.
    pub fn accept(&self) -> io::Result<()> {
        self.set_admission(Admission::Serve)
    }

    /// Decides what new connections meet. [`Admission::Refuse`] is the same as [`refuse`](Self::refuse); the others leave
    /// open connections alone.
    ///
    /// # Errors
    ///
    /// When the server has to listen again and the port has been taken by somebody else meanwhile.
    pub fn set_admission(&self, admission: Admission) -> io::Result<()> {
        if admission == Admission::Refuse {
            self.refuse();
            return Ok(());
        }
        let shared = &self.handle.shared;
        let mut locked = lock(&shared.port);
        let port = &mut *locked;
        if let (Some(place), Some(runtime), None) = (&port.place, &port.runtime, &port.listener)
            && !shared.faults.borrow().shut_down
        {
            let context = runtime.enter();
            let listener = place.listen_again(port.reserved.take())?;
            drop(context);
            port.listener = Some(listener);
            if let Some(waker) = port.waker.take() {
                waker.wake();
            }
        }
        drop(locked);
        shared
            .faults
            .send_modify(|faults| faults.admission = admission);
        Ok(())
    }

    /// Closes all open connections, as the kernel does for a process that was killed. Unsent replies are lost.
    pub fn close_connections(&self) {
        self.signal(&Signal::Close);
    }

    /// Resets all open connections: the peer sees `ECONNRESET`. A stream other than TCP is just dropped.
    pub fn reset_connections(&self) {
        self.signal(&Signal::Reset);
    }

    /// Cuts the next reply of each connection after so many bytes and closes the connection. It goes on, one reply for
    /// each connection, until [`heal`](Self::heal).
    pub fn close_after_bytes(&self, bytes: usize) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.cut = Some(bytes));
    }

    /// Sends `bytes` in the place of every reply.
    pub fn answer_garbage(&self, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.rewrite_replies(move |_, reply| {
            if reply.is_empty() {
                reply
            } else {
                bytes.to_vec()
            }
        });
    }

    /// Sends what `rewrite` makes of each request line (without CR LF) and its true reply: another opaque, another key,
    /// the reply twice, or none if the result is empty. The true reply is empty for `noreply` and quiet commands.
    pub fn rewrite_replies(
        &self,
        rewrite: impl Fn(&[u8], Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
    ) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| faults.rewrite = Some(Arc::new(rewrite)));
    }

    /// Sends `bytes` on all open connections, although nobody asked.
    pub fn unsolicited(&self, bytes: impl Into<Bytes>) {
        self.signal(&Signal::Push(bytes.into()));
    }

    /// Ends all faults: resumes, accepts, and answers truly and at once.
    ///
    /// # Errors
    ///
    /// When the server had refused connections and its port has been taken by somebody else meanwhile.
    pub fn heal(&self) -> io::Result<()> {
        self.handle.shared.faults.send_modify(|faults| {
            *faults = Faults {
                shut_down: faults.shut_down,
                admission: faults.admission,
                manner: Arc::clone(&faults.manner),
                ..Faults::default()
            };
        });
        self.accept()
    }

    fn signal(&self, signal: &Signal) {
        for connection in lock(&self.handle.shared.connections).values() {
            // A connection that just ended needs no signal.
            let _ = connection.send(signal.clone());
        }
    }
}

/// What the server pretends to be: other servers than memcached 1.6.18, set at run time like the faults, for all
/// connections from the next request on. [`heal`](Self::heal) changes nothing here.
impl Server {
    /// What `version` and `stats` answer. The behaviour follows as far as [`Dialect::Classic`] says; the meta commands
    /// stay those of 1.6.18.
    pub fn set_version(&self, version: impl Into<String>) {
        let version = version.into();
        self.change_manner(|manner| manner.version = version);
    }

    /// Which commands it understands: those of an older server, or of a proxy.
    pub fn set_dialect(&self, dialect: Dialect) {
        self.change_manner(|manner| manner.dialect = dialect);
    }

    /// Serves new connections only after they gave this user and password, as `memcached -Y` does: until a
    /// `set <any> <any> <any> <length>` whose value is `user password`, which is answered `STORED`, it answers every
    /// line with `CLIENT_ERROR unauthenticated`. Of several such answers in a row only the last is sent. Open
    /// connections stay as they are: see [`close_connections`](Self::close_connections).
    pub fn require_authentication(&self, user: impl Into<Bytes>, password: impl Into<Bytes>) {
        let credentials = Credentials {
            user: user.into(),
            password: password.into(),
        };
        self.change_manner(|manner| manner.credentials = Some(credentials));
    }

    /// Ends [`require_authentication`](Self::require_authentication) for new connections. Those that have not given
    /// their credentials yet still have to, but any will do.
    pub fn allow_everybody(&self) {
        self.change_manner(|manner| manner.credentials = None);
    }

    fn change_manner(&self, change: impl FnOnce(&mut Manner)) {
        self.handle
            .shared
            .faults
            .send_modify(|faults| change(Arc::make_mut(&mut faults.manner)));
    }
}

/// Observation.
impl Server {
    /// How many connections were ever accepted, whatever became of them.
    pub fn connections_accepted(&self) -> u64 {
        self.handle.shared.accepted.load(Ordering::SeqCst)
    }

    /// How many connections are open. One that the peer closed counts until the server notices, which it does not while
    /// stalled, nor on a [silent](Admission::Silent) connection.
    pub fn open_connections(&self) -> usize {
        lock(&self.handle.shared.connections).len()
    }

    /// How many commands were executed, wrong ones included.
    pub fn commands(&self) -> u64 {
        lock(&self.handle.shared.engine).executed
    }

    /// How many commands of this name, such as `mg`, were executed. Those that memcached does not know are "unknown".
    pub fn commands_named(&self, name: &str) -> u64 {
        lock(&self.handle.shared.engine)
            .by_name
            .get(name)
            .copied()
            .unwrap_or(0)
    }

    /// The last 1,024 request lines that were executed, oldest first, without CR LF and values.
    pub fn requests(&self) -> Vec<Bytes> {
        lock(&self.handle.shared.engine)
            .requests
            .iter()
            .cloned()
            .collect()
    }

    /// The live value of a key, given as its raw bytes even if clients send it as base64. Leaves no trace.
    pub fn peek(&self, key: impl AsRef<[u8]>) -> Option<Bytes> {
        lock(&self.handle.shared.engine)
            .store
            .peek(key.as_ref())
            .map(|item| item.value.clone())
    }

    /// Stores a value under a new CAS unique, with flags 0 and for ever.
    pub fn insert(&self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) {
        let item = Item::new(value.into(), 0, 0);
        lock(&self.handle.shared.engine)
            .store
            .link(&Bytes::copy_from_slice(key.as_ref()), item);
    }

    /// How many live items there are.
    pub fn len(&self) -> usize {
        lock(&self.handle.shared.engine).store.len()
    }

    /// Whether there are no live items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.handle.shared;
        formatter
            .debug_struct("Server")
            .field("place", &lock(&shared.port).place)
            .field("open_connections", &self.open_connections())
            .field("faults", &*shared.faults.borrow())
            .finish_non_exhaustive()
    }
}

impl ServerBuilder {
    /// What `version` answers, "1.6.18" by default: [`Server::set_version`].
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.manner.version = version.into();
        self
    }

    /// The commands it understands, [`Dialect::Meta`] by default: [`Server::set_dialect`].
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.manner.dialect = dialect;
        self
    }

    /// Lets in who gives this user and password, and nobody else; by default everybody is:
    /// [`Server::require_authentication`].
    pub fn authentication(mut self, user: impl Into<Bytes>, password: impl Into<Bytes>) -> Self {
        self.manner.credentials = Some(Credentials {
            user: user.into(),
            password: password.into(),
        });
        self
    }

    /// The largest item in bytes, 1 MiB by default. As in memcached, an item is its value and key and about 60 bytes.
    pub fn max_item_size(mut self, bytes: usize) -> Self {
        self.largest_item = bytes;
        self
    }

    /// The bytes that all items may take, 64 MiB by default.
    pub fn memory_limit(mut self, bytes: usize) -> Self {
        self.memory_limit = bytes;
        self
    }

    /// Whether items are evicted when memory is full, which is the default. Otherwise stores fail with `SERVER_ERROR out
    /// of memory storing object`, as with `memcached -M`.
    pub fn evictions(mut self, evictions: bool) -> Self {
        self.evictions = evictions;
        self
    }

    /// The server. It neither does I/O nor needs a runtime.
    pub fn build(self) -> Server {
        let store = Store::new(self.memory_limit, self.largest_item, self.evictions);
        let shared = Shared {
            largest_item: self.largest_item,
            engine: Mutex::new(Engine::new(store)),
            faults: watch::Sender::new(Faults {
                manner: Arc::new(self.manner),
                ..Faults::default()
            }),
            connections: Mutex::new(HashMap::new()),
            accepted: AtomicU64::new(0),
            replies: AtomicU64::new(0),
            port: Mutex::new(Port::default()),
        };
        Server {
            handle: Arc::new(LastHandle {
                shared: Arc::new(shared),
            }),
        }
    }
}

/// Shared by all handles and by nothing else, so that its drop is the last handle's.
struct LastHandle {
    shared: Arc<Shared>,
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        self.shared.shut_down();
    }
}

/// What the handles and the tasks of a server share.
struct Shared {
    largest_item: usize,
    engine: Mutex<Engine>,
    faults: watch::Sender<Faults>,
    /// The open connections. The key is the value of `accepted` after the connection was counted.
    connections: Mutex<HashMap<u64, mpsc::UnboundedSender<Signal>>>,
    accepted: AtomicU64,
    /// Replies that could have been late.
    replies: AtomicU64,
    port: Mutex<Port>,
}

/// The listening socket. It lives here and not in the accepting task, so that [`Server::refuse`] closes it at once.
#[derive(Default)]
struct Port {
    place: Option<Place>,
    runtime: Option<Handle>,
    listener: Option<Listener>,
    /// In its place while connections are refused: bound, and not listening.
    reserved: Option<TcpSocket>,
    /// The accepting task's.
    waker: Option<Waker>,
}

impl Port {
    fn refuse(&mut self) {
        if self.listener.take().is_some() {
            self.reserved = self.place.as_ref().and_then(Place::reserve);
        }
    }
}

/// A connection's place among the open ones.
struct Registration {
    shared: Arc<Shared>,
    number: u64,
    epoch: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.shared.connections).remove(&self.number);
    }
}

impl Shared {
    fn register(self: &Arc<Self>) -> (Registration, mpsc::UnboundedReceiver<Signal>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let number = self.accepted.fetch_add(1, Ordering::SeqCst) + 1;
        let epoch = lock(&self.engine).epoch;
        lock(&self.connections).insert(number, sender);
        (
            Registration {
                shared: Arc::clone(self),
                number,
                epoch,
            },
            receiver,
        )
    }

    /// Executes a request for a connection of `epoch`; `None` if the server has been restarted since.
    fn execute(
        &self,
        request: &Request,
        reply: &mut BytesMut,
        epoch: u64,
        version: &str,
    ) -> Option<Then> {
        let surroundings = Surroundings {
            version,
            open_connections: &|| lock(&self.connections).len(),
            accepted: self.accepted.load(Ordering::SeqCst),
        };
        let mut engine = lock(&self.engine);
        (engine.epoch == epoch).then(|| engine.execute(request, reply, &surroundings))
    }

    /// How late the next reply is.
    fn is_late(&self, (nth, by): (u32, Duration)) -> Option<Duration> {
        let reply = self.replies.fetch_add(1, Ordering::SeqCst) + 1;
        reply.is_multiple_of(nth.into()).then_some(by)
    }

    fn shut_down(&self) {
        let first = |faults: &mut Faults| !std::mem::replace(&mut faults.shut_down, true);
        let first = self.faults.send_if_modified(first);
        let mut port = lock(&self.port);
        (port.listener, port.reserved) = (None, None);
        // Only once: somebody else may listen there by then.
        if let (true, Some(place)) = (first, &port.place) {
            place.remove();
        }
        if let Some(waker) = port.waker.take() {
            waker.wake();
        }
    }
}

/// Accepts until the server is shut down, over however many listeners.
async fn accept_connections(shared: Arc<Shared>) {
    loop {
        let accepted = poll_fn(|context| {
            let mut port = lock(&shared.port);
            if shared.faults.borrow().shut_down {
                return Poll::Ready(None);
            }
            port.waker = Some(context.waker().clone());
            match &port.listener {
                Some(listener) => listener.poll_accept(context).map(Some),
                None => Poll::Pending,
            }
        });
        match accepted.await {
            None => return,
            Some(Ok(Accepted::Unix(stream))) => {
                tokio::spawn(connection::serve(Arc::clone(&shared), stream, |_| {}));
            }
            Some(Ok(Accepted::Tcp(stream))) => {
                // Replies are written as a whole: waiting for more could only make them late.
                let _ = stream.set_nodelay(true);
                let arm_reset = |stream: &TcpStream| {
                    // Failing that, the peer sees an ordinary close.
                    let _ = stream.set_zero_linger();
                };
                tokio::spawn(connection::serve(Arc::clone(&shared), stream, arm_reset));
            }
            // Out of file descriptors, most likely: others need time to close some.
            Some(Err(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// No data here is left inconsistent by a panic: it is a test that panicked, and others go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
