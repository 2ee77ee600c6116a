//! Threads of our own.
//!
//! Each I/O thread has a runtime of its own, and each node lives on one of them: its connections,
//! timers and keeper never move, and a node that keeps its thread busy makes none on another thread
//! late. Loads are the opposite: they may be slow or block, so whichever thread is free takes the next.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Threads of one name, started when they are first needed. They stop when this is dropped, which
/// waits for nothing and may happen anywhere, on one of these threads, too.
#[derive(Debug)]
pub(super) struct Dedicated {
    name: String,
    threads: usize,
    io: Mutex<Vec<IoThread>>,
    loads: Mutex<Option<Runtime>>,
}

/// Held by a node for as long as it lives on its thread.
pub(super) type Tenancy = Arc<()>;

/// A thread with a runtime of its own. It ends when this is dropped; a task that runs then ends
/// first.
#[derive(Debug)]
struct IoThread {
    handle: Handle,
    /// One more reference for each node that lives here.
    tenants: Tenancy,
    _stop: oneshot::Sender<Infallible>,
}

impl Dedicated {
    pub(super) fn new(name: String, threads: usize) -> Self {
        Self {
            name,
            threads: threads.max(1),
            io: Mutex::default(),
            loads: Mutex::default(),
        }
    }

    /// The I/O thread with the fewest nodes, and what counts one more.
    pub(super) fn io(&self) -> Result<(Handle, Tenancy)> {
        let mut threads = lock(&self.io);
        if threads.is_empty() {
            *threads = self.start_io().map_err(could_not_start)?;
        }
        let fewest = threads
            .iter()
            .min_by_key(|thread| Arc::strong_count(&thread.tenants));
        match fewest {
            Some(thread) => Ok((thread.handle.clone(), thread.tenants.clone())),
            None => unreachable!("at least one was started"),
        }
    }

    /// The threads for loads: apart from those for I/O, even of the same executor.
    pub(super) fn loads(&self) -> Result<Handle> {
        let mut runtime = lock(&self.loads);
        if let Some(runtime) = &*runtime {
            return Ok(runtime.handle().clone());
        }
        let started = self.start_loads().map_err(could_not_start)?;
        Ok(runtime.insert(started).handle().clone())
    }

    fn start_io(&self) -> io::Result<Vec<IoThread>> {
        self.check_name()?;
        let start = |number| IoThread::start(self.name_of(number));
        (0..self.threads).map(start).collect()
    }

    fn start_loads(&self) -> io::Result<Runtime> {
        self.check_name()?;
        Builder::new_multi_thread()
            .worker_threads(self.threads)
            .thread_name(&self.name)
            .enable_all()
            .build()
    }

    /// Starting a thread would panic.
    fn check_name(&self) -> io::Result<()> {
        match self.name.contains('\0') {
            true => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a NUL in their name",
            )),
            false => Ok(()),
        }
    }

    /// Linux shows 15 bytes of a name, so the number goes before its end.
    pub(super) fn name_of(&self, number: usize) -> String {
        const SHOWN: usize = 15;
        if self.threads == 1 {
            return self.name.clone();
        }
        let number = format!("-{number}");
        let mut room = SHOWN.saturating_sub(number.len()).min(self.name.len());
        while !self.name.is_char_boundary(room) {
            room -= 1;
        }
        format!("{}{number}", &self.name[..room])
    }
}

impl IoThread {
    fn start(name: String) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .thread_name(&name)
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new().name(name).spawn(move || {
            // Nothing is ever sent: it ends when the sender is dropped.
            let _ = runtime.block_on(stopped);
            // A look-up of a name that hangs is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            handle,
            tenants: Tenancy::default(),
            _stop: stop,
        })
    }
}

impl Drop for Dedicated {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which panics inside an async context; and the
        // last handle may well be dropped on one of those threads.
        let loads = self.loads.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = loads.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What could panic under it leaves what it guards as it was.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn could_not_start(cause: io::Error) -> Error {
    Error::configuration("the executor's threads could not be started").with_source(cause)
}
