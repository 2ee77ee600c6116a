//! What stands between memcache-async and a connection.
//!
//! memcache-async writes a command in several small pieces, believes every length it is told, and
//! does not look at whose value it reads. A [`Guard`] is the stream it is given instead, for one
//! request: what is written is collected and leaves in one write, and what is read was
//! [checked](Check) first. Nothing is ever held of an answer but a line, and what came with it in
//! one read.

use std::future::poll_fn;
use std::io;
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::io::{AsyncRead, AsyncWrite};
use tokio::io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, ReadBuf};
use tokio::task::coop::poll_proceed;

use super::check::{Check, Stop};
use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::protocol::{Batch, MAX_LINE, Violation};
use crate::response::Response;
use crate::transport::BoxStream;

/// What is read at once where no value is expected, in bytes.
const READ_SIZE: usize = 8 * 1024;

/// Parts of one write: a command, its value, and the end of its line.
const WRITE_SLICES: usize = 4;

/// A connection that carries one request at a time.
pub(super) struct Link {
    stream: BoxStream,
    /// Received, and not looked at.
    input: BytesMut,
    /// To be sent.
    output: Batch,
    /// An answer is on its way, or what comes next cannot be known.
    dirty: bool,
    /// The stream took something of the present request, or of the last one.
    sent: bool,
}

impl Link {
    pub(super) fn new(stream: BoxStream) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            output: Batch::default(),
            dirty: false,
            sent: false,
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty
    }

    pub(super) fn has_sent(&self) -> bool {
        self.sent
    }

    #[cfg(feature = "testing")]
    pub(super) fn held(&self) -> usize {
        self.input.capacity()
    }

    pub(super) fn into_stream(self) -> BoxStream {
        self.stream
    }

    /// Begins a request: nothing may wait to be read, neither an answer to nobody nor the end of the
    /// connection. It is asked once, and does not wait.
    pub(super) async fn begin(&mut self) -> Result<()> {
        self.sent = false;
        if self.dirty {
            let message = "an earlier request has left it in the middle of an answer";
            return Err(Error::new(ErrorKind::ConnectionLost, message));
        }
        let mut byte = [0];
        let mut read = ReadBuf::new(&mut byte);
        let stream = &mut self.stream;
        let waiting = poll_fn(|cx| Poll::Ready(Pin::new(&mut *stream).poll_read(cx, &mut read)));
        let failure = match waiting.await {
            Poll::Pending => return Ok(()),
            // An idle connection that has ended says nothing about the node now.
            Poll::Ready(Ok(())) if read.filled().is_empty() => lost(
                "the server had closed it",
                io::ErrorKind::UnexpectedEof.into(),
            )
            .charged_to(Charge::Nobody),
            Poll::Ready(Ok(())) => Violation::Unsolicited("bytes on an idle connection").into(),
            Poll::Ready(Err(error)) => lost("it had broken", error).charged_to(Charge::Nobody),
        };
        self.dirty = true;
        Err(failure.with_sent(Sent::No))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.input.capacity() - self.input.len() < READ_SIZE / 2 {
            self.input.reserve(READ_SIZE);
        }
        pin!(self.stream.read_buf(&mut self.input)).poll(cx)
    }

    /// One step of sending: ready with `true` when all of it is out.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.output.is_empty() {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            return Poll::Ready(Ok(true));
        }
        self.dirty = true;
        let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
        let filled = self.output.slices(&mut slices);
        let stream = Pin::new(&mut self.stream);
        let written = ready!(stream.poll_write_vectored(cx, &slices[..filled]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.sent = true;
        self.output.advance(written);
        Poll::Ready(Ok(false))
    }
}

/// A connection for one request and its answer.
pub(super) struct Guard<'a, 'b> {
    link: &'a mut Link,
    check: Check<'b>,
    /// Nothing more is sent, and nothing that is not here already will be read.
    broken: Option<Error>,
    /// Something came before all of the request was sent.
    early: bool,
    stopped: Option<Stopped>,
}

/// Why it is over before the end of the answer.
enum Stopped {
    Short(Stop),
    Lost(Error),
}

impl<'a, 'b> Guard<'a, 'b> {
    /// Around a connection on which a request was [begun](Link::begin).
    pub(super) fn new(link: &'a mut Link, check: Check<'b>) -> Self {
        Self {
            link,
            check,
            broken: None,
            early: false,
            stopped: None,
        }
    }

    /// Puts a command, and its value if that is large, behind what is to be sent.
    pub(super) fn put(&mut self, command: impl FnOnce(&mut BytesMut) -> Option<Bytes>) {
        self.link.output.put(command);
    }

    /// Sends what was put, and waits for the answer, which is not memcache-async's.
    pub(super) async fn ask(&mut self) -> io::Result<Response> {
        poll_fn(|cx| self.poll_send(cx)).await?;
        poll_fn(|cx| {
            loop {
                if let Some(response) = self.advance()? {
                    return Poll::Ready(Ok(response));
                }
                ready!(self.poll_more(cx))?;
            }
        })
        .await
    }

    /// Ends the request: the connection is usable again if its answer, or a failure that says as much,
    /// came in full and nothing behind it.
    ///
    /// # Errors
    /// What the answer failed with.
    pub(super) fn finish(self) -> Result<Check<'b>> {
        let in_step = self.broken.is_none() && self.link.input.is_empty();
        let broken = self.broken.map(Stopped::Lost);
        let sent = match self.link.sent {
            true => Sent::Maybe,
            false => Sent::No,
        };
        match self.stopped.or(broken) {
            Some(Stopped::Short(Stop::Failed { error, spoilt })) => {
                self.link.dirty = spoilt || !in_step || !self.link.output.is_empty();
                Err(error)
            }
            Some(Stopped::Short(Stop::Violated(violation))) => {
                Err(Error::from(violation).with_sent(sent))
            }
            Some(Stopped::Lost(error)) => Err(error.with_sent(sent)),
            None if !self.check.is_done() => {
                let message = "the answer was not read to its end";
                Err(Error::new(ErrorKind::Protocol, message).with_sent(sent))
            }
            // Which of the two was meant for us?
            None if !in_step => {
                let violation = Violation::Unsolicited("bytes behind an answer");
                Err(Error::from(violation).with_sent(sent))
            }
            None => {
                self.link.dirty = false;
                Ok(self.check)
            }
        }
    }

    fn stop(&mut self, stopped: Stopped) -> io::Error {
        self.stopped.get_or_insert(stopped);
        io::Error::other("the answer has ended before its end")
    }

    /// Sends what is to be sent. What comes meanwhile is read, up to a line of it: a server that does
    /// not read before its own reply is would otherwise wait for us, and we for it.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.link.poll_write(cx) {
                Poll::Ready(Ok(true)) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(false)) => continue,
                Poll::Ready(Err(error)) => {
                    // A server that closes it may have said why.
                    let _ = self.link.poll_fill(cx);
                    self.early |= !self.link.output.is_empty();
                    self.broken = Some(lost("writing failed", error));
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending => {}
            }
            if self.link.input.len() > MAX_LINE {
                return Poll::Ready(Err(self.stop(Stopped::Short(too_early()))));
            }
            self.broken = match ready!(self.link.poll_fill(cx)) {
                Ok(0) => Some(closed()),
                Err(error) => Some(lost("reading failed", error)),
                Ok(_) => {
                    // The two commands of a get-and-touch are answered one by one.
                    self.early |= !self.link.output.is_empty() && !self.check.is_two();
                    if !self.check.refuses(&self.link.input) {
                        continue;
                    }
                    // The rest of it would be commands. There is no way back from here.
                    self.link.output = Batch::default();
                    None
                }
            };
            return Poll::Ready(Ok(()));
        }
    }

    /// Looks at what has come.
    fn advance(&mut self) -> io::Result<Option<Response>> {
        if self.stopped.is_some() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let outcome = match self.check.advance(&mut self.link.input) {
            Ok(_) if self.early && self.check.accepted() => Err(too_early()),
            outcome => outcome,
        };
        outcome.map_err(|stop| self.stop(Stopped::Short(stop)))
    }

    /// Reads more.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let error = match self.broken.take() {
            Some(broken) => broken,
            None => {
                // A server that never stops talking must not keep us from the time, nor others from
                // theirs.
                let turn = ready!(poll_proceed(cx));
                let read = ready!(self.link.poll_fill(cx));
                turn.made_progress();
                match read {
                    Ok(0) => closed(),
                    Err(error) => lost("reading failed", error),
                    Ok(_) => return Poll::Ready(Ok(())),
                }
            }
        };
        Poll::Ready(Err(self.stop(Stopped::Lost(error))))
    }

    /// Bytes of a value, straight to where they are wanted.
    fn poll_data(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let wanted = into.len().min(self.check.data());
        let mut into = ReadBuf::new(&mut into[..wanted]);
        if !self.link.input.is_empty() {
            let here = self.link.input.len().min(wanted);
            into.put_slice(&self.link.input[..here]);
            self.link.input.advance(here);
        } else if let Some(broken) = self.broken.take() {
            return Poll::Ready(Err(self.stop(Stopped::Lost(broken))));
        } else {
            let turn = ready!(poll_proceed(cx));
            let stream = Pin::new(&mut self.link.stream);
            let read = ready!(stream.poll_read(cx, &mut into));
            turn.made_progress();
            if let Err(error) = read {
                let error = lost("reading failed", error);
                return Poll::Ready(Err(self.stop(Stopped::Lost(error))));
            }
        }
        let taken = into.filled().len();
        if taken == 0 {
            return Poll::Ready(Err(self.stop(Stopped::Lost(closed()))));
        }
        self.check.took(taken);
        Poll::Ready(Ok(taken))
    }
}

impl AsyncRead for Guard<'_, '_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if into.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            let approved = this.check.approved();
            if !approved.is_empty() {
                let length = approved.len().min(into.len());
                into[..length].copy_from_slice(&approved[..length]);
                approved.advance(length);
                return Poll::Ready(Ok(length));
            }
            if this.check.data() > 0 {
                return this.poll_data(cx, into);
            }
            this.advance()?;
            if !this.check.approved().is_empty() || this.check.data() > 0 {
                continue;
            }
            if this.check.is_done() {
                // memcache-async does not ask behind an end that it was told of.
                return Poll::Ready(Ok(0));
            }
            ready!(this.poll_more(cx))?;
        }
    }
}

impl AsyncWrite for Guard<'_, '_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.put(|out| {
            out.put_slice(bytes);
            None
        });
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

fn too_early() -> Stop {
    Violation::Unsolicited("an answer before its request was sent").into()
}

fn closed() -> Error {
    lost("the server closed it", io::ErrorKind::UnexpectedEof.into())
}

fn lost(what: &'static str, error: io::Error) -> Error {
    let message = format!("{what}: {error}");
    let lost = Error::new(ErrorKind::ConnectionLost, message).charged_to(Charge::Node);
    lost.with_source(error)
}
