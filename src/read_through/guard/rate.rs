//! How many loads may start each second, one taker at a time.
//!
//! A cell is taken immediately before the load starts. One that were taken earlier, and kept while
//! its load waits for something else, would let all that was kept start at once.

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

use crate::error::Result;
use crate::executor::{Spawner, timer, until};
use crate::rate::Cells;

/// Who takes the cells of one guard. Whoever waits for one holds it, so that not everybody wakes up for
/// each. It is fair.
#[derive(Debug, Default)]
pub(super) struct Rate(Mutex<Turnstile>);

/// Whether a cell was taken that no load has started with: that one was not let go on by something
/// else, or its caller left. Who comes next has it.
#[derive(Debug, Default)]
enum Turnstile {
    #[default]
    Empty,
    CellTaken,
}

impl Rate {
    /// A cell, if there is one now and nobody waits for it.
    pub(super) fn try_cell(&self, cells: &Cells) -> Option<Cell<'_>> {
        let mut cell = Cell(self.0.try_lock().ok()?);
        cell.take(cells).ok()?;
        Some(cell)
    }

    /// Waits for a cell; `None` if there was none by `moment`, or as soon as it is known that
    /// there will not be.
    ///
    /// # Errors
    /// There is no runtime for a timer.
    ///
    /// # Cancel safety
    /// Dropping the future takes no cell.
    pub(super) async fn cell(
        &self,
        cells: &Cells,
        moment: Instant,
        spawner: Option<&Spawner>,
    ) -> Result<Option<Cell<'_>>> {
        let turn = until(spawner, moment, self.0.lock()).await?;
        let Some(turn) = turn else {
            return Ok(None);
        };
        let mut cell = Cell(turn);
        while let Err(earliest) = cell.take(cells) {
            if earliest > moment {
                return Ok(None);
            }
            timer(spawner, earliest)?.await;
        }
        Ok(Some(cell))
    }
}

/// A cell, and the turnstile until the load starts: whoever has a cell and waits for one of the
/// database's is the only one of its group who does.
#[derive(Debug)]
pub(super) struct Cell<'a>(MutexGuard<'a, Turnstile>);

impl Cell<'_> {
    fn take(&mut self, cells: &Cells) -> Result<(), Instant> {
        if let Turnstile::Empty = *self.0 {
            cells.take()?;
            *self.0 = Turnstile::CellTaken;
        }
        Ok(())
    }

    /// The load starts now.
    pub(super) fn start(mut self) {
        *self.0 = Turnstile::Empty;
    }
}
