//! What the parts of the experiment take of the processors and of memory, as Linux tells it in `/proc`. Elsewhere
//! nothing is known, and nothing is shown.

use std::fs;
use std::ops::{Add, Sub};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A process, by the directory of its threads.
pub(crate) struct Process(PathBuf);

impl Process {
    pub(crate) fn new(pid: u32) -> Self {
        Self(format!("/proc/{pid}/task").into())
    }

    fn this() -> Self {
        Self("/proc/self/task".into())
    }

    /// The name of each thread, and how long it has run.
    fn threads(&self) -> Vec<(String, Duration)> {
        let Ok(threads) = fs::read_dir(&self.0) else {
            return Vec::new();
        };
        // One that ends meanwhile is left out.
        let threads = threads.filter_map(|thread| thread_at(&thread.ok()?.path()));
        threads.collect()
    }
}

fn thread_at(path: &Path) -> Option<(String, Duration)> {
    let name = fs::read_to_string(path.join("comm")).ok()?;
    let ran = fs::read_to_string(path.join("schedstat")).ok()?;
    let nanoseconds = ran.split_whitespace().next()?.parse().ok()?;
    Some((name.trim().to_owned(), Duration::from_nanos(nanoseconds)))
}

/// Processor time that was used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// The service's threads, on which callers await the client: what the client does there is in it.
    pub(crate) service: Duration,
    /// The client's own thread.
    pub(crate) io: Duration,
    /// What makes the load.
    pub(crate) generator: Duration,
    /// Servers and proxies of ours.
    pub(crate) servers: Duration,
}

impl Usage {
    /// Until now; `None` where it is not known.
    pub(crate) fn read(servers: &[Process]) -> Option<Self> {
        let mut usage = Self::default();
        let own = Process::this().threads();
        if own.is_empty() {
            return None;
        }
        for (name, ran) in own {
            match &*name {
                "service" => usage.service += ran,
                "memcached-io" => usage.io += ran,
                "generator" => usage.generator += ran,
                "servers" => usage.servers += ran,
                _ => {}
            }
        }
        let threads = servers.iter().flat_map(Process::threads);
        usage.servers += threads.map(|(_, ran)| ran).sum::<Duration>();
        Some(usage)
    }

    /// What the client may have used at most.
    pub(crate) fn client(&self) -> Duration {
        self.service + self.io
    }
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            service: self.service + other.service,
            io: self.io + other.io,
            generator: self.generator + other.generator,
            servers: self.servers + other.servers,
        }
    }
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            service: self.service.saturating_sub(earlier.service),
            io: self.io.saturating_sub(earlier.io),
            // A thread of its own for each step.
            generator: self.generator.saturating_sub(earlier.generator),
            servers: self.servers.saturating_sub(earlier.servers),
        }
    }
}

/// The memory of this process, in bytes.
pub(crate) fn memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1_024)
}
