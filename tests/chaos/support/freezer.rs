//! Freezing one thread of a process, by tracing it.
//!
//! A traced thread that is interrupted runs no further until it is let go, while the others go on. A process may trace
//! its own children without any rights (Yama's default included) and without cgroups, so this works wherever ptrace is
//! not forbidden altogether. Only the thread that traces can let go, hence one of its own.

use std::fs;
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tower_memcached::testing::Memcached;

const SWITCH: &str = "CHAOS_FREEZER";

/// Whether the user has switched these tests off.
pub(crate) fn switched_off() -> bool {
    super::switched_off(SWITCH)
}

/// A frozen thread; it goes on when this is dropped.
#[derive(Debug)]
pub(crate) struct Frozen {
    let_go: Option<mpsc::Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Frozen {
    /// Freezes a thread of a child process.
    pub(crate) fn thread(tid: i32) -> Self {
        let (let_go, when) = mpsc::channel();
        let (report, outcome) = mpsc::channel();
        let tracer = std::thread::spawn(move || trace(Pid::from_raw(tid), &report, &when));
        let outcome: Result<(), String> = outcome.recv().expect("the tracer reports");
        if let Err(error) = outcome {
            panic!(
                "thread {tid} cannot be frozen: {error}. ptrace must be allowed (in a container: --cap-add=SYS_PTRACE), \
                 or these tests switched off with {SWITCH}=off"
            );
        }
        Self {
            let_go: Some(let_go),
            tracer: Some(tracer),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.let_go.take());
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}

fn trace(tid: Pid, report: &mpsc::Sender<Result<(), String>>, when: &mpsc::Receiver<()>) {
    let frozen = ptrace::seize(tid, ptrace::Options::empty())
        .and_then(|()| ptrace::interrupt(tid))
        .and_then(|()| waitpid(tid, Some(WaitPidFlag::__WALL)));
    let outcome = match frozen {
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => Err("it is gone".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    };
    let is_frozen = outcome.is_ok();
    let _ = report.send(outcome);
    if is_frozen {
        // Ends when the other side is dropped.
        let _ = when.recv();
        let _ = ptrace::detach(tid, None);
    }
}

/// The threads that serve memcached's connections.
pub(crate) fn workers(memcached: &Memcached) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", memcached.pid())).unwrap();
    let mut workers: Vec<i32> = tasks
        .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .filter(|tid| {
            let name = fs::read_to_string(task_file(memcached, *tid, "comm")).unwrap();
            name.trim() == "mc-worker"
        })
        .collect();
    workers.sort_unstable();
    assert!(!workers.is_empty(), "memcached's threads have other names");
    workers
}

/// The thread that accepts connections.
pub(crate) fn listener(memcached: &Memcached) -> i32 {
    memcached.pid().try_into().unwrap()
}

/// The worker that had the most to do while this ran.
pub(crate) async fn busiest_worker(memcached: &Memcached, during: impl Future<Output = ()>) -> i32 {
    let workers = workers(memcached);
    let switches = |tid: &i32| voluntary_switches(memcached, *tid);
    let before: Vec<u64> = workers.iter().map(switches).collect();
    during.await;
    let busiest = workers
        .iter()
        .zip(before)
        .max_by_key(|(tid, before)| switches(tid) - before);
    *busiest.unwrap().0
}

/// How often a thread has waited for something.
fn voluntary_switches(memcached: &Memcached, tid: i32) -> u64 {
    let status = fs::read_to_string(task_file(memcached, tid, "status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

fn task_file(memcached: &Memcached, tid: i32, file: &str) -> String {
    format!("/proc/{}/task/{tid}/{file}", memcached.pid())
}
