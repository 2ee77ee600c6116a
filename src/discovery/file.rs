//! Nodes in a file.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::task::JoinHandle;

use super::{Found, Look, failed};
use crate::cluster::NodeSpec;

/// More than any list of nodes.
const LONGEST: u64 = 8 * 1024 * 1024;

/// More than a name, a weight and an address.
const LONGEST_LINE: usize = 8 * 1024;

pub(super) struct File {
    path: PathBuf,
    /// Under way: a network's file system may take longer than we wait, and then goes on.
    reading: Option<JoinHandle<Result<Vec<NodeSpec>, String>>>,
}

impl File {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            reading: None,
        }
    }
}

impl Look for File {
    fn look(&mut self) -> BoxFuture<'_, Found> {
        let answer = async {
            let path = self.path.clone();
            let reading = self
                .reading
                .get_or_insert_with(|| tokio::task::spawn_blocking(move || nodes(&path)));
            let nodes = reading.await;
            self.reading = None;
            let at = |why: String| failed(format!("{}: {why}", self.path.display()));
            nodes.map_err(|error| at(error.to_string()))?.map_err(at)
        };
        answer.boxed()
    }
}

/// Not on the I/O thread: parsing a large file takes time, too.
fn nodes(path: &Path) -> Result<Vec<NodeSpec>, String> {
    let text = read(path).map_err(|error| error.to_string())?;
    parse(&text)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?
        .take(LONGEST + 1)
        .read_to_string(&mut text)?;
    match read as u64 > LONGEST {
        true => Err(io::Error::other(format!("it is over {LONGEST} bytes"))),
        false => Ok(text),
    }
}

fn parse(text: &str) -> Result<Vec<NodeSpec>, String> {
    let mut specs = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { continue };
        let at = |why: &str| format!("line {number}: {why}");
        if line.len() > LONGEST_LINE {
            // Nor is what is wrong with it quoted.
            return Err(at("it is too long"));
        }
        if specs.len() == usize::from(u16::MAX) {
            return Err(at("there are more than 65,535 nodes"));
        }
        let mut spec = NodeSpec::new(name).map_err(|error| at(error.message()))?;
        if let Some(weight) = words.next() {
            let weight = weight.parse().ok().filter(|weight| *weight > 0);
            let weight = weight.ok_or_else(|| at("the weight is no number from 1 on"))?;
            spec = spec.with_weight(weight);
        }
        if let Some(address) = words.next() {
            spec = spec.at(address).map_err(|error| at(error.message()))?;
        }
        if words.next().is_some() {
            return Err(at("there is something behind the address"));
        }
        specs.push(spec);
    }
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_name_a_weight_and_an_address() {
        let text = "# nodes\n\n cache-a # the first\ncache-b:7 2\r\n10.0.0.1 3 unix:/run/m.sock";
        let named = |name| NodeSpec::new(name).unwrap();
        let nodes = vec![
            named("cache-a"),
            named("cache-b:7").with_weight(2),
            named("10.0.0.1")
                .with_weight(3)
                .at("unix:/run/m.sock")
                .unwrap(),
        ];
        assert_eq!(parse(text), Ok(nodes));
        assert_eq!(parse("\n# none\n"), Ok(Vec::new()));
    }

    #[test]
    fn a_file_that_is_something_else_is_an_error_that_says_where() {
        for (text, said) in [
            ("cache-a\ncache-b x", "line 2: the weight is no number"),
            ("cache-a 0", "line 1: the weight is no number"),
            ("cache-a:x", "has a port that is no number"),
            (
                "cache-a 1 :7",
                "line 1: the node address \":7\" has no host",
            ),
            ("a 1 b c", "line 1: there is something behind"),
            ("nodes = [\"a\", \"b\"]", "line 1: "),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }

    #[test]
    fn no_file_makes_an_endless_list_or_an_endless_message() {
        let long = "\0".repeat(LONGEST as usize);
        assert_eq!(parse(&long).unwrap_err(), "line 1: it is too long");
        let many = "a\n".repeat(70_000);
        let error = parse(&many).unwrap_err();
        assert_eq!(error, "line 65536: there are more than 65,535 nodes");
    }
}
