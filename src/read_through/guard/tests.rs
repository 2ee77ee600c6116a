use std::collections::HashMap;
use std::future::pending;
use std::pin::pin;
use std::sync::atomic::AtomicUsize;

use futures::FutureExt as _;
use futures::future::join_all;
use tokio::task::yield_now;
use tokio::time::{advance, sleep};

use super::*;
use crate::error::Sent;
use crate::executor::Executor;

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn limits() -> LoadLimits {
    LoadLimits::default()
}

fn guard(limits: LoadLimits) -> LoadGuard {
    LoadGuard::new("items", limits).unwrap()
}

async fn enter(guard: &LoadGuard) -> Result<Permit> {
    let far = Instant::now() + 3600 * SECOND;
    guard.enter(Patience::Until(far), None).await
}

async fn enter_now(guard: &LoadGuard) -> Result<Permit> {
    guard.enter(Patience::Now, None).await
}

/// Nothing runs and nothing waits.
fn is_idle(guard: &LoadGuard) -> bool {
    let status = guard.status();
    (status.running, status.queued) == (0, 0)
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    for (limits, why) in [
        (limits().max_concurrent(0), "max_concurrent"),
        (limits().rate(0), "rate: must not be zero"),
        (limits().rate(1).burst(0), "burst: must not be zero"),
        (limits().burst(1), "without a rate"),
        (limits().throttle(0.99, SECOND), "from 1 upwards"),
        (limits().throttle(f64::NAN, SECOND), "from 1 upwards"),
        (limits().throttle(f64::INFINITY, SECOND), "from 1 upwards"),
        (limits().throttle(2.0, 999 * MILLISECOND), "than a second"),
    ] {
        let of_group = guard(LoadLimits::default()).group("g", limits.clone());
        for error in [LoadGuard::new("items", limits), of_group].map(Result::unwrap_err) {
            assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
            assert!(error.to_string().contains(why), "{error} is not {why}");
        }
    }
}

#[test]
fn limits_without_bounds_are_no_trouble() {
    let limits = limits()
        .max_concurrent(usize::MAX)
        .max_queue(usize::MAX)
        .max_wait(Duration::MAX)
        .rate(u32::MAX)
        .burst(u32::MAX)
        .throttle(f64::MAX, Duration::MAX);
    let permit = enter(&guard(limits)).now_or_never().unwrap();
    permit.unwrap().failed();
}

#[tokio::test(start_paused = true)]
async fn errors_say_which_limit_of_which_guard_and_that_nothing_was_asked() {
    let one = limits().max_concurrent(1).max_queue(1).max_wait(SECOND);
    let database = guard(one.clone().rate(1));
    let group = database.group("reports", one).unwrap();

    let running = enter(&group).await.unwrap();
    let (waited, queue_full) = tokio::join!(enter(&group), enter(&group));
    let database_full = enter_now(&database).await;
    running.failed();
    let throttled = loop {
        match enter_now(&group).await {
            Ok(permit) => permit.failed(),
            // One load each second, and a second is over.
            Err(error) if error.to_string().contains("for now") => advance(SECOND).await,
            Err(error) => break error,
        }
    };
    let fresh = guard(limits().rate(1));
    enter(&fresh).await.unwrap().succeeded();
    let rate = enter(&fresh).await;

    for (refused, message) in [
        (
            waited,
            "load shed: the group \"reports\" of the database \"items\" has all the loads it may \
             have, and none ended in time",
        ),
        (
            queue_full,
            "load shed: the group \"reports\" of the database \"items\" has all the loads it may have",
        ),
        (
            database_full,
            "load shed: the database \"items\" has all the loads it may have",
        ),
        (
            rate,
            "load shed: the database \"items\" may start no more loads for now",
        ),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.to_string(), message);
        assert_eq!(error.kind(), ErrorKind::LoadShed);
        assert_eq!(error.sent(), Sent::No);
        assert!(error.is_overloaded());
    }
    let throttled = throttled.to_string();
    assert!(
        throttled.contains("fails too many of its loads"),
        "{throttled}"
    );

    let shed = group.status().shed;
    assert_eq!((shed.waited, shed.queue_full), (1, 1));
    assert_eq!(database.status().shed.queue_full, 1);
    assert_eq!(fresh.status().shed.rate, 1);
    let throttled = [&group, &database].map(|guard| guard.status().shed.throttled);
    assert_eq!(throttled.iter().sum::<u64>(), 1);
    assert!(is_idle(&group) && is_idle(&database) && is_idle(&fresh));
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_with_its_bound_or_the_callers_patience() {
    let guard = guard(limits().max_concurrent(1));
    let running = enter(&guard).await.unwrap();
    let begun = Instant::now();
    assert!(enter(&guard).await.is_err());
    assert_eq!(begun.elapsed(), 250 * MILLISECOND);

    let begun = Instant::now();
    let patience = Patience::Until(begun + 30 * MILLISECOND);
    assert!(guard.enter(patience, None).await.is_err());
    assert_eq!(begun.elapsed(), 30 * MILLISECOND);

    assert!(enter_now(&guard).now_or_never().unwrap().is_err());
    drop(running);
    assert!(enter_now(&guard).now_or_never().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn with_no_queue_nobody_waits() {
    let guard = guard(limits().max_concurrent(1).max_queue(0));
    let running = enter(&guard).await.unwrap();
    assert!(enter(&guard).now_or_never().unwrap().is_err());
    drop(running);
    assert!(enter(&guard).now_or_never().unwrap().is_ok());
}

/// The most starts within one second of each other; a start exactly a second later is within it.
fn most_in_a_second(starts: &[Instant]) -> usize {
    (0..starts.len())
        .map(|first| {
            let within = |start: &&Instant| **start <= starts[first] + SECOND;
            starts[first..].iter().take_while(within).count()
        })
        .max()
        .unwrap_or(0)
}

#[tokio::test(start_paused = true)]
async fn no_more_start_in_any_second_than_rate_and_burst() {
    let limits = limits()
        .max_concurrent(100)
        .max_wait(60 * SECOND)
        .rate(50)
        .burst(20);
    let guard = guard(limits);
    let starts = Mutex::new(Vec::new());
    let load = async |duration: Duration| {
        let permit = enter(&guard).await.unwrap();
        starts.lock().unwrap().push(Instant::now());
        sleep(duration).await;
        permit.succeeded();
    };
    // The first hundred end at once, when they have kept the others for so long that those would
    // have got all the cells they wanted if they could have taken them then.
    let first = join_all((0..100).map(|_| load(10 * SECOND)));
    let second = async {
        sleep(2 * SECOND).await;
        join_all((0..200).map(|_| load(Duration::ZERO))).await;
    };
    let short = async {
        sleep(30 * SECOND).await;
        join_all((0..100).map(|_| load(7 * MILLISECOND))).await;
    };
    let begun = Instant::now();
    tokio::join!(first, second, short);
    let starts = starts.into_inner().unwrap();
    assert_eq!(starts.len(), 400);
    assert_eq!(most_in_a_second(&starts), 70);
    // The burst at once, and then one every 20 ms.
    assert_eq!(starts[19], begun);
    assert_eq!(starts[20], begun + 20 * MILLISECOND);
    assert_eq!(starts[99], begun + 80 * 20 * MILLISECOND);
    assert!(is_idle(&guard));
}

#[tokio::test(start_paused = true)]
async fn the_burst_is_a_tenth_of_the_rate_and_at_least_one() {
    for (rate, burst) in [(1, 1), (9, 1), (200, 20)] {
        let guard = guard(limits().rate(rate));
        let mut started = 0;
        while enter_now(&guard).await.is_ok() {
            started += 1;
        }
        assert_eq!(started, burst);
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_cell_that_comes_too_late() {
    // One every 200 ms.
    let guard = guard(limits().rate(5));
    enter(&guard).await.unwrap().succeeded();
    let begun = Instant::now();
    let patience = Patience::Until(begun + 199 * MILLISECOND);
    let shed = guard.enter(patience, None).now_or_never().unwrap();
    assert_eq!(shed.unwrap_err().kind(), ErrorKind::LoadShed);
    assert!(enter_now(&guard).now_or_never().unwrap().is_err());
    // 250 ms are enough for one, but not for two.
    let (first, second) = tokio::join!(enter(&guard), enter(&guard));
    first.unwrap().succeeded();
    assert_eq!(second.unwrap_err().kind(), ErrorKind::LoadShed);
    assert_eq!(begun.elapsed(), 200 * MILLISECOND);
    assert_eq!(guard.status().shed.rate, 3);
    assert!(is_idle(&guard));
}

#[tokio::test(start_paused = true)]
async fn who_is_dropped_while_waiting_takes_nothing_along() {
    let guard = guard(limits().max_concurrent(3).rate(5));
    enter(&guard).await.unwrap().succeeded();
    let begun = Instant::now();
    // The first waits for the cell, the second for the first, and each has a place.
    let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(enter(&guard))).collect();
    for entering in &mut waiting {
        assert!(entering.now_or_never().is_none());
    }
    let mut third = pin!(enter(&guard));
    assert!((&mut third).now_or_never().is_none());
    let mut queued = Box::pin(enter(&guard));
    assert!((&mut queued).now_or_never().is_none());
    assert_eq!(guard.status().queued, 4);
    drop(queued);
    drop(waiting);
    assert_eq!(guard.status().queued, 1);
    third.await.unwrap().succeeded();
    assert_eq!(
        begun.elapsed(),
        200 * MILLISECOND,
        "the cell is still there"
    );
    assert!(is_idle(&guard));
    advance(SECOND).await;
    let permit = enter_now(&guard).await.unwrap();
    assert_eq!(guard.status().running, 1);
    drop(permit);
    assert!(is_idle(&guard));
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_a_groups_queue_has_no_place_of_the_database() {
    let database = guard(limits().max_concurrent(2).max_queue(1));
    let group = database.group("g", limits().max_concurrent(1)).unwrap();
    let running = enter(&group).await.unwrap();
    let mut waiting: Vec<_> = (0..10).map(|_| Box::pin(enter(&group))).collect();
    for entering in &mut waiting {
        assert!(entering.now_or_never().is_none());
    }
    assert_eq!(group.status().queued, 10);
    let status = database.status();
    assert_eq!((status.running, status.queued), (1, 0));
    assert!(enter_now(&database).await.is_ok());

    // Whoever has a turn in the group may take up room in the database's queue, one at a time.
    let other = enter(&database).await.unwrap();
    let another = database.group("another", limits()).unwrap();
    let mut waits = pin!(enter(&another));
    assert!((&mut waits).now_or_never().is_none());
    assert_eq!((another.status().queued, database.status().queued), (0, 1));
    assert_eq!(
        enter(&another).await.unwrap_err().kind(),
        ErrorKind::LoadShed
    );
    other.succeeded();
    waits.await.unwrap().succeeded();
    drop((running, waiting));
    assert!(is_idle(&group) && is_idle(&database) && is_idle(&another));
}

#[tokio::test(start_paused = true)]
async fn what_the_database_sheds_leaves_nothing_in_the_group() {
    let database = guard(limits().max_concurrent(2).max_queue(0));
    let group = database.group("g", limits().max_concurrent(2)).unwrap();
    let full = [enter(&database).await, enter(&database).await];
    for _ in 0..100 {
        assert!(enter(&group).await.is_err());
        assert!(enter_now(&group).await.is_err());
    }
    assert_eq!(database.status().shed.queue_full, 200);
    assert_eq!(group.status().shed, LoadsShed::default());
    assert_eq!((group.status().started, database.status().started), (0, 2));
    drop(full);
    let full = [
        enter_now(&group).await.unwrap(),
        enter_now(&group).await.unwrap(),
    ];
    assert_eq!(group.status().running, 2);
    assert_eq!(database.status().running, 2);
    drop(full);
    assert!(is_idle(&group) && is_idle(&database));
}

#[tokio::test(start_paused = true)]
async fn a_cell_of_the_group_is_not_lost_when_the_database_has_none() {
    let database = guard(limits().rate(1));
    let group = database.group("g", limits().rate(1)).unwrap();
    enter(&database).await.unwrap().succeeded();
    for _ in 0..100 {
        let error = enter_now(&group).await.unwrap_err();
        assert!(error.to_string().contains("the database"), "{error}");
    }
    assert_eq!(
        group.status().shed.rate,
        0,
        "the group's cell is still there"
    );
    advance(SECOND).await;
    enter_now(&group).await.unwrap().succeeded();
    // What is kept is one cell, and the second has brought another.
    let error = enter_now(&group).await.unwrap_err();
    assert!(error.to_string().contains("the database"), "{error}");
    advance(SECOND).await;
    let started = [enter_now(&group).await, enter_now(&group).await].map(|entered| entered.is_ok());
    assert_eq!(started, [true, false]);
}

#[tokio::test(start_paused = true)]
async fn groups_keep_to_their_rates_and_to_the_databases() {
    let patient = limits().max_wait(60 * SECOND);
    let database = guard(patient.clone().rate(20).burst(5));
    let starts = Mutex::new(Vec::new());
    let groups: Vec<_> = [12, 15]
        .map(|rate| database.group("g", patient.clone().rate(rate).burst(3)))
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let load = async |which: usize| {
        let permit = enter(&groups[which]).await.unwrap();
        starts.lock().unwrap().push((Instant::now(), which));
        sleep(3 * MILLISECOND).await;
        permit.succeeded();
    };
    join_all((0..200).map(|n| load(n % 2))).await;
    let starts = starts.into_inner().unwrap();
    let of = |group: Option<usize>| -> Vec<_> {
        let wanted = |(_, which): &&(Instant, usize)| group.is_none_or(|group| *which == group);
        starts
            .iter()
            .filter(wanted)
            .map(|(start, _)| *start)
            .collect()
    };
    assert_eq!(most_in_a_second(&of(None)), 25);
    assert!(most_in_a_second(&of(Some(0))) <= 12 + 3 + 1);
    assert!(most_in_a_second(&of(Some(1))) <= 15 + 3 + 1);
    let took = starts[199].0 - starts[0].0;
    assert!(took <= 10 * SECOND, "the database's rate is used: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_group_waits_no_longer_than_it_may_anywhere() {
    let database = guard(limits().max_concurrent(1).max_wait(10 * SECOND));
    let group = database.group("g", limits().max_wait(SECOND)).unwrap();
    let hasty = guard(limits().max_concurrent(1).max_wait(SECOND));
    let patient = hasty.group("g", limits().max_wait(10 * SECOND)).unwrap();
    let _running = [enter(&database).await, enter(&hasty).await];
    for group in [group, patient] {
        let begun = Instant::now();
        assert!(enter(&group).await.is_err());
        assert_eq!(begun.elapsed(), SECOND);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_at_once_never_exceed_the_limits() {
    const CONCURRENT: usize = 8;
    const QUEUE: usize = 100;
    let limits = limits().max_concurrent(CONCURRENT).max_queue(QUEUE);
    let guard = guard(limits.max_wait(600 * SECOND));
    let [running, most_running, most_queued] = [(); 3].map(|()| Arc::new(AtomicUsize::new(0)));
    let loads = (0..10_000).map(|n| {
        let (guard, running) = (guard.clone(), running.clone());
        let (most_running, most_queued) = (most_running.clone(), most_queued.clone());
        tokio::spawn(async move {
            let entering = enter(&guard);
            let mut entering = pin!(entering);
            if n % 7 == 0 {
                // Its caller leaves, wherever it is.
                let _left = (&mut entering).now_or_never();
                return false;
            }
            let Ok(permit) = entering.await else {
                return false;
            };
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            most_running.fetch_max(now, Ordering::SeqCst);
            most_queued.fetch_max(guard.status().queued, Ordering::SeqCst);
            assert!(guard.status().running <= CONCURRENT);
            for _ in 0..n % 5 {
                yield_now().await;
            }
            running.fetch_sub(1, Ordering::SeqCst);
            permit.succeeded();
            true
        })
    });
    let made = join_all(loads).await;
    let made = made
        .into_iter()
        .filter(|made| *made.as_ref().unwrap())
        .count();
    assert!(made >= QUEUE, "{made}");
    let most_running = most_running.load(Ordering::SeqCst);
    assert!((1..=CONCURRENT).contains(&most_running), "{most_running}");
    assert!(most_queued.load(Ordering::SeqCst) <= QUEUE);
    assert!(is_idle(&guard));
    let places: Vec<_> = join_all((0..CONCURRENT).map(|_| enter_now(&guard))).await;
    assert!(places.iter().all(Result::is_ok), "every place came back");
    assert!(enter_now(&guard).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn only_failures_count_against_the_database() {
    let guard = guard(limits());
    let probability = || guard.status().rejection_probability;
    for _ in 0..100 {
        drop(enter(&guard).await.unwrap());
        enter(&guard).await.unwrap().succeeded();
    }
    assert_eq!(probability(), 0.0);
    // As many failures as those that succeeded or said nothing.
    for _ in 0..200 {
        assert_eq!(probability(), 0.0);
        enter(&guard).await.unwrap().failed();
    }
    assert_eq!(guard.status().shed, LoadsShed::default());
    enter(&guard).await.unwrap().failed();
    assert_eq!(probability(), 1.0 / 402.0);
    let status = guard.status();
    assert_eq!((status.started, status.failed), (401, 201));
}

#[tokio::test(start_paused = true)]
async fn a_group_that_fails_alone_is_held_back_alone() {
    fastrand::seed(1);
    let database = guard(limits());
    let failing = database.group("failing", limits()).unwrap();
    let unwary = database
        .group("unwary", limits().without_throttle())
        .unwrap();
    for _ in 0..1000 {
        enter(&database).await.unwrap().succeeded();
        if let Ok(permit) = enter(&failing).await {
            permit.failed();
        }
    }
    let status = failing.status();
    assert!(status.started < 200, "{status:?}");
    assert_eq!(status.started + status.shed.throttled, 1000);
    assert_eq!(database.status().rejection_probability, 0.0);
    assert_eq!(database.status().shed.throttled, 0);
    for _ in 0..100 {
        enter(&unwary).await.unwrap().failed();
    }
    assert_eq!(unwary.status().rejection_probability, 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_database_that_comes_back_is_used_by_all_within_seconds() {
    fastrand::seed(1);
    let database = guard(limits());
    let group = database.group("g", limits()).unwrap();
    let second = async |fails: bool| {
        let before = database.status().started;
        for _ in 0..200 {
            for _ in 0..10 {
                match enter(&group).await {
                    Ok(permit) if fails => permit.failed(),
                    Ok(permit) => permit.succeeded(),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::LoadShed),
                }
            }
            advance(5 * MILLISECOND).await;
        }
        database.status().started - before
    };
    assert_eq!(second(false).await, 2000);
    for _ in 0..180 {
        second(true).await;
    }
    let mut asked = 0;
    for _ in 0..60 {
        asked += second(true).await;
    }
    assert!((10..300).contains(&asked), "{asked} in a minute");
    let mut seconds = 1;
    while second(false).await < 2000 {
        seconds += 1;
        assert!(seconds <= 10, "two throttles, one over the other");
    }
}

#[tokio::test(start_paused = true)]
async fn run_tells_the_guards_error_from_the_loads() {
    let guard = guard(limits().max_concurrent(1).max_queue(0));
    assert_eq!(guard.run(async { Ok::<_, ()>(1) }).await.unwrap(), Ok(1));
    assert_eq!(guard.run(async { Err::<(), _>(2) }).await.unwrap(), Err(2));
    let mut hangs = Box::pin(guard.run(pending::<Result<(), ()>>()));
    assert!((&mut hangs).now_or_never().is_none());
    let shed = guard.run(async { Ok::<_, ()>(()) }).await.unwrap_err();
    assert_eq!(shed.kind(), ErrorKind::LoadShed);
    drop(hangs);
    let status = guard.status();
    assert_eq!((status.started, status.failed, status.running), (3, 1, 0));
}

#[test]
fn a_guard_made_outside_of_a_runtime_keeps_the_time_of_the_one_it_is_used_in() {
    let patient = limits().max_wait(10 * SECOND).rate(10);
    let guard = guard(patient);
    for _ in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            advance(100 * MILLISECOND).await;
            let _ = enter(&guard).await.unwrap();
            let begun = Instant::now();
            let _ = enter(&guard).await.unwrap();
            // The second runtime's clock may begin before the first one's had ended.
            assert!(begun.elapsed() >= 100 * MILLISECOND);
            assert!(begun.elapsed() < SECOND);
        });
    }
}

#[test]
fn outside_of_a_runtime_a_wait_needs_an_executor() {
    let guard = guard(limits().max_concurrent(1).rate(1000));
    let running = futures::executor::block_on(enter(&guard)).unwrap();
    let error = futures::executor::block_on(enter(&guard)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoRuntime);
    assert_eq!(guard.status().queued, 0);

    let spawner = Executor::dedicated("guard-timer", 1).start().unwrap();
    let patience = Patience::Until(Instant::now() + 5 * MILLISECOND);
    let waited = futures::executor::block_on(guard.enter(patience, Some(&spawner)));
    assert_eq!(waited.unwrap_err().kind(), ErrorKind::LoadShed);
    assert_eq!(guard.status().shed.waited, 1);
    drop(running);
    assert!(is_idle(&guard));
}

/// The last or the summed value of everything told, by name and labels.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<HashMap<String, Arc<AtomicU64>>>>);

impl Recorder {
    fn cell(&self, key: &metrics::Key) -> Arc<AtomicU64> {
        let labels = key
            .labels()
            .map(|label| format!(" {}={}", label.key(), label.value()));
        let name = key.name().to_owned() + &labels.collect::<String>();
        self.0.lock().unwrap().entry(name).or_default().clone()
    }

    fn told(&self) -> Vec<(String, f64)> {
        let cells = self.0.lock().unwrap();
        let value = |(name, cell): (&String, &Arc<AtomicU64>)| {
            let value = cell.load(Ordering::Relaxed);
            let is_count = name.contains("_total");
            let value = if is_count {
                value as f64
            } else {
                f64::from_bits(value)
            };
            (name.clone(), value)
        };
        let mut told: Vec<_> = cells.iter().map(value).collect();
        told.sort_by(|one, other| one.0.cmp(&other.0));
        told
    }
}

struct LastOf(Arc<AtomicU64>);

impl metrics::HistogramFn for LastOf {
    fn record(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }

    fn describe_gauge(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }

    fn describe_histogram(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        metrics::Counter::from_arc(self.cell(key))
    }

    fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::from_arc(self.cell(key))
    }

    fn register_histogram(
        &self,
        key: &metrics::Key,
        _: &metrics::Metadata<'_>,
    ) -> metrics::Histogram {
        metrics::Histogram::from_arc(Arc::new(LastOf(self.cell(key))))
    }
}

#[tokio::test(start_paused = true)]
async fn metrics_tell_what_runs_waits_ended_and_was_shed() {
    let recorder = Recorder::default();
    let _local = metrics::set_default_local_recorder(&recorder);
    let guard = guard(limits().max_concurrent(2).max_queue(1).rate(1000));
    let (first, second) = (enter(&guard).await.unwrap(), enter(&guard).await.unwrap());
    let mut waits = Box::pin(enter(&guard));
    assert!((&mut waits).now_or_never().is_none());
    assert!(enter(&guard).await.is_err());
    let gauges = |told: Vec<(String, f64)>| -> Vec<f64> {
        let gauges = ["loads_queued", "loads_running"];
        let is_gauge = |(name, _): &(String, f64)| gauges.iter().any(|gauge| name.contains(gauge));
        told.into_iter()
            .filter(is_gauge)
            .map(|(_, value)| value)
            .collect()
    };
    assert_eq!(gauges(recorder.told()), [1.0, 2.0]);
    advance(500 * MILLISECOND).await;
    first.succeeded();
    second.failed();
    drop(waits);
    drop(enter(&guard).await.unwrap());
    for _ in 0..3 {
        drop(enter_now(&guard).await.unwrap());
    }
    let told = recorder.told();
    let told: Vec<_> = told.iter().map(|(name, value)| (&**name, *value)).collect();
    assert_eq!(
        told,
        [
            ("memcached_loads_duration_seconds guard=items", 0.5),
            (
                "memcached_loads_ended_total guard=items result=abandoned",
                4.0
            ),
            (
                "memcached_loads_ended_total guard=items result=failure",
                1.0
            ),
            (
                "memcached_loads_ended_total guard=items result=success",
                1.0
            ),
            ("memcached_loads_queued guard=items", 0.0),
            ("memcached_loads_running guard=items", 0.0),
            (
                "memcached_loads_shed_total guard=items reason=queue_full",
                1.0
            ),
        ]
    );
}
