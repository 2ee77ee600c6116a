//! A stream that says what it is told to, in pieces, and what the fuzzer does with it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What was written, write by write.
pub(super) type Writes = Arc<Mutex<Vec<Vec<u8>>>>;

/// Says nothing before something is written, then its pieces, one for each read, then that it has
/// ended, or nothing more.
pub(super) struct Script {
    pieces: VecDeque<Bytes>,
    ends: bool,
    /// Each read and write makes its caller wait once.
    waits: bool,
    waited: bool,
    writes: Writes,
}

impl Script {
    pub(super) fn new(pieces: impl IntoIterator<Item = Bytes>) -> (Self, Writes) {
        let writes = Writes::default();
        let script = Self {
            pieces: pieces
                .into_iter()
                .filter(|piece| !piece.is_empty())
                .collect(),
            ends: false,
            waits: false,
            waited: false,
            writes: writes.clone(),
        };
        (script, writes)
    }

    pub(super) fn ending(mut self) -> Self {
        self.ends = true;
        self
    }

    #[cfg(test)]
    pub(super) fn waiting(mut self) -> Self {
        self.waits = true;
        self
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.waited = self.waits && !self.waited;
        if self.waited {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn is_asked(&self) -> bool {
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        !writes.is_empty()
    }
}

impl AsyncRead for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.is_asked() || self.poll_turn(cx).is_pending() {
            return Poll::Pending;
        }
        let this = &mut *self;
        match this.pieces.front_mut() {
            Some(piece) => {
                let length = piece.len().min(into.remaining());
                into.put_slice(&piece[..length]);
                piece.advance(length);
                if piece.is_empty() {
                    this.pieces.pop_front();
                }
                Poll::Ready(Ok(()))
            }
            None if this.ends => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Script {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.poll_turn(cx).is_pending() {
            return Poll::Pending;
        }
        let written: Vec<u8> = slices
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        let length = written.len();
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        writes.push(written);
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
