//! Nodes that are found rather than listed.
//!
//! A [`Discovery`] is where lists of nodes come from, one after the other: names in the DNS, a managed
//! cache's own list, a file, or any [`Stream`] of yours. A client follows one
//! ([`ClientBuilder::discover`](crate::ClientBuilder::discover),
//! [`Client::follow`](crate::Client::follow)); whatever it says becomes the client's nodes as by
//! [`set_node_specs`](crate::Client::set_node_specs).
//!
//! ```no_run
//! # fn main() -> Result<(), tower_memcached::Error> {
//! use tower_memcached::{Client, Discovery};
//!
//! let client = Client::builder()
//!     .discover(Discovery::dns("cache.default.svc.cluster.local", 11211))
//!     .build()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What holds for every discovery
//! - **It cannot take the nodes away.** When it fails, finds nothing, or finds what cannot be a list of
//!   nodes, those of the last good list stay, and [`Client::discovery`](crate::Client::discovery) and the
//!   metrics say so. The same when it ends.
//! - **It cannot thrash the ring.** The first list is used at once. After a change the next one comes no
//!   earlier than the [minimum dwell](Discovery::minimum_dwell), and is to the newest list of that
//!   moment: one that flaps and is back within it changes nothing.
//! - **The name is the identity.** Keys belong to a node's name ([`NodeSpec::new`]), wherever it
//!   [is](NodeSpec::at). Where a source has only addresses, as `A` records have, these are the names.
//! - **It is asked again when it matters.** What is polled is asked every [period](Discovery::period),
//!   and at once when a node cannot be connected to (once a second at most, and then after 1, 2, 4…
//!   seconds until that is the period). A failure is tried again in the same steps.
//! - **It costs no request anything.** It runs on the client's executor, and ends with the last handle
//!   of the client. A stream of yours must not block there.
//!
//! How many nodes a list may leave out at once is not limited: half of them gone is what a scale-down
//! looks like. The keys of a node that is left out move, as the ring says; the rest stay.
//!
//! # Before the first list
//! A client that is built without nodes has none until the first list comes. Until then requests fail
//! at once with [`ErrorKind::NodeUnavailable`], unsent, and
//! [`get_or_load`](crate::Client::get_or_load) goes to the database, through its guard. Nodes that the
//! builder was given are used until then.
//!
//! A key that such a request was to write is deleted at its node once that is found, lest it be read as it
//! was. Up to 100,000 keys are remembered for that. Should there be more, each node that is found is
//! treated as one whose journal has overflowed: by default
//! ([`JournalOverflow::Refuse`](crate::JournalOverflow)) it takes no requests of this client until it is
//! flushed or restarted. Give a client that writes much, and may start without its discovery, some nodes to
//! begin with.

mod dns;
mod driver;
mod elasticache;
mod file;
mod poll;
#[cfg(feature = "srv")]
mod srv;

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, once};
use futures::{FutureExt as _, Stream, StreamExt as _, TryFutureExt as _};
use tokio::sync::Notify;

pub use driver::DiscoveryStatus;
pub(crate) use driver::{Following, Target, drive};

use crate::cluster::NodeSpec;
use crate::error::{BoxError, Error, ErrorKind, Invalid, Result, not_zero};
use crate::transport::Connector;

/// A list of nodes, or why there is none.
type Found = Result<Vec<NodeSpec>>;

/// Something that is asked again and again.
trait Look: Send {
    /// Dropped when it takes too long; the next look may go on with what it began.
    fn look(&mut self) -> BoxFuture<'_, Found>;
}

type Looks = Box<dyn Look>;

/// A closure of the user's.
struct Asks<F>(F);

impl<F> Look for Asks<F>
where
    F: FnMut() -> BoxFuture<'static, Found> + Send,
{
    fn look(&mut self) -> BoxFuture<'_, Found> {
        (self.0)()
    }
}

enum Source {
    Stream(Box<dyn FnOnce(Refresh) -> BoxStream<'static, Found> + Send>),
    Polled(Box<dyn FnOnce(Arc<dyn Connector>) -> Looks + Send>),
}

/// Where a client's nodes come from. See the [module](self) for what holds for all.
pub struct Discovery {
    source: Source,
    minimum_dwell: Duration,
    period: Duration,
    timeout: Duration,
}

impl Discovery {
    fn new(source: Source) -> Self {
        Self {
            source,
            minimum_dwell: Duration::from_secs(10),
            period: Duration::from_secs(30),
            timeout: Duration::from_secs(5),
        }
    }

    fn of_looks(make: impl FnOnce(Arc<dyn Connector>) -> Looks + Send + 'static) -> Self {
        Self::new(Source::Polled(Box::new(make)))
    }

    /// These nodes, for good.
    #[must_use]
    pub fn fixed(nodes: Vec<NodeSpec>) -> Self {
        Self::stream(once(async { Ok::<_, Error>(nodes) }))
    }

    /// Lists that come by themselves: from a watch on some registry, say. The stream is polled on the
    /// client's executor, and must not block.
    #[must_use]
    pub fn stream<S, E>(lists: S) -> Self
    where
        S: Stream<Item = Result<Vec<NodeSpec>, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        Self::stream_with(|_| lists)
    }

    /// The same for a stream that is told when it would be good to look again.
    #[must_use]
    pub fn stream_with<F, S, E>(make: F) -> Self
    where
        F: FnOnce(Refresh) -> S + Send + 'static,
        S: Stream<Item = Result<Vec<NodeSpec>, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let make = |refresh| make(refresh).map(|found| found.map_err(failed)).boxed();
        Self::new(Source::Stream(Box::new(make)))
    }

    /// Asks `look` for a list, again and again, as every source here is asked: each
    /// [period](Self::period), within the [timeout](Self::timeout), when a connect fails, and with
    /// backoff. It runs on the client's executor, and must not block.
    #[must_use]
    pub fn polled<F, A, E>(look: F) -> Self
    where
        F: FnMut() -> A + Send + 'static,
        A: Future<Output = Result<Vec<NodeSpec>, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        let mut look = look;
        let asks = move || -> BoxFuture<'static, Found> { look().map_err(failed).boxed() };
        Self::of_looks(|_| Box::new(Asks(asks)))
    }

    /// The addresses of a name in the DNS (`A` and `AAAA`), as the system resolves names: a Kubernetes
    /// headless service, say.
    ///
    /// Each address is a node and its own name, such as `10.0.0.7:11211`, because these records have no
    /// other. So a server that comes back with another address is another node, and its keys move; the
    /// names of `SRV` records (feature `srv`, `Discovery::srv`) stay what they are. Of a name
    /// that has addresses of both kinds only IPv4 is used, lest a server be two nodes. Should it have
    /// IPv6 alone after that, this is an error the first nine times in a row, for so looks half an
    /// answer of the DNS.
    #[must_use]
    pub fn dns(name: impl Into<String>, port: u16) -> Self {
        let name = name.into();
        Self::of_looks(move |_| Box::new(dns::Dns::new(name, port)))
    }

    /// The targets of a name's `SRV` records, by the name servers that this system is configured with:
    /// `_memcached._tcp.cache.default.svc.cluster.local`.
    ///
    /// A node's name is its target and port, and so stays the same when its address changes: the pods of
    /// a Kubernetes stateful set keep their keys when they are restarted. Targets are resolved when they
    /// are connected to. All of them are nodes of weight 1: a record's priority and weight say whom to
    /// ask first, which here is the ring's to say.
    #[cfg(feature = "srv")]
    #[must_use]
    pub fn srv(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::of_looks(move |_| Box::new(srv::Srv::new(name, None)))
    }

    /// The same by one name server: a Consul agent's at port 8600, say.
    #[cfg(feature = "srv")]
    #[must_use]
    pub fn srv_at(name: impl Into<String>, server: std::net::SocketAddr) -> Self {
        let name = name.into();
        Self::of_looks(move |_| Box::new(srv::Srv::new(name, Some(server))))
    }

    /// The list that a managed cache keeps of itself: the configuration endpoint of an ElastiCache
    /// cluster, or the discovery endpoint of a Memorystore instance. It is asked with `config get
    /// cluster`, or with `get AmazonElastiCache:cluster` where the engine is older than 1.4.14, over a
    /// connection of its own made by the client's [`Connector`].
    ///
    /// A node's name is its host name and port as the list has them. It is resolved when it is
    /// connected to; the address beside it in the list is not used, but where there is no name. A list
    /// whose version is lower than one before is ignored, unless it is all that there is ten times in a
    /// row: then the cluster has been made anew.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if `endpoint` is no [`Address`](crate::Address).
    pub fn elasticache(endpoint: &str) -> Result<Self> {
        let endpoint = endpoint.parse()?;
        Ok(Self::of_looks(move |connector| {
            Box::new(elasticache::ElastiCache::new(endpoint, connector))
        }))
    }

    /// A file that is read again every 5 s, unless another [period](Self::period) is set. Of its lines
    /// each is a node: its name, and if need be its weight, and its address if that is another:
    ///
    /// ```text
    /// # comment
    /// 10.0.0.1:11211
    /// cache-b 2
    /// cache-c 1 10.0.0.3:11211
    /// ```
    ///
    /// A file that is not like that is an error, and the nodes stay. But one that is half written is like
    /// that as often as not, with nodes missing or the last name cut off: write another file and rename
    /// it.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self::of_looks(|_| Box::new(file::File::new(path))).period(Duration::from_secs(5))
    }

    /// How long the nodes stay at least after they have changed; 10 s by default. Of the lists that come
    /// meanwhile only the last counts. The first list never waits.
    #[must_use]
    pub fn minimum_dwell(mut self, dwell: Duration) -> Self {
        self.minimum_dwell = dwell;
        self
    }

    /// How often a source is asked, each time 10 % more or less; 30 s by default, 5 s for a file. Not
    /// for streams.
    #[must_use]
    pub fn period(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// How long a source may take to answer; 5 s by default. Not for streams.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        not_zero("period", self.period.is_zero())?;
        not_zero("timeout", self.timeout.is_zero())
    }

    /// The lists, and how long each stays at least.
    fn start(
        self,
        connector: Arc<dyn Connector>,
        refresh: &Refresh,
    ) -> (BoxStream<'static, Found>, Duration) {
        let lists = match self.source {
            Source::Stream(make) => make(refresh.clone()),
            Source::Polled(make) => {
                let looks = make(connector);
                poll::poll(looks, self.period, self.timeout, refresh.clone()).boxed()
            }
        };
        (lists, self.minimum_dwell)
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery")
            .field("minimum_dwell", &self.minimum_dwell)
            .field("period", &self.period)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Says when it would be good to look again: a node cannot be connected to, so it may not be there any
/// more.
#[derive(Clone, Debug, Default)]
pub struct Refresh(Arc<Notify>);

impl Refresh {
    /// Ready when it is requested, or has been since it was last waited for. Requests are not rare
    /// while nodes come and go: look at most so often.
    ///
    /// # Cancel safety
    /// A request is not lost when this is dropped.
    pub async fn requested(&self) {
        self.0.notified().await;
    }

    fn request(&self) {
        self.0.notify_one();
    }
}

/// An error of ours stays what it is.
fn failed(error: impl Into<BoxError>) -> Error {
    match error.into().downcast::<Error>() {
        Ok(error) => *error,
        Err(error) => {
            let message = match error.source() {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            Error::new(ErrorKind::Discovery, message)
        }
    }
}
