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
                    let Some(line) = self.line(buffer)? else {
                        return Ok(None);
                    };
                    let parsed = Line::parse(&buffer[..line]);
                    buffer.advance(line + 2);
                    match parsed? {
                        Line::Whole(reply) => return Ok(Some(reply)),
                        Line::Value { header, length } => {
                            self.state = self.expect_value(header, length)?;
                        }
                    }
                }
                State::Value { header, length } => {
                    let total = length + 2;
                    if buffer.len() < total {
                        // Bounded by max_value, checked before we came here.
                        buffer.reserve(total - buffer.len());
                        return Ok(None);
                    }
                    if buffer[length..total] != *b"\r\n" {
                        return Err(Violation::UnterminatedValue);
                    }
                    let data = take_value(buffer, length);
                    self.state = State::Line;
                    return Ok(Some(Reply::Value { header, data }));
                }
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

    fn expect_value(&self, header: Header, length: u64) -> Result<State, Violation> {
        if length > ABSURD_LENGTH {
            return Err(Violation::AbsurdLength(length));
        }
        Ok(match usize::try_from(length) {
            Ok(length) if length <= self.max_value => State::Value { header, length },
            _ => State::Skip {
                header,
                length,
                left: length + 2,
            },
        })
    }

    /// The length of the next line, without its end.
    fn line(&mut self, buffer: &BytesMut) -> Result<Option<usize>, Violation> {
        find_line(buffer, &mut self.searched)
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
/// because holding on to it must not hold on to the whole buffer.
fn take_value(buffer: &mut BytesMut, length: usize) -> Bytes {
    if length >= CUT_OUT {
        let data = buffer.split_to(length).freeze();
        buffer.advance(2);
        data
    } else {
        let data = Bytes::copy_from_slice(&buffer[..length]);
        buffer.advance(length + 2);
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
    fn parse(line: &[u8]) -> Result<Self, Violation> {
        let (word, rest) = split_word(line);
        let code = match word {
            b"VA" => {
                let (length, flags) = split_word(rest);
                return Ok(Self::Value {
                    length: number(length).ok_or_else(|| unparsable(line))?,
                    header: header(flags).ok_or_else(|| unparsable(line))?,
                });
            }
            b"HD" => Code::Done,
            b"EN" => Code::Miss,
            b"NF" => Code::NotFound,
            b"NS" => Code::NotStored,
            b"EX" => Code::Exists,
            _ => {
                let reply = Reply::classic(line).ok_or_else(|| unparsable(line))?;
                return Ok(Self::Whole(reply));
            }
        };
        let header = header(rest).ok_or_else(|| unparsable(line))?;
        Ok(Self::Whole(Reply::Code { code, header }))
    }
}

/// The flags behind a meta reply. Flags we never ask for are refused, a key above all: such a
/// reply is not an answer to us.
fn header(flags: &[u8]) -> Option<Header> {
    let mut header = Header::default();
    for flag in flags.split(|&byte| byte == b' ') {
        match flag {
            // memcached ends some lines with a space.
            [] => {}
            [b'O', digits @ ..] if header.opaque.is_none() => {
                header.opaque = Some(u32::try_from(number(digits)?).ok()?);
            }
            [b'f', digits @ ..] => header.client_flags = u32::try_from(number(digits)?).ok()?,
            [b'c', digits @ ..] => header.cas = Some(number(digits)?),
            [b't', b'-', b'1'] => header.left = Some(-1),
            [b't', digits @ ..] => header.left = Some(i64::try_from(number(digits)?).ok()?),
            b"W" => header.lease = Some(LeaseState::Won),
            // The winner is told of both if it asks again on the same item; that it has won goes first.
            b"Z" => header.lease = header.lease.or(Some(LeaseState::Taken)),
            b"X" => header.outdated = true,
            // The echo of a base64 key's flag.
            b"b" => {}
            _ => return None,
        }
    }
    Some(header)
}

/// A decimal number with nothing around it.
pub(crate) fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits.len() > 20 {
        return None;
    }
    digits.iter().try_fold(0u64, |number, byte| {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}
