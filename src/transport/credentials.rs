//! Users and passwords: memcached's own authentication in text (`-Y`), which is not SASL.
//!
//! A server that demands it answers nothing but `CLIENT_ERROR unauthenticated` until it has been sent a
//! `set`, of any key, whose value is a user and a password. One that does not demand it would store them,
//! for everybody to read. So they are sent to nobody who has not just refused `version`.

use std::fmt;
use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{BoxStream, ConnectFailure};
use crate::error::{Charge, Error, ErrorKind, Invalid};
use crate::protocol::{Failure, Reply};

/// A user and a password for servers that demand them (memcached's `-Y`): see
/// [`ClientBuilder::credentials`](crate::ClientBuilder::credentials).
///
/// The password is in no `Debug` output, no error, and is not serialized: a configuration that is written
/// out has to be given it again.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Credentials {
    user: String,
    #[cfg_attr(
        feature = "serde",
        serde(skip_serializing, deserialize_with = "password")
    )]
    password: String,
}

/// One that is no text, such as a number, is not repeated by the error.
#[cfg(feature = "serde")]
fn password<'de, D: serde::Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let password: Result<String, _> = serde::Deserialize::deserialize(from);
    password.map_err(|_| serde::de::Error::custom("credentials.password is no text"))
}

impl Credentials {
    /// A user, and that user's password. Neither may be empty, or hold spaces or control characters,
    /// which memcached's file cannot hold either; that is found when the client is built.
    #[must_use]
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            user: user.into(),
            password: password.into(),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let settings = [("user", &self.user), ("password", &self.password)];
        for (setting, value) in settings {
            let cannot_be = |byte: u8| byte == b' ' || byte.is_ascii_control();
            let why = if value.is_empty() {
                "is empty"
            } else if value.bytes().any(cannot_be) {
                "must not hold spaces or control characters"
            } else {
                continue;
            };
            return Err(Invalid::new(setting, why).under("credentials"));
        }
        Ok(())
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Whether an answer to `version` says that the server wants to know first who asks.
pub(super) fn are_demanded(reply: &Reply) -> bool {
    matches!(reply, Reply::Failure(Failure::Client, text) if text.contains("unauthenticated"))
}

/// Says who asks, to a server that demands it.
pub(super) async fn authenticate(
    stream: &mut BoxStream,
    credentials: Option<&Credentials>,
) -> Result<(), (ConnectFailure, Error)> {
    let Some(Credentials { user, password }) = credentials else {
        return Err(unauthenticated(
            "it demands credentials, and there are none",
        ));
    };
    let length = user.len() + 1 + password.len();
    let request = format!("set credentials 0 0 {length}\r\n{user} {password}\r\n");
    match ask(stream, request.as_bytes()).await {
        Ok(answer) if answer == b"STORED\r\n" => Ok(()),
        // What it says besides is not repeated: it might be what it was sent.
        Ok(answer) if answer.starts_with(b"CLIENT_ERROR ") => Err(refused()),
        Ok(_) => Err(unauthenticated("it answers credentials like no memcached")),
        Err(error) => {
            let message = format!("it closed before it answered the credentials: {error}");
            let error = Error::new(ErrorKind::ConnectionFailed, message).with_source(error);
            Err((ConnectFailure::Other, error.charged_to(Charge::Node)))
        }
    }
}

pub(super) fn refused() -> (ConnectFailure, Error) {
    unauthenticated("it refuses the credentials")
}

fn unauthenticated(why: &'static str) -> (ConnectFailure, Error) {
    let error = Error::new(ErrorKind::Unauthenticated, why).charged_to(Charge::Node);
    (ConnectFailure::Other, error)
}

/// A line, or as much of one as no answer to this is longer than.
async fn ask(stream: &mut BoxStream, request: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    let mut limited = stream.take(256);
    while !answer.ends_with(b"\r\n") {
        if limited.read_buf(&mut answer).await? == 0 {
            if limited.limit() == 0 {
                break;
            }
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_shown_to_nobody() {
        let credentials = Credentials::new("user", "secret\n");
        assert!(!format!("{credentials:?}").contains("secret"));
        let error = Error::from(credentials.validate().unwrap_err()).to_string();
        assert!(error.contains("credentials.password: must not"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        for (user, password, good) in [
            ("u", "p:\u{e4}", true),
            ("", "p", false),
            ("u", "", false),
            ("u u", "p", false),
            ("u", "p p", false),
            ("u\r\n", "p", false),
            ("u", "p\0", false),
            ("u", "p\u{7f}", false),
        ] {
            let valid = Credentials::new(user, password).validate();
            assert_eq!(valid.is_ok(), good, "{user:?} {password:?}");
        }
    }

    /// What a server is sent, and what is made of its answer, whole or in parts.
    #[tokio::test]
    async fn an_answer_is_what_its_line_says() {
        let request = b"set credentials 0 0 11\r\nuser secret\r\n";
        for (answer, expected) in [
            ("STORED\r\n", None),
            (
                "CLIENT_ERROR no secret\r\n",
                Some(ErrorKind::Unauthenticated),
            ),
            ("NOT_STORED\r\n", Some(ErrorKind::Unauthenticated)),
            (&"x".repeat(300), Some(ErrorKind::Unauthenticated)),
            ("STOR", Some(ErrorKind::ConnectionFailed)),
        ] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            let server = async move {
                let mut asked = vec![0; request.len()];
                theirs.read_exact(&mut asked).await.unwrap();
                assert_eq!(asked, request);
                for byte in answer.bytes() {
                    if theirs.write_all(&[byte]).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            };
            let client = async move {
                let mut stream: BoxStream = Box::new(ours);
                let credentials = Credentials::new("user", "secret");
                authenticate(&mut stream, Some(&credentials)).await
            };
            let ((), outcome) = tokio::join!(server, client);
            let outcome = outcome.err().map(|(_, error)| error);
            if let Some(error) = &outcome {
                assert!(
                    !format!("{error} {error:?}").contains("secret"),
                    "{error:?}"
                );
            }
            assert_eq!(outcome.map(|error| error.kind()), expected, "{answer:?}");
        }
    }
}
