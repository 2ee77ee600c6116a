//! How many loads may start each second: governor's cells, on tokio's clock, one taker at a time.
//!
//! A cell is taken immediately before the load starts. One that were taken earlier, and kept while
//! its load waits for something else, would let all that was kept start at once.

use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::error::Result;
use crate::executor::{Spawner, timer, until};

type Limiter = RateLimiter<NotKeyed, InMemoryState, SinceFirstUse, NoOpMiddleware<Nanos>>;

/// The cells of one guard.
#[derive(Debug)]
pub(super) struct Rate {
    quota: Quota,
    /// Made at the first load, which may be in another runtime, with another clock, than the one
    /// in which the guard was made.
    limiter: OnceLock<Limiter>,
    /// Whoever waits for a cell holds it, so that not everybody wakes up for each. It is fair.
    turnstile: Mutex<Turnstile>,
}

/// Whether a cell was taken that no load has started with: that one was not let go on by something
/// else, or its caller left. Who comes next has it.
#[derive(Debug, Default)]
enum Turnstile {
    #[default]
    Empty,
    CellTaken,
}

impl Rate {
    pub(super) fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        // Rounded up, so that it is never more than was asked for.
        let interval = 1_000_000_000_u32.div_ceil(per_second.get());
        let interval = Duration::from_nanos(u64::from(interval));
        let quota = Quota::with_period(interval).unwrap_or(Quota::per_second(per_second));
        Self {
            quota: quota.allow_burst(burst),
            limiter: OnceLock::new(),
            turnstile: Mutex::default(),
        }
    }

    /// A cell, if there is one now and nobody waits for it.
    pub(super) fn try_cell(&self) -> Option<Cell<'_>> {
        let mut cell = Cell(self.turnstile.try_lock().ok()?);
        cell.take(self.limiter()).ok()?;
        Some(cell)
    }

    /// Waits for a cell; `None` if there was none by `moment`, or as soon as it is known that
    /// there will not be.
    ///
    /// # Errors
    /// There is no runtime for a timer.
    ///
    /// # Cancel safety
    /// Dropping the future takes no cell.
    pub(super) async fn cell(
        &self,
        moment: Instant,
        spawner: Option<&Spawner>,
    ) -> Result<Option<Cell<'_>>> {
        let turn = until(spawner, moment, self.turnstile.lock()).await?;
        let Some(turn) = turn else {
            return Ok(None);
        };
        let mut cell = Cell(turn);
        while let Err(earliest) = cell.take(self.limiter()) {
            if earliest > moment {
                return Ok(None);
            }
            timer(spawner, earliest)?.await;
        }
        Ok(Some(cell))
    }

    fn limiter(&self) -> &Limiter {
        self.limiter
            .get_or_init(|| Limiter::direct_with_clock(self.quota, SinceFirstUse(Instant::now())))
    }
}

/// A cell, and the turnstile until the load starts: whoever has a cell and waits for one of the
/// database's is the only one of its group who does.
#[derive(Debug)]
pub(super) struct Cell<'a>(MutexGuard<'a, Turnstile>);

impl Cell<'_> {
    fn take(&mut self, limiter: &Limiter) -> Result<(), Instant> {
        if let Turnstile::Empty = *self.0 {
            limiter.check().map_err(|not_until| {
                let earliest = Duration::from(not_until.earliest_possible());
                limiter.clock().0 + earliest
            })?;
            *self.0 = Turnstile::CellTaken;
        }
        Ok(())
    }

    /// The load starts now.
    pub(super) fn start(mut self) {
        *self.0 = Turnstile::Empty;
    }
}

/// tokio's clock, which tests can pause. Time before the anchor is the anchor: subtraction of
/// tokio's instants saturates.
#[derive(Debug)]
struct SinceFirstUse(Instant);

impl Clock for SinceFirstUse {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Instant::now().saturating_duration_since(self.0).into()
    }
}
