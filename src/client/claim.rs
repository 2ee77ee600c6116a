//! First-seen: who of many that ask is the first. An `add` decides, and where the cache cannot, a
//! policy that the caller has to name.

use std::future::Future;

use tokio::time::Instant;
use tower::Service;

use super::{Client, misfit};
use crate::error::{BoxError, Error, Result, Sent};
use crate::executor::after;
use crate::key::{IntoKey, Key};
use crate::request::{Operation, Request, StoreMode};
use crate::response::Response;
use crate::telemetry;
use crate::ttl::Ttl;
use crate::value::Payload;

/// What [`Client::claim`] says when the cache cannot answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnFailure {
    /// Go on, as if it were the first: for work that may be done twice rather than not at all.
    Allow,
    /// Do not, as if it had been seen: for work that may be left undone rather than be done twice, or
    /// that comes again later; what the claim may have left over then is told at [`Client::claim`].
    Deny,
}

/// Whether a key was claimed for the first time: the answer of [`Client::claim`].
#[derive(Clone, Debug)]
#[must_use = "whoever is not the first should not go on"]
pub enum Claim {
    /// It is claimed now, by this call.
    First,
    /// It was claimed before.
    Seen,
    /// The cache could not answer; the policy or the fallback has decided.
    Unanswered {
        /// What it has decided.
        first: bool,
        /// Why the cache could not. With [`Sent::Maybe`] the claim may be there, or may yet come to
        /// be.
        error: Error,
    },
}

impl Claim {
    /// Whether to go on: the key was not claimed before, or that is what was decided where the cache
    /// could not answer.
    #[must_use]
    pub fn is_first(&self) -> bool {
        match self {
            Self::First => true,
            Self::Seen => false,
            Self::Unanswered { first, .. } => *first,
        }
    }

    /// Why the cache could not answer; `None` if it did.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        match self {
            Self::First | Self::Seen => None,
            Self::Unanswered { error, .. } => Some(error),
        }
    }
}

/// First-seen: deduplication by the cache.
impl<S> Client<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    /// Claims a key, unless somebody has within the last `ttl`; of all who try, in all processes, one
    /// is the first. So a message that comes twice is processed once.
    ///
    /// ```no_run
    /// # async fn process(_: &str) -> Result<(), std::io::Error> { Ok(()) }
    /// # async fn example(client: tower_memcached::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_memcached::{OnFailure, Ttl};
    ///
    /// let key = "seen:message:42";
    /// if client.claim(key, Ttl::secs(86_400), OnFailure::Allow).await?.is_first() {
    ///     if let Err(failed) = process("message 42").await {
    ///         // Given back, so that the next delivery is processed.
    ///         client.delete(key).await?;
    ///         return Err(failed.into());
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Whatever keeps the cache from answering goes to the policy: a node that is out, time-outs,
    /// overload, a thrown [kill switch](crate::KillSwitch), lost connections, server errors, a layer's
    /// own error. Why is in [`Claim::error`].
    ///
    /// If it is not known whether the claim was stored ([`Sent::Maybe`]: its answer was lost, say), the
    /// key is read once in the time that is left. What is there tells who has claimed it; if that
    /// cannot be read, or nothing is there, it goes to the policy.
    ///
    /// A claim is never moved to another node: while its node is out, or takes its keys back, the policy
    /// decides, after the whole timeout with [`FailureMode::Retry`](crate::FailureMode::Retry) and else
    /// at once. What was claimed before is still so when the node is back with what it had.
    ///
    /// # What it is not
    /// It is no lock: it saves work that comes twice, and does not exclude it. It can be
    /// **forgotten**, and the next one is the first again, when the cache evicts it, its node restarts,
    /// or the nodes are [changed](Self::set_nodes); and what is allowed while the cache cannot answer
    /// is mostly not stored at all. Where twice must not be, have a unique index in the database decide:
    /// behind this, or in [`claim_or_else`](Self::claim_or_else).
    ///
    /// It can also be **left over**. A claim with an error that is `Sent::Maybe`, or whose future was
    /// dropped, may have been stored or may yet be: a stopped server does it when it goes on. Then
    /// what comes again is seen, though nobody may have processed it. Where it should be processed, give
    /// the claim back with [`delete`](Self::delete), which also takes away what somebody else has
    /// claimed meanwhile; a claim that is executed even later than that is there until its TTL ends.
    /// Unlike other writes in doubt, a claim is not deleted behind your back (by the node's journal),
    /// for that would make a claim that was there before be forgotten, each time a second one fails.
    ///
    /// Have keys for claims alone, by a prefix or a [group](crate::GroupLayer). A key that is
    /// [read through](Self::get_or_load) may hold a lease or a note that there is nothing, which a
    /// claim takes for somebody else's. It does the same with one of its own that a layer of yours has
    /// sent twice: do not put layers that retry around it.
    ///
    /// # Errors
    /// Only a [caller's mistake](Error::is_caller_mistake):
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey),
    /// [`ErrorKind::ValueTooLarge`](crate::ErrorKind::ValueTooLarge) if not even 32 bytes may be
    /// stored, [`ErrorKind::NoRuntime`](crate::ErrorKind::NoRuntime). And
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown) of one that begins after a
    /// [shutdown](Self::shutdown) has.
    ///
    /// # Deadline
    /// It ends within the client's timeout, the read in doubt included; a group's own timeout holds for
    /// the claim and for that read.
    ///
    /// # Cancel safety
    /// When dropped it may or may not have claimed the key: see above.
    pub async fn claim(&self, key: impl IntoKey, ttl: Ttl, failure: OnFailure) -> Result<Claim> {
        let _operating = self.shared.reads.tracker().operate()?;
        let claim = match self.try_claim(key.into_key()?, ttl).await? {
            Ok(claim) => claim,
            Err(error) => {
                let (first, result) = match failure {
                    OnFailure::Allow => (true, "allowed"),
                    OnFailure::Deny => (false, "denied"),
                };
                telemetry::claim(result);
                Claim::Unanswered { first, error }
            }
        };
        Ok(claim)
    }

    /// [`claim`](Self::claim), with something else that decides when the cache cannot answer, such as
    /// an insert under a unique index. It is given why, and says whether this is the first.
    ///
    /// ```no_run
    /// # struct Database;
    /// # impl Database {
    /// #     async fn execute(&self, _: &str, _: &[&str]) -> Result<u64, std::io::Error> { Ok(1) }
    /// # }
    /// # async fn example(client: tower_memcached::Client, database: Database) -> Result<(), tower_memcached::Error> {
    /// use tower_memcached::Ttl;
    ///
    /// let claim = client
    ///     .claim_or_else("seen:message:42", Ttl::secs(86_400), |_why| async {
    ///         let insert = "INSERT INTO processed (message) VALUES ($1) ON CONFLICT DO NOTHING";
    ///         Ok::<_, std::io::Error>(database.execute(insert, &["42"]).await? == 1)
    ///     })
    ///     .await?;
    /// if claim.is_first() {
    ///     // process it
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The fallback knows only of what it was asked for itself, or of what the work writes there: a
    /// message claimed in the cache and delivered again in an outage is the first to an index that has
    /// not been told. So have the work write that row in its own transaction, too.
    ///
    /// It runs on this task and may borrow, under this client's [guard](crate::LoadGuard), so that
    /// a cache that fails does not become a storm on the database; and for the
    /// [`load_timeout`](crate::ReadThroughSettings::load_timeout) at most (1 s by default), which begins
    /// when the cache has not answered, and in which the wait for a place is included.
    ///
    /// # Errors
    /// As for [`claim`](Self::claim); and if the cache cannot answer,
    /// [`ErrorKind::Load`](crate::ErrorKind::Load) if the fallback fails (its error is the
    /// [`source`](std::error::Error::source)) or takes too long, and
    /// [`ErrorKind::LoadShed`](crate::ErrorKind::LoadShed) if it was not asked, to spare the database.
    ///
    /// # Cancel safety
    /// As for [`claim`](Self::claim); dropping it drops the fallback.
    pub async fn claim_or_else<F, Fut, E>(
        &self,
        key: impl IntoKey,
        ttl: Ttl,
        fallback: F,
    ) -> Result<Claim>
    where
        F: FnOnce(Error) -> Fut,
        Fut: Future<Output = Result<bool, E>>,
        E: Into<BoxError>,
    {
        let _operating = self.shared.reads.tracker().operate()?;
        let error = match self.try_claim(key.into_key()?, ttl).await? {
            Ok(claim) => return Ok(claim),
            Err(error) => error,
        };
        let why = error.clone();
        let decided = self.shared.reads.ask_database(|| fallback(why)).await;
        telemetry::claim(match decided {
            Ok(_) => "fallback",
            Err(_) => "failed",
        });
        let first = decided?;
        Ok(Claim::Unanswered { first, error })
    }

    /// The cache's answer, or why it has none.
    async fn try_claim(&self, key: Key, ttl: Ttl) -> Result<Result<Claim>> {
        let ends = after(Instant::now(), self.shared.timeout.get());
        // Tells our claim from any other.
        let token = format!("{:032x}", fastrand::u128(..));
        let claim = match self.add_claim(&key, &token, ttl, ends).await {
            Ok(true) => Claim::First,
            Ok(false) => Claim::Seen,
            Err(error) if error.is_caller_mistake() => return Err(error),
            Err(error) => match self.resolve(key, &token, &error, ends).await {
                Some(claim) => claim,
                None => return Ok(Err(error)),
            },
        };
        telemetry::claim(match claim.is_first() {
            true => "first",
            false => "seen",
        });
        Ok(Ok(claim))
    }

    async fn add_claim(&self, key: &Key, token: &str, ttl: Ttl, ends: Instant) -> Result<bool> {
        let add = Request::new(Operation::Store {
            mode: StoreMode::Claim,
            key: key.clone(),
            payload: Payload::from(token),
            ttl,
        });
        match self.perform(add.with_deadline(ends)).await? {
            Response::Stored(stored) => Ok(stored),
            other => Err(misfit(&other)),
        }
    }

    /// Whose claim is there, after one of ours that may have been stored; `None` if that cannot be
    /// told.
    async fn resolve(&self, key: Key, token: &str, error: &Error, ends: Instant) -> Option<Claim> {
        if error.sent() != Sent::Maybe || Instant::now() >= ends {
            return None;
        }
        // With its CAS token: such a read is not loaded by a layer below.
        let read = Request::new(Operation::Get {
            key,
            with_cas: true,
        });
        match self.perform(read.with_deadline(ends)).await {
            Ok(Response::Value(Some(found))) if found == *token => Some(Claim::First),
            Ok(Response::Value(Some(_))) => Some(Claim::Seen),
            _ => None,
        }
    }
}
