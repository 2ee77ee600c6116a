//! The list of nodes that ElastiCache and Memorystore keep.
//!
//! ```text
//! config get cluster\r\n
//!
//! CONFIG cluster 0 <bytes>\r\n
//! <version>\n
//! <host>|<address>|<port> <host>|<address>|<port>\n
//! \r\n
//! END\r\n
//! ```
//!
//! Older engines have the same under a key: `get AmazonElastiCache:cluster`.

use std::str::from_utf8;
use std::sync::Arc;

use bytes::BytesMut;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Found, Look};
use crate::cluster::NodeSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::transport::{Address, Connector};

const ASK: &[u8] = b"config get cluster\r\n";
const ASK_OLD_ENGINES: &[u8] = b"get AmazonElastiCache:cluster\r\n";

/// The longest first line, and the longest list, which is one of thousands of nodes.
const LONGEST_LINE: usize = 1024;
const LONGEST_LIST: usize = 1024 * 1024;

/// So often in a row a lower version than before is taken for a late answer.
const LATE_ANSWERS: u32 = 9;

pub(super) struct ElastiCache {
    endpoint: Address,
    connector: Arc<dyn Connector>,
    /// The newest list.
    known: Option<List>,
    /// How often in a row an older one has come.
    older: u32,
}

/// A version of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct List {
    version: u64,
    specs: Vec<NodeSpec>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    List(List),
    /// It has no list.
    Nothing,
    /// It does not know the command.
    Unknown,
}

impl ElastiCache {
    pub(super) fn new(endpoint: Address, connector: Arc<dyn Connector>) -> Self {
        Self {
            endpoint,
            connector,
            known: None,
            older: 0,
        }
    }

    async fn ask(&self) -> Result<List> {
        let at = |error| {
            let message = format!("{}: {error}", self.endpoint);
            Error::new(ErrorKind::ConnectionFailed, message).with_source(error)
        };
        let mut stream = self.connector.connect(&self.endpoint).await.map_err(at)?;
        let mut input = BytesMut::with_capacity(4096);
        for question in [ASK, ASK_OLD_ENGINES] {
            stream.write_all(question).await.map_err(at)?;
            stream.flush().await.map_err(at)?;
            let answer = loop {
                if let Some(answer) = parse(&input).map_err(|why| self.broken(why))? {
                    break answer;
                }
                if stream.read_buf(&mut input).await.map_err(at)? == 0 {
                    return Err(self.broken("it closed before it had answered"));
                }
            };
            match answer {
                Answer::List(list) => return Ok(list),
                Answer::Nothing | Answer::Unknown => input.clear(),
            }
        }
        Err(self.broken("it has no list of a cluster's nodes"))
    }

    fn broken(&self, why: &str) -> Error {
        Error::new(ErrorKind::Protocol, format!("{}: {why}", self.endpoint))
    }

    /// The newest list, of what is known and another one.
    fn newest(&mut self, list: List) -> Vec<NodeSpec> {
        if let Some(known) = &self.known
            && list.version < known.version
            && self.older < LATE_ANSWERS
        {
            self.older += 1;
            return known.specs.clone();
        }
        self.older = 0;
        self.known.insert(list).specs.clone()
    }
}

impl Look for ElastiCache {
    fn look(&mut self) -> BoxFuture<'_, Found> {
        let looked = async {
            let list = self.ask().await?;
            Ok(self.newest(list))
        };
        looked.boxed()
    }
}

/// Reads an answer; `None` while more of it has to come.
fn parse(input: &[u8]) -> Result<Option<Answer>, &'static str> {
    let Some(end) = memmem::find(input, b"\r\n") else {
        return match input.len() > LONGEST_LINE {
            true => Err("its first line does not end"),
            false => Ok(None),
        };
    };
    let (line, rest) = (&input[..end], &input[end + 2..]);
    if line.len() > LONGEST_LINE {
        return Err("its first line does not end");
    }
    let line = from_utf8(line).map_err(|_| "its first line is no text")?;
    let mut words = line.split(' ');
    match (words.next(), words.next()) {
        (Some("CONFIG"), Some("cluster")) | (Some("VALUE"), Some("AmazonElastiCache:cluster")) => {}
        (Some("END"), None) => return Ok(Some(Answer::Nothing)),
        (Some("ERROR" | "CLIENT_ERROR"), _) => return Ok(Some(Answer::Unknown)),
        (Some("SERVER_ERROR"), _) => return Err("it answers with a SERVER_ERROR"),
        _ => return Err("it does not answer as it should"),
    }
    let (_flags, length) = (words.next(), words.next());
    let length: Option<usize> = length.and_then(|length| length.parse().ok());
    let length = length.ok_or("the length of its list is no number")?;
    if length > LONGEST_LIST {
        return Err("its list is too long");
    }
    const TAIL: &[u8] = b"\r\nEND\r\n";
    let Some((list, tail)) = rest.split_at_checked(length) else {
        return Ok(None);
    };
    let come = tail.len().min(TAIL.len());
    if tail.len() > TAIL.len() || tail[..come] != TAIL[..come] {
        return Err("there is something else behind its list");
    }
    if come < TAIL.len() {
        return Ok(None);
    }
    parse_list(list).map(|list| Some(Answer::List(list)))
}

fn parse_list(list: &[u8]) -> Result<List, &'static str> {
    let list = from_utf8(list).map_err(|_| "its list is no text")?;
    let mut lines = list.lines();
    let version = lines.next().and_then(|line| line.trim().parse().ok());
    let version = version.ok_or("the version of its list is no number")?;
    let nodes = lines.next().unwrap_or_default().split_whitespace();
    if lines.any(|line| !line.trim().is_empty()) {
        return Err("its list has too many lines");
    }
    let spec = |node: &str| {
        let wrong = "a node in its list is not host|address|port";
        let mut parts = node.split('|');
        let (Some(host), Some(address), Some(port), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong);
        };
        let host = if host.is_empty() { address } else { host };
        let name = match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        NodeSpec::new(&name).map_err(|_| wrong)
    };
    Ok(List {
        version,
        specs: nodes.map(spec).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::SystemConnector;

    fn answer(head: &str, list: &str) -> String {
        format!("{head} 0 {}\r\n{list}\r\nEND\r\n", list.len())
    }

    const LIST: &str = "12\na.cache.example|10.0.0.1|11211 b.cache.example||11212 |10.0.0.3|5\n";

    fn list(version: u64, names: &[&str]) -> List {
        let specs = names.iter().map(|name| NodeSpec::new(name).unwrap());
        List {
            version,
            specs: specs.collect(),
        }
    }

    #[test]
    fn reads_the_list_that_both_commands_give() {
        let nodes = list(
            12,
            &[
                "a.cache.example:11211",
                "b.cache.example:11212",
                "10.0.0.3:5",
            ],
        );
        for head in ["CONFIG cluster", "VALUE AmazonElastiCache:cluster"] {
            let parsed = parse(answer(head, LIST).as_bytes());
            assert_eq!(parsed, Ok(Some(Answer::List(nodes.clone()))));
        }
        let v6 = answer("CONFIG cluster", "1\n|fd00::1|11211\n");
        let parsed = parse(v6.as_bytes());
        assert_eq!(
            parsed,
            Ok(Some(Answer::List(list(1, &["[fd00::1]:11211"]))))
        );
        assert_eq!(parse(b"END\r\n"), Ok(Some(Answer::Nothing)));
        assert_eq!(parse(b"ERROR\r\n"), Ok(Some(Answer::Unknown)));
    }

    #[test]
    fn what_is_hostile_is_refused_before_it_is_kept() {
        let long = "x".repeat(LONGEST_LINE + 1);
        for (input, why) in [
            ("HTTP/1.1 200 OK\r\n", "does not answer as it should"),
            ("STAT pid 1\r\n", "does not answer as it should"),
            ("CONFIG cluster 0 99999999999999999999\r\n", "is no number"),
            ("CONFIG cluster 0 -1\r\n", "is no number"),
            ("CONFIG cluster 0\r\n", "is no number"),
            ("CONFIG cluster 0 2000000\r\n", "too long"),
            ("CONFIG cluster 0 2\r\n1\nEND\r\n", "something else behind"),
            (
                "CONFIG cluster 0 2\r\n1\n\r\nEND\r\nx",
                "something else behind",
            ),
            ("CONFIG cluster 0 2\r\nx\n\r\nEND\r\n", "version"),
            (
                "CONFIG cluster 0 6\r\n1\na|b\n\r\nEND\r\n",
                "host|address|port",
            ),
            (
                "CONFIG cluster 0 8\r\n1\na||x|\n\r\nEND\r\n",
                "host|address|port",
            ),
            ("SERVER_ERROR no\r\n", "SERVER_ERROR"),
            (&long, "does not end"),
        ] {
            let refused = parse(input.as_bytes()).unwrap_err();
            assert!(refused.contains(why), "{input:?}: {refused}");
        }
        assert!(parse(b"CONFIG cluster 0 2\r\n\xff\n\r\nEND\r\n").is_err());
    }

    #[test]
    fn an_older_list_is_ignored_unless_it_is_all_that_comes() {
        let endpoint = "cfg.example".parse().unwrap();
        let mut it = ElastiCache::new(endpoint, Arc::new(SystemConnector::new()));
        let (old, new) = (list(3, &["a"]), list(4, &["b"]));
        assert_eq!(it.newest(old.clone()), old.specs);
        assert_eq!(it.newest(new.clone()), new.specs);
        for _ in 0..LATE_ANSWERS {
            assert_eq!(it.newest(old.clone()), new.specs);
        }
        assert_eq!(it.newest(new.clone()), new.specs);
        for _ in 0..LATE_ANSWERS {
            assert_eq!(it.newest(old.clone()), new.specs);
        }
        assert_eq!(it.newest(old.clone()), old.specs);
    }

    proptest! {
        #[test]
        fn an_answer_may_come_in_any_pieces(cut in 0_usize..200) {
            let whole = answer("CONFIG cluster", LIST);
            let cut = cut.min(whole.len() - 1);
            prop_assert_eq!(parse(&whole.as_bytes()[..cut]), Ok(None));
            prop_assert!(matches!(parse(whole.as_bytes()), Ok(Some(Answer::List(_)))));
        }

        #[test]
        fn no_bytes_make_it_panic(input in "(CONFIG cluster 0 [0-9]{1,2}\r\n)?[0-9a-z|\\n\r :]{0,80}") {
            let _ = parse(input.as_bytes());
        }
    }
}
