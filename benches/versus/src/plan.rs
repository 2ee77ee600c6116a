//! What is measured, and in which configurations.

use serde::{Deserialize, Serialize};

use crate::spec::{Cell, Contender, Runtime, Work};

/// How long, and how often.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Settings {
    pub quick: bool,
    pub rounds: usize,
    /// Seconds.
    pub warm_up: f64,
    /// Of one measurement, in seconds.
    pub duration: f64,
    /// Of one that a configuration is tried in, in seconds.
    pub trial: f64,
    /// How often each of a [few](FEW) configurations is tried; of more than a few each is tried once.
    pub trials_of_few: usize,
}

/// So many configurations, of which two may differ by less than one trial says. Pools differ by more.
const FEW: usize = 4;

impl Settings {
    /// About a quarter of an hour and a minute for all rows.
    pub const FULL: Self = Self {
        quick: false,
        rounds: 5,
        warm_up: 0.25,
        duration: 2.0,
        trial: 0.4,
        trials_of_few: 3,
    };
    /// Whether it works, and roughly how fast it is.
    pub const QUICK: Self = Self {
        quick: true,
        rounds: 1,
        warm_up: 0.2,
        duration: 0.7,
        trial: 0.3,
        trials_of_few: 1,
    };
}

impl Settings {
    /// How often each of so many configurations is tried.
    pub fn trials(&self, candidates: usize) -> usize {
        match candidates <= FEW {
            true => self.trials_of_few,
            false => 1,
        }
    }
}

/// A row of the table: the same work for all in it, taken in turns.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub tasks: usize,
    pub value: usize,
    pub in_memory: bool,
    pub entries: Vec<Entry>,
}

/// One line of a row: who does which work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub contender: Contender,
    pub work: Work,
}

const fn mixed(contender: Contender) -> Entry {
    Entry {
        contender,
        work: Work::Mixed,
    }
}

const fn many(contender: Contender) -> Entry {
    Entry {
        contender,
        work: Work::GetMany,
    }
}

const PEERS: [Contender; 3] = [
    Contender::MemcacheAsync,
    Contender::AsyncMemcached,
    Contender::Memcache,
];

pub fn rows() -> Vec<Row> {
    let ours = [
        Contender::Current,
        Contender::Dedicated,
        Contender::Transport,
        Contender::Ring3,
        Contender::Transport3,
    ];
    let single = |name, tasks| {
        let raw = [Contender::Raw, Contender::Raw4];
        // One task waits for each of its replies: so does one loop.
        let raw = if tasks == 1 { &raw[..1] } else { &raw[..] };
        let contenders = ours.iter().chain(&PEERS).chain(raw);
        Row {
            name,
            tasks,
            value: 100,
            in_memory: false,
            entries: contenders.copied().map(mixed).collect(),
        }
    };
    let batches = |name, tasks| {
        let whole = [Contender::Current, Contender::Dedicated, Contender::Ring3];
        let mut entries: Vec<_> = whole.iter().chain(&PEERS).copied().map(many).collect();
        entries.push(many(Contender::Raw));
        entries.push(Entry {
            contender: Contender::Current,
            work: Work::Concurrent,
        });
        Row {
            name,
            tasks,
            value: 100,
            in_memory: false,
            entries,
        }
    };
    // What the layers above a transport cost, where no system call drowns it.
    let without_sockets = [
        Contender::Current,
        Contender::Transport,
        Contender::Ring3,
        Contender::Transport3,
    ];
    let whole = [Contender::Current, Contender::Dedicated];
    let large = whole.iter().chain(&PEERS).chain(&[Contender::Raw]);
    vec![
        single("tasks=1", 1),
        single("tasks=64", 64),
        single("tasks=256", 256),
        single("tasks=1024", 1024),
        Row {
            name: "value=4096",
            tasks: 256,
            value: 4096,
            in_memory: false,
            entries: large.copied().map(mixed).collect(),
        },
        batches("get_many", 1),
        batches("get_many tasks=8", 8),
        Row {
            name: "in memory",
            tasks: 256,
            value: 100,
            in_memory: true,
            entries: without_sockets.map(mixed).into(),
        },
    ]
}

impl Row {
    /// `tasks=64` is also called by its number alone.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name
            || self
                .name
                .strip_prefix("tasks=")
                .is_some_and(|number| number == name)
    }

    /// How long it takes, in seconds, but for what goes wrong.
    pub fn seconds(&self, settings: &Settings) -> f64 {
        let trials: usize = self
            .entries
            .iter()
            .filter(|entry| entry.contender.follows().is_none())
            .map(|entry| self.candidates(*entry, settings.quick).len())
            // One alone is not tried.
            .filter(|candidates| *candidates > 1)
            .map(|candidates| candidates * settings.trials(candidates))
            .sum();
        let rounds = self.entries.len() * settings.rounds;
        trials as f64 * (settings.warm_up + settings.trial)
            + rounds as f64 * (settings.warm_up + settings.duration)
    }

    /// The configurations that an entry is tried in.
    pub fn candidates(&self, entry: Entry, quick: bool) -> Vec<Cell> {
        let runtimes: &[_] = if entry.contender.is_raw() {
            &[None]
        } else if self.in_memory {
            // There is no server that would need the other processor.
            &[Some(Runtime::Single)]
        } else {
            &[Some(Runtime::Single), Some(Runtime::Multi)]
        };
        let pools: Vec<_> = if entry.contender.is_peer() {
            self.pools(quick).into_iter().map(Some).collect()
        } else {
            vec![None]
        };
        // It has two ways to be used.
        let contenders: &[_] = match entry.contender {
            Contender::Memcache => &[Contender::Memcache, Contender::MemcacheBb8],
            ref other => std::slice::from_ref(other),
        };
        let mut cells = Vec::new();
        for &contender in contenders {
            for &runtime in runtimes {
                cells.extend(pools.iter().map(|&pool| Cell {
                    contender,
                    runtime,
                    pool,
                    work: entry.work,
                    tasks: self.tasks,
                    value: self.value,
                    in_memory: self.in_memory,
                }));
            }
        }
        cells
    }

    fn pools(&self, quick: bool) -> Vec<usize> {
        let sizes = if quick {
            vec![64]
        } else {
            vec![16, 32, 64, 128, 256]
        };
        let mut sizes: Vec<_> = sizes
            .into_iter()
            .filter(|&size| size < self.tasks)
            .collect();
        if !quick || sizes.is_empty() {
            // One for each task: nobody waits for a connection.
            sizes.push(self.tasks);
        }
        sizes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> Row {
        let mut rows = rows();
        rows.retain(|row| row.is_called(name));
        assert_eq!(rows.len(), 1, "{name}");
        rows.remove(0)
    }

    #[test]
    fn a_full_run_takes_no_more_than_seventeen_minutes_and_a_quick_one_two() {
        let minutes = |settings| rows().iter().map(|row| row.seconds(settings)).sum::<f64>() / 60.0;
        assert!(
            minutes(&Settings::FULL) < 16.5,
            "{}",
            minutes(&Settings::FULL)
        );
        assert!(
            minutes(&Settings::QUICK) < 2.5,
            "{}",
            minutes(&Settings::QUICK)
        );
    }

    #[test]
    fn what_is_measured_in_memory_has_no_socket_and_nothing_to_choose() {
        let row = row("in memory");
        for entry in &row.entries {
            assert!(!entry.contender.is_peer() && !entry.contender.is_raw());
            let cells = row.candidates(*entry, false);
            let [cell] = cells[..] else {
                panic!("{cells:?}");
            };
            assert!(cell.in_memory && cell.runtime == Some(Runtime::Single));
        }
    }

    #[test]
    fn rows_are_called_by_name_or_number() {
        assert_eq!(row("64").name, "tasks=64");
        assert_eq!(row("tasks=64").name, "tasks=64");
        assert_eq!(row("get_many").tasks, 1);
        assert!(!row("64").is_called("4"));
    }

    #[test]
    fn a_pool_is_tried_in_every_size_up_to_one_connection_for_each_task() {
        assert_eq!(row("1").pools(false), [1]);
        assert_eq!(row("64").pools(false), [16, 32, 64]);
        assert_eq!(row("1024").pools(false), [16, 32, 64, 128, 256, 1024]);
        assert_eq!(row("1024").pools(true), [64]);
        assert_eq!(row("get_many tasks=8").pools(true), [8]);
    }

    #[test]
    fn peers_are_tried_on_both_runtimes_and_memcache_with_both_pools() {
        let cells = row("64").candidates(mixed(Contender::Memcache), true);
        let tried: Vec<_> = cells
            .iter()
            .map(|cell| (cell.contender, cell.runtime))
            .collect();
        for contender in [Contender::Memcache, Contender::MemcacheBb8] {
            for runtime in [Runtime::Single, Runtime::Multi] {
                assert!(tried.contains(&(contender, Some(runtime))));
            }
        }
        let raw = row("64").candidates(mixed(Contender::Raw), false);
        assert_eq!(raw.len(), 1);
    }

    #[test]
    fn who_takes_the_runtime_of_another_comes_after_it() {
        for row in rows() {
            for (place, entry) in row.entries.iter().enumerate() {
                let Some(first) = entry.contender.follows() else {
                    continue;
                };
                let first = row
                    .entries
                    .iter()
                    .position(|entry| entry.contender == first);
                assert!(
                    first.is_some_and(|first| first < place),
                    "{}: {entry:?}",
                    row.name
                );
            }
        }
    }
}
