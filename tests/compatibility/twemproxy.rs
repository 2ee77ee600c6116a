//! A real twemproxy in front of real memcached.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Memcached;

use crate::support::{Directory, PATIENCE};

/// How often starting is tried: somebody else may take a port between our look and its bind.
const ATTEMPTS: usize = 5;

/// A twemproxy process with two memcached behind it, over which it spreads the keys. Killed when this is dropped.
pub(crate) struct Twemproxy {
    process: Child,
    place: Place,
    servers: [Memcached; 2],
}

enum Place {
    Port(u16),
    Socket(PathBuf),
}

impl Twemproxy {
    /// Starts it on a free port, or on a Unix socket.
    pub(crate) async fn start(directory: &Directory, socket: Option<&Path>) -> Self {
        let memcached = || Memcached::spawn(&[]).expect("memcached starts");
        let servers = [memcached(), memcached()];
        for attempt in 1.. {
            let place = match socket {
                None => Place::Port(free_port()),
                Some(path) => Place::Socket(path.to_owned()),
            };
            let mut process = spawn(directory, &place, &servers);
            match wait_until_it_answers(&mut process, &place).await {
                Ok(()) => {
                    return Self {
                        process,
                        place,
                        servers,
                    };
                }
                Err(error) => {
                    kill(&mut process);
                    assert!(attempt < ATTEMPTS, "twemproxy does not start: {error}");
                }
            }
        }
        unreachable!("it has panicked before")
    }

    /// As a client is to be told.
    pub(crate) fn address(&self) -> String {
        match &self.place {
            Place::Port(port) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
            Place::Socket(path) => format!("unix:{}", path.display()),
        }
    }

    pub(crate) fn servers(&self) -> &[Memcached] {
        &self.servers
    }

    /// Freezes it: connects succeed, nothing answers.
    pub(crate) fn stop(&self) {
        self.signal("STOP");
    }

    /// Ends [`stop`](Self::stop).
    pub(crate) fn cont(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(status.expect("kill").success(), "{name} of {pid}");
    }
}

impl Drop for Twemproxy {
    fn drop(&mut self) {
        kill(&mut self.process);
    }
}

fn kill(process: &mut Child) {
    // The standard library signals no child that it has reaped.
    let _ = process.kill();
    let _ = process.wait();
}

fn spawn(directory: &Directory, place: &Place, servers: &[Memcached]) -> Child {
    let listen = match place {
        Place::Port(port) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
        Place::Socket(path) => path.display().to_string(),
    };
    // Longer than any test waits: it is not what is to be found out.
    let mut configuration = format!(
        "pool:\n  listen: {listen}\n  hash: murmur\n  distribution: ketama\n  timeout: 60000\n  servers:\n"
    );
    for server in servers {
        configuration += &format!("   - {}:1\n", server.address());
    }
    let file = |name| directory.file(name).display().to_string();
    std::fs::write(file("twemproxy.yml"), configuration).expect("a new file");
    let mut command = Command::new("nutcracker");
    // Not everybody has the directories of the administrator's programs in the PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .env("PATH", format!("{path}:/usr/sbin:/usr/local/sbin"))
        .args(["-c", &file("twemproxy.yml"), "-p", &file("twemproxy.pid")])
        .args(["-o", &file("twemproxy.log"), "-a", "127.0.0.1"])
        .args(["-s", &free_port().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
        .spawn()
        .unwrap_or_else(|error| panic!("twemproxy: apt-get install nutcracker ({error})"))
}

async fn wait_until_it_answers(process: &mut Child, place: &Place) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.try_wait()? {
            return Err(io::Error::other(format!("it has ended: {status}")));
        }
        let talk = async {
            match place {
                Place::Port(port) => {
                    ask(TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await?).await
                }
                Place::Socket(path) => ask(UnixStream::connect(path).await?).await,
            }
        };
        match timeout(Duration::from_secs(1), talk).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) if Instant::now() > until => return Err(error),
            Err(_) if Instant::now() > until => return Err(io::ErrorKind::TimedOut.into()),
            Ok(Err(_)) | Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.write_all(b"version\r\n").await?;
    stream.read_exact(&mut [0; 5]).await.map(drop)
}

/// A port that nobody listens on just now.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}
