//! Connections to a server that has every key, in this process and without sockets: a value of 100 bytes,
//! which begins with what is behind the colon of its key. Where instructions are counted, what it does is not,
//! as the names of its functions say.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tower_memcached::{Address, BoxStream, Connecting, Connector};

pub(crate) struct Canned;

impl Connector for Canned {
    fn connect(&self, _: &Address) -> Connecting {
        Box::pin(async { Ok(Box::new(Stream::default()) as BoxStream) })
    }
}

/// What was written is answered at once, and its reader is woken as by a socket.
#[derive(Default)]
struct Stream {
    asked: BytesMut,
    answers: BytesMut,
    /// What a probe has written, and will ask for.
    canary: Bytes,
    reader: Option<Waker>,
}

impl Stream {
    #[inline(never)]
    fn uncounted_write(&mut self, parts: &[IoSlice<'_>]) -> usize {
        let before = self.asked.len();
        for part in parts {
            self.asked.put_slice(part);
        }
        let written = self.asked.len() - before;
        while self.answer() {}
        if !self.answers.is_empty()
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
        written
    }

    /// Answers the first command, if it is whole.
    fn answer(&mut self) -> bool {
        let Some(end) = self.asked.iter().position(|&byte| byte == b'\n') else {
            return false;
        };
        let line = str::from_utf8(&self.asked[..end - 1]).unwrap();
        let mut words = line.split(' ');
        let (command, key) = (words.next(), words.next().unwrap_or_default());
        let (kind, mark) = key.split_once(':').unwrap_or_default();
        let is_canary = kind == "tower-memcached";
        let opaque = line.rsplit(' ').next().unwrap();
        let mut body = 0;
        match command {
            Some("mg") if is_canary => match self.canary.len().checked_sub(2) {
                Some(length) => {
                    let head = format!("VA {length} f0 {opaque}\r\n");
                    self.answers.put_slice(head.as_bytes());
                    self.answers.put_slice(&self.canary);
                }
                None => self
                    .answers
                    .put_slice(format!("EN {opaque}\r\n").as_bytes()),
            },
            Some("mg") => {
                self.answers.put_slice(b"VA 100 f0 ");
                self.answers.put_slice(opaque.as_bytes());
                self.answers.put_slice(b"\r\n");
                self.answers.put_slice(mark.as_bytes());
                self.answers.put_bytes(b'v', 100 - mark.len());
                self.answers.put_slice(b"\r\n");
            }
            Some("ms") => {
                body = words.next().unwrap().parse::<usize>().unwrap() + 2;
                if self.asked.len() < end + 1 + body {
                    return false;
                }
                if is_canary {
                    self.canary = Bytes::copy_from_slice(&self.asked[end + 1..end + 1 + body]);
                }
                self.answers.put_slice(b"HD ");
                self.answers.put_slice(opaque.as_bytes());
                self.answers.put_slice(b"\r\n");
            }
            Some("mn") => self.answers.put_slice(b"MN\r\n"),
            Some("version") => self.answers.put_slice(b"VERSION 1.6.40\r\n"),
            Some("stats") => self.answers.put_slice(b"END\r\n"),
            _ => panic!("{line}"),
        }
        self.asked.advance(end + 1 + body);
        true
    }

    #[inline(never)]
    fn uncounted_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<()> {
        if self.answers.is_empty() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let most = self.answers.len().min(buf.remaining());
        buf.put_slice(&self.answers.split_to(most));
        Poll::Ready(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.uncounted_read(cx, buf).map(Ok)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(self.uncounted_write(&[IoSlice::new(data)])))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(self.uncounted_write(parts)))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
