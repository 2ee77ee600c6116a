//! The gate over any sequence of events, against what its history says it should be. Not inside
//! `gate`, which the test `gate_model` compiles with another lock.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::gate::{Admission, BreakerState, Gate, GateSettings, Moment, Progress};

/// Milliseconds.
impl Moment for u64 {
    fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.saturating_sub(earlier))
    }
}

const THRESHOLD: u32 = 2;
const RAMP: u64 = 2_000;
const MEMORY: u64 = 60_000;

fn gate(ramp: u64) -> Gate<u64, usize> {
    Gate::new(GateSettings {
        success_threshold: THRESHOLD,
        ramp: Duration::from_millis(ramp),
        reopening: Duration::from_secs(1),
        factor: 1.5,
        longest_reopening: Duration::from_secs(30),
        memory: Duration::from_millis(MEMORY),
    })
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Open,
    ProbeOk,
    ProbeFailed,
    Readmit,
    Ramped,
    Pass(u64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        2 => Just(Event::Open),
        6 => Just(Event::ProbeOk),
        1 => Just(Event::ProbeFailed),
        4 => Just(Event::Readmit),
        2 => Just(Event::Ramped),
        3 => prop_oneof![Just(1), Just(600), Just(RAMP), Just(MEMORY - 1), Just(MEMORY)]
            .prop_map(Event::Pass),
    ];
    vec(event, 0..80)
}

/// What has happened, and nothing derived from it.
#[derive(Default)]
struct History {
    /// Probes in a row that succeeded while it was shut.
    successes: u32,
    /// When it was readmitted and next ejected: `(None, _)` the first time.
    ejections: Vec<(Option<u64>, u64)>,
    readmitted: Option<u64>,
    cause: Option<usize>,
}

impl History {
    fn penalty(&self) -> Option<Duration> {
        let soon =
            |&&(back, out): &&(Option<u64>, u64)| back.is_some_and(|back| out - back < MEMORY);
        match self.ejections.iter().rev().take_while(soon).count() as i32 {
            0 => None,
            relapses => Some(Duration::from_secs_f64(1.5f64.powi(relapses - 1).min(30.0))),
        }
    }
}

/// The keys' places in a ramp.
const SHARES: [f64; 5] = [0.0, 0.1, 0.3, 0.7, 0.999];

fn admitted(gate: &Gate<u64, usize>, now: u64) -> Vec<Admission> {
    SHARES
        .iter()
        .map(|&share| gate.admits(|| share, now))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn it_is_what_its_history_makes_it(events in events()) {
        use BreakerState::{Closed, HalfOpen, Open, Ramping};
        let gate = gate(RAMP);
        let mut history = History::default();
        let mut now = 0;
        for (index, event) in events.into_iter().enumerate() {
            let before = gate.state();
            let was_shut = matches!(before, Open | HalfOpen);
            let expected = match event {
                Event::Open => {
                    prop_assert_eq!(gate.open(index, now), !was_shut);
                    if was_shut {
                        before
                    } else {
                        history.successes = 0;
                        history.cause = Some(index);
                        history.ejections.push((history.readmitted, now));
                        Open
                    }
                }
                Event::ProbeOk if was_shut => {
                    history.successes += 1;
                    let progress = match history.successes >= THRESHOLD {
                        true => Progress::Enough,
                        false => Progress::More,
                    };
                    prop_assert_eq!(gate.probe_succeeded(), progress);
                    HalfOpen
                }
                Event::ProbeOk => {
                    prop_assert_eq!(gate.probe_succeeded(), Progress::None);
                    before
                }
                Event::ProbeFailed => {
                    gate.probe_failed(index);
                    if was_shut {
                        history.successes = 0;
                        history.cause = Some(index);
                        Open
                    } else {
                        before
                    }
                }
                Event::Readmit => {
                    let enough = was_shut && history.successes >= THRESHOLD;
                    prop_assert_eq!(gate.readmit(now), enough);
                    if enough {
                        history.readmitted = Some(now);
                        Ramping
                    } else {
                        before
                    }
                }
                Event::Ramped => {
                    let back = history.readmitted.is_some_and(|back| now - back >= RAMP);
                    let closes = before == Ramping && back;
                    prop_assert_eq!(gate.ramped(now), closes);
                    if closes { Closed } else { before }
                }
                Event::Pass(time) => {
                    let seen = admitted(&gate, now);
                    now += time;
                    let kept = seen.iter().zip(admitted(&gate, now)).all(|(then, now)| {
                        *then != Admission::Admitted || now == Admission::Admitted
                    });
                    prop_assert!(kept, "a key went back");
                    before
                }
            };
            let state = gate.state();
            prop_assert_eq!(state, expected, "{:?} from {:?}", event, before);
            prop_assert_eq!(gate.is_closed(), state == Closed);
            prop_assert_eq!(gate.is_shut(), matches!(state, Open | HalfOpen));
            prop_assert_eq!(gate.cause(), history.cause);
            prop_assert_eq!(gate.penalty(), history.penalty());
            let admissions = admitted(&gate, now);
            match state {
                Closed => prop_assert!(admissions.iter().all(|&of| of == Admission::Admitted)),
                Open | HalfOpen => prop_assert!(admissions.iter().all(|&of| of == Admission::Refused)),
                Ramping => {
                    let part = (now - history.readmitted.unwrap()) as f64 / RAMP as f64;
                    for (share, admission) in SHARES.into_iter().zip(admissions) {
                        prop_assert_eq!(admission == Admission::Admitted, share < part);
                        prop_assert_ne!(admission, Admission::Refused);
                    }
                }
            }
        }
    }
}

fn relapse(gate: &Gate<u64, usize>, now: u64) {
    for _ in 0..THRESHOLD {
        gate.probe_succeeded();
    }
    assert!(gate.readmit(now));
    assert!(gate.open(0, now));
}

#[test]
fn each_relapse_waits_longer_and_none_too_long() {
    let gate = gate(RAMP);
    assert!(gate.open(0, 0));
    let waits = (0..200).map(|now| {
        let wait = gate.penalty();
        relapse(&gate, now);
        wait.map(|wait| wait.as_millis())
    });
    let waits: Vec<_> = waits.collect();
    assert_eq!(
        waits[..5],
        [None, Some(1_000), Some(1_500), Some(2_250), Some(3_375)]
    );
    assert_eq!(waits[9..11], [Some(25_628), Some(30_000)]);
    assert!(waits[10..].iter().all(|&wait| wait == Some(30_000)));
}

#[test]
fn without_a_ramp_all_keys_are_back_at_once() {
    let gate = gate(0);
    assert!(gate.open(0, 0));
    for _ in 0..THRESHOLD {
        gate.probe_succeeded();
    }
    assert!(gate.readmit(5));
    assert_eq!(gate.admits(|| 0.999, 5), Admission::Admitted);
    assert!(gate.ramped(5));
    assert_eq!(gate.state(), BreakerState::Closed);
}
