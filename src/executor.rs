//! Where sockets, timers and probes run: the bulkhead between the application's threads and ours.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::{Either, select};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::{Error, ErrorKind, Result};

/// Where a client's I/O runs.
///
/// The default is [`dedicated`](Self::dedicated) with one thread: the application's threads only
/// touch a bounded queue, so that neither a blocked application nor a busy connection can make
/// the other late. [`current`](Self::current) has the lowest latency for a single request, since
/// no other thread has to wake up, and is what simulations and paused-time tests want.
///
/// Operations may be awaited in any tokio runtime that has its time driver enabled, and with a
/// dedicated or given executor outside of every runtime, too.
#[derive(Clone, Debug)]
pub struct Executor(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Dedicated(Arc<Dedicated>),
    Current,
    Handle(Handle),
}

#[derive(Debug)]
struct Dedicated {
    name: String,
    threads: usize,
    runtime: OnceLock<Option<Runtime>>,
}

impl Executor {
    /// Threads of our own, started when a client is built and stopped when the last client using
    /// them, and the last clone of this, is dropped. Clones share the threads.
    ///
    /// `name` names the threads; of `threads` at least one is started.
    #[must_use]
    pub fn dedicated(name: impl Into<String>, threads: usize) -> Self {
        Self(Kind::Dedicated(Arc::new(Dedicated {
            name: name.into(),
            threads: threads.max(1),
            runtime: OnceLock::new(),
        })))
    }

    /// The tokio runtime in which the client is first used, found then. Using the client first
    /// outside of one is an [`ErrorKind::NoRuntime`]. When that runtime is shut down, the client
    /// is too.
    #[must_use]
    pub fn current() -> Self {
        Self(Kind::Current)
    }

    /// A runtime of yours. It needs its I/O and time drivers enabled.
    #[must_use]
    pub fn handle(handle: Handle) -> Self {
        Self(Kind::Handle(handle))
    }

    /// Starts threads if there are to be any.
    pub(crate) fn start(&self) -> Result<Spawner> {
        let known = OnceLock::new();
        match &self.0 {
            Kind::Dedicated(dedicated) => {
                let _ = known.set(dedicated.start()?);
            }
            Kind::Handle(handle) => {
                let _ = known.set(handle.clone());
            }
            Kind::Current => {}
        }
        Ok(Spawner(Arc::new(Spawning {
            known,
            _executor: self.clone(),
        })))
    }
}

impl Default for Executor {
    /// One dedicated thread named `memcached-io`.
    fn default() -> Self {
        Self::dedicated("memcached-io", 1)
    }
}

impl Dedicated {
    fn start(&self) -> Result<Handle> {
        let mut failure = None;
        let runtime = self.runtime.get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(self.threads)
                .thread_name(&self.name)
                .enable_all()
                .build()
                .map_err(|error| failure = Some(error))
                .ok()
        });
        match runtime {
            Some(runtime) => Ok(runtime.handle().clone()),
            None => {
                let error = Error::configuration("the executor's threads could not be started");
                Err(match failure {
                    Some(cause) => error.with_source(cause),
                    None => error,
                })
            }
        }
    }
}

impl Drop for Dedicated {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which panics inside an async context; and the
        // last handle may well be dropped on one of those threads.
        if let Some(runtime) = self.runtime.take().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// A started [`Executor`], shared by all parts of one client.
#[derive(Clone, Debug)]
pub(crate) struct Spawner(Arc<Spawning>);

#[derive(Debug)]
struct Spawning {
    known: OnceLock<Handle>,
    /// Keeps dedicated threads running.
    _executor: Executor,
}

impl Spawner {
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

    /// A timer in the caller's own runtime, so that a blocked I/O thread cannot make it late; in
    /// ours where the caller has none.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> Result<Sleep> {
        if Handle::try_current().is_ok() {
            return Ok(sleep_until(deadline));
        }
        let _entered = self.handle()?.enter();
        Ok(sleep_until(deadline))
    }
}

/// A timer that fires later than this shows that *we* were late: the request it ends has run out
/// of time, but nobody is to blame. tokio's timers have a granularity of 1 ms.
pub(crate) const LATE: Duration = Duration::from_millis(5);

/// `now + duration`, or a moment that will not come: a timeout of `Duration::MAX` means none.
pub(crate) fn after(now: Instant, duration: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365 * 30);
    now + duration.min(FAR)
}

/// A timer for a caller that may be outside of every runtime, and may have no executor of ours.
pub(crate) fn timer(spawner: Option<&Spawner>, deadline: Instant) -> Result<Sleep> {
    match spawner {
        Some(spawner) => spawner.sleep_until(deadline),
        None if Handle::try_current().is_ok() => Ok(sleep_until(deadline)),
        None => Err(no_runtime()),
    }
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
    use super::*;

    #[test]
    fn current_outside_a_runtime_is_a_typed_error() {
        let spawner = Executor::current().start().unwrap();
        let error = spawner.spawn(async {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoRuntime);
    }

    #[test]
    fn threads_stop_with_the_last_clone_even_inside_a_runtime() {
        let executor = Executor::dedicated("stops", 1);
        let spawner = executor.start().unwrap();
        let (alive, gone) = std::sync::mpsc::channel::<()>();
        spawner
            .spawn(async move {
                let _alive = alive;
                std::future::pending::<()>().await;
            })
            .unwrap();
        drop(executor);
        let outer = Builder::new_current_thread().build().unwrap();
        outer.block_on(async { drop(spawner) });
        // The task is dropped with its runtime, and its sender with it.
        let ended = gone.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(ended, Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }
}
