//! A configuration, checked and taken apart for those it concerns.

use std::sync::Arc;

use super::{Config, ExecutorConfig, NodeConfig};
use crate::cluster::{ClusterSettings, GroupRoute, NodeSpec};
use crate::compression::CompressionSettings;
use crate::discovery::Discovery;
use crate::error::{Invalid, not_zero};
use crate::group::GroupSettings;
use crate::node::NodeSettings;
use crate::transport::{PipelinedSettings, Protocol, TlsSettings};

/// More are a mistake.
const MOST_CONNECTIONS: usize = 1_024;
const MOST_THREADS: usize = 1_024;

fn at_most(setting: &str, value: usize, most: usize) -> Result<(), Invalid> {
    match value > most {
        true => Err(Invalid::new(setting, format!("is over {most}"))),
        false => Ok(()),
    }
}

/// Whether this build has that protocol.
pub(super) fn speaks(setting: &str, protocol: Protocol) -> Result<(), Invalid> {
    match protocol {
        Protocol::Classic if !cfg!(feature = "classic") => {
            let why = "needs the feature `classic` of tower-memcached";
            Err(Invalid::new(setting, why))
        }
        _ => Ok(()),
    }
}

fn check_compression(settings: Option<&CompressionSettings>) -> Result<(), Invalid> {
    let checked = settings.map_or(Ok(()), CompressionSettings::validate);
    checked.map_err(|invalid| invalid.under("compression"))
}

#[derive(Debug)]
pub(crate) struct Plan {
    /// `None` if there are none in the configuration.
    pub(crate) nodes: Option<Vec<NodeSpec>>,
    pub(crate) discovery: Option<Discovery>,
    pub(crate) cluster: ClusterSettings,
    pub(crate) node: NodeSettings,
    pub(crate) transport: PipelinedSettings,
    pub(crate) groups: Vec<GroupPlan>,
}

#[derive(Debug)]
pub(crate) struct GroupPlan {
    pub(crate) name: Arc<str>,
    pub(crate) settings: GroupSettings,
    pub(crate) cluster: ClusterSettings,
    /// Of its own; `None` if it has none, or there are none in the configuration.
    pub(crate) nodes: Option<Vec<NodeSpec>>,
}

impl GroupPlan {
    /// How its requests are sent.
    pub(crate) fn route(&self) -> Result<GroupRoute, Invalid> {
        if self.settings.nodes.is_some() && self.nodes.is_none() {
            let setting = format!("groups.{}.nodes", self.name);
            return Err(Invalid::new(setting, "there are no nodes"));
        }
        Ok(GroupRoute {
            name: self.name.clone(),
            settings: self.cluster.clone(),
            nodes: self.nodes.clone(),
        })
    }
}

impl Config {
    /// Checks everything but whether there are nodes.
    pub(crate) fn plan(&self) -> Result<Plan, Invalid> {
        if self.timeout.is_zero() {
            return Err(Invalid::new("timeout", "must not be zero"));
        }
        let attempt_timeout = self.attempt_timeout.min(self.timeout);
        let node = NodeSettings::default()
            .attempt_timeout(attempt_timeout)
            .max_in_flight(self.max_in_flight)
            .adaptive_limit(self.adaptive_limit)
            .breaker(self.breaker.clone())
            .probe(self.probe.clone())
            .journal(self.journal.clone());
        node.validate()?;
        let mut transport = PipelinedSettings::default()
            .attempt_timeout(attempt_timeout)
            .timeouts_to_close(node.timeouts_to_close())
            .connections(self.connections)
            .max_requests(self.max_in_flight)
            .max_value_size(self.max_value_size);
        transport.stall_timeout = self.stall_timeout;
        self.tls.as_ref().map_or(Ok(()), TlsSettings::validate)?;
        let tls_timeout = self.tls.as_ref().and_then(|tls| tls.connect_timeout);
        transport.connect_timeout = tls_timeout.or(self.connect_timeout);
        transport.credentials = self.credentials.clone();
        transport.validate()?;
        let socket = self.socket.validate();
        socket.map_err(|invalid| invalid.under("socket"))?;
        at_most("connections", self.connections, MOST_CONNECTIONS)?;
        not_zero("pool_size", self.pool_size == 0)?;
        at_most("pool_size", self.pool_size as usize, MOST_CONNECTIONS)?;
        speaks("protocol", self.protocol)?;
        for (setting, executor) in [
            ("executor.threads", &self.executor),
            ("load_executor.threads", &self.load_executor),
        ] {
            if let Some(ExecutorConfig::Dedicated { threads, .. }) = executor {
                at_most(setting, *threads, MOST_THREADS)?;
            }
        }
        let cluster = ClusterSettings::default()
            .ring(self.ring.clone())
            .failure_mode(self.failure_mode)
            .failover_ttl(self.failover_ttl)
            .max_attempts(self.max_attempts)
            .retry_budget(self.retry_budget)
            .max_ejection_percent(self.max_ejection_percent)
            .hedged_gets(self.hedged_gets);
        self.check(&cluster)?;
        check_compression(self.compression.as_ref())?;
        let read_through = self.read_through.validate();
        read_through.map_err(|invalid| invalid.under("read_through"))?;
        self.check_database(&self.read_through)
            .map_err(|invalid| invalid.under("read_through"))?;
        for (name, limits) in &self.databases {
            let limits = limits.validate();
            limits.map_err(|invalid| invalid.under(&format!("databases.{name}")))?;
        }
        let groups = self.groups.iter().map(|(name, settings)| {
            let group = self.group(name, settings, &cluster);
            group.map_err(|invalid| invalid.under(&format!("groups.{name}")))
        });
        let discovery = self.discovery.as_ref().map(|discovery| {
            let made = discovery.make();
            made.map_err(|invalid| invalid.under("discovery"))
        });
        Ok(Plan {
            discovery: discovery.transpose()?,
            nodes: match self.nodes.is_empty() {
                true => None,
                false => Some(NodeConfig::specs(&self.nodes)?),
            },
            groups: groups.collect::<Result<_, _>>()?,
            cluster,
            node,
            transport,
        })
    }

    fn check(&self, cluster: &ClusterSettings) -> Result<(), Invalid> {
        if cluster.hedged_gets && self.connections < 2 {
            let why = "need at least two connections to a node";
            return Err(Invalid::new("hedged_gets", why));
        }
        cluster.validate()
    }

    fn check_database(&self, settings: &crate::ReadThroughSettings) -> Result<(), Invalid> {
        match settings.database_name() {
            Some(name) if !self.databases.contains_key(name) => {
                let why = format!("there is no {name:?} among the databases");
                Err(Invalid::new("database", why))
            }
            _ => Ok(()),
        }
    }

    fn group(
        &self,
        name: &str,
        settings: &GroupSettings,
        cluster: &ClusterSettings,
    ) -> Result<GroupPlan, Invalid> {
        settings.validate()?;
        let cluster = settings.route(cluster);
        self.check(&cluster)?;
        check_compression(settings.compression.as_ref())?;
        if let Some(read_through) = &settings.read_through {
            let checked = read_through.validate();
            checked
                .and_then(|()| self.check_database(read_through))
                .map_err(|invalid| invalid.under("read_through"))?;
        }
        let nodes = settings.nodes.as_deref();
        let nodes = nodes.filter(|nodes| !nodes.is_empty());
        let nodes = nodes.map(NodeConfig::specs);
        Ok(GroupPlan {
            name: name.into(),
            settings: settings.clone(),
            cluster,
            nodes: nodes.transpose()?,
        })
    }

    /// Whether a client of this configuration can become one of `next` while it runs.
    pub(crate) fn can_become(&self, next: &Self) -> Result<(), Invalid> {
        let stays = |setting: &str, same: bool| match same {
            true => Ok(()),
            false => {
                let why = "cannot be changed while the client runs: build another one";
                Err(Invalid::new(setting, why))
            }
        };
        stays("executor", self.executor == next.executor)?;
        stays("load_executor", self.load_executor == next.load_executor)?;
        stays("discovery", self.discovery == next.discovery)?;
        stays("ring", self.ring == next.ring)?;
        stays("socket", self.socket == next.socket)?;
        stays("tls", self.tls == next.tls)?;
        stays("connections", self.connections == next.connections)?;
        stays("pool_size", self.pool_size == next.pool_size)?;
        stays("protocol", self.protocol == next.protocol)?;
        let same_size = self.max_value_size == next.max_value_size;
        stays("max_value_size", same_size)?;
        let same_capacity = self.journal.same_capacity(&next.journal);
        stays("journal.capacity", same_capacity)?;
        stays("databases", self.databases.keys().eq(next.databases.keys()))?;
        stays("groups", self.groups.keys().eq(next.groups.keys()))?;
        for ((name, before), after) in self.groups.iter().zip(next.groups.values()) {
            let setting = |setting| format!("groups.{name}.{setting}");
            stays(&setting("prefix"), before.prefix == after.prefix)?;
            let same_pool = before.nodes.is_some() == after.nodes.is_some();
            stays(&setting("nodes"), same_pool)?;
        }
        Ok(())
    }
}
