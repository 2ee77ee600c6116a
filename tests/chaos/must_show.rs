//! The seven faults that one node of three must be able to have without anybody noticing.
//!
//! Each runs under the same load and is judged by the same list (`support/report.rs`): gets answered in time, no errors,
//! no long calls, no wrong values, no stale reads, and all as it was 5 s after the fault has cleared.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tower_memcached::testing::{Flow, Memcached, Proxy, Toxics};

use crate::support::freezer::{self, Frozen, busiest_worker};
use crate::support::incident::{Incident, judged};
use crate::support::netns::{self, FarNode};
use crate::support::report::Report;
use crate::support::{addresses, memcacheds};

#[test]
fn a_stopped_node_is_not_noticed() {
    judged(async || {
        let nodes = memcacheds(3);
        let incident = Incident::begin(&addresses(&nodes)).await;
        let cleared = incident.fault(async |until| {
            nodes[0].stop().unwrap();
            sleep_until(until).await;
            nodes[0].cont().unwrap();
        });
        cleared.await.report("SIGSTOP").await
    });
}

#[test]
fn a_killed_and_restarted_node_is_not_noticed() {
    judged(async || {
        let mut nodes = memcacheds(3);
        let incident = Incident::begin(&addresses(&nodes)).await;
        let cleared = incident.fault(async |until| {
            nodes[0].kill().unwrap();
            sleep_until(until).await;
            nodes[0].restart().unwrap();
        });
        cleared.await.empty().report("SIGKILL and restart").await
    });
}

#[test]
fn a_node_whose_packets_are_dropped_is_not_noticed() {
    if netns::switched_off() {
        return;
    }
    judged(async || {
        let (far, near) = (FarNode::start().await, memcacheds(2));
        let mut nodes = vec![far.address().to_owned()];
        nodes.extend(addresses(&near));
        let cleared = Incident::begin(&nodes).await.fault(async |until| {
            far.black_hole();
            sleep_until(until).await;
            far.heal();
        });
        cleared.await.report("DROP").await
    });
}

#[test]
fn a_node_whose_every_reply_is_300_ms_late_is_not_noticed() {
    let late = Toxics::new().latency(Duration::from_millis(300), Duration::ZERO);
    judged(async || late_replies("+300 ms on every reply", late).await);
}

#[test]
fn a_node_half_of_whose_replies_are_150_ms_late_is_not_noticed() {
    let late = Toxics::new().late_every(2, Duration::from_millis(150));
    judged(async || late_replies("half of the replies 150 ms late", late).await);
}

async fn late_replies(name: &'static str, late: Toxics) -> Report {
    let nodes = memcacheds(3);
    let proxy = Proxy::listen(nodes[0].socket_address()).await.unwrap();
    let mut addresses = addresses(&nodes);
    addresses[0] = proxy.address().to_string();
    let incident = Incident::begin(&addresses).await;
    let cleared = incident.fault(async |until| {
        proxy.set(Flow::Downstream, late);
        sleep_until(until).await;
        proxy.heal().unwrap();
    });
    cleared.await.report(name).await
}

#[test]
fn a_node_that_flaps_each_second_is_not_noticed() {
    judged(async || {
        let nodes = memcacheds(3);
        let incident = Incident::begin(&addresses(&nodes)).await;
        let cleared = incident.fault(async |until| {
            let second = Duration::from_secs(1);
            let mut next = until - Duration::from_secs(15);
            while next < until {
                nodes[0].stop().unwrap();
                sleep_until(next + second).await;
                nodes[0].cont().unwrap();
                next += 2 * second;
                sleep_until(next.min(until)).await;
            }
        });
        cleared.await.flapped().report("flapping each second").await
    });
}

#[test]
fn a_node_with_one_frozen_worker_thread_is_not_noticed() {
    if freezer::switched_off() {
        return;
    }
    judged(async || {
        let nodes = memcacheds(3);
        let incident = Incident::begin(&addresses(&nodes)).await;
        let cleared = incident.fault(async |until| {
            // The one that has the client's connection.
            let worker = worker_under_load(&nodes[0]).await;
            let frozen = Frozen::thread(worker);
            sleep_until(until).await;
            drop(frozen);
        });
        cleared.await.report("one worker thread frozen").await
    });
}

/// The worker that the load keeps busy.
async fn worker_under_load(node: &Memcached) -> i32 {
    let a_while = Instant::now() + Duration::from_millis(200);
    busiest_worker(node, sleep_until(a_while)).await
}
