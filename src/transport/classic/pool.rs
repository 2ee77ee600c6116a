//! The connections of one node: bb8's pool of them, and what is known of the server by how they end.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{Either, select};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep};

use super::lease::Company;
use super::wire::Wire;
use crate::error::{Error, Result, Sent};
use crate::protocol::ServerVersion;
use crate::transport::greeting::Connected;
use crate::transport::protocol::Dialect;
use crate::transport::site::{Site, Up, backoff};
use crate::transport::{ConnectFailure, Event};

/// Whoever waits for a connection has a shorter time of its own.
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// A connection that nobody has used for so long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// What all requests to a node share.
pub(super) struct Shared {
    pub(super) site: Arc<Site>,
    /// How many connections there may be.
    pub(super) size: u32,
    /// Requests that wait for a connection, or are in flight, and the values they carry, in bytes.
    pub(super) pending: AtomicUsize,
    pub(super) bytes: AtomicUsize,
    /// One for each connection there may be, to be had before one of them, of whatever generation: a
    /// pool lets whoever comes just then have what is handed back, before those that wait, who may
    /// wait without end; and knows nothing of connections that are still in use when it has ended.
    pub(super) turns: Arc<Semaphore>,
    /// Ends what is in flight.
    pub(super) drained: watch::Sender<Option<Error>>,
    state: Mutex<State>,
}

struct State {
    closed: bool,
    generation: Option<Arc<Generation>>,
    /// Somebody closes connections that nobody uses.
    is_tidied: bool,
    /// Connecting failed, and is not tried again before then.
    broken: Option<(Instant, Error)>,
    /// Connects that failed in a row.
    failures: u32,
    /// Something was not answered in time, and nothing has been since.
    suspicion: Option<Suspicion>,
}

#[derive(Clone, Copy)]
struct Suspicion {
    /// When the first request was sent that was not answered in time.
    since: Instant,
    /// When a connection was first given up because it was silent.
    silent: Option<Instant>,
}

/// Connections that are trusted to lead to the same server: once one of them has ended, or says nothing,
/// those that wait in the pool are not used any more.
pub(super) struct Generation {
    pub(super) pool: bb8::Pool<Manager>,
    /// The number of the first of them; more than any as long as there is none.
    pub(super) first: AtomicU32,
    /// Nobody gets one of them any more.
    pub(super) ended: watch::Sender<Option<Ended>>,
}

/// What those get who wait for a connection of a generation that has ended; where it is nothing, they
/// try the next generation.
pub(super) type Ended = Option<Error>;

/// A connection, while it is in the pool or a request has it.
pub(super) struct Connection {
    /// Gone once it has been given up.
    pub(super) wire: Option<Wire>,
    pub(super) up: Up,
    pub(super) company: Company,
    /// Something was answered over it, in time or not.
    pub(super) answered: bool,
    /// When it was handed back.
    pub(super) used_at: Instant,
    established: Instant,
}

/// A connection that a request has, and where it is from.
pub(super) struct Lent {
    pub(super) connection: bb8::PooledConnection<'static, Manager>,
    #[expect(
        dead_code,
        reason = "dropped after it: the next one's turn is when it is in the pool again"
    )]
    pub(super) turn: OwnedSemaphorePermit,
    pub(super) generation: Arc<Generation>,
}

pub(super) struct Manager {
    shared: Arc<Shared>,
    generation: Weak<Generation>,
}

impl bb8::ManageConnection for Manager {
    type Connection = Connection;
    type Error = Error;

    async fn connect(&self) -> Result<Connection> {
        let ended = || self.shared.site.shut_down();
        let generation = self.generation.upgrade().ok_or_else(ended)?;
        let connection = self.shared.connect(&generation).await?;
        let number = connection.up.number;
        generation.first.fetch_min(number, Ordering::AcqRel);
        Ok(connection)
    }

    /// Not asked: the wire looks before it writes.
    async fn is_valid(&self, _: &mut Connection) -> Result<()> {
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        connection.wire.as_ref().is_none_or(Wire::is_dirty)
    }
}

impl Shared {
    pub(super) fn new(site: Arc<Site>, size: u32) -> Self {
        Self {
            site,
            size,
            pending: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            turns: Arc::new(Semaphore::new(size as usize)),
            drained: watch::Sender::new(None),
            state: Mutex::new(State {
                closed: false,
                generation: None,
                is_tidied: false,
                broken: None,
                failures: 0,
                suspicion: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a request cannot be sent now, if it is known.
    pub(super) fn refuses(&self) -> Option<Error> {
        let state = self.lock();
        if state.closed {
            return Some(self.site.shut_down());
        }
        let (_, error) = self.broken(&state)?;
        // There may be a connection to be had all the same.
        let none_up = state.generation.as_ref().is_none_or(|now| now.is_empty());
        none_up.then(|| error.clone().with_sent(Sent::No))
    }

    fn broken<'a>(&self, state: &'a State) -> Option<&'a (Instant, Error)> {
        let broken = state.broken.as_ref();
        broken.filter(|(until, _)| Instant::now() < *until)
    }

    /// The pool to take a connection from. To be called on the I/O executor, where the pool's own
    /// tasks are to run.
    pub(super) fn generation(self: &Arc<Self>) -> Result<Arc<Generation>> {
        let mut state = self.lock();
        if state.closed {
            return Err(self.site.shut_down());
        }
        if !std::mem::replace(&mut state.is_tidied, true) {
            let closing = self.site.closing.subscribe();
            drop(tokio::spawn(tidy(Arc::downgrade(self), closing)));
        }
        let make = |generation: &Weak<Generation>| {
            // Those of ended generations would be around for a while with what closes idle connections
            // for them, so that is not theirs to do.
            let pool = bb8::Pool::builder()
                .max_size(self.size)
                .test_on_check_out(false)
                .retry_connection(false)
                .connection_timeout(LONGEST_WAIT)
                .max_lifetime(None)
                .idle_timeout(None)
                // Errors are not lost on the way: `connect` tells them itself.
                .build_unchecked(Manager {
                    shared: self.clone(),
                    generation: generation.clone(),
                });
            Generation {
                pool,
                first: AtomicU32::new(u32::MAX),
                ended: watch::Sender::new(None),
            }
        };
        let generation = state
            .generation
            .get_or_insert_with(|| Arc::new_cyclic(make));
        Ok(generation.clone())
    }

    async fn connect(self: &Arc<Self>, generation: &Arc<Generation>) -> Result<Connection> {
        // Where others failed just now it is not tried at once, even if there is another connection.
        let broken = self.broken(&self.lock()).map(|(_, error)| error.clone());
        if let Some(error) = broken {
            self.none_comes(generation, &error);
            return Err(error);
        }
        let began = Instant::now();
        let mut ended = generation.ended.subscribe();
        let ended = std::pin::pin!(ended.wait_for(Option::is_some));
        let connected = match select(std::pin::pin!(self.site.connect(false)), ended).await {
            Either::Left((connected, _)) => connected,
            Either::Right(_) => return Err(self.site.shut_down()),
        };
        match connected {
            Ok(connected) => Ok(Connection {
                company: company(&connected),
                wire: Some(Wire::new(
                    connected.stream,
                    self.site.settings.load().limits.value,
                )),
                up: self.site.connection_up(),
                answered: false,
                used_at: Instant::now(),
                established: Instant::now(),
            }),
            Err((failure, error)) => {
                let error = error.at_node(&self.site.name);
                self.connect_failed(generation, failure, &error, began);
                Err(error)
            }
        }
    }

    fn connect_failed(
        &self,
        generation: &Arc<Generation>,
        failure: ConnectFailure,
        error: &Error,
        began: Instant,
    ) {
        if failure == ConnectFailure::OtherProtocol {
            // Whoever waits is told to ask in that.
            self.refuse(error);
            return;
        }
        let silent = self.lock().suspicion.and_then(|suspicion| suspicion.silent);
        // The judgement first, so that what is moved now does not come back here.
        self.site.report(&Event::ConnectFailed {
            failure,
            error,
            others_up: self.site.up(),
            untried: false,
            // Made in place of one that was silent, and nothing has been answered since.
            most_dead: failure.is_the_nodes() && silent.is_some_and(|silent| began >= silent),
        });
        self.back_off(error);
        self.none_comes(generation, error);
    }

    /// Ends what waits for a connection of that generation, unless there is one: that is going to be
    /// handed back.
    fn none_comes(&self, generation: &Arc<Generation>, error: &Error) {
        if generation.is_empty() {
            self.end_if_current(generation, Some(error));
        }
    }

    /// Connecting has come to nothing, and is not tried again for a while.
    fn back_off(&self, error: &Error) {
        let mut state = self.lock();
        // Several that fail together are one failure.
        if self.broken(&state).is_some() {
            return;
        }
        state.broken = Some((Instant::now() + backoff(state.failures), error.clone()));
        state.failures = state.failures.saturating_add(1);
    }

    /// The server has ended a connection, and so others, probably. One that it ends without ever having
    /// answered over it is as good as none.
    pub(super) fn lost(&self, lent: &Lent, error: &Error) {
        self.distrust(&lent.generation);
        if !lent.connection.answered {
            self.back_off(error);
            self.refuse(error);
        }
    }

    /// Ends what waits for a connection.
    pub(super) fn refuse(&self, error: &Error) {
        let generation = self.lock().generation.take();
        end(generation, Some(error));
    }

    /// Ends what waits for a connection or is in flight.
    pub(super) fn drain(&self, error: &Error) {
        let mut state = self.lock();
        // Whatever is asked next is asked of a server that is known to answer.
        state.suspicion = None;
        state.failures = 0;
        drop(state);
        self.refuse(error);
        self.drained.send_replace(Some(error.clone()));
    }

    /// A connection of that generation has ended: those that wait in its pool are not used any more, and
    /// who waits for one gets one of the next generation.
    fn distrust(&self, generation: &Arc<Generation>) {
        self.end_if_current(generation, None);
    }

    fn end_if_current(&self, generation: &Arc<Generation>, error: Option<&Error>) {
        let mut state = self.lock();
        let current = state
            .generation
            .take_if(|current| Arc::ptr_eq(current, generation));
        drop(state);
        end(current, error);
    }

    /// Closes connections that nobody has used for long.
    fn tidy(&self) {
        let Some(generation) = self.lock().generation.clone() else {
            return;
        };
        let pool = &generation.pool;
        for _ in 0..pool.state().idle_connections {
            // Those that have waited longest come first.
            let Ok(_turn) = self.turns.try_acquire() else {
                return;
            };
            if let Some(Ok(mut idle)) = pool.get_owned().now_or_never()
                && idle.used_at.elapsed() >= IDLE
            {
                idle.wire = None;
            }
        }
    }

    pub(super) fn end_backoff(&self) {
        let mut state = self.lock();
        state.broken = None;
        state.failures = 0;
        state.suspicion = None;
    }

    pub(super) fn close(&self) {
        self.site.closing.send_replace(true);
        let mut state = self.lock();
        state.closed = true;
        drop(state);
        self.drain(&self.site.shut_down());
    }

    /// A request was answered in time.
    pub(super) fn answered(&self, sent_at: Instant) {
        let now = Instant::now();
        let mut state = self.lock();
        state.suspicion = None;
        state.failures = 0;
        drop(state);
        self.site.answered(1, now);
        let slow_after = self.site.slow_after();
        if slow_after.is_some_and(|slow_after| now.duration_since(sent_at) > slow_after) {
            self.site.report(&Event::Slow {
                requests: 1,
                sent_at,
            });
        }
    }

    /// A request that was sent then has not been answered in time.
    pub(super) fn suspect(&self, sent_at: Instant) {
        self.lock().suspicion.get_or_insert(Suspicion {
            since: sent_at,
            silent: None,
        });
    }

    /// A connection has not answered for as long as it may.
    pub(super) fn unresponsive(&self, lent: &Lent, error: &Error) {
        let suspicion = self.lock().suspicion.as_mut().map(|suspicion| {
            suspicion.silent.get_or_insert_with(Instant::now);
            *suspicion
        });
        self.distrust(&lent.generation);
        self.site.report(&Event::Unresponsive {
            error,
            // One that was made in place of another that did not answer.
            most_dead: suspicion
                .is_some_and(|suspicion| lent.connection.established > suspicion.since),
        });
    }
}

impl Generation {
    /// There is no connection of it, in the pool or in use.
    fn is_empty(&self) -> bool {
        self.pool.state().connections == 0
    }
}

/// Closes connections that nobody uses, until there cannot be any more.
async fn tidy(shared: Weak<Shared>, mut closing: watch::Receiver<bool>) {
    loop {
        let closed = std::pin::pin!(closing.wait_for(|&closing| closing));
        let waited = std::pin::pin!(sleep(IDLE / 2));
        if let Either::Right(_) = select(waited, closed).await {
            return;
        }
        match shared.upgrade() {
            Some(shared) => shared.tidy(),
            None => return,
        }
    }
}

fn company(connected: &Connected) -> Company {
    let modern = connected.version.is_some_and(ServerVersion::is_supported);
    match connected.dialect {
        Dialect::Classic { proxy: true } => Company::Proxied,
        Dialect::Classic { proxy: false } if !modern => Company::Classic,
        Dialect::Classic { .. } | Dialect::Meta => Company::Mixed,
    }
}

fn end(generation: Option<Arc<Generation>>, error: Option<&Error>) {
    if let Some(generation) = generation {
        generation.ended.send_replace(Some(error.cloned()));
    }
}
