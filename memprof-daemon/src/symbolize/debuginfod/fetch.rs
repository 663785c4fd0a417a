//! Downloads from debuginfod servers.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    time::{Duration, Instant},
};

use ureq::{
    Agent,
    tls::{RootCerts, TlsConfig},
};

use super::{
    cache::{Cache, Unfinished},
    settings::Settings,
};
use crate::process::debug_info::{has_build_id, hex};

/// A server that answers nothing in this time is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// For how long a server is left alone that did not answer: others wait behind.
const REST: Duration = Duration::from_secs(60);

/// How asking all servers ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is in the cache now.
    Here(File),
    /// Every server says that it has none.
    Absent,
    /// At least one could not say.
    Failed,
}

/// What went wrong with one server.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("the server has none")]
    NotFound,
    #[error("the server answers {0}")]
    Status(u16),
    #[error("{0}")]
    Http(#[from] ureq::Error),
    #[error("{0}")]
    Transfer(#[source] io::Error),
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    #[error("it is not for this build id")]
    WrongBuildId,
    #[error("cannot write to the cache: {0}")]
    Cache(#[source] io::Error),
}

struct Server {
    url: String,
    rests_until: Option<Instant>,
}

/// Asks servers, one after the other.
pub(super) struct Fetcher {
    agent: Agent,
    servers: Vec<Server>,
    max_bytes: u64,
}

impl Fetcher {
    pub(super) fn new(settings: &Settings) -> Self {
        let config = Agent::config_builder()
            // 404 is an answer.
            .http_status_as_error(false)
            .timeout_resolve(Some(CONNECT_WITHIN))
            .timeout_connect(Some(CONNECT_WITHIN))
            .timeout_recv_response(Some(settings.answer_within))
            .timeout_global(Some(settings.complete_within))
            .user_agent(concat!("memprof/", env!("CARGO_PKG_VERSION")))
            // The host's certificates: servers within a company have its own.
            .tls_config(
                TlsConfig::builder()
                    .root_certs(RootCerts::PlatformVerifier)
                    .build(),
            )
            .build();
        Self {
            agent: config.new_agent(),
            servers: settings
                .urls
                .iter()
                .map(|url| Server {
                    url: url.clone(),
                    rests_until: None,
                })
                .collect(),
            max_bytes: settings.max_bytes,
        }
    }

    /// Asks the servers in their order until one has it.
    pub(super) fn fetch(&mut self, build_id: &[u8], cache: &Cache) -> Outcome {
        let id = hex(build_id);
        let mut everyone_says = true;
        for server in &mut self.servers {
            let now = Instant::now();
            if server.rests_until.is_some_and(|until| now < until) {
                everyone_says = false;
                continue;
            }
            let url = format!("{}/buildid/{id}/debuginfo", server.url);
            let fetched = cache
                .begin(build_id)
                .map_err(FetchError::Cache)
                .and_then(|place| download(&self.agent, &url, build_id, self.max_bytes, place));
            match fetched {
                Ok(file) => return Outcome::Here(file),
                Err(FetchError::NotFound) => {}
                Err(error) => {
                    everyone_says = false;
                    tracing::warn!(%url, %error, "no debug information");
                    if matches!(error, FetchError::Http(_) | FetchError::Transfer(_)) {
                        server.rests_until = Some(now + REST);
                    }
                }
            }
        }
        if everyone_says {
            Outcome::Absent
        } else {
            Outcome::Failed
        }
    }
}

fn download(
    agent: &Agent,
    url: &str,
    build_id: &[u8],
    max_bytes: u64,
    mut place: Unfinished,
) -> Result<File, FetchError> {
    let response = agent.get(url).call()?;
    match response.status().as_u16() {
        200 => {}
        404 => return Err(FetchError::NotFound),
        status => return Err(FetchError::Status(status)),
    }
    let body = response.into_body();
    if body
        .content_length()
        .is_some_and(|length| length > max_bytes)
    {
        return Err(FetchError::TooLarge(max_bytes));
    }
    let mut body = body.into_reader();
    let mut chunk = vec![0; 1 << 18];
    let mut total = 0_u64;
    loop {
        let read = body.read(&mut chunk).map_err(FetchError::Transfer)?;
        let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        total += read as u64;
        if total > max_bytes {
            return Err(FetchError::TooLarge(max_bytes));
        }
        place
            .file()
            .and_then(|file| file.write_all(bytes))
            .map_err(FetchError::Cache)?;
    }
    let file = place.file().map_err(FetchError::Cache)?;
    if !has_build_id(file, build_id) {
        return Err(FetchError::WrongBuildId);
    }
    place.finish().map_err(FetchError::Cache)
}
