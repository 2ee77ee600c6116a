//! Bytes to commands, as memcached 1.6.18 reads them, without I/O.
//!
//! Whether a value follows a command line depends on how far memcached gets with that line: some malformed storage
//! commands swallow their value, others leave it in the stream, where it is then executed as commands. Those traps are
//! what a client must survive, so this parser reproduces them: it never "repairs" the framing. Every limit is checked
//! before anything is allocated, and the caller's buffer never has to hold more than one value and one line.

use std::ops::ControlFlow;

use bytes::{Buf, Bytes, BytesMut};

/// memcached's limit on keys as they stand in the request, so on the base64 text of a binary key.
const LONGEST_KEY: usize = 250;
/// Bytes without a line feed that memcached tolerates before it closes the connection.
const LONGEST_UNFINISHED_LINE: usize = 2_048;
/// A multi-get line has no limit in memcached; this one keeps a hostile peer from filling our memory.
const LONGEST_GET_LINE: usize = 1 << 20;
/// Tokens that memcached splits a line into, the terminator it counts as a token included.
const MOST_TOKENS: usize = 24;
/// Tokens of a meta command (the terminator included) that memcached accepts.
const MOST_META_TOKENS: usize = 20;
/// What memcached stores beside key and value: the item header and its CAS unique.
const ITEM_OVERHEAD: usize = 48 + 8;

const BAD_FORMAT: &str = "CLIENT_ERROR bad command line format";
const BAD_TOKEN: &str = "CLIENT_ERROR bad token in command line format";

/// What memcached's slabs would count for an item.
pub(super) fn item_size(key: usize, value: usize, client_flags: u32) -> usize {
    let flags = if client_flags == 0 { 0 } else { 4 };
    ITEM_OVERHEAD + key + 1 + value + 2 + flags
}

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
    /// A browser: close at once.
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

/// What a meta command says after its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// Decoded if `binary_key`.
    pub(super) key: Bytes,
    pub(super) binary_key: bool,
    /// The flags with their arguments, in the order given: replies repeat that order.
    pub(super) flags: Vec<Bytes>,
    pub(super) mode: u8,
    pub(super) quiet: bool,
    pub(super) value: bool,
    pub(super) no_update: bool,
    pub(super) invalidate: bool,
    pub(super) vivify: Option<i32>,
    pub(super) expiry: Option<i32>,
    pub(super) recache: i32,
    pub(super) client_flags: u32,
    pub(super) cas: Option<u64>,
    pub(super) delta: u64,
    pub(super) initial: u64,
}

/// What `stats` was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatsOf {
    General,
    Settings,
    /// A known group whose values would mean nothing here: an empty answer.
    Empty,
}

/// The incremental parser of one connection.
#[derive(Debug)]
pub(super) struct Parser {
    largest_item: usize,
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
}

/// A parsed line.
enum Line {
    Complete(Command),
    /// The command with [`Value::Bad`] in the place of the value that follows; the length is without CR LF.
    ThenValue(Command, usize),
    /// The command is answered after so many bytes, CR LF included, were discarded.
    ThenSwallow(Command, usize),
}

impl Parser {
    /// A parser for a server whose items may take `largest_item` bytes, counted like [`item_size`].
    pub(super) fn new(largest_item: usize) -> Self {
        Self {
            largest_item,
            state: State::Line,
        }
    }

    /// Whether a command line was read whose value is still incomplete. memcached sends no reply meanwhile, not even
    /// those of earlier requests.
    pub(super) fn awaits_value(&self) -> bool {
        !matches!(self.state, State::Line)
    }

    /// The bytes still missing from the value being read, as far as they have to be buffered.
    pub(super) fn missing(&self, buffered: usize) -> usize {
        match &self.state {
            State::Value { length, .. } => length.saturating_sub(buffered),
            State::Line | State::Swallow { .. } => 0,
        }
    }

    /// Takes the next request from the front of `input`.
    pub(super) fn next(&mut self, input: &mut BytesMut) -> Parsed {
        loop {
            match std::mem::replace(&mut self.state, State::Line) {
                State::Line => match self.take_line(input) {
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
                    request
                        .command
                        .set_value(value.map_or(Value::Bad, Value::Data));
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
            }
        }
    }

    fn take_line(&mut self, input: &mut BytesMut) -> ControlFlow<Parsed> {
        let Some(line_feed) = memchr::memchr(b'\n', input) else {
            return ControlFlow::Break(if may_continue(input) {
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
        let (name, parsed) = parse_line(&line, self.largest_item);
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
}

/// Whether memcached waits for the rest of a line that begins like this.
fn may_continue(input: &[u8]) -> bool {
    if input.len() <= LONGEST_UNFINISHED_LINE {
        return true;
    }
    let spaces = input.iter().take_while(|&&byte| byte == b' ').count();
    let verb = &input[spaces..];
    spaces <= 100
        && (verb.starts_with(b"get ") || verb.starts_with(b"gets "))
        && input.len() <= LONGEST_GET_LINE
}

impl Command {
    fn set_value(&mut self, received: Value) {
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

fn parse_line(line: &Bytes, largest_item: usize) -> (&'static str, Line) {
    let tokens = Tokens::split(line);
    let verb: &[u8] = tokens.words.first().map_or(b"", |word| word);
    if verb.len() < 2 {
        return ("unknown", Line::Complete(Command::Answer("ERROR")));
    }
    let count = tokens.count();
    let words = &tokens.words[..];
    let wrong_count = Line::Complete(Command::Answer("ERROR"));
    let store = |mode| parse_store(mode, &tokens, largest_item);
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
            ("incr", Line::Complete(parse_arithmetic(&tokens, true)))
        }
        b"decr" if matches!(count, 4 | 5) => {
            ("decr", Line::Complete(parse_arithmetic(&tokens, false)))
        }
        b"touch" if matches!(count, 4 | 5) => ("touch", Line::Complete(parse_touch(&tokens))),
        b"delete" if matches!(count, 3..=5) => ("delete", Line::Complete(parse_delete(&tokens))),
        b"flush_all" if matches!(count, 2..=4) => {
            ("flush_all", Line::Complete(parse_flush_all(&tokens)))
        }
        b"verbosity" if matches!(count, 3 | 4) => {
            ("verbosity", Line::Complete(parse_verbosity(&tokens)))
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

pub(super) const OPAQUE_TOO_LONG: &str = "CLIENT_ERROR opaque token too long";

/// Whether an `O` flag, its letter included, is longer than memcached echoes.
pub(super) fn is_overlong_opaque(flag: &[u8]) -> bool {
    flag.len() > 32
}

impl Meta {
    pub(super) fn opaque_too_long(&self) -> bool {
        self.flags
            .iter()
            .any(|flag| flag[0] == b'O' && is_overlong_opaque(flag))
    }

    /// Reads the flags from `words[first..]`. A wrong argument does not end the scan, so the last error is reported,
    /// while an unknown or repeated flag does.
    fn parse(words: &[Bytes], first: usize) -> Result<Self, &'static str> {
        let mut meta = Self {
            key: words[1].clone(),
            flags: words[first..].to_vec(),
            delta: 1,
            ..Self::default()
        };
        let mut seen = [false; 127];
        let mut error = None;
        for flag in &words[first..] {
            let letter = flag[0];
            match seen.get_mut(usize::from(letter)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err("CLIENT_ERROR duplicate flag"),
            }
            if let Err(message) = meta.read_flag(letter, flag)? {
                // A wrong `F` has no message of its own: it leaves what another flag said.
                error = message.or(error).or(Some(BAD_FORMAT));
            }
        }
        error.map_or(Ok(meta), Err)
    }

    fn read_flag(
        &mut self,
        letter: u8,
        flag: &Bytes,
    ) -> Result<Result<(), Option<&'static str>>, &'static str> {
        fn kept<T>(
            slot: &mut T,
            parsed: Option<T>,
            error: &'static str,
        ) -> Result<(), Option<&'static str>> {
            *slot = parsed.ok_or(Some(error))?;
            Ok(())
        }
        let argument = &flag[1..];
        Ok(match letter {
            b'b' => {
                self.binary_key = true;
                let key = decode_key(&self.key);
                kept(&mut self.key, key, "CLIENT_ERROR error decoding key")
            }
            b'N' => kept(&mut self.vivify, signed(argument).map(Some), BAD_TOKEN),
            b'T' => kept(&mut self.expiry, signed(argument).map(Some), BAD_TOKEN),
            b'R' => kept(&mut self.recache, signed(argument), BAD_TOKEN),
            b'C' => kept(&mut self.cas, unsigned(argument).map(Some), BAD_TOKEN),
            b'J' => kept(
                &mut self.initial,
                unsigned(argument),
                "CLIENT_ERROR invalid numeric initial value",
            ),
            b'D' => kept(
                &mut self.delta,
                unsigned(argument),
                "CLIENT_ERROR invalid numeric delta value",
            ),
            b'M' => {
                let mode = (argument.len() == 1).then(|| argument[0]);
                kept(
                    &mut self.mode,
                    mode,
                    "CLIENT_ERROR incorrect length for M token",
                )
            }
            b'F' => match unsigned(argument) {
                Some(flags) => {
                    self.client_flags = flags as u32;
                    Ok(())
                }
                None => Err(None),
            },
            b'v' => kept(&mut self.value, Some(true), ""),
            b'u' => kept(&mut self.no_update, Some(true), ""),
            b'q' => kept(&mut self.quiet, Some(true), ""),
            b'I' => kept(&mut self.invalidate, Some(true), ""),
            b'O' | b'P' | b'L' | b'k' | b's' | b't' | b'c' | b'f' | b'l' | b'h' => Ok(()),
            _ => return Err("CLIENT_ERROR invalid flag"),
        })
    }
}

/// Base64 as memcached decodes it: strange characters are skipped, padding counts as zeros wherever it stands in its
/// group, and the first padded group is the last.
fn decode_key(text: &[u8]) -> Option<Bytes> {
    let digits: Vec<(u32, bool)> = text
        .iter()
        .filter_map(|&character| base64_digit(character))
        .collect();
    if digits.is_empty() || !digits.len().is_multiple_of(4) {
        return None;
    }
    let mut key = Vec::with_capacity(text.len());
    for group in digits.chunks(4) {
        let padding = group.iter().filter(|(_, padding)| *padding).count();
        if padding > 2 {
            return None;
        }
        let bits = group.iter().fold(0, |bits, (digit, _)| bits << 6 | digit);
        key.extend_from_slice(&bits.to_be_bytes()[1..4 - padding]);
        if padding > 0 {
            break;
        }
    }
    Some(Bytes::from(key))
}

/// A character's six bits, and whether it is padding.
fn base64_digit(character: u8) -> Option<(u32, bool)> {
    let digit = match character {
        b'A'..=b'Z' => character - b'A',
        b'a'..=b'z' => character - b'a' + 26,
        b'0'..=b'9' => character - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        b'=' => return Some((0, true)),
        _ => return None,
    };
    Some((digit.into(), false))
}

/// C's `strtol` as memcached uses it: 64 bits, silently cut to 32.
fn signed(text: &[u8]) -> Option<i32> {
    let (negative, magnitude) = integer(text)?;
    let value = if negative {
        -i128::from(magnitude)
    } else {
        i128::from(magnitude)
    };
    Some(i64::try_from(value).ok()? as i32)
}

/// C's `strtoull` as memcached uses it: a minus sign wraps, and is refused only if the result looks negative.
pub(super) fn unsigned(text: &[u8]) -> Option<u64> {
    let (negative, magnitude) = integer(text)?;
    let value = if negative {
        magnitude.wrapping_neg()
    } else {
        magnitude
    };
    (!negative || value as i64 >= 0).then_some(value)
}

/// Sign and magnitude of the decimal number that `text` starts with; white space or NUL may follow it.
fn integer(text: &[u8]) -> Option<(bool, u64)> {
    let is_space = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0x0b;
    let text = &text[text.iter().take_while(|byte| is_space(byte)).count()..];
    let (negative, digits) = match text.split_first() {
        Some((b'-', rest)) => (true, rest),
        Some((b'+', rest)) => (false, rest),
        _ => (false, text),
    };
    let length = digits
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    if length == 0
        || digits
            .get(length)
            .is_some_and(|byte| !is_space(byte) && *byte != 0)
    {
        return None;
    }
    let mut magnitude = 0_u64;
    for digit in &digits[..length] {
        magnitude = magnitude
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))?;
    }
    Some((negative, magnitude))
}

/// Feeds `data` to a parser in pieces that `data` itself chooses, and asserts that memory stays bounded. For fuzzing.
#[doc(hidden)]
pub fn fuzz_server_parser(data: &[u8]) {
    const LARGEST_ITEM: usize = 4_096;
    let mut parser = Parser::new(LARGEST_ITEM);
    let mut input = BytesMut::new();
    let mut rest = data;
    while let Some((&size, tail)) = rest.split_first() {
        let (piece, tail) = tail.split_at((usize::from(size) * 9).min(tail.len()));
        input.extend_from_slice(piece);
        rest = tail;
        loop {
            let before = input.len();
            match parser.next(&mut input) {
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

    fn parse_all(pieces: &[&[u8]]) -> (Vec<Box<Request>>, usize) {
        let mut parser = Parser::new(300);
        let mut input = BytesMut::new();
        let mut requests = Vec::new();
        for piece in pieces {
            input.extend_from_slice(piece);
            loop {
                match parser.next(&mut input) {
                    Parsed::Incomplete => break,
                    Parsed::Request(request) => requests.push(request),
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
        let mut parser = Parser::new(1 << 20);
        let mut input = BytesMut::from(&b"set k 0 0 2147483645\r\nabc"[..]);
        assert_eq!(parser.next(&mut input), Parsed::Incomplete);
        assert!(input.is_empty() && parser.awaits_value());
        assert_eq!(parser.missing(0), 0);
    }

    #[test]
    fn an_endless_line_closes_unless_it_is_a_multi_get() {
        let mut parser = Parser::new(1 << 20);
        assert_eq!(
            parser.next(&mut BytesMut::from(&[b'x'; 2_048][..])),
            Parsed::Incomplete
        );
        assert_eq!(
            parser.next(&mut BytesMut::from(&[b'x'; 2_049][..])),
            Parsed::Close
        );
        let get = [&b"get "[..], &b"k ".repeat(5_000)].concat();
        assert_eq!(
            parser.next(&mut BytesMut::from(&get[..])),
            Parsed::Incomplete
        );
        let endless = [&b"get "[..], &b"k ".repeat(600_000)].concat();
        assert_eq!(
            parser.next(&mut BytesMut::from(&endless[..])),
            Parsed::Close
        );
    }
}
