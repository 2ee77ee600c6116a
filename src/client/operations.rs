//! The operations: each makes a request and takes its response apart.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use tokio::time::Instant;
use tower::Service;

use super::{Client, MultiGet, Outcome, misfit};
use crate::error::{BoxError, Error, Result};
use crate::executor::after;
use crate::key::{IntoKey, Key};
use crate::read_through::{Cache, Loads, Query};
use crate::request::{Direction, Operation, Purpose, Request, StoreMode};
use crate::response::{CasOutcome, NodeResult, Response};
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload, Value};

fn store(mode: StoreMode, key: impl IntoKey, payload: Payload, ttl: Ttl) -> Result<Operation> {
    Ok(Operation::Store {
        mode,
        key: key.into_key()?,
        payload,
        ttl,
    })
}

fn stored(response: Response) -> Result<bool> {
    match response {
        Response::Stored(stored) => Ok(stored),
        other => Err(misfit(&other)),
    }
}

#[inline]
fn value(response: Response) -> Result<Option<Value>> {
    match response {
        Response::Value(value) => Ok(value),
        other => Err(misfit(&other)),
    }
}

impl<S> Client<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    #[inline]
    fn ask(&self, operation: Operation) -> impl Future<Output = Result<Response>> + use<'_, S> {
        self.call(Request::new(operation))
    }

    /// Reads a value; `None` is a miss.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey) before anything is sent; otherwise
    /// see [`ErrorKind`](crate::ErrorKind). This holds for every operation.
    pub async fn get(&self, key: impl IntoKey) -> Result<Option<Value>> {
        let operation = Operation::Get {
            key: key.into_key()?,
            with_cas: false,
        };
        self.ask(operation).await.and_then(value)
    }

    /// Reads a value with its CAS token ([`Value::cas`]).
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub async fn gets(&self, key: impl IntoKey) -> Result<Option<Value>> {
        let operation = Operation::Get {
            key: key.into_key()?,
            with_cas: true,
        };
        self.ask(operation).await.and_then(value)
    }

    /// Reads many values, each node's in one batch. Every key has its own outcome: a node that is
    /// out makes errors of its own keys (or, with redistribute, misses at the next node), and an
    /// invalid key is that key's error.
    pub async fn get_many<I>(&self, keys: I) -> MultiGet
    where
        I: IntoIterator,
        I::Item: IntoKey,
    {
        let asked = Asked::parse(keys);
        let operation = Operation::GetMany {
            keys: asked.valid.clone(),
        };
        let answer = match asked.valid.len() {
            0 => Ok(Vec::new()),
            count => match self.ask(operation).await {
                Ok(Response::Values(values)) if values.len() == count => Ok(values),
                Ok(other) => Err(misfit(&other)),
                Err(error) => Err(error),
            },
        };
        match answer {
            Ok(values) => asked.answered(values),
            Err(error) => {
                let values = vec![Err(error); asked.valid.len()];
                asked.answered(values)
            }
        }
    }

    /// Reads a value and gives it a new TTL.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub async fn get_and_touch(&self, key: impl IntoKey, ttl: Ttl) -> Result<Option<Value>> {
        let key = key.into_key()?;
        let operation = Operation::GetAndTouch { key, ttl };
        self.ask(operation).await.and_then(value)
    }

    /// Writes a value, whatever is there.
    ///
    /// # Errors
    /// As for [`get`](Self::get);
    /// [`ErrorKind::ValueTooLarge`](crate::ErrorKind::ValueTooLarge) before anything is sent if it
    /// is over the client's limit. If it is over the server's, the server has deleted the old
    /// value.
    pub async fn set(&self, key: impl IntoKey, value: impl Into<Payload>, ttl: Ttl) -> Result<()> {
        let operation = store(StoreMode::Set, key, value.into(), ttl)?;
        self.ask(operation).await.and_then(stored).map(|_| ())
    }

    /// Writes a value where none is; says whether it was stored.
    ///
    /// # Errors
    /// As for [`set`](Self::set). Never repeated when it may have been sent.
    pub async fn add(
        &self,
        key: impl IntoKey,
        value: impl Into<Payload>,
        ttl: Ttl,
    ) -> Result<bool> {
        let operation = store(StoreMode::Add, key, value.into(), ttl)?;
        self.ask(operation).await.and_then(stored)
    }

    /// Writes a value where one is; says whether it was stored.
    ///
    /// # Errors
    /// As for [`set`](Self::set).
    pub async fn replace(
        &self,
        key: impl IntoKey,
        value: impl Into<Payload>,
        ttl: Ttl,
    ) -> Result<bool> {
        let operation = store(StoreMode::Replace, key, value.into(), ttl)?;
        self.ask(operation).await.and_then(stored)
    }

    /// Puts bytes behind a value that is there, whose flags and TTL stay; says whether one was.
    ///
    /// # Errors
    /// As for [`set`](Self::set). Never repeated when it may have been sent, and never moved.
    pub async fn append(&self, key: impl IntoKey, value: impl Into<Payload>) -> Result<bool> {
        let operation = store(StoreMode::Append, key, value.into(), Ttl::NEVER)?;
        self.ask(operation).await.and_then(stored)
    }

    /// Puts bytes before a value that is there, whose flags and TTL stay; says whether one was.
    ///
    /// # Errors
    /// As for [`append`](Self::append).
    pub async fn prepend(&self, key: impl IntoKey, value: impl Into<Payload>) -> Result<bool> {
        let operation = store(StoreMode::Prepend, key, value.into(), Ttl::NEVER)?;
        self.ask(operation).await.and_then(stored)
    }

    /// Writes a value if the one there is still the one that `token` was read with. A token from
    /// another node, or from before its connections were made anew, is answered
    /// [`CasOutcome::Exists`] without being sent (see [`CasToken`]).
    ///
    /// # Errors
    /// As for [`set`](Self::set). Never repeated when it may have been sent, and never moved.
    pub async fn cas(
        &self,
        key: impl IntoKey,
        value: impl Into<Payload>,
        ttl: Ttl,
        token: CasToken,
    ) -> Result<CasOutcome> {
        let operation = Operation::CompareAndSwap {
            key: key.into_key()?,
            payload: value.into(),
            ttl,
            token,
        };
        match self.ask(operation).await? {
            Response::Swapped(outcome) => Ok(outcome),
            other => Err(misfit(&other)),
        }
    }

    /// Removes a value; says whether there was one.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub async fn delete(&self, key: impl IntoKey) -> Result<bool> {
        let key = key.into_key()?;
        match self.ask(Operation::Delete { key }).await? {
            Response::Deleted(deleted) => Ok(deleted),
            other => Err(misfit(&other)),
        }
    }

    /// Gives a value a new TTL; says whether there is one.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub async fn touch(&self, key: impl IntoKey, ttl: Ttl) -> Result<bool> {
        let key = key.into_key()?;
        match self.ask(Operation::Touch { key, ttl }).await? {
            Response::Touched(touched) => Ok(touched),
            other => Err(misfit(&other)),
        }
    }

    /// Adds to a decimal number, wrapping at 2^64, and says what it is now; `None` is a miss.
    ///
    /// # Errors
    /// As for [`get`](Self::get); [`ErrorKind::NotANumber`](crate::ErrorKind::NotANumber) if the
    /// value is none. Never repeated when it may have been sent, and never moved.
    pub async fn increment(&self, key: impl IntoKey, delta: u64) -> Result<Option<u64>> {
        self.count(key, delta, Direction::Up).await
    }

    /// Subtracts from a decimal number, stopping at 0, and says what it is now; `None` is a miss.
    ///
    /// # Errors
    /// As for [`increment`](Self::increment).
    pub async fn decrement(&self, key: impl IntoKey, delta: u64) -> Result<Option<u64>> {
        self.count(key, delta, Direction::Down).await
    }

    async fn count(
        &self,
        key: impl IntoKey,
        delta: u64,
        direction: Direction,
    ) -> Result<Option<u64>> {
        let operation = Operation::Arithmetic {
            key: key.into_key()?,
            delta,
            direction,
        };
        match self.ask(operation).await? {
            Response::Counter(number) => Ok(number),
            other => Err(misfit(&other)),
        }
    }

    /// Each node's version.
    ///
    /// # Errors
    /// Those of the whole request; a node's own are in its [`NodeResult`].
    pub async fn version(&self) -> Result<Vec<NodeResult<String>>> {
        self.ask_every(Operation::Version, |response| match response {
            Response::Version(version) => Ok(version),
            other => Err(misfit(&other)),
        })
        .await
    }

    /// Removes everything from each node, all functional groups' keys included.
    ///
    /// # Errors
    /// Those of the whole request; a node's own are in its [`NodeResult`]. A node whose breaker is
    /// open is not flushed, and says so.
    pub async fn flush_all(&self) -> Result<Vec<NodeResult<()>>> {
        self.ask_every(Operation::FlushAll, |response| match response {
            Response::Flushed => Ok(()),
            other => Err(misfit(&other)),
        })
        .await
    }

    /// Each node's counters, by name.
    ///
    /// # Errors
    /// Those of the whole request; a node's own are in its [`NodeResult`].
    pub async fn stats(&self) -> Result<Vec<NodeResult<BTreeMap<String, String>>>> {
        self.ask_every(Operation::Stats, |response| match response {
            Response::Stats(stats) => Ok(stats),
            other => Err(misfit(&other)),
        })
        .await
    }

    async fn ask_every<T>(
        &self,
        operation: Operation,
        take: impl Fn(Response) -> Result<T>,
    ) -> Result<Vec<NodeResult<T>>> {
        let answers = match self.ask(operation).await? {
            Response::Nodes(answers) => answers,
            // A hand-built stack may end in a single node.
            other => vec![NodeResult::new(Arc::from("service"), Ok(other))],
        };
        let taken = answers
            .into_iter()
            .map(|answer| NodeResult::new(answer.node, answer.result.and_then(&take)));
        Ok(taken.collect())
    }
}

/// The keys of a multi-key operation, as they were given.
struct Asked {
    valid: Arc<[Key]>,
    /// What is wrong with the others, by their places.
    invalid: Vec<(usize, Error)>,
}

impl Asked {
    fn parse<I>(keys: I) -> Self
    where
        I: IntoIterator,
        I::Item: IntoKey,
    {
        let keys = keys.into_iter();
        let (mut valid, mut invalid) = (Vec::with_capacity(keys.size_hint().0), Vec::new());
        for (place, key) in keys.enumerate() {
            match key.into_key() {
                Ok(key) => valid.push(key),
                Err(error) => invalid.push((place, error)),
            }
        }
        let valid = valid.into();
        Self { valid, invalid }
    }

    /// With one answer for each valid key.
    fn answered(self, answers: Vec<Result<Option<Value>>>) -> MultiGet {
        let places = self.invalid.iter().map(|&(place, _)| place).collect();
        let answers = answers.into_iter().map(Outcome::from);
        let outcomes = match self.invalid.len() {
            // In the memory that the answers were in.
            0 => answers.collect(),
            invalid => {
                let (mut answers, all) = (answers, self.valid.len() + invalid);
                let mut invalid = self.invalid.into_iter().peekable();
                let mut at = |place| match invalid.next_if(|(at, _)| *at == place) {
                    Some((_, error)) => Some(Outcome::Error(error)),
                    None => answers.next(),
                };
                (0..all).filter_map(&mut at).collect()
            }
        };
        MultiGet::new(self.valid, places, outcomes)
    }
}

/// Reads that load what the cache does not have.
impl<S: Cache> Client<S> {
    /// Reads a value, or loads it and puts it into the cache: see
    /// [`read_through`](crate::read_through).
    ///
    /// The loader runs on this task and may borrow. Of all callers of this client that miss on a
    /// key at once, one loads and the others share its value, or its error; if the one that loads
    /// is dropped, panics or runs out of time, another takes over. With leases the same holds among
    /// all processes: one loads and the others wait a while for its value. A cache that fails is
    /// treated like a miss: the loader is asked, within the limits of the
    /// [guard](crate::LoadGuard).
    ///
    /// What was loaded is written behind the answer, and only if nobody has written or
    /// [invalidated](Self::invalidate) the key since the load began. That the loader has found
    /// nothing is kept only with a
    /// [`negative_ttl`](crate::ReadThroughSettings::negative_ttl). A value that is
    /// [stale](Value::is_stale) is given only if the settings allow it.
    ///
    /// # Errors
    /// [`ErrorKind::Load`](crate::ErrorKind::Load) if the loader fails (its error is the
    /// [`source`](std::error::Error::source)), panics, or takes longer than
    /// [`load_timeout`](crate::ReadThroughSettings::load_timeout);
    /// [`ErrorKind::LoadShed`](crate::ErrorKind::LoadShed) if the database is to be spared;
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey);
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown) once the client is being
    /// [shut down](Self::shutdown): that is no failure of the cache, and nothing is loaded.
    ///
    /// # Cancel safety
    /// Dropping it drops the loader if it is this caller's that runs; a waiter runs its own then.
    ///
    /// ```no_run
    /// # async fn example(client: tower_memcached::Client) -> Result<(), tower_memcached::Error> {
    /// use tower_memcached::Ttl;
    ///
    /// let user = client
    ///     .get_or_load("user:42", Ttl::secs(300), || async {
    ///         Ok::<_, std::io::Error>(Some("from the database"))
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_or_load<F, Fut, V, E>(
        &self,
        key: impl IntoKey,
        ttl: Ttl,
        loader: F,
    ) -> Result<Option<Value>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<V>, E>>,
        V: Into<Payload>,
        E: Into<BoxError>,
    {
        let key = key.into_key()?;
        self.load_by(self.query(ttl), key, loader).await
    }

    pub(crate) async fn load_by<F, Fut, V, E>(
        &self,
        query: Query<S>,
        key: Key,
        loader: F,
    ) -> Result<Option<Value>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<V>, E>>,
        V: Into<Payload>,
        E: Into<BoxError>,
    {
        let mut loader = Some(loader);
        let mut loads = Loads::of_caller(|keys: Vec<Key>| {
            let loader = loader.take();
            async move {
                // One call leads the flight of its key once: what comes of that is its answer.
                let loader = loader.ok_or("the loader was asked twice")?;
                let loaded = loader().await.map_err(Into::into)?;
                Ok(keys.into_iter().zip(loaded.map(Into::into)).collect())
            }
        });
        let reads = &self.shared.reads;
        let _operating = reads.tracker().operate()?;
        reads.get(&query, key, &mut loads).await
    }

    /// Reads many values, and loads all that are missing in one call of the loader: it is given
    /// their keys, and returns what there is of them. Otherwise like
    /// [`get_or_load`](Self::get_or_load), key by key.
    ///
    /// What another caller or process loads already is waited for, so the loader may be called once
    /// more, with what these have not brought; not at all if nothing is missing. One call is one
    /// load to the guard.
    ///
    /// ```no_run
    /// # async fn example(client: tower_memcached::Client) -> Result<(), tower_memcached::Error> {
    /// use std::collections::HashMap;
    /// use tower_memcached::{Key, Ttl};
    ///
    /// let prices = client
    ///     .get_many_or_load(["price:1", "price:2"], Ttl::secs(60), |missing: Vec<Key>| async move {
    ///         // SELECT ... WHERE id IN (...)
    ///         let found: HashMap<Key, String> = missing.into_iter().map(|key| (key, "9.99".into())).collect();
    ///         Ok::<_, std::io::Error>(found)
    ///     })
    ///     .await;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_many_or_load<I, F, Fut, M, V, E>(
        &self,
        keys: I,
        ttl: Ttl,
        loader: F,
    ) -> MultiGet
    where
        I: IntoIterator,
        I::Item: IntoKey,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Result<M, E>>,
        M: IntoIterator<Item = (Key, V)>,
        V: Into<Payload>,
        E: Into<BoxError>,
    {
        self.load_many_by(self.query(ttl), keys, loader).await
    }

    pub(crate) async fn load_many_by<I, F, Fut, M, V, E>(
        &self,
        query: Query<S>,
        keys: I,
        mut loader: F,
    ) -> MultiGet
    where
        I: IntoIterator,
        I::Item: IntoKey,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Result<M, E>>,
        M: IntoIterator<Item = (Key, V)>,
        V: Into<Payload>,
        E: Into<BoxError>,
    {
        let asked = Asked::parse(keys);
        let mut loads = Loads::of_caller(|keys: Vec<Key>| {
            let loaded = loader(keys);
            async move {
                let loaded = loaded.await.map_err(Into::into)?;
                let payload = |(key, value): (Key, V)| (key, value.into());
                Ok(loaded.into_iter().map(payload).collect())
            }
        });
        let reads = &self.shared.reads;
        let answers = match reads.tracker().operate() {
            Ok(_operating) => reads.get_many(&query, &asked.valid, &mut loads).await,
            Err(error) => vec![Err(error); asked.valid.len()],
        };
        asked.answered(answers)
    }

    pub(crate) fn query(&self, ttl: Ttl) -> Query<S> {
        Query::new(self.service.clone(), ttl, self.shared.timeout.get())
    }

    /// Removes a key whose value has changed in the database; to be called when the change is
    /// committed. Once it has returned `Ok`, no `get_or_load` that begins gives an older value, in
    /// whatever process: what was read from the database before is neither given to them nor put
    /// back.
    ///
    /// Across processes that holds with [leases](crate::ReadThroughSettings::leases), and while
    /// everybody uses the same node for the key; while a node is out, other processes may read what
    /// it or its stand-in had (`docs/FAILURE_MODES.md`).
    ///
    /// # Errors
    /// As for [`delete`](Self::delete). This client will not read the old value even then: the key is
    /// in its journal (unless it is made [`from_service`](Self::from_service) without a
    /// [`Cluster`](crate::Cluster), or a user's layer lets nothing pass). Others may, until it expires
    /// or somebody invalidates it.
    pub async fn invalidate(&self, key: impl IntoKey) -> Result<()> {
        let key = key.into_key()?;
        let _operating = self.shared.reads.tracker().operate()?;
        let deadline = after(Instant::now(), self.shared.timeout.get());
        let delete = Request::new(Operation::Delete { key });
        match self.perform(delete.clone().with_deadline(deadline)).await {
            Ok(Response::Deleted(_)) => Ok(()),
            Ok(other) => Err(misfit(&other)),
            Err(error) => {
                // Why ever it was not deleted, what the node has must not be read. The answer is
                // that it has been taken note of.
                let _ = self.perform(delete.with_purpose(Purpose::Note)).await;
                Err(error)
            }
        }
    }
}
