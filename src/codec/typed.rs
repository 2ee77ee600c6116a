//! A client of values of one type.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tower::Service;

use super::{Codec, decode, encode};
use crate::client::{Client, DefaultService, MultiGet, Outcome};
use crate::compression::CompressionSettings;
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::key::{IntoKey, Key};
use crate::read_through::Cache;
use crate::request::Request;
use crate::response::{CasOutcome, Response, misfit};
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload, Value};

/// A [`Client`], or a group of one, whose values are of one type: from [`Client::typed`].
///
/// It has the operations on values, in the client's own shapes and with its errors, deadlines and cancel
/// safety; [`client`](Self::client) has the others (`delete`, `invalidate`, `touch`). Encoding and
/// decoding run on the caller's task.
///
/// # Errors
/// Those of the client's operation, and [`ErrorKind::Codec`] for a value that cannot be encoded
/// ([`Sent::No`]), or whose client flags name another format, or that does not decode ([`Sent::Yes`]).
/// That is never a miss unless [it is to be one](Self::undecodable_is_miss).
pub struct Typed<T, C, S = DefaultService> {
    client: Client<S>,
    codec: Arc<C>,
    undecodable_is_miss: bool,
    values: PhantomData<fn(T) -> T>,
}

impl<T, C, S: Clone> Clone for Typed<T, C, S> {
    fn clone(&self) -> Self {
        Self {
            client: self.client.clone(),
            codec: self.codec.clone(),
            undecodable_is_miss: self.undecodable_is_miss,
            values: PhantomData,
        }
    }
}

impl<T, C: fmt::Debug, S> fmt::Debug for Typed<T, C, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Typed")
            .field("client", &self.client)
            .field("codec", &self.codec)
            .finish_non_exhaustive()
    }
}

impl<S> Client<S> {
    /// The same client, or group, for values of one type; the connections are shared. Needs the feature
    /// `serde`.
    ///
    /// ```
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct User;
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct Session;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tower_memcached::Error> {
    /// use tower_memcached::{Client, Json, Postcard, Typed};
    ///
    /// let client = Client::builder().nodes(["127.0.0.1"]).build()?;
    /// let users: Typed<User, Json> = client.typed(Json::default())?;
    /// let sessions = client.typed::<Session, _>(Postcard::default())?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if the codec's [`Format`](super::Format) has an id that its
    /// mask does not cover, that says that a value is absent, or a mask with bits that say that it is
    /// [compressed](crate::CompressionSettings).
    pub fn typed<T, C: Codec>(&self, codec: C) -> Result<Typed<T, C, S>>
    where
        S: Clone,
    {
        codec.format().validate(self.compression().as_deref())?;
        Ok(Typed {
            client: self.clone(),
            codec: Arc::new(codec),
            undecodable_is_miss: false,
            values: PhantomData,
        })
    }
}

impl<T, C, S> Typed<T, C, S> {
    /// What cannot be decoded is a miss, and no error: for the time in which a type changes, and the
    /// cache has values of the old one.
    ///
    /// [`get_or_load`](Self::get_or_load) then loads it anew, within the limits of the
    /// [guard](crate::LoadGuard) and with a lease, and replaces it. That goes both ways: while old and new
    /// processes run, and neither can read what the other writes, they replace each other's values at
    /// each read. Better let the new type read the old values (`#[serde(default)]`), or have other keys.
    ///
    /// [`add`](Self::add) still finds that there is something, and [`gets`](Self::gets) gives no token to
    /// replace it with.
    #[must_use]
    pub fn undecodable_is_miss(mut self) -> Self {
        self.undecodable_is_miss = true;
        self
    }

    /// The client below, for what has no value of the type.
    #[must_use]
    pub fn client(&self) -> &Client<S> {
        &self.client
    }

    fn is_miss(&self, error: &Error) -> bool {
        self.undecodable_is_miss && is_undecodable(error)
    }
}

fn is_undecodable(error: &Error) -> bool {
    error.kind() == ErrorKind::Codec && error.sent() == Sent::Yes
}

impl<T, C, S> Typed<T, C, S>
where
    T: Serialize + DeserializeOwned,
    C: Codec,
{
    fn decode(&self, value: &Value) -> Result<T> {
        decode(&*self.codec, value, self.unread())
    }

    /// The client flags of what is compressed, where the client does not undo it.
    fn unread(&self) -> u32 {
        match self.client.compression() {
            Some(_) => 0,
            None => CompressionSettings::default().mask(),
        }
    }

    /// What is to be put back for a loaded value: nothing that could not be read again.
    fn loaded(&self, value: &T) -> Result<Payload, BoxError> {
        let payload = encode(&*self.codec, value)?;
        let again: Result<T, _> = self.codec.decode(payload.data());
        again.map_err(|source| {
            let name = self.codec.name();
            let message = format!("what was loaded cannot be decoded again as {name}");
            Error::new(ErrorKind::Codec, message).with_source(source)
        })?;
        Ok(payload)
    }

    fn taken(&self, read: Result<Option<Value>>) -> Result<Option<T>> {
        self.taken_as(read, |_| Ok(()))
            .map(|taken| taken.map(|(value, ())| value))
    }

    fn taken_as<A>(
        &self,
        read: Result<Option<Value>>,
        beside: impl FnOnce(&Value) -> Result<A>,
    ) -> Result<Option<(T, A)>> {
        let taken = read.and_then(|value| match value {
            Some(value) => Ok(Some((self.decode(&value)?, beside(&value)?))),
            None => Ok(None),
        });
        match taken {
            Err(error) if self.is_miss(&error) => Ok(None),
            taken => taken,
        }
    }
}

impl<T, C, S> Typed<T, C, S>
where
    T: Serialize + DeserializeOwned,
    C: Codec,
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    /// [`Client::get`].
    ///
    /// # Errors
    /// As above.
    pub async fn get(&self, key: impl IntoKey) -> Result<Option<T>> {
        self.taken(self.client.get(key).await)
    }

    /// [`Client::gets`]: with the token for [`cas`](Self::cas).
    ///
    /// # Errors
    /// As above.
    pub async fn gets(&self, key: impl IntoKey) -> Result<Option<(T, CasToken)>> {
        let token = |value: &Value| {
            let without = || misfit(&Response::Value(None));
            value.cas().ok_or_else(without)
        };
        self.taken_as(self.client.gets(key).await, token)
    }

    /// [`Client::get_many`]. A value that cannot be decoded is its key's error.
    pub async fn get_many<I>(&self, keys: I) -> MultiGet<T>
    where
        I: IntoIterator,
        I::Item: IntoKey,
    {
        let read = self.client.get_many(keys).await;
        read.map(|outcome| self.taken(outcome.into_result()).into())
    }

    /// [`Client::get_and_touch`].
    ///
    /// # Errors
    /// As above.
    pub async fn get_and_touch(&self, key: impl IntoKey, ttl: Ttl) -> Result<Option<T>> {
        self.taken(self.client.get_and_touch(key, ttl).await)
    }

    /// [`Client::set`].
    ///
    /// # Errors
    /// As above.
    pub async fn set(&self, key: impl IntoKey, value: &T, ttl: Ttl) -> Result<()> {
        let payload = encode(&*self.codec, value)?;
        self.client.set(key, payload, ttl).await
    }

    /// [`Client::add`].
    ///
    /// # Errors
    /// As above.
    pub async fn add(&self, key: impl IntoKey, value: &T, ttl: Ttl) -> Result<bool> {
        let payload = encode(&*self.codec, value)?;
        self.client.add(key, payload, ttl).await
    }

    /// [`Client::replace`].
    ///
    /// # Errors
    /// As above.
    pub async fn replace(&self, key: impl IntoKey, value: &T, ttl: Ttl) -> Result<bool> {
        let payload = encode(&*self.codec, value)?;
        self.client.replace(key, payload, ttl).await
    }

    /// [`Client::cas`].
    ///
    /// # Errors
    /// As above.
    pub async fn cas(
        &self,
        key: impl IntoKey,
        value: &T,
        ttl: Ttl,
        token: CasToken,
    ) -> Result<CasOutcome> {
        let payload = encode(&*self.codec, value)?;
        self.client.cas(key, payload, ttl, token).await
    }
}

impl<T, C, S> Typed<T, C, S>
where
    T: Serialize + DeserializeOwned + 'static,
    C: Codec,
    S: Cache,
{
    /// [`Client::get_or_load`]. What is loaded is decoded as others will read it, so that nothing is
    /// cached that cannot be. One that cannot be encoded is an [`ErrorKind::Codec`], and no failure of
    /// the database.
    ///
    /// A value in the cache that cannot be decoded is an error; with
    /// [`undecodable_is_miss`](Self::undecodable_is_miss) it is loaded anew and replaced, and so it is, in
    /// either case, if it cannot be decompressed.
    ///
    /// # Errors
    /// As above.
    pub async fn get_or_load<F, Fut, E>(
        &self,
        key: impl IntoKey,
        ttl: Ttl,
        loader: F,
    ) -> Result<Option<T>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<T>, E>>,
        E: Into<BoxError>,
    {
        let key = key.into_key()?;
        let mut loader = Some(loader);
        let read = {
            let load = || self.load(loader.take());
            self.client
                .load_by(self.client.query(ttl), key.clone(), load)
        };
        let taken = match read.await? {
            Some(value) => self.decode(&value).map(Some),
            None => return Ok(None),
        };
        match taken {
            // Found there. What was loaded here can be decoded, or never will be.
            Err(error) if self.is_miss(&error) && loader.is_some() => {}
            taken => return taken,
        }
        let query = self.client.query(ttl).accepting(self.accepts());
        let read = self.client.load_by(query, key, || self.load(loader.take()));
        read.await?.map(|value| self.decode(&value)).transpose()
    }

    async fn load<F, Fut, E>(&self, loader: Option<F>) -> Result<Option<Payload>, BoxError>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Option<T>, E>>,
        E: Into<BoxError>,
    {
        let loader = loader.ok_or("the loader was asked twice")?;
        match loader().await.map_err(Into::into)? {
            Some(value) => Ok(Some(self.loaded(&value)?)),
            None => Ok(None),
        }
    }

    fn accepts(&self) -> impl Fn(&Value) -> bool + Send + Sync + use<T, C, S> {
        let (codec, unread) = (self.codec.clone(), self.unread());
        move |value| decode::<C, T>(&*codec, value, unread).is_ok()
    }

    /// [`Client::get_many_or_load`], key by key as [`get_or_load`](Self::get_or_load).
    pub async fn get_many_or_load<I, F, Fut, M, E>(
        &self,
        keys: I,
        ttl: Ttl,
        mut loader: F,
    ) -> MultiGet<T>
    where
        I: IntoIterator,
        I::Item: IntoKey,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Result<M, E>>,
        M: IntoIterator<Item = (Key, T)>,
        E: Into<BoxError>,
    {
        let mut load = |keys: Vec<Key>| {
            let loading = loader(keys);
            async move {
                let loaded = loading.await.map_err(Into::into)?;
                let payload = |(key, value): (Key, T)| Ok((key, self.loaded(&value)?));
                loaded
                    .into_iter()
                    .map(payload)
                    .collect::<Result<Vec<_>, BoxError>>()
            }
        };
        let decoded = |read: MultiGet| {
            read.map(|outcome| {
                let read = outcome.into_result();
                let decoded = read.and_then(|value| value.map(|it| self.decode(&it)).transpose());
                Outcome::from(decoded)
            })
        };
        let query = self.client.query(ttl);
        let mut values = decoded(self.client.load_many_by(query, keys, &mut load).await);
        if self.undecodable_is_miss {
            let (places, keys) = values.keys_failed(is_undecodable);
            if !keys.is_empty() {
                let query = self.client.query(ttl).accepting(self.accepts());
                let again = decoded(self.client.load_many_by(query, keys, &mut load).await);
                values.put(places, again);
            }
        }
        values
    }
}
