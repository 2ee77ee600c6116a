//! What stands between the cache and the database: whatever happens to the cache, no more reaches
//! the database than it can bear.
//!
//! A load passes four things, in this order, and is shed by the first that does not let it:
//!
//! 1. the throttle (`throttle.rs`): while most loads fail, only few are made;
//! 2. the queue, which has only so many places,
//! 3. the bulkhead (`crate::bulkhead`): so many loads at once, in the order in which they came;
//! 4. the rate (`rate.rs`): so many starts each second. It is last, since its cells count starts.
//!
//! A [`LoadGuard`] may be a group of another: then its own first three, those of the database's
//! guard, and the rates of both come one after the other. Whoever waits in a group's queue has no
//! place of the database's. Whoever waits in the database's queue has one of the group's, so that a
//! group fills no more of that queue than it may have loads. Everything that was taken is given back
//! when a later step sheds the load or its caller leaves; a cell of the group's rate is kept for
//! its next load.

mod limits;
mod rate;
#[cfg(test)]
mod tests;
mod throttle;

use std::fmt;
use std::future::{Future, poll_fn};
use std::iter::successors;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

pub use self::limits::LoadLimits;
use self::rate::{Cell, Rate};
use self::throttle::{SentIn, Throttle};
use crate::bulkhead::{Place, Room};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{Spawner, after, until};
use crate::rate::Cells;
use crate::telemetry;

/// How long somebody is willing to wait for their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until that moment.
    Until(Instant),
    /// Not at all: it is done now or not.
    Now,
}

impl Patience {
    /// The same, but not beyond `moment`.
    fn at_most(self, moment: Instant) -> Self {
        match self {
            Self::Until(own) => Self::Until(own.min(moment)),
            Self::Now => Self::Now,
        }
    }
}

/// Protects one database from loads. Share one, by cloning it, among all clients, groups and
/// layers that load from that database.
///
/// ```
/// use tower_memcached::{LoadGuard, LoadLimits};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let database = LoadGuard::new("items", LoadLimits::default().max_concurrent(32))?;
/// let reports = database.group("reports", LoadLimits::default().max_concurrent(4).rate(10))?;
///
/// let price = reports.run(async { Ok::<_, std::io::Error>(42) }).await??;
/// assert_eq!(price, 42);
/// assert_eq!(database.status().started, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LoadGuard(Arc<Level>);

impl Default for LoadGuard {
    /// One of its own, named `database`, with the default limits.
    fn default() -> Self {
        match Self::new("database", LoadLimits::default()) {
            Ok(guard) => guard,
            Err(_) => unreachable!("the default limits make sense"),
        }
    }
}

/// One guard: of a database, or of a group.
struct Level {
    name: Arc<str>,
    parent: Option<LoadGuard>,
    /// Titled with what it guards, in words.
    bulkhead: Arc<Room>,
    rate: Rate,
    terms: ArcSwap<Terms>,
    queued: Shown,
    running: Shown,
    started: AtomicU64,
    failed: AtomicU64,
    shed: [AtomicU64; Shed::COUNT],
    /// A moving average of what loads that succeeded took, in nanoseconds; 0 before the first.
    usual: AtomicU64,
}

/// Limits in force, with what goes with them.
struct Terms {
    limits: LoadLimits,
    throttle: Option<Arc<Throttle>>,
    cells: Option<Arc<Cells>>,
}

impl Terms {
    /// What is known of the database stays while it is judged in the same way, and what has started
    /// while the rate is the same.
    fn new(limits: LoadLimits, before: Option<&Self>) -> Self {
        let throttle = before.filter(|before| before.limits.throttles_like(&limits));
        let cells = before.filter(|before| before.limits.has_rate_of(&limits));
        Self {
            throttle: match throttle {
                Some(before) => before.throttle.clone(),
                None => limits.make_throttle().map(Arc::new),
            },
            cells: match cells {
                Some(before) => before.cells.clone(),
                None => limits.make_cells().map(Arc::new),
            },
            limits,
        }
    }
}

impl Level {
    fn learn(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let usual = match self.usual.load(Ordering::Relaxed) {
            0 => took,
            usual => usual - usual / 8 + took / 8,
        };
        // Of two at once one is lost, which matters to nobody.
        self.usual.store(usual, Ordering::Relaxed);
    }

    fn is_long(&self, ran: Duration) -> bool {
        // A moment is nothing to go by.
        const LEAST: Duration = Duration::from_millis(10);
        let usual = Duration::from_nanos(self.usual.load(Ordering::Relaxed));
        !usual.is_zero() && ran >= usual.saturating_mul(HANGS).max(LEAST)
    }
}

impl LoadGuard {
    /// The guard of the database of that name, which errors and metrics call it by.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] for limits that let nothing pass or make no sense.
    pub fn new(name: impl Into<Arc<str>>, limits: LoadLimits) -> Result<Self> {
        let name = name.into();
        let title = format!("the database {name:?}");
        Self::make(name, title, None, &limits)
    }

    /// A guard for one functional group of those who load from the same database: its own limits,
    /// and those of `self` on top. A group may have groups.
    ///
    /// Each has a throttle of its own unless it is [switched off](LoadLimits::without_throttle),
    /// since the loads of a group may be the only ones that fail; those of the others are not held
    /// back for it while at least half of all succeed.
    ///
    /// A load that has its cell of the group's [rate](LoadLimits::rate) may have to wait for one of
    /// the database's. Only one load of the group does so at a time, so that within a second the
    /// group may start one load more than its rate and burst; the database's own rate is exact.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn group(&self, name: impl Into<Arc<str>>, limits: LoadLimits) -> Result<Self> {
        let name = name.into();
        let title = format!("the group {name:?} of {}", self.0.bulkhead.title());
        Self::make(name, title, Some(self.clone()), &limits)
    }

    fn make(
        name: Arc<str>,
        title: String,
        parent: Option<Self>,
        limits: &LoadLimits,
    ) -> Result<Self> {
        limits.validate()?;
        Ok(Self(Arc::new(Level {
            queued: Shown::new(telemetry::LOADS_QUEUED, &name),
            running: Shown::new(telemetry::LOADS_RUNNING, &name),
            name,
            parent,
            bulkhead: Room::new(title, limits.places()),
            rate: Rate::default(),
            terms: ArcSwap::from_pointee(Terms::new(limits.clone(), None)),
            started: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            shed: Default::default(),
            usual: AtomicU64::new(0),
        })))
    }

    /// Other limits from now on, for all clones. Loads under way go on; those that wait do so as long
    /// as they were to. A throttle or a rate that has changed starts anew.
    ///
    /// # Errors
    /// As [`new`](Self::new); the limits then stay as they were.
    pub fn set_limits(&self, limits: LoadLimits) -> Result<()> {
        limits.validate()?;
        let level = &*self.0;
        level.bulkhead.set_limits(limits.places());
        let terms = Terms::new(limits, Some(&level.terms.load()));
        level.terms.store(Arc::new(terms));
        Ok(())
    }

    /// What it does now, and has done so far.
    #[must_use]
    pub fn status(&self) -> LoadStatus {
        let level = &*self.0;
        let shed = |why: Shed| level.shed[why as usize].load(Ordering::Relaxed);
        LoadStatus {
            running: level.running.count(),
            queued: level.queued.count(),
            started: level.started.load(Ordering::Relaxed),
            failed: level.failed.load(Ordering::Relaxed),
            shed: LoadsShed {
                throttled: shed(Shed::Throttled),
                queue_full: shed(Shed::QueueFull),
                waited: shed(Shed::Waited),
                rate: shed(Shed::Rate),
            },
            rejection_probability: {
                let throttle = level.terms.load().throttle.clone();
                throttle.map_or(0.0, |throttle| throttle.probability())
            },
        }
    }

    /// Runs a load of your own under the guard, when it is its turn. `guard.run(load).await??` is
    /// the value, where both errors become yours.
    ///
    /// The load's own `Err` counts as a failure of the database, so what is simply not there
    /// should be an `Ok`. A load that panics, or is dropped, counts as failed
    /// only if it had run for eight times as long as loads usually take.
    ///
    /// # Errors
    /// The outer one is the guard's, and the load was not started then: [`ErrorKind::LoadShed`], or
    /// [`ErrorKind::NoRuntime`] where it would have had to wait outside of every tokio runtime. The
    /// inner result is the load's.
    ///
    /// # Cancel safety
    /// Dropping the future gives its place back, be it in the queue or among those that run, and
    /// drops the load.
    pub async fn run<T, E>(
        &self,
        load: impl Future<Output = Result<T, E>>,
    ) -> Result<Result<T, E>> {
        let patience = Patience::Until(after(Instant::now(), Duration::MAX));
        let permit = self.enter(patience, None).await?;
        let loaded = load.await;
        match &loaded {
            Ok(_) => permit.succeeded(),
            Err(_) => permit.failed(),
        }
        Ok(loaded)
    }

    /// Waits for a load's turn; it starts with the permit. `spawner` has the timers for a caller
    /// outside of every runtime.
    ///
    /// # Errors
    /// [`ErrorKind::LoadShed`]; [`ErrorKind::NoRuntime`] where there is no timer to wait with.
    ///
    /// # Cancel safety
    /// Dropping the future gives back what it has.
    pub(crate) async fn enter(
        &self,
        mut patience: Patience,
        spawner: Option<&Spawner>,
    ) -> Result<Permit> {
        let levels = || successors(Some(self), |guard| guard.0.parent.as_ref());
        let mut places = Vec::new();
        for guard in levels() {
            guard.0.throttle()?;
            patience = patience.at_most(after(Instant::now(), guard.0.bulkhead.max_wait()));
            let place = guard.0.place(patience, spawner).await?;
            places.push((guard.clone(), place));
        }
        let mut cells = Vec::new();
        for guard in levels() {
            cells.extend(guard.0.cell(patience, spawner).await?);
        }
        // Nothing is awaited any more.
        cells.into_iter().for_each(Cell::start);
        let held = places.into_iter().map(|(guard, place)| guard.start(place));
        Ok(Permit {
            started: Instant::now(),
            end: End::Abandoned,
            held: held.collect(),
        })
    }

    fn start(self, place: Place) -> Held {
        self.0.started.fetch_add(1, Ordering::Relaxed);
        self.0.running.add();
        let throttle = self.0.terms.load().throttle.clone();
        Held {
            sent: throttle.map(|throttle| (throttle.sent(), throttle)),
            guard: self,
            _place: place,
        }
    }
}

impl fmt::Debug for LoadGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadGuard")
            .field("name", &self.0.name)
            .field("parent", &self.0.parent)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Level {
    fn throttle(&self) -> Result<()> {
        match &self.terms.load().throttle {
            Some(throttle) if throttle.rejects(fastrand::f64()) => Err(self.shed(Shed::Throttled)),
            _ => Ok(()),
        }
    }

    async fn place(&self, patience: Patience, spawner: Option<&Spawner>) -> Result<Place> {
        if let Some(place) = self.bulkhead.try_enter() {
            return Ok(place);
        }
        let Patience::Until(moment) = patience else {
            return Err(self.shed(Shed::QueueFull));
        };
        let Some(mut ticket) = self.bulkhead.line_up() else {
            return Err(self.shed(Shed::QueueFull));
        };
        // Dropped before the ticket is, so that never more are said to wait than may.
        let _queued = self.queued.enter();
        let turn = poll_fn(|cx| ticket.poll_turn(cx));
        let place = until(spawner, moment, turn).await?;
        place.ok_or_else(|| self.shed(Shed::Waited))
    }

    async fn cell(
        &self,
        patience: Patience,
        spawner: Option<&Spawner>,
    ) -> Result<Option<Cell<'_>>> {
        let Some(cells) = self.terms.load().cells.clone() else {
            return Ok(None);
        };
        if let Some(cell) = self.rate.try_cell(&cells) {
            return Ok(Some(cell));
        }
        let Patience::Until(moment) = patience else {
            return Err(self.shed(Shed::Rate));
        };
        let _queued = self.queued.enter();
        let cell = self.rate.cell(&cells, moment, spawner).await?;
        cell.map(Some).ok_or_else(|| self.shed(Shed::Rate))
    }

    fn shed(&self, why: Shed) -> Error {
        self.shed[why as usize].fetch_add(1, Ordering::Relaxed);
        telemetry::load_shed(&self.name, why.name());
        let title = self.bulkhead.title();
        let message = match why {
            Shed::Throttled => {
                format!("{title} fails too many of its loads; this one is held back")
            }
            Shed::QueueFull => format!("{title} has all the loads it may have"),
            Shed::Waited => {
                format!("{title} has all the loads it may have, and none ended in time")
            }
            Shed::Rate => format!("{title} may start no more loads for now"),
        };
        Error::new(ErrorKind::LoadShed, message)
    }
}

/// Why a load was not made.
#[derive(Clone, Copy, Debug)]
enum Shed {
    Throttled,
    QueueFull,
    Waited,
    Rate,
}

impl Shed {
    const COUNT: usize = Self::Rate as usize + 1;

    const fn name(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::QueueFull => "queue_full",
            Self::Waited => "waited",
            Self::Rate => "rate",
        }
    }
}

/// So many times as long as loads usually take, and a load whose caller gave up counts as failed:
/// a database that hangs is to be noticed even if no caller ever waits for the end.
const HANGS: u32 = 8;

/// The right to load, held for as long as the load runs. Dropped without an outcome, it says
/// nothing about the database: the caller gave up. Unless the load has run for long.
#[derive(Debug)]
#[must_use = "the load's place is given back when this is dropped"]
pub(crate) struct Permit {
    started: Instant,
    end: End,
    held: Vec<Held>,
}

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Success,
    Failure,
    Abandoned,
}

impl End {
    const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Abandoned => "abandoned",
        }
    }
}

impl Permit {
    /// The database did what it was asked for.
    pub(crate) fn succeeded(mut self) {
        self.end = End::Success;
    }

    /// The database failed, or did not answer in time.
    pub(crate) fn failed(mut self) {
        self.end = End::Failure;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let ran = self.started.elapsed();
        let took = (self.end != End::Abandoned).then_some(ran);
        for held in self.held.drain(..) {
            let level = &*held.guard.0;
            if self.end == End::Success {
                level.learn(ran);
            }
            if self.end == End::Failure || (self.end == End::Abandoned && level.is_long(ran)) {
                level.failed.fetch_add(1, Ordering::Relaxed);
                if let Some((sent, throttle)) = &held.sent {
                    throttle.failed(*sent);
                }
            }
            telemetry::load_ended(&level.name, self.end.name(), took);
            // Before its place is given back, so that never more are said to run than may.
            level.running.subtract();
        }
    }
}

/// What a load that runs has of one guard.
#[derive(Debug)]
struct Held {
    sent: Option<(SentIn, Arc<Throttle>)>,
    guard: LoadGuard,
    _place: Place,
}

/// A number that a gauge shows. The lock is held while the gauge is set, so that what is shown last
/// is what is so.
struct Shown {
    gauge: &'static str,
    guard: Arc<str>,
    count: Mutex<usize>,
}

impl Shown {
    fn new(gauge: &'static str, guard: &Arc<str>) -> Self {
        Self {
            gauge,
            guard: guard.clone(),
            count: Mutex::new(0),
        }
    }

    fn count(&self) -> usize {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(usize) -> usize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = change(*count);
        telemetry::loads(self.gauge, &self.guard, *count);
    }

    fn add(&self) {
        self.change(|count| count + 1);
    }

    fn subtract(&self) {
        self.change(|count| count.saturating_sub(1));
    }

    /// One more, until the answer is dropped.
    fn enter(&self) -> Entered<'_> {
        self.add();
        Entered(self)
    }
}

struct Entered<'a>(&'a Shown);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.subtract();
    }
}

/// What a [`LoadGuard`] does now, and has done since it was made.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoadStatus {
    /// Loads that run now.
    pub running: usize,
    /// Loads that wait here now: in the queue, or for the rate. A load of a group that waits for
    /// the database's turn is counted in the database's guard.
    pub queued: usize,
    /// Loads started so far.
    pub started: u64,
    /// Loads that failed, of those.
    pub failed: u64,
    /// Loads that were not made because of this guard's own limits.
    pub shed: LoadsShed,
    /// The probability with which its throttle rejects the next load; 0 unless the database fails.
    pub rejection_probability: f64,
}

/// How many loads were not made, by what forbade it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadsShed {
    /// The database fails too many loads.
    pub throttled: u64,
    /// As many ran and waited as may, or the load was not one to wait.
    pub queue_full: u64,
    /// None of those that ran ended in time.
    pub waited: u64,
    /// As many had started as may within such a time, and not enough time was left.
    pub rate: u64,
}
