//! [`Postgres`]: a real PostgreSQL server of a test's own.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{env, fs};

use nix::unistd::{User, geteuid};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Config, NoTls};

use super::PATIENCE;
use super::items::Scratch;

/// A part of the socket's name, and no port of the machine's.
const PORT: u16 = 5432;
/// Where packages put each version, in a directory named after it.
const INSTALLED: &str = "/usr/lib/postgresql";

/// A PostgreSQL server with a new database, which listens on a Unix socket in a directory of its
/// own: no ports, so nobody else's. When it is dropped, or the test's process is gone, it is
/// stopped and its directory removed (`owner.sh` sees to that).
///
/// Dropping it, [`stop`](Self::stop) and [`start_again`](Self::start_again) block for a tenth of a
/// second or so.
#[derive(Debug)]
pub(crate) struct Postgres {
    owner: Mutex<Owner>,
    directory: Scratch,
}

/// The shell that owns the server.
#[derive(Debug)]
struct Owner {
    process: Child,
    /// `None` once it has been told that all is over, by closing it.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// The server's process id.
    server: u32,
}

impl Postgres {
    /// A server for at most 20 connections.
    pub(crate) async fn start() -> Self {
        Self::with_max_connections(20).await
    }

    /// A server that refuses more connections than that.
    ///
    /// # Panics
    /// When PostgreSQL is not installed, or does not start; says why.
    pub(crate) async fn with_max_connections(connections: u32) -> Self {
        let launched = spawn_blocking(move || launch(connections)).await;
        let this = launched.unwrap().unwrap_or_else(|error| panic!("{error}"));
        this.until_it_answers().await;
        this
    }

    /// How to connect to it, as a user who may do everything.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host_path(self.directory.path())
            .port(PORT)
            .user("postgres")
            .dbname("postgres");
        config
    }

    /// The server's process id, while it runs.
    pub(crate) fn pid(&self) -> u32 {
        self.owner().server
    }

    /// All that it writes is in there.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// How many connections it has, ours for this question not counted.
    pub(crate) async fn connections(&self) -> i64 {
        let (client, connection) = self.config().connect(NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        let count = "SELECT count(*) FROM pg_stat_activity
                     WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let count = client.query_one(count, &[]).await.unwrap().get(0);
        drop(client);
        connection.await.unwrap().unwrap();
        count
    }

    /// Stops it at once, its connections with it. What was committed is kept.
    pub(crate) fn stop(&self) {
        let answer = self.owner().order("stop").unwrap();
        assert_eq!(answer, "stopped");
    }

    /// Starts it after [`stop`](Self::stop), with what was committed.
    pub(crate) async fn start_again(&self) {
        {
            let mut owner = self.owner();
            let answer = owner.order("start").unwrap();
            owner.server = answer.parse().unwrap();
        }
        self.until_it_answers().await;
    }

    async fn until_it_answers(&self) {
        let until = Instant::now() + PATIENCE;
        while let Err(error) = self.answers().await {
            let wrong = if !is_running(self.pid()) {
                "ended before it answered"
            } else if Instant::now() >= until {
                "does not answer"
            } else {
                sleep(Duration::from_millis(5)).await;
                continue;
            };
            let log = fs::read_to_string(self.directory().join("log")).unwrap_or_default();
            panic!("PostgreSQL {wrong}: {error}\n{log}");
        }
    }

    async fn answers(&self) -> Result<(), tokio_postgres::Error> {
        let (client, connection) = self.config().connect(NoTls).await?;
        tokio::spawn(connection);
        client.simple_query("SELECT 1").await.map(drop)
    }

    fn owner(&self) -> MutexGuard<'_, Owner> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Owner {
    fn order(&mut self, order: &str) -> io::Result<String> {
        if let Some(orders) = &mut self.orders {
            writeln!(orders, "{order}")?;
        }
        self.answer()
    }

    fn answer(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.orders = None;
        // Nobody is left to be told if it fails.
        let _ = self.process.wait();
    }
}

/// Whether a process runs. One that has ended does not, waited for or not.
pub(crate) fn is_running(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| !state.trim_start().starts_with(['Z', 'X']))
}

/// All that runs on behalf of a server: it, its processes and its owner.
pub(crate) fn processes_in(directory: &Path) -> Vec<u32> {
    let directory = directory.as_os_str().as_encoded_bytes();
    let mut pids = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // The directory is among its arguments; what the server forks only works in it.
        let arguments = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let lives_in = fs::read_link(process.path().join("cwd")).unwrap_or_default();
        let lives_in = lives_in.as_os_str().as_encoded_bytes();
        let names = |text: &[u8]| text.windows(directory.len()).any(|part| part == directory);
        if names(&arguments) || names(lives_in) {
            pids.push(pid);
        }
    }
    pids
}

fn launch(connections: u32) -> Result<Postgres, String> {
    let named = env::var_os("POSTGRES_BIN");
    let path = env::var_os("PATH").unwrap_or_default();
    let bin = binaries(named, &path, Path::new(INSTALLED))?;
    let temporary = env::temp_dir();
    let failed = |error: io::Error| {
        let temporary = temporary.display();
        format!("PostgreSQL cannot be started in {temporary}, as an unprivileged user: {error}")
    };
    let directory = Scratch::new("tower-memcached-postgres").map_err(failed)?;
    let settings = [
        "listen_addresses=".to_owned(),
        format!("unix_socket_directories={}", directory.path().display()),
        format!("port={PORT}"),
        format!("max_connections={connections}"),
        // All of them are for anybody.
        "superuser_reserved_connections=0".to_owned(),
        // It is to survive its own end, not the machine's.
        "fsync=off".to_owned(),
        "full_page_writes=off".to_owned(),
        // Small, and with nothing in the background that another server here would feel.
        "shared_buffers=8MB".to_owned(),
        "wal_level=minimal".to_owned(),
        "max_wal_senders=0".to_owned(),
        "autovacuum=off".to_owned(),
        "jit=off".to_owned(),
    ];
    let mut command = Command::new("/bin/sh");
    command.args(["-c", include_str!("owner.sh"), "owner.sh"]);
    command.arg(&bin).arg(directory.path());
    for setting in settings {
        command.args(["-c", &setting]);
    }
    if geteuid().is_root() {
        // PostgreSQL does not run as root.
        let nobody = User::from_name("nobody").map_err(io::Error::from);
        let nobody = nobody.map_err(failed)?.ok_or(
            "PostgreSQL cannot be started: it does not run as root, and there is no user nobody",
        )?;
        let (uid, gid) = (nobody.uid.as_raw(), nobody.gid.as_raw());
        chown(directory.path(), Some(uid), Some(gid)).map_err(failed)?;
        command.uid(uid).gid(gid);
    }
    // Whoever kills the test's process group is not to kill who cleans up after it.
    command.process_group(0).current_dir(directory.path());
    // What goes wrong is in the log. It outlives a test that is killed, and whoever waits for the end
    // of the test's output is not to wait for it.
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut process = command.spawn().map_err(failed)?;
    let (orders, answers) = (process.stdin.take(), process.stdout.take());
    let mut owner = Owner {
        process,
        orders,
        answers: BufReader::new(answers.expect("it is a pipe")),
        server: 0,
    };
    let answer = owner.answer().map_err(failed)?;
    owner.server = match answer.parse() {
        Ok(server) => server,
        Err(_) => {
            let mut why = String::new();
            let _ = owner.answers.read_to_string(&mut why);
            return Err(format!(
                "PostgreSQL's initdb in {} {answer}: {why}",
                bin.display()
            ));
        }
    };
    Ok(Postgres {
        owner: Mutex::new(owner),
        directory,
    })
}

/// The directory with the programs of PostgreSQL: the one named, or one of the path, or that of the
/// newest version among those installed.
fn binaries(named: Option<OsString>, path: &OsStr, installed: &Path) -> Result<PathBuf, String> {
    let has_all = |bin: &PathBuf| {
        ["initdb", "postgres"]
            .iter()
            .all(|name| bin.join(name).is_file())
    };
    let mut candidates = match named {
        Some(named) => vec![PathBuf::from(named)],
        None => {
            let versions = fs::read_dir(installed).into_iter().flatten().flatten();
            let mut versions: Vec<_> = versions.map(|version| version.path()).collect();
            versions.sort_by_key(|version| std::cmp::Reverse(major(version)));
            let versions = versions.iter().map(|version| version.join("bin"));
            env::split_paths(path).chain(versions).collect()
        }
    };
    candidates.retain(has_all);
    candidates.into_iter().next().ok_or_else(|| {
        format!(
            "PostgreSQL is not installed: apt-get install postgresql (there is no initdb with a postgres in the PATH or in \
             {}/*/bin; the environment variable POSTGRES_BIN names another directory)",
            installed.display()
        )
    })
}

fn major(version: &Path) -> Option<u32> {
    version.file_name()?.to_str()?.parse().ok()
}

mod tests {
    use super::*;

    fn install(bin: &Path) {
        fs::create_dir_all(bin).unwrap();
        for program in ["initdb", "postgres"] {
            fs::write(bin.join(program), "").unwrap();
        }
    }

    #[test]
    fn the_named_one_is_taken_then_the_path_then_the_newest() {
        let scratch = Scratch::new("tower-memcached-binaries").unwrap();
        let at = |path: &str| scratch.path().join(path);
        for bin in ["9/bin", "15/bin", "on-the-path", "named"] {
            install(&at(bin));
        }
        fs::create_dir_all(at("17/bin")).unwrap(); // removed, but for what it left behind
        let path = at("on-the-path").into_os_string();
        let named = Some(at("named").into_os_string());
        assert_eq!(binaries(named, &path, scratch.path()), Ok(at("named")));
        let on_the_path = binaries(None, &path, scratch.path());
        assert_eq!(on_the_path, Ok(at("on-the-path")));
        let newest = binaries(None, "".as_ref(), scratch.path());
        assert_eq!(newest, Ok(at("15/bin")));
    }

    #[test]
    fn where_there_is_none_the_error_says_what_to_do() {
        let nowhere = Scratch::new("tower-memcached-binaries").unwrap();
        let error = binaries(None, nowhere.path().as_os_str(), nowhere.path()).unwrap_err();
        assert!(error.contains("apt-get install postgresql"), "{error}");
        install(&nowhere.path().join("15/bin"));
        let wrong = Some("/no/such/directory".into());
        assert!(binaries(wrong, "".as_ref(), nowhere.path()).is_err());
    }
}
