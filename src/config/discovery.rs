//! Where nodes are found, as it is written in a configuration.

use std::path::PathBuf;
use std::time::Duration;

use crate::discovery::Discovery;
use crate::error::{Error, Invalid};
use crate::transport::Address;

/// A [`Discovery`] as data. With the feature `serde`:
///
/// ```toml
/// [discovery]
/// source = { dns = "cache.default.svc.cluster.local:11211" }
/// minimum_dwell = "10s"
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DiscoveryConfig {
    /// What is asked.
    pub source: DiscoverySource,
    /// How often; 30 s by default, 5 s for a file.
    #[cfg_attr(feature = "serde", serde(default, with = "humantime_serde"))]
    pub period: Option<Duration>,
    /// How long it may take to answer; 5 s by default.
    #[cfg_attr(
        feature = "serde",
        serde(default = "five_seconds", with = "humantime_serde")
    )]
    pub timeout: Duration,
    /// How long the nodes stay at least after they have changed; 10 s by default.
    #[cfg_attr(
        feature = "serde",
        serde(default = "ten_seconds", with = "humantime_serde")
    )]
    pub minimum_dwell: Duration,
}

#[cfg(feature = "serde")]
fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

#[cfg(feature = "serde")]
fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

/// What is asked for the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum DiscoverySource {
    /// [`Discovery::dns`]: `name` or `name:port`; the port is 11211 by default.
    Dns(String),
    /// `Discovery::srv`: a name. It needs the feature `srv`.
    Srv(String),
    /// [`Discovery::elasticache`]: the endpoint's address.
    Elasticache(String),
    /// [`Discovery::file`]: its path.
    File(PathBuf),
}

impl DiscoveryConfig {
    /// With the defaults.
    #[must_use]
    pub fn new(source: DiscoverySource) -> Self {
        Self {
            source,
            period: None,
            timeout: Duration::from_secs(5),
            minimum_dwell: Duration::from_secs(10),
        }
    }

    /// Checked.
    pub(super) fn make(&self) -> Result<Discovery, Invalid> {
        let invalid = |error: Error| Invalid::new("source", error.message().to_owned());
        let discovery = match &self.source {
            DiscoverySource::Dns(name) => {
                let address: Address = name.parse().map_err(invalid)?;
                let (name, port) = address
                    .host_and_port()
                    .ok_or_else(|| Invalid::new("source", "a socket is no name in the DNS"))?;
                Discovery::dns(name, port)
            }
            #[cfg(feature = "srv")]
            DiscoverySource::Srv(name) => Discovery::srv(name),
            #[cfg(not(feature = "srv"))]
            DiscoverySource::Srv(_) => {
                return Err(Invalid::new("source", "`srv` needs the feature `srv`"));
            }
            DiscoverySource::Elasticache(endpoint) => {
                Discovery::elasticache(endpoint).map_err(invalid)?
            }
            DiscoverySource::File(path) => Discovery::file(path),
        };
        let discovery = match self.period {
            Some(period) => discovery.period(period),
            None => discovery,
        };
        let discovery = discovery
            .timeout(self.timeout)
            .minimum_dwell(self.minimum_dwell);
        discovery.validate()?;
        Ok(discovery)
    }
}
