//! tower-memcached, whole and in parts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tower::{Service as _, ServiceExt as _};
use tower_memcached::{
    Address, Client, Connecting, Connector, Executor, Key, Operation, Outcome as KeyOutcome,
    Payload, Pipelined, PipelinedSettings, Request, Response, StoreMode, Ttl, Value,
};

use super::Outcome;

/// The defaults are 100 ms and 30 ms. What takes longer is to be seen in the table, not to be an error
/// that makes a cell invalid; the timers are the same.
const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// One that has been made already, of whatever kind.
struct Made(Arc<dyn Connector>);

impl Connector for Made {
    fn connect(&self, address: &Address) -> Connecting {
        self.0.connect(address)
    }
}

#[derive(Clone)]
pub struct Whole(Client);

impl Whole {
    pub fn new(
        servers: &[SocketAddr],
        connector: Arc<dyn Connector>,
        executor: Executor,
    ) -> Outcome<Self> {
        let client = Client::builder()
            .nodes(servers.iter().map(SocketAddr::to_string))
            .connector(Made(connector))
            .executor(executor)
            .timeout(TIMEOUT)
            .attempt_timeout(ATTEMPT_TIMEOUT)
            .build()?;
        Ok(Self(client))
    }
}

impl super::Client for Whole {
    type Value = Value;

    async fn get(&mut self, key: &str) -> Outcome<Option<Value>> {
        Ok(self.0.get(key).await?)
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        Ok(self.0.set(key, value, Ttl::NEVER).await?)
    }

    async fn get_many(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        let values = self.0.get_many(keys).await;
        for (key, outcome) in values.iter() {
            match outcome {
                KeyOutcome::Hit(value) => hit(key.as_bytes(), value),
                KeyOutcome::Miss => {}
                KeyOutcome::Error(error) => return Err(error.clone().into()),
            }
        }
        Ok(())
    }

    async fn get_concurrently(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        let values = join_all(keys.iter().map(|key| self.0.get(key))).await;
        for (key, value) in keys.iter().zip(values) {
            if let Some(value) = value? {
                hit(key.as_bytes(), &value);
            }
        }
        Ok(())
    }
}

/// Transports, of which the last byte of the key chooses one.
#[derive(Clone)]
pub struct Transports(Vec<Pipelined>);

impl Transports {
    pub fn new(servers: &[SocketAddr], connector: Arc<dyn Connector>) -> Outcome<Self> {
        let transport = |server: &SocketAddr| {
            Pipelined::new(
                server.to_string().parse()?,
                PipelinedSettings::default().attempt_timeout(ATTEMPT_TIMEOUT),
                connector.clone(),
                &Executor::current(),
            )
        };
        Ok(Self(
            servers.iter().map(transport).collect::<Result<_, _>>()?,
        ))
    }

    async fn call(&mut self, key: &str, operation: Operation) -> Outcome<Response> {
        let last = key.as_bytes().last().copied().unwrap_or_default();
        let place = usize::from(last) % self.0.len();
        let service = self.0[place].ready().await?;
        Ok(service.call(Request::new(operation)).await?)
    }
}

impl super::Client for Transports {
    type Value = Value;

    async fn get(&mut self, key: &str) -> Outcome<Option<Value>> {
        let operation = Operation::Get {
            key: Key::new(key)?,
            with_cas: false,
        };
        match self.call(key, operation).await? {
            Response::Value(value) => Ok(value),
            other => Err(format!("not an answer to a get: {other:?}").into()),
        }
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        let operation = Operation::Store {
            mode: StoreMode::Set,
            key: Key::new(key)?,
            payload: Payload::from(value),
            ttl: Ttl::NEVER,
        };
        match self.call(key, operation).await? {
            Response::Stored(true) => Ok(()),
            other => Err(format!("not stored: {other:?}").into()),
        }
    }
}
