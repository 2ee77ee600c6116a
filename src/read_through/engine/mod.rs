//! The one engine under every read-through: looks a key up, and if the cache does not have it, or
//! has it old, sees to it that somebody loads it and that what was loaded is put back.
//!
//! A read is [judged](Engine::judge) by what the cache has: settled, to be refreshed, or to be
//! fetched. What is fetched boards its key's [flight](super::flight); who gets the turn leads
//! ([`Engine::lead`]): takes the lease, enters by the [guard](super::guard), loads, and leaves the
//! outcome to the others. Putting it back happens behind the answer.
//!
//! Whatever is put back was loaded after its token was read, and is written with it: a
//! compare-and-swap on the lease's placeholder or on the old value. Who writes or deletes the key in
//! between, in whatever process, takes the token away with that, and the loaded value is dropped.

mod claim;
mod load;
mod refill;

use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use futures::future::{BoxFuture, join, join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tower::Service;

use super::elsewhere::Elsewhere;
use super::flight::{Flights, Outcome, Outdated, Seat, Seen, Sighting, Turn};
use super::freshness::{self, Freshness};
use super::guard::LoadGuard;
use super::loads::{Loads, all_fail};
use super::settings::ReadThroughSettings;
use crate::bulkhead::{Limits, Place, Room};
use crate::call::Call;
use crate::compression::Slot;
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::{Spawner, after, until};
use crate::key::Key;
use crate::request::{LeaseTerms, Operation, Request};
use crate::response::{Found, LeaseState, Lookup, Response, misfit};
use crate::shutdown::{Tracker, shut_down};
use crate::telemetry;
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload, Value};
use claim::Claim;

/// What a read-through needs of the stack below it: it has to outlive the call, so that what was
/// loaded can be put back behind the answer. Every service of [`Request`]s that can does it.
pub trait Cache:
    Service<Request, Response = Response, Error: Into<BoxError> + Send, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Cache for S where
    S: Service<Request, Response = Response, Error: Into<BoxError> + Send, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// What loads give.
pub(crate) type Loaded = Result<HashMap<Key, Payload>, BoxError>;

/// The engine of one client or layer.
pub(crate) struct Engine {
    loading: Arc<ArcSwap<Loading>>,
    flights: Flights,
    elsewhere: Elsewhere,
    means: Means,
    refills: Arc<Room>,
    /// Leases that are given up, which takes little, and lets others go on.
    releases: Arc<Room>,
    /// Shared loaders' tasks.
    tasks: Arc<Semaphore>,
    /// What a load has lately taken, in nanoseconds.
    cost: AtomicU64,
}

/// How it loads, shared with those that load other keys in the same way.
struct Loading {
    settings: ReadThroughSettings,
    guard: LoadGuard,
}

impl Loading {
    fn new(settings: ReadThroughSettings, guard: impl FnOnce() -> LoadGuard) -> Self {
        let guard = settings.guard.clone().unwrap_or_else(guard);
        Self { settings, guard }
    }

    fn swappable(self) -> Arc<ArcSwap<Self>> {
        Arc::new(ArcSwap::from_pointee(self))
    }
}

/// Those in force.
pub(super) struct Settings(Guard<Arc<Loading>>);

impl Deref for Settings {
    type Target = ReadThroughSettings;

    fn deref(&self) -> &ReadThroughSettings {
        &self.0.settings
    }
}

/// What an engine works with.
#[derive(Clone, Default)]
pub(crate) struct Means {
    /// Has the timers of callers outside of every runtime.
    pub(crate) spawner: Option<Spawner>,
    /// Where what is put back is written; the caller's runtime if there is none.
    pub(crate) behind: Option<Spawner>,
    /// What all engines of a client have under way.
    pub(crate) tracker: Arc<Tracker>,
    /// How what is stored is compressed.
    pub(crate) compression: Slot,
}

/// One call: what is asked, and when it has to be answered.
#[derive(Clone)]
pub(crate) struct Query<S> {
    cache: S,
    ttl: Ttl,
    /// For one operation on the cache.
    timeout: Duration,
    asked: Instant,
    /// When all work on the cache before the answer has to end.
    cache_ends: Instant,
    /// When the call has to end, if not only with the time to load.
    ends: Option<Instant>,
    /// Says which values are of use; all are if there is none.
    accepts: Option<Accepts>,
}

type Accepts = Arc<dyn Fn(&Value) -> bool + Send + Sync>;

impl<S> Query<S> {
    pub(crate) fn new(cache: S, ttl: Ttl, timeout: Duration) -> Self {
        let asked = Instant::now();
        Self {
            cache,
            ttl,
            timeout,
            asked,
            cache_ends: after(asked, timeout),
            ends: None,
            accepts: None,
        }
    }

    /// Loads anew, and replaces, what is not accepted.
    #[cfg(feature = "serde")]
    pub(crate) fn accepting(
        mut self,
        accepts: impl Fn(&Value) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.accepts = Some(Arc::new(accepts));
        self
    }

    /// The whole call has to end by then.
    pub(crate) fn ending(mut self, ends: Option<Instant>) -> Self {
        if let Some(ends) = ends {
            self.cache_ends = self.cache_ends.min(ends);
            self.ends = Some(ends);
        }
        self
    }
}

/// A key that the cache did not settle.
#[derive(Clone)]
pub(crate) struct Wanted {
    /// The place of its outcome among those of the call.
    index: usize,
    key: Key,
    sighting: Sighting,
    /// An old value to be given if there is no other.
    fallback: Option<Value>,
    /// What is left to it, if it is still good and is to be refreshed early.
    early: Option<Duration>,
    /// Whether it was looked for on a node that is not its own.
    away: bool,
    /// Whether there is a value, of which no sense can be made.
    unreadable: bool,
}

impl Wanted {
    pub(super) fn conclude(self, result: Result<Option<Value>>) -> Settled {
        let result = match (result, self.fallback) {
            (Err(_), Some(value)) => Ok(Some(value)),
            (result, _) => result,
        };
        (self.index, result)
    }
}

/// What came of a key, and its place.
pub(crate) type Settled = (usize, Result<Option<Value>>);

/// A key whose flight is led.
pub(crate) struct Led {
    wanted: Wanted,
    // Given up before the seat, so that who takes over finds the flight as it is.
    turn: Turn,
    seat: Seat,
}

impl Led {
    pub(super) fn wanted(&self) -> Wanted {
        self.wanted.clone()
    }

    fn settle(self, outcome: Outcome) -> Settled {
        let Self { wanted, turn, seat } = self;
        seat.settle(outcome.clone());
        drop(turn);
        wanted.conclude(outcome.result)
    }
}

/// What the cache says of a key.
enum Verdict {
    Settled(Result<Option<Value>>),
    /// There is a value, and it is to be loaded anew.
    Refresh(Wanted),
    /// It has to be loaded.
    Fetch(Wanted),
}

/// Whether it is on a node that is not its own: there it lives for as long as it may, and is not
/// kept for longer than its TTL.
type Away = bool;

/// How what is loaded is put back.
#[derive(Clone, Copy, Debug)]
enum Fill {
    /// In place of what the token stands for.
    Swap(CasToken, Away),
    /// Where there is nothing.
    Add(Away),
    /// Not at all: whether it would still be true cannot be told.
    Not,
}

impl Fill {
    fn token(self) -> Option<CasToken> {
        match self {
            Self::Swap(token, _) => Some(token),
            Self::Add(_) | Self::Not => None,
        }
    }
}

/// How a load goes about it.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) ends: Instant,
    /// Whether it may wait for a place at the database.
    pub(crate) patient: bool,
    /// Whether it has a task of its own.
    pub(crate) on_task: bool,
}

/// How many leases may be given up at once. What exceeds it is left to expire.
const RELEASES: usize = 16 * 1024;

/// How many tasks of shared loaders there may be. The guard counts only those that run, and a
/// runtime whose threads are all blocked runs none.
const TASKS: usize = 16 * 1024;

/// How many keys of one call are looked up at once.
const LOOKUPS: usize = 64;

impl Engine {
    pub(crate) fn new(settings: ReadThroughSettings, means: Means) -> Arc<Self> {
        let loading = Loading::new(settings, LoadGuard::default);
        Self::of(loading.swappable(), means, Flights::default())
    }

    fn of(loading: Arc<ArcSwap<Loading>>, means: Means, flights: Flights) -> Arc<Self> {
        Arc::new(Self {
            refills: Room::new("refills", Limits::of(0)),
            releases: Room::new("releases", Limits::of(RELEASES)),
            tasks: Arc::new(Semaphore::new(TASKS)),
            elsewhere: Elsewhere::default(),
            loading,
            flights,
            means,
            cost: AtomicU64::new(0),
        })
    }

    /// The same for other keys, such as a group's.
    pub(crate) fn again(&self) -> Arc<Self> {
        Self::of(self.loading.clone(), self.means.clone(), Flights::default())
    }

    /// Another way to load the same keys: what one of the two invalidates the other does not put
    /// back.
    pub(crate) fn with_settings(&self, settings: ReadThroughSettings) -> Arc<Self> {
        let loading = Loading::new(settings, LoadGuard::default).swappable();
        Self::of(loading, self.means.clone(), self.flights.clone())
    }

    pub(crate) fn tracker(&self) -> &Arc<Tracker> {
        &self.means.tracker
    }

    /// Another way to load other keys, by the same guard unless the settings have one.
    pub(crate) fn of_group(&self, settings: ReadThroughSettings, compression: Slot) -> Arc<Self> {
        let loading = Loading::new(settings, || self.guard()).swappable();
        let means = Means {
            compression,
            ..self.means.clone()
        };
        Self::of(loading, means, Flights::default())
    }

    pub(crate) fn compression(&self) -> &Slot {
        &self.means.compression
    }

    /// Other settings from now on, by the same guard unless they have one.
    pub(crate) fn apply(&self, settings: ReadThroughSettings) {
        let loading = Loading::new(settings, || self.guard());
        self.loading.store(Arc::new(loading));
    }

    /// A place among the refills, if there is one.
    fn refill_place(&self) -> Option<Place> {
        // There may be other settings than the last time.
        self.refills
            .set_limits(Limits::of(self.settings().max_refills));
        self.refills.try_enter()
    }

    pub(super) fn settings(&self) -> Settings {
        Settings(self.loading.load())
    }

    pub(crate) fn guard(&self) -> LoadGuard {
        self.loading.load().guard.clone()
    }

    pub(super) fn spawner(&self) -> Option<&Spawner> {
        self.means.spawner.as_ref()
    }

    /// Counts a shared loader's task until that is dropped; `None` if there are as many as may be.
    pub(super) fn begin_task(&self) -> Option<OwnedSemaphorePermit> {
        self.tasks.clone().try_acquire_owned().ok()
    }

    /// When a load that begins to wait now has to end.
    pub(super) fn load_ends(&self) -> Instant {
        after(Instant::now(), self.settings().load_timeout)
    }

    fn terms<S>(&self, query: &Query<S>, patient: bool) -> Terms {
        let ends = self.load_ends();
        Terms {
            ends: query.ends.map_or(ends, |latest| latest.min(ends)),
            patient,
            on_task: false,
        }
    }

    /// The key is about to be changed: who asks for it from now on does not get what is being loaded,
    /// and none of that is written any more when this ends, or `by` has come.
    pub(crate) fn forget(&self, key: &Key, by: Instant) -> Option<BoxFuture<'_, ()>> {
        let flight = self.flights.outdate(key)?;
        Some(Box::pin(async move {
            // Without a runtime there is no time to be kept, and nothing is put back behind anybody.
            let _ = until(self.means.spawner.as_ref(), by, flight.refilled()).await;
        }))
    }

    /// Reads a key, or sees to it that it is loaded.
    pub(crate) async fn get<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        key: Key,
        loads: &mut Loads<F>,
    ) -> Result<Option<Value>>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        let lookup = self.look_up(query, &key).await;
        let (settled, otherwise) = match self.judge(query, 0, key, lookup) {
            Verdict::Settled(result) => return counted(result, "hit"),
            Verdict::Refresh(wanted) => {
                let terms = self.terms(query, false);
                let settled = self.obtain(query, vec![wanted], terms, loads).await;
                (settled, "refreshed")
            }
            Verdict::Fetch(wanted) => {
                let terms = self.terms(query, true);
                let settled = self.obtain(query, vec![wanted], terms, loads).await;
                (settled, "loaded")
            }
        };
        let settled = settled.into_iter().next();
        let result = settled.map_or_else(|| Err(lost()), |(_, result)| result);
        counted(result, otherwise)
    }

    /// Reads many keys, and sees to it that what is missing is loaded, all at once.
    pub(crate) async fn get_many<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        keys: &[Key],
        loads: &mut Loads<F>,
    ) -> Vec<Result<Option<Value>>>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        let mut lookups = Vec::with_capacity(keys.len());
        // Not all at once: there are limits to what may be in flight.
        for keys in keys.chunks(LOOKUPS) {
            let some = keys.iter().map(|key| self.look_up(query, key));
            lookups.extend(join_all(some).await);
        }
        let mut results: Vec<_> = keys.iter().map(|_| Err(lost())).collect();
        let (mut refresh, mut fetch) = (Vec::new(), Vec::new());
        for (index, (key, lookup)) in keys.iter().zip(lookups).enumerate() {
            match self.judge(query, index, key.clone(), lookup) {
                Verdict::Settled(result) => results[index] = counted(result, "hit"),
                Verdict::Refresh(wanted) => refresh.push(wanted),
                Verdict::Fetch(wanted) => fetch.push(wanted),
            }
        }
        // What is missing first: somebody waits for it.
        let terms = self.terms(query, true);
        for (index, result) in self.obtain(query, fetch, terms, loads).await {
            results[index] = counted(result, "loaded");
        }
        let terms = Terms {
            patient: false,
            ..terms
        };
        for (index, result) in self.obtain(query, refresh, terms, loads).await {
            results[index] = counted(result, "refreshed");
        }
        results
    }

    async fn look_up<S: Cache>(&self, query: &Query<S>, key: &Key) -> Result<Lookup> {
        let by = query.cache_ends;
        match self.ask_lookup(query, key, None, by).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let operation = Operation::Get {
                    key: key.clone(),
                    with_cas: true,
                };
                match self.ask(query, Request::new(operation), by).await? {
                    Response::Value(value) => Ok(self.made_out(query, plain(value))),
                    other => Err(misfit(&other)),
                }
            }
            lookup => lookup,
        }
    }

    async fn ask_lookup<S: Cache>(
        &self,
        query: &Query<S>,
        key: &Key,
        lease: Option<LeaseTerms>,
        by: Instant,
    ) -> Result<Lookup> {
        let key = key.clone();
        let request = Request::new(Operation::Lookup { key, lease });
        match self.ask(query, request, by).await? {
            Response::Found(lookup) => Ok(self.made_out(query, *lookup)),
            // From a service built by hand, to which every read is a get.
            Response::Value(value) => Ok(self.made_out(query, plain(value))),
            other => Err(misfit(&other)),
        }
    }

    /// What was found, decompressed; of what no sense can be made only that it is there.
    fn made_out<S>(&self, query: &Query<S>, mut lookup: Lookup) -> Lookup {
        if let Some(compression) = self.compression().get() {
            compression.read_found(&mut lookup);
        }
        if let (Found::Value { value, .. }, Some(accepts)) = (&lookup.found, &query.accepts)
            && !accepts(value)
        {
            lookup.found = Found::Unreadable;
        }
        lookup
    }

    /// Asks the cache; the answer, or its time-out, comes by then.
    async fn ask<S: Cache>(
        &self,
        query: &Query<S>,
        request: Request,
        by: Instant,
    ) -> Result<Response> {
        let request = request.with_deadline(by);
        let spawner = self.means.spawner.as_ref();
        Call::new(query.cache.clone(), request, query.timeout, spawner).await
    }

    /// What is to be done about a key after the cache was asked for it.
    fn judge<S>(
        &self,
        query: &Query<S>,
        index: usize,
        key: Key,
        lookup: Result<Lookup>,
    ) -> Verdict {
        let mut wanted = Wanted {
            index,
            key,
            sighting: Sighting {
                asked: query.asked,
                seen: Seen::Failure,
            },
            fallback: None,
            early: None,
            away: false,
            unreadable: false,
        };
        let lookup = match lookup {
            Ok(lookup) => lookup,
            Err(error) if is_final(&error) => return Verdict::Settled(Err(error)),
            // What is there is not known, so nothing can be put back.
            Err(_) => return Verdict::Fetch(wanted),
        };
        // Where the TTL that is left is not told, nothing is kept past its own either.
        let away = lookup.away || lookup.untimed || lookup.lease == LeaseState::Unknown;
        wanted.away = away;
        wanted.sighting.seen = match self.settings().leases && lookup.lease != LeaseState::Unknown {
            true => Seen::Vacancy(lookup.token),
            false => Seen::Unleased(lookup.token),
        };
        let (value, left) = match lookup.found {
            Found::Value { value, left } => (value, left),
            Found::Absent { .. } => return Verdict::Settled(Ok(None)),
            Found::Nothing => return Verdict::Fetch(wanted),
            Found::Unreadable => {
                wanted.unreadable = true;
                return Verdict::Fetch(wanted);
            }
        };
        let settings = self.settings();
        let may_refresh = || match lookup.token {
            Some(token) => !self
                .elsewhere
                .is_at_it(&wanted.key, token, settings.lease_duration()),
            None => false,
        };
        match freshness::judge(left, self.grace(away), self.draw_early()) {
            Freshness::Fresh => Verdict::Settled(Ok(Some(value))),
            Freshness::Early if may_refresh() => {
                wanted.fallback = Some(value);
                wanted.early = left;
                Verdict::Refresh(wanted)
            }
            Freshness::Early => Verdict::Settled(Ok(Some(value))),
            Freshness::Stale(age) => {
                let value = value.into_stale();
                // Somebody is about it, or it has just failed.
                if !may_refresh() {
                    return Verdict::Settled(Ok(Some(value)));
                }
                wanted.fallback = Some(value);
                match age <= settings.stale_while_revalidate {
                    true => Verdict::Refresh(wanted),
                    false => Verdict::Fetch(wanted),
                }
            }
        }
    }

    /// How long past its TTL a value is kept. Away from home that is not at all: what is kept there
    /// lives only for the failover TTL.
    fn grace(&self, away: Away) -> Duration {
        match away {
            true => Duration::ZERO,
            false => self.settings().grace(),
        }
    }

    fn draw_early(&self) -> Duration {
        let cost = Duration::from_nanos(self.cost.load(Ordering::Relaxed));
        freshness::early(cost, self.settings().early_refresh, fastrand::f64())
    }

    /// Sees to it that keys are loaded: for whoever is patient, or behind the answer if that can be.
    /// Nobody waits for longer than until the client is shut down.
    async fn obtain<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        wanted: Vec<Wanted>,
        terms: Terms,
        loads: &mut Loads<F>,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        let abandoned = wanted.clone();
        // Boxed: it is ten times as large as all the rest of a read, and a hit does without.
        let settling = Box::pin(async {
            match terms.patient {
                true => self.fetch(query, wanted, terms, loads).await,
                false => self.refresh(query, wanted, terms, loads).await,
            }
        });
        match self.means.tracker.unless_closed(settling).await {
            Some(settled) => settled,
            None => all_fail(abandoned, &shut_down()),
        }
    }

    /// Loads anew what nobody here is loading yet; what there is stands in for it meanwhile.
    async fn refresh<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        wanted: Vec<Wanted>,
        terms: Terms,
        loads: &mut Loads<F>,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        let (mut settled, mut led) = (Vec::new(), Vec::new());
        for wanted in wanted {
            let seat = self.flights.board(&wanted.key, &wanted.sighting);
            match seat.try_turn() {
                Some(turn) if seat.outcome(&wanted.sighting).is_none() => {
                    led.push(Led { wanted, turn, seat });
                }
                _ => settled.push(wanted.conclude(Err(lost()))),
            }
        }
        if !led.is_empty() {
            settled.extend(loads.refresh(self, query, led, terms).await);
        }
        settled
    }

    /// Gets what the cache does not have: from who loads it already, or by loading it.
    async fn fetch<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        mut wanted: Vec<Wanted>,
        terms: Terms,
        loads: &mut Loads<F>,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        // Who has something to fall back on does not queue up for the database.
        let patient = wanted.iter().any(|wanted| wanted.fallback.is_none());
        let terms = Terms { patient, ..terms };
        let mut settled = Vec::new();
        while !wanted.is_empty() {
            if Instant::now() >= terms.ends {
                let late = |wanted: Wanted| wanted.conclude(Err(out_of_time()));
                settled.extend(wanted.drain(..).map(late));
                break;
            }
            let (mut led, mut aboard) = (Vec::new(), Vec::new());
            for wanted in wanted.drain(..) {
                let seat = self.flights.board(&wanted.key, &wanted.sighting);
                match seat.try_turn() {
                    Some(turn) if seat.outcome(&wanted.sighting).is_none() => {
                        led.push(Led { wanted, turn, seat });
                    }
                    _ => aboard.push((wanted, seat)),
                }
            }
            if !led.is_empty() {
                settled.extend(loads.lead(self, query, led, terms).await);
            }
            // Nobody is waited for who may wait for what is led here: that has ended.
            let mut aboard = aboard.into_iter();
            for (one, seat) in aboard.by_ref() {
                let turn = match until(self.means.spawner.as_ref(), terms.ends, seat.turn()).await {
                    Ok(Some(turn)) => turn,
                    Ok(None) => {
                        settled.push(one.conclude(Err(out_of_time())));
                        continue;
                    }
                    Err(error) => {
                        settled.push(one.conclude(Err(error)));
                        continue;
                    }
                };
                match seat.outcome(&one.sighting) {
                    Some(Ok(outcome)) => settled.push(one.conclude(outcome.result)),
                    // What it has may be older than what the caller has to see.
                    Some(Err(Outdated)) if Instant::now() >= query.cache_ends => wanted.push(one),
                    Some(Err(Outdated)) => {
                        let lookup = self.look_up(query, &one.key).await;
                        match self.judge(query, one.index, one.key, lookup) {
                            Verdict::Settled(result) => settled.push((one.index, result)),
                            Verdict::Refresh(one) | Verdict::Fetch(one) => wanted.push(one),
                        }
                    }
                    // Who led it has left, and it is for us now, before anything else.
                    None => {
                        let led = vec![Led {
                            wanted: one,
                            turn,
                            seat,
                        }];
                        settled.extend(loads.lead(self, query, led, terms).await);
                        break;
                    }
                }
            }
            wanted.extend(aboard.map(|(one, _)| one));
        }
        settled
    }

    /// Leads the flights of these keys to their end.
    pub(crate) async fn lead<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        led: Vec<Led>,
        terms: Terms,
        load: &mut F,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        let (mut settled, mut ready, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        // A time of its own, which is part of that to load: a successor comes late.
        let by = after(Instant::now(), query.timeout).min(terms.ends);
        let mut claims = Vec::with_capacity(led.len());
        for led in led.chunks(LOOKUPS) {
            let some = led.iter().map(|led| self.claim(query, led, by));
            claims.extend(join_all(some).await);
        }
        for (led, claim) in led.into_iter().zip(claims) {
            match claim {
                Claim::Found(outcome) => settled.push(led.settle(outcome)),
                Claim::Load(fill) => ready.push((led, fill)),
                Claim::Elsewhere(token, away) => waiting.push((led, token, away)),
            }
        }
        // What others load is waited for meanwhile.
        let (loaded, (filled, ready)) = join(
            self.load(query, ready, terms, load),
            self.wait_for_others(query, waiting, terms),
        )
        .await;
        settled.extend(loaded);
        settled.extend(filled);
        settled.extend(self.load(query, ready, terms, load).await);
        settled
    }
}

/// What a service that knows no lookups has answered.
fn plain(value: Option<Value>) -> Lookup {
    let token = value.as_ref().and_then(Value::cas);
    let found = match value {
        Some(value) => Found::Value { value, left: None },
        None => Found::Nothing,
    };
    Lookup::new(found, token, LeaseState::Unknown)
}

/// Whether it is an error that a load cannot mend.
fn is_final(error: &Error) -> bool {
    (error.is_caller_mistake() && error.kind() != ErrorKind::ValueTooLarge)
        || error.kind() == ErrorKind::Shutdown
}

fn counted(result: Result<Option<Value>>, otherwise: &'static str) -> Result<Option<Value>> {
    telemetry::read_through(match &result {
        Ok(Some(value)) if value.is_stale() => "stale",
        Ok(Some(_)) => otherwise,
        Ok(None) => "absent",
        Err(error) if error.kind() == ErrorKind::LoadShed => "shed",
        Err(_) => "failed",
    });
    result
}

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Load, message).with_sent(Sent::No)
}

pub(super) fn out_of_time() -> Error {
    failed("no value in time, while somebody else loads")
}

pub(super) fn too_many() -> Error {
    let message = "as many loads are under way as may be";
    Error::new(ErrorKind::Overloaded, message).with_sent(Sent::No)
}

/// Of a load whose task has ended with its runtime.
pub(super) fn lost() -> Error {
    failed("the load was lost with the runtime it ran in")
}
