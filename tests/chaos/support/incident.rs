//! One incident: 3 s of health, 15 s of a fault, 5 s to recover, 2 s that must be as the first three, and a look at
//! every key.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tower_memcached::{Client, Key, NodeSpec, Ring, Ttl};

use super::lateness::Watch;
use super::load::{Load, Records};
use super::raw;
use super::report::{RECOVERY, Report, Transition};
use super::{alone, store_patiently, until_closed};

const HEALTHY: Duration = Duration::from_secs(3);
const FAULT: Duration = Duration::from_secs(15);
const AFTER: Duration = Duration::from_secs(2);
/// How often a run is made again when the machine, as measured, did too little for it to say anything.
const RUNS: u32 = 3;
/// How many keys are looked for on their own nodes in the end.
const LOOKED_FOR: usize = 100;

/// An incident in its healthy phase.
#[derive(Debug)]
pub(crate) struct Incident {
    client: Client,
    nodes: Vec<String>,
    records: Arc<Records>,
    load: Load,
    watch: Watch,
    observer: Observer,
}

/// An incident whose fault has cleared.
#[derive(Debug)]
pub(crate) struct Cleared {
    incident: Incident,
    fault: Instant,
    cleared: Instant,
    came_back_empty: bool,
    flapped: bool,
}

impl Incident {
    /// A default client of these nodes, all keys stored, and the load running for as long as all is well.
    pub(crate) async fn begin(nodes: &[String]) -> Self {
        let client = Client::builder().nodes(nodes).build().unwrap();
        let records = Arc::new(Records::new());
        records.store_all(&client).await;
        let watch = Watch::start();
        let load = Load::start(client.clone(), records.clone());
        let incident = Self {
            observer: Observer::start(client.clone()),
            nodes: nodes.to_vec(),
            client,
            records,
            load,
            watch,
        };
        tokio::time::sleep_until(incident.fault_at()).await;
        incident
    }

    fn fault_at(&self) -> Instant {
        self.load.start + HEALTHY
    }

    /// Runs the fault, which is told when to end, and must have cleared it when it does.
    pub(crate) async fn fault(self, fault: impl AsyncFnOnce(Instant)) -> Cleared {
        let began = self.fault_at();
        fault(began + FAULT).await;
        Cleared {
            incident: self,
            fault: began,
            cleared: Instant::now(),
            came_back_empty: false,
            flapped: false,
        }
    }
}

impl Cleared {
    /// A node lost what it had: that it misses once.
    pub(crate) fn empty(mut self) -> Self {
        self.came_back_empty = true;
        self
    }

    /// A node failed again and again, and is let in later for that.
    pub(crate) fn flapped(mut self) -> Self {
        self.flapped = true;
        self
    }

    /// Lets the client recover, measures, and reads every key once more.
    pub(crate) async fn report(self, name: &'static str) -> Report {
        let Incident {
            client,
            nodes,
            records,
            load,
            watch,
            observer,
        } = self.incident;
        let start = load.start;
        let end = self.cleared + RECOVERY + AFTER;
        let mut samples = load.end_at(end).await;
        if self.flapped {
            for node in 0..nodes.len() {
                until_closed(&client, node).await;
            }
        }
        samples.extend(records.read_back(&client).await);
        let (astray, stalls) = (astray(&client, &nodes).await, watch.end());
        Report {
            name,
            start,
            fault: self.fault,
            cleared: self.cleared,
            end,
            samples,
            stalls,
            transitions: observer.end(),
            states: client.nodes().iter().map(|node| node.state).collect(),
            came_back_empty: self.came_back_empty,
            flapped: self.flapped,
            astray,
        }
    }
}

/// Sets fresh keys and looks on the servers whether each went to its own node: how many did not.
async fn astray(client: &Client, nodes: &[String]) -> usize {
    let specs: Vec<_> = nodes
        .iter()
        .map(|node| NodeSpec::new(node).unwrap())
        .collect();
    let mut astray = 0;
    for number in 0..LOOKED_FOR {
        let name = format!("home:{number}");
        let key = Key::new(&name).unwrap();
        let home = Ring::default().node_of(&specs, &key).unwrap();
        store_patiently(client, &key, "v", Ttl::NEVER).await;
        let found = raw::get(&nodes[home], &name).await;
        astray += usize::from(found.is_none());
    }
    astray
}

/// Runs a scenario with nothing else beside it, and judges its report.
pub(crate) fn judged(scenario: impl AsyncFn() -> Report) {
    for run in 1..=RUNS {
        let report = alone(scenario());
        let failures = report.failures();
        println!("{report}");
        if failures.is_empty() {
            return;
        }
        let failures = failures.join("\n  ");
        assert!(
            run < RUNS && report.is_disturbed(),
            "{}:\n  {failures}",
            report.name
        );
        println!("run {run} on a machine too busy to judge it, once more:\n  {failures}\n");
    }
}

/// Notes what the breakers do.
#[derive(Debug)]
struct Observer {
    transitions: Arc<Mutex<Vec<Transition>>>,
    task: JoinHandle<()>,
}

impl Observer {
    fn start(client: Client) -> Self {
        let transitions: Arc<Mutex<Vec<Transition>>> = Arc::default();
        let noted = transitions.clone();
        let task = tokio::spawn(async move {
            let mut before: Vec<_> = client.nodes().iter().map(|node| node.state).collect();
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            loop {
                tick.tick().await;
                for (node, status) in client.nodes().into_iter().enumerate() {
                    if before[node] == status.state {
                        continue;
                    }
                    before[node] = status.state;
                    let transition = Transition {
                        at: Instant::now(),
                        node,
                        state: status.state,
                        cause: status.last_cause.map(|cause| cause.to_string()),
                    };
                    noted
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(transition);
                }
            }
        });
        Self { transitions, task }
    }

    fn end(self) -> Vec<Transition> {
        self.task.abort();
        let mut noted = self
            .transitions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *noted)
    }
}
