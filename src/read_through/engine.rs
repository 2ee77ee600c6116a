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

use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::Service;

use super::elsewhere::Elsewhere;
use super::flight::{Flights, Load, Outcome, Outdated, Seat, Seen, Sighting, Source, Turn};
use super::freshness::{self, Freshness};
use super::guard::{LoadGuard, Patience, Permit};
use super::loads::Loads;
use super::settings::ReadThroughSettings;
use crate::call::Call;
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::{Spawner, after, until};
use crate::key::Key;
use crate::request::{LeaseTerms, Operation, Purpose, Request, StoreMode};
use crate::response::{CasOutcome, Found, LeaseState, Lookup, Response};
use crate::telemetry;
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload, Value};

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
    settings: ReadThroughSettings,
    flights: Flights,
    elsewhere: Arc<Elsewhere>,
    /// Where what is put back is written; the caller's runtime if there is none.
    spawner: Option<Spawner>,
    refills: Arc<Semaphore>,
    /// Leases that are given up, which takes little, and lets others go on.
    releases: Arc<Semaphore>,
    /// What a load has lately taken, in nanoseconds.
    cost: AtomicU64,
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
}

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
        }
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

/// What the cache says to who leads a flight.
enum Claim {
    /// Somebody has put it there meanwhile.
    Found(Outcome),
    /// It is for us to load it, and to put it back like this.
    Load(Fill),
    /// Another process loads it.
    Elsewhere(CasToken, Away),
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
}

/// How many leases may be given up at once. What exceeds it is left to expire.
const RELEASES: usize = 1024;

/// How many keys of one call are looked up at once.
const LOOKUPS: usize = 64;

/// The pauses between looks whether another process has put back what it has the lease on.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// So many loads of one flight may follow each other at once.
const MANY_LOADS: u32 = 3;

impl Engine {
    pub(crate) fn new(settings: ReadThroughSettings, spawner: Option<Spawner>) -> Arc<Self> {
        let elsewhere = Arc::new(Elsewhere::new(settings.lease_duration()));
        Self::of(settings, spawner, Flights::default(), elsewhere)
    }

    fn of(
        settings: ReadThroughSettings,
        spawner: Option<Spawner>,
        flights: Flights,
        elsewhere: Arc<Elsewhere>,
    ) -> Arc<Self> {
        let permits = settings.max_refills.min(Semaphore::MAX_PERMITS);
        Arc::new(Self {
            refills: Arc::new(Semaphore::new(permits)),
            releases: Arc::new(Semaphore::new(RELEASES)),
            elsewhere,
            settings,
            flights,
            spawner,
            cost: AtomicU64::new(0),
        })
    }

    /// The same for other keys, such as a group's.
    pub(crate) fn again(&self) -> Arc<Self> {
        Self::new(self.settings.clone(), self.spawner.clone())
    }

    /// Another way to load the same keys: what one of the two invalidates the other does not put
    /// back.
    pub(crate) fn with_settings(&self, settings: ReadThroughSettings) -> Arc<Self> {
        let (spawner, flights) = (self.spawner.clone(), self.flights.clone());
        Self::of(settings, spawner, flights, self.elsewhere.clone())
    }

    fn guard(&self) -> &LoadGuard {
        &self.settings.guard
    }

    pub(super) fn spawner(&self) -> Option<&Spawner> {
        self.spawner.as_ref()
    }

    /// When a load that begins to wait now has to end.
    pub(super) fn load_ends(&self) -> Instant {
        after(Instant::now(), self.settings.load_timeout)
    }

    fn terms<S>(&self, query: &Query<S>, patient: bool) -> Terms {
        let ends = self.load_ends();
        Terms {
            ends: query.ends.map_or(ends, |latest| latest.min(ends)),
            patient,
        }
    }

    /// The key is about to be changed: who asks for it from now on does not get what is being loaded,
    /// and none of that is written any more when this ends, or `by` has come.
    pub(crate) async fn forget(&self, key: &Key, by: Instant) {
        if let Some(flight) = self.flights.outdate(key) {
            // Without a runtime there is no time to be kept, and nothing is put back behind anybody.
            let _ = until(self.spawner.as_ref(), by, flight.refilled()).await;
        }
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
        let settled = match self.judge(query, 0, key, lookup) {
            Verdict::Settled(result) => return counted(result, "hit"),
            Verdict::Refresh(wanted) => {
                let terms = self.terms(query, false);
                self.refresh(query, vec![wanted], terms, loads).await
            }
            Verdict::Fetch(wanted) => {
                let terms = self.terms(query, true);
                self.fetch(query, vec![wanted], terms, loads).await
            }
        };
        let settled = settled.into_iter().next();
        counted(
            settled.map_or_else(|| Err(lost()), |(_, result)| result),
            "loaded",
        )
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
        let mut settled = self.fetch(query, fetch, terms, loads).await;
        settled.extend(self.refresh(query, refresh, terms, loads).await);
        for (index, result) in settled {
            results[index] = counted(result, "loaded");
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
                    Response::Value(value) => Ok(plain(value)),
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
            Response::Found(lookup) => Ok(lookup),
            // From a service built by hand, to which every read is a get.
            Response::Value(value) => Ok(plain(value)),
            other => Err(misfit(&other)),
        }
    }

    /// Asks the cache; the answer, or its time-out, comes by then.
    async fn ask<S: Cache>(
        &self,
        query: &Query<S>,
        request: Request,
        by: Instant,
    ) -> Result<Response> {
        let request = request.with_deadline(by);
        let spawner = self.spawner.as_ref();
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
        };
        let lookup = match lookup {
            Ok(lookup) => lookup,
            Err(error) if is_final(&error) => return Verdict::Settled(Err(error)),
            // A value over this client's limit: it is there, so nothing can be put back.
            Err(_) => return Verdict::Fetch(wanted),
        };
        wanted.away = lookup.away;
        wanted.sighting.seen = match self.settings.leases && lookup.lease != LeaseState::Unknown {
            true => Seen::Vacancy(lookup.token),
            false => Seen::Unleased(lookup.token),
        };
        let (value, left) = match lookup.found {
            Found::Value { value, left } => (value, left),
            Found::Absent { .. } => return Verdict::Settled(Ok(None)),
            Found::Nothing => return Verdict::Fetch(wanted),
        };
        let settings = &self.settings;
        let may_refresh = || match lookup.token {
            Some(token) => !self.elsewhere.is_at_it(&wanted.key, token),
            None => false,
        };
        match freshness::judge(left, self.grace(lookup.away), self.draw_early()) {
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
            false => self.settings.grace(),
        }
    }

    fn draw_early(&self) -> Duration {
        let cost = Duration::from_nanos(self.cost.load(Ordering::Relaxed));
        freshness::early(cost, self.settings.early_refresh, fastrand::f64())
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
            let terms = Terms {
                patient: false,
                ..terms
            };
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
                let turn = match until(self.spawner.as_ref(), terms.ends, seat.turn()).await {
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
        // Who waits for another process does not keep waiting who need not.
        settled.extend(self.load(query, ready, terms, load).await);
        let ready = self
            .wait_for_others(query, waiting, terms, &mut settled)
            .await;
        settled.extend(self.load(query, ready, terms, load).await);
        settled
    }

    /// Asks the cache whose it is to load a key.
    async fn claim<S: Cache>(&self, query: &Query<S>, led: &Led, by: Instant) -> Claim {
        let wanted = &led.wanted;
        let unleased = |token: Option<CasToken>| {
            let swap = |token| Fill::Swap(token, wanted.away);
            Claim::Load(token.map_or(Fill::Add(wanted.away), swap))
        };
        match wanted.sighting.seen {
            Seen::Failure => return Claim::Load(Fill::Not),
            Seen::Unleased(token) => return unleased(token),
            Seen::Vacancy(_) => {}
        }
        if Instant::now() >= by {
            return Claim::Load(Fill::Not);
        }
        let recache = match wanted.early {
            // What has just this left now has less than a second more.
            Some(left) => left + Duration::from_secs(1),
            None => self.settings.grace(),
        };
        let terms = LeaseTerms::new(self.settings.lease_duration()).recache(recache);
        let asked = Instant::now();
        match self.ask_lookup(query, &wanted.key, Some(terms), by).await {
            Ok(lookup) => self.judge_claim(query, led, asked, lookup),
            Err(_) => Claim::Load(Fill::Not),
        }
    }

    fn judge_claim<S: Cache>(
        &self,
        query: &Query<S>,
        led: &Led,
        asked: Instant,
        lookup: Lookup,
    ) -> Claim {
        let Lookup {
            found,
            token,
            lease,
            away,
        } = lookup;
        let found_there = |value: Option<Value>| {
            Claim::Found(Outcome {
                result: Ok(value),
                source: Source::Cache(asked),
            })
        };
        let key = &led.wanted.key;
        let (value, left) = match (found, token) {
            (Found::Absent { .. }, _) => return found_there(None),
            (Found::Value { value, left }, _) => (value, left),
            // There was no room for a placeholder, or what there is may not be used.
            (Found::Nothing, None) => return Claim::Load(Fill::Not),
            (Found::Nothing, Some(token)) => {
                // Won now, or by who led this flight before.
                let ours = lease == LeaseState::Won || led.seat.lease() == Some(token);
                return match ours {
                    true => self.hold(query, led, token, away),
                    false => Claim::Elsewhere(token, away),
                };
            }
        };
        let Some(token) = token else {
            return found_there(Some(value));
        };
        let overdue = self.elsewhere.is_overdue(key, token);
        if lease == LeaseState::Won || overdue {
            return Claim::Load(Fill::Swap(token, away));
        }
        let age = match freshness::judge(left, self.grace(away), Duration::ZERO) {
            Freshness::Fresh | Freshness::Early => None,
            Freshness::Stale(age) => Some(age),
        };
        if lease == LeaseState::Taken {
            self.elsewhere.note(key, token);
            let value = match age {
                Some(_) => value.into_stale(),
                None => value,
            };
            return found_there(Some(value));
        }
        match age {
            None => found_there(Some(value)),
            // To the server it has a moment left.
            Some(_) => Claim::Load(Fill::Swap(token, away)),
        }
    }

    /// The placeholder of a lease is ours. Unless it is used, it is removed, so that others need not
    /// wait for it to expire.
    fn hold<S: Cache>(&self, query: &Query<S>, led: &Led, token: CasToken, away: Away) -> Claim {
        let behind = Behind {
            spawner: self.spawner.clone(),
            permits: self.releases.clone(),
        };
        let (query, key) = (query.clone(), led.wanted.key.clone());
        led.seat.hold(token, move || {
            let request = refill(removal(key, token));
            // If it is not, it expires.
            behind.spawn(async move {
                let _ = query.put(request).await;
            });
        });
        Claim::Load(Fill::Swap(token, away))
    }

    /// Waits until other processes have put back what they have the leases on. What they have not
    /// after a while is for us to load.
    async fn wait_for_others<S: Cache>(
        &self,
        query: &Query<S>,
        mut waiting: Vec<(Led, CasToken, Away)>,
        terms: Terms,
        settled: &mut Vec<Settled>,
    ) -> Vec<(Led, Fill)> {
        let mut ready = Vec::new();
        if waiting.is_empty() {
            return ready;
        }
        if !terms.patient {
            let falls_back = |(led, ..): (Led, _, _)| led.wanted.conclude(Err(out_of_time()));
            settled.extend(waiting.into_iter().map(falls_back));
            return ready;
        }
        let patience = self.settings.lease_wait_limit();
        let waits_until = after(Instant::now(), patience).min(terms.ends);
        let mut pause = FIRST_PAUSE;
        while !waiting.is_empty() {
            let now = Instant::now();
            if now >= waits_until {
                break;
            }
            let due = after(now, pause.mul_f64(0.5 + fastrand::f64())).min(waits_until);
            pause = (pause * 2).min(LONGEST_PAUSE);
            let pending = std::future::pending::<()>();
            if until(self.spawner.as_ref(), due, pending).await.is_err() {
                break;
            }
            let by = after(Instant::now(), query.timeout).min(terms.ends);
            let mut claims = Vec::with_capacity(waiting.len());
            for waiting in waiting.chunks(LOOKUPS) {
                let some = waiting.iter().map(|(led, ..)| self.claim(query, led, by));
                claims.extend(join_all(some).await);
            }
            let looked = std::mem::take(&mut waiting).into_iter().zip(claims);
            for ((led, ..), claim) in looked {
                match claim {
                    Claim::Found(outcome) => {
                        telemetry::lease_wait("filled");
                        settled.push(led.settle(outcome));
                    }
                    Claim::Load(fill) => {
                        telemetry::lease_wait("released");
                        ready.push((led, fill));
                    }
                    Claim::Elsewhere(token, away) => waiting.push((led, token, away)),
                }
            }
        }
        for (led, token, away) in waiting {
            telemetry::lease_wait("ended");
            // Should its winner be alive after all, the first of the two to be put back stays.
            self.hold(query, &led, token, away);
            ready.push((led, Fill::Swap(token, away)));
        }
        ready
    }

    /// Loads keys in one go, settles them, and puts back what was loaded.
    async fn load<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        ready: Vec<(Led, Fill)>,
        terms: Terms,
        load: &mut F,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        if ready.is_empty() {
            return Vec::new();
        }
        let spawner = self.spawner.as_ref();
        let begun = ready.iter().map(|(led, _)| led.seat.loads()).max();
        if let Some(pause) = self.pause_before(begun.unwrap_or_default()) {
            let due = after(Instant::now(), pause).min(terms.ends);
            let pending = std::future::pending::<()>();
            if let Err(error) = until(spawner, due, pending).await {
                return self.all_fail(ready, &error, false);
            }
            if due >= terms.ends {
                return self.all_fail(ready, &out_of_time(), true);
            }
        }
        let patience = match terms.patient {
            true => Patience::Until(terms.ends),
            false => Patience::Now,
        };
        let permit = match self.guard().enter(patience, spawner).await {
            Ok(permit) => permit,
            Err(shed) => return self.all_fail(ready, &shed, false),
        };
        let begun = Instant::now();
        for (led, fill) in &ready {
            let token = fill.token();
            led.seat.begin(Load { begun, token });
        }
        let keys = ready.iter().map(|(led, _)| led.wanted.key.clone());
        let keys: Vec<Key> = keys.collect();
        // A loader may panic when it is called, polled, or dropped because its time is up.
        let work = until(spawner, terms.ends, async { load(keys).await });
        let (error, hands_over) = match AssertUnwindSafe(work).catch_unwind().await {
            Ok(Ok(Some(Ok(loaded)))) => {
                permit.succeeded();
                self.learn(begun.elapsed());
                return self.all_loaded(query, ready, loaded, begun).await;
            }
            Ok(Ok(Some(Err(error)))) => {
                permit.failed();
                (failed("the loader failed").with_source(error), false)
            }
            Err(_panic) => {
                permit.failed();
                (failed("the loader panicked"), true)
            }
            Ok(Ok(None)) => {
                self.took_too_long(permit, begun);
                let after = begun.elapsed();
                (failed(format!("the loader took over {after:?}")), true)
            }
            Ok(Err(error)) => (error, false),
        };
        self.all_fail(ready, &error, hands_over)
    }

    /// How long to wait before a key is loaded once more in the same flight. Callers who leave sooner
    /// than the database answers would hand over to each other load by load.
    fn pause_before(&self, loads: u32) -> Option<Duration> {
        let repeated = loads.checked_sub(MANY_LOADS)?;
        let pause = FIRST_PAUSE.saturating_mul(1 << repeated.min(10));
        Some(pause.min(self.settings.load_timeout / 4))
    }

    /// A load that did not have its time says nothing of the database.
    fn took_too_long(&self, permit: Permit, begun: Instant) {
        if begun.elapsed() >= self.settings.load_timeout / 2 {
            permit.failed();
        }
    }

    fn all_fail(&self, ready: Vec<(Led, Fill)>, error: &Error, hands_over: bool) -> Vec<Settled> {
        let failed = ready.into_iter().map(|(led, fill)| {
            if let (Some(token), Some(_)) = (fill.token(), &led.wanted.fallback) {
                // Not every read tries to load anew what cannot be.
                self.elsewhere.note(&led.wanted.key, token);
            }
            if hands_over && led.seat.hand_over() {
                return led.wanted.conclude(Err(error.clone()));
            }
            led.seat.land();
            led.settle(Outcome {
                result: Err(error.clone()),
                source: Source::Nowhere,
            })
        });
        failed.collect()
    }

    async fn all_loaded<S: Cache>(
        self: &Arc<Self>,
        query: &Query<S>,
        ready: Vec<(Led, Fill)>,
        mut loaded: HashMap<Key, Payload>,
        begun: Instant,
    ) -> Vec<Settled> {
        let mut settled = Vec::with_capacity(ready.len());
        for (led, fill) in ready {
            let payload = loaded.remove(&led.wanted.key);
            let outcome = Outcome {
                result: Ok(payload.clone().map(Value::from)),
                source: Source::Load(Load {
                    begun,
                    token: fill.token(),
                }),
            };
            let Led { wanted, turn, seat } = led;
            seat.settle(outcome.clone());
            drop(turn);
            self.put_back(query, seat, &wanted.key, fill, payload).await;
            settled.push(wanted.conclude(outcome.result));
        }
        settled
    }

    /// Puts back what was loaded, or that there is nothing, behind the answer.
    async fn put_back<S: Cache>(
        &self,
        query: &Query<S>,
        seat: Seat,
        key: &Key,
        fill: Fill,
        loaded: Option<Payload>,
    ) {
        let Some(request) = self.refill(query, key, fill, loaded) else {
            return seat.land();
        };
        let query = query.clone();
        let write = async move {
            let _refilling = match fill {
                Fill::Add(_) => Some(seat.refilling().await),
                // If it is old it does not fit any more.
                Fill::Swap(..) | Fill::Not => None,
            };
            let result = match seat.is_outdated() {
                true => Ok(false),
                false => query.put(request).await,
            };
            telemetry::refill(match result {
                Ok(true) => {
                    seat.use_lease();
                    "stored"
                }
                Ok(false) => "outdated",
                // A lease that could not be used is given up with the seat.
                Err(_) => "failed",
            });
        };
        let behind = Behind {
            spawner: self.spawner.clone(),
            permits: self.refills.clone(),
        };
        if !behind.run(write).await {
            telemetry::refill("dropped");
        }
    }

    fn refill<S>(
        &self,
        query: &Query<S>,
        key: &Key,
        fill: Fill,
        loaded: Option<Payload>,
    ) -> Option<Request> {
        let settings = &self.settings;
        let (payload, ttl) = match (loaded, settings.negative_ttl) {
            (Some(payload), _) => {
                let ttl = query.ttl.jittered(settings.ttl_jitter, fastrand::f64());
                let (Fill::Swap(_, away) | Fill::Add(away)) = fill else {
                    return None;
                };
                (payload, ttl.extended(self.grace(away)))
            }
            (None, Some(ttl)) => (Payload::absent(), Ttl::from(ttl)),
            // What is there is a placeholder, or a value of what no longer is.
            (None, None) => {
                return fill
                    .token()
                    .map(|token| refill(removal(key.clone(), token)));
            }
        };
        let key = key.clone();
        Some(refill(match fill {
            Fill::Swap(token, _) => Operation::CompareAndSwap {
                key,
                payload,
                ttl,
                token,
            },
            Fill::Add(_) => Operation::Store {
                mode: StoreMode::Add,
                key,
                payload,
                ttl,
            },
            Fill::Not => return None,
        }))
    }

    /// A moving average of what loads take.
    fn learn(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let known = self.cost.load(Ordering::Relaxed);
        let cost = match known {
            0 => took,
            _ => known - known / 8 + took / 8,
        };
        // Of two at once one is lost, which matters to nobody.
        self.cost.store(cost, Ordering::Relaxed);
    }
}

impl<S: Cache> Query<S> {
    /// Writes to the cache, in an operation's time of its own; whether it was stored.
    async fn put(self, request: Request) -> Result<bool> {
        let request = request.with_deadline(after(Instant::now(), self.timeout));
        Ok(matches!(
            request.ask(self.cache).await?,
            Response::Swapped(CasOutcome::Stored) | Response::Stored(true)
        ))
    }
}

/// Where things are done behind the answer.
struct Behind {
    spawner: Option<Spawner>,
    permits: Arc<Semaphore>,
}

impl Behind {
    /// Runs it behind the answer if there is a runtime, and at once otherwise.
    async fn run(self, write: impl Future<Output = ()> + Send + 'static) -> bool {
        if self.spawner.is_none() && Handle::try_current().is_err() {
            write.await;
            return true;
        }
        self.spawn(write)
    }

    /// Runs it behind the answer; false if that cannot be, or as much is done there as may be.
    fn spawn(self, write: impl Future<Output = ()> + Send + 'static) -> bool {
        let Ok(permit) = self.permits.try_acquire_owned() else {
            return false;
        };
        let write = async move {
            write.await;
            drop(permit);
        };
        match (&self.spawner, Handle::try_current()) {
            (Some(spawner), _) => spawner.spawn(write).is_ok(),
            (None, Ok(runtime)) => {
                drop(runtime.spawn(write));
                true
            }
            (None, Err(_)) => false,
        }
    }
}

fn refill(operation: Operation) -> Request {
    Request::new(operation).with_purpose(Purpose::Refill)
}

/// Deletes what the token stands for: its successor has already expired.
fn removal(key: Key, token: CasToken) -> Operation {
    Operation::CompareAndSwap {
        key,
        payload: "".into(),
        ttl: Ttl::secs(0),
        token,
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

fn misfit(response: &Response) -> Error {
    let name = response.name();
    let message = format!("a layer answered with {name}, which does not fit");
    Error::new(ErrorKind::Layer, message).with_sent(Sent::Maybe)
}

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Load, message).with_sent(Sent::No)
}

pub(super) fn out_of_time() -> Error {
    failed("no value in time, while somebody else loads")
}

/// Of a load whose task has ended with its runtime.
pub(super) fn lost() -> Error {
    failed("the load was lost with the runtime it ran in")
}
