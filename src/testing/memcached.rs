//! [`Memcached`]: a real memcached process, for what only the real one can prove.

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getuid, kill_process, waitid};

/// How often starting is tried, each time with a new port if that is free to choose.
const ATTEMPTS: u32 = 5;
/// How often a starting process is asked whether it answers, with [`PAUSE`] in between: 10 s.
const POLLS: u32 = 1_000;
const PAUSE: Duration = Duration::from_millis(10);

/// A real memcached process on a port of 127.0.0.1, or on a Unix socket, killed when this is dropped.
///
/// The binary is `memcached` from the `PATH`, or what the environment variable `MEMCACHED` names. All methods block
/// for a short while; they are for tests.
///
/// ```no_run
/// use tower_memcached::testing::Memcached;
///
/// # fn main() -> std::io::Result<()> {
/// let mut memcached = Memcached::spawn(&["-m", "64"])?;
/// println!("listening on {}", memcached.address());
/// memcached.stop()?; // connects succeed, nothing answers
/// memcached.cont()?; // what was sent meanwhile is executed now
/// memcached.restart()?; // empty, on the same port
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Memcached {
    command: Listening,
    process: Child,
}

/// How a [`Memcached`] is to be started. What it needs as files is written to a directory that only this user may
/// read, and removed with the process.
///
/// ```no_run
/// use tower_memcached::testing::Memcached;
///
/// # fn main() -> std::io::Result<()> {
/// let memcached = Memcached::builder()
///     .unix_socket()
///     .authentication("user", "password")
///     .spawn()?;
/// assert!(memcached.address().starts_with("unix:/"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct MemcachedBuilder {
    arguments: Vec<String>,
    unix_socket: bool,
    users: Vec<(String, String)>,
    tls: Option<Tls>,
}

#[derive(Clone)]
struct Tls {
    certificates: String,
    key: String,
    client_ca: Option<String>,
}

/// All that is needed to start it once more.
#[derive(Debug)]
struct Listening {
    arguments: Vec<String>,
    place: Place,
    tls: bool,
    files: Option<Files>,
}

#[derive(Clone, Debug)]
enum Place {
    Port(u16),
    Socket(PathBuf),
}

/// There is no memcached to be started; the source of the error of [`Memcached::spawn`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotInstalled {
    binary: OsString,
}

impl MemcachedBuilder {
    /// Adds arguments, as on the command line.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        self.arguments.extend(arguments);
        self
    }

    /// Listens on a Unix socket (`-s`) instead of a port.
    #[must_use]
    pub fn unix_socket(mut self) -> Self {
        self.unix_socket = true;
        self
    }

    /// Adds a user whose password it asks for on each connection (`-Y`).
    #[must_use]
    pub fn authentication(mut self, user: &str, password: &str) -> Self {
        self.users.push((user.to_owned(), password.to_owned()));
        self
    }

    /// Speaks TLS (`-Z`), with this chain of certificates and this key, both as PEM. On a port only: memcached
    /// speaks none on Unix sockets.
    #[must_use]
    pub fn tls(mut self, certificates: &str, key: &str) -> Self {
        self.tls = Some(Tls {
            certificates: certificates.to_owned(),
            key: key.to_owned(),
            client_ca: None,
        });
        self
    }

    /// Demands a certificate of its clients, signed by one of these, as PEM. Has no effect before
    /// [`tls`](Self::tls) is called.
    #[must_use]
    pub fn client_ca(mut self, certificates: &str) -> Self {
        if let Some(tls) = &mut self.tls {
            tls.client_ca = Some(certificates.to_owned());
        }
        self
    }

    /// Starts it, and waits until it answers.
    ///
    /// # Errors
    ///
    /// As [`Memcached::spawn`]; and when its files cannot be written, or a Unix socket is to speak TLS.
    pub fn spawn(self) -> io::Result<Memcached> {
        if self.unix_socket && self.tls.is_some() {
            let why = "memcached does not speak TLS on Unix sockets";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let mut arguments = self.arguments;
        let speaks_tls = |argument: &String| argument == "-Z" || argument == "--enable-ssl";
        let mut command = Listening {
            tls: self.tls.is_some() || arguments.iter().any(speaks_tls),
            arguments: Vec::new(),
            place: Place::Port(0),
            files: None,
        };
        if self.unix_socket || self.tls.is_some() || !self.users.is_empty() {
            let files = Files::new()?;
            if self.unix_socket {
                command.place = Place::Socket(files.path("s"));
            }
            if !self.users.is_empty() {
                let line = |(user, password): &(String, String)| format!("{user}:{password}\n");
                let users: String = self.users.iter().map(line).collect();
                arguments.extend(["-Y".to_owned(), files.write("users", &users)?]);
            }
            if let Some(tls) = &self.tls {
                let mut options = format!(
                    "ssl_chain_cert={},ssl_key={}",
                    files.write("chain", &tls.certificates)?,
                    files.write("key", &tls.key)?
                );
                if let Some(ca) = &tls.client_ca {
                    let ca = files.write("ca", ca)?;
                    // 2: a client without a certificate is refused.
                    options += &format!(",ssl_ca_cert={ca},ssl_verify_mode=2");
                }
                arguments.extend(["-Z".to_owned(), "-o".to_owned(), options]);
            }
            command.files = Some(files);
        }
        command.arguments = arguments;
        let mut attempt = 1;
        loop {
            if let Place::Port(port) = &mut command.place {
                *port = free_port()?;
            }
            match command.start() {
                Ok(process) => return Ok(Memcached { command, process }),
                Err(error) if error.kind() == io::ErrorKind::NotFound || attempt == ATTEMPTS => {
                    return Err(error);
                }
                // Somebody else may have taken the port between our look and memcached's bind.
                Err(_) => attempt += 1,
            }
        }
    }
}

/// Passwords and keys are nobody's business.
impl fmt::Debug for MemcachedBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("MemcachedBuilder")
            .field("arguments", &self.arguments)
            .field("unix_socket", &self.unix_socket)
            .finish_non_exhaustive()
    }
}

impl Memcached {
    /// Starts memcached with these arguments on a free port of 127.0.0.1, without UDP, and waits until it answers. As
    /// root, it also gets `-u root`, without which it refuses to run. A [`builder`](Self::builder) can do more.
    ///
    /// # Errors
    ///
    /// [`NotInstalled`], as an error of kind [`io::ErrorKind::NotFound`], when there is no memcached; otherwise when it
    /// exits at once or does not answer within 10 seconds.
    pub fn spawn(arguments: &[&str]) -> io::Result<Self> {
        Self::builder().arguments(arguments).spawn()
    }

    /// To be started on a Unix socket, with TLS, or with users and passwords.
    #[must_use]
    pub fn builder() -> MemcachedBuilder {
        MemcachedBuilder::default()
    }

    /// Where it listens, as a client is told: `127.0.0.1:port` or `unix:/path`.
    pub fn address(&self) -> String {
        match &self.command.place {
            Place::Port(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, *port)).to_string(),
            Place::Socket(path) => format!("unix:{}", path.display()),
        }
    }

    /// The port where it listens.
    ///
    /// # Panics
    ///
    /// When it listens on a Unix socket.
    pub fn socket_address(&self) -> SocketAddr {
        match self.command.place {
            Place::Port(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Place::Socket(_) => panic!("it listens on a Unix socket"),
        }
    }

    /// The process id. It is stale after [`kill`](Self::kill).
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Freezes it (SIGSTOP), and waits until all of its threads have stopped: connects succeed, nothing answers.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn stop(&self) -> io::Result<()> {
        self.signal(Signal::STOP)?;
        // Signals are delivered some time after they are sent, to each thread. Looked at, not taken: the process stays
        // waitable, so that a second stop returns, too.
        let seen = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.id()?), seen)?;
        Ok(())
    }

    /// Ends [`stop`](Self::stop) (SIGCONT): what was sent meanwhile is executed.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn cont(&self) -> io::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Kills it (SIGKILL), frozen or not, and waits until it is gone. Does nothing if it is gone already.
    ///
    /// # Errors
    ///
    /// When the operating system refuses.
    pub fn kill(&mut self) -> io::Result<()> {
        // The standard library knows a reaped child and will not signal whoever has its id now.
        self.process.kill()?;
        self.process.wait().map(drop)
    }

    /// Kills it if need be, and starts an empty one in the same place.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn), and when the port has been taken by somebody else.
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill()?;
        let mut attempt = 1;
        self.process = loop {
            match self.command.start() {
                Ok(process) => break process,
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(_) => pause(PAUSE * 10 * attempt),
            }
            attempt += 1;
        };
        Ok(())
    }

    fn id(&self) -> io::Result<Pid> {
        let pid = i32::try_from(self.process.id())
            .ok()
            .and_then(Pid::from_raw);
        pid.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        kill_process(self.id()?, signal)?;
        Ok(())
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        // SIGKILL ends a stopped process too. There is nobody left to tell of a failure.
        let _ = self.kill();
    }
}

impl fmt::Display for NotInstalled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "memcached is not installed: apt-get install memcached (tried to run {}; the environment variable MEMCACHED \
             chooses another)",
            self.binary.display()
        )
    }
}

/// The same words: it is `expect` that will show them.
impl fmt::Debug for NotInstalled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl Error for NotInstalled {}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

impl Listening {
    /// Starts a process and waits until it answers.
    fn start(&self) -> io::Result<Child> {
        let binary = std::env::var_os("MEMCACHED").unwrap_or_else(|| "memcached".into());
        let mut command = Command::new(&binary);
        command.args(&self.arguments);
        match &self.place {
            Place::Port(port) => {
                command.args(["-l", "127.0.0.1", "-U", "0", "-p", &port.to_string()])
            }
            Place::Socket(path) => command.arg("-s").arg(path),
        };
        if getuid().is_root() {
            command.args(["-u", "root"]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(error.kind(), NotInstalled { binary }),
            _ => error,
        })?;
        let outcome = self.wait_until_it_answers(&mut process);
        if outcome.is_err() {
            let _ = process.kill();
            let _ = process.wait();
        }
        outcome.map(|()| process)
    }

    fn wait_until_it_answers(&self, process: &mut Child) -> io::Result<()> {
        for _ in 0..POLLS {
            if let Some(status) = process.try_wait()? {
                let message = format!("memcached ended with {status} before it answered");
                return Err(io::Error::other(message));
            }
            if self.answers().is_ok() {
                // If the port was taken, whoever took it has answered, and our process is about to end.
                pause(PAUSE);
                if process.try_wait()?.is_none() {
                    return Ok(());
                }
            }
            pause(PAUSE);
        }
        let message = "memcached does not answer";
        Err(io::Error::new(io::ErrorKind::TimedOut, message))
    }

    fn answers(&self) -> io::Result<()> {
        let patience = Some(Duration::from_secs(1));
        match &self.place {
            Place::Port(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
                stream.set_read_timeout(patience)?;
                answers(stream, self.tls)
            }
            Place::Socket(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(patience)?;
                answers(stream, self.tls)
            }
        }
    }
}

fn answers(mut stream: impl Read + Write, tls: bool) -> io::Result<()> {
    // Whatever it answers, it is up: with authentication on, even `version` is refused.
    stream.write_all(b"version\r\n")?;
    match stream.read_exact(&mut [0; 5]) {
        // That was not TLS, so it hangs up: with that, an alert, or nothing at all.
        Err(error) if tls && !is_timeout(&error) => Ok(()),
        answered => answered,
    }
}

fn is_timeout(error: &io::Error) -> bool {
    let timeouts = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
    timeouts.contains(&error.kind())
}

/// A directory of this user's own, removed when this is dropped.
#[derive(Debug)]
struct Files(PathBuf);

impl Files {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            // Short, for the path of a Unix socket has 107 bytes at most.
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("tm-{}-{next}", std::process::id());
            let path = std::env::temp_dir().join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                // Of a process that had our id before.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, content: &str) -> io::Result<String> {
        let path = self.path(name);
        fs::write(&path, content)?;
        Ok(path.display().to_string())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // There is nobody left to tell of a failure.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "these are blocking calls of tests, documented as such"
)]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_stopped_continued_killed_and_restarted() {
        let mut memcached = Memcached::spawn(&["-m", "64"]).expect("memcached starts");
        let address = memcached.address();
        memcached.stop().expect("it stops");
        let mut stream = TcpStream::connect(&address).expect("the kernel still accepts");
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a socket option");
        stream
            .write_all(b"version\r\n")
            .expect("the kernel takes it");
        assert!(
            stream.read(&mut [0; 1]).is_err(),
            "a stopped process answered"
        );
        memcached.cont().expect("it continues");
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("a socket option");
        stream.read_exact(&mut [0; 5]).expect("it answers late");

        let killed = memcached.pid();
        memcached.kill().expect("it is killed");
        memcached.kill().expect("once more does nothing");
        assert!(
            TcpStream::connect(&address).is_err(),
            "nobody should listen"
        );
        memcached.restart().expect("it restarts");
        assert_eq!(memcached.address(), address);
        assert_ne!(memcached.pid(), killed);
        memcached.stop().expect("it stops");
    }

    #[test]
    fn on_a_unix_socket_it_leaves_nothing_behind() {
        let builder = Memcached::builder().unix_socket();
        let mut memcached = builder
            .authentication("user", "pass")
            .spawn()
            .expect("it starts");
        let address = memcached.address();
        let path = PathBuf::from(address.strip_prefix("unix:").expect("a Unix socket"));
        memcached.kill().expect("it is killed");
        assert!(UnixStream::connect(&path).is_err(), "nobody should listen");
        memcached.restart().expect("it restarts");
        assert_eq!(memcached.address(), address);
        let mut stream = UnixStream::connect(&path).expect("it listens");
        stream.write_all(b"mn\r\n").expect("it reads");
        let mut refusal = [0; 12];
        stream.read_exact(&mut refusal).expect("it answers");
        assert_eq!(&refusal, b"CLIENT_ERROR");
        drop(memcached);
        assert!(!path.parent().expect("a directory").exists());
    }

    #[test]
    fn a_wrong_argument_is_an_error() {
        assert!(Memcached::spawn(&["--no-such-option"]).is_err());
    }
}
