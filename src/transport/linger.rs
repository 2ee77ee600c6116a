//! Connections that we have given up and the server may not have: what it has been sent it may
//! still execute, a stopped process as soon as it goes on, however long that takes.
//!
//! Such a connection is not dropped but shut down for writing, and kept until the server has closed
//! it, too, or reset it. Then nothing of it will be executed any more, and whoever keeps book of
//! writes in doubt is told that these are over. There are only so many of them, for so long.
//!
//! That book is kept after its node has been taken out of the cluster, so they outlast their node's
//! other connections, but not their cluster.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::{Either, select};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::sleep;

use super::protocol::Dialect;
use super::site::Site;
use super::{BoxStream, Event};
use crate::key::Key;

/// How many of them a node may have.
const AT_MOST: usize = 16;

/// How long each may last.
const LONGEST: Duration = Duration::from_secs(600);

/// How many bytes each may bring: far more than the answers to what was in flight, and less than a
/// server that never stops would keep us busy with.
const MOST: u64 = 256 << 20;

/// Writes whose connection has been given up, until it is known to have ended.
pub(super) struct Lingering {
    site: Arc<Site>,
    keys: Vec<Key>,
    certain: bool,
    stream: BoxStream,
    closing: watch::Receiver<bool>,
}

impl Lingering {
    /// `None` if there are too many already, nobody is left to be told, or there is no runtime to see
    /// to it.
    pub(super) fn new(site: &Arc<Site>, keys: &[Key], stream: BoxStream) -> Option<Self> {
        Handle::try_current().ok()?;
        let closing = site.lingering_ends();
        if *closing.borrow() {
            return None;
        }
        let counted = site.lingering.fetch_add(1, Ordering::Relaxed);
        if counted >= AT_MOST {
            site.lingering.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self {
            site: site.clone(),
            keys: keys.to_vec(),
            certain: false,
            stream,
            closing,
        })
    }

    /// Sees it to its end.
    pub(super) fn spawn(self) {
        drop(tokio::spawn(self.until_it_ends()));
    }

    async fn until_it_ends(mut self) {
        let ended = {
            let ended = std::pin::pin!(drained(&mut self.stream));
            let given_up = std::pin::pin!(sleep(LONGEST));
            let no_more = std::pin::pin!(self.closing.wait_for(|&closing| closing));
            match select(ended, select(given_up, no_more)).await {
                Either::Left((ended, _)) => ended,
                Either::Right(_) => Err(io::ErrorKind::TimedOut.into()),
            }
        };
        // What a proxy has taken it may still have passed on.
        let direct = self.site.spoken.get() != Some(Dialect::Classic { proxy: true });
        self.certain = direct
            && match ended {
                Ok(()) => true,
                Err(error) => matches!(
                    error.kind(),
                    // The last is an end without TLS's own farewell.
                    io::ErrorKind::ConnectionReset
                        | io::ErrorKind::BrokenPipe
                        | io::ErrorKind::UnexpectedEof
                ),
            };
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        self.site.lingering.fetch_sub(1, Ordering::Relaxed);
        self.site.report(&Event::DoubtEnds {
            keys: &self.keys,
            certain: self.certain,
        });
    }
}

/// Says that no more will come, and reads until the server says so, too.
async fn drained(stream: &mut BoxStream) -> io::Result<()> {
    stream.shutdown().await?;
    let (mut discarded, mut left) = ([0; 16 * 1024], MOST);
    loop {
        match stream.read(&mut discarded).await? {
            0 => return Ok(()),
            read => left = left.saturating_sub(read as u64),
        }
        if left == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}
