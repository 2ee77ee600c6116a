//! When a source is asked.

use std::time::Duration;

use futures::future::{Either, select};
use futures::stream::{Stream, unfold};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Found, Looks, Refresh};
use crate::error::{Error, ErrorKind};
use crate::executor::after;

/// From one look to the next, at least; and the first step of those that follow a failure, or a request
/// to look.
const SOON: Duration = Duration::from_secs(1);

/// What a source says, again and again.
pub(super) fn poll(
    looks: Looks,
    period: Duration,
    timeout: Duration,
    refresh: Refresh,
) -> impl Stream<Item = Found> + Send {
    let polled = Polled {
        looks,
        period,
        timeout,
        refresh,
        looked: None,
        step: None,
    };
    unfold(polled, |mut polled| async move {
        polled.wait().await;
        let found = polled.look().await;
        Some((found, polled))
    })
}

struct Polled {
    looks: Looks,
    period: Duration,
    timeout: Duration,
    refresh: Refresh,
    /// When the last look began.
    looked: Option<Instant>,
    /// The wait before the next look, where that is to come sooner than the period; doubled each time.
    step: Option<Duration>,
}

impl Polled {
    /// Until it is time for the next look.
    async fn wait(&mut self) {
        let Some(looked) = self.looked else { return };
        let pause = self.pause().as_secs_f64() * (0.9 + 0.2 * fastrand::f64());
        // A period of `Duration::MAX` is one that does not end.
        let pause = Duration::try_from_secs_f64(pause).unwrap_or(Duration::MAX);
        let over = std::pin::pin!(sleep(pause));
        let requested = std::pin::pin!(self.refresh.requested());
        if let Either::Right(_) = select(over, requested).await {
            self.step = Some(SOON);
            sleep_until(after(looked, SOON.min(self.period))).await;
        }
    }

    fn pause(&mut self) -> Duration {
        match &mut self.step {
            Some(step) if *step < self.period => {
                let pause = *step;
                *step *= 2;
                pause
            }
            _ => self.period,
        }
    }

    async fn look(&mut self) -> Found {
        self.looked = Some(Instant::now());
        let found = match timeout(self.timeout, self.looks.look()).await {
            Ok(found) => found,
            Err(_elapsed) => {
                let message = format!("discovery was not answered within {:?}", self.timeout);
                Err(Error::new(ErrorKind::Timeout, message))
            }
        };
        // What is not there yet is looked for as what has failed is.
        match found.as_ref().map_or(true, Vec::is_empty) {
            true => {
                self.step.get_or_insert(SOON);
            }
            false => self.step = self.step.filter(|step| *step < self.period),
        }
        found
    }
}
