//! The HTTP API: HTTP/1.1, on a Unix socket and over TCP; docs/http.md is for its users, and
//! docs/openapi.json describes it, part by part, to machines.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/processes` | the traced processes, JSON |
//! | `GET /v1/profile?pid=&seconds=&format=` | a profile, of all processes without `pid`; with `seconds`, of what happens in them; JSON without `format` |
//! | `GET /v1/config` | the settings in force, JSON |
//! | `PUT /v1/config` | changes them; answers as `GET` does |
//! | `GET /v1/stats` | what the tracer tells about itself, JSON |
//! | `GET /v1/targets`, `GET /v1/targets/PID` | as `processes`; one of them |
//! | `POST /v1/targets` | traces one more, `{"pid": 4242}` |
//! | `DELETE /v1/targets/PID` | lets it go; its profile stays |
//! | `POST /v1/reset` | profiles count allocations from now on |
//! | `GET /v1/openapi.json` | the description |
//! | `GET /metrics` | metrics, for Prometheus |
//! | `GET /debug/pprof/...` | as Go programs have it |
//! | `GET /healthz` | `ok` |
//!
//! The settings are `{"sample_interval_bytes": 65536, "paused": false}`. A `PUT` changes
//! those that it names, and may say `"sample_interval": "64KiB"`. A change is for all
//! processes, from their next call on. What was sampled before keeps its weight.
//!
//! An error is `{"error": "..."}` with a status: 400 for a parameter or a body that
//! makes no sense, 404 for a process or a path that is not there, 405 for another
//! method, 409 for a change that makes no sense for this daemon, 409 and 422 for a process
//! that cannot be traced, 503 while the daemon ends or has too much to do.

mod access;
mod body;
mod limits;
mod pprof;
mod serve;
mod targets;

use std::{
    future::Future,
    str::FromStr as _,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    BoxError, Json, Router,
    error_handling::HandleErrorLayer,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tower::{ServiceBuilder, limit::GlobalConcurrencyLimitLayer, load_shed::LoadShedLayer};

pub use self::{
    access::{Access, Token, TokenError},
    serve::{serve_tcp, serve_unix},
};
use self::{
    body::written,
    limits::{ANSWER_TIME, Body, Gates, MAX_WINDOW, PROFILE_TIME, REQUESTS, within},
};
use super::{
    Format,
    metrics::{self, DumpTimes, Metrics, MetricsFormat},
    profile::Profile,
};
use crate::config::{Config, ConfigChange};

/// The description of the API.
const OPENAPI: &str = include_str!("../../../docs/openapi.json");

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The process is not traced.
    #[error("process {0} is not traced")]
    NoSuchProcess(u32),
    /// There is no such process at all.
    #[error("{0}")]
    NotFound(String),
    /// Something else is being done with the process, or has been.
    #[error("{0}")]
    Conflict(String),
    /// The process cannot be traced.
    #[error("{0}")]
    Unfit(String),
    /// There is no room for it at this moment.
    #[error("{0}")]
    Busy(String),
    /// The daemon is ending.
    #[error("the daemon is ending")]
    Ended,
    /// Something else went wrong.
    #[error("{0}")]
    Failed(String),
}

/// A short answer in JSON, or why there is none.
type Answer = Result<serde_json::Value, BackendError>;

/// What is told of a traced process, in JSON, and of that what other answers are made of.
pub trait Told: Serialize + Send + 'static {
    /// Process id.
    fn pid(&self) -> u32;
    /// Its name.
    fn comm(&self) -> &str;
    /// Where it is in its life.
    fn state(&self) -> &str;
}

/// Where the answers come from.
pub trait Backend: Clone + Send + Sync + 'static {
    /// What the tracer tells about itself, in JSON.
    type Stats: Serialize + Send + 'static;
    /// What it tells of a process.
    type Process: Told;

    /// A profile of one process or of all; with a window, of what happens in so much time
    /// from now on.
    fn profile(
        &self,
        pid: Option<u32>,
        window: Option<Duration>,
    ) -> impl Future<Output = Result<Profile, BackendError>> + Send;

    /// How many profiles there is memory for at a time; one at least.
    fn profiles_at_a_time(&self) -> usize {
        usize::MAX
    }

    /// What the tracer tells about itself.
    fn stats(&self) -> impl Future<Output = Result<Self::Stats, BackendError>> + Send;

    /// The same for those who watch over it.
    fn metrics(&self) -> impl Future<Output = Result<Metrics, BackendError>> + Send;

    /// The settings in force.
    fn config(&self) -> impl Future<Output = Result<Config, BackendError>> + Send;

    /// Changes settings, and returns those in force.
    fn set_config(
        &self,
        change: ConfigChange,
    ) -> impl Future<Output = Result<Config, BackendError>> + Send;

    /// The traced processes.
    fn processes(&self) -> impl Future<Output = Result<Vec<Self::Process>, BackendError>> + Send;

    /// Traces one more process.
    fn attach(&self, pid: u32) -> impl Future<Output = Answer> + Send;

    /// Lets a process go.
    fn detach(&self, pid: u32) -> impl Future<Output = Answer> + Send;

    /// Has profiles count allocations from now on.
    fn reset(&self) -> impl Future<Output = Answer> + Send;
}

/// An error on its way to the client.
struct ApiError(StatusCode, String);

impl ApiError {
    fn bad(message: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, message.into())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.0, Json(serde_json::json!({ "error": self.1 }))).into_response();
        if self.0 == StatusCode::SERVICE_UNAVAILABLE {
            let soon = axum::http::HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }
}

impl From<BackendError> for ApiError {
    fn from(error: BackendError) -> Self {
        let status = match error {
            BackendError::NoSuchProcess(_) | BackendError::NotFound(_) => StatusCode::NOT_FOUND,
            BackendError::Conflict(_) => StatusCode::CONFLICT,
            BackendError::Unfit(_) => StatusCode::UNPROCESSABLE_ENTITY,
            BackendError::Busy(_) | BackendError::Ended => StatusCode::SERVICE_UNAVAILABLE,
            BackendError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

/// What handlers share.
#[derive(Clone, Debug)]
struct Api<B> {
    backend: B,
    gates: Gates,
    dumps: DumpTimes,
    max_targets: usize,
}

/// Every path there is, and the methods it has.
fn routes<B: Backend>() -> Vec<(&'static str, MethodRouter<Api<B>>)> {
    vec![
        ("/healthz", get(|| async { "ok\n" })),
        ("/metrics", get(metrics::<B>)),
        ("/v1/openapi.json", get(openapi)),
        ("/v1/processes", get(processes::<B>)),
        ("/v1/profile", get(profile::<B>)),
        ("/v1/config", get(config::<B>).put(set_config::<B>)),
        ("/v1/stats", get(stats::<B>)),
        (
            "/v1/targets",
            get(processes::<B>).post(targets::attach::<B>),
        ),
        (
            "/v1/targets/{pid}",
            get(targets::target::<B>).delete(targets::detach::<B>),
        ),
        ("/v1/reset", post(targets::reset::<B>)),
        ("/debug/pprof/", get(pprof::index::<B>)),
        ("/debug/pprof/heap", get(pprof::heap::<B>)),
        ("/debug/pprof/allocs", get(pprof::allocs::<B>)),
        (
            "/debug/pprof/symbol",
            get(pprof::symbol).post(pprof::symbol),
        ),
        ("/debug/pprof/cmdline", get(pprof::cmdline::<B>)),
    ]
}

/// The API over `backend`, with metrics of their own for so many targets.
pub fn router<B: Backend>(backend: B, max_targets: usize) -> Router {
    let mut router = Router::new();
    for (path, methods) in routes::<B>() {
        router = router.route(path, methods);
    }
    router
        .fallback(|| async { ApiError(StatusCode::NOT_FOUND, "no such path".to_owned()) })
        .method_not_allowed_fallback(|| async {
            ApiError(
                StatusCode::METHOD_NOT_ALLOWED,
                "the path does not know this method".to_owned(),
            )
        })
        .layer(
            ServiceBuilder::new()
                .layer(HandleErrorLayer::new(|_: BoxError| async {
                    ApiError(
                        StatusCode::SERVICE_UNAVAILABLE,
                        format!("{REQUESTS} requests are being served: try again later"),
                    )
                }))
                .layer(LoadShedLayer::new())
                .layer(GlobalConcurrencyLimitLayer::new(REQUESTS)),
        )
        .with_state(Api {
            backend,
            gates: Gates::default(),
            dumps: DumpTimes::default(),
            max_targets,
        })
}

/// An answer that is as long as there are processes, in JSON that is written while it is sent.
fn json(answer: impl Serialize + Send + 'static) -> Response {
    let body = written(move |out| Ok(serde_json::to_writer(out, &answer)?));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn processes<B: Backend>(State(api): State<Api<B>>) -> Result<Response, ApiError> {
    let processes = within(ANSWER_TIME, api.backend.processes()).await?;
    Ok(json(processes))
}

async fn config<B: Backend>(State(api): State<Api<B>>) -> Result<Response, ApiError> {
    let config = within(ANSWER_TIME, api.backend.config()).await?;
    Ok(Json(config).into_response())
}

async fn set_config<B: Backend>(
    State(api): State<Api<B>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let change = ConfigChange::parse(&body).map_err(ApiError::bad)?;
    let config = within(ANSWER_TIME, api.backend.set_config(change)).await?;
    Ok(Json(config).into_response())
}

async fn stats<B: Backend>(State(api): State<Api<B>>) -> Result<Response, ApiError> {
    let stats = within(ANSWER_TIME, api.backend.stats()).await?;
    Ok(json(stats))
}

async fn metrics<B: Backend>(
    State(api): State<Api<B>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let accept = headers.get(header::ACCEPT);
    let accept = accept.and_then(|accept| accept.to_str().ok());
    let format = MetricsFormat::accepted(accept.unwrap_or_default());
    let metrics = within(ANSWER_TIME, api.backend.metrics()).await?;
    let text = metrics::write(format, metrics, &api.dumps, api.max_targets)
        .map_err(|error| BackendError::Failed(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, format.content_type())], text).into_response())
}

/// The parameters of `/v1/profile`. A misspelt one must not be ignored: the
/// answer would be for something else than was asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileQuery {
    #[serde(default)]
    pid: String,
    #[serde(default)]
    seconds: String,
    #[serde(default)]
    format: String,
}

async fn profile<B: Backend>(
    State(api): State<Api<B>>,
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|rejection| ApiError::bad(rejection.body_text()))?;
    let pid = parse_pid(&query.pid)?;
    let window = parse_seconds(&query.seconds)?;
    let format = match query.format.as_str() {
        "" => Format::Json,
        format => Format::from_str(format).map_err(|error| ApiError::bad(error.to_string()))?,
    };
    let body = api
        .dump(pid, window, move |profile, out| {
            super::write(format, profile, out)
        })
        .await?;
    Ok(([(header::CONTENT_TYPE, format.content_type())], body).into_response())
}

/// The process that is meant; none if none is named.
fn parse_pid(text: &str) -> Result<Option<u32>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    let pid = text.parse::<u32>().ok().filter(|&pid| pid != 0);
    match pid {
        Some(pid) => Ok(Some(pid)),
        None => Err(ApiError::bad(format!("`{text}` is not a process id"))),
    }
}

/// The window that is meant; none if none is.
fn parse_seconds(text: &str) -> Result<Option<Duration>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    let longest = MAX_WINDOW.as_secs();
    match text.parse::<u64>() {
        Ok(seconds) if (1..=longest).contains(&seconds) => Ok(Some(Duration::from_secs(seconds))),
        _ => Err(ApiError::bad(format!(
            "`{text}` is no number of seconds from 1 to {longest}"
        ))),
    }
}

impl<B: Backend> Api<B> {
    /// A profile, to be written by `write` while it is sent.
    async fn dump<W>(
        &self,
        pid: Option<u32>,
        window: Option<Duration>,
        write: W,
    ) -> Result<axum::body::Body, ApiError>
    where
        W: FnOnce(&Profile, &mut dyn std::io::Write) -> std::io::Result<()> + Send + 'static,
    {
        let at_a_time = self.backend.profiles_at_a_time();
        let place = self.gates.enter(window.is_some(), at_a_time)?;
        let waiting = window.unwrap_or_default();
        let begun = Instant::now();
        let profile = self.backend.profile(pid, window);
        let profile = Arc::new(within(PROFILE_TIME + waiting, profile).await?);
        let dumps = self.dumps.clone();
        Ok(written(move |out| {
            // Until the last byte it is under way.
            let _place = place;
            let result = write(&profile, out);
            dumps.observe(begun.elapsed().saturating_sub(waiting));
            result
        }))
    }
}

#[cfg(test)]
mod tests;
