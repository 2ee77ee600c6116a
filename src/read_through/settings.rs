//! What a read-through may be told.

use std::time::Duration;

use super::guard::LoadGuard;
use crate::error::{Invalid, not_zero};

/// Beyond that memcached's clock runs out of bits.
const A_YEAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// How values are loaded, leased, refreshed and put back. One for each
/// [`Client`](crate::Client) ([`ClientBuilder::read_through`](crate::ClientBuilder::read_through),
/// [`Client::with_read_through`](crate::Client::with_read_through)) or
/// [`ReadThroughLayer`](crate::ReadThroughLayer).
///
/// Clients that share a cache have to agree on [`stale_while_revalidate`](Self::stale_while_revalidate)
/// and [`stale_if_error`](Self::stale_if_error): a value is stored for its TTL and the longer of the
/// two, and what is left of that says how old it is. So a value that was written by
/// [`set`](crate::Client::set), with its bare TTL, counts as old by that much too early; write what
/// is read through by loading it.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct ReadThroughSettings {
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(super) guard: Option<LoadGuard>,
    database: Option<String>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) load_timeout: Duration,
    pub(super) leases: bool,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    lease: Option<Duration>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    lease_wait: Option<Duration>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) stale_while_revalidate: Duration,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) stale_if_error: Duration,
    pub(super) early_refresh: f64,
    pub(super) ttl_jitter: f64,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) negative_ttl: Option<Duration>,
    pub(super) max_refills: usize,
}

impl Default for ReadThroughSettings {
    fn default() -> Self {
        Self {
            guard: None,
            database: None,
            load_timeout: Duration::from_secs(1),
            leases: true,
            lease: None,
            lease_wait: None,
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            early_refresh: 1.0,
            ttl_jitter: 0.1,
            negative_ttl: None,
            max_refills: 256,
        }
    }
}

impl ReadThroughSettings {
    /// What protects the database. By default a guard of its own with the default
    /// [`LoadLimits`](crate::LoadLimits); all that load from one database should share one.
    #[must_use]
    pub fn guard(mut self, guard: LoadGuard) -> Self {
        self.guard = Some(guard);
        self
    }

    /// The same by the name of a [database](crate::ClientBuilder::database) that the client knows. A
    /// [`guard`](Self::guard) goes over it. A [`ReadThroughLayer`](crate::ReadThroughLayer), which knows
    /// none, refuses it.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.database = Some(name.into());
        self
    }

    /// With that guard, unless it has one.
    pub(crate) fn guarded_by(mut self, guard: impl FnOnce() -> LoadGuard) -> Self {
        self.guard.get_or_insert_with(guard);
        self
    }

    pub(crate) fn database_name(&self) -> Option<&str> {
        self.database.as_deref().filter(|_| self.guard.is_none())
    }

    /// How long loading may take, with all waiting for others that load the same and for a place at
    /// the database; 1 s by default. It begins when the cache has not had the value.
    #[must_use]
    pub fn load_timeout(mut self, timeout: Duration) -> Self {
        self.load_timeout = timeout;
        self
    }

    /// Whether to ask memcached for a lease before loading, so that of all processes only one
    /// loads, and nothing that was invalidated during a load is put back; true by default.
    ///
    /// It holds in both protocols, and for clients of either that share a server; then it may be one load
    /// in each process that is asked in the classic protocol, while one in the meta protocol loads. Through
    /// proxies there are no leases: it is as if this were off.
    ///
    /// Turn it off where others read the same keys: a placeholder is a hit to clients that are not this
    /// crate's (of 0 bytes, if its owner speaks the meta protocol; of 55, with the client flags
    /// 0x48454c44, in the classic one), and one of the meta protocol is a hit of 0 bytes to a plain `get`
    /// in the classic protocol, and through a proxy. Loads are then coalesced within this client only,
    /// and what is loaded is added where nothing is: another process's invalidation during the load is
    /// not noticed.
    ///
    /// The placeholder is an item to `append`, `prepend`, `touch`, `add` and counters, of this
    /// client, too: use them on other keys than those that are read through.
    #[must_use]
    pub fn leases(mut self, leases: bool) -> Self {
        self.leases = leases;
        self
    }

    /// How long a lease is, in whole seconds, rounded up; a second more than
    /// [`load_timeout`](Self::load_timeout) by default. A process that dies with one costs the others a
    /// [`lease_wait`](Self::lease_wait) each; an old value that it was to load anew stays old for so
    /// long.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// How long to wait for a value that another process has the lease on, before loading it all
    /// the same; half of [`load_timeout`](Self::load_timeout) by default.
    #[must_use]
    pub fn lease_wait(mut self, wait: Duration) -> Self {
        self.lease_wait = Some(wait);
        self
    }

    /// For how long past its TTL a value is still given out at once, while it is loaded anew; not at
    /// all by default. A shared loader loads behind the answer; a closure cannot outlive its call,
    /// so one caller in each lease waits for it.
    #[must_use]
    pub fn stale_while_revalidate(mut self, age: Duration) -> Self {
        self.stale_while_revalidate = age;
        self
    }

    /// For how long past its TTL a value is still given out if it cannot be loaded: the loader
    /// fails, or the load was shed; or while another process loads it, or a load of it has failed
    /// less than a [lease](Self::lease) ago. Not at all by default, and a year at most.
    #[must_use]
    pub fn stale_if_error(mut self, age: Duration) -> Self {
        self.stale_if_error = age;
        self
    }

    /// How eagerly a value is loaded anew shortly before it expires, so that no crowd waits for it
    /// then; 1 by default, 0 for never. A read refreshes when `-ln(random) * beta * cost` exceeds
    /// the time that is left, `cost` being what loads have lately taken (XFetch: Vattani, Chierichetti
    /// and Lowenstein, *Optimal Probabilistic Cache Stampede Prevention*, VLDB 2015). Since memcached
    /// counts in seconds it matters for loads that take a good part of one.
    #[must_use]
    pub fn early_refresh(mut self, beta: f64) -> Self {
        self.early_refresh = beta;
        self
    }

    /// By up to which share of it a TTL is shortened at random, so that what was loaded together
    /// does not expire together; 0.1 by default.
    #[must_use]
    pub fn ttl_jitter(mut self, share: f64) -> Self {
        self.ttl_jitter = share;
        self
    }

    /// For how long it is kept in the cache that the loader has found nothing; by default it is not.
    /// It is stored as 23 bytes with client flags of its own, which other clients see as a value. To
    /// this one it is a miss in every way of reading; but it is there: `add` does not store, `touch`
    /// prolongs it, and what is appended to it is lost.
    #[must_use]
    pub fn negative_ttl(mut self, ttl: Duration) -> Self {
        self.negative_ttl = Some(ttl);
        self
    }

    /// How many writes of loaded values may be under way behind the answers; 256 by default, of a
    /// client and of each of its groups. What exceeds it is not put back, and counted.
    #[must_use]
    pub fn max_refills(mut self, refills: usize) -> Self {
        self.max_refills = refills;
        self
    }

    pub(super) fn lease_duration(&self) -> Duration {
        const SECOND: Duration = Duration::from_secs(1);
        self.lease
            .unwrap_or_else(|| self.load_timeout.saturating_add(SECOND))
    }

    pub(super) fn lease_wait_limit(&self) -> Duration {
        self.lease_wait.unwrap_or(self.load_timeout / 2)
    }

    /// How much longer than its TTL a value is stored.
    pub(super) fn grace(&self) -> Duration {
        self.stale_while_revalidate.max(self.stale_if_error)
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let refuse = |setting: &str, why: &'static str| Err(Invalid::new(setting, why));
        not_zero("load_timeout", self.load_timeout.is_zero())?;
        not_zero("lease", self.lease_duration().is_zero())?;
        if self.lease_wait_limit() >= self.load_timeout {
            let why = "leaves no time to load: it must be under the load timeout";
            return refuse("lease_wait", why);
        }
        if !(self.early_refresh >= 0.0 && self.early_refresh.is_finite()) {
            return refuse("early_refresh", "is no number from 0 on");
        }
        if !(0.0..=1.0).contains(&self.ttl_jitter) {
            return refuse("ttl_jitter", "is no share from 0 to 1");
        }
        not_zero("negative_ttl", self.negative_ttl == Some(Duration::ZERO))?;
        for (setting, age) in [
            ("stale_while_revalidate", self.stale_while_revalidate),
            ("stale_if_error", self.stale_if_error),
        ] {
            if age > A_YEAR {
                return refuse(setting, "is over a year");
            }
        }
        not_zero("max_refills", self.max_refills == 0)
    }
}
