//! A node, as it is written in a configuration.

use crate::cluster::NodeSpec;
use crate::error::{Error, Invalid};
use crate::transport::Protocol;

/// A node's address and its share of the keys. As data (feature `serde`) it is the address alone, or
/// `{ address = "10.0.0.2", weight = 2 }`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct NodeConfig {
    /// `host`, `host:port`, `[v6]:port` or `unix:/path`; the port is 11211 by default. It is the node's
    /// name, too.
    pub address: String,
    /// Its share of the keys, in proportion to the others'; 1 is usual.
    pub weight: u32,
    /// Which protocol it is asked in, if that is not what the others are.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub protocol: Option<Protocol>,
}

impl NodeConfig {
    /// A node of weight 1.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            weight: 1,
            protocol: None,
        }
    }

    /// Gives it a share of the keys in proportion to its weight.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Says which protocol it is asked in.
    #[must_use]
    pub fn with_protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    fn spec(&self) -> Result<NodeSpec, Error> {
        let mut spec = NodeSpec::new(&self.address)?.with_weight(self.weight);
        spec.protocol = self.protocol;
        Ok(spec)
    }

    /// The nodes of a list, checked.
    pub(super) fn specs(nodes: &[Self]) -> Result<Vec<NodeSpec>, Invalid> {
        let mut specs = Vec::with_capacity(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            let invalid =
                |error: Error| Invalid::new(format!("nodes[{index}]"), error.message().to_owned());
            specs.push(node.spec().map_err(invalid)?);
            if let Some(protocol) = node.protocol {
                super::plan::speaks(&format!("nodes[{index}].protocol"), protocol)?;
            }
        }
        crate::cluster::validate(&specs)?;
        Ok(specs)
    }
}

#[cfg(feature = "serde")]
mod data {
    use std::fmt;

    use serde::de::value::MapAccessDeserializer;
    use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

    use super::{NodeConfig, Protocol};

    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Table {
        address: String,
        #[serde(default = "one")]
        weight: u32,
        protocol: Option<Protocol>,
    }

    fn one() -> u32 {
        1
    }

    impl<'de> Deserialize<'de> for NodeConfig {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(TextOrTable)
        }
    }

    struct TextOrTable;

    impl<'de> Visitor<'de> for TextOrTable {
        type Value = NodeConfig;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an address, or a table of an address, a weight and a protocol")
        }

        fn visit_str<E: Error>(self, address: &str) -> Result<NodeConfig, E> {
            Ok(NodeConfig::new(address))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<NodeConfig, A::Error> {
            let table = Table::deserialize(MapAccessDeserializer::new(map))?;
            Ok(NodeConfig {
                address: table.address,
                weight: table.weight,
                protocol: table.protocol,
            })
        }
    }
}
