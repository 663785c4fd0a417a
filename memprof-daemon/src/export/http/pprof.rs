//! `/debug/pprof/`, as Go programs have it (`net/http/pprof`), so that `go tool pprof` and
//! profile stores need to know nothing of memprof.
//!
//! As there, parameters that are not known are ignored: clients send some that mean nothing
//! here, such as `gc`.

use std::fs;

use axum::{
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use serde::Deserialize;

use super::{
    Api, ApiError, Backend, Told as _,
    limits::{ANSWER_TIME, Discarded, within},
    parse_pid, parse_seconds,
    targets::of_pid,
};
use crate::export::{
    ValueType,
    pprof::{Options, legacy, write},
};

/// What is asked of a profile.
#[derive(Debug, Deserialize)]
pub(super) struct PprofQuery {
    #[serde(default)]
    pid: String,
    #[serde(default)]
    seconds: String,
    #[serde(default)]
    debug: String,
}

/// The parameters, or why they cannot be read.
type Asked = Result<Query<PprofQuery>, QueryRejection>;

fn asked(query: Asked) -> Result<PprofQuery, ApiError> {
    let query = query.map_err(|rejection| ApiError::bad(rejection.body_text()))?;
    Ok(query.0)
}

pub(super) async fn heap<B: Backend>(
    State(api): State<Api<B>>,
    query: Asked,
) -> Result<Response, ApiError> {
    profile(api, &asked(query)?, "heap", ValueType::InuseSpace).await
}

pub(super) async fn allocs<B: Backend>(
    State(api): State<Api<B>>,
    query: Asked,
) -> Result<Response, ApiError> {
    profile(api, &asked(query)?, "allocs", ValueType::AllocSpace).await
}

async fn profile<B: Backend>(
    api: Api<B>,
    query: &PprofQuery,
    name: &str,
    default: ValueType,
) -> Result<Response, ApiError> {
    let pid = parse_pid(&query.pid)?;
    let window = parse_seconds(&query.seconds)?;
    // As Go reads it: what is no number is 0.
    let as_text = query.debug.parse::<i64>().is_ok_and(|debug| debug != 0);
    if as_text {
        if window.is_some() {
            return Err(ApiError::bad("seconds and debug params are incompatible"));
        }
        let body = api.dump(pid, None, legacy::write).await?;
        return Ok(with_type("text/plain; charset=utf-8", body));
    }
    let options = Options {
        default,
        // A store keeps series by their labels: these are there whatever else is traced.
        labelled: pid.is_none(),
    };
    let body = api
        .dump(pid, window, move |profile, out| {
            write(profile, options, out)
        })
        .await?;
    let mut response = with_type("application/octet-stream", body);
    let delta = if window.is_some() { "-delta" } else { "" };
    let disposition = format!("attachment; filename=\"{name}{delta}\"");
    if let Ok(disposition) = HeaderValue::from_str(&disposition) {
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_DISPOSITION, disposition);
    }
    Ok(response)
}

fn with_type(content_type: &'static str, body: impl IntoResponse) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        // What programs call themselves is not to be taken for a page.
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, body).into_response()
}

/// The command line of the daemon, or of a traced process: what is asked about profiles may
/// be asked of whom they are, and nothing about others.
pub(super) async fn cmdline<B: Backend>(
    State(api): State<Api<B>>,
    query: Asked,
) -> Result<Response, ApiError> {
    let query = asked(query)?;
    let path = match parse_pid(&query.pid)? {
        Some(pid) => {
            of_pid(&api, pid).await?;
            format!("/proc/{pid}/cmdline")
        }
        None => "/proc/self/cmdline".to_owned(),
    };
    let line = fs::read(path)
        .map_err(|error| ApiError(StatusCode::NOT_FOUND, format!("it has ended: {error}")))?;
    let line = line.strip_suffix(&[0]).unwrap_or(&line).to_owned();
    Ok(with_type("text/plain; charset=utf-8", line))
}

/// Whether addresses can be asked for: `go tool pprof` does where code has no names, and gives
/// up if nobody answers. Those that are known are in the profile; more are not, and an address
/// without its process means nothing.
pub(super) async fn symbol(_: Discarded) -> Response {
    with_type("text/plain; charset=utf-8", "num_symbols: 0\n")
}

/// The page with the profiles that there are.
pub(super) async fn index<B: Backend>(State(api): State<Api<B>>) -> Result<Response, ApiError> {
    let processes = within(ANSWER_TIME, api.backend.processes()).await?;
    let mut rows = String::new();
    for process in processes {
        let pid = process.pid();
        rows += &format!(
            "<tr><td>{pid}</td><td>{}</td><td>{}</td>\
             <td><a href=\"heap?pid={pid}&amp;debug=1\">heap</a></td>\
             <td><a href=\"allocs?pid={pid}&amp;debug=1\">allocs</a></td></tr>\n",
            escaped(process.comm()),
            escaped(process.state()),
        );
    }
    let page = format!(
        "<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>/debug/pprof/</title></head>\n\
         <body>\n<p>/debug/pprof/ of memprof: profiles of all traced processes, or with \
         <code>?pid=</code> of one.</p>\n\
         <p><a href=\"heap?debug=1\">heap</a>: memory in use. \
         <a href=\"allocs?debug=1\">allocs</a>: all that was allocated. \
         With <code>?seconds=</code>: what changes in that time. \
         Without <code>?debug=1</code>: for <code>go tool pprof</code>.</p>\n\
         <table><tr><th>pid</th><th>name</th><th>state</th><th></th><th></th></tr>\n\
         {rows}</table>\n</body></html>\n"
    );
    Ok(([(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Html(page)).into_response())
}

/// A text within a page: processes choose their names.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::escaped;

    /// Check that a process cannot put anything into the page by its name.
    #[test]
    fn names_are_escaped() {
        assert_eq!(escaped("<script>&\""), "&lt;script&gt;&amp;&quot;");
    }
}
