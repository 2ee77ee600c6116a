//! One measurement, in a process of its own: a closed loop of so many callers.

use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::TimeValLike as _;
use tower_memcached::{Connector, Executor, SystemConnector};

use crate::canned::Canned;
use crate::contender::raw::{Connection, Reply};
use crate::contender::{Client, Outcome, async_memcached, memcache, memcache_async, ours};
use crate::spec::{BATCH, Cell, Contender, KEYS, Measured, Order, RAW_DEPTH, Runtime, Work};

pub fn keys() -> Arc<[String]> {
    (0..KEYS).map(|n| format!("versus:{n:08}")).collect()
}

/// What makes a key's value its own: the value begins with it.
fn mark(key: &str) -> &str {
    &key["versus:".len()..]
}

/// The bytes that every value has, but for its mark.
pub fn blank(length: usize) -> String {
    "v".repeat(length)
}

/// Makes it the value of this key.
pub fn stamp(value: &mut String, key: &str) {
    value.replace_range(..mark(key).len(), mark(key));
}

fn verify(key: &str, value: &[u8], length: usize) -> Outcome<()> {
    if value.len() == length && value.starts_with(mark(key).as_bytes()) {
        return Ok(());
    }
    Err(format!("not the value of {key}: {} bytes", value.len()).into())
}

/// Stores every key's value.
pub fn preload(server: std::net::SocketAddr, length: usize) -> Outcome<()> {
    let mut connection = Connection::open(server)?;
    let mut value = blank(length);
    for keys in keys().chunks(100) {
        for key in keys {
            stamp(&mut value, key);
            connection.queue_set(key, &value);
        }
        connection.flush()?;
        for key in keys {
            if !matches!(connection.reply()?, Reply::Stored) {
                return Err(format!("{key} was not stored").into());
            }
        }
    }
    Ok(())
}

/// When operations count.
#[derive(Clone, Copy)]
struct Window {
    from: Instant,
    to: Instant,
}

impl Window {
    fn opens_after(warm_up: Duration, duration: Duration) -> Self {
        let from = Instant::now() + warm_up;
        Self {
            from,
            to: from + duration,
        }
    }
}

/// What one thread has seen.
struct Tally {
    operations: u64,
    /// In microseconds.
    latency: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            operations: 0,
            latency: Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid bounds"),
            errors: 0,
            first_error: None,
        }
    }
}

static TALLIES: Mutex<Vec<Arc<Mutex<Tally>>>> = Mutex::new(Vec::new());

thread_local! {
    /// Each thread's own, so that its lock is never waited for.
    static TALLY: Arc<Mutex<Tally>> = {
        let tally = Arc::new(Mutex::new(Tally::default()));
        TALLIES.lock().unwrap_or_else(PoisonError::into_inner).push(tally.clone());
        tally
    };
}

impl Window {
    /// Counts a call of so many operations. One that is under way when the window closes counts for
    /// latency only: callers who wait longest must not be forgotten.
    fn count(&self, began: Instant, ended: Instant, operations: usize, outcome: Outcome<()>) {
        TALLY.with(|tally| {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = outcome {
                tally.errors += 1;
                tally.first_error.get_or_insert_with(|| error.to_string());
            }
            if ended >= self.from && began < self.to {
                let took = ended - began;
                tally.latency.saturating_record(took.as_micros() as u64);
                if ended < self.to {
                    tally.operations += operations as u64;
                }
            }
        });
    }
}

/// One caller, until the window closes.
async fn caller<C: Client>(
    mut client: C,
    cell: Cell,
    keys: Arc<[String]>,
    seed: u64,
    window: Window,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut value = blank(cell.value);
    let mut began = Instant::now();
    while began < window.to {
        let (operations, outcome) = match cell.work {
            Work::Mixed => {
                let key = &keys[random.usize(..KEYS)];
                let outcome = if random.u8(..10) == 0 {
                    stamp(&mut value, key);
                    client.set(key, value.as_bytes()).await
                } else {
                    let found = client.get(key).await;
                    found.and_then(|found| match found {
                        Some(found) => verify(key, found.deref(), cell.value),
                        None => Err(format!("{key} is not there").into()),
                    })
                };
                (1, outcome)
            }
            Work::GetMany | Work::Concurrent => {
                let first = random.usize(..=KEYS - BATCH);
                let asked = &keys[first..first + BATCH];
                let outcome = batch(&mut client, cell, asked).await;
                (BATCH, outcome)
            }
        };
        let ended = Instant::now();
        window.count(began, ended, operations, outcome);
        began = ended;
    }
}

async fn batch<C: Client>(client: &mut C, cell: Cell, keys: &[String]) -> Outcome<()> {
    let mut hits = 0;
    let mut wrong = None;
    let hit = |key: &[u8], value: &[u8]| {
        hits += 1;
        let checked = match std::str::from_utf8(key) {
            Ok(key) => verify(key, value, cell.value),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = checked {
            wrong = Some(error);
        }
    };
    match cell.work {
        Work::Concurrent => client.get_concurrently(keys, hit).await?,
        Work::GetMany | Work::Mixed => client.get_many(keys, hit).await?,
    }
    match wrong {
        Some(error) => Err(error),
        None if hits == keys.len() => Ok(()),
        None => Err(format!("{hits} of {} keys", keys.len()).into()),
    }
}

/// Runs all callers. The window is told once the client is there.
fn run(order: &Order, opened: mpsc::Sender<Window>) -> Outcome<()> {
    let cell = order.cell;
    if cell.contender.is_raw() {
        return run_raw(order, opened);
    }
    let runtime = match cell.runtime {
        Some(Runtime::Multi) => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?,
        Some(Runtime::Single) | None => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?,
    };
    let first = *order.servers.first().ok_or("no server")?;
    let connector: Arc<dyn Connector> = match cell.in_memory {
        true => Arc::new(Canned),
        false => Arc::new(SystemConnector::new()),
    };
    let pool = cell.pool.unwrap_or(1);
    runtime.block_on(async {
        match cell.contender {
            Contender::Current => {
                let client = ours::Whole::new(&order.servers[..1], connector, Executor::current())?;
                callers(client, order, opened).await
            }
            Contender::Dedicated => {
                let executor = Executor::dedicated("memcached-io", 1);
                let client = ours::Whole::new(&order.servers[..1], connector, executor)?;
                callers(client, order, opened).await
            }
            Contender::Ring3 => {
                let client = ours::Whole::new(&order.servers, connector, Executor::current())?;
                callers(client, order, opened).await
            }
            Contender::Transport => {
                let transports = ours::Transports::new(&order.servers[..1], connector)?;
                callers(transports, order, opened).await
            }
            Contender::Transport3 => {
                let transports = ours::Transports::new(&order.servers, connector)?;
                callers(transports, order, opened).await
            }
            Contender::MemcacheAsync => {
                let client = memcache_async::Pooled::new(first, pool).await?;
                callers(client, order, opened).await
            }
            Contender::AsyncMemcached => {
                let client = async_memcached::Pooled::new(first, pool).await?;
                callers(client, order, opened).await
            }
            Contender::Memcache => {
                callers(memcache::Own::new(first, pool).await?, order, opened).await
            }
            Contender::MemcacheBb8 => {
                let client = memcache::Pooled::new(first, pool).await?;
                callers(client, order, opened).await
            }
            Contender::Raw | Contender::Raw4 => unreachable!("has no runtime"),
        }
    })
}

async fn callers<C: Client>(client: C, order: &Order, opened: mpsc::Sender<Window>) -> Outcome<()> {
    let keys = keys();
    let window = Window::opens_after(
        Duration::from_secs_f64(order.warm_up),
        Duration::from_secs_f64(order.duration),
    );
    opened.send(window)?;
    let callers: Vec<_> = (0..order.cell.tasks)
        .map(|task| {
            let caller = caller(
                client.clone(),
                order.cell,
                keys.clone(),
                task as u64,
                window,
            );
            tokio::spawn(caller)
        })
        .collect();
    for caller in callers {
        caller.await?;
    }
    Ok(())
}

/// Loops over blocking sockets, a thread for each.
fn run_raw(order: &Order, opened: mpsc::Sender<Window>) -> Outcome<()> {
    let server = *order.servers.first().ok_or("no server")?;
    let connections = if order.cell.contender == Contender::Raw4 {
        4
    } else {
        1
    };
    let connections = (0..connections).map(|_| Connection::open(server));
    let connections = connections.collect::<io::Result<Vec<_>>>()?;
    let window = Window::opens_after(
        Duration::from_secs_f64(order.warm_up),
        Duration::from_secs_f64(order.duration),
    );
    opened.send(window)?;
    let keys = keys();
    thread::scope(|scope| {
        let loops: Vec<_> = (0..)
            .zip(connections)
            .map(|(seed, connection)| {
                let keys = &keys;
                scope.spawn(move || raw_loop(connection, order.cell, keys, seed, window))
            })
            .collect();
        for looping in loops {
            looping.join().map_err(|_| "a loop panicked")?;
        }
        Ok(())
    })
}

fn raw_loop(mut connection: Connection, cell: Cell, keys: &[String], seed: u64, window: Window) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut value = blank(cell.value);
    // Of a get its key, of a set none.
    let mut asked: Vec<Option<usize>> = Vec::new();
    let mut began = Instant::now();
    while began < window.to {
        let outcome = match cell.work {
            Work::Mixed => {
                asked.clear();
                asked.extend((0..RAW_DEPTH.min(cell.tasks)).map(|_| {
                    let place = random.usize(..KEYS);
                    let key = &keys[place];
                    if random.u8(..10) == 0 {
                        stamp(&mut value, key);
                        connection.queue_set(key, &value);
                        None
                    } else {
                        connection.queue_get(key);
                        Some(place)
                    }
                }));
                raw_round(&mut connection, &asked, keys, cell.value)
            }
            Work::GetMany | Work::Concurrent => {
                asked.clear();
                for _ in 0..cell.tasks {
                    let first = random.usize(..=KEYS - BATCH);
                    let many = first..first + BATCH;
                    connection.queue_get_many(&keys[many.clone()]);
                    asked.extend(many.map(Some));
                }
                raw_batches(&mut connection, &asked, keys, cell.value)
            }
        };
        let ended = Instant::now();
        let failed = outcome.is_err();
        window.count(began, ended, asked.len(), outcome);
        if failed {
            // Out of step with its replies.
            return;
        }
        began = ended;
    }
}

fn raw_round(
    connection: &mut Connection,
    asked: &[Option<usize>],
    keys: &[String],
    length: usize,
) -> Outcome<()> {
    connection.flush()?;
    for asked in asked {
        match (asked, connection.reply()?) {
            (Some(place), Reply::Value(value)) => verify(&keys[*place], value, length)?,
            (None, Reply::Stored) => {}
            _ => return Err("another reply than was asked for".into()),
        }
    }
    Ok(())
}

fn raw_batches(
    connection: &mut Connection,
    asked: &[Option<usize>],
    keys: &[String],
    length: usize,
) -> Outcome<()> {
    connection.flush()?;
    for batch in asked.chunks(BATCH) {
        for place in batch.iter().flatten() {
            match connection.reply()? {
                Reply::Value(value) => verify(&keys[*place], value, length)?,
                _ => return Err("another reply than was asked for".into()),
            }
        }
        if !matches!(connection.reply()?, Reply::End) {
            return Err("more replies than were asked for".into());
        }
    }
    Ok(())
}

/// What this process has used.
#[derive(Clone, Copy)]
struct Used {
    /// In microseconds.
    cpu: i64,
    switches: i64,
}

impl Used {
    fn now() -> Outcome<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        Ok(Self {
            cpu: usage.user_time().num_microseconds() + usage.system_time().num_microseconds(),
            switches: usage.voluntary_context_switches() + usage.involuntary_context_switches(),
        })
    }
}

fn sleep_until(instant: Instant) {
    thread::sleep(instant.saturating_duration_since(Instant::now()));
}

/// A recorder as services have one. What it keeps is worked off each second, as an exporter would.
fn record_metrics() -> Outcome<()> {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().install_recorder()?;
    thread::Builder::new()
        .name("metrics".into())
        .spawn(move || {
            loop {
                thread::sleep(Duration::from_secs(1));
                recorder.run_upkeep();
            }
        })?;
    Ok(())
}

/// Takes one measurement.
pub fn measure(order: &Order) -> Outcome<Measured> {
    // A thousand callers may have a thousand connections.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    if !order.cell.contender.is_raw() && !order.cell.contender.is_peer() {
        record_metrics()?;
    }

    let (opened, window) = mpsc::channel();
    let (began, ended) = thread::scope(|scope| -> Outcome<_> {
        let running = scope.spawn(move || run(order, opened));
        let used = match window.recv() {
            Ok(window) => {
                sleep_until(window.from);
                let began = Used::now()?;
                sleep_until(window.to);
                Some((began, Used::now()?))
            }
            // It says why below.
            Err(mpsc::RecvError) => None,
        };
        running.join().map_err(|_| "the callers panicked")??;
        Ok(used.ok_or("nothing has run")?)
    })?;

    let mut total = Tally::default();
    let tallies = TALLIES.lock().unwrap_or_else(PoisonError::into_inner);
    for tally in tallies.iter() {
        let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        total.operations += tally.operations;
        total.errors += tally.errors;
        total.latency.add(&tally.latency)?;
        if let Some(error) = &tally.first_error {
            total.first_error.get_or_insert_with(|| error.clone());
        }
    }
    let each = |amount: i64| amount as f64 / total.operations.max(1) as f64;
    let quantile = |quantile: f64| total.latency.value_at_quantile(quantile) as f64;
    Ok(Measured {
        throughput: total.operations as f64 / order.duration,
        p50: quantile(0.5),
        p99: quantile(0.99),
        p999: quantile(0.999),
        max: total.latency.max() as f64,
        cpu: each(ended.cpu - began.cpu),
        switches: each(ended.switches - began.switches),
        errors: total.errors,
        first_error: total.first_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_memory_nobody_has_to_listen_and_every_value_is_right() {
        let order = Order {
            cell: Cell {
                contender: Contender::Ring3,
                runtime: Some(Runtime::Single),
                pool: None,
                work: Work::Mixed,
                tasks: 4,
                value: 100,
                in_memory: true,
            },
            servers: (1..4).map(|port| ([127, 0, 0, 1], port).into()).collect(),
            warm_up: 0.0,
            duration: 0.1,
        };
        let (opened, _window) = mpsc::channel();
        run(&order, opened).unwrap();
        let mut operations = 0;
        for tally in TALLIES.lock().unwrap().iter() {
            let tally = tally.lock().unwrap();
            assert_eq!((tally.errors, &tally.first_error), (0, &None));
            operations += tally.operations;
        }
        assert!(operations > 0);
    }
}
