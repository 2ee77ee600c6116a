//! What a server has, asked over a connection of our own.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

async fn ask(address: &str, command: &str) -> BufReader<TcpStream> {
    let mut stream = timeout(PATIENCE, TcpStream::connect(address))
        .await
        .expect("the server is reachable")
        .unwrap();
    stream.write_all(command.as_bytes()).await.unwrap();
    BufReader::new(stream)
}

/// The value of a key.
pub(crate) async fn get(address: &str, key: &str) -> Option<String> {
    let read = async {
        let mut reader = ask(address, &format!("mg {key} v\r\n")).await;
        let mut line = String::new();
        reader.read_line(&mut line).await.unwrap();
        let length = line.strip_prefix("VA ")?.split_whitespace().next()?;
        let mut value = vec![0; length.parse().ok()?];
        reader.read_exact(&mut value).await.unwrap();
        String::from_utf8(value).ok()
    };
    timeout(PATIENCE, read).await.expect("the server answers")
}

/// A figure of `stats`.
pub(crate) async fn stat(address: &str, name: &str) -> u64 {
    let read = async {
        let mut lines = ask(address, "stats\r\n").await.lines();
        while let Some(line) = lines.next_line().await.unwrap() {
            let mut words = line.split_whitespace().skip(1);
            if words.next() == Some(name) {
                return words.next().unwrap().parse().unwrap();
            }
        }
        panic!("no such figure: {name}");
    };
    timeout(PATIENCE, read).await.expect("the server answers")
}

/// Whether a new connection is answered in that time.
pub(crate) async fn answers_within(address: &str, within: Duration) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.write_all(b"mn\r\n").await.ok()?;
        stream.read_exact(&mut [0; 4]).await.ok()
    };
    matches!(timeout(within, asked).await, Ok(Some(_)))
}
