//! Leases: whose it is to load a key, asked of memcached, and the wait for others who do.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;

use super::refill::{Behind, refill, removal};
use super::{Away, Cache, Engine, Fill, LOOKUPS, Led, Query, Settled, Terms, out_of_time};
use crate::executor::{after, until};
use crate::read_through::flight::{Outcome, Seen, Source};
use crate::read_through::freshness::{self, Freshness};
use crate::request::LeaseTerms;
use crate::response::{Found, LeaseState, Lookup};
use crate::shutdown::Work;
use crate::telemetry;
use crate::value::{CasToken, Value};

/// What the cache says to who leads a flight.
pub(super) enum Claim {
    /// Somebody has put it there meanwhile.
    Found(Outcome),
    /// It is for us to load it, and to put it back like this.
    Load(Fill),
    /// Another process loads it.
    Elsewhere(CasToken, Away),
}

/// The pauses between looks whether another process has put back what it has the lease on.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);

/// What is more is a point in time to memcached. Of a value that has more left than that, each process
/// loads for itself.
const LONGEST_RECACHE: Duration = Duration::from_secs(60 * 60 * 24 * 30);

impl Engine {
    /// Asks the cache whose it is to load a key.
    pub(super) async fn claim<S: Cache>(&self, query: &Query<S>, led: &Led, by: Instant) -> Claim {
        let wanted = &led.wanted;
        let unleased = |token: Option<CasToken>| {
            let swap = |token| Fill::Swap(token, wanted.away);
            Claim::Load(token.map_or(Fill::Add(wanted.away), swap))
        };
        match wanted.sighting.seen {
            Seen::Failure => return Claim::Load(Fill::Not),
            Seen::Unleased(token) => return unleased(token),
            Seen::Vacancy(_) => {}
        }
        if Instant::now() >= by {
            return Claim::Load(Fill::Not);
        }
        let mut recache = match wanted.early {
            // What has just this left now has less than a second more.
            Some(left) => left + Duration::from_secs(1),
            None => self.grace(wanted.away),
        };
        if wanted.unreadable {
            // Only if it is there still: the lease on its successor would be taken as well.
            let asked = Instant::now();
            match self.ask_lookup(query, &wanted.key, None, by).await {
                Ok(lookup) => match lookup.found {
                    Found::Value { .. } => return self.judge_claim(query, led, asked, lookup),
                    Found::Unreadable => recache = LONGEST_RECACHE,
                    Found::Nothing | Found::Absent { .. } => {}
                },
                Err(_) => return Claim::Load(Fill::Not),
            }
        }
        let terms = LeaseTerms::new(self.settings().lease_duration()).recache(recache);
        let asked = Instant::now();
        match self.ask_lookup(query, &wanted.key, Some(terms), by).await {
            Ok(lookup) => self.judge_claim(query, led, asked, lookup),
            Err(_) => Claim::Load(Fill::Not),
        }
    }

    fn judge_claim<S: Cache>(
        &self,
        query: &Query<S>,
        led: &Led,
        asked: Instant,
        lookup: Lookup,
    ) -> Claim {
        let Lookup {
            found,
            token,
            lease,
            away,
            untimed,
        } = lookup;
        let away = away || untimed;
        let found_there = |value: Option<Value>| {
            Claim::Found(Outcome {
                result: Ok(value),
                source: Source::Cache(asked),
            })
        };
        let key = &led.wanted.key;
        let (value, left) = match (found, token) {
            (Found::Absent { .. }, _) => return found_there(None),
            (Found::Unreadable, None) => return Claim::Load(Fill::Not),
            (Found::Unreadable, Some(token)) => {
                let terms = self.settings().lease_duration();
                if lease != LeaseState::Taken || self.elsewhere.is_overdue(key, token, terms) {
                    return Claim::Load(Fill::Swap(token, away));
                }
                self.elsewhere.note(key, token, terms);
                return Claim::Elsewhere(token, away);
            }
            (Found::Value { value, left }, _) => (value, left),
            // There was no room for a placeholder, or what there is may not be used.
            (Found::Nothing, None) => return Claim::Load(Fill::Not),
            (Found::Nothing, Some(token)) => {
                // Won now, or by who led this flight before.
                let ours = lease == LeaseState::Won || led.seat.lease() == Some(token);
                return match ours {
                    true => self.hold(query, led, token, away),
                    false => Claim::Elsewhere(token, away),
                };
            }
        };
        let Some(token) = token else {
            return found_there(Some(value));
        };
        let overdue = self
            .elsewhere
            .is_overdue(key, token, self.settings().lease_duration());
        // Replaced since it was looked at: the lease was taken for what nobody can read.
        let replaced = led.wanted.unreadable
            && matches!(
                freshness::judge(left, self.grace(away), Duration::ZERO),
                Freshness::Fresh | Freshness::Early
            );
        if replaced {
            return found_there(Some(value));
        }
        if lease == LeaseState::Won || overdue {
            return Claim::Load(Fill::Swap(token, away));
        }
        let age = match freshness::judge(left, self.grace(away), Duration::ZERO) {
            Freshness::Fresh | Freshness::Early => None,
            Freshness::Stale(age) => Some(age),
        };
        if lease == LeaseState::Taken {
            self.elsewhere
                .note(key, token, self.settings().lease_duration());
            let value = match age {
                Some(_) => value.into_stale(),
                None => value,
            };
            return found_there(Some(value));
        }
        match age {
            None => found_there(Some(value)),
            // To the server it has a moment left.
            Some(_) => Claim::Load(Fill::Swap(token, away)),
        }
    }

    /// The placeholder of a lease is ours. Unless it is used, it is removed, so that others need not
    /// wait for it to expire.
    fn hold<S: Cache>(&self, query: &Query<S>, led: &Led, token: CasToken, away: Away) -> Claim {
        let (spawner, releases) = (self.means.behind.clone(), self.releases.clone());
        let (query, key) = (query.clone(), led.wanted.key.clone());
        let counted = self.means.tracker.count(Work::Lease);
        led.seat.hold(token, move || {
            let request = refill(removal(key, token));
            // If it is not, it expires.
            if let Some(place) = releases.try_enter() {
                Behind::new(spawner, place, counted).spawn(async move {
                    let _ = query.put(request).await;
                });
            }
        });
        Claim::Load(Fill::Swap(token, away))
    }

    /// Waits until other processes have put back what they have the leases on. What they have not
    /// after a while is for us to load.
    pub(super) async fn wait_for_others<S: Cache>(
        &self,
        query: &Query<S>,
        mut waiting: Vec<(Led, CasToken, Away)>,
        terms: Terms,
    ) -> (Vec<Settled>, Vec<(Led, Fill)>) {
        let (mut settled, mut ready) = (Vec::new(), Vec::new());
        if waiting.is_empty() {
            return (settled, ready);
        }
        if !terms.patient {
            let falls_back = |(led, ..): (Led, _, _)| led.wanted.conclude(Err(out_of_time()));
            settled.extend(waiting.into_iter().map(falls_back));
            return (settled, ready);
        }
        let patience = self.settings().lease_wait_limit();
        let waits_until = after(Instant::now(), patience).min(terms.ends);
        let mut pause = FIRST_PAUSE;
        while !waiting.is_empty() {
            let now = Instant::now();
            if now >= waits_until {
                break;
            }
            let due = after(now, pause.mul_f64(0.5 + fastrand::f64())).min(waits_until);
            pause = (pause * 2).min(LONGEST_PAUSE);
            let pending = std::future::pending::<()>();
            if until(self.means.spawner.as_ref(), due, pending)
                .await
                .is_err()
            {
                break;
            }
            let by = after(Instant::now(), query.timeout).min(terms.ends);
            let mut claims = Vec::with_capacity(waiting.len());
            for waiting in waiting.chunks(LOOKUPS) {
                let some = waiting.iter().map(|(led, ..)| self.claim(query, led, by));
                claims.extend(join_all(some).await);
            }
            let looked = std::mem::take(&mut waiting).into_iter().zip(claims);
            for ((led, ..), claim) in looked {
                match claim {
                    Claim::Found(outcome) => {
                        telemetry::lease_wait("filled");
                        settled.push(led.settle(outcome));
                    }
                    Claim::Load(fill) => {
                        telemetry::lease_wait("released");
                        ready.push((led, fill));
                    }
                    Claim::Elsewhere(token, away) => waiting.push((led, token, away)),
                }
            }
        }
        for (led, token, away) in waiting {
            telemetry::lease_wait("ended");
            // Should its winner be alive after all, the first of the two to be put back stays. The lease
            // is still the winner's: it is not for us to give up.
            ready.push((led, Fill::Swap(token, away)));
        }
        (settled, ready)
    }
}
