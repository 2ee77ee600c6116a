//! What a connection can carry: requests as tower-memcached writes them, so many at a time, over a
//! blocking socket. Nobody waits for one in particular, nothing can fail, nothing is timed out.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use super::Outcome;

pub struct Connection {
    stream: TcpStream,
    requests: String,
    replies: Vec<u8>,
    /// Of the replies, the bytes that have been read and not yet taken.
    unread: std::ops::Range<usize>,
    opaque: u32,
}

impl Connection {
    pub fn open(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            requests: String::new(),
            replies: vec![0; 64 * 1024],
            unread: 0..0,
            opaque: 0,
        })
    }

    fn next_opaque(&mut self) -> u32 {
        self.opaque = self.opaque.wrapping_add(1);
        self.opaque
    }

    pub fn queue_get(&mut self, key: &str) {
        let opaque = self.next_opaque();
        let _ = write!(self.requests, "mg {key} v f O{opaque}\r\n");
    }

    pub fn queue_set(&mut self, key: &str, value: &str) {
        let opaque = self.next_opaque();
        let length = value.len();
        let _ = write!(
            self.requests,
            "ms {key} {length} T0 O{opaque}\r\n{value}\r\n"
        );
    }

    pub fn queue_get_many(&mut self, keys: &[String]) {
        for key in keys {
            let opaque = self.next_opaque();
            let _ = write!(self.requests, "mg {key} v f q O{opaque}\r\n");
        }
        self.requests.push_str("mn\r\n");
    }

    /// Writes what is queued, in one system call if the socket takes it.
    pub fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(self.requests.as_bytes())?;
        self.requests.clear();
        Ok(())
    }

    /// Sees that this many bytes are there.
    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        if self.unread.start + wanted > self.replies.len() {
            self.replies.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            if wanted > self.replies.len() {
                self.replies.resize(wanted, 0);
            }
        }
        while self.unread.len() < wanted {
            match self.stream.read(&mut self.replies[self.unread.end..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.unread.end += read,
            }
        }
        Ok(())
    }

    /// The length of the next line, its end included.
    fn line(&mut self) -> io::Result<usize> {
        let mut searched = 0;
        loop {
            let unread = &self.replies[self.unread.clone()];
            if let Some(place) = memchr::memchr(b'\n', &unread[searched..]) {
                return Ok(searched + place + 1);
            }
            searched = unread.len();
            self.fill(searched + 1)?;
        }
    }

    fn take(&mut self, length: usize) -> &[u8] {
        let taken = self.unread.start..self.unread.start + length;
        self.unread.start = taken.end;
        &self.replies[taken]
    }

    /// The next reply, and what it must be.
    pub fn reply(&mut self) -> Outcome<Reply<'_>> {
        let length = self.line()?;
        let line = &self.replies[self.unread.start..][..length];
        if let Some(rest) = line.strip_prefix(b"VA ") {
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit());
            let value = digits.fold(0, |value, digit| value * 10 + usize::from(digit - b'0'));
            self.fill(length + value + 2)?;
            let reply = self.take(length + value + 2);
            return Ok(Reply::Value(&reply[length..length + value]));
        }
        match self.take(length) {
            b"MN\r\n" => Ok(Reply::End),
            line if line.starts_with(b"HD ") => Ok(Reply::Stored),
            line if line.starts_with(b"EN\r") => Ok(Reply::Miss),
            other => Err(String::from_utf8_lossy(other).into()),
        }
    }
}

pub enum Reply<'a> {
    Value(&'a [u8]),
    Miss,
    Stored,
    /// Of a multi-key read.
    End,
}
