//! What goes wrong with the first node, and when.

use std::ops::Range;
use std::time::Duration;

/// How much later a slow node's replies are.
pub(crate) const SLOWER_BY: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Connects succeed, nothing answers.
    Stop,
    /// Connects are refused; it comes back empty.
    Kill,
    /// Every reply is late.
    Slow,
    /// Stopped and continued, a second each.
    Flap,
    /// The network takes everything, connects too, and delivers nothing.
    Blackhole,
}

impl Fault {
    pub(crate) const ALL: [Self; 5] = [
        Self::Stop,
        Self::Kill,
        Self::Slow,
        Self::Flap,
        Self::Blackhole,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Slow => "slow",
            Self::Flap => "flap",
            Self::Blackhole => "blackhole",
        }
    }

    /// What the node does meanwhile.
    pub(crate) fn describe(self) -> String {
        match self {
            Self::Stop => "does not answer".to_owned(),
            Self::Kill => "is dead".to_owned(),
            Self::Slow => format!("answers {} ms late", SLOWER_BY.as_millis()),
            Self::Flap => "stops and continues by the second".to_owned(),
            Self::Blackhole => "is cut off".to_owned(),
        }
    }

    /// What a client sees of it.
    pub(crate) fn seen(self) -> &'static str {
        match self {
            Self::Stop => "connections are accepted, and nothing is answered",
            Self::Kill => "connections are refused; it comes back empty",
            Self::Slow => "every reply is late",
            Self::Flap => "nothing is answered in every other second",
            Self::Blackhole => "connections open, and nothing gets through",
        }
    }

    /// It is between the nodes and their clients, not in the node.
    pub(crate) fn is_of_the_network(self) -> bool {
        match self {
            Self::Stop | Self::Kill | Self::Flap => false,
            Self::Slow | Self::Blackhole => true,
        }
    }
}

/// A fault, and between which seconds of the run it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outage {
    pub(crate) fault: Fault,
    pub(crate) when: Range<u32>,
}

impl Outage {
    /// In which seconds the node is made to fail (true) and to work (false). The last makes it work.
    pub(crate) fn changes(&self) -> impl Iterator<Item = (u32, bool)> {
        let when = self.when.clone();
        let end = when.end;
        let every = match self.fault {
            Fault::Flap => 1,
            _ => when.len(),
        };
        let changes = when.step_by(every).zip([true, false].into_iter().cycle());
        changes.chain([(end, false)])
    }
}
