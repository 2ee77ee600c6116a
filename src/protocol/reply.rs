//! Bytes to replies. Nothing here knows what was asked; see [`Pipeline`](super::Pipeline) for that.

use bytes::{Buf as _, Bytes, BytesMut};
use memchr::memchr;

use super::{ABSURD_LENGTH, MAX_LINE, Violation};
use crate::error::{Error, ErrorKind, Sent};
use crate::response::LeaseState;

/// One reply, or one line of a longer one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// `VA`: a value.
    Value {
        header: Header,
        data: Bytes,
    },
    /// `VA` of more bytes than we take; they were skipped.
    TooLarge {
        header: Header,
        length: u64,
    },
    /// A meta reply without a value.
    Code {
        code: Code,
        header: Header,
    },
    /// `MN`: all replies to a quiet batch are out.
    BatchEnd,
    Version(String),
    Ok,
    Stat(String, String),
    StatsEnd,
    /// `ERROR`, `CLIENT_ERROR` or `SERVER_ERROR`. None of them carries an opaque.
    Failure(Failure, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// `HD`: done.
    Done,
    /// `EN`: a miss of `mg`.
    Miss,
    /// `NF`: not found.
    NotFound,
    /// `NS`: the condition of a write does not hold.
    NotStored,
    /// `EX`: another version is there.
    Exists,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    UnknownCommand,
    Client,
    Server,
}

/// What a memcached says in an `ERROR` line to a connection that is one too many, before it closes it.
pub(crate) const TOO_MANY_CONNECTIONS: &str = "Too many open connections";

impl Failure {
    /// What it is to whoever asked.
    pub(crate) fn error(self, text: String) -> Error {
        let kind = match self {
            // Said to a connection, not to a request.
            Self::UnknownCommand if text.contains(TOO_MANY_CONNECTIONS) => ErrorKind::Server,
            Self::UnknownCommand => ErrorKind::Unsupported,
            Self::Client if text.contains("non-numeric") => ErrorKind::NotANumber,
            Self::Client => ErrorKind::Rejected,
            Self::Server if text.contains("too large") => ErrorKind::ValueTooLarge,
            Self::Server => ErrorKind::Server,
        };
        let message = match kind {
            ErrorKind::Unsupported => "it does not know the command".to_owned(),
            _ => text,
        };
        Error::new(kind, message).with_sent(Sent::Yes)
    }
}

/// The flags of a meta reply that we asked for or must understand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) opaque: Option<u32>,
    pub(crate) client_flags: u32,
    pub(crate) cas: Option<u64>,
    /// The TTL that is left, in seconds; -1 is for ever.
    pub(crate) left: Option<i64>,
    /// `W` or `Z`: who has the lease on it. With an empty value it is a placeholder, which is a
    /// miss.
    pub(crate) lease: Option<LeaseState>,
    /// `X`: somebody has marked it as outdated, so it is a miss, too.
    pub(crate) outdated: bool,
}

impl Reply {
    /// Reads a line of those that both protocols have, and the end of a meta batch.
    pub(crate) fn classic(line: &[u8]) -> Option<Self> {
        let (word, rest) = split_word(line);
        Some(match word {
            b"MN" if rest.is_empty() => Self::BatchEnd,
            b"OK" if rest.is_empty() => Self::Ok,
            b"END" if rest.is_empty() => Self::StatsEnd,
            b"VERSION" => Self::Version(text(rest)),
            b"STAT" => {
                let (name, value) = split_word(rest);
                Self::Stat(text(name), text(value))
            }
            b"ERROR" => Self::Failure(Failure::UnknownCommand, text(rest)),
            b"CLIENT_ERROR" => Self::Failure(Failure::Client, text(rest)),
            b"SERVER_ERROR" => Self::Failure(Failure::Server, text(rest)),
            _ => return None,
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Value { .. } | Self::TooLarge { .. } => "VA",
            Self::Code { code, .. } => match code {
                Code::Done => "HD",
                Code::Miss => "EN",
                Code::NotFound => "NF",
                Code::NotStored => "NS",
                Code::Exists => "EX",
            },
            Self::BatchEnd => "MN",
            Self::Version(_) => "VERSION",
            Self::Ok => "OK",
            Self::Stat(..) => "STAT",
            Self::StatsEnd => "END",
            Self::Failure(Failure::UnknownCommand, _) => "ERROR",
            Self::Failure(Failure::Client, _) => "CLIENT_ERROR",
            Self::Failure(Failure::Server, _) => "SERVER_ERROR",
        }
    }
}

/// Cuts a byte stream into [`Reply`]s, whatever the pieces it arrives in.
#[derive(Debug)]
pub(crate) struct Parser {
    max_value: usize,
    state: State,
    /// How much of the buffer is known to hold no end of line, so that a slow drip of bytes is
    /// not searched again and again.
    searched: usize,
}

#[derive(Debug)]
enum State {
    Line,
    Value {
        header: Header,
        /// The line, with its end: it stays in the buffer until the value is whole.
        before: usize,
        length: usize,
    },
    Skip {
        header: Header,
        length: u64,
        left: u64,
    },
}

impl Parser {
    pub(crate) fn new(max_value: usize) -> Self {
        Self {
            max_value,
            state: State::Line,
            searched: 0,
        }
    }

    /// Takes the next whole reply off the front of `buffer`, or says that more bytes are needed.
    /// After an error the stream has no meaning any more.
    pub(crate) fn parse(&mut self, buffer: &mut BytesMut) -> Result<Option<Reply>, Violation> {
        loop {
            match self.state {
                State::Line => {
                    let Some((line, end)) = self.line(buffer)? else {
                        return Ok(None);
                    };
                    let (header, length) = match line {
                        Line::Whole(reply) => {
                            buffer.advance(end);
                            return Ok(Some(reply));
                        }
                        Line::Value { header, length } => (header, length),
                    };
                    if length > ABSURD_LENGTH {
                        return Err(Violation::AbsurdLength(length));
                    }
                    match usize::try_from(length) {
                        Ok(length) if length <= self.max_value => {
                            return self.value(buffer, header, end, length);
                        }
                        _ => {
                            buffer.advance(end);
                            self.state = State::Skip {
                                header,
                                length,
                                left: length + 2,
                            };
                        }
                    }
                }
                State::Value {
                    header,
                    before,
                    length,
                } => return self.value(buffer, header, before, length),
                State::Skip {
                    header,
                    length,
                    left,
                } => {
                    let skipped = left.min(buffer.len() as u64);
                    buffer.advance(skipped as usize);
                    let left = left - skipped;
                    if left > 0 {
                        self.state = State::Skip {
                            header,
                            length,
                            left,
                        };
                        return Ok(None);
                    }
                    self.state = State::Line;
                    return Ok(Some(Reply::TooLarge { header, length }));
                }
            }
        }
    }

    /// Takes a value of so many bytes, with the line before it, once it is there as a whole.
    #[inline]
    fn value(
        &mut self,
        buffer: &mut BytesMut,
        header: Header,
        before: usize,
        length: usize,
    ) -> Result<Option<Reply>, Violation> {
        let total = before + length + 2;
        if buffer.len() < total {
            self.state = State::Value {
                header,
                before,
                length,
            };
            // Bounded by max_value, checked before we came here.
            buffer.reserve(total - buffer.len());
            return Ok(None);
        }
        if buffer[before + length..total] != *b"\r\n" {
            return Err(Violation::UnterminatedValue);
        }
        self.state = State::Line;
        let data = take_value(buffer, before, length);
        Ok(Some(Reply::Value { header, data }))
    }

    /// The next line, and its length with its end.
    #[inline]
    fn line(&mut self, buffer: &[u8]) -> Result<Option<(Line, usize)>, Violation> {
        // Whoever takes all there is ends here.
        if buffer.is_empty() {
            return Ok(None);
        }
        if self.searched > 0 && find_line(buffer, &mut self.searched)?.is_none() {
            return Ok(None);
        }
        // A meta reply that is there as a whole is read without a search for its end.
        if let Some(found) = Line::meta(&buffer[..buffer.len().min(MAX_LINE + 1)]) {
            return Ok(Some(found));
        }
        let Some(length) = find_line(buffer, &mut self.searched)? else {
            return Ok(None);
        };
        let line = &buffer[..length];
        let reply = Reply::classic(line).ok_or_else(|| unparsable(line))?;
        Ok(Some((Line::Whole(reply), length + 2)))
    }
}

/// The length of the first line, without its end. `searched` bytes are known to hold no end of one.
pub(crate) fn find_line(buffer: &[u8], searched: &mut usize) -> Result<Option<usize>, Violation> {
    match memchr(b'\n', &buffer[*searched..]) {
        Some(found) => {
            let end = *searched + found;
            *searched = 0;
            if end > MAX_LINE {
                return Err(Violation::LineTooLong);
            }
            match end.checked_sub(1) {
                Some(line) if buffer[line] == b'\r' => Ok(Some(line)),
                _ => Err(unparsable(&buffer[..end])),
            }
        }
        None if buffer.len() > MAX_LINE => Err(Violation::LineTooLong),
        None => {
            *searched = buffer.len();
            Ok(None)
        }
    }
}

/// Values of at least so many bytes are cut out of the read buffer.
const CUT_OUT: usize = 32 * 1024;

/// A value that fills much of the buffer is cut out of it without copying; a small one is copied,
/// because holding on to it must not hold on to the whole buffer. What is before it goes.
fn take_value(buffer: &mut BytesMut, before: usize, length: usize) -> Bytes {
    if length >= CUT_OUT {
        buffer.advance(before);
        let data = buffer.split_to(length).freeze();
        buffer.advance(2);
        data
    } else {
        let data = Bytes::copy_from_slice(&buffer[before..before + length]);
        buffer.advance(before + length + 2);
        data
    }
}

pub(crate) fn unparsable(line: &[u8]) -> Violation {
    let shown = &line[..line.len().min(64)];
    Violation::Unparsable(shown.escape_ascii().to_string())
}

/// What is before the first space, and what behind it.
fn split_word(line: &[u8]) -> (&[u8], &[u8]) {
    match memchr(b' ', line) {
        Some(space) => (&line[..space], &line[space + 1..]),
        None => (line, &line[line.len()..]),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

enum Line {
    Whole(Reply),
    Value { header: Header, length: u64 },
}

impl Line {
    /// Reads a meta reply, and says how long it is with its end. `None` if it is none, or not whole.
    ///
    /// Flags we never ask for are refused, a key above all: such a reply is not an answer to us.
    #[inline]
    fn meta(bytes: &[u8]) -> Option<(Self, usize)> {
        let (word, mut rest) = bytes.split_first_chunk()?;
        let code = match word {
            b"VA" => None,
            b"HD" => Some(Code::Done),
            b"EN" => Some(Code::Miss),
            b"NF" => Some(Code::NotFound),
            b"NS" => Some(Code::NotStored),
            b"EX" => Some(Code::Exists),
            _ => return None,
        };
        let mut length = 0;
        if code.is_none() {
            rest = rest.strip_prefix(b" ")?;
            length = take_number(&mut rest)?;
        }
        let mut header = Header::default();
        loop {
            rest = match rest {
                [b'\r', b'\n', ..] => break,
                [b' ', flag @ ..] => header.take(flag)?,
                _ => return None,
            };
        }
        let line = match code {
            Some(code) => Self::Whole(Reply::Code { code, header }),
            None => Self::Value { header, length },
        };
        Some((line, bytes.len() - rest.len() + 2))
    }
}

impl Header {
    /// Takes a flag, and hands out what is behind it.
    #[inline]
    fn take<'a>(&mut self, flag: &'a [u8]) -> Option<&'a [u8]> {
        let (&name, mut rest) = flag.split_first()?;
        match name {
            // memcached ends some lines with a space.
            b' ' | b'\r' => return Some(flag),
            b'O' if self.opaque.is_none() => self.opaque = Some(take_number(&mut rest)?),
            b'f' => self.client_flags = take_number(&mut rest)?,
            b'c' => self.cas = Some(take_number(&mut rest)?),
            b't' => match rest.strip_prefix(b"-1") {
                Some(behind) => (self.left, rest) = (Some(-1), behind),
                None => self.left = Some(take_number(&mut rest)?),
            },
            b'W' => self.lease = Some(LeaseState::Won),
            // The winner is told of both if it asks again on the same item; that it has won goes first.
            b'Z' => self.lease = self.lease.or(Some(LeaseState::Taken)),
            b'X' => self.outdated = true,
            // The echo of a base64 key's flag.
            b'b' => {}
            _ => return None,
        }
        Some(rest)
    }
}

/// A decimal number with nothing around it.
pub(crate) fn number(mut digits: &[u8]) -> Option<u64> {
    let number = take_number(&mut digits)?;
    digits.is_empty().then_some(number)
}

/// Takes the decimal number, of at most 20 digits, that these begin with.
#[inline]
fn take_number<T: TryFrom<u64>>(bytes: &mut &[u8]) -> Option<T> {
    let (mut number, mut length) = (0u64, 0);
    while let Some(digit) = bytes.get(length).map(|byte| byte.wrapping_sub(b'0'))
        && digit <= 9
    {
        number = number.checked_mul(10)?.checked_add(u64::from(digit))?;
        length += 1;
    }
    *bytes = &bytes[length..];
    let number = number.try_into().ok();
    number.filter(|_| (1..=20).contains(&length))
}
