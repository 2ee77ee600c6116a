//! What a scenario leaves behind in this process when it is over: nothing.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use tokio::time::Instant;

use super::PATIENCE;
use super::lateness::pause;

/// What the process had before: each thread and each file descriptor, in a word.
#[derive(Debug)]
pub(crate) struct Before(HashSet<String>);

impl Before {
    pub(crate) fn note() -> Self {
        Self(held().collect())
    }

    /// Waits until nothing is left that was not there before. What is closed ends a moment later.
    pub(crate) fn is_restored(&self) {
        let begun = Instant::now();
        loop {
            let left: Vec<_> = held().filter(|held| !self.0.contains(held)).collect();
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "left behind: {left:?}");
            pause(Duration::from_millis(5));
        }
    }
}

/// Waits until the client's own threads have ended, and with them its connections: its last handle was
/// dropped.
pub(crate) async fn client_is_gone() {
    super::eventually("the client's threads end", || {
        threads().all(|(_, name)| !name.starts_with("memcached-io"))
    })
    .await;
}

fn held() -> impl Iterator<Item = String> {
    // The test harness's own have the path of a test for a name, and come and go as it likes.
    let threads = threads().filter(|(_, name)| !name.contains("::"));
    let threads = threads.map(|(id, name)| format!("thread {id} {name}"));
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let descriptors = descriptors.filter_map(|descriptor| {
        // That of this directory is gone as soon as it is read.
        let target = fs::read_link(descriptor.ok()?.path()).ok()?;
        let target = target.to_string_lossy().into_owned();
        (!target.ends_with("/fd")).then_some(target)
    });
    threads.chain(descriptors)
}

/// The threads of this process, each by its number and name. Linux shows 15 bytes of a name.
fn threads() -> impl Iterator<Item = (String, String)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| {
        let task = task.ok()?;
        // It may have ended since.
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let id = task.file_name().to_string_lossy().into_owned();
        Some((id, name.trim_end().to_owned()))
    })
}
