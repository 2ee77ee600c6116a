//! The keeper of a node: the one task that probes it, brings it back, deletes what its journal
//! names, and keeps its metrics.
//!
//! When the node is taken out of the cluster it closes its connections, and ends.
//!
//! It is started with the node, or by the first request where the runtime is not known before, and
//! started again should it ever die. Between its rounds it holds on to nothing, so that a node goes
//! when its last handle does.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures::future::{Either, join_all, select};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::gate::{BreakerState, Progress};
use super::journal::Deletion;
use super::probe::{Asker, CANARY_SIZE, canary, jittered};
use super::{EjectionCause, JournalOverflow, Shared};
use crate::error::{Charge, Error, ErrorKind, Result};
use crate::executor::{LATE, after};
use crate::request::{Operation, Request};
use crate::response::Response;
use crate::telemetry::{Event, REMADE_EVERY};
use crate::transport::Transport;

/// The first probe after opening, the next one after a first success, and the next try to delete
/// what could not be deleted.
const SOON: Duration = Duration::from_millis(100);

/// Gauges are set this often.
const LEVELS_EVERY: Duration = Duration::from_secs(1);

/// Deletions sent at once, at most.
const DELETIONS: usize = 512;

/// How often work that takes long looks whether anybody still wants it.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) fn spawn(shared: &Arc<Shared>) -> Result<()> {
    let running = Running {
        node: Arc::downgrade(shared),
        begun: false,
    };
    let (wake, in_use) = (shared.wake.clone(), shared.in_use.subscribe());
    shared.spawner.spawn(keep(running, wake, in_use))
}

async fn keep(mut running: Running, wake: Arc<Notify>, mut in_use: watch::Receiver<()>) {
    running.begun = true;
    let mut agenda = match running.node.upgrade() {
        Some(shared) => Agenda::new(&shared),
        None => return,
    };
    loop {
        let due = {
            let Some(shared) = running.node.upgrade() else {
                return;
            };
            let used = unless_unused(&shared, agenda.see_to(&shared)).await;
            if shared.is_retired() {
                break;
            }
            if !used {
                return;
            }
            agenda.due(&shared)
        };
        let unused = std::pin::pin!(in_use.changed());
        let woken = std::pin::pin!(wake.notified());
        let due = std::pin::pin!(sleep_until(due));
        let called = select(woken, due);
        if let Either::Left(_) = select(unused, called).await {
            return;
        }
    }
    see_off(&running.node).await;
}

/// Waits until what is under way at a node that was retired has ended, and disconnects it.
async fn see_off(node: &Weak<Shared>) {
    let mut pause = Duration::from_millis(1);
    while let Some(shared) = node.upgrade() {
        if shared.disconnect() {
            return;
        }
        drop(shared);
        sleep(pause).await;
        pause = (pause * 2).min(LOOK_EVERY);
    }
}

/// Does a round of work, unless nobody but us uses the node any more. Says whether it was done.
async fn unless_unused(shared: &Arc<Shared>, work: impl Future<Output = ()>) -> bool {
    let mut work = std::pin::pin!(work);
    loop {
        if shared.is_retired() {
            return false;
        }
        let look = std::pin::pin!(sleep(LOOK_EVERY));
        match select(work.as_mut(), look).await {
            Either::Left(_) => return true,
            Either::Right(_) if Arc::strong_count(shared) == 1 || shared.is_closed() => {
                return false;
            }
            Either::Right(_) => {}
        }
    }
}

/// Says that the keeper is gone, however it went, so that another can be started. Made before the
/// task's first poll: a runtime that is shut down drops what it is given.
struct Running {
    node: Weak<Shared>,
    begun: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(shared) = self.node.upgrade() {
            shared.keeper_ended();
            // It panicked. A task that never began was refused by its runtime, which would refuse
            // the next one as well.
            if self.begun && std::thread::panicking() {
                shared.ensure_kept();
            }
        }
    }
}

/// What is to be done when.
struct Agenda {
    probe_at: Instant,
    delete_at: Instant,
    levels_at: Instant,
    remake_at: Instant,
    /// How often the node had been ejected when this was last looked at.
    ejections: u64,
    /// Probes in a row that failed while the node took requests.
    failures: u32,
}

/// A little earlier, by a twentieth of the wait at most: when other nodes' keepers are up as well. Of many idle nodes
/// it is being woken that costs, not what is done then.
fn on_a_tick(due: Instant, wait: Duration) -> Instant {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    // The waits differ; their ticks must not. One that is longer than all that has passed would be its beginning.
    let longest = Duration::from_secs(60 * 60);
    let tick = (wait / 20)
        .min(longest)
        .as_micros()
        .checked_ilog2()
        .map(|log| 1 << log);
    let passed = due.saturating_duration_since(*BEGINNING.get_or_init(Instant::now));
    let early = tick.map_or(0, |tick: u128| passed.as_micros() % tick);
    due - Duration::from_micros(early as u64)
}

impl Agenda {
    fn new(shared: &Shared) -> Self {
        let now = Instant::now();
        Self {
            probe_at: after(now, shared.settings.load().probe.initial_delay),
            delete_at: now,
            levels_at: now,
            remake_at: after(now, REMADE_EVERY),
            ejections: 0,
            failures: 0,
        }
    }

    /// When there is something to do next, unless somebody calls before.
    fn due(&self, shared: &Shared) -> Instant {
        let mut due = self.probe_at.min(self.levels_at).min(self.remake_at);
        match shared.gate.state() {
            BreakerState::Open | BreakerState::HalfOpen => return due,
            BreakerState::Closed => {}
            // The end of a ramp is seen to in short steps: it is short itself.
            BreakerState::Ramping => due = due.min(after(Instant::now(), SOON)),
        }
        match shared.journal.due(Instant::now()) {
            Some(deletion) => due.min(deletion.max(self.delete_at)),
            None => due,
        }
    }

    async fn see_to(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        if self.remake_at <= now {
            self.remake_at = after(now, REMADE_EVERY);
            shared.meters.remake();
        }
        if self.levels_at <= now {
            self.levels_at = after(now, LEVELS_EVERY);
            shared.show_levels();
        }
        let ejections = shared.ejections();
        if std::mem::replace(&mut self.ejections, ejections) != ejections {
            let wait = shared.gate.penalty().map_or(SOON, jittered);
            self.probe_at = after(now, wait);
            self.failures = 0;
        }
        match shared.gate.state() {
            BreakerState::Open | BreakerState::HalfOpen => {
                if self.probe_at <= now {
                    self.probe_at = after(Instant::now(), self.test(shared).await);
                }
            }
            BreakerState::Closed | BreakerState::Ramping => {
                if shared.gate.ramped(now) {
                    shared.changed();
                }
                if self.delete_at <= now && shared.journal.due(now).is_some_and(|due| due <= now) {
                    match delete_due(shared).await {
                        Ok(_) => {}
                        Err(_) => self.delete_at = after(Instant::now(), SOON),
                    }
                }
                if self.probe_at <= Instant::now() {
                    self.check(shared).await;
                    let wait = shared.settings.load().probe.next();
                    self.probe_at = on_a_tick(after(Instant::now(), wait), wait);
                }
            }
        }
    }

    /// Probes a node that takes requests, over the connections that these use.
    async fn check(&mut self, shared: &Arc<Shared>) {
        match probe(shared, &shared.asker, shared.canary_size).await {
            Probed::Ready => {
                self.failures = 0;
                learn_birth(shared).await;
            }
            Probed::Unknown => {}
            Probed::Failed(error) => {
                self.failures += 1;
                if self.failures >= shared.settings.load().probe.failure_threshold {
                    shared.open(EjectionCause::Probe, &error);
                }
            }
        }
    }

    /// Probes a node that is out, over a fresh connection, and says when to probe it next.
    async fn test(&mut self, shared: &Arc<Shared>) -> Duration {
        let failed = match probe(shared, &shared.fresh_asker(), CANARY_SIZE).await {
            Probed::Failed(error) => Err(error),
            Probed::Unknown => return shared.settings.load().probe.next(),
            Probed::Ready => match shared.gate.probe_succeeded() {
                Progress::None => Ok(()),
                Progress::More => {
                    shared.changed();
                    return SOON;
                }
                Progress::Enough => self.bring_back(shared).await,
            },
        };
        if let Err(error) = failed {
            shared.probe_failed(&error);
        }
        shared.settings.load().probe.next()
    }

    /// Removes from the node what is known to be old, and readmits it.
    async fn bring_back(&mut self, shared: &Arc<Shared>) -> Result<()> {
        // What broke while it was out is to be made anew, at once.
        if let Some(transport) = &shared.transport {
            transport.end_backoff();
        }
        // What enters while this goes on is not used until it has been seen to; but what there is
        // no room for, and a flush, must have been seen to before.
        loop {
            if shared.forgets() || shared.flush_wanted() {
                self.flush(shared).await?;
            }
            if delete_due(shared).await? < at_once(shared) && !shared.owes_a_flush() {
                break;
            }
        }
        shared.readmit();
        shared.book.set_birth(None, 0);
        // In between, when it was still out.
        shared.sees_to_its_debts();
        Ok(())
    }

    /// Empties the node, if somebody has asked for that or we may do so on our own.
    async fn flush(&self, shared: &Arc<Shared>) -> Result<()> {
        let debts = shared.book.flush_begins();
        let allowed = shared.settings.load().journal.overflow == JournalOverflow::Flush;
        if !shared.flush_wanted() && !allowed {
            if !self.restarted(shared).await? {
                return Err(journal_overflowed());
            }
            shared.book.flushed(&debts);
            return Ok(());
        }
        // Until it is acknowledged it is owed: we may be dropped meanwhile, or the book move.
        within(shared, (shared.asker)(Request::new(Operation::FlushAll))).await?;
        shared.book.flushed(&debts);
        Ok(())
    }

    /// Whether the server is another process than before the outage: then it holds nothing old. Where
    /// that one is not known, it has to be younger than what is forgotten.
    async fn restarted(&self, shared: &Arc<Shared>) -> Result<bool> {
        let Some(Process { birth, uptime }) = process(shared).await? else {
            return Ok(false);
        };
        if let Some(before) = shared.book.known_birth() {
            return Ok(before != birth);
        }
        let since = shared.journal.overflowed_since();
        let forgotten = since.map_or(Duration::ZERO, |since| since.elapsed());
        if uptime.saturating_add(CLOCKS) < forgotten {
            return Ok(true);
        }
        // From now on it will be seen.
        let connections = shared.transport.as_ref().map_or(0, Transport::newest);
        shared.book.set_birth(Some(birth), connections);
        Ok(false)
    }
}

/// A server's uptime is in whole seconds, of a clock that ticks once a second.
const CLOCKS: Duration = Duration::from_secs(2);

/// What tells one process of the server from another: its number and when it was started.
pub(super) type Birth = (String, u64);

/// Learns it again whenever another connection has come up, for that may lead to another process.
/// Below something that does not say when it connects it is never known.
async fn learn_birth(shared: &Arc<Shared>) {
    let Some(transport) = &shared.transport else {
        return;
    };
    let connections = transport.newest();
    if shared.book.knows_birth(connections) {
        return;
    }
    let process = process(shared).await.ok().flatten();
    let birth = process.map(|process| process.birth);
    if transport.newest() == connections {
        shared.book.set_birth(birth, connections);
    }
}

struct Process {
    birth: Birth,
    uptime: Duration,
}

/// The one that answers now, if it says.
async fn process(shared: &Arc<Shared>) -> Result<Option<Process>> {
    let stats = within(shared, (shared.asker)(Request::new(Operation::Stats))).await?;
    let Response::Stats(stats) = stats else {
        return Ok(None);
    };
    let number = |name| stats.get(name)?.parse::<u64>().ok();
    let said = || {
        let (time, uptime) = (number("time")?, number("uptime")?);
        Some(Process {
            birth: (stats.get("pid")?.clone(), time.saturating_sub(uptime)),
            uptime: Duration::from_secs(uptime),
        })
    };
    Ok(said())
}

pub(super) fn journal_overflowed() -> Error {
    Error::new(
        ErrorKind::NodeUnavailable,
        "more keys were written while it was out than its journal holds: flush it",
    )
}

async fn within<F>(shared: &Shared, asked: F) -> F::Output
where
    F: Future<Output = Result<Response>>,
{
    match timeout(shared.probe_within(), asked).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::new(ErrorKind::Timeout, "it did not answer in time")),
    }
}

/// What came of a probe.
enum Probed {
    Ready,
    Failed(Error),
    /// We were late, or short of something ourselves.
    Unknown,
}

/// Our own lateness or shortage, or a server that has all the connections it can take.
fn is_ours(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Overloaded => true,
        ErrorKind::ConnectionFailed => error.charge() != Charge::Node,
        _ => error.charge() == Charge::OurLateness,
    }
}

async fn probe(shared: &Arc<Shared>, ask: &Asker, size: usize) -> Probed {
    let (within, began) = (shared.probe_within(), Instant::now());
    let probed = match timeout(within, canary(ask, &shared.canary, size)).await {
        Ok(Ok(())) => Probed::Ready,
        Ok(Err(error)) if is_ours(&error) => Probed::Unknown,
        Ok(Err(error)) => Probed::Failed(error),
        Err(_) if began.elapsed() > within.saturating_add(LATE) => Probed::Unknown,
        Err(_) => Probed::Failed(Error::new(ErrorKind::Timeout, "the probe was not answered")),
    };
    match probed {
        Probed::Ready => shared.meters.count(Event::ProbeSuccess),
        Probed::Failed(_) => shared.meters.count(Event::ProbeFailure),
        Probed::Unknown => {}
    }
    probed
}

/// Not more than there is room for, and connections that others do not need.
pub(super) fn at_once(shared: &Shared) -> usize {
    let transport = shared.transport.as_ref();
    let carried = transport.map_or(usize::MAX, Transport::carries_at_once);
    DELETIONS
        .min(shared.settings.load().max_in_flight / 2)
        .min(carried / 2)
        .max(1)
}

/// Deletes what is due, a round of it, and says how much that was.
async fn delete_due(shared: &Arc<Shared>) -> Result<usize> {
    let deletions = shared.journal.take(at_once(shared), Instant::now());
    delete(shared, &deletions).await?;
    Ok(deletions.len())
}

pub(super) async fn delete(shared: &Arc<Shared>, deletions: &[Deletion]) -> Result<()> {
    let deleting = deletions.iter().map(|deletion| {
        let key = deletion.key.clone();
        within(
            shared,
            (shared.asker)(Request::new(Operation::Delete { key })),
        )
    });
    let mut failure = None;
    for (outcome, deletion) in join_all(deleting).await.into_iter().zip(deletions) {
        match outcome {
            Ok(_) => {
                shared.journal.deleted(deletion, Instant::now());
                shared.meters.count(Event::JournalDeletion);
            }
            Err(error) => {
                shared.journal.put_back(deletion.clone());
                failure = Some(error);
            }
        }
    }
    match failure {
        None => Ok(()),
        Some(error) => Err(error),
    }
}
