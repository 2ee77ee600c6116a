//! [`Memcached`]: a real memcached process, for what only the real one can prove.

use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getuid, kill_process, waitid};

/// How often starting is tried, each time with a new port if that is free to choose.
const ATTEMPTS: u32 = 5;
/// How often a starting process is asked whether it answers, with [`PAUSE`] in between: 10 s.
const POLLS: u32 = 1_000;
const PAUSE: Duration = Duration::from_millis(10);

/// A real memcached process on a port of 127.0.0.1, killed when this is dropped.
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
    arguments: Vec<String>,
    port: u16,
    process: Child,
}

/// There is no memcached to be started; the source of the error of [`Memcached::spawn`].
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotInstalled {
    binary: OsString,
}

impl Memcached {
    /// Starts memcached with these arguments on a free port of 127.0.0.1, without UDP, and waits until it answers. As
    /// root, it also gets `-u root`, without which it refuses to run.
    ///
    /// # Errors
    ///
    /// [`NotInstalled`], as an error of kind [`io::ErrorKind::NotFound`], when there is no memcached; otherwise when it
    /// exits at once or does not answer within 10 seconds.
    pub fn spawn(arguments: &[&str]) -> io::Result<Self> {
        let arguments: Vec<String> = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        let mut attempt = 1;
        loop {
            let port = free_port()?;
            match start(&arguments, port) {
                Ok(process) => {
                    return Ok(Self {
                        arguments,
                        port,
                        process,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound || attempt == ATTEMPTS => {
                    return Err(error);
                }
                // Somebody else may have taken the port between our look and memcached's bind.
                Err(_) => attempt += 1,
            }
        }
    }

    /// Where it listens, as `127.0.0.1:port`.
    pub fn address(&self) -> String {
        self.socket_address().to_string()
    }

    /// Where it listens.
    pub fn socket_address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
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

    /// Kills it if need be, and starts an empty one on the same port.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn), and when the port has been taken by somebody else.
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill()?;
        let mut attempt = 1;
        self.process = loop {
            match start(&self.arguments, self.port) {
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

/// Starts a process and waits until it answers.
fn start(arguments: &[String], port: u16) -> io::Result<Child> {
    let binary = std::env::var_os("MEMCACHED").unwrap_or_else(|| "memcached".into());
    let mut command = Command::new(&binary);
    command
        .args(arguments)
        .args(["-l", "127.0.0.1", "-U", "0", "-p", &port.to_string()]);
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
    let outcome = wait_until_it_answers(&mut process, port);
    if outcome.is_err() {
        let _ = process.kill();
        let _ = process.wait();
    }
    outcome.map(|()| process)
}

fn wait_until_it_answers(process: &mut Child, port: u16) -> io::Result<()> {
    for _ in 0..POLLS {
        if let Some(status) = process.try_wait()? {
            return Err(io::Error::other(format!(
                "memcached on port {port} ended with {status} before it answered"
            )));
        }
        if answers(port).is_ok() {
            // If the port was taken, whoever took it has answered, and our process is about to end.
            pause(PAUSE);
            if process.try_wait()?.is_none() {
                return Ok(());
            }
        }
        pause(PAUSE);
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("memcached on port {port} does not answer"),
    ))
}

fn answers(port: u16) -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Whatever it answers, it is up: with authentication on, even `version` is refused.
    stream.write_all(b"version\r\n")?;
    stream.read_exact(&mut [0; 5])
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
    fn a_wrong_argument_is_an_error() {
        assert!(Memcached::spawn(&["--no-such-option"]).is_err());
    }
}
