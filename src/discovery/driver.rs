//! What a client does with the lists that its discovery finds.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::future::{pending, select};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Discovery, Found, Refresh};
use crate::cluster::{Control, NodeSpec, validate};
use crate::error::{Error, ErrorKind};
use crate::executor::after;
use crate::telemetry;
use crate::transport::Connector;

/// From one thing that happens to the next, at least.
const APART: Duration = Duration::from_millis(10);

/// How a client's discovery does: [`Client::discovery`](crate::Client::discovery).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DiscoveryStatus {
    /// When it last found a list of nodes, the same one or another; `None` if it never has.
    pub last_found: Option<SystemTime>,
    /// When the nodes were last changed by it.
    pub last_change: Option<SystemTime>,
    /// Since when it fails, or finds nothing; `None` while it does not. The nodes are those of the last
    /// good list.
    pub failing_since: Option<SystemTime>,
    /// What it failed with for the last time.
    pub last_error: Option<Error>,
    /// How often it has failed.
    pub failures: u64,
    /// Another list has been found, and waits for the
    /// [minimum dwell](Discovery::minimum_dwell).
    pub held_back: bool,
    /// It has ended, or another has taken its place, or the nodes have been set by hand: they stay as
    /// they are.
    pub ended: bool,
}

/// Which discovery a list of nodes follows, if any.
#[derive(Debug)]
pub(crate) struct Following {
    /// Whose nodes they are, for metrics.
    group: Arc<str>,
    /// Counts those that were followed, and the times that the nodes were set by hand: only the last
    /// of these counts.
    turn: watch::Sender<u64>,
    status: Mutex<Option<DiscoveryStatus>>,
}

impl Following {
    pub(crate) fn new(group: Arc<str>) -> Self {
        Self {
            group,
            turn: watch::Sender::new(0),
            status: Mutex::default(),
        }
    }

    /// Whoever was followed before is not any more.
    pub(crate) fn next_turn(&self) -> u64 {
        let mut turn = 0;
        self.turn.send_modify(|now| {
            *now += 1;
            turn = *now;
        });
        self.change(|status| {
            if let Some(status) = status {
                status.ended = true;
                status.held_back = false;
            }
        });
        turn
    }

    pub(crate) fn is_turn_of(&self, turn: u64) -> bool {
        *self.turn.borrow() == turn
    }

    pub(crate) fn status(&self) -> Option<DiscoveryStatus> {
        self.change(|status| status.clone())
    }

    fn change<T>(&self, change: impl FnOnce(&mut Option<DiscoveryStatus>) -> T) -> T {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Something has come of the discovery whose turn it is.
    fn tell<T>(&self, turn: u64, tell: impl FnOnce(&mut DiscoveryStatus) -> T) -> Option<T> {
        self.change(|status| {
            let its_turn = self.is_turn_of(turn);
            its_turn.then(|| tell(status.get_or_insert_default()))
        })
    }
}

/// A client's nodes, or a group's, as long as they are there.
pub(crate) struct Target {
    pub(crate) upgrade: Box<dyn Fn() -> Option<Arc<dyn Control>> + Send + Sync>,
    /// True, or gone, once they are not used any more.
    pub(crate) closing: watch::Receiver<bool>,
    /// Told whenever the state of a node changes.
    pub(crate) changes: watch::Receiver<()>,
    pub(crate) following: Arc<Following>,
}

/// Follows a discovery from now on, instead of any other, until it ends or the client does.
pub(crate) fn drive(
    target: Target,
    discovery: Discovery,
    connector: Arc<dyn Connector>,
) -> impl Future<Output = ()> + Send + 'static {
    let turn = target.following.next_turn();
    let following = &target.following;
    let _before = following.tell(turn, std::mem::take);
    let running = Running {
        following: target.following.clone(),
        turn,
    };
    // Sources are made where they are asked.
    async move {
        let refresh = Refresh::default();
        let (lists, dwell) = discovery.start(connector, &refresh);
        let mut driver = Driver {
            running,
            upgrade: target.upgrade,
            dwell,
            applied: None,
            next: None,
            not_before: Instant::now(),
            unreachable: BTreeSet::new(),
            refresh,
        };
        let mut turns = driver.running.following.turn.subscribe();
        let (mut closing, mut changes) = (target.closing, target.changes);
        let over = async move {
            let closed = pin!(async {
                let _gone = closing.wait_for(|closing| *closing).await;
            });
            let replaced = pin!(async {
                let _gone = turns.wait_for(|now| *now != turn).await;
            });
            select(closed, replaced).await;
        };
        let follow = async move {
            let mut lists = lists.fuse();
            let mut ended = false;
            while driver.step(&mut lists, &mut changes, &mut ended).await {
                // A stream that always has something must not keep the thread to itself.
                sleep(APART).await;
            }
        };
        select(pin!(over), pin!(follow)).await;
    }
}

/// Says that it has ended, however that comes.
struct Running {
    following: Arc<Following>,
    turn: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.following.tell(self.turn, |status| {
            status.ended = true;
            status.held_back = false;
        });
    }
}

struct Driver {
    running: Running,
    upgrade: Box<dyn Fn() -> Option<Arc<dyn Control>> + Send + Sync>,
    dwell: Duration,
    /// The list that was applied last.
    applied: Option<Vec<NodeSpec>>,
    /// The one to be applied when the last has dwelt.
    next: Option<Vec<NodeSpec>>,
    not_before: Instant,
    /// Nodes that are out because they cannot be connected to.
    unreachable: BTreeSet<Arc<str>>,
    refresh: Refresh,
}

enum Event {
    Found(Option<Found>),
    DwellOver,
    NodesChanged(bool),
}

impl Driver {
    /// Sees to the next thing that happens. Says whether there will be more.
    async fn step(
        &mut self,
        lists: &mut (impl futures::stream::FusedStream<Item = Found> + Unpin),
        changes: &mut watch::Receiver<()>,
        ended: &mut bool,
    ) -> bool {
        let event = {
            let due = self.next.is_some().then_some(self.not_before);
            let mut dwelt = pin!(async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => pending().await,
                }
            });
            let mut changed = pin!(changes.changed());
            poll_fn(|cx| {
                if dwelt.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Event::DwellOver);
                }
                // Before the nodes, of which some hundred that are out change all the time: a list is
                // what they wait for.
                if !*ended && let Poll::Ready(found) = lists.poll_next_unpin(cx) {
                    return Poll::Ready(Event::Found(found));
                }
                let changed = changed.as_mut().poll(cx);
                changed.map(|changed| Event::NodesChanged(changed.is_ok()))
            })
            .await
        };
        match event {
            Event::DwellOver => {
                let due = self.next.take();
                if !due.is_none_or(|list| self.apply(list)) {
                    return false;
                }
            }
            Event::NodesChanged(false) => return false,
            Event::NodesChanged(true) => {
                if !self.look_at_nodes() {
                    return false;
                }
            }
            Event::Found(None) => *ended = true,
            Event::Found(Some(found)) => {
                if !self.found(found) {
                    return false;
                }
            }
        }
        !*ended || self.next.is_some()
    }

    fn tell<T>(&self, tell: impl FnOnce(&mut DiscoveryStatus) -> T) -> Option<T> {
        self.running.following.tell(self.running.turn, tell)
    }

    fn found(&mut self, found: Found) -> bool {
        let list = match found {
            Ok(list) if list.is_empty() => {
                let message = "discovery has found no nodes: those there are stay";
                self.failed("empty", Error::new(ErrorKind::Discovery, message));
                return true;
            }
            Ok(list) => list,
            Err(error) => {
                self.failed("error", error);
                return true;
            }
        };
        if let Err(invalid) = validate(&list) {
            self.failed("invalid", invalid.into());
            return true;
        }
        let now = SystemTime::now();
        telemetry::discovery_found(&self.running.following.group, now);
        self.tell(|status| {
            status.last_found = Some(now);
            status.failing_since = None;
        });
        self.take(list)
    }

    fn failed(&self, reason: &'static str, error: Error) {
        telemetry::discovery_failed(&self.running.following.group, reason);
        // The one before may have come from the user: it is dropped outside of the lock.
        let _before = self.tell(|status| {
            status.failures += 1;
            status.failing_since.get_or_insert_with(SystemTime::now);
            status.last_error.replace(error)
        });
    }

    fn take(&mut self, mut list: Vec<NodeSpec>) -> bool {
        // An order is nothing to be changed for: the DNS gives another one each time.
        list.sort_by(|one, other| one.name.cmp(&other.name));
        if self.applied.as_ref() == Some(&list) {
            self.next = None;
        } else if self.applied.is_none() || Instant::now() >= self.not_before {
            self.next = None;
            return self.apply(list);
        } else {
            self.next = Some(list);
        }
        let held_back = self.next.is_some();
        self.tell(|status| status.held_back = held_back);
        true
    }

    fn apply(&mut self, list: Vec<NodeSpec>) -> bool {
        let Some(control) = (self.upgrade)() else {
            return false;
        };
        let changed = match control.set_found(list.clone(), self.running.turn) {
            Ok(changed) => changed,
            // It is being shut down.
            Err(_) => return false,
        };
        drop(control);
        if changed {
            telemetry::discovery_changed(&self.running.following.group);
            self.not_before = after(Instant::now(), self.dwell);
        }
        self.applied = Some(list);
        self.tell(|status| {
            status.held_back = false;
            if changed {
                status.last_change = Some(SystemTime::now());
            }
        });
        true
    }

    /// Asks for another look when a node that could be connected to cannot be any more.
    fn look_at_nodes(&mut self) -> bool {
        let Some(control) = (self.upgrade)() else {
            return false;
        };
        let unreachable = control.unreachable();
        drop(control);
        if !unreachable.is_subset(&self.unreachable) {
            self.refresh.request();
        }
        self.unreachable = unreachable;
        true
    }
}
