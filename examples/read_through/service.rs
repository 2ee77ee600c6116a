//! The service: items over HTTP.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Json, Path, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tower_memcached::{Client, ErrorKind, Ttl};

use crate::items::Error;
use crate::store::Store;

/// The header with an answer's [`Outcome`].
pub(crate) const OUTCOME: HeaderName = HeaderName::from_static("x-outcome");

/// Short, so that there are stale values to be seen in a storm of some seconds.
const TTL: Ttl = Ttl::secs(4);

#[derive(Clone)]
pub(crate) struct Service {
    client: Client,
    store: Arc<Store>,
}

/// What became of a request. Another kind is a variant, and its name in `ALL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Read without a load of its own: from the cache, or sharing what another request loads.
    Hit,
    /// Read from the cache although it is past its TTL: it is being loaded anew, or cannot be.
    Stale,
    /// Read from the database.
    Loaded,
    /// Not read at all, to spare the database.
    Shed,
    /// Written to the database.
    Updated,
    Failed,
}

impl Outcome {
    /// In the order of their columns, and of the variants.
    pub(crate) const ALL: [(Self, &'static str); 6] = [
        (Self::Hit, "hit"),
        (Self::Stale, "stale"),
        (Self::Loaded, "loaded"),
        (Self::Shed, "shed"),
        (Self::Updated, "updated"),
        (Self::Failed, "failed"),
    ];

    /// Whether it comes with the status of an error.
    pub(crate) fn is_refusal(self) -> bool {
        matches!(self, Self::Shed | Self::Failed)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        let all = Self::ALL.into_iter();
        all.map(|(outcome, _)| outcome).find(|o| o.name() == name)
    }
}

impl Service {
    pub(crate) fn new(client: Client, store: Arc<Store>) -> Self {
        Self { client, store }
    }

    pub(crate) fn router(self) -> Router {
        let item = get(read).put(update);
        Router::new().route("/items/{id}", item).with_state(self)
    }
}

async fn read(State(service): State<Service>, Path(id): Path<i64>) -> Response {
    let mut outcome = Outcome::Hit;
    let load = || {
        outcome = Outcome::Loaded;
        async {
            let item = service.store.load(id).await?;
            Ok::<_, Error>(item.map(|item| item.encode()))
        }
    };
    let read = service.client.get_or_load(key(id), TTL, load).await;
    match read {
        // As it is in the cache: JSON that was made when it was loaded.
        Ok(Some(item)) => {
            if item.is_stale() {
                outcome = Outcome::Stale;
            }
            let json = [(header::CONTENT_TYPE, "application/json")];
            answer(outcome, (json, item.into_bytes()))
        }
        Ok(None) => answer(outcome, StatusCode::NOT_FOUND),
        Err(error) if error.kind() == ErrorKind::LoadShed => {
            let later = [(header::RETRY_AFTER, "1")];
            let status = StatusCode::SERVICE_UNAVAILABLE;
            answer(Outcome::Shed, (status, later, error.to_string()))
        }
        Err(error) => failed(StatusCode::SERVICE_UNAVAILABLE, &error),
    }
}

async fn update(
    State(service): State<Service>,
    Path(id): Path<i64>,
    Json(new): Json<Value>,
) -> Response {
    let Some(name) = new["name"].as_str() else {
        return failed(StatusCode::BAD_REQUEST, &"there is no name");
    };
    match service.store.update(id, name).await {
        Ok(Some(version)) => {
            // Whether or not the cache can be told: the client remembers what it could not delete, and
            // does not read it again.
            let _ = service.client.invalidate(key(id)).await;
            let version = json!({ "id": id, "version": version });
            answer(Outcome::Updated, Json(version))
        }
        Ok(None) => answer(Outcome::Updated, StatusCode::NOT_FOUND),
        Err(error) => failed(StatusCode::SERVICE_UNAVAILABLE, &error),
    }
}

fn key(id: i64) -> String {
    format!("item:{id}")
}

fn answer(outcome: Outcome, answer: impl IntoResponse) -> Response {
    ([(OUTCOME, outcome.name())], answer).into_response()
}

fn failed(status: StatusCode, error: &dyn std::fmt::Display) -> Response {
    answer(Outcome::Failed, (status, error.to_string()))
}
