//! The gate of a node under every interleaving of a few threads, by loom.
//!
//! Only `src/node/gate.rs` is in the model: it is compiled into this test a second time, with loom's
//! lock and atomic in the place of the standard library's.

use std::time::Duration;

use gate::{Admission, BreakerState, Gate, GateSettings, Moment, Progress};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread::{self, JoinHandle};

#[path = "../src/node/gate.rs"]
#[allow(dead_code, unreachable_pub)]
mod gate;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicU8, Ordering};
    pub(super) use loom::sync::{Mutex, MutexGuard};
}

/// Seconds.
impl Moment for u64 {
    fn since(self, earlier: Self) -> Duration {
        Duration::from_secs(self.saturating_sub(earlier))
    }
}

type Shared = Arc<Gate<u64, &'static str>>;

/// Later than any ramp, and soon enough for a relapse.
const LATER: u64 = 10;

fn closed(success_threshold: u32) -> Shared {
    Arc::new(Gate::new(GateSettings {
        success_threshold,
        ramp: Duration::from_secs(2),
        reopening: Duration::from_secs(1),
        factor: 1.5,
        longest_reopening: Duration::from_secs(30),
        memory: Duration::from_secs(60),
    }))
}

fn opened(success_threshold: u32) -> Shared {
    let gate = closed(success_threshold);
    assert!(gate.open("earlier", 0));
    gate
}

fn ramping() -> Shared {
    let gate = opened(1);
    assert_eq!(gate.probe_succeeded(), Progress::Enough);
    assert!(gate.readmit(0));
    gate
}

fn spawn<T: 'static>(gate: &Shared, run: impl FnOnce(&Shared) -> T + 'static) -> JoinHandle<T> {
    let gate = gate.clone();
    thread::spawn(move || run(&gate))
}

fn assert_hint_is_true(gate: &Shared) {
    let state = gate.state();
    assert_eq!(gate.is_closed(), state == BreakerState::Closed);
    let shut = matches!(state, BreakerState::Open | BreakerState::HalfOpen);
    assert_eq!(gate.is_shut(), shut);
    let expected = match state {
        BreakerState::Closed => Admission::Admitted,
        BreakerState::Open | BreakerState::HalfOpen => Admission::Refused,
        BreakerState::Ramping => Admission::Deferred,
    };
    assert_eq!(gate.admits(|| 1.0, 0), expected);
}

#[test]
fn the_hint_agrees_with_the_state_when_all_is_quiet() {
    loom::model(|| {
        let gate = opened(1);
        let keeper = spawn(&gate, |gate| {
            gate.probe_succeeded();
            gate.readmit(LATER)
        });
        let late_probe = spawn(&gate, |gate| gate.probe_failed("probe"));
        gate.open("request", LATER);
        keeper.join().unwrap();
        late_probe.join().unwrap();
        assert_hint_is_true(&gate);
    });
    loom::model(|| {
        let gate = ramping();
        let keeper = spawn(&gate, |gate| gate.ramped(LATER));
        let request = spawn(&gate, |gate| gate.open("request", LATER));
        let seen = gate.admits(|| 1.0, 0);
        let (closed, opened) = (keeper.join().unwrap(), request.join().unwrap());
        assert!(
            opened,
            "neither a ramping nor a closed gate refuses to open"
        );
        assert!(closed || seen != Admission::Admitted);
        assert_eq!(gate.state(), BreakerState::Open);
        assert_hint_is_true(&gate);
    });
}

#[test]
fn of_all_who_open_it_one_has_and_it_counts_once() {
    loom::model(|| {
        let gate = ramping();
        let others = ["a", "b"].map(|cause| spawn(&gate, move |gate| gate.open(cause, LATER)));
        let mut opened = u32::from(gate.open("c", LATER));
        for other in others {
            opened += u32::from(other.join().unwrap());
        }
        assert_eq!(opened, 1);
        assert_eq!(
            gate.penalty(),
            Some(Duration::from_secs(1)),
            "one relapse, not two"
        );
    });
}

#[test]
fn who_has_opened_it_or_heard_of_it_finds_it_shut_until_it_is_readmitted() {
    loom::model(|| {
        let gate = closed(2);
        let told = Arc::new(AtomicBool::new(false));
        let opener = {
            let told = told.clone();
            spawn(&gate, move |gate| {
                gate.open("request", LATER);
                assert!(gate.is_shut());
                told.store(true, Ordering::Release);
            })
        };
        let keeper = spawn(&gate, |gate| {
            gate.probe_succeeded();
            assert!(!gate.readmit(LATER), "one success of two");
        });
        if told.load(Ordering::Acquire) {
            assert!(gate.is_shut());
            assert_eq!(gate.admits(|| 0.0, 99), Admission::Refused);
        }
        opener.join().unwrap();
        keeper.join().unwrap();
        assert_eq!(gate.admits(|| 0.0, 99), Admission::Refused);
    });
}

/// A refused request is told why: that is said before the gate is shut.
#[test]
fn who_finds_it_shut_sees_what_was_said_before() {
    loom::model(|| {
        let gate = closed(1);
        let said = Arc::new(AtomicU32::new(0));
        let opener = {
            let said = said.clone();
            spawn(&gate, move |gate| {
                said.store(1, Ordering::Relaxed);
                gate.open("request", LATER);
            })
        };
        if gate.is_shut() {
            assert_eq!(said.load(Ordering::Relaxed), 1);
        }
        opener.join().unwrap();
    });
}

#[test]
fn a_failure_after_the_last_success_keeps_it_out() {
    loom::model(|| {
        let gate = opened(2);
        gate.probe_succeeded();
        let success = spawn(&gate, |gate| gate.probe_succeeded());
        let failure = spawn(&gate, |gate| gate.probe_failed("probe"));
        let readmitted = gate.readmit(LATER);
        let progress = success.join().unwrap();
        failure.join().unwrap();
        let state = gate.state();
        assert_eq!(readmitted, state == BreakerState::Ramping);
        assert!(!readmitted || progress == Progress::Enough);
        assert!(!gate.readmit(LATER), "it is in, or has one success since");
        assert_hint_is_true(&gate);
    });
}

#[test]
fn successes_before_it_opened_do_not_count() {
    loom::model(|| {
        let gate = closed(2);
        let request = spawn(&gate, |gate| gate.open("request", LATER));
        let keeper = spawn(&gate, |gate| {
            let first = gate.probe_succeeded();
            let second = gate.probe_succeeded();
            (first, second, gate.readmit(LATER))
        });
        let (first, second, readmitted) = keeper.join().unwrap();
        assert!(request.join().unwrap());
        let counted = [first, second] == [Progress::More, Progress::Enough];
        assert_eq!(readmitted, counted, "{first:?}, {second:?}");
        assert_eq!(readmitted, gate.state() == BreakerState::Ramping);
        assert_hint_is_true(&gate);
    });
}

#[test]
fn an_open_that_races_with_a_readmission_is_made_or_was_not_needed() {
    loom::model(|| {
        let gate = opened(1);
        gate.probe_succeeded();
        let request = spawn(&gate, |gate| gate.open("request", LATER));
        let probe = spawn(&gate, |gate| gate.probe_failed("probe"));
        let readmitted = gate.readmit(0);
        let opened = request.join().unwrap();
        probe.join().unwrap();
        assert!(readmitted || !opened, "it was open already");
        let ramping = gate.state() == BreakerState::Ramping;
        assert_eq!(ramping, readmitted && !opened);
        assert_eq!(gate.penalty().is_some(), opened);
        assert_hint_is_true(&gate);
    });
}
