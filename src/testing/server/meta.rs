//! The key and the flags of a meta command.

use bytes::Bytes;

use super::command::BAD_FORMAT;
use super::literal::{decode_key, signed, unsigned};

const BAD_TOKEN: &str = "CLIENT_ERROR bad token in command line format";

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
    pub(super) fn parse(words: &[Bytes], first: usize) -> Result<Self, &'static str> {
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
