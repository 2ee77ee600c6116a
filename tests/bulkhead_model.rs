//! The hand-over of a bulkhead's places under every interleaving of a few threads, by loom.
//!
//! Only `src/bulkhead/limit.rs` is in the model: it is compiled into this test a second time, with
//! loom's lock and atomics in the place of the standard library's.

use std::task::{Wake, Waker};

use limit::Limit;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Notify};
use loom::thread::{self, JoinHandle};

#[path = "../src/bulkhead/limit.rs"]
#[allow(dead_code, unreachable_pub)]
mod limit;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    pub(super) use loom::sync::{Mutex, MutexGuard};
}

type Shared = Arc<Limit>;

/// With three threads every interleaving would take minutes: these are all in which threads are
/// interrupted twice, besides where they wait.
fn of_three_threads(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(run);
}

fn spawn<T: 'static>(limit: &Shared, run: impl FnOnce(&Shared) -> T + 'static) -> JoinHandle<T> {
    let limit = limit.clone();
    thread::spawn(move || run(&limit))
}

/// So many places, all taken, and a long queue.
fn full(places: usize) -> Shared {
    let limit = Limit::new(places, 9);
    (0..places).for_each(|_| assert!(limit.try_enter()));
    Arc::new(limit)
}

struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.notify();
    }
}

/// Waits for the turn of a number. Nobody but a waker ends the wait: loom tells if none does.
fn turn(limit: &Limit, number: u64) {
    let bell = std::sync::Arc::new(Bell(Notify::new()));
    let waker = Waker::from(bell.clone());
    while limit.poll_turn(number, &waker).is_pending() {
        bell.0.wait();
    }
    limit.ticket_ends();
}

fn enter(limit: &Limit) {
    if !limit.try_enter() {
        turn(limit, limit.line_up().unwrap());
    }
}

fn assert_all_came_back(limit: &Limit, places: usize) {
    assert_eq!((limit.in_flight(), limit.queued()), (0, 0));
    assert!((0..places).all(|_| limit.try_enter()));
    assert!(!limit.try_enter());
}

#[test]
fn who_lines_up_while_the_last_leaves_has_the_place() {
    loom::model(|| {
        let limit = full(1);
        let leaver = spawn(&limit, |limit| limit.leave());
        enter(&limit);
        assert_eq!(limit.in_flight(), 1);
        leaver.join().unwrap();
        limit.leave();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn two_who_leave_are_followed_by_two_who_wait() {
    of_three_threads(|| {
        let limit = full(2);
        let first = limit.line_up().unwrap();
        let leaver = spawn(&limit, |limit| limit.leave());
        let waiter = spawn(&limit, move |limit| {
            turn(limit, first);
            limit.leave();
        });
        enter(&limit);
        limit.leave();
        // Who was inside from the beginning.
        limit.leave();
        leaver.join().unwrap();
        waiter.join().unwrap();
        assert_all_came_back(&limit, 2);
    });
}

#[test]
fn never_are_more_inside_than_may() {
    loom::model(|| {
        let limit = Arc::new(Limit::new(1, 9));
        let inside = Arc::new(AtomicUsize::new(0));
        let visit = {
            let inside = inside.clone();
            move |limit: &Shared| {
                enter(limit);
                // Relaxed, so that it is the limit that orders them.
                assert_eq!(inside.load(Ordering::Relaxed), 0);
                inside.store(1, Ordering::Relaxed);
                inside.store(0, Ordering::Relaxed);
                limit.leave();
            }
        };
        let other = spawn(&limit, visit.clone());
        visit(&limit);
        other.join().unwrap();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn who_comes_while_somebody_waits_is_not_let_in_before() {
    loom::model(|| {
        let limit = full(1);
        let waits = limit.line_up().unwrap();
        let leaver = spawn(&limit, |limit| limit.leave());
        assert!(!limit.try_enter() && !limit.try_enter_half());
        turn(&limit, waits);
        assert!(!limit.try_enter());
        leaver.join().unwrap();
        limit.leave();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn who_gives_up_while_the_place_becomes_theirs_passes_it_on() {
    of_three_threads(|| {
        let limit = full(1);
        let (first, second) = (limit.line_up().unwrap(), limit.line_up().unwrap());
        let leaver = spawn(&limit, |limit| limit.leave());
        let quitter = spawn(&limit, move |limit| {
            limit.give_up(first);
            limit.ticket_ends();
        });
        turn(&limit, second);
        assert_eq!(limit.in_flight(), 1);
        leaver.join().unwrap();
        quitter.join().unwrap();
        limit.leave();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn the_last_who_gives_up_leaves_the_door_open() {
    loom::model(|| {
        let limit = full(1);
        let only = limit.line_up().unwrap();
        let leaver = spawn(&limit, |limit| limit.leave());
        limit.give_up(only);
        limit.ticket_ends();
        leaver.join().unwrap();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn a_place_that_is_added_is_the_waiters_as_is_the_one_that_becomes_free() {
    of_three_threads(|| {
        let limit = full(1);
        let first = limit.line_up().unwrap();
        let raiser = spawn(&limit, |limit| limit.set(2, 9));
        let leaver = spawn(&limit, |limit| limit.leave());
        enter(&limit);
        turn(&limit, first);
        assert_eq!(limit.in_flight(), 2);
        raiser.join().unwrap();
        leaver.join().unwrap();
        limit.leave();
        limit.leave();
        assert_all_came_back(&limit, 2);
    });
}

#[test]
fn a_limit_that_is_lowered_while_somebody_leaves_is_kept() {
    loom::model(|| {
        let limit = full(2);
        let waits = limit.line_up().unwrap();
        let leaver = spawn(&limit, |limit| limit.leave());
        limit.set(1, 9);
        leaver.join().unwrap();
        // It was handed over before, or it is not there any more.
        assert!(matches!(limit.in_flight(), 1 | 2));
        assert!(!limit.try_enter());
        let handed_over = limit.in_flight() == 2;
        assert_eq!(
            limit.poll_turn(waits, Waker::noop()).is_ready(),
            handed_over
        );
        limit.leave();
        if !handed_over {
            turn(&limit, waits);
        } else {
            limit.ticket_ends();
        }
        limit.leave();
        assert_all_came_back(&limit, 1);
    });
}

#[test]
fn the_half_is_never_exceeded() {
    of_three_threads(|| {
        let limit = Arc::new(Limit::new(4, 0));
        let others = [(); 2].map(|()| spawn(&limit, |limit| limit.try_enter_half()));
        let mut entered = usize::from(limit.try_enter_half());
        for other in others {
            entered += usize::from(other.join().unwrap());
        }
        assert_eq!(entered, 2, "nor is anybody refused who may enter");
        assert_eq!(limit.in_flight(), 2);
        assert!(limit.try_enter() && limit.try_enter() && !limit.try_enter());
    });
}
