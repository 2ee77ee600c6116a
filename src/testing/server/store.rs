//! The items of the in-process server: expiry, CAS uniques, stale marks, `flush_all`, and a cap on memory.
//!
//! Time is whole seconds that tick from the server's start, as in memcached: a TTL of 1 ends with the current second.
//! Dead items are removed when they are next looked at.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::time::Instant;

use super::command::Mode;
use super::literal::unsigned;

/// A TTL above this is a Unix time.
const LONGEST_RELATIVE_EXPIRY: i32 = 60 * 60 * 24 * 30;
/// memcached's clock does not start at 0, so that small values are free to mean "expired long ago".
const FIRST_SECOND: u32 = 62;
/// The second at which an item has expired whatever the time.
const LONG_AGO: u32 = 1;

/// What memcached stores beside key and value: the item header and its CAS unique.
const ITEM_OVERHEAD: usize = 48 + 8;

/// What memcached's slabs would count for an item.
pub(super) fn item_size(key: usize, value: usize, client_flags: u32) -> usize {
    let flags = if client_flags == 0 { 0 } else { 4 };
    ITEM_OVERHEAD + key + 1 + value + 2 + flags
}

#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) value: Bytes,
    pub(super) client_flags: u32,
    /// The second it expires at; 0 is never.
    pub(super) expires: u32,
    pub(super) cas: u64,
    /// The second it was last stored or bumped.
    pub(super) used: u32,
    pub(super) binary_key: bool,
    pub(super) stale: bool,
    /// Some reader was told to refill it.
    pub(super) token_sent: bool,
    pub(super) fetched: bool,
    active: bool,
}

impl Item {
    pub(super) fn new(value: Bytes, client_flags: u32, expires: u32) -> Self {
        Self {
            value,
            client_flags,
            expires,
            cas: 0,
            used: 0,
            binary_key: false,
            stale: false,
            token_sent: false,
            fetched: false,
            active: false,
        }
    }

    /// Notes a read. Only the second read moves the time of last use.
    pub(super) fn bump(&mut self, now: u32) {
        if !self.fetched {
            self.fetched = true;
        } else if !self.active {
            self.active = true;
            self.used = now;
        }
    }
}

/// What became of an item that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// With this CAS unique.
    Yes(u64),
    No,
    Exists,
    Missing,
    OutOfMemory,
}

/// What became of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    /// `moved`: the number grew longer, so that a new item took the old one's place.
    To {
        number: u64,
        cas: u64,
        moved: bool,
    },
    NotANumber,
    Missing,
    Exists,
    OutOfMemory,
}

#[derive(Debug)]
pub(super) struct Store {
    items: HashMap<Bytes, Item>,
    started: Instant,
    /// The Unix time of second 0.
    origin: i64,
    last_cas: u64,
    /// Items last used at or before this second are dead, once it has come.
    oldest_live: u32,
    oldest_cas: u64,
    pub(super) bytes: usize,
    pub(super) limit: usize,
    pub(super) largest_item: usize,
    evict: bool,
    pub(super) evictions: u64,
    pub(super) total_items: u64,
}

impl Store {
    pub(super) fn new(limit: usize, largest_item: usize, evict: bool) -> Self {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            items: HashMap::new(),
            started: Instant::now(),
            origin: i64::try_from(unix).unwrap_or(i64::MAX) - i64::from(FIRST_SECOND),
            last_cas: 0,
            oldest_live: 0,
            oldest_cas: 0,
            bytes: 0,
            limit,
            largest_item,
            evict,
            evictions: 0,
            total_items: 0,
        }
    }

    /// A fresh process with the same settings.
    pub(super) fn restart(&mut self) {
        *self = Self::new(self.limit, self.largest_item, self.evict);
    }

    pub(super) fn uptime(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// The second it is.
    pub(super) fn now(&self) -> u32 {
        FIRST_SECOND.saturating_add(u32::try_from(self.uptime()).unwrap_or(u32::MAX))
    }

    pub(super) fn unix_time(&self) -> i64 {
        self.origin + i64::from(self.now())
    }

    /// The second at which a TTL from the wire ends; 0 is never.
    pub(super) fn deadline(&self, expiry: i32) -> u32 {
        match expiry {
            0 => 0,
            ..0 => LONG_AGO,
            1..=LONGEST_RELATIVE_EXPIRY => self.now().saturating_add(expiry.unsigned_abs()),
            _ => u32::try_from(i64::from(expiry) - self.origin)
                .map_or(LONG_AGO, |second| second.max(LONG_AGO)),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.items
            .values()
            .filter(|item| !self.is_dead(item))
            .count()
    }

    /// A live item, without side effects.
    pub(super) fn peek(&self, key: &[u8]) -> Option<&Item> {
        self.items.get(key).filter(|item| !self.is_dead(item))
    }

    /// A live item.
    pub(super) fn find(&mut self, key: &[u8]) -> Option<&mut Item> {
        if self.is_dead(self.items.get(key)?) {
            self.remove(key);
        }
        self.items.get_mut(key)
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.items.remove(key);
        if let Some(item) = &removed {
            self.bytes -= item_size(key.len(), item.value.len(), item.client_flags);
        }
        removed.is_some()
    }

    /// Stores `item` as `mode` says. `cas` is compared by [`Mode::Cas`] and, unless 0, by the appending modes. With
    /// `may_be_older`, an item with an older CAS unique is accepted, but stays marked stale.
    pub(super) fn store(
        &mut self,
        mode: Mode,
        key: &Bytes,
        mut item: Item,
        cas: u64,
        may_be_older: bool,
    ) -> Stored {
        // memcached allocates the new item before it looks at the old one.
        if !self.make_room(item_size(key.len(), item.value.len(), item.client_flags)) {
            return Stored::OutOfMemory;
        }
        let old = self.find(key).map(|old| old.clone());
        match (mode, old) {
            (Mode::Set | Mode::Add, None) | (Mode::Set | Mode::Replace, Some(_)) => {}
            (Mode::Cas, Some(old)) if old.cas == cas => {}
            (Mode::Cas, Some(old)) if may_be_older && cas < old.cas => {
                item.expires = old.expires;
                item.stale = true;
                item.token_sent = old.token_sent;
            }
            (Mode::Append | Mode::Prepend, Some(old)) => {
                if cas != 0 && cas != old.cas {
                    return Stored::Exists;
                }
                if item_size(
                    key.len(),
                    old.value.len() + item.value.len(),
                    old.client_flags,
                ) > self.largest_item
                {
                    return Stored::No;
                }
                let parts = if mode == Mode::Append {
                    [&old.value[..], &item.value]
                } else {
                    [&item.value[..], &old.value]
                };
                item = Item::new(Bytes::from(parts.concat()), old.client_flags, old.expires);
            }
            (Mode::Cas, Some(_)) => return Stored::Exists,
            (Mode::Cas, None) => return Stored::Missing,
            (Mode::Add, Some(_)) | (Mode::Replace | Mode::Append | Mode::Prepend, None) => {
                return Stored::No;
            }
        }
        Stored::Yes(self.link(key, item))
    }

    /// Puts `item` in the place of whatever has this key, under a new CAS unique.
    pub(super) fn link(&mut self, key: &Bytes, mut item: Item) -> u64 {
        self.remove(key);
        item.used = self.now();
        item.cas = self.next_cas();
        let cas = item.cas;
        self.bytes += item_size(key.len(), item.value.len(), item.client_flags);
        self.total_items += 1;
        // The key is a slice of a whole input buffer: keep only what is needed.
        self.items.insert(Bytes::copy_from_slice(key), item);
        cas
    }

    /// Marks the item stale under a new CAS unique, so that the next reader is told to refill it.
    pub(super) fn invalidate(&mut self, key: &[u8], expires: Option<u32>) {
        let cas = self.next_cas();
        if let Some(item) = self.items.get_mut(key) {
            item.expires = expires.unwrap_or(item.expires);
            item.stale = true;
            item.token_sent = false;
            item.cas = cas;
        }
    }

    /// Adds to or takes from a number; `cas` is compared unless 0.
    pub(super) fn count(&mut self, key: &Bytes, increment: bool, delta: u64, cas: u64) -> Counted {
        let Some(old) = self.find(key).map(|old| old.clone()) else {
            return Counted::Missing;
        };
        if old.value.is_empty() {
            return Counted::NotANumber;
        }
        if cas != 0 && cas != old.cas {
            return Counted::Exists;
        }
        let Some(number) = unsigned(&old.value) else {
            return Counted::NotANumber;
        };
        let number = if increment {
            number.wrapping_add(delta)
        } else {
            number.saturating_sub(delta)
        };
        let mut digits = itoa::Buffer::new().format(number).as_bytes().to_vec();
        let moved = digits.len() > old.value.len();
        if moved {
            let item = Item::new(Bytes::from(digits), old.client_flags, old.expires);
            if !self.make_room(item_size(key.len(), item.value.len(), item.client_flags)) {
                return Counted::OutOfMemory;
            }
            return Counted::To {
                number,
                cas: self.link(key, item),
                moved,
            };
        }
        // A number that fits is written in place, and what is left of the old one becomes spaces.
        digits.resize(old.value.len(), b' ');
        let cas = self.next_cas();
        if let Some(item) = self.items.get_mut(key) {
            item.value = Bytes::from(digits);
            item.cas = cas;
        }
        Counted::To { number, cas, moved }
    }

    /// `flush_all`.
    pub(super) fn flush(&mut self, delay: i32) {
        let from = if delay > 0 {
            self.deadline(delay)
        } else {
            self.now()
        };
        self.oldest_live = from.saturating_sub(1);
        if self.oldest_live <= self.now() {
            self.oldest_cas = self.next_cas();
        }
    }

    /// Whether an item of this size can be stored, after evictions if those are allowed.
    pub(super) fn make_room(&mut self, size: usize) -> bool {
        if self.bytes + size > self.limit {
            let dead: Vec<Bytes> = self
                .items
                .iter()
                .filter(|(_, item)| self.is_dead(item))
                .map(|(key, _)| key.clone())
                .collect();
            for key in dead {
                self.remove(&key);
            }
        }
        while self.evict && self.bytes + size > self.limit {
            // Any item will do: which one memcached would evict is nothing a client may rely on.
            let Some(victim) = self.items.keys().next().cloned() else {
                break;
            };
            self.remove(&victim);
            self.evictions += 1;
        }
        self.bytes + size <= self.limit
    }

    fn next_cas(&mut self) -> u64 {
        self.last_cas += 1;
        self.last_cas
    }

    fn is_dead(&self, item: &Item) -> bool {
        let now = self.now();
        let expired = item.expires != 0 && item.expires <= now;
        let flush_has_come = self.oldest_live != 0 && self.oldest_live <= now;
        expired || (flush_has_come && (item.used <= self.oldest_live || item.cas < self.oldest_cas))
    }
}
