use std::convert::Infallible;
use std::future::{Future, pending, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all};
use tokio::sync::oneshot;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};
use tower::limit::ConcurrencyLimitLayer;
use tower::{BoxError, Layer as _, Service, ServiceExt as _, service_fn};

use super::*;
use crate::error::{ErrorKind, Sent};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A service whose requests are the futures that it runs.
#[derive(Clone)]
struct Runs;

impl<F: Future + Send + 'static> Service<F> for Runs {
    type Response = F::Output;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<F::Output, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, future: F) -> Self::Future {
        Box::pin(future.map(Ok))
    }
}

fn layer(max_in_flight: usize, max_queue: usize) -> BulkheadLayer {
    BulkheadLayer::new(max_in_flight)
        .max_queue(max_queue)
        .max_wait(SECOND)
}

/// Nobody inside, and nobody waiting.
fn is_empty<S>(bulkhead: &Bulkhead<S>) -> bool {
    (bulkhead.in_flight(), bulkhead.queued()) == (0, 0)
}

fn refusal<T>(outcome: Result<T, crate::Error>) -> String {
    let Err(error) = outcome else {
        panic!("it was let in");
    };
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    assert_eq!(error.sent(), Sent::No);
    assert!(error.is_overloaded());
    error.to_string()
}

#[tokio::test]
async fn without_a_queue_whoever_finds_no_place_fails_at_once_and_is_told_by_whom() {
    let nameless = BulkheadLayer::new(1).layer(Runs);
    let named = BulkheadLayer::new(1).name("reports").layer(Runs);
    for (bulkhead, message) in [
        (
            nameless,
            "overloaded: the bulkhead has all the requests it may have",
        ),
        (
            named,
            "overloaded: the bulkhead \"reports\" has all the requests it may have",
        ),
    ] {
        let inside = bulkhead.clone().call(pending::<()>());
        let refused = bulkhead.clone().call(pending::<()>());
        assert_eq!(refusal(refused.now_or_never().unwrap()), message);
        assert_eq!(bulkhead.in_flight(), 1);
        drop(inside);
        assert_eq!(bulkhead.clone().oneshot(async { 1 }).await.unwrap(), 1);
        assert!(is_empty(&bulkhead));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_at_its_bound_and_says_so() {
    let bulkhead = layer(1, 1).name("reports").layer(Runs);
    let _inside = bulkhead.clone().call(pending::<()>());
    let begun = Instant::now();
    let waits = bulkhead.clone().call(pending::<()>());
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 1));
    let full = bulkhead.clone().call(pending::<()>());
    refusal(full.now_or_never().unwrap());
    assert_eq!(
        refusal(waits.await),
        "overloaded: the bulkhead \"reports\" has all the requests it may have, and none ended in \
         time"
    );
    assert_eq!(begun.elapsed(), SECOND);
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 0));

    let begun = Instant::now();
    let deadline = begun + 30 * MILLISECOND;
    refusal(bulkhead.call_by(pending::<()>(), Some(deadline)).await);
    assert_eq!(begun.elapsed(), 30 * MILLISECOND, "the earlier of both");
}

#[tokio::test(start_paused = true)]
async fn by_default_a_wait_takes_50_ms_at_most() {
    let bulkhead = BulkheadLayer::new(0).max_queue(1).layer(Runs);
    let begun = Instant::now();
    refusal(bulkhead.oneshot(pending::<()>()).await);
    assert_eq!(begun.elapsed(), 50 * MILLISECOND);
}

#[tokio::test(start_paused = true)]
async fn turns_come_in_the_order_of_the_calls_and_nobody_barges() {
    let bulkhead = layer(1, 100).layer(Runs);
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let visit = |n: usize| {
        let order = order.clone();
        let visit = async move {
            order.lock().unwrap().push(n);
            yield_now().await;
        };
        bulkhead.clone().call(visit.boxed())
    };
    let first = visit(0);
    // Polled in another order than they came in.
    let mut others: Vec<_> = (1..100).map(visit).collect();
    others.reverse();
    let late = async {
        first.await.unwrap();
        // The place that has become free belongs to the first in the queue.
        assert!(bulkhead.room().try_enter().is_none());
        visit(100).await.unwrap();
    };
    tokio::join!(join_all(others), late);
    assert_eq!(*order.lock().unwrap(), (0..=100).collect::<Vec<_>>());
    assert!(is_empty(&bulkhead));
}

#[tokio::test(start_paused = true)]
async fn a_request_dropped_anywhere_leaves_nothing_behind() {
    let bulkhead = layer(1, 3).layer(Runs);
    let call = || bulkhead.clone().call(pending::<()>());

    // Never polled, and while it runs.
    drop(call());
    let mut runs = Box::pin(call());
    assert!((&mut runs).now_or_never().is_none());

    let queued = call();
    let mut in_the_queue = Box::pin(call());
    let mut on_the_doorstep = Box::pin(call());
    assert!((&mut in_the_queue).now_or_never().is_none());
    assert!((&mut on_the_doorstep).now_or_never().is_none());
    assert_eq!(bulkhead.queued(), 3);
    drop(queued);
    drop(in_the_queue);
    assert_eq!(bulkhead.queued(), 1);
    let mut next = pin!(bulkhead.clone().call(async { 7 }.boxed()));
    assert!((&mut next).now_or_never().is_none());
    // Its turn has come, but it has not been told when it goes.
    drop(runs);
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 2));
    drop(on_the_doorstep);
    assert_eq!(next.now_or_never().unwrap().unwrap(), 7);
    assert!(is_empty(&bulkhead));
}

#[tokio::test]
async fn a_panic_below_gives_the_place_back() {
    let bulkhead = layer(1, 0).layer(Runs);
    let panics = async { panic!("below") };
    let panics = tokio::spawn(bulkhead.clone().oneshot(panics));
    assert!(panics.await.unwrap_err().is_panic());
    assert!(is_empty(&bulkhead));

    let panics = service_fn(|_: ()| -> std::future::Ready<Result<(), BoxError>> { panic!() });
    let bulkhead = layer(1, 0).layer(panics);
    let call = bulkhead.clone().oneshot(());
    assert!(AssertUnwindSafe(call).catch_unwind().await.is_err());
    assert!(is_empty(&bulkhead));
}

#[tokio::test]
async fn the_errors_of_the_service_below_are_its_own_and_give_the_place_back() {
    let bulkhead = layer(1, 0).layer(service_fn(async |ours: bool| -> Result<(), BoxError> {
        match ours {
            true => Err(crate::Error::new(ErrorKind::Timeout, "ours").into()),
            false => Err("foreign".into()),
        }
    }));
    let ours = bulkhead.clone().oneshot(true).await.unwrap_err();
    assert_eq!(ours.kind(), ErrorKind::Timeout);
    let foreign = bulkhead.clone().oneshot(false).await.unwrap_err();
    assert_eq!(foreign.kind(), ErrorKind::Layer);
    assert!(is_empty(&bulkhead));
}

/// A service that panics if the one that is called is not the one that was ready.
struct Particular {
    ready_in: usize,
    polls: usize,
}

impl Clone for Particular {
    fn clone(&self) -> Self {
        Self {
            ready_in: self.ready_in,
            polls: 0,
        }
    }
}

impl Service<()> for Particular {
    type Response = ();
    type Error = Infallible;
    type Future = std::future::Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.polls += 1;
        if self.polls > self.ready_in {
            return Poll::Ready(Ok(()));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn call(&mut self, (): ()) -> Self::Future {
        assert!(self.polls > self.ready_in, "called before it was ready");
        self.polls = 0;
        std::future::ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn the_service_that_was_ready_is_the_one_that_is_called() {
    for ready_in in [0, 3] {
        let below = Particular { ready_in, polls: 0 };
        let mut bulkhead = layer(1, 2).layer(below);
        // At once, from the queue, and by a service that is used again.
        let calls = [(); 3].map(|()| bulkhead.call(()));
        assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 2));
        assert!(join_all(calls).await.iter().all(Result::is_ok));
        assert!(is_empty(&bulkhead));
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_the_service_below_to_be_ready_has_a_place() {
    // It is never ready for a second one.
    let below = ConcurrencyLimitLayer::new(1).layer(Runs);
    let mut bulkhead = layer(2, 0).layer(below);
    poll_fn(|cx| Service::<BoxFuture<'_, ()>>::poll_ready(&mut bulkhead, cx))
        .await
        .unwrap();
    let mut calls = [(); 2].map(|()| Box::pin(bulkhead.call(pending::<()>())));
    for call in &mut calls {
        assert!(call.now_or_never().is_none());
    }
    let third = bulkhead.call(pending::<()>());
    refusal(third.now_or_never().unwrap());
    drop(calls);
    assert!(is_empty(&bulkhead));
}

#[tokio::test(start_paused = true)]
async fn limits_change_while_requests_go_on() {
    let bulkhead = layer(1, 9).layer(Runs);
    let call = |until: oneshot::Receiver<()>| {
        let run = until.map(drop).boxed();
        tokio::spawn(bulkhead.clone().call(run))
    };
    let (mut ends, mut tasks) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let (end, until) = oneshot::channel();
        ends.push(end);
        tasks.push(call(until));
    }
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 3));

    bulkhead.set_limits(&layer(3, 0));
    yield_now().await;
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (3, 1));
    let (_end, until) = oneshot::channel();
    refusal(call(until).await.unwrap());

    bulkhead.set_limits(&layer(1, 0));
    ends.remove(0).send(()).unwrap();
    tasks.remove(0).await.unwrap().unwrap();
    ends.remove(0).send(()).unwrap();
    tasks.remove(0).await.unwrap().unwrap();
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 1));
    ends.remove(0).send(()).unwrap();
    tasks.remove(0).await.unwrap().unwrap();
    yield_now().await;
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 0));
    drop(ends);
    tasks.remove(0).await.unwrap().unwrap();
    assert!(is_empty(&bulkhead));
}

#[test]
fn each_service_that_is_made_has_places_of_its_own() {
    let layer = layer(1, 0);
    let (one, other) = (layer.layer(Runs), layer.layer(Runs));
    let _inside = one.clone().call(pending::<()>());
    assert_eq!((one.in_flight(), other.in_flight()), (1, 0));
}

#[test]
fn without_a_runtime_a_wait_is_a_typed_error_and_everything_else_works() {
    let bulkhead = layer(1, 1).layer(Runs);
    let call = || bulkhead.clone().call(async { 7 }.boxed());
    assert_eq!(futures::executor::block_on(call()).unwrap(), 7);
    let inside = call();
    let error = futures::executor::block_on(call()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoRuntime);
    assert_eq!((bulkhead.in_flight(), bulkhead.queued()), (1, 0));
    let waits = call();
    drop(inside);
    assert_eq!(futures::executor::block_on(waits).unwrap(), 7);
    assert!(is_empty(&bulkhead));
}

struct Inside(Arc<AtomicUsize>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn called(
    mut bulkhead: Bulkhead<Runs>,
    visit: BoxFuture<'static, ()>,
) -> BoxFuture<'static, Result<(), crate::Error>> {
    bulkhead.call(visit).boxed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_at_once_are_never_more_than_may_and_all_places_come_back() {
    const PLACES: usize = 8;
    let patient = BulkheadLayer::new(PLACES).max_queue(100);
    let bulkhead = patient.max_wait(600 * SECOND).layer(Runs);
    let inside = Arc::new(AtomicUsize::new(0));
    let made = (0..10_000).map(|n: usize| {
        let inside = inside.clone();
        let visit = async move {
            let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
            let _inside = Inside(inside);
            assert!(now <= PLACES, "{now}");
            for _ in 0..n % 5 {
                yield_now().await;
            }
        };
        let bulkhead = bulkhead.clone();
        tokio::spawn(async move {
            let mut call = called(bulkhead, visit.boxed());
            match n % 7 {
                // Its caller leaves, wherever it is.
                0 => (&mut call).now_or_never().is_some_and(|left| left.is_ok()),
                _ => call.await.is_ok(),
            }
        })
    });
    let made = join_all(made).await;
    let made = made.into_iter().filter(|made| *made.as_ref().unwrap());
    assert!(made.count() >= 100);
    assert!(is_empty(&bulkhead));
    let places: Vec<_> = (0..PLACES).map(|_| bulkhead.room().try_enter()).collect();
    assert!(places.iter().all(Option::is_some));
    assert!(bulkhead.room().try_enter().is_none());
}

#[tokio::test(start_paused = true)]
async fn places_that_come_back_late_serve_those_who_still_wait() {
    let bulkhead = layer(1, 9).layer(Runs);
    let inside = tokio::spawn(bulkhead.clone().call(sleep(SECOND + MILLISECOND)));
    let hasty = tokio::spawn(bulkhead.clone().call(async { 1 }.boxed()));
    sleep(MILLISECOND * 2).await;
    let patient = tokio::spawn(bulkhead.clone().call(async { 2 }.boxed()));
    refusal(hasty.await.unwrap());
    inside.await.unwrap().unwrap();
    assert_eq!(patient.await.unwrap().unwrap(), 2);
    assert!(is_empty(&bulkhead));
}
