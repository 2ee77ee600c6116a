//! What is measured, and in which configurations.

use serde::{Deserialize, Serialize};

use crate::spec::{Cell, Contender, Runtime, Work};

/// A row of the table: the same work for all in it, taken in turns.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: &'static str,
    pub tasks: usize,
    pub value: usize,
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
            entries,
        }
    };
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
            entries: large.copied().map(mixed).collect(),
        },
        batches("get_many", 1),
        batches("get_many tasks=8", 8),
    ]
}

impl Row {
    /// The configurations that an entry is tried in.
    pub fn candidates(&self, entry: Entry, quick: bool) -> Vec<Cell> {
        let runtimes: &[_] = if entry.contender.is_raw() {
            &[None]
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
                }));
            }
        }
        cells
    }

    fn pools(&self, quick: bool) -> Vec<usize> {
        let sizes = if quick {
            vec![64]
        } else {
            vec![4, 16, 32, 64, 128, 256]
        };
        let smallest = (self.tasks / 64).max(4);
        let mut sizes: Vec<_> = sizes
            .into_iter()
            .filter(|&size| size >= smallest && size < self.tasks)
            .collect();
        if !quick || sizes.is_empty() {
            // One for each task: nobody waits for a connection.
            sizes.push(self.tasks);
        }
        sizes
    }
}
