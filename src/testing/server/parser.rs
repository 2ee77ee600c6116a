//! Bytes to requests, as memcached 1.6.18 frames them, without I/O.
//!
//! This parser never "repairs" the framing: where memcached executes a value as commands, so does it, for those are the
//! traps a client must survive. Every limit is checked before anything is allocated, and the caller's buffer never has
//! to hold more than one value and one line.

use std::ops::ControlFlow;

use bytes::{Buf, Bytes, BytesMut};

use super::command::{Command, Line, Request, Value, credentials_length, parse_line};
use super::manner::{Dialect, Manner};

/// Bytes without a line feed that memcached tolerates before it closes the connection.
const LONGEST_UNFINISHED_LINE: usize = 2_048;
/// A multi-get line has no limit in memcached; this one keeps a hostile peer from filling our memory.
const LONGEST_GET_LINE: usize = 1 << 20;
/// memcached's read buffer, which credentials have to fit into.
const LONGEST_CREDENTIALS: u64 = 16 * 1_024;

/// One step of [`Parser::next`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// More bytes are needed.
    Incomplete,
    /// A complete request, its value included.
    Request(Box<Request>),
    /// The peer does not speak this protocol: close without an answer.
    Close,
}

/// The incremental parser of one connection.
#[derive(Debug)]
pub(super) struct Parser {
    largest_item: usize,
    /// Whether commands are to be read rather than credentials.
    authenticated: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Line,
    /// A storage command waits for its value of so many bytes, CR LF included.
    Value {
        request: Box<Request>,
        length: usize,
    },
    /// So many bytes are discarded before the request is answered: memcached holds the answer back until then.
    Swallow {
        request: Box<Request>,
        remaining: usize,
    },
    /// Credentials of so many bytes are to come, CR LF included, after this line.
    Credentials {
        line: Bytes,
        length: usize,
    },
}

impl Parser {
    /// A parser for a server whose items may take `largest_item` bytes, counted like [`item_size`].
    /// Unless `authenticated`, it begins with credentials.
    pub(super) fn new(largest_item: usize, authenticated: bool) -> Self {
        Self {
            largest_item,
            authenticated,
            state: State::Line,
        }
    }

    /// Whether a command line was read whose value is still incomplete. memcached sends no reply meanwhile, not even
    /// those of earlier requests.
    pub(super) fn awaits_value(&self) -> bool {
        matches!(self.state, State::Value { .. } | State::Swallow { .. })
    }

    /// The bytes still missing from the value being read, as far as they have to be buffered.
    pub(super) fn missing(&self, buffered: usize) -> usize {
        match &self.state {
            State::Value { length, .. } => length.saturating_sub(buffered),
            State::Credentials { length, .. } => length.saturating_sub(buffered),
            State::Line | State::Swallow { .. } => 0,
        }
    }

    /// Takes the next request from the front of `input`, as a server of this manner reads it.
    pub(super) fn next(&mut self, input: &mut BytesMut, manner: &Manner) -> Parsed {
        loop {
            match std::mem::replace(&mut self.state, State::Line) {
                State::Line => match self.take_line(input, manner) {
                    ControlFlow::Continue(()) => {}
                    ControlFlow::Break(parsed) => return parsed,
                },
                State::Value {
                    mut request,
                    length,
                } => {
                    if input.len() < length {
                        self.state = State::Value { request, length };
                        return Parsed::Incomplete;
                    }
                    let data = input.split_to(length).freeze();
                    let value = data
                        .strip_suffix(b"\r\n")
                        .map(|value| data.slice_ref(value));
                    if value.is_none() && manner.dialect == Dialect::Proxy {
                        request.command = Command::Abort;
                    } else {
                        request
                            .command
                            .set_value(value.map_or(Value::Bad, Value::Data));
                    }
                    return Parsed::Request(request);
                }
                State::Swallow { request, remaining } => {
                    let swallowed = remaining.min(input.len());
                    input.advance(swallowed);
                    if swallowed == remaining {
                        return Parsed::Request(request);
                    }
                    self.state = State::Swallow {
                        request,
                        remaining: remaining - swallowed,
                    };
                    return Parsed::Incomplete;
                }
                State::Credentials { line, length } => {
                    if input.len() < length {
                        self.state = State::Credentials { line, length };
                        return Parsed::Incomplete;
                    }
                    let (answer, valid) = manner.authenticate(&input.split_to(length));
                    self.authenticated = valid;
                    return Parsed::Request(Box::new(Request {
                        name: "auth",
                        line,
                        command: Command::AnswerAlone(answer),
                    }));
                }
            }
        }
    }

    fn take_line(&mut self, input: &mut BytesMut, manner: &Manner) -> ControlFlow<Parsed> {
        if !self.authenticated && input.len() < 2 {
            return ControlFlow::Break(Parsed::Incomplete);
        }
        let Some(line_feed) = memchr::memchr(b'\n', input) else {
            let longest_get = if self.authenticated {
                LONGEST_GET_LINE
            } else {
                0
            };
            return ControlFlow::Break(if may_continue(input, longest_get) {
                Parsed::Incomplete
            } else {
                Parsed::Close
            });
        };
        let mut line = input.split_to(line_feed + 1).freeze();
        // A line of a mere CR keeps it, as in memcached; it is an error either way.
        let end = if line_feed > 1 && line[line_feed - 1] == b'\r' {
            line_feed - 1
        } else {
            line_feed
        };
        line.truncate(end);
        if !self.authenticated {
            return self.take_credentials_line(line);
        }
        let (name, parsed) = parse_line(&line, self.largest_item, manner);
        let request = |command| {
            Box::new(Request {
                name,
                line,
                command,
            })
        };
        match parsed {
            Line::Complete(command) => ControlFlow::Break(Parsed::Request(request(command))),
            Line::ThenValue(command, length) => {
                self.state = State::Value {
                    request: request(command),
                    length: length + 2,
                };
                ControlFlow::Continue(())
            }
            Line::ThenSwallow(command, remaining) => {
                self.state = State::Swallow {
                    request: request(command),
                    remaining,
                };
                ControlFlow::Continue(())
            }
        }
    }

    fn take_credentials_line(&mut self, line: Bytes) -> ControlFlow<Parsed> {
        match credentials_length(&line).map(|length| length.saturating_add(2)) {
            None => ControlFlow::Break(Parsed::Request(Box::new(Request {
                name: "unauthenticated",
                line,
                command: Command::AnswerAlone("CLIENT_ERROR unauthenticated"),
            }))),
            Some(length) if length > LONGEST_CREDENTIALS => ControlFlow::Break(Parsed::Close),
            Some(length) => {
                self.state = State::Credentials {
                    line,
                    length: length as usize,
                };
                ControlFlow::Continue(())
            }
        }
    }
}

/// Whether memcached waits for the rest of a line that begins like this.
fn may_continue(input: &[u8], longest_get: usize) -> bool {
    if input.len() <= LONGEST_UNFINISHED_LINE {
        return true;
    }
    let spaces = input.iter().take_while(|&&byte| byte == b' ').count();
    let verb = &input[spaces..];
    spaces <= 100
        && (verb.starts_with(b"get ") || verb.starts_with(b"gets "))
        && input.len() <= longest_get
}

/// Feeds `data` to a parser in pieces that `data` itself chooses, and asserts that memory stays bounded. For fuzzing.
#[doc(hidden)]
pub fn fuzz_server_parser(data: &[u8]) {
    const LARGEST_ITEM: usize = 4_096;
    let manner = Manner::default();
    let mut parser = Parser::new(LARGEST_ITEM, true);
    let mut input = BytesMut::new();
    let mut rest = data;
    while let Some((&size, tail)) = rest.split_first() {
        let (piece, tail) = tail.split_at((usize::from(size) * 9).min(tail.len()));
        input.extend_from_slice(piece);
        rest = tail;
        loop {
            let before = input.len();
            match parser.next(&mut input, &manner) {
                Parsed::Incomplete => break,
                Parsed::Request(_) => assert!(input.len() <= before, "the parser made up input"),
                Parsed::Close => return,
            }
        }
        assert!(
            parser.missing(input.len()) <= LARGEST_ITEM,
            "a value above the limit is waited for"
        );
        let bound = if parser.awaits_value() {
            LARGEST_ITEM
        } else {
            LONGEST_GET_LINE
        };
        assert!(input.len() <= bound, "{} bytes stay buffered", input.len());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse_all(pieces: &[&[u8]]) -> (Vec<Request>, usize) {
        let mut parser = Parser::new(300, true);
        let mut input = BytesMut::new();
        let mut requests = Vec::new();
        for piece in pieces {
            input.extend_from_slice(piece);
            loop {
                match parser.next(&mut input, &Manner::default()) {
                    Parsed::Incomplete => break,
                    Parsed::Request(request) => requests.push(*request),
                    Parsed::Close => return (requests, usize::MAX),
                }
            }
        }
        (requests, input.len())
    }

    fn lines() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            "(get|gets|gat 3|mg|md|ma|delete|touch|incr) [a-c]{1,3}( [a-zA-Z0-9=]{0,9}){0,4}",
            "(set|add|append|cas) [a-c] [0-9x]{1,2} -?[0-9]{1,2} [0-9]{1,3}( noreply| [0-9])?",
            "ms [a-c]{1,4} [0-9]{1,3}( [bckqOTCMFI][a-zA-Z0-9]{0,3}){0,4}",
            "[ -~]{0,40}",
        ];
        let chunk = prop_oneof![
            line.prop_map(String::into_bytes),
            proptest::collection::vec(any::<u8>(), 0..60),
        ];
        let ends = prop_oneof![Just(&b"\r\n"[..]), Just(&b"\n"[..])];
        proptest::collection::vec((chunk, ends), 0..12).prop_map(|lines| {
            lines
                .into_iter()
                .flat_map(|(line, end)| [line, end.to_vec()].concat())
                .collect()
        })
    }

    proptest! {
        #[test]
        fn a_split_at_any_byte_changes_nothing(stream in lines(), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..5)) {
            let whole = parse_all(&[&stream]);
            let single: Vec<&[u8]> = stream.chunks(1).collect();
            prop_assert_eq!(&parse_all(&single), &whole);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
            prop_assert_eq!(&parse_all(&pieces), &whole);
        }

        #[test]
        fn any_bytes_are_parsed_within_bounds(data in proptest::collection::vec(any::<u8>(), 0..6_000)) {
            fuzz_server_parser(&data);
        }

        #[test]
        fn plausible_bytes_are_parsed_within_bounds(data in lines()) {
            fuzz_server_parser(&data);
        }
    }

    #[test]
    fn a_huge_length_is_swallowed_without_being_buffered() {
        let mut parser = Parser::new(1 << 20, true);
        let mut input = BytesMut::from(&b"set k 0 0 2147483645\r\nabc"[..]);
        assert_eq!(
            parser.next(&mut input, &Manner::default()),
            Parsed::Incomplete
        );
        assert!(input.is_empty() && parser.awaits_value());
        assert_eq!(parser.missing(0), 0);
    }

    #[test]
    fn an_endless_line_closes_unless_it_is_a_multi_get() {
        let mut parser = Parser::new(1 << 20, true);
        assert_eq!(
            parser.next(&mut BytesMut::from(&[b'x'; 2_048][..]), &Manner::default()),
            Parsed::Incomplete
        );
        assert_eq!(
            parser.next(&mut BytesMut::from(&[b'x'; 2_049][..]), &Manner::default()),
            Parsed::Close
        );
        let get = [&b"get "[..], &b"k ".repeat(5_000)].concat();
        assert_eq!(
            parser.next(&mut BytesMut::from(&get[..]), &Manner::default()),
            Parsed::Incomplete
        );
        let endless = [&b"get "[..], &b"k ".repeat(600_000)].concat();
        assert_eq!(
            parser.next(&mut BytesMut::from(&endless[..]), &Manner::default()),
            Parsed::Close
        );
    }
}
