//! What a server can do, by its version: errors cannot tell, since memcached ignores some flags
//! that it does not know.

use std::fmt;

/// The oldest memcached this crate talks to: 1.6.13, the first with correct CAS values in meta
/// replies.
pub const MINIMUM_VERSION: &str = "1.6.13";

const MINIMUM: ServerVersion = ServerVersion(1, 6, 13);

/// From here on a miss (`EN`) carries the request's opaque.
const OPAQUE_ON_MISS: ServerVersion = ServerVersion(1, 6, 18);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServerVersion(u32, u32, u32);

impl ServerVersion {
    /// Reads `1.6.18` and the like; what follows the third number (`-beta1`, `_18_gabc`) does not
    /// matter.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim().splitn(3, '.').map(|part| {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            part[..digits].parse::<u32>().ok()
        });
        Some(Self(numbers.next()??, numbers.next()??, numbers.next()??))
    }

    pub(crate) fn is_supported(self) -> bool {
        self >= MINIMUM
    }

    pub(crate) fn has_opaque_on_miss(self) -> bool {
        self >= OPAQUE_ON_MISS
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_servers_say_of_themselves() {
        assert_eq!(
            ServerVersion::parse("1.6.18"),
            Some(ServerVersion(1, 6, 18))
        );
        assert_eq!(
            ServerVersion::parse("1.6.40_2_gab12"),
            Some(ServerVersion(1, 6, 40))
        );
        assert_eq!(ServerVersion::parse("2.0"), None);
        assert_eq!(ServerVersion::parse("proxy"), None);
        assert_eq!(ServerVersion::parse(MINIMUM_VERSION), Some(MINIMUM));
        assert!(!ServerVersion(1, 5, 22).is_supported());
        assert!(ServerVersion(1, 10, 0).has_opaque_on_miss());
        assert!(!ServerVersion(1, 6, 14).has_opaque_on_miss());
    }
}
