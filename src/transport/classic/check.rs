//! What may be the answer to one request, as a state machine without I/O.
//!
//! The classic protocol numbers nothing: a reply says only in part, or not at all, what it answers. So
//! each byte is checked against the request before anybody acts on it, and what is read by others
//! (memcache-async) is said to them anew: a value's key is the place of its key in the request, its
//! length one that was checked, its flags 0. What they would drop is kept in [`Values`].

use std::collections::{BTreeMap, HashMap};

use bytes::{Buf as _, BytesMut};

use crate::error::{Error, ErrorKind, Sent};
use crate::key::Key;
use crate::protocol::{
    ABSURD_LENGTH, Failure, MAX_STATS, Reply, TOO_MANY_CONNECTIONS, Violation, find_line, number,
    unparsable,
};
use crate::request::{Operation, StoreMode};
use crate::response::{CasOutcome, Response};

/// Why an answer ends before its end.
#[derive(Debug)]
pub(super) enum Stop {
    /// The server says no. `spoilt`: what it says behind that cannot be told from an answer to
    /// something else.
    Failed {
        error: Error,
        spoilt: bool,
    },
    Violated(Violation),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Self {
        Self::Violated(violation)
    }
}

#[derive(Debug)]
pub(super) struct Check<'a> {
    max_value: usize,
    asked: Asked<'a>,
    state: State,
    /// How much of the input is known to hold no end of a line.
    searched: usize,
    /// What was checked and is to be read by memcache-async, in its words.
    approved: BytesMut,
    /// A line of it has come that is not a failure.
    accepted: bool,
}

#[derive(Debug)]
enum Asked<'a> {
    Values(Values<'a>),
    Store(StoreMode),
    Swap,
    Delete,
    Touch,
    Counter,
    Version,
    FlushAll,
    Stats(BTreeMap<String, String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first half of a get-and-touch.
    Touch,
    Line,
    /// So many bytes of a value belong to whoever reads it.
    Data(usize),
    /// So many bytes of a value are too many for us.
    Skip(u64),
    /// The end of the line behind a value; it is approved if the value was.
    DataEnd {
        approve: bool,
    },
    Done,
}

/// Values that were asked for, and what has come of each but for its bytes.
#[derive(Debug)]
pub(super) struct Values<'a> {
    keys: &'a [Key],
    with_cas: bool,
    chains: Option<Chains<'a>>,
    pub(super) arrived: Vec<Arrived>,
    /// If it was to be touched first: whether there was something.
    touched: Option<bool>,
    /// What the touch was answered with. The values behind it still come.
    touch_failed: Option<Error>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    Nothing,
    Value {
        flags: u32,
        cas: Option<u64>,
    },
    /// A value of so many bytes was skipped.
    TooLarge(u64),
}

/// Where each key is asked for that has not come yet. A proxy may answer in another order than a
/// server does.
#[derive(Debug)]
struct Chains<'a> {
    /// The first place.
    first: HashMap<&'a [u8], usize>,
    /// For each place the next one of the same key.
    next: Vec<Option<usize>>,
}

impl<'a> Chains<'a> {
    fn new(keys: &'a [Key]) -> Self {
        let mut chains = Self {
            first: HashMap::with_capacity(keys.len()),
            next: vec![None; keys.len()],
        };
        for (place, key) in keys.iter().enumerate().rev() {
            chains.next[place] = chains.first.insert(key.as_bytes(), place);
        }
        chains
    }

    fn take(&mut self, key: &[u8]) -> Option<usize> {
        let first = self.first.get_mut(key)?;
        let place = *first;
        match self.next[place] {
            Some(next) => *first = next,
            None => {
                self.first.remove(key);
            }
        }
        Some(place)
    }
}

impl<'a> Values<'a> {
    fn new(keys: &'a [Key], with_cas: bool) -> Self {
        Self {
            keys,
            with_cas,
            chains: (keys.len() > 1).then(|| Chains::new(keys)),
            arrived: vec![Arrived::Nothing; keys.len()],
            touched: None,
            touch_failed: None,
        }
    }

    /// Whether there was something to touch.
    pub(super) fn touched(&self) -> Option<bool> {
        self.touched
    }

    fn take(&mut self, key: &[u8]) -> Option<usize> {
        match &mut self.chains {
            Some(chains) => chains.take(key),
            None => {
                let open = self.arrived.first() == Some(&Arrived::Nothing);
                (open && self.keys.first()?.as_bytes() == key).then_some(0)
            }
        }
    }

    /// `<key> <flags> <bytes>[ <cas>]`: whose value it is, its flags, length and version.
    fn header(&mut self, fields: &[u8]) -> Option<(usize, u32, u64, Option<u64>)> {
        let mut fields = fields.split(|&byte| byte == b' ');
        let key = fields.next()?;
        let flags = u32::try_from(number(fields.next()?)?).ok()?;
        let length = number(fields.next()?)?;
        let cas = match self.with_cas {
            true => Some(number(fields.next()?)?),
            false => None,
        };
        match fields.next() {
            None => Some((self.take(key)?, flags, length, cas)),
            Some(_) => None,
        }
    }
}

impl<'a> Check<'a> {
    /// Of what answers `operation`, with values of up to `max_value` bytes.
    pub(super) fn new(operation: &'a Operation, max_value: usize) -> Self {
        let asked = match operation {
            Operation::Get { key, with_cas } => {
                Asked::Values(Values::new(std::slice::from_ref(key), *with_cas))
            }
            Operation::GetAndTouch { key, .. } => {
                Asked::Values(Values::new(std::slice::from_ref(key), false))
            }
            Operation::GetMany { keys } => Asked::Values(Values::new(keys, false)),
            Operation::Lookup { key, .. } => {
                Asked::Values(Values::new(std::slice::from_ref(key), true))
            }
            Operation::Store { mode, .. } => Asked::Store(*mode),
            Operation::CompareAndSwap { .. } => Asked::Swap,
            Operation::Delete { .. } => Asked::Delete,
            Operation::Touch { .. } => Asked::Touch,
            Operation::Arithmetic { .. } => Asked::Counter,
            Operation::Version => Asked::Version,
            Operation::FlushAll => Asked::FlushAll,
            Operation::Stats => Asked::Stats(BTreeMap::new()),
        };
        let state = match operation {
            Operation::GetAndTouch { .. } => State::Touch,
            _ => State::Line,
        };
        Self {
            max_value,
            asked,
            state,
            searched: 0,
            approved: BytesMut::new(),
            accepted: false,
        }
    }

    /// The answer has come in full.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// A line of it has come that is not a failure.
    pub(super) fn accepted(&self) -> bool {
        self.accepted
    }

    /// Two commands were sent, of which none is answered.
    pub(super) fn is_two(&self) -> bool {
        self.state == State::Touch
    }

    /// What memcache-async may read, before anything else of the input.
    pub(super) fn approved(&mut self) -> &mut BytesMut {
        &mut self.approved
    }

    /// How many bytes of a value are next, for memcache-async to read once it has read what is
    /// [approved](Self::approved).
    pub(super) fn data(&self) -> usize {
        match self.state {
            State::Data(left) => left,
            _ => 0,
        }
    }

    /// So many of them were handed on.
    pub(super) fn took(&mut self, bytes: usize) {
        if let State::Data(left) = &mut self.state {
            *left -= bytes;
        }
    }

    /// The values asked for, if any.
    pub(super) fn values(&self) -> Option<&Values<'a>> {
        match &self.asked {
            Asked::Values(values) => Some(values),
            _ => None,
        }
    }

    /// Whether the line in `input` says that the server does not take the value that is on its way
    /// to it as one. What is sent after that are commands.
    pub(super) fn refuses(&self, input: &[u8]) -> bool {
        self.sends_value()
            && [&b"ERROR"[..], b"CLIENT_ERROR"]
                .iter()
                .any(|word| input.starts_with(word))
    }

    fn sends_value(&self) -> bool {
        matches!(self.asked, Asked::Store(_) | Asked::Swap)
    }

    fn name(&self) -> &'static str {
        match &self.asked {
            Asked::Values(values) if values.keys.len() > 1 => "a multi-key read",
            Asked::Values(_) => "a read",
            Asked::Store(_) | Asked::Swap => "a write",
            Asked::Delete => "a delete",
            Asked::Touch => "a touch",
            Asked::Counter => "arithmetic",
            Asked::Version => "version",
            Asked::FlushAll => "flush_all",
            Asked::Stats(_) => "stats",
        }
    }

    /// Takes what it can off the front of `input`: until there is something for memcache-async to
    /// read, the answer is complete, or more bytes are needed. Hands out the answer to a request
    /// that is not memcache-async's.
    pub(super) fn advance(&mut self, input: &mut BytesMut) -> Result<Option<Response>, Stop> {
        loop {
            match self.state {
                State::Touch | State::Line => {
                    let Some(length) = find_line(input, &mut self.searched)? else {
                        return Ok(None);
                    };
                    let outcome = self.line(&input[..length]);
                    input.advance(length + 2);
                    let response = outcome?;
                    self.accepted = true;
                    if response.is_some() {
                        return Ok(response);
                    }
                }
                State::Data(0) => self.state = State::DataEnd { approve: true },
                State::Skip(0) => self.state = State::DataEnd { approve: false },
                State::Skip(left) => {
                    let skipped = left.min(input.len() as u64);
                    input.advance(skipped as usize);
                    self.state = State::Skip(left - skipped);
                    if left > skipped {
                        return Ok(None);
                    }
                }
                State::DataEnd { approve } => {
                    let end = &input[..input.len().min(2)];
                    if !b"\r\n".starts_with(end) {
                        return Err(Violation::UnterminatedValue.into());
                    }
                    if end.len() < 2 {
                        return Ok(None);
                    }
                    input.advance(2);
                    if approve {
                        self.approve(b"\r\n");
                    }
                    self.state = State::Line;
                }
                State::Data(_) | State::Done => return Ok(None),
            }
        }
    }

    fn approve(&mut self, text: &[u8]) {
        self.approved.extend_from_slice(text);
    }

    /// The answer in full, for memcache-async to read.
    fn pass(&mut self, line: &[u8]) -> Option<Response> {
        self.approve(line);
        self.approve(b"\r\n");
        self.state = State::Done;
        None
    }

    fn line(&mut self, line: &[u8]) -> Result<Option<Response>, Stop> {
        if self.state == State::Touch {
            self.state = State::Line;
            return self.touch(line).map(|()| None);
        }
        let response = match (&mut self.asked, line) {
            (Asked::Values(_), b"END") => return self.values_end(line),
            (Asked::Values(_), _) if line.starts_with(b"VALUE ") => {
                return self.value(line).map(|()| None);
            }
            (Asked::Store(_), b"STORED") => Response::Stored(true),
            // To a set it would mean that an old value is still there.
            (Asked::Store(mode), b"NOT_STORED") if *mode != StoreMode::Set => {
                Response::Stored(false)
            }
            (Asked::Swap, b"STORED") => Response::Swapped(CasOutcome::Stored),
            (Asked::Swap, b"EXISTS") => Response::Swapped(CasOutcome::Exists),
            (Asked::Swap, b"NOT_FOUND") => Response::Swapped(CasOutcome::NotFound),
            (Asked::Delete, b"DELETED") => Response::Deleted(true),
            (Asked::Delete, b"NOT_FOUND") => Response::Deleted(false),
            (Asked::Touch, b"TOUCHED") => Response::Touched(true),
            (Asked::Touch, b"NOT_FOUND") => Response::Touched(false),
            (Asked::Counter, b"NOT_FOUND") | (Asked::FlushAll, b"OK") => return Ok(self.pass(line)),
            (Asked::Counter, _) if number(without_spaces(line)).is_some() => {
                return Ok(self.pass(without_spaces(line)));
            }
            (asked, _) => match (asked, Reply::classic(line)) {
                (Asked::Version, Some(Reply::Version(version))) => {
                    return Ok(self.pass(format!("VERSION {version}").as_bytes()));
                }
                (Asked::Stats(stats), Some(Reply::Stat(name, counter)))
                    if stats.len() < MAX_STATS && !stats.contains_key(&name) =>
                {
                    stats.insert(name, counter);
                    return Ok(None);
                }
                (Asked::Stats(stats), Some(Reply::StatsEnd)) => {
                    Response::Stats(std::mem::take(stats))
                }
                (_, Some(Reply::Failure(failure, text))) => {
                    let spoilt = self.spoils(failure, &text);
                    self.state = State::Done;
                    let error = self.failed(failure, text);
                    return Err(Stop::Failed { error, spoilt });
                }
                _ => return Err(self.misfit(line).into()),
            },
        };
        self.state = State::Done;
        Ok(Some(response))
    }

    fn value(&mut self, line: &[u8]) -> Result<(), Stop> {
        let Asked::Values(values) = &mut self.asked else {
            return Err(self.misfit(line).into());
        };
        let Some((place, flags, length, cas)) = values.header(&line[b"VALUE ".len()..]) else {
            return Err(unparsable(line).into());
        };
        if length > ABSURD_LENGTH {
            return Err(Violation::AbsurdLength(length).into());
        }
        match usize::try_from(length) {
            Ok(length) if length <= self.max_value => {
                values.arrived[place] = Arrived::Value { flags, cas };
                let mut header = format!("VALUE {place} 0 {length}");
                if let Some(cas) = cas {
                    header.push_str(&format!(" {cas}"));
                }
                self.approve(header.as_bytes());
                self.approve(b"\r\n");
                self.state = State::Data(length);
            }
            _ => {
                values.arrived[place] = Arrived::TooLarge(length);
                self.state = State::Skip(length);
            }
        }
        Ok(())
    }

    fn values_end(&mut self, line: &[u8]) -> Result<Option<Response>, Stop> {
        if let Asked::Values(values) = &mut self.asked
            && let Some(error) = values.touch_failed.take()
        {
            self.state = State::Done;
            let spoilt = false;
            return Err(Stop::Failed { error, spoilt });
        }
        Ok(self.pass(line))
    }

    /// The answer to the touch that goes before a get.
    fn touch(&mut self, line: &[u8]) -> Result<(), Stop> {
        if let Asked::Values(values) = &mut self.asked {
            values.touched = Some(line == b"TOUCHED");
        }
        let error = match (line, Reply::classic(line)) {
            (b"TOUCHED" | b"NOT_FOUND", _) => return Ok(()),
            (_, Some(Reply::Failure(failure, text))) => self.failed(failure, text),
            _ => return Err(self.misfit(line).into()),
        };
        if let Asked::Values(values) = &mut self.asked {
            values.touch_failed = Some(error);
        }
        Ok(())
    }

    /// Whether nothing that comes after this failure can be trusted.
    fn spoils(&self, failure: Failure, text: &str) -> bool {
        let spoilt = match &self.asked {
            // The value's bytes are commands to it, and each of them gets a reply.
            Asked::Store(_) | Asked::Swap => failure != Failure::Server,
            // Behind a value: is it the end of the answer, or does `END` follow? And twemproxy closes
            // the connection right behind an error that answers more than one key.
            Asked::Values(values) => {
                let begun = values.arrived.iter().any(|one| *one != Arrived::Nothing);
                begun || values.keys.len() > 1
            }
            Asked::Stats(stats) => !stats.is_empty(),
            _ => false,
        };
        spoilt || text.contains(TOO_MANY_CONNECTIONS)
    }

    fn failed(&self, failure: Failure, text: String) -> Error {
        let error = failure.error(text);
        let writes = match &self.asked {
            Asked::Values(values) => values.touched.is_some(),
            Asked::Version | Asked::Stats(_) => false,
            _ => true,
        };
        // A memcached that says so has not done it. A proxy may say that its server did not answer.
        let own = error.kind() != ErrorKind::Server
            || error
                .message()
                .to_ascii_lowercase()
                .contains("out of memory");
        match writes && !own {
            true => error.with_sent(Sent::Maybe),
            false => error,
        }
    }

    /// A line that does not answer what was asked.
    fn misfit(&self, line: &[u8]) -> Violation {
        const WORDS: [&str; 6] = [
            "STORED",
            "NOT_STORED",
            "EXISTS",
            "NOT_FOUND",
            "DELETED",
            "TOUCHED",
        ];
        let word = WORDS.into_iter().find(|word| word.as_bytes() == line);
        match word.or_else(|| Reply::classic(line).map(|reply| reply.name())) {
            Some(found) => Violation::WrongKind {
                request: self.name(),
                found,
            },
            None => unparsable(line),
        }
    }
}

/// decr leaves spaces behind a number that got shorter.
fn without_spaces(line: &[u8]) -> &[u8] {
    let last = line.iter().rposition(|&byte| byte != b' ');
    &line[..last.map_or(0, |last| last + 1)]
}
