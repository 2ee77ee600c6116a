//! More requests than a node can answer: what is too much is refused, and the rest is answered in time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tower::{BoxError, Service as _, service_fn};
use tower_memcached::{
    ErrorKind, Executor, Key, Node, NodeSettings, Operation, ProbeSettings, Request, Response,
};

/// Requests a second.
const CAPACITY: u32 = 10_000;

const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(30);
const SECONDS: u64 = 2;

/// How long it may take until it is known how much is too much.
const LEARNING: Duration = Duration::from_millis(500);

/// When a request was due, when it ended, and how.
type Ended = (Instant, Instant, Result<Response, ErrorKind>);

/// A node that answers one request after the other, a thousand in a tenth of a second, whether or not anybody waits
/// for it any more, and how loads of so many requests a second end there. Also whether it was ejected.
async fn offer(rate: u64) -> (Vec<Ended>, bool) {
    let busy_until = Arc::new(Mutex::new(Instant::now()));
    let service = service_fn(move |_: Request| {
        let mut busy_until = busy_until.lock().unwrap();
        *busy_until = (*busy_until).max(Instant::now()) + Duration::from_secs(1) / CAPACITY;
        let answered_at = *busy_until;
        async move {
            sleep_until(answered_at).await;
            Ok::<_, BoxError>(Response::Value(None))
        }
    });
    // What is asked here has one answer, which is none to a probe.
    let probe = ProbeSettings::default().initial_delay(Duration::from_secs(3_600));
    let settings = NodeSettings::default()
        .attempt_timeout(ATTEMPT_TIMEOUT)
        .adaptive_limit(true)
        .probe(probe);
    let node = Node::new("n", service, settings, &Executor::current()).unwrap();
    let mut requests = JoinSet::new();
    let start = Instant::now();
    let mut ejected = false;
    for millisecond in 0..SECONDS * 1_000 {
        let due = start + Duration::from_millis(millisecond);
        sleep_until(due).await;
        for _ in 0..rate / 1_000 {
            let mut node = node.clone();
            let operation = Operation::Get {
                key: Key::new("k").unwrap(),
                with_cas: false,
            };
            requests.spawn(async move {
                let outcome = node.call(Request::new(operation)).await;
                (due, Instant::now(), outcome.map_err(|error| error.kind()))
            });
        }
        ejected |= node.is_open();
    }
    (requests.join_all().await, ejected)
}

#[tokio::test(start_paused = true)]
async fn under_its_capacity_nothing_is_refused() {
    let (ended, ejected) = offer(u64::from(CAPACITY) * 9 / 10).await;
    assert!(ended.iter().all(|(_, _, outcome)| outcome.is_ok()));
    assert!(!ejected);
}

#[tokio::test(start_paused = true)]
async fn past_its_capacity_it_answers_as_much_as_it_can_and_the_rest_is_refused_at_once() {
    for times in [2, 3] {
        let rate = u64::from(CAPACITY) * times;
        let start = Instant::now();
        let (ended, ejected) = offer(rate).await;
        assert!(!ejected, "{times} times its capacity");
        let learnt = ended.iter().filter(|(due, ..)| *due >= start + LEARNING);
        let (mut good, mut refused) = (0_u64, 0);
        for (due, at, outcome) in learnt {
            let took = at.duration_since(*due);
            match outcome {
                Ok(_) => {
                    good += 1;
                    assert!(took < ATTEMPT_TIMEOUT, "answered after {took:?}");
                }
                Err(ErrorKind::Overloaded) => {
                    refused += 1;
                    assert!(took.is_zero(), "refused after {took:?}");
                }
                Err(kind) => panic!("{kind:?} after {took:?}"),
            }
        }
        let time = Duration::from_secs(SECONDS) - LEARNING;
        let most = f64::from(CAPACITY) * time.as_secs_f64();
        assert!(good as f64 >= most * 0.9, "{good} of {most} are good");
        let offered = time.as_millis() as u64 * rate / 1_000;
        assert_eq!(good + refused, offered);
    }
}

/// A node of its own kind of slowness: the first argument is how many it was asked before.
fn slow_by_itself(
    takes: impl Fn(u64) -> Duration + Clone + Send + Sync + 'static,
) -> impl tower::Service<Request, Response = Response, Error: Into<BoxError> + Send, Future: Send>
+ Clone
+ Send
+ Sync
+ 'static {
    let asked = Arc::new(Mutex::new(0));
    service_fn(move |_: Request| {
        let mut asked = asked.lock().unwrap();
        let takes = takes(*asked);
        *asked += 1;
        async move {
            tokio::time::sleep(takes).await;
            Ok::<_, BoxError>(Response::Value(None))
        }
    })
}

/// Calls the node so many times a millisecond, for so many of these: how many were refused, and how
/// many failed in any other way.
async fn calls<S>(node: &Node<S>, each: u64, milliseconds: u64) -> (usize, usize)
where
    S: tower::Service<Request, Response = Response, Error: Into<BoxError> + Send, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static,
{
    let mut requests = JoinSet::new();
    let start = Instant::now();
    for millisecond in 0..milliseconds {
        sleep_until(start + Duration::from_millis(millisecond)).await;
        for _ in 0..each {
            let mut node = node.clone();
            let operation = Operation::Get {
                key: Key::new("k").unwrap(),
                with_cas: false,
            };
            requests.spawn(async move { node.call(Request::new(operation)).await });
        }
    }
    let ended = requests.join_all().await;
    let kinds = ended.iter().filter_map(|outcome| outcome.as_ref().err());
    let (refused, failed): (Vec<_>, Vec<_>) = kinds.partition(|error| error.is_overloaded());
    (refused.len(), failed.len())
}

fn node_of<S>(service: S) -> Node<S>
where
    S: tower::Service<Request, Response = Response, Error: Into<BoxError> + Send, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static,
{
    let probe = ProbeSettings::default().initial_delay(Duration::from_secs(3_600));
    let settings = NodeSettings::default()
        .attempt_timeout(ATTEMPT_TIMEOUT)
        .adaptive_limit(true)
        .probe(probe);
    Node::new("n", service, settings, &Executor::current()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn some_late_answers_among_those_in_time_refuse_nothing() {
    for one_in in [2, 10, 1_000] {
        let takes =
            move |nth: u64| Duration::from_millis(if nth.is_multiple_of(one_in) { 20 } else { 4 });
        let node = node_of(slow_by_itself(takes));
        let ended = calls(&node, 50, 2_000).await;
        assert_eq!(ended, (0, 0), "one in {one_in}");
        assert!(!node.is_open());
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_late_long_ago_refuses_nothing() {
    // All that is asked in the first hundredth of a second.
    let takes = |nth: u64| Duration::from_millis(if nth < 1_000 { 20 } else { 4 });
    let node = node_of(slow_by_itself(takes));
    calls(&node, 100, 10).await;
    assert!(node.status().max_in_flight < 1_000, "it was lowered");
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!(calls(&node, 2_000, 1).await, (0, 0));
    assert_eq!(node.status().max_in_flight, 16_384);
}
