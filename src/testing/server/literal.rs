//! Numbers and base64 as memcached reads them: with the habits of C, which clients' mistakes depend on.

use bytes::Bytes;

/// Base64 as memcached decodes it: strange characters are skipped, padding counts as zeros wherever it stands in its
/// group, and the first padded group is the last.
pub(super) fn decode_key(text: &[u8]) -> Option<Bytes> {
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
pub(super) fn signed(text: &[u8]) -> Option<i32> {
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
