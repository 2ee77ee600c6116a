//! The limit over any sequence of events, against a queue and a number. Not inside `limit`, which the
//! test `bulkhead_model` compiles with another lock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Wake, Waker};

use proptest::collection::vec;
use proptest::prelude::*;

use super::limit::Limit;

#[derive(Clone, Copy, Debug)]
enum Event {
    Enter,
    EnterHalf,
    Leave,
    LineUp,
    /// The one at that place among all who have a ticket, if there is one.
    Poll(usize),
    GiveUp(usize),
    Set(usize, usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => Just(Event::Enter),
        2 => Just(Event::EnterHalf),
        5 => Just(Event::Leave),
        6 => Just(Event::LineUp),
        6 => (0_usize..8).prop_map(Event::Poll),
        2 => (0_usize..8).prop_map(Event::GiveUp),
        1 => (0_usize..7, 0_usize..6).prop_map(|(places, queue)| Event::Set(places, queue)),
    ];
    vec(event, 0..120)
}

#[derive(Default)]
struct Bell(AtomicBool);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is so by the rules, in the simplest terms.
struct Model {
    limit: usize,
    max_queue: usize,
    /// Without those on the doorstep.
    inside: usize,
    waiting: VecDeque<u64>,
    /// Those whose turn it is, and who have not noticed yet.
    doorstep: Vec<u64>,
    polled: BTreeMap<u64, Arc<Bell>>,
}

impl Model {
    fn used(&self) -> usize {
        self.inside + self.doorstep.len()
    }

    fn tickets(&self) -> Vec<u64> {
        let mut tickets: Vec<_> = self.waiting.iter().chain(&self.doorstep).copied().collect();
        tickets.sort_unstable();
        tickets
    }

    fn admit(&mut self) {
        while self.used() < self.limit
            && let Some(first) = self.waiting.pop_front()
        {
            self.doorstep.push(first);
        }
    }

    fn enters(&mut self, below: usize) -> bool {
        let enters = self.waiting.is_empty() && self.used() < below;
        self.inside += usize::from(enters);
        enters
    }
}

fn run(limit: usize, max_queue: usize, events: Vec<Event>) {
    let real = Limit::new(limit, max_queue);
    let mut model = Model {
        limit,
        max_queue,
        inside: 0,
        waiting: VecDeque::new(),
        doorstep: Vec::new(),
        polled: BTreeMap::new(),
    };
    for event in events {
        match event {
            Event::Enter => assert_eq!(real.try_enter(), model.enters(model.limit)),
            Event::EnterHalf => {
                let half = (model.limit / 2).max(1).min(model.limit);
                assert_eq!(real.try_enter_half(), model.enters(half));
            }
            Event::Leave if model.inside == 0 => {}
            Event::Leave => {
                real.leave();
                model.inside -= 1;
            }
            Event::LineUp => {
                let ticket = real.line_up();
                let may = model.tickets().len() < model.max_queue;
                assert_eq!(ticket.is_some(), may);
                model.waiting.extend(ticket);
            }
            Event::Poll(place) => {
                let Some(&number) = model.tickets().get(place) else {
                    continue;
                };
                let bell = Arc::new(Bell::default());
                let polled = real.poll_turn(number, &Waker::from(bell.clone()));
                assert_eq!(polled.is_ready(), model.doorstep.contains(&number));
                if polled.is_ready() {
                    real.ticket_ends();
                    model.doorstep.retain(|other| *other != number);
                    model.inside += 1;
                } else {
                    // The one before is not told any more.
                    model.polled.insert(number, bell);
                }
            }
            Event::GiveUp(place) => {
                let Some(&number) = model.tickets().get(place) else {
                    continue;
                };
                real.give_up(number);
                real.ticket_ends();
                model.waiting.retain(|other| *other != number);
                model.doorstep.retain(|other| *other != number);
            }
            Event::Set(limit, max_queue) => {
                real.set(limit, max_queue);
                (model.limit, model.max_queue) = (limit, max_queue);
            }
        }
        model.admit();
        assert_eq!(real.in_flight(), model.used());
        assert_eq!(real.queued(), model.tickets().len());
        for (number, bell) in &model.polled {
            let rung = bell.0.load(Ordering::Relaxed);
            let waits = model.waiting.contains(number);
            assert!(
                !(rung && waits),
                "{number} was called before its turn: {event:?}"
            );
            assert!(
                rung || !model.doorstep.contains(number),
                "{number} was not called: {event:?}"
            );
        }
    }
    // Whatever has happened, all places come back.
    for number in model.tickets() {
        real.give_up(number);
        real.ticket_ends();
    }
    for _ in 0..model.inside {
        real.leave();
    }
    assert_eq!((real.in_flight(), real.queued()), (0, 0));
    let entered = (0..model.limit + 1).filter(|_| real.try_enter()).count();
    assert_eq!(entered, model.limit);
}

proptest! {
    #[test]
    fn it_does_what_a_queue_and_a_number_would(
        limit in 0_usize..7,
        max_queue in 0_usize..6,
        events in events(),
    ) {
        run(limit, max_queue, events);
    }
}

#[test]
fn limits_without_bounds_are_no_trouble() {
    let limit = Limit::new(usize::MAX, usize::MAX);
    assert!(limit.try_enter() && limit.try_enter_half());
    let number = limit.line_up().unwrap();
    assert_eq!(limit.poll_turn(number, Waker::noop()), Poll::Ready(()));
    limit.ticket_ends();
    limit.set(3, 0);
    assert!(!limit.try_enter() && limit.line_up().is_none());
    limit.set(usize::MAX, 0);
    assert!(limit.try_enter());
    assert_eq!((limit.in_flight(), limit.queued()), (4, 0));
}

#[test]
fn half_of_one_place_is_one_and_half_of_none_is_none() {
    for (places, half) in [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)] {
        let limit = Limit::new(places, 0);
        let entered = (0..10).filter(|_| limit.try_enter_half()).count();
        assert_eq!(entered, half, "of {places}");
        let rest = (0..10).filter(|_| limit.try_enter()).count();
        assert_eq!(rest, places - half, "of {places}");
    }
}
