//! The matrix as `docs/COMPATIBILITY.md` has it.

use std::fmt;
use std::path::PathBuf;

use crate::cells::{Cell, Connection, LINES};
use crate::suite::{SUITE, Verdict};

const BEGIN: &str = "<!-- the matrix: written by scripts/compatibility -->\n";
const END: &str = "<!-- the end of the matrix -->\n";

/// What every behaviour came to in every cell.
pub(crate) struct Matrix(pub(crate) Vec<(Cell, Vec<Verdict>)>);

impl Matrix {
    /// What the cells of a line came to, by their connections.
    fn line(&self, line: usize) -> impl Iterator<Item = (Connection, &[Verdict])> {
        let (protocol, server, _) = LINES[line];
        let cells = self.0.iter();
        let cells =
            cells.filter(move |(cell, _)| (cell.protocol, cell.server) == (protocol, server));
        cells.map(|(cell, verdicts)| (cell.connection, &verdicts[..]))
    }
}

fn row(f: &mut fmt::Formatter<'_>, cells: impl IntoIterator<Item = String>) -> fmt::Result {
    let cells: Vec<_> = cells.into_iter().collect();
    writeln!(f, "| {} |", cells.join(" | "))
}

fn rule(f: &mut fmt::Formatter<'_>, columns: usize) -> fmt::Result {
    writeln!(f, "|{}", "---|".repeat(columns))
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // How many of the behaviours work over each kind of connection.
        let header = ["", "protocol", "server"].map(str::to_owned);
        let connections = Connection::ALL.map(|connection| connection.to_string());
        row(f, header.into_iter().chain(connections))?;
        rule(f, 3 + Connection::ALL.len())?;
        for (line, (protocol, server, _)) in LINES.iter().enumerate() {
            let counts = Connection::ALL.map(|connection| {
                let mut cells = self.line(line);
                let cell = cells.find(|(of, _)| *of == connection);
                cell.map_or("n/a".to_owned(), |(_, verdicts)| {
                    let works = verdicts
                        .iter()
                        .filter(|verdict| **verdict == Verdict::Works);
                    format!("{} of {}", works.count(), SUITE.len())
                })
            });
            let names = [name(line), protocol.to_string(), server.to_string()];
            row(f, names.into_iter().chain(counts))?;
        }
        writeln!(f)?;

        // Each behaviour, over all kinds of connections.
        let names = (0..LINES.len()).map(name);
        row(f, std::iter::once("behaviour".to_owned()).chain(names))?;
        rule(f, 1 + LINES.len())?;
        for (index, behaviour) in SUITE.iter().enumerate() {
            let verdicts = (0..LINES.len()).map(|line| {
                let verdicts = self
                    .line(line)
                    .map(|(_, verdicts)| verdicts[index].to_string());
                let mut verdicts: Vec<_> = verdicts.collect();
                verdicts.dedup();
                verdicts.join(" / ")
            });
            row(
                f,
                std::iter::once(behaviour.name.to_owned()).chain(verdicts),
            )?;
        }
        Ok(())
    }
}

/// What a line is called in the second table.
fn name(line: usize) -> String {
    char::from(b'A' + line as u8).to_string()
}

/// The document has this matrix; or is given it, if the environment says `COMPATIBILITY=write`.
pub(crate) fn compare_or_write(matrix: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/COMPATIBILITY.md");
    let document = std::fs::read_to_string(&path).expect("docs/COMPATIBILITY.md");
    let (before, rest) = document.split_once(BEGIN).expect("the matrix's begin");
    let (written, after) = rest.split_once(END).expect("the matrix's end");
    if std::env::var("COMPATIBILITY").is_ok_and(|value| value == "write") {
        let document = [before, BEGIN, matrix, END, after].concat();
        return std::fs::write(&path, document).expect("the document can be written");
    }
    assert_eq!(
        written, matrix,
        "docs/COMPATIBILITY.md is not up to date: run scripts/compatibility"
    );
}
