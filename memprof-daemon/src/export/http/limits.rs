//! How much, how long and how many: what keeps clients from using the daemon up.

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    body::{Bytes, to_bytes},
    extract::{FromRequest, Request},
    http::StatusCode,
};
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ApiError;

/// Connections at a time, of one listener: more wait until one ends.
pub(super) const CONNECTIONS: usize = 128;

/// Requests that are served at a time; more are refused.
pub(super) const REQUESTS: usize = 64;

/// Profiles that are made at a time, and windows that are open; more are refused.
pub(super) const PROFILES: usize = 8;

/// For the headers of a request, and for the next request on a connection.
pub(super) const HEADER_TIME: Duration = Duration::from_secs(10);

/// Bytes of the headers of a request, and their number.
pub(super) const HEADER_BYTES: usize = 32 << 10;
pub(super) const HEADERS: usize = 64;

/// For the body of a request.
const BODY_TIME: Duration = Duration::from_secs(10);

/// Bytes of the body of a request.
const BODY_BYTES: usize = 64 << 10;

/// For an answer that is no profile.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(30);

/// For a profile before its first byte, beside its window.
pub(super) const PROFILE_TIME: Duration = Duration::from_secs(120);

/// For the client to take the next piece of an answer.
pub(super) const PIECE_TIME: Duration = Duration::from_secs(30);

/// The longest window.
pub(super) const MAX_WINDOW: Duration = Duration::from_secs(3600);

/// How long a connection lives, whatever is done on it.
pub(super) const CONNECTION_TIME: Duration = Duration::from_secs(2 * 3600);

/// Waits for an answer, not for ever.
pub(super) async fn within<T, E>(
    limit: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, ApiError>
where
    ApiError: From<E>,
{
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => {
            let seconds = limit.as_secs();
            let message = format!("there was no answer within {seconds} seconds: try again later");
            Err(ApiError(StatusCode::SERVICE_UNAVAILABLE, message))
        }
    }
}

/// The body of a request, whole.
pub(super) struct Body(pub(super) Bytes);

impl<S: Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body = to_bytes(request.into_body(), BODY_BYTES);
        match tokio::time::timeout(BODY_TIME, body).await {
            Ok(Ok(body)) => Ok(Self(body)),
            Ok(Err(error)) => {
                use std::error::Error as _;
                let is_too_long = error
                    .source()
                    .is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
                Err(if is_too_long {
                    too_long(BODY_BYTES)
                } else {
                    ApiError::bad(error.to_string())
                })
            }
            Err(_) => Err(too_slow()),
        }
    }
}

/// A body that nobody reads, and that is taken from its sender all the same.
pub(super) struct Discarded;

/// As many bytes of it as are taken.
const DISCARDED_BYTES: usize = 16 << 20;

impl<S: Sync> FromRequest<S> for Discarded {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let mut body = request.into_body();
        let taking = async {
            let mut taken = 0;
            while let Some(Ok(frame)) = body.frame().await {
                taken += frame.data_ref().map_or(0, Bytes::len);
                if taken > DISCARDED_BYTES {
                    return Err(too_long(DISCARDED_BYTES));
                }
            }
            Ok(Self)
        };
        let taken = tokio::time::timeout(BODY_TIME, taking).await;
        taken.unwrap_or_else(|_| Err(too_slow()))
    }
}

fn too_long(limit: usize) -> ApiError {
    let message = format!("at most {limit} bytes");
    ApiError(StatusCode::PAYLOAD_TOO_LARGE, message)
}

fn too_slow() -> ApiError {
    let message = format!("the body did not come within {} s", BODY_TIME.as_secs());
    ApiError(StatusCode::REQUEST_TIMEOUT, message)
}

/// How many of what costs are under way.
#[derive(Clone, Debug)]
pub(super) struct Gates {
    profiles: Arc<Semaphore>,
    windows: Arc<Semaphore>,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            profiles: Arc::new(Semaphore::new(PROFILES)),
            windows: Arc::new(Semaphore::new(PROFILES)),
        }
    }
}

impl Gates {
    /// Room for one more profile, until it is dropped; there is memory for so many. Those of a
    /// window have room of their own: they wait, and keep nobody else waiting.
    pub(super) fn enter(
        &self,
        is_window: bool,
        at_a_time: usize,
    ) -> Result<OwnedSemaphorePermit, ApiError> {
        let gate = if is_window {
            &self.windows
        } else {
            &self.profiles
        };
        let place = Arc::clone(gate).try_acquire_owned().map_err(|_| {
            let message = format!("{PROFILES} profiles are under way already: try again later");
            ApiError(StatusCode::SERVICE_UNAVAILABLE, message)
        })?;
        // This one among them.
        let under_way = PROFILES - gate.available_permits();
        if under_way > at_a_time.max(1) {
            let message = "memory is short for one more profile beside those under way: try again \
                           later, or raise --max-memory";
            return Err(ApiError(
                StatusCode::SERVICE_UNAVAILABLE,
                message.to_owned(),
            ));
        }
        Ok(place)
    }
}
