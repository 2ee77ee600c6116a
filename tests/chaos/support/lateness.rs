//! How late the machine is, measured beside the load, so that its lateness is not taken for the client's.
//!
//! Two threads that do nothing but sleep for two milliseconds note when they were woken much later, unless this process
//! itself kept a core busy at that time: then it is not the machine's fault, and excuses nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

const TICK: Duration = Duration::from_millis(2);
const NOTED_FROM: Duration = Duration::from_millis(10);
const THREADS: usize = 2;

/// An error is the machine's when the machine stood still for this long during the call: a whole attempt.
pub(crate) const EXCUSES_AN_ERROR: Duration = Duration::from_millis(30);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Stall {
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

#[derive(Debug)]
pub(crate) struct Watch {
    stalls: Arc<Mutex<Vec<Stall>>>,
    over: Arc<AtomicBool>,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let watch = Self {
            stalls: Arc::default(),
            over: Arc::default(),
        };
        for _ in 0..THREADS {
            let (stalls, over) = (watch.stalls.clone(), watch.over.clone());
            std::thread::spawn(move || look(&stalls, &over));
        }
        watch
    }

    pub(crate) fn end(self) -> Stalls {
        let stalls = self.stalls.lock().unwrap_or_else(PoisonError::into_inner);
        Stalls::merged(stalls.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn look(stalls: &Mutex<Vec<Stall>>, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let (before, used) = (Instant::now(), used_by_us());
        pause(TICK);
        let now = Instant::now();
        let late = now.saturating_duration_since(before + TICK);
        if late >= NOTED_FROM && used_by_us().saturating_sub(used) < late / 2 {
            let stall = Stall {
                from: before + TICK,
                to: now,
            };
            stalls
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(stall);
        }
    }
}

/// The processor time of all threads of this process.
fn used_by_us() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .expect("every Linux has this clock")
        .into()
}

#[expect(
    clippy::disallowed_methods,
    reason = "on threads of its own, which must not depend on a runtime"
)]
pub(crate) fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// All stalls of a run, in order, none overlapping another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stalls(Vec<Stall>);

impl Stalls {
    fn merged(mut stalls: Vec<Stall>) -> Self {
        stalls.sort_by_key(|stall| stall.from);
        let mut merged: Vec<Stall> = Vec::new();
        for stall in stalls {
            match merged.last_mut() {
                Some(last) if stall.from <= last.to => last.to = last.to.max(stall.to),
                _ => merged.push(stall),
            }
        }
        Self(merged)
    }

    /// For how long the machine was stalled in this time.
    pub(crate) fn within(&self, from: Instant, to: Instant) -> Duration {
        let first = self.0.partition_point(|stall| stall.to <= from);
        self.0[first..]
            .iter()
            .take_while(|stall| stall.from < to)
            .map(|stall| stall.to.min(to) - stall.from.max(from))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_stalls_count_once() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let stall = |from, to| Stall {
            from: at(from),
            to: at(to),
        };
        let stalls = Stalls::merged(vec![stall(100, 120), stall(10, 30), stall(20, 50)]);
        assert_eq!(stalls.within(at(0), at(200)), Duration::from_millis(60));
        assert_eq!(stalls.within(at(40), at(110)), Duration::from_millis(20));
        assert_eq!(stalls.within(at(50), at(100)), Duration::ZERO);
    }
}
