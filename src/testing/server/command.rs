//! What a command line asks for: memcached 1.6.18's grammar, with its order of checks and its error texts.
//!
//! Whether a value follows a line depends on how far memcached gets with it: some malformed storage commands swallow
//! their value, others leave it in the stream, where it is executed as commands. [`Line`] says which.

use bytes::Bytes;

use super::literal::{decode_key, signed, unsigned};
use super::manner::{Dialect, Manner};
use super::meta::{Meta, OPAQUE_TOO_LONG};
use super::store::item_size;

/// memcached's limit on keys as they stand in the request, so on the base64 text of a binary key.
const LONGEST_KEY: usize = 250;
/// Tokens that memcached splits a line into, the terminator it counts as a token included.
const MOST_TOKENS: usize = 24;
/// Tokens of a meta command (the terminator included) that memcached accepts.
const MOST_META_TOKENS: usize = 20;
pub(super) const BAD_FORMAT: &str = "CLIENT_ERROR bad command line format";

/// A command line and what it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The command's name, or "unknown".
    pub(super) name: &'static str,
    /// The line without its CR LF.
    pub(super) line: Bytes,
    pub(super) command: Command,
}

/// A command that needs the store, or a reply that does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Answer this line; nothing is executed.
    Answer(&'static str),
    /// Answer this line, in the place of all that is not flushed: to a connection that is not authenticated.
    AnswerAlone(&'static str),
    /// An error that `noreply` hides.
    Silence,
    Get(Get),
    Store(Store),
    Delete {
        key: Bytes,
        noreply: bool,
    },
    Arithmetic {
        key: Bytes,
        increment: bool,
        delta: u64,
        noreply: bool,
    },
    Touch {
        key: Bytes,
        expiry: i32,
        noreply: bool,
    },
    FlushAll {
        delay: i32,
        noreply: bool,
    },
    Version,
    Stats(StatsOf),
    /// `mn`: an answer that also flushes everything answered so far.
    Noop,
    MetaDebug {
        key: Bytes,
    },
    MetaGet(Meta),
    MetaStore(MetaStore),
    MetaDelete(Meta),
    MetaArithmetic(Meta),
    /// `quit`: close once everything is written.
    Quit,
    /// A browser, or what a proxy cannot forward: close at once.
    Abort,
}

/// `get`, `gets`, `gat`, `gats`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Get {
    pub(super) keys: Vec<Bytes>,
    /// One key was too long: the keys before it are fetched in vain, and all unflushed replies are lost.
    pub(super) overlong: bool,
    pub(super) with_cas: bool,
    pub(super) expiry: Option<i32>,
}

/// How a value is to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Set,
    Add,
    Replace,
    Append,
    Prepend,
    Cas,
}

/// What came after the line of a storage command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Data(Bytes),
    /// Not followed by CR LF.
    Bad,
    /// Swallowed.
    TooLarge,
}

/// `set`, `add`, `replace`, `append`, `prepend`, `cas`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Store {
    pub(super) mode: Mode,
    pub(super) key: Bytes,
    pub(super) client_flags: u32,
    pub(super) expiry: i32,
    pub(super) cas: u64,
    pub(super) noreply: bool,
    pub(super) value: Value,
}

/// `ms`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MetaStore {
    pub(super) meta: Meta,
    pub(super) mode: Mode,
    pub(super) value: Value,
}

/// What `stats` was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatsOf {
    General,
    Settings,
    /// A known group whose values would mean nothing here: an empty answer.
    Empty,
}

/// A parsed line.
pub(super) enum Line {
    Complete(Command),
    /// The command with [`Value::Bad`] in the place of the value that follows; the length is without CR LF.
    ThenValue(Command, usize),
    /// The command is answered after so many bytes, CR LF included, were discarded.
    ThenSwallow(Command, usize),
}

impl Command {
    pub(super) fn set_value(&mut self, received: Value) {
        match self {
            Self::Store(Store { value, .. }) | Self::MetaStore(MetaStore { value, .. }) => {
                *value = received
            }
            _ => {}
        }
    }
}

/// A line's tokens. memcached counts the terminator as a token and stops at 24; the `get` family reads on.
struct Tokens {
    words: Vec<Bytes>,
}

impl Tokens {
    fn split(line: &Bytes) -> Self {
        // memcached handles the line as a C string.
        let text = &line[..memchr::memchr(0, line).unwrap_or(line.len())];
        let words = text
            .split(|&byte| byte == b' ')
            .filter(|word| !word.is_empty())
            .map(|word| line.slice_ref(word));
        Self {
            words: words.collect(),
        }
    }

    fn count(&self) -> usize {
        (self.words.len() + 1).min(MOST_TOKENS)
    }

    /// `noreply` counts wherever it is the last token, even as a key.
    fn noreply(&self) -> bool {
        self.words.len() < MOST_TOKENS
            && self
                .words
                .last()
                .is_some_and(|word| &word[..] == b"noreply")
    }
}

/// What a line asks a server of this manner for, and the name of the command.
pub(super) fn parse_line(
    line: &Bytes,
    largest_item: usize,
    manner: &Manner,
) -> (&'static str, Line) {
    let tokens = Tokens::split(line);
    let verb: &[u8] = tokens.words.first().map_or(b"", |word| word);
    let (name, parsed) = if manner.knows(verb) {
        parse_command(verb, &tokens, largest_item)
    } else {
        ("unknown", Line::Complete(Command::Answer("ERROR")))
    };
    if manner.dialect == Dialect::Proxy && !is_forwarded(&tokens.words, &parsed) {
        return (name, Line::Complete(Command::Abort));
    }
    (name, parsed)
}

/// Whether a proxy can parse it: it is stricter than memcached, and closes the connection where that answers an error.
fn is_forwarded(words: &[Bytes], parsed: &Line) -> bool {
    let are_digits = |words: &[Bytes]| words.iter().flatten().all(u8::is_ascii_digit);
    match parsed {
        Line::Complete(Command::Answer(_) | Command::Silence) => false,
        Line::Complete(Command::Get(get)) => !get.overlong,
        Line::Complete(Command::Delete { noreply, .. }) => words.len() == 2 + usize::from(*noreply),
        Line::Complete(Command::Arithmetic { .. }) => are_digits(&words[2..3]),
        Line::Complete(Command::Version | Command::Quit) => words.len() == 1,
        Line::Complete(_) => true,
        Line::ThenValue(..) | Line::ThenSwallow(..) => are_digits(&words[2..5]),
    }
}

/// The length of the credentials that follow, if the line announces any: it has the shape of a `set`, whatever its key,
/// flags and expiry are.
pub(super) fn credentials_length(line: &Bytes) -> Option<u64> {
    let Tokens { words } = Tokens::split(line);
    let announces = words.len() > 4 && words[0] == "set";
    announces.then(|| unsigned(&words[4])).flatten()
}

fn parse_command(verb: &[u8], tokens: &Tokens, largest_item: usize) -> (&'static str, Line) {
    if verb.len() < 2 {
        return ("unknown", Line::Complete(Command::Answer("ERROR")));
    }
    let count = tokens.count();
    let words = &tokens.words[..];
    let wrong_count = Line::Complete(Command::Answer("ERROR"));
    let store = |mode| parse_store(mode, tokens, largest_item);
    match verb {
        b"mg" if count < 3 => ("mg", wrong_count),
        b"mg" => ("mg", Line::Complete(parse_meta_get(words))),
        b"ms" if count < 3 => ("ms", wrong_count),
        b"ms" => ("ms", parse_meta_store(words, largest_item)),
        b"md" if count < 3 => ("md", wrong_count),
        b"md" => (
            "md",
            Line::Complete(
                parse_meta_write(words).map_or_else(Command::Answer, Command::MetaDelete),
            ),
        ),
        b"ma" if count < 3 => ("ma", wrong_count),
        b"ma" => (
            "ma",
            Line::Complete(
                parse_meta_write(words).map_or_else(Command::Answer, Command::MetaArithmetic),
            ),
        ),
        b"mn" => ("mn", Line::Complete(Command::Noop)),
        b"me" => ("me", Line::Complete(parse_meta_debug(words))),
        b"get" | b"gets" | b"gat" | b"gats" | b"bget" if count < 3 => (get_name(verb), wrong_count),
        b"get" | b"gets" | b"gat" | b"gats" | b"bget" => {
            (get_name(verb), Line::Complete(parse_get(verb, words)))
        }
        b"set" if matches!(count, 6 | 7) => ("set", store(Mode::Set)),
        b"add" if matches!(count, 6 | 7) => ("add", store(Mode::Add)),
        b"replace" if matches!(count, 6 | 7) => ("replace", store(Mode::Replace)),
        b"append" if matches!(count, 6 | 7) => ("append", store(Mode::Append)),
        b"prepend" if matches!(count, 6 | 7) => ("prepend", store(Mode::Prepend)),
        b"cas" if matches!(count, 7 | 8) => ("cas", store(Mode::Cas)),
        b"incr" if matches!(count, 4 | 5) => {
            ("incr", Line::Complete(parse_arithmetic(tokens, true)))
        }
        b"decr" if matches!(count, 4 | 5) => {
            ("decr", Line::Complete(parse_arithmetic(tokens, false)))
        }
        b"touch" if matches!(count, 4 | 5) => ("touch", Line::Complete(parse_touch(tokens))),
        b"delete" if matches!(count, 3..=5) => ("delete", Line::Complete(parse_delete(tokens))),
        b"flush_all" if matches!(count, 2..=4) => {
            ("flush_all", Line::Complete(parse_flush_all(tokens)))
        }
        b"verbosity" if matches!(count, 3 | 4) => {
            ("verbosity", Line::Complete(parse_verbosity(tokens)))
        }
        b"version" => ("version", Line::Complete(Command::Version)),
        b"stats" => ("stats", Line::Complete(parse_stats(words))),
        b"quit" => ("quit", Line::Complete(Command::Quit)),
        b"shutdown" => (
            "shutdown",
            Line::Complete(Command::Answer("ERROR: shutdown not enabled")),
        ),
        _ => ("unknown", Line::Complete(unknown(verb, words))),
    }
}

fn get_name(verb: &[u8]) -> &'static str {
    match verb {
        b"gets" => "gets",
        b"gat" => "gat",
        b"gats" => "gats",
        b"bget" => "bget",
        _ => "get",
    }
}

/// memcached closes on what looks like a browser's request, unless the first letter made it look for its own commands.
fn unknown(verb: &[u8], words: &[Bytes]) -> Command {
    let own_letter = matches!(verb[0], b'g' | b's' | b'a' | b'c' | b'i' | b'd' | b't')
        || (verb[0] == b'm' && verb.len() == 2);
    let last = &words[words.len().min(MOST_TOKENS - 1) - 1];
    if !own_letter && last.starts_with(b"HTTP/") {
        Command::Abort
    } else {
        Command::Answer("ERROR")
    }
}

fn parse_get(verb: &[u8], words: &[Bytes]) -> Command {
    let touches = verb.starts_with(b"gat");
    let expiry = match touches.then(|| signed(&words[1])) {
        None => None,
        Some(Some(expiry)) => Some(expiry),
        Some(None) => return Command::Answer("CLIENT_ERROR invalid exptime argument"),
    };
    let keys = &words[if touches { 2 } else { 1 }..];
    let overlong = keys.iter().position(|key| key.len() > LONGEST_KEY);
    Command::Get(Get {
        keys: keys[..overlong.unwrap_or(keys.len())].to_vec(),
        overlong: overlong.is_some(),
        with_cas: verb.ends_with(b"s"),
        expiry,
    })
}

/// An error that is left out under `noreply`.
fn client_error(message: &'static str, noreply: bool) -> Command {
    if noreply {
        Command::Silence
    } else {
        Command::Answer(message)
    }
}

fn parse_store(mode: Mode, tokens: &Tokens, largest_item: usize) -> Line {
    let words = &tokens.words;
    let noreply = tokens.noreply();
    // Nothing is swallowed after these: memcached goes on to execute the value. That is its behaviour, and a trap.
    let bad = Line::Complete(client_error(BAD_FORMAT, noreply));
    let key = words[1].clone();
    if key.len() > LONGEST_KEY {
        return bad;
    }
    let (Some(client_flags), Some(expiry), Some(length)) =
        (unsigned(&words[2]), signed(&words[3]), signed(&words[4]))
    else {
        return bad;
    };
    let cas = if mode == Mode::Cas {
        unsigned(&words[5])
    } else {
        Some(0)
    };
    let (Some(cas), Some(length)) = (cas, value_length(length)) else {
        return bad;
    };
    // The client flags are read as 64 bits and silently cut to 32.
    let client_flags = client_flags as u32;
    let store = |value| {
        Command::Store(Store {
            mode,
            key: key.clone(),
            client_flags,
            expiry,
            cas,
            noreply,
            value,
        })
    };
    if item_size(key.len(), length, client_flags) > largest_item {
        return Line::ThenSwallow(store(Value::TooLarge), length + 2);
    }
    Line::ThenValue(store(Value::Bad), length)
}

/// A value's length, if memcached accepts it as one.
fn value_length(length: i32) -> Option<usize> {
    usize::try_from(length)
        .ok()
        .filter(|_| length <= i32::MAX - 2)
}

fn parse_arithmetic(tokens: &Tokens, increment: bool) -> Command {
    let noreply = tokens.noreply();
    let key = tokens.words[1].clone();
    if key.len() > LONGEST_KEY {
        return client_error(BAD_FORMAT, noreply);
    }
    match unsigned(&tokens.words[2]) {
        Some(delta) => Command::Arithmetic {
            key,
            increment,
            delta,
            noreply,
        },
        None => client_error("CLIENT_ERROR invalid numeric delta argument", noreply),
    }
}

fn parse_touch(tokens: &Tokens) -> Command {
    let noreply = tokens.noreply();
    let key = tokens.words[1].clone();
    if key.len() > LONGEST_KEY {
        return client_error(BAD_FORMAT, noreply);
    }
    match signed(&tokens.words[2]) {
        Some(expiry) => Command::Touch {
            key,
            expiry,
            noreply,
        },
        None => client_error("CLIENT_ERROR invalid exptime argument", noreply),
    }
}

fn parse_delete(tokens: &Tokens) -> Command {
    const USAGE: &str = "CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]";
    let words = &tokens.words;
    let mut noreply = false;
    if words.len() > 2 {
        // A delay of 0 is what is left of an ancient syntax.
        let no_delay = &words[2][..] == b"0";
        noreply = tokens.noreply();
        let valid = if words.len() == 3 {
            no_delay || noreply
        } else {
            no_delay && noreply
        };
        if !valid {
            return client_error(USAGE, noreply);
        }
    }
    let key = words[1].clone();
    if key.len() > LONGEST_KEY {
        return client_error(BAD_FORMAT, noreply);
    }
    Command::Delete { key, noreply }
}

fn parse_flush_all(tokens: &Tokens) -> Command {
    let noreply = tokens.noreply();
    let without_delay = if noreply { 2 } else { 1 };
    if tokens.words.len() == without_delay {
        return Command::FlushAll { delay: 0, noreply };
    }
    match signed(&tokens.words[1]) {
        Some(delay) => Command::FlushAll { delay, noreply },
        None => client_error("CLIENT_ERROR invalid exptime argument", noreply),
    }
}

fn parse_verbosity(tokens: &Tokens) -> Command {
    let noreply = tokens.noreply();
    client_error(
        if unsigned(&tokens.words[1]).is_some() {
            "OK"
        } else {
            BAD_FORMAT
        },
        noreply,
    )
}

fn parse_stats(words: &[Bytes]) -> Command {
    match words.get(1).map(|word| &word[..]) {
        None => Command::Stats(StatsOf::General),
        Some(b"settings") => Command::Stats(StatsOf::Settings),
        Some(b"reset") => Command::Answer("RESET"),
        Some(b"items" | b"slabs" | b"sizes" | b"conns" | b"extstore") => {
            Command::Stats(StatsOf::Empty)
        }
        Some(b"detail") => match words.get(2).map(|word| &word[..]) {
            Some(b"on" | b"off") => Command::Answer("OK"),
            Some(b"dump") => Command::Answer("END"),
            _ => Command::Answer("CLIENT_ERROR usage: stats detail on|off|dump"),
        },
        Some(_) => Command::Answer("ERROR"),
    }
}

fn parse_meta_get(words: &[Bytes]) -> Command {
    if words[1].len() > LONGEST_KEY {
        return Command::Answer(BAD_FORMAT);
    }
    if words.len() + 1 > MOST_META_TOKENS {
        return Command::Answer("CLIENT_ERROR options flags are too long");
    }
    Meta::parse(words, 2).map_or_else(Command::Answer, Command::MetaGet)
}

/// `md` and `ma`, which do not tell one wrong flag from another.
fn parse_meta_write(words: &[Bytes]) -> Result<Meta, &'static str> {
    if words[1].len() > LONGEST_KEY {
        return Err(BAD_FORMAT);
    }
    if words.len() + 1 > MOST_META_TOKENS {
        return Err("CLIENT_ERROR options flags too long");
    }
    Meta::parse(words, 2).map_err(|_| "CLIENT_ERROR invalid or duplicate flag")
}

fn parse_meta_debug(words: &[Bytes]) -> Command {
    let Some(key) = words.get(1).filter(|key| key.len() <= LONGEST_KEY) else {
        return Command::Answer(BAD_FORMAT);
    };
    if words.get(2).is_none_or(|flag| &flag[..] != b"b") {
        return Command::MetaDebug { key: key.clone() };
    }
    decode_key(key).map_or(Command::Answer(BAD_FORMAT), |key| Command::MetaDebug {
        key,
    })
}

fn parse_meta_store(words: &[Bytes], largest_item: usize) -> Line {
    let bad = |message| Line::Complete(Command::Answer(message));
    if words[1].len() > LONGEST_KEY || words.len() == 2 {
        return bad(BAD_FORMAT);
    }
    if words.len() + 1 > MOST_META_TOKENS {
        return bad("CLIENT_ERROR options flags too long");
    }
    let Some(length) = signed(&words[2]).and_then(value_length) else {
        return bad(BAD_FORMAT);
    };
    // From here on the length is known, and memcached swallows the value of a wrong line.
    let swallow = |message| Line::ThenSwallow(Command::Answer(message), length + 2);
    let meta = match Meta::parse(words, 3) {
        Ok(meta) => meta,
        Err(message) => return swallow(message),
    };
    let mode = match (meta.mode, meta.cas) {
        (0 | b'S' | b'R', Some(_)) => Mode::Cas,
        (0 | b'S', None) => Mode::Set,
        (b'R', None) => Mode::Replace,
        (b'E', _) => Mode::Add,
        (b'A', _) => Mode::Append,
        (b'P', _) => Mode::Prepend,
        _ => return swallow("CLIENT_ERROR invalid mode for ms M token"),
    };
    if meta.opaque_too_long() {
        return swallow(OPAQUE_TOO_LONG);
    }
    if item_size(meta.key.len(), length, meta.client_flags) > largest_item {
        return Line::ThenSwallow(
            Command::MetaStore(MetaStore {
                meta,
                mode,
                value: Value::TooLarge,
            }),
            length + 2,
        );
    }
    Line::ThenValue(
        Command::MetaStore(MetaStore {
            meta,
            mode,
            value: Value::Bad,
        }),
        length,
    )
}
