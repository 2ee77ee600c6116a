//! Where sockets, timers and probes run: the bulkhead between the application's threads and ours.

mod dedicated;

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::{Either, select};

use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep, sleep_until};

use dedicated::{Dedicated, Tenancy};

use crate::error::{Error, ErrorKind, Result};

/// Where a client's I/O runs, or what it loads.
///
/// The default for I/O is [`dedicated`](Self::dedicated) with one thread: the application's threads
/// only touch a bounded queue, so that neither a blocked application nor a busy connection can make
/// the other late. [`current`](Self::current) has the lowest latency for a single request, since
/// no other thread has to wake up, and is what simulations and paused-time tests want. With a
/// [`handle`](Self::handle) the runtime is yours: what blocks its threads makes I/O late.
///
/// Operations may be awaited in any tokio runtime that has its time driver enabled, and with a
/// dedicated or given executor outside of every runtime, too.
///
/// # Loads
/// A caller's closure ([`Client::get_or_load`](crate::Client::get_or_load)) is no business of an
/// executor: it runs on the caller's task. A shared [`Loader`](crate::Loader) runs where
/// [`ReadThroughLayer::executor`](crate::ReadThroughLayer::executor) says, in the runtime of whoever
/// asks by default, and a [`BlockingLoader`](crate::BlockingLoader) on threads of its own. What was
/// loaded is put back where [`ClientBuilder::load_executor`](crate::ClientBuilder::load_executor)
/// says. So by default no loader runs on an I/O thread. How many loads run, and wait, is bounded by
/// the [`LoadGuard`](crate::LoadGuard), and not by the number of threads.
///
/// # Dropping
/// The last client that uses dedicated threads may be dropped anywhere: in an async context, on one of
/// these very threads, while a runtime is being shut down, on a thread without a runtime or in the
/// destructor of a thread-local. That neither panics nor waits: the threads drop the tasks that are
/// left, close their sockets, and end. One that is blocked, by a
/// [`Connector`](crate::Connector) say, ends when it no longer is.
#[derive(Clone, Debug)]
pub struct Executor(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Dedicated(Arc<Dedicated>),
    Current,
    Handle(Handle),
}

impl Executor {
    /// Threads of our own, started when a client is built and stopped when the last client using
    /// them, and the last clone of this, is dropped. Clones share the threads.
    ///
    /// Of `threads` at least one is started. One is called `name`; several `name-0`, `name-1` and so on,
    /// cut before the number to the 15 bytes that Linux shows.
    ///
    /// Each thread does its I/O alone, and each node of a client lives on one of them, that with the
    /// fewest nodes when it is added: a node that keeps its thread busy makes none on another thread late.
    /// More threads than nodes are of no use, and one is enough for most.
    ///
    /// For loads `name` is that of so many other threads, apart from those for I/O, and whichever is
    /// free takes the next load.
    #[must_use]
    pub fn dedicated(name: impl Into<String>, threads: usize) -> Self {
        let dedicated = Dedicated::new(name.into(), threads);
        Self(Kind::Dedicated(Arc::new(dedicated)))
    }

    /// The tokio runtime in which the client is first used, found then. Using the client first
    /// outside of one is an [`ErrorKind::NoRuntime`]. When that runtime is shut down, the client
    /// is too.
    #[must_use]
    pub fn current() -> Self {
        Self(Kind::Current)
    }

    /// A runtime of yours. It needs its I/O and time drivers enabled, and to be run: one of a single
    /// thread does nothing outside of its `block_on`. When it is shut down, the client is too.
    #[must_use]
    pub fn handle(handle: Handle) -> Self {
        Self(Kind::Handle(handle))
    }

    /// For I/O. Starts threads if there are to be any.
    pub(crate) fn start(&self) -> Result<Spawner> {
        let known = match &self.0 {
            Kind::Dedicated(dedicated) => Some(dedicated.io()?.0),
            Kind::Handle(handle) => Some(handle.clone()),
            Kind::Current => None,
        };
        Ok(self.spawner(known, None))
    }

    /// For loads, which may block. Starts threads if there are to be any.
    pub(crate) fn start_for_loads(&self) -> Result<Spawner> {
        match &self.0 {
            Kind::Dedicated(dedicated) => Ok(self.spawner(Some(dedicated.loads()?), None)),
            Kind::Handle(_) | Kind::Current => self.start(),
        }
    }

    fn spawner(&self, known: Option<Handle>, tenancy: Option<Tenancy>) -> Spawner {
        Spawner(Arc::new(Spawning {
            known: known.map(OnceLock::from).unwrap_or_default(),
            _tenancy: tenancy,
            executor: self.clone(),
        }))
    }
}

impl Default for Executor {
    /// One dedicated thread named `memcached-io`.
    fn default() -> Self {
        Self::dedicated("memcached-io", 1)
    }
}

/// A started [`Executor`], shared by all parts of one client, or of one of its nodes.
#[derive(Clone, Debug)]
pub(crate) struct Spawner(Arc<Spawning>);

#[derive(Debug)]
struct Spawning {
    known: OnceLock<Handle>,
    /// Counts the node that lives there.
    _tenancy: Option<Tenancy>,
    /// Keeps dedicated threads running.
    executor: Executor,
}

impl Spawner {
    /// For one node and all that belongs to it: of several threads that with the fewest nodes.
    pub(crate) fn for_node(&self) -> Self {
        match &self.0.executor.0 {
            Kind::Dedicated(dedicated) => match dedicated.io() {
                Ok((handle, tenancy)) => self.0.executor.spawner(Some(handle), Some(tenancy)),
                // They were started with this, so this does not happen.
                Err(_) => self.clone(),
            },
            // The runtime is one for all, found by whichever of them is used first.
            Kind::Current | Kind::Handle(_) => self.clone(),
        }
    }

    pub(crate) fn handle(&self) -> Result<&Handle> {
        if let Some(handle) = self.0.known.get() {
            return Ok(handle);
        }
        let current = Handle::try_current().map_err(|_| no_runtime())?;
        Ok(self.0.known.get_or_init(|| current))
    }

    /// Whether it is decided where things run.
    pub(crate) fn knows_its_runtime(&self) -> bool {
        self.0.known.get().is_some()
    }

    /// Runs a task until it ends, or the runtime does: then it is dropped, so what must happen at
    /// its end belongs in a `Drop`. The task must not own this `Spawner`, or its threads would
    /// keep themselves running.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        drop(self.handle()?.spawn(task));
        Ok(())
    }

    /// In which runtime a timer of [`sleep_until`](Self::sleep_until) is; `None` if there is none.
    pub(crate) fn runtime_of_caller(&self) -> Option<Id> {
        match Handle::try_current() {
            Ok(own) => Some(own.id()),
            Err(_) => self.handle().ok().map(Handle::id),
        }
    }

    /// A timer in the caller's own runtime, so that a blocked I/O thread cannot make it late; in
    /// ours where the caller has none.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Result<Sleep> {
        if is_in_runtime() {
            return Ok(sleep_until(deadline));
        }
        let _entered = self.handle()?.enter();
        Ok(sleep_until(deadline))
    }
}

/// A duration that may be changed while others look at it; the longest are 584 years.
#[derive(Debug)]
pub(crate) struct AtomicDuration(AtomicU64);

impl AtomicDuration {
    pub(crate) fn new(duration: Duration) -> Self {
        let it = Self(AtomicU64::new(0));
        it.set(duration);
        it
    }

    #[inline]
    pub(crate) fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0.store(nanoseconds, Ordering::Relaxed);
    }
}

/// A timer that fires later than this shows that *we* were late: the request it ends has run out
/// of time, but nobody is to blame. tokio's timers have a granularity of 1 ms.
pub(crate) const LATE: Duration = Duration::from_millis(5);

/// `now + duration`, or a moment that will not come: a timeout of `Duration::MAX` means none.
#[inline]
pub(crate) fn after(now: Instant, duration: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
    now + duration.min(FAR)
}

/// A timer for a caller that may be outside of every runtime, and may have no executor of ours.
pub(crate) fn timer(spawner: Option<&Spawner>, deadline: Instant) -> Result<Sleep> {
    match spawner {
        Some(spawner) => spawner.sleep_until(deadline),
        None if is_in_runtime() => Ok(sleep_until(deadline)),
        None => Err(no_runtime()),
    }
}

/// Whether the caller's own runtime keeps time for it. A task of a `LocalSet` may have none.
fn is_in_runtime() -> bool {
    Handle::try_current().is_ok()
}

/// Runs a future until `deadline`; `None` if that comes first.
pub(crate) async fn until<F: Future>(
    spawner: Option<&Spawner>,
    deadline: Instant,
    future: F,
) -> Result<Option<F::Output>> {
    let timer = pin!(timer(spawner, deadline)?);
    Ok(match select(pin!(future), timer).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    })
}

fn no_runtime() -> Error {
    Error::new(
        ErrorKind::NoRuntime,
        "used outside a tokio runtime; use Executor::dedicated or Executor::handle for that",
    )
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::thread;

    use tokio::runtime::Builder;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// The name of the thread that a spawner's tasks run on.
    fn thread_of(spawner: &Spawner) -> String {
        let (tell, told) = channel();
        let name = async move {
            let _ = tell.send(thread::current().name().unwrap_or_default().to_owned());
        };
        spawner.spawn(name).unwrap();
        told.recv_timeout(LONG).unwrap()
    }

    /// A task that does not end; its end of the channel goes when it is dropped.
    fn endless(spawner: &Spawner) -> Receiver<()> {
        let (alive, gone) = channel();
        let task = async move {
            let _alive = alive;
            pending::<()>().await;
        };
        spawner.spawn(task).unwrap();
        gone
    }

    fn is_dropped(task: &Receiver<()>) {
        assert_eq!(task.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn current_outside_a_runtime_is_a_typed_error() {
        let spawner = Executor::current().start().unwrap();
        let error = spawner.spawn(async {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoRuntime);
    }

    #[test]
    fn threads_stop_with_the_last_clone_even_inside_a_runtime() {
        let executor = Executor::dedicated("stops", 2);
        let spawner = executor.start().unwrap();
        let node = spawner.for_node();
        let tasks = [endless(&spawner), endless(&node)];
        drop((executor, spawner));
        let still = tasks[0].recv_timeout(Duration::from_millis(20));
        assert_eq!(
            still,
            Err(RecvTimeoutError::Timeout),
            "a node keeps all threads"
        );
        let outer = Builder::new_current_thread().build().unwrap();
        outer.block_on(async { drop(node) });
        tasks.iter().for_each(is_dropped);
    }

    #[test]
    fn the_last_clone_may_be_dropped_on_one_of_its_own_threads() {
        for loads in [false, true] {
            let executor = Executor::dedicated("suicidal", 1);
            let spawner = match loads {
                true => executor.start_for_loads(),
                false => executor.start(),
            };
            let (spawner, (go_on, goes_on)) = (spawner.unwrap(), channel());
            let task = endless(&spawner);
            let last = spawner.clone();
            let drops_it = async move {
                goes_on.recv_timeout(LONG).unwrap();
                drop(last);
            };
            spawner.spawn(drops_it).unwrap();
            drop((executor, spawner));
            go_on.send(()).unwrap();
            is_dropped(&task);
        }
    }

    #[test]
    fn each_node_is_given_the_thread_with_the_fewest() {
        let executor = Executor::dedicated("spread", 3);
        let spawners = [executor.start().unwrap(), executor.clone().start().unwrap()];
        let mut nodes: Vec<_> = (0..6).map(|n| spawners[n % 2].for_node()).collect();
        let places = |nodes: &[Spawner]| {
            let mut places: Vec<_> = nodes.iter().map(thread_of).collect();
            places.sort();
            places
        };
        let twice = [
            "spread-0", "spread-0", "spread-1", "spread-1", "spread-2", "spread-2",
        ];
        assert_eq!(places(&nodes), twice);
        assert_eq!(
            thread_of(&nodes[0]),
            thread_of(&nodes[0].clone()),
            "it stays there"
        );
        // What leaves makes room.
        let left = thread_of(&nodes.remove(1));
        assert_eq!(thread_of(&spawners[0].for_node()), left);
    }

    #[test]
    fn threads_are_named_so_that_linux_shows_their_number() {
        let one = Executor::dedicated("a name of its own", 1).start().unwrap();
        assert_eq!(thread_of(&one), "a name of its own");
        let many = Dedicated::new("memcached-io-\u{e4}".into(), 12);
        assert_eq!(many.name_of(3), "memcached-io--3");
        assert_eq!(many.name_of(11), "memcached-io-11");
        let umlaut = Dedicated::new("memcached-i\u{e4}".into(), 12);
        assert_eq!(umlaut.name_of(11), "memcached-i-11");
        let error = Executor::dedicated("a\0b", 1).start().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    }

    #[test]
    fn a_task_that_panics_leaves_its_thread_to_the_others() {
        let spawner = Executor::dedicated("survives", 1).start().unwrap();
        let task = endless(&spawner);
        spawner.spawn(async { panic!("on purpose") }).unwrap();
        assert_eq!(thread_of(&spawner), "survives");
        assert_eq!(task.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
    }

    #[test]
    fn a_blocked_thread_holds_up_neither_another_nor_who_drops_it() {
        let executor = Executor::dedicated("blocked", 2);
        let spawner = executor.start().unwrap();
        let [blocked, free] = [spawner.for_node(), spawner.for_node()];
        let (begins, begun) = channel();
        let (go_on, goes_on) = channel::<()>();
        let blocks = async move {
            begins.send(()).unwrap();
            let _ = goes_on.recv_timeout(LONG);
        };
        blocked.spawn(blocks).unwrap();
        begun.recv_timeout(LONG).unwrap();
        assert_ne!(thread_of(&free), "");
        let (on_blocked, on_free) = (endless(&blocked), endless(&free));
        drop((executor, spawner, blocked, free));
        is_dropped(&on_free);
        // Only when it goes on.
        assert!(on_blocked.try_recv().is_err());
        drop(go_on);
        is_dropped(&on_blocked);
    }

    #[test]
    fn loads_take_whichever_thread_is_free_and_none_for_io() {
        let executor = Executor::dedicated("both", 2);
        let (io, loads) = (
            executor.start().unwrap(),
            executor.start_for_loads().unwrap(),
        );
        let (begins, begun) = channel();
        let mut held = Vec::new();
        for _ in 0..2 {
            let (begins, (go_on, goes_on)) = (begins.clone(), channel::<()>());
            held.push(go_on);
            let blocks = async move {
                begins.send(()).unwrap();
                let _ = goes_on.recv_timeout(LONG);
            };
            loads.spawn(blocks).unwrap();
        }
        // Both run at once, and I/O beside them.
        begun.recv_timeout(LONG).unwrap();
        begun.recv_timeout(LONG).unwrap();
        assert_eq!(thread_of(&io), "both-0");
        held.pop();
        assert_eq!(thread_of(&loads), "both", "one of the two is free again");
    }
}
