//! What of a client can be changed while it runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, TryLockError};

use arc_swap::ArcSwap;

use crate::cluster::{Cluster, Control};
use crate::config::{Config, Plan};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::AtomicDuration;
use crate::group;
use crate::node::NodeSettings;
use crate::read_through::{Engine, LoadGuard, LoadLimits, ReadThroughSettings};
use crate::transport::PipelinedSettings;

/// A functional group that was declared in the builder.
pub(super) struct Declared {
    pub(super) name: Arc<str>,
    pub(super) group: Arc<group::Shared>,
    pub(super) reads: Arc<Engine>,
    pub(super) cluster: Arc<dyn Control>,
}

impl Declared {
    pub(super) fn is(&self, name: &str) -> bool {
        *self.name == *name
    }

    /// The same behind a layer.
    pub(super) fn again(&self) -> Self {
        Self {
            name: self.name.clone(),
            group: self.group.clone(),
            reads: self.reads.again(),
            cluster: self.cluster.clone(),
        }
    }
}

/// The databases that were declared, by their names.
pub(super) struct Guards(BTreeMap<String, LoadGuard>);

impl Guards {
    pub(super) fn new(databases: &BTreeMap<String, LoadLimits>) -> Result<Self> {
        let guard = |(name, limits): (&String, &LoadLimits)| {
            let guard = LoadGuard::new(name.as_str(), limits.clone())?;
            Ok((name.clone(), guard))
        };
        Ok(Self(databases.iter().map(guard).collect::<Result<_>>()?))
    }

    /// With the guard of the database that they name.
    pub(super) fn resolve(&self, settings: &ReadThroughSettings) -> ReadThroughSettings {
        let guard = settings.database_name().and_then(|name| self.0.get(name));
        match guard {
            Some(guard) => settings.clone().guard(guard.clone()),
            None => settings.clone(),
        }
    }
}

/// What a client can do with what it is made of, whatever its nodes are.
pub(super) trait Reconfigure: Send + Sync {
    fn reconfigure(&self, config: Config) -> Result<()>;
    fn load_guard(&self, name: &str) -> Option<LoadGuard>;
}

/// Settings of nodes, for those that come later as well.
pub(super) type NodesSettings = Arc<ArcSwap<(NodeSettings, PipelinedSettings)>>;

/// All that settings go to.
pub(super) struct Live<S> {
    /// That in force.
    pub(super) config: Mutex<Config>,
    pub(super) cluster: Cluster<S>,
    pub(super) nodes: NodesSettings,
    pub(super) timeout: Arc<AtomicDuration>,
    pub(super) reads: Arc<Engine>,
    /// In the order of their names, which is that of the configuration.
    pub(super) groups: Vec<(Arc<group::Shared>, Arc<Engine>)>,
    pub(super) guards: Guards,
}

impl<S: Clone + Send + Sync> Reconfigure for Live<S> {
    fn reconfigure(&self, next: Config) -> Result<()> {
        // Whoever is woken by a change may want another one.
        let mut config = match self.config.try_lock() {
            Ok(config) => config,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let message = "the client is being reconfigured by somebody else";
                return Err(Error::new(ErrorKind::Overloaded, message));
            }
        };
        let plan = next.plan()?;
        config.can_become(&next)?;
        self.apply(&next, plan)?;
        *config = next;
        Ok(())
    }

    fn load_guard(&self, name: &str) -> Option<LoadGuard> {
        self.guards.0.get(name).cloned()
    }
}

impl<S: Clone> Live<S> {
    /// Nothing of it can fail any more but for a client that is being shut down.
    fn apply(&self, next: &Config, plan: Plan) -> Result<()> {
        let own = plan.groups.iter().map(|group| group.nodes.clone());
        // Where they are found, those in the configuration are only the first.
        let nodes = plan.nodes.filter(|_| plan.discovery.is_none());
        self.cluster.set_all_nodes(nodes, own.collect())?;
        for (name, limits) in &next.databases {
            if let Some(guard) = self.guards.0.get(name) {
                guard.set_limits(limits.clone())?;
            }
        }
        // Before they are applied to the nodes there are, so that nobody misses them.
        let settings = (plan.node.clone(), plan.transport.clone());
        self.nodes.store(Arc::new(settings));
        self.cluster.apply_to_nodes(&plan.node, &plan.transport);
        let routes = plan.groups.iter().map(|group| group.cluster.clone());
        self.cluster.apply(plan.cluster, routes.collect());
        self.timeout.set(next.timeout);
        let reads = self.guards.resolve(&next.read_through);
        self.reads.apply(reads.clone());
        self.reads.compression().set(next.compression.as_ref());
        for ((group, engine), plan) in self.groups.iter().zip(&plan.groups) {
            group.apply(&plan.settings);
            let own = plan.settings.read_through.as_ref();
            let own = own.map_or_else(|| reads.clone(), |own| self.guards.resolve(own));
            engine.apply(own.guarded_by(|| self.reads.guard()));
            let compression = plan.settings.compression.as_ref();
            let compression = compression.or(next.compression.as_ref());
            engine.compression().set(compression);
        }
        self.cluster.kill_switch().set(next.killed);
        Ok(())
    }
}
