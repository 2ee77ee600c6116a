//! Random faults against random calls: whatever the order, no read is older than what was acknowledged
//! before it began. `SEED=n` repeats a run's calls, though not its timing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerSettings, FailureMode, NodeSpec, Outcome, ProbeSettings, Protocol, Ttl,
};

use crate::support::{patient, servers};

/// How long a storm lasts.
const SECONDS: u64 = 8;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) fn seed() -> u64 {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(another);
    println!("SEED={seed}");
    seed
}

/// Another one each time.
fn another() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() >> 1
}

/// One writer a key, versions that only grow, random faults: no read older than what was
/// acknowledged before it began.
async fn storm(mode: FailureMode, connections: usize, drops: bool, nodes: usize, seed: u64) {
    stormy(mode, connections, drops, nodes, false, seed).await;
}

/// The same, and whether nodes come, go and get other weights meanwhile, too.
async fn stormy(
    mode: FailureMode,
    connections: usize,
    drops: bool,
    nodes: usize,
    changing: bool,
    seed: u64,
) {
    let of_this = (mode, connections, drops, nodes, changing);
    stormy_in(Protocol::Auto, of_this, seed).await;
}

/// The same in a protocol.
async fn stormy_in(
    protocol: Protocol,
    (mode, connections, drops, nodes, changing): (FailureMode, usize, bool, usize, bool),
    seed: u64,
) {
    let servers = servers(nodes).await;
    let client = patient(&servers)
        .protocol(protocol)
        .pool_size(4)
        .failure_mode(mode)
        .connections(connections)
        .max_ejection_percent(100)
        .attempt_timeout(ms(40))
        .timeout(ms(150))
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(200))
                .ramp(ms(600)),
        )
        .probe(ProbeSettings::default().period(ms(100)))
        .build()
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..40)
        .map(|task| {
            let (client, stop) = (client.clone(), stop.clone());
            let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + task * 7919 + 1;
            let mut next = move |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            tokio::spawn(async move {
                let key = format!("storm-{task}");
                let (mut version, mut acknowledged) = (0u64, 0u64);
                let mut log: Vec<String> = Vec::new();
                let began = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let at = began.elapsed().as_millis();
                    match next(10) {
                        0..=2 => {
                            version += 1;
                            let write = client.set(&key, version.to_string(), Ttl::NEVER);
                            let outcome = if drops && next(3) == 0 {
                                timeout(ms(next(5)), write).await
                            } else {
                                Ok(write.await)
                            };
                            log.push(format!(
                                "{at} set {version}: {:?}",
                                outcome.as_ref().map(|o| o.as_ref().map_err(|e| e.kind()))
                            ));
                            if let Ok(Ok(())) = outcome {
                                acknowledged = version;
                            }
                        }
                        3 => {
                            version += 1;
                            let outcome = client.delete(&key).await;
                            log.push(format!(
                                "{at} delete {version}: {:?}",
                                outcome.as_ref().map_err(|e| e.kind())
                            ));
                            if outcome.is_ok() {
                                acknowledged = version;
                            }
                        }
                        4 => {
                            version += 1;
                            let outcome =
                                client.replace(&key, version.to_string(), Ttl::NEVER).await;
                            log.push(format!(
                                "{at} replace {version}: {:?}",
                                outcome.as_ref().map_err(|e| e.kind())
                            ));
                            if let Ok(true) = outcome {
                                acknowledged = version;
                            }
                        }
                        5 => {
                            version += 1;
                            let outcome = client.add(&key, version.to_string(), Ttl::NEVER).await;
                            log.push(format!(
                                "{at} add {version}: {:?}",
                                outcome.as_ref().map_err(|e| e.kind())
                            ));
                            if let Ok(true) = outcome {
                                acknowledged = version;
                            }
                        }
                        6 => {
                            let outcome = client.touch(&key, Ttl::secs(100)).await;
                            log.push(format!(
                                "{at} touch: {:?}",
                                outcome.as_ref().map_err(|e| e.kind())
                            ));
                        }
                        _ => {}
                    }
                    let at = began.elapsed().as_millis();
                    let read = match next(3) {
                        0 => client.get(&key).await,
                        1 => match client.get_many([&key]).await.outcomes()[0].clone() {
                            Outcome::Hit(value) => Ok(Some(value)),
                            Outcome::Miss => Ok(None),
                            Outcome::Error(error) => Err(error),
                        },
                        _ => client.get_and_touch(&key, Ttl::secs(100)).await,
                    };
                    if let Ok(Some(value)) = read {
                        let read: u64 = std::str::from_utf8(&value).unwrap().parse().unwrap();
                        log.push(format!("{at} read {read}"));
                        if read < acknowledged {
                            let last = log.len().saturating_sub(30);
                            panic!(
                                "{key}: read {read}, acknowledged {acknowledged}: {:#?} {:#?}",
                                &log[last..],
                                client
                                    .nodes()
                                    .iter()
                                    .map(|n| (n.node.clone(), n.state, n.journal))
                                    .collect::<Vec<_>>()
                            );
                        }
                    } else {
                        log.push(format!("{at} read: {:?}", read.map_err(|e| e.kind())));
                    }
                    if next(4) == 0 {
                        sleep(ms(next(8))).await;
                    } else {
                        tokio::task::yield_now().await;
                    }
                }
            })
        })
        .collect();
    let mut random = seed + 17;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let until = Instant::now() + Duration::from_secs(SECONDS);
    while Instant::now() < until && tasks.iter().all(|task| !task.is_finished()) {
        let server = &servers[next(nodes as u64) as usize];
        if changing {
            // Two changes between two looks at the faults: what is taken away comes back at once, too.
            for _ in 0..1 + next(2) {
                client.set_node_specs(some_of(&servers, &mut next)).unwrap();
                sleep(ms(next(4) * next(20))).await;
            }
        }
        match next(8) {
            0 | 1 => server.stall(),
            2 => server.resume(),
            3 => server.refuse(),
            4 => server.close_connections(),
            5 => server.delay(ms(next(60))),
            _ => {
                server.resume();
                server.heal().unwrap();
            }
        }
        sleep(ms(next(300))).await;
    }
    stop.store(true, Ordering::Relaxed);
    for server in &servers {
        server.resume();
        server.heal().unwrap();
    }
    for task in tasks {
        timeout(ms(20_000), task).await.expect("a hang").unwrap();
    }
}

/// Each with one chance in two, in any order, with any weight up to 3; at least one.
fn some_of(servers: &[Server], next: &mut impl FnMut(u64) -> u64) -> Vec<NodeSpec> {
    let mut specs = Vec::new();
    let first = next(servers.len() as u64) as usize;
    for place in (first..servers.len()).chain(0..first) {
        if specs.is_empty() || next(2) == 0 {
            let address = servers[place].address().unwrap().to_string();
            let spec = NodeSpec::new(&address).unwrap();
            let weight = if next(3) == 0 { 1 + next(3) } else { 1 };
            specs.push(spec.with_weight(weight as u32));
        }
    }
    specs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_while_nodes_come_and_go() {
    stormy(FailureMode::Redistribute, 1, true, 4, true, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_over_several_connections_while_nodes_come_and_go() {
    stormy(FailureMode::Redistribute, 3, true, 3, true, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_with_retry_while_nodes_come_and_go() {
    stormy(FailureMode::Retry, 1, true, 3, true, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_with_redistribution() {
    storm(FailureMode::Redistribute, 1, false, 4, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_over_several_connections() {
    storm(FailureMode::Redistribute, 3, true, 3, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_with_callers_that_leave() {
    storm(FailureMode::Redistribute, 1, true, 4, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_with_cancel() {
    storm(FailureMode::Cancel, 1, true, 2, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_with_retry() {
    storm(FailureMode::Retry, 1, false, 2, seed()).await;
}

#[cfg(feature = "classic")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_in_the_classic_protocol() {
    let of_this = (FailureMode::Redistribute, 1, true, 3, false);
    stormy_in(Protocol::Classic, of_this, seed()).await;
}

#[cfg(feature = "classic")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_in_the_classic_protocol_with_retry() {
    let of_this = (FailureMode::Retry, 1, true, 2, false);
    stormy_in(Protocol::Classic, of_this, seed()).await;
}

#[cfg(feature = "classic")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_in_the_classic_protocol_while_nodes_come_and_go() {
    let of_this = (FailureMode::Redistribute, 1, true, 4, true);
    stormy_in(Protocol::Classic, of_this, seed()).await;
}
