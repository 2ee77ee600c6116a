//! What the server pretends to be: its version, the commands it understands, and whom it lets in.

use std::fmt;

use bytes::Bytes;

/// Which commands a [`Server`](super::Server) understands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// The classic and the meta commands, as memcached 1.6.
    #[default]
    Meta,
    /// The classic commands only, as memcached before 1.6: `mg ms md ma mn me` are answered `ERROR`, and the value that
    /// follows `ms` is executed as commands. What came after the version the server shows is unknown, too: `gat` and
    /// `gats` before 1.5.3, `touch` before 1.4.8.
    Classic,
    /// The classic commands that twemproxy 0.5 forwards: it closes the connection, without a word, on any other (meta
    /// commands, `gat`, `gats`, `stats`, `flush_all`, `verbosity`), on keys of more than 250 bytes, and on whatever else
    /// it cannot parse.
    Proxy,
}

/// What the server pretends to be, as one value that every connection watches.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) version: String,
    pub(super) dialect: Dialect,
    pub(super) credentials: Option<Credentials>,
}

/// Whom the server lets in.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) user: Bytes,
    pub(super) password: Bytes,
}

/// Without the password.
impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            version: "1.6.18".to_owned(),
            dialect: Dialect::Meta,
            credentials: None,
        }
    }
}

impl Manner {
    /// Whether the server has a command of this name, given that memcached 1.6 has it.
    pub(super) fn knows(&self, verb: &[u8]) -> bool {
        match (self.dialect, verb) {
            (Dialect::Meta, _) => true,
            (Dialect::Classic, b"mg" | b"ms" | b"md" | b"ma" | b"mn" | b"me") => false,
            (Dialect::Classic, b"gat" | b"gats") => self.is_at_least([1, 5, 3]),
            (Dialect::Classic, b"touch") => self.is_at_least([1, 4, 8]),
            (Dialect::Classic, _) => true,
            (Dialect::Proxy, _) => matches!(
                verb,
                b"get"
                    | b"gets"
                    | b"set"
                    | b"add"
                    | b"replace"
                    | b"append"
                    | b"prepend"
                    | b"cas"
                    | b"incr"
                    | b"decr"
                    | b"touch"
                    | b"delete"
                    | b"version"
                    | b"quit"
            ),
        }
    }

    /// A version that cannot be read is a new one.
    fn is_at_least(&self, version: [u32; 3]) -> bool {
        let numbers = self.version.splitn(3, '.').map(|part| {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            part[..digits].parse::<u32>().ok()
        });
        numbers
            .collect::<Option<Vec<_>>>()
            .is_none_or(|numbers| numbers[..] >= version[..])
    }

    /// What is answered to credentials, and whether they let the connection in.
    pub(super) fn authenticate(&self, value: &[u8]) -> (&'static str, bool) {
        let Some(text) = value.strip_suffix(b"\r\n") else {
            return ("CLIENT_ERROR bad command line termination", false);
        };
        // memcached handles the text as a C string.
        let text = &text[..memchr::memchr(0, text).unwrap_or(text.len())];
        let mut words = text
            .split(|&byte| byte == b' ')
            .filter(|word| !word.is_empty());
        let (Some(user), Some(password)) = (words.next(), words.next()) else {
            return ("CLIENT_ERROR bad authentication token format", false);
        };
        let valid = self
            .credentials
            .as_ref()
            .is_none_or(|expected| expected.user == user && expected.password == password);
        if valid {
            ("STORED", true)
        } else {
            ("CLIENT_ERROR authentication failure", false)
        }
    }
}
