//! `/v1/targets` and `/v1/reset`: what is traced, and from when on it counts.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;

use super::{
    Api, ApiError, Backend, BackendError, Told as _,
    limits::{ANSWER_TIME, Body, PROFILE_TIME, within},
    parse_pid,
};

/// The body of `POST /v1/targets`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTarget {
    pid: u32,
}

/// A process id in a path: what is none is nowhere.
fn named(pid: Result<Path<String>, PathRejection>) -> Result<u32, ApiError> {
    let pid = pid.map_or_else(|_| String::new(), |Path(pid)| pid);
    let missing = || {
        ApiError(
            StatusCode::NOT_FOUND,
            format!("`{pid}` is not a process id"),
        )
    };
    parse_pid(&pid).ok().flatten().ok_or_else(missing)
}

pub(super) async fn target<B: Backend>(
    State(api): State<Api<B>>,
    pid: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    Ok(Json(of_pid(&api, named(pid)?).await?).into_response())
}

/// What is told of a process, if it is traced.
pub(super) async fn of_pid<B: Backend>(api: &Api<B>, pid: u32) -> Result<B::Process, ApiError> {
    let processes = within(ANSWER_TIME, api.backend.processes()).await?;
    let target = processes.into_iter().find(|target| target.pid() == pid);
    Ok(target.ok_or(BackendError::NoSuchProcess(pid))?)
}

pub(super) async fn attach<B: Backend>(
    State(api): State<Api<B>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let target: NewTarget =
        serde_json::from_slice(&body).map_err(|error| ApiError::bad(error.to_string()))?;
    if target.pid == 0 {
        return Err(ApiError::bad("`0` is not a process id"));
    }
    // Threads may be in the way for as long as --attach-timeout says.
    let attached = within(PROFILE_TIME, api.backend.attach(target.pid)).await?;
    let location = format!("/v1/targets/{}", target.pid);
    let headers = [(header::LOCATION, location)];
    Ok((StatusCode::CREATED, headers, Json(attached)).into_response())
}

pub(super) async fn detach<B: Backend>(
    State(api): State<Api<B>>,
    pid: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let pid = named(pid)?;
    let left = within(PROFILE_TIME, api.backend.detach(pid)).await?;
    Ok(Json(left).into_response())
}

pub(super) async fn reset<B: Backend>(State(api): State<Api<B>>) -> Result<Response, ApiError> {
    let reset = within(ANSWER_TIME, api.backend.reset()).await?;
    Ok(Json(reset).into_response())
}
