//! Commands against the store: exactly memcached 1.6.18's replies.

use std::collections::{BTreeMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};

use super::command::{
    Command, Get, MetaStore, Mode, Request, StatsOf, Store as StoreCommand, Value,
};
use super::meta::{Meta, OPAQUE_TOO_LONG, is_overlong_opaque};
use super::store::{Counted, Item, Store, Stored, item_size};

/// How many request lines are remembered.
const REMEMBERED_REQUESTS: usize = 1_024;

const TOO_LARGE: &str = "SERVER_ERROR object too large for cache";
const OUT_OF_MEMORY: &str = "SERVER_ERROR out of memory storing object";
const BAD_CHUNK: &str = "CLIENT_ERROR bad data chunk";
const NOT_A_NUMBER: &str = "CLIENT_ERROR cannot increment or decrement non-numeric value";

/// What the connection has to do with a reply besides sending it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Send it with the replies of the same batch.
    Continue,
    /// Send it, and everything before it, even if a later command of the batch loses unsent replies.
    Flush,
    /// The replies of this batch that were not flushed are lost; send only this one.
    Discard,
    /// Close when everything is written.
    Close,
    /// Close without writing what is not flushed.
    Abort,
}

/// What there is to know outside the store.
pub(super) struct Surroundings<'a> {
    pub(super) version: &'a str,
    pub(super) open_connections: &'a dyn Fn() -> usize,
    pub(super) accepted: u64,
}

/// The store together with the record of what was asked of it.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) store: Store,
    /// Counts restarts: a connection of an earlier epoch may not execute anything any more.
    pub(super) epoch: u64,
    pub(super) executed: u64,
    pub(super) by_name: BTreeMap<&'static str, u64>,
    pub(super) requests: VecDeque<Bytes>,
    hits: u64,
    misses: u64,
}

impl Engine {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            epoch: 0,
            executed: 0,
            by_name: BTreeMap::new(),
            requests: VecDeque::with_capacity(REMEMBERED_REQUESTS),
            hits: 0,
            misses: 0,
        }
    }

    /// Executes one request and appends its reply.
    pub(super) fn execute(
        &mut self,
        request: &Request,
        reply: &mut BytesMut,
        about: &Surroundings<'_>,
    ) -> Then {
        self.executed += 1;
        *self.by_name.entry(request.name).or_default() += 1;
        if self.requests.len() == REMEMBERED_REQUESTS {
            self.requests.pop_front();
        }
        // A copy: the line is a slice of an input buffer that may hold much more.
        self.requests
            .push_back(Bytes::copy_from_slice(&request.line));
        match &request.command {
            Command::Answer(text) => line(reply, text),
            Command::AnswerAlone(text) => {
                line(reply, text);
                return Then::Discard;
            }
            Command::Silence => {}
            Command::Get(get) => return self.get(get, reply),
            Command::Store(store) => self.store_value(store, reply),
            Command::Delete { key, noreply } => {
                let found = self.store.find(key).is_some() && self.store.remove(key);
                classic(reply, *noreply, if found { "DELETED" } else { "NOT_FOUND" });
            }
            Command::Arithmetic {
                key,
                increment,
                delta,
                noreply,
            } => match self.store.count(key, *increment, *delta, 0) {
                Counted::To { number, .. } => {
                    classic(reply, *noreply, itoa::Buffer::new().format(number))
                }
                Counted::NotANumber => classic(reply, *noreply, NOT_A_NUMBER),
                Counted::Missing | Counted::Exists => classic(reply, *noreply, "NOT_FOUND"),
                Counted::OutOfMemory => classic(reply, *noreply, "SERVER_ERROR out of memory"),
            },
            Command::Touch {
                key,
                expiry,
                noreply,
            } => {
                let found = self.touch(key, *expiry).is_some();
                classic(reply, *noreply, if found { "TOUCHED" } else { "NOT_FOUND" });
            }
            Command::FlushAll { delay, noreply } => {
                self.store.flush(*delay);
                classic(reply, *noreply, "OK");
            }
            Command::Version => {
                reply.put_slice(b"VERSION ");
                line(reply, about.version);
            }
            Command::Stats(of) => self.stats(*of, reply, about),
            Command::Noop => {
                line(reply, "MN");
                return Then::Flush;
            }
            Command::MetaDebug { key } => self.meta_debug(key, reply),
            Command::MetaGet(meta) => self.meta_get(meta, reply),
            Command::MetaStore(store) => self.meta_store(store, reply),
            Command::MetaDelete(meta) => self.meta_delete(meta, reply),
            Command::MetaArithmetic(meta) => self.meta_arithmetic(meta, reply),
            Command::Quit => return Then::Close,
            Command::Abort => return Then::Abort,
        }
        Then::Continue
    }

    fn touch(&mut self, key: &[u8], expiry: i32) -> Option<&mut Item> {
        let (now, expires) = (self.store.now(), self.store.deadline(expiry));
        let item = self.store.find(key)?;
        item.expires = expires;
        item.bump(now);
        Some(item)
    }

    fn get(&mut self, get: &Get, reply: &mut BytesMut) -> Then {
        let now = self.store.now();
        for key in &get.keys {
            let found = match get.expiry {
                Some(expiry) => self.touch(key, expiry),
                None => self.store.find(key),
            };
            let Some(item) = found else {
                self.misses += 1;
                continue;
            };
            if get.expiry.is_none() {
                item.bump(now);
            }
            reply.put_slice(b"VALUE ");
            reply.put_slice(key);
            number(reply, b" ", item.client_flags.into());
            number(reply, b" ", item.value.len() as u64);
            if get.with_cas {
                number(reply, b" ", item.cas);
            }
            reply.put_slice(b"\r\n");
            reply.put_slice(&item.value);
            reply.put_slice(b"\r\n");
            self.hits += 1;
        }
        if get.overlong {
            reply.clear();
            line(reply, "CLIENT_ERROR bad command line format");
            return Then::Discard;
        }
        line(reply, "END");
        Then::Flush
    }

    fn store_value(&mut self, command: &StoreCommand, reply: &mut BytesMut) {
        let StoreCommand {
            mode,
            key,
            client_flags,
            expiry,
            cas,
            noreply,
            value,
        } = command;
        let stored = match value {
            Value::Bad => return classic(reply, *noreply, BAD_CHUNK),
            Value::TooLarge => {
                if *mode == Mode::Set {
                    self.store.remove(key);
                }
                return classic(reply, *noreply, TOO_LARGE);
            }
            Value::Data(value) => {
                let item = Item::new(
                    Bytes::copy_from_slice(value),
                    *client_flags,
                    self.store.deadline(*expiry),
                );
                self.store.store(*mode, key, item, *cas, false)
            }
        };
        if stored == Stored::OutOfMemory && *mode == Mode::Set {
            self.store.remove(key);
        }
        let answer = match stored {
            Stored::Yes(_) => "STORED",
            Stored::No => "NOT_STORED",
            Stored::Exists => "EXISTS",
            Stored::Missing => "NOT_FOUND",
            Stored::OutOfMemory => OUT_OF_MEMORY,
        };
        classic(reply, *noreply, answer);
    }

    fn meta_get(&mut self, meta: &Meta, reply: &mut BytesMut) {
        let Meta { key, flags, .. } = meta;
        let now = self.store.now();
        let expires = meta.expiry.map(|expiry| self.store.deadline(expiry));
        let recache = self.store.deadline(meta.recache);
        let mut created = None;
        if let Some(expiry) = meta.vivify
            && self.store.find(key).is_none()
            && self.store.make_room(item_size(key.len(), 0, 0))
        {
            created = Some(self.store.deadline(expiry));
            self.store.link(key, Item::new(Bytes::new(), 0, 0));
            self.misses += 1;
        }
        let Some(item) = self.store.find(key) else {
            self.misses += 1;
            if meta.opaque_too_long() {
                line(reply, OPAQUE_TOO_LONG);
            } else if !meta.quiet {
                reply.put_slice(b"EN");
                echo(reply, meta, meta.binary_key);
                reply.put_slice(b"\r\n");
            }
            return;
        };
        if meta.value {
            number(reply, b"VA ", item.value.len() as u64);
        } else {
            reply.put_slice(b"HD");
        }
        let mut won = false;
        for flag in flags {
            match flag[0] {
                b'T' => item.expires = expires.unwrap_or(item.expires),
                b'N' => {
                    if let Some(expires) = created {
                        item.expires = expires;
                        won = true;
                    }
                }
                b'R' => {
                    won |= !item.token_sent
                        && created.is_none()
                        && item.expires != 0
                        && item.expires < recache;
                }
                b's' => number(reply, b" s", item.value.len() as u64),
                b't' => remaining(reply, item.expires, now),
                b'c' => number(reply, b" c", item.cas),
                b'f' => number(reply, b" f", item.client_flags.into()),
                b'l' => number(reply, b" l", now.wrapping_sub(item.used).into()),
                b'h' => reply.put_slice(if item.fetched { b" h1" } else { b" h0" }),
                b'O' if is_overlong_opaque(flag) => {
                    // What the flags before it changed stays changed.
                    reply.clear();
                    return line(reply, OPAQUE_TOO_LONG);
                }
                b'O' => echo_opaque(reply, flag),
                b'k' => echo_key(reply, key, item.binary_key),
                _ => {}
            }
        }
        if item.token_sent {
            reply.put_slice(b" Z");
        }
        if item.stale {
            reply.put_slice(b" X");
            won |= !item.token_sent;
        }
        if won {
            reply.put_slice(b" W");
            item.token_sent = true;
        }
        reply.put_slice(b"\r\n");
        if meta.value {
            reply.put_slice(&item.value);
            reply.put_slice(b"\r\n");
        }
        if !meta.no_update {
            item.bump(now);
        }
        if created.is_none() {
            self.hits += 1;
        }
    }

    fn meta_store(&mut self, command: &MetaStore, reply: &mut BytesMut) {
        let MetaStore { meta, mode, value } = command;
        let value = match value {
            Value::Bad => return line(reply, BAD_CHUNK),
            Value::TooLarge => {
                self.store.remove(&meta.key);
                return line(reply, TOO_LARGE);
            }
            Value::Data(value) => Bytes::copy_from_slice(value),
        };
        let mut item = Item::new(
            value,
            meta.client_flags,
            self.store.deadline(meta.expiry.unwrap_or(0)),
        );
        item.binary_key = meta.binary_key;
        let stored = self.store.store(
            *mode,
            &meta.key,
            item,
            meta.cas.unwrap_or(0),
            meta.invalidate,
        );
        let status = match stored {
            Stored::Yes(_) if meta.quiet => return,
            Stored::Yes(_) => "HD",
            Stored::No => "NS",
            Stored::Exists => "EX",
            Stored::Missing => "NF",
            Stored::OutOfMemory => {
                self.store.remove(&meta.key);
                return line(reply, OUT_OF_MEMORY);
            }
        };
        reply.put_slice(status.as_bytes());
        let cas = if let Stored::Yes(cas) = stored {
            cas
        } else {
            0
        };
        for flag in &meta.flags {
            match flag[0] {
                b'O' => echo_opaque(reply, flag),
                b'k' => echo_key(reply, &meta.key, meta.binary_key),
                b'c' => number(reply, b" c", cas),
                _ => {}
            }
        }
        reply.put_slice(b"\r\n");
    }

    fn meta_delete(&mut self, meta: &Meta, reply: &mut BytesMut) {
        if meta.opaque_too_long() {
            return line(reply, OPAQUE_TOO_LONG);
        }
        let expires = meta.expiry.map(|expiry| self.store.deadline(expiry));
        let status = match self.store.find(&meta.key).map(|item| item.cas) {
            None => "NF",
            Some(cas) if meta.cas.is_some_and(|expected| expected != cas) => "EX",
            Some(_) => {
                if meta.invalidate {
                    self.store.invalidate(&meta.key, expires);
                } else {
                    self.store.remove(&meta.key);
                }
                if meta.quiet {
                    return;
                }
                "HD"
            }
        };
        reply.put_slice(status.as_bytes());
        echo(reply, meta, meta.binary_key);
        reply.put_slice(b"\r\n");
    }

    fn meta_arithmetic(&mut self, meta: &Meta, reply: &mut BytesMut) {
        let increment = match meta.mode {
            0 | b'I' | b'+' => true,
            b'D' | b'-' => false,
            _ => return line(reply, "CLIENT_ERROR invalid mode for ma M token"),
        };
        let mut quiet = meta.quiet;
        let mut created = None;
        let counted =
            match self
                .store
                .count(&meta.key, increment, meta.delta, meta.cas.unwrap_or(0))
            {
                Counted::Missing if meta.vivify.is_some() => {
                    created = meta.vivify.map(|expiry| self.store.deadline(expiry));
                    // memcached does not count this as the success that quiet mode hides.
                    quiet = false;
                    let value =
                        Bytes::copy_from_slice(itoa::Buffer::new().format(meta.initial).as_bytes());
                    if !self
                        .store
                        .make_room(item_size(meta.key.len(), value.len(), 0))
                    {
                        return line(reply, "SERVER_ERROR Out of memory allocating new item");
                    }
                    Counted::To {
                        number: meta.initial,
                        cas: self.store.link(&meta.key, Item::new(value, 0, 0)),
                        moved: false,
                    }
                }
                counted => counted,
            };
        let status = match counted {
            Counted::To { number, cas, moved } => {
                self.finish_arithmetic(meta, created, number, cas, moved, reply);
                if quiet && !reply.starts_with(b"CLIENT_ERROR") {
                    reply.clear();
                }
                return;
            }
            Counted::NotANumber => return line(reply, NOT_A_NUMBER),
            Counted::OutOfMemory => return line(reply, "SERVER_ERROR out of memory"),
            Counted::Missing => "NF",
            Counted::Exists => "EX",
        };
        if meta.opaque_too_long() {
            return line(reply, OPAQUE_TOO_LONG);
        }
        reply.put_slice(status.as_bytes());
        echo(reply, meta, meta.binary_key);
        reply.put_slice(b"\r\n");
    }

    /// The reply to a number that was changed or created.
    fn finish_arithmetic(
        &mut self,
        meta: &Meta,
        created: Option<u32>,
        to: u64,
        cas: u64,
        moved: bool,
        reply: &mut BytesMut,
    ) {
        let now = self.store.now();
        let new_expiry = meta.expiry.map(|expiry| self.store.deadline(expiry));
        let Some(item) = self.store.find(&meta.key) else {
            // It expired in this very second.
            return line(reply, "NF");
        };
        let mut digits = itoa::Buffer::new();
        let digits = digits.format(to);
        if meta.value {
            number(reply, b"VA ", digits.len() as u64);
        } else {
            reply.put_slice(b"HD");
        }
        let mut expires = item.expires;
        for flag in &meta.flags {
            match flag[0] {
                b'c' => number(reply, b" c", cas),
                b't' => remaining(reply, expires, now),
                b'T' => expires = new_expiry.unwrap_or(expires),
                b'N' => expires = created.unwrap_or(expires),
                b'O' if is_overlong_opaque(flag) => {
                    reply.clear();
                    line(reply, OPAQUE_TOO_LONG);
                    break;
                }
                b'O' => echo_opaque(reply, flag),
                b'k' => echo_key(reply, &meta.key, meta.binary_key),
                _ => {}
            }
        }
        // memcached sets the TTL on the item it has just replaced, so that a number that grew longer keeps its own.
        if !moved {
            item.expires = expires;
        }
        if reply.starts_with(b"CLIENT_ERROR") {
            return;
        }
        reply.put_slice(b"\r\n");
        if meta.value {
            line(reply, digits);
        }
    }

    fn meta_debug(&mut self, key: &[u8], reply: &mut BytesMut) {
        let now = self.store.now();
        let Some(item) = self.store.find(key) else {
            return line(reply, "EN");
        };
        reply.put_slice(b"ME ");
        put_key(reply, key, item.binary_key);
        let expiry = if item.expires == 0 {
            -1
        } else {
            i64::from(now) - i64::from(item.expires)
        };
        let size = item_size(key.len(), item.value.len(), item.client_flags);
        let fetched = if item.fetched { "yes" } else { "no" };
        let (idle, cas) = (now.wrapping_sub(item.used), item.cas);
        let class = slab_class(size, self.store.largest_item);
        line(
            reply,
            &format!(" exp={expiry} la={idle} cas={cas} fetch={fetched} cls={class} size={size}"),
        );
    }

    fn stats(&self, of: StatsOf, reply: &mut BytesMut, about: &Surroundings<'_>) {
        let store = &self.store;
        let named = |names: &[&str]| {
            names
                .iter()
                .filter_map(|name| self.by_name.get(name))
                .sum::<u64>()
        };
        let mut stat = |name: &str, value: &dyn std::fmt::Display| {
            line(reply, &format!("STAT {name} {value}"))
        };
        match of {
            StatsOf::General => {
                stat("pid", &std::process::id());
                stat("uptime", &store.uptime());
                stat("time", &store.unix_time());
                stat("version", &about.version);
                stat("pointer_size", &usize::BITS);
                stat("max_connections", &1_024);
                stat("curr_connections", &(about.open_connections)());
                stat("total_connections", &about.accepted);
                stat("cmd_get", &(self.hits + self.misses));
                stat(
                    "cmd_set",
                    &named(&["set", "add", "replace", "append", "prepend", "cas", "ms"]),
                );
                stat("cmd_flush", &named(&["flush_all"]));
                stat("cmd_touch", &named(&["touch", "gat", "gats"]));
                stat("get_hits", &self.hits);
                stat("get_misses", &self.misses);
                stat("limit_maxbytes", &store.limit);
                stat("accepting_conns", &1);
                stat("threads", &4);
                stat("bytes", &store.bytes);
                stat("curr_items", &store.len());
                stat("total_items", &store.total_items);
                stat("evictions", &store.evictions);
            }
            StatsOf::Settings => {
                stat("maxbytes", &store.limit);
                stat("maxconns", &1_024);
                stat("item_size_max", &store.largest_item);
                stat("cas_enabled", &"yes");
                stat("flush_enabled", &"yes");
                stat("binding_protocol", &"ascii");
            }
            StatsOf::Empty => {}
        }
        line(reply, "END");
    }
}

/// The slab class memcached would put an item of this size into, with its default growth factor.
fn slab_class(size: usize, largest_item: usize) -> usize {
    const LARGEST_CHUNK: f64 = 524_288.0;
    let mut chunk = 96_usize;
    let mut class = 1;
    while (chunk as f64) <= LARGEST_CHUNK.min(largest_item as f64) / 1.25 {
        if size <= chunk {
            return class;
        }
        chunk = ((chunk as f64 * 1.25) as usize).next_multiple_of(8);
        class += 1;
    }
    class
}

fn line(reply: &mut BytesMut, text: &str) {
    reply.put_slice(text.as_bytes());
    reply.put_slice(b"\r\n");
}

fn classic(reply: &mut BytesMut, noreply: bool, text: &str) {
    if !noreply {
        line(reply, text);
    }
}

fn number(reply: &mut BytesMut, before: &[u8], number: u64) {
    reply.put_slice(before);
    reply.put_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// The `t` flag: seconds left, -1 for ever.
fn remaining(reply: &mut BytesMut, expires: u32, now: u32) {
    if expires == 0 {
        reply.put_slice(b" t-1");
    } else {
        number(reply, b" t", expires.wrapping_sub(now).into());
    }
}

/// `O` and `k`, in the order in which they were given.
fn echo(reply: &mut BytesMut, meta: &Meta, binary_key: bool) {
    for flag in &meta.flags {
        match flag[0] {
            b'O' => echo_opaque(reply, flag),
            b'k' => echo_key(reply, &meta.key, binary_key),
            _ => {}
        }
    }
}

fn echo_opaque(reply: &mut BytesMut, flag: &[u8]) {
    reply.put_u8(b' ');
    reply.put_slice(flag);
}

fn echo_key(reply: &mut BytesMut, key: &[u8], binary: bool) {
    reply.put_slice(b" k");
    put_key(reply, key, binary);
    if binary {
        reply.put_slice(b" b");
    }
}

fn put_key(reply: &mut BytesMut, key: &[u8], binary: bool) {
    use base64::Engine as _;
    if binary {
        reply.put_slice(base64::prelude::BASE64_STANDARD.encode(key).as_bytes());
    } else {
        reply.put_slice(key);
    }
}
