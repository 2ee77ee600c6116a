//! A loader for database drivers that block: it runs them on threads of its own.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::Loader;
use crate::error::{BoxError, Error, Result};
use crate::key::Key;
use crate::value::Payload;

/// A [`Loader`] made of a closure that blocks.
///
/// The closure runs on threads that belong to this loader: neither the caller's threads nor those
/// of the client's connections ever wait for it. Threads are started when they are needed; they end
/// after 10 s without work, and with the last clone, where a closure that runs then ends first.
///
/// As many loads run at once as there are threads; more wait for their turn. A load whose caller has
/// given up keeps its thread until the closure returns, since nothing can stop it: give the driver
/// time-outs of its own.
///
/// ```
/// use tower_memcached::{BlockingLoader, Key, ReadThroughLayer, Ttl};
///
/// # fn main() -> Result<(), tower_memcached::Error> {
/// let loader = BlockingLoader::new("items-db", 8, |key: &Key| {
///     // A blocking query.
///     std::fs::read(format!("/var/lib/items/{key:?}")).map(Some)
/// })?;
/// let layer = ReadThroughLayer::new(loader, Ttl::secs(60));
/// # drop(layer);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct BlockingLoader {
    threads: Arc<Threads>,
    load: Arc<Load>,
}

type Load = dyn Fn(&Key) -> Loaded + Send + Sync;
type Loaded = Result<Option<Payload>, BoxError>;

/// The blocking pool of a runtime that nobody runs anything else in. It has no thread but those of
/// the pool.
struct Threads {
    runtime: Option<Runtime>,
    handle: Handle,
    /// One for each thread. Without it loads would queue unseen in the pool, where those whose
    /// callers have given up look like any other.
    free: Arc<Semaphore>,
}

impl BlockingLoader {
    /// A loader that runs `load` on up to `threads` threads of that name. What the closure returns
    /// becomes the loader's value or error; a panic of it is an error as well.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) for zero threads, or
    /// a NUL in their name.
    pub fn new<F, V, E>(name: impl Into<String>, threads: usize, load: F) -> Result<Self>
    where
        F: Fn(&Key) -> Result<Option<V>, E> + Send + Sync + 'static,
        V: Into<Payload>,
        E: Into<BoxError>,
    {
        if threads == 0 {
            return Err(Error::configuration("a blocking loader without threads"));
        }
        let threads = threads.min(Semaphore::MAX_PERMITS);
        let name = name.into();
        if name.contains('\0') {
            return Err(Error::configuration(
                "a NUL in the name of a blocking loader's threads",
            ));
        }
        let runtime = Builder::new_current_thread()
            .max_blocking_threads(threads)
            .thread_name(name)
            .build()
            .map_err(|error| {
                Error::configuration("a blocking loader's threads could not be set up")
                    .with_source(error)
            })?;
        Ok(Self {
            threads: Arc::new(Threads {
                handle: runtime.handle().clone(),
                runtime: Some(runtime),
                free: Arc::new(Semaphore::new(threads)),
            }),
            load: Arc::new(move |key| match load(key) {
                Ok(value) => Ok(value.map(Into::into)),
                Err(error) => Err(error.into()),
            }),
        })
    }
}

impl Loader for BlockingLoader {
    /// Runs the closure, when a thread is free.
    ///
    /// # Errors
    /// The closure's; or that it panicked.
    ///
    /// # Cancel safety
    /// Dropping the future before the closure has started means that it never runs. After that it
    /// runs to its end, and keeps its thread until then.
    async fn load(&self, key: &Key) -> Loaded {
        let place = self.threads.free.clone().acquire_owned().await?;
        let (load, key) = (self.load.clone(), key.clone());
        let task = self.threads.handle.spawn_blocking(move || {
            let _place = place;
            load(&key)
        });
        match (&mut Started(task).0).await {
            Ok(loaded) => loaded,
            Err(error) => Err(match error.try_into_panic() {
                Ok(panic) => format!("the loader panicked: {}", message(&*panic)).into(),
                Err(cancelled) => cancelled.into(),
            }),
        }
    }
}

impl fmt::Debug for BlockingLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingLoader")
            .field("free", &self.threads.free.available_permits())
            .finish_non_exhaustive()
    }
}

/// A task in the pool. One that no thread has begun with when this is dropped never begins.
struct Started(JoinHandle<Loaded>);

impl Drop for Started {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    let formatted = || panic.downcast_ref::<String>().map(String::as_str);
    literal.or_else(formatted).unwrap_or("without a message")
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which panics inside an async context; and the
        // last clone may well be dropped on one of those threads.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::Duration;

    use futures::FutureExt as _;
    use futures::future::{join_all, poll_immediate};
    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::ErrorKind;

    const LONG: Duration = Duration::from_secs(20);

    fn key(name: &str) -> Key {
        Key::new(name).unwrap()
    }

    /// How many threads of that name this process has. Linux keeps 15 bytes of a name.
    #[cfg(target_os = "linux")]
    fn threads(name: &str) -> usize {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| {
            // A thread may have ended since.
            std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
        });
        names.filter(|comm| comm.trim_end() == name).count()
    }

    #[cfg(target_os = "linux")]
    async fn until_gone(name: &str) {
        let begun = Instant::now();
        while threads(name) > 0 {
            // Far less than the 10 s after which an idle thread ends by itself.
            assert!(begun.elapsed() < Duration::from_secs(5), "{name} lives");
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// A closure that says when it begins, and goes on when it is told to.
    struct Held {
        begun: Receiver<()>,
        go_on: SyncSender<()>,
    }

    fn held() -> (
        Held,
        impl Fn(&Key) -> Result<Option<String>, Infallible> + Send + Sync,
    ) {
        let (begins, begun) = sync_channel(100);
        let (go_on, goes_on) = sync_channel(100);
        let goes_on = Mutex::new(goes_on);
        let load = move |key: &Key| {
            let _ = begins.send(());
            // Whether it is told to or nobody is there any more.
            let _ = goes_on.lock().unwrap().recv_timeout(LONG);
            Ok(Some(String::from_utf8_lossy(key.as_bytes()).into_owned()))
        };
        (Held { begun, go_on }, load)
    }

    impl Held {
        async fn has_begun(&self) {
            let begun = Instant::now();
            while self.begun.try_recv().is_err() {
                assert!(begun.elapsed() < LONG, "no load began");
                sleep(Duration::from_millis(1)).await;
            }
        }

        fn has_not_begun(&self) -> bool {
            self.begun.try_recv().is_err()
        }
    }

    async fn in_time<T>(future: impl Future<Output = T>) -> T {
        timeout(LONG, future).await.unwrap()
    }

    #[test]
    fn without_threads_it_is_a_configuration_error() {
        let none = BlockingLoader::new("none", 0, |_: &Key| Ok::<Option<&str>, BoxError>(None));
        assert_eq!(none.unwrap_err().kind(), ErrorKind::InvalidConfiguration);
        let nul = BlockingLoader::new("a\0b", 1, |_: &Key| Ok::<Option<&str>, BoxError>(None));
        assert_eq!(nul.unwrap_err().kind(), ErrorKind::InvalidConfiguration);
        assert!(
            BlockingLoader::new("many", usize::MAX, |_: &Key| {
                Ok::<Option<&str>, BoxError>(None)
            })
            .is_ok()
        );
    }

    #[tokio::test]
    async fn values_misses_and_errors_pass() {
        let loader = BlockingLoader::new("passes", 1, |key: &Key| match key.as_bytes() {
            b"there" => Ok(Some("value")),
            b"absent" => Ok(None),
            _ => Err(std::io::Error::other("no such table")),
        })
        .unwrap();
        let there = in_time(loader.load(&key("there"))).await.unwrap().unwrap();
        assert_eq!(*crate::Value::from(there), b"value"[..]);
        assert!(
            in_time(loader.load(&key("absent")))
                .await
                .unwrap()
                .is_none()
        );
        let error = in_time(loader.load(&key("other"))).await.unwrap_err();
        assert!(error.is::<std::io::Error>());
        assert_eq!(error.to_string(), "no such table");
    }

    #[test]
    fn no_runtime_is_needed() {
        let loader = BlockingLoader::new("anywhere", 1, |_: &Key| Ok::<_, BoxError>(Some("v")));
        let loaded = futures::executor::block_on(loader.unwrap().load(&key("k")));
        assert!(loaded.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_costs_no_thread() {
        let loader = BlockingLoader::new("panics", 1, |key: &Key| match key.as_bytes() {
            b"literal" => panic!("a bug in the loader"),
            b"formatted" => panic!("a bug with {key:?}"),
            b"other" => std::panic::panic_any(7),
            _ => Ok::<_, BoxError>(Some("v")),
        })
        .unwrap();
        for (name, said) in [
            ("literal", "the loader panicked: a bug in the loader"),
            ("formatted", "the loader panicked: a bug with "),
            ("other", "the loader panicked: without a message"),
        ] {
            let error = in_time(loader.load(&key(name))).await.unwrap_err();
            assert!(error.to_string().starts_with(said), "{error}");
        }
        assert!(in_time(loader.load(&key("fine"))).await.is_ok());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_callers_only_thread_is_not_blocked() {
        let (held, load) = held();
        let loader = BlockingLoader::new("not-yours", 1, load).unwrap();
        let (key, mut ticks) = (key("k"), 0);
        let mut loading = pin!(loader.load(&key));
        // All of this happens on the thread that awaits the load, while the load blocks its own.
        in_time(async {
            while ticks < 10 {
                assert!(poll_immediate(&mut loading).await.is_none());
                sleep(Duration::from_millis(1)).await;
                ticks += 1;
            }
            held.has_begun().await;
        })
        .await;
        held.go_on.send(()).unwrap();
        assert!(in_time(loading).await.unwrap().is_some());
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn as_many_run_at_once_as_there_are_threads_and_those_start_on_demand() {
        let (held, load) = held();
        let loader = BlockingLoader::new("on-demand", 3, load).unwrap();
        assert_eq!(threads("on-demand"), 0);
        let key = key("k");
        let mut loads: Vec<_> = (0..5).map(|_| Box::pin(loader.load(&key))).collect();
        assert!((&mut loads[0]).now_or_never().is_none());
        held.has_begun().await;
        assert_eq!(threads("on-demand"), 1);
        for load in &mut loads {
            assert!(load.now_or_never().is_none());
        }
        held.has_begun().await;
        held.has_begun().await;
        assert_eq!(threads("on-demand"), 3);
        assert_eq!(loader.threads.free.available_permits(), 0);
        for _ in 0..5 {
            held.go_on.send(()).unwrap();
        }
        assert!(in_time(join_all(loads)).await.iter().all(Result::is_ok));
        assert_eq!(threads("on-demand"), 3);
    }

    #[tokio::test]
    async fn a_load_whose_caller_left_keeps_its_thread_and_one_that_waited_never_runs() {
        let (held, load) = held();
        let loader = BlockingLoader::new("left", 1, load).unwrap();
        let (first, second, third) = (key("first"), key("second"), key("third"));
        let mut runs = Box::pin(loader.load(&first));
        assert!((&mut runs).now_or_never().is_none());
        held.has_begun().await;
        drop(runs);
        assert_eq!(loader.threads.free.available_permits(), 0, "it still runs");
        let mut waits = Box::pin(loader.load(&second));
        let mut waits_too = Box::pin(loader.load(&third));
        assert!((&mut waits).now_or_never().is_none());
        assert!((&mut waits_too).now_or_never().is_none());
        drop(waits);
        assert!(held.has_not_begun());
        held.go_on.send(()).unwrap();
        held.go_on.send(()).unwrap();
        let loaded = in_time(waits_too).await.unwrap().unwrap();
        assert_eq!(*crate::Value::from(loaded), b"third"[..]);
        held.has_begun().await;
        assert!(held.has_not_begun(), "the second never ran");
    }

    /// Between its permit and its thread a load is in the pool's queue: the pool is occupied behind
    /// the loader's back, to have one there for as long as it takes.
    #[tokio::test]
    async fn a_load_dropped_before_its_thread_took_it_never_runs() {
        let (held, load) = held();
        let loader = BlockingLoader::new("untaken", 1, load).unwrap();
        let (free, waits) = sync_channel::<()>(0);
        let occupies = loader
            .threads
            .handle
            .spawn_blocking(move || waits.recv_timeout(LONG));
        let key = key("k");
        let mut loading = Box::pin(loader.load(&key));
        assert!((&mut loading).now_or_never().is_none());
        assert_eq!(loader.threads.free.available_permits(), 0);
        drop(loading);
        drop(free);
        assert!(in_time(occupies).await.is_ok());
        // The next has its turn, which the one that was dropped gave back.
        held.go_on.send(()).unwrap();
        assert!(in_time(loader.load(&key)).await.is_ok());
        held.has_begun().await;
        assert!(held.has_not_begun());
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn threads_end_with_the_last_clone_and_what_runs_ends_first() {
        let (held, load) = held();
        let loader = BlockingLoader::new("last-clone", 2, load).unwrap();
        let (key, clone) = (key("k"), loader.clone());
        for _ in 0..2 {
            let mut loading = Box::pin(loader.load(&key));
            assert!((&mut loading).now_or_never().is_none());
            held.has_begun().await;
        }
        drop(loader);
        held.go_on.send(()).unwrap();
        held.go_on.send(()).unwrap();
        in_time(async {
            while clone.threads.free.available_permits() < 2 {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        // Its clone still loads.
        held.go_on.send(()).unwrap();
        assert!(in_time(clone.load(&key)).await.is_ok());
        held.has_begun().await;
        assert!(threads("last-clone") > 0);
        let mut runs = Box::pin(clone.load(&key));
        assert!((&mut runs).now_or_never().is_none());
        held.has_begun().await;
        drop(runs);
        // In an async context, where a runtime may not be dropped.
        drop(clone);
        assert!(threads("last-clone") > 0, "one runs");
        held.go_on.send(()).unwrap();
        until_gone("last-clone").await;
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_last_clone_may_be_dropped_on_a_thread_of_its_own() {
        let own: Arc<Mutex<Option<BlockingLoader>>> = Arc::default();
        let (dropped, done) = tokio::sync::oneshot::channel();
        let (taken, dropped) = (own.clone(), Mutex::new(Some(dropped)));
        let (held, load) = held();
        let loader = BlockingLoader::new("own-thread", 1, move |key: &Key| {
            let _loaded = load(key);
            let last = taken.lock().unwrap().take();
            let is_last = last.as_ref().map(|last| Arc::strong_count(&last.threads));
            drop(last);
            let dropped = dropped.lock().unwrap().take().unwrap();
            dropped.send(is_last).unwrap();
            Ok::<Option<&str>, BoxError>(None)
        })
        .unwrap();
        let key = key("k");
        let mut loading = Box::pin(loader.load(&key));
        assert!((&mut loading).now_or_never().is_none());
        held.has_begun().await;
        assert_eq!(threads("own-thread"), 1);
        drop(loading);
        *own.lock().unwrap() = Some(loader);
        held.go_on.send(()).unwrap();
        assert_eq!(in_time(done).await.unwrap(), Some(1));
        until_gone("own-thread").await;
    }
}
