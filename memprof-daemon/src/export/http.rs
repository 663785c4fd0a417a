//! The HTTP API: HTTP/1.1, on a Unix socket in the daemon.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/processes` | the traced processes, JSON |
//! | `GET /v1/profile?pid=&format=` | a profile, of all processes without `pid`; JSON without `format` |
//! | `GET /v1/config` | the settings in force, JSON |
//! | `PUT /v1/config` | changes them; answers as `GET` does |
//! | `GET /v1/stats` | what the tracer tells about itself, JSON |
//! | `GET /healthz` | `ok` |
//!
//! The settings are `{"sample_interval_bytes": 65536, "filters": {"include":
//! ["comm=redis*"], "exclude": []}, "paused": false}`. A `PUT` changes those that it
//! names, and may say `"sample_interval": "64KiB"`. A change is for all processes,
//! from their next call on. What was sampled before keeps its weight.
//!
//! An error is `{"error": "..."}` with a status: 400 for a parameter or a body that
//! makes no sense, 404 for a process or a path that is not there, 405 for another
//! method, 409 for a change that makes no sense for this daemon, 503 while it ends.

mod body;

use std::{future::Future, str::FromStr as _};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use thiserror::Error;

use self::body::written;
use super::{Format, profile::Profile};
use crate::config::{Config, ConfigChange};

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The process is not traced.
    #[error("process {0} is not traced")]
    NoSuchProcess(u32),
    /// It makes no sense for this daemon.
    #[error("{0}")]
    Refused(String),
    /// The daemon is ending.
    #[error("the daemon is ending")]
    Ended,
    /// Something else went wrong.
    #[error("{0}")]
    Failed(String),
}

/// Where the answers come from.
pub trait Backend: Clone + Send + Sync + 'static {
    /// A profile of one process or of all.
    fn profile(
        &self,
        pid: Option<u32>,
    ) -> impl Future<Output = Result<Profile, BackendError>> + Send;
    /// What the tracer tells about itself.
    fn stats(&self) -> impl Future<Output = Result<serde_json::Value, BackendError>> + Send;
    /// The settings in force.
    fn config(&self) -> impl Future<Output = Result<Config, BackendError>> + Send;

    /// Changes settings, and returns those in force.
    fn set_config(
        &self,
        change: ConfigChange,
    ) -> impl Future<Output = Result<Config, BackendError>> + Send;

    /// The traced processes.
    fn processes(&self) -> impl Future<Output = Result<serde_json::Value, BackendError>> + Send;
}

/// An error on its way to the client.
struct ApiError(StatusCode, String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(serde_json::json!({ "error": self.1 }))).into_response()
    }
}

impl From<BackendError> for ApiError {
    fn from(error: BackendError) -> Self {
        let status = match error {
            BackendError::NoSuchProcess(_) => StatusCode::NOT_FOUND,
            BackendError::Refused(_) => StatusCode::CONFLICT,
            BackendError::Ended => StatusCode::SERVICE_UNAVAILABLE,
            BackendError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

/// The parameters of `/v1/profile`. A misspelt one must not be ignored: the
/// answer would be for something else than was asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileQuery {
    #[serde(default)]
    pid: String,
    #[serde(default)]
    format: String,
}

/// The API over `backend`.
pub fn router<B: Backend>(backend: B) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/v1/processes", get(processes::<B>))
        .route("/v1/profile", get(profile::<B>))
        .route("/v1/config", get(config::<B>).put(set_config::<B>))
        .route("/v1/stats", get(stats::<B>))
        .fallback(|| async { ApiError(StatusCode::NOT_FOUND, "no such path".to_owned()) })
        .method_not_allowed_fallback(|| async {
            ApiError(
                StatusCode::METHOD_NOT_ALLOWED,
                "the path does not know this method".to_owned(),
            )
        })
        .with_state(backend)
}

async fn processes<B: Backend>(State(backend): State<B>) -> Result<Response, ApiError> {
    Ok(Json(backend.processes().await?).into_response())
}

async fn config<B: Backend>(State(backend): State<B>) -> Result<Response, ApiError> {
    Ok(Json(backend.config().await?).into_response())
}

async fn set_config<B: Backend>(
    State(backend): State<B>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let change =
        ConfigChange::parse(&body).map_err(|message| ApiError(StatusCode::BAD_REQUEST, message))?;
    Ok(Json(backend.set_config(change).await?).into_response())
}

async fn stats<B: Backend>(State(backend): State<B>) -> Result<Response, ApiError> {
    Ok(Json(backend.stats().await?).into_response())
}

async fn profile<B: Backend>(
    State(backend): State<B>,
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let bad = |message: String| ApiError(StatusCode::BAD_REQUEST, message);
    let Query(query) = query.map_err(|rejection| bad(rejection.body_text()))?;
    let pid = match query.pid.as_str() {
        "" => None,
        pid => Some(
            pid.parse::<u32>()
                .map_err(|_| bad(format!("`{pid}` is not a process id")))?,
        ),
    };
    let format = match query.format.as_str() {
        "" => Format::Json,
        format => Format::from_str(format).map_err(|error| bad(error.to_string()))?,
    };
    let profile = backend.profile(pid).await?;
    let body = written(move |out| super::write(format, &profile, out));
    Ok(([(header::CONTENT_TYPE, format.content_type())], body).into_response())
}
