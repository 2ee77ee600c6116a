//! As much of an HTTP client as the load needs: one connection, one request at a time.

use std::io::{self, Error, ErrorKind};
use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// A connection that is kept alive. One whose request was dropped before its answer is spoilt.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let header = headers.find(|(header, _)| header.eq_ignore_ascii_case(name));
        header.map(|(_, value)| value.as_str())
    }
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request, JSON if it has a body, and reads the whole answer.
    pub(crate) async fn ask(&mut self, method: &str, path: &str, body: &str) -> io::Result<Answer> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes()).await?;

        let status_line = self.line().await?;
        let status = status_line.split(' ').nth(1).map(str::parse);
        let Some(Ok(status)) = status else {
            return Err(Error::new(ErrorKind::InvalidData, status_line));
        };
        let mut headers = Vec::new();
        while let Some((name, value)) = self.line().await?.split_once(':') {
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let answer = Answer { status, headers };
        // The service streams nothing, so it says each answer's length.
        let length = answer.header("content-length").map(str::parse);
        let Some(Ok(length)) = length else {
            return Err(Error::new(ErrorKind::InvalidData, "no length"));
        };
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok(answer)
    }

    async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line).await? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }
}
