//! Who may ask, over TCP. A Unix socket is guarded by its owner and mode.
//!
//! A web page that a user of this host looks at must not be able to ask, though it can make
//! the browser send requests to loopback, and can have its own name resolve to it:
//!
//! | header | let pass |
//! |---|---|
//! | `Host` | the address that the connection came to, a loopback address, `localhost` and names below it, what `--allow-host` names; any port, since ports may be forwarded |
//! | `Origin` | none, or that of the server itself |
//! | `Sec-Fetch-Site` | none, `none` or `same-origin` |
//!
//! Whoever passes needs the token as well, if there is one: `Authorization: Bearer TOKEN`, or
//! `Basic` with the token as password, which `http://memprof:TOKEN@host:port/` makes clients
//! such as `go tool pprof` send.

mod token;

use std::{net::IpAddr, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, StatusCode, Uri, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

pub use self::token::{Token, TokenError};

/// The address of ours that a connection came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalAddress(pub(super) IpAddr);

/// What is asked of those who come over TCP.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// What they have to know.
    pub token: Option<Arc<Token>>,
    /// Names and addresses beside those of loopback and of the listener.
    pub hosts: Arc<[String]>,
}

/// Why a request is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Host,
    Origin,
    Token,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, why) = match self {
            Self::Host => (
                StatusCode::FORBIDDEN,
                "this is not a host name of memprof's: ask for its address, or start it with --allow-host",
            ),
            Self::Origin => (
                StatusCode::FORBIDDEN,
                "web pages of other origins may not ask memprof",
            ),
            Self::Token => (StatusCode::UNAUTHORIZED, "the token is missing or wrong"),
        };
        let mut response = (status, Json(serde_json::json!({ "error": why }))).into_response();
        if self == Self::Token {
            let scheme = axum::http::HeaderValue::from_static("Bearer");
            let headers = response.headers_mut();
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// Lets a request pass, or answers it.
pub(super) async fn check(State(access): State<Access>, request: Request, next: Next) -> Response {
    let local = request.extensions().get::<LocalAddress>();
    let local = local.map(|local| local.0);
    match access.admit(request.uri(), request.headers(), local) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            tracing::debug!(?refusal, "a request is turned away");
            refusal.into_response()
        }
    }
}

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

impl Access {
    fn admit(&self, uri: &Uri, headers: &HeaderMap, local: Option<IpAddr>) -> Result<(), Refusal> {
        let host = only(headers, &header::HOST).map_err(|()| Refusal::Host)?;
        let host = host.and_then(|host| host.parse::<Authority>().ok());
        let host = host.ok_or(Refusal::Host)?;
        // A request may name its host in the first line, too, and then that counts.
        for authority in [Some(&host), uri.authority()].into_iter().flatten() {
            if !self.is_ours(authority.host(), local) {
                return Err(Refusal::Host);
            }
        }
        match only(headers, &header::ORIGIN).map_err(|()| Refusal::Origin)? {
            None => {}
            Some(origin) if origin.strip_prefix("http://") == Some(host.as_str()) => {}
            Some(_) => return Err(Refusal::Origin),
        }
        match only(headers, &SEC_FETCH_SITE).map_err(|()| Refusal::Origin)? {
            None | Some("none" | "same-origin") => {}
            Some(_) => return Err(Refusal::Origin),
        }
        let Some(token) = &self.token else {
            return Ok(());
        };
        let given = only(headers, &header::AUTHORIZATION).map_err(|()| Refusal::Token)?;
        if given.is_some_and(|given| token.is_in(given)) {
            Ok(())
        } else {
            Err(Refusal::Token)
        }
    }

    fn is_ours(&self, host: &str, local: Option<IpAddr>) -> bool {
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        if let Ok(address) = bare.unwrap_or(host).parse::<IpAddr>() {
            let address = address.to_canonical();
            if address.is_loopback() || local.is_some_and(|local| local.to_canonical() == address) {
                return true;
            }
        }
        let name = host.to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        // RFC 6761: names below it are loopback's, and nobody else can have them.
        name == "localhost"
            || name.ends_with(".localhost")
            || self
                .hosts
                .iter()
                .any(|host| host.eq_ignore_ascii_case(name))
    }
}

/// The value of a header, if it is there; an error if it is there twice or is no text.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ()> {
    let mut values = headers.get_all(name).iter();
    let value = values.next();
    if values.next().is_some() {
        return Err(());
    }
    value
        .map(|value| value.to_str().map_err(|_| ()))
        .transpose()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn admit(access: &Access, headers: &[(&'static str, &'static str)]) -> Result<(), Refusal> {
        let mut map = HeaderMap::new();
        for &(name, value) in headers {
            map.append(name, HeaderValue::from_static(value));
        }
        let local = Some([10, 1, 2, 3].into());
        access.admit(&Uri::from_static("/healthz"), &map, local)
    }

    /// Check which names of the host pass: loopback's, that of the connection and those that
    /// were allowed; and that one must be there, once.
    #[test]
    fn hosts() {
        let access = Access {
            token: None,
            hosts: ["Probe.example".to_owned()].into(),
        };
        for host in [
            "localhost",
            "LOCALHOST:80",
            "a.localhost:1",
            "localhost.",
            "127.0.0.1:9100",
            "127.1.2.3",
            "[::1]:9100",
            "[::ffff:127.0.0.1]",
            "10.1.2.3:9100",
            "probe.EXAMPLE:9100",
        ] {
            assert_eq!(admit(&access, &[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "xlocalhost",
            "10.1.2.4",
            "[::2]",
            "127.0.0.1.evil.example",
            "probe.example.evil.example",
            "",
        ] {
            let refused = admit(&access, &[("host", host)]);
            assert_eq!(refused, Err(Refusal::Host), "{host}");
        }
        assert_eq!(admit(&access, &[]), Err(Refusal::Host));
        let twice = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(admit(&access, &twice), Err(Refusal::Host));
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("localhost"));
        let absolute = Uri::from_static("http://evil.example/healthz");
        assert_eq!(access.admit(&absolute, &headers, None), Err(Refusal::Host));
    }

    /// Check that pages of other origins are turned away, however a browser says so.
    #[test]
    fn origins() {
        let access = Access::default();
        let host = ("host", "127.0.0.1:9100");
        for pass in [
            &[host][..],
            &[host, ("origin", "http://127.0.0.1:9100")],
            &[host, ("sec-fetch-site", "none")],
            &[host, ("sec-fetch-site", "same-origin")],
        ] {
            assert_eq!(admit(&access, pass), Ok(()), "{pass:?}");
        }
        for refused in [
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("origin", "http://127.0.0.1:9101"),
            ("origin", "https://127.0.0.1:9100"),
            ("origin", "http://localhost:9100"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            let result = admit(&access, &[host, refused]);
            assert_eq!(result, Err(Refusal::Origin), "{refused:?}");
        }
    }

    /// Check that the token opens, in both ways to say it, and nothing else does.
    #[test]
    fn tokens() {
        let access = Access {
            token: Some(Arc::new(Token::new(b"0123456789abcdef\n").unwrap())),
            hosts: Arc::default(),
        };
        let host = ("host", "localhost");
        for pass in [
            "Bearer 0123456789abcdef",
            "bearer  0123456789abcdef",
            // memprof:0123456789abcdef
            "Basic bWVtcHJvZjowMTIzNDU2Nzg5YWJjZGVm",
        ] {
            assert_eq!(admit(&access, &[host, ("authorization", pass)]), Ok(()));
        }
        for refused in [
            "Bearer 0123456789abcdeF",
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdef0",
            "Bearer ",
            "Bearer",
            "0123456789abcdef",
            "Digest 0123456789abcdef",
            "Basic 0123456789abcdef",
            "Basic !",
            "",
        ] {
            let result = admit(&access, &[host, ("authorization", refused)]);
            assert_eq!(result, Err(Refusal::Token), "{refused}");
        }
        assert_eq!(admit(&access, &[host]), Err(Refusal::Token));
    }
}
