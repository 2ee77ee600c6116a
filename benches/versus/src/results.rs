//! What was measured, and what of it is shown.

use serde::Serialize;

use crate::plan::Entry;
use crate::spec::{Cell, Contender, Measured, Work};

/// One line of a row: all rounds, in the configuration that was found best.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub entry: Entry,
    pub cell: Cell,
    pub rounds: Vec<Measured>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RowResult {
    pub name: &'static str,
    pub tasks: usize,
    pub value: usize,
    pub lines: Vec<Line>,
}

/// The middle one, or the mean of the two in the middle. None has none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        return Some(values[middle]);
    }
    let below = values.get(middle.checked_sub(1)?)?;
    Some((below + values[middle]) / 2.0)
}

impl Line {
    pub fn new(entry: Entry, cell: Cell) -> Self {
        Self {
            entry,
            cell,
            rounds: Vec::new(),
        }
    }

    pub fn errors(&self) -> u64 {
        self.rounds.iter().map(|round| round.errors).sum()
    }

    pub fn first_error(&self) -> Option<&str> {
        self.rounds
            .iter()
            .find_map(|round| round.first_error.as_deref())
    }

    /// The median of the rounds. A line with an error has none.
    pub fn median(&self, figure: impl Fn(&Measured) -> f64) -> Option<f64> {
        if self.errors() > 0 {
            return None;
        }
        median(self.rounds.iter().map(figure))
    }

    pub fn throughput(&self) -> Option<f64> {
        self.median(|round| round.throughput)
    }
}

impl RowResult {
    pub fn line(&self, contender: Contender, work: Work) -> Option<&Line> {
        self.lines
            .iter()
            .find(|line| line.entry == Entry { contender, work })
    }

    /// That of the other clients which has the most throughput.
    pub fn best_peer(&self) -> Option<&Line> {
        let peers = self
            .lines
            .iter()
            .filter(|line| line.cell.contender.is_peer());
        let measured = peers.filter_map(|line| Some((line, line.throughput()?)));
        let best = measured.max_by(|(_, one), (_, other)| one.total_cmp(other));
        best.map(|(line, _)| line)
    }
}

/// Of what has been tried the cell with the most throughput, and of those within 5 % of it the one with the
/// lowest p99. What has errors is taken only if everything has.
pub fn best(tried: &[Line]) -> Option<Cell> {
    let faultless = || {
        let figures = |line: &Line| Some((line.throughput()?, line.median(|trial| trial.p99)?));
        tried
            .iter()
            .filter_map(move |line| Some((line.cell, figures(line)?)))
    };
    let most = faultless()
        .map(|(_, (throughput, _))| throughput)
        .max_by(f64::total_cmp);
    let Some(most) = most else {
        return tried.first().map(|line| line.cell);
    };
    faultless()
        .filter(|(_, (throughput, _))| *throughput >= most * 0.95)
        .min_by(|(_, (_, one)), (_, (_, other))| one.total_cmp(other))
        .map(|(cell, _)| cell)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::spec::Runtime;

    pub fn cell(contender: Contender, work: Work, pool: Option<usize>) -> Cell {
        Cell {
            contender,
            runtime: Some(Runtime::Single),
            pool,
            work,
            tasks: 64,
            value: 100,
            in_memory: false,
        }
    }

    pub fn measured(throughput: f64, p99: f64) -> Measured {
        Measured {
            throughput,
            p99,
            p999: p99 * 2.0,
            cpu: 1e6 / throughput,
            ..Measured::default()
        }
    }

    pub fn line(contender: Contender, rounds: Vec<Measured>) -> Line {
        Line {
            entry: Entry {
                contender,
                work: Work::Mixed,
            },
            cell: cell(contender, Work::Mixed, None),
            rounds,
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median([4.0, 1.0, 2.0, 100.0]), Some(3.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn one_error_in_one_round_is_no_result() {
        let mut rounds = vec![measured(10.0, 1.0); 5];
        let fine = line(Contender::Current, rounds.clone());
        assert_eq!(fine.throughput(), Some(10.0));
        rounds[3].errors = 1;
        rounds[3].first_error = Some("lost".into());
        let failed = line(Contender::Current, rounds);
        assert_eq!(failed.throughput(), None);
        assert_eq!(failed.first_error(), Some("lost"));
    }

    #[test]
    fn the_best_configuration_is_the_fastest_but_for_a_much_lower_p99() {
        let peer = |pool| cell(Contender::MemcacheAsync, Work::Mixed, Some(pool));
        let tried = |pool, throughput, p99| Line {
            cell: peer(pool),
            ..line(Contender::MemcacheAsync, vec![measured(throughput, p99)])
        };
        let mut tried = vec![
            tried(16, 90_000.0, 10.0),
            tried(32, 96_000.0, 200.0),
            tried(64, 100_000.0, 900.0),
        ];
        // Within 5 %, and its p99 is lower; the first is slower than that.
        assert_eq!(best(&tried), Some(peer(32)));
        tried[1].rounds[0].errors = 1;
        assert_eq!(best(&tried), Some(peer(64)));
        // Tried three times, the first is the fastest twice.
        tried[0]
            .rounds
            .extend([measured(200_000.0, 1.0), measured(200_000.0, 1.0)]);
        assert_eq!(best(&tried), Some(peer(16)));
        tried[0].rounds[2].errors = 1;
        tried[2].rounds[0].errors = 1;
        assert_eq!(best(&tried), Some(peer(16)), "its errors are to be seen");
    }

    #[test]
    fn the_best_peer_is_none_of_ours_and_has_no_errors() {
        let mut failed = measured(90.0, 1.0);
        failed.errors = 1;
        let row = RowResult {
            name: "tasks=64",
            tasks: 64,
            value: 100,
            lines: vec![
                line(Contender::Current, vec![measured(1000.0, 1.0)]),
                line(Contender::MemcacheAsync, vec![measured(20.0, 1.0)]),
                line(Contender::AsyncMemcached, vec![measured(30.0, 1.0)]),
                line(Contender::Memcache, vec![failed]),
                line(Contender::Raw, vec![measured(2000.0, 1.0)]),
            ],
        };
        let best = row.best_peer().map(|line| line.entry.contender);
        assert_eq!(best, Some(Contender::AsyncMemcached));
    }
}
