//! The least of HTTP/1.1, over a Unix socket and over TCP.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body, without the transfer's encoding.
    pub body: Vec<u8>,
}

impl Response {
    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find_map(|(key, value)| (key == name).then_some(value.as_str()))
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("no JSON: {error}: {}", String::from_utf8_lossy(&self.body));
        })
    }
}

/// Asks for `path` on `socket`.
#[must_use]
pub fn get(socket: impl AsRef<Path>, path: &str) -> Response {
    request(socket.as_ref(), "GET", path)
}

/// Sends a request without a body.
#[must_use]
pub fn request(socket: &Path, method: &str, path: &str) -> Response {
    request_with(socket, method, path, "")
}

/// Sends a request.
#[must_use]
pub fn request_with(socket: &Path, method: &str, path: &str, body: &str) -> Response {
    let mut stream =
        UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a read timeout");
    stream
        .set_write_timeout(Some(Duration::from_secs(30)))
        .expect("a write timeout");
    exchange(&mut stream, method, path, &[("Host", "localhost")], body)
}

/// One request and its answer.
fn exchange(
    stream: &mut (impl Read + Write),
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Response {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body.as_bytes()))
        .expect("sending a request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("reading an answer");
    parse(&answer)
}

/// A daemon that listens on TCP.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Where.
    pub address: SocketAddr,
    /// Headers of every request, beside `Host`.
    pub headers: Vec<(String, String)>,
}

impl Tcp {
    /// The first `http://ADDR:PORT` in what a daemon says.
    #[must_use]
    pub fn told(text: &str) -> Self {
        let (_, rest) = text.split_once("http://").expect("an address");
        let end = rest.find([',', ' ', '\n']).unwrap_or(rest.len());
        Self {
            address: rest[..end].parse().expect("an address and a port"),
            headers: Vec::new(),
        }
    }

    /// Its URL, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same with one more header.
    #[must_use]
    pub fn with(&self, name: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.headers.push((name.to_owned(), value.to_owned()));
        other
    }

    /// A connection of its own.
    #[must_use]
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("a connection");
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("a read timeout");
        stream.set_write_timeout(limit).expect("a write timeout");
        stream
    }

    /// Asks for `path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, "")
    }

    /// Sends a request.
    #[must_use]
    pub fn request(&self, method: &str, path: &str, body: &str) -> Response {
        let host = self.address.to_string();
        let mut headers: Vec<(&str, &str)> = Vec::new();
        let is_named = |(name, _): &(String, String)| name.eq_ignore_ascii_case("host");
        if !self.headers.iter().any(is_named) {
            headers.push(("Host", &host));
        }
        headers.extend(self.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())));
        exchange(&mut self.connect(), method, path, &headers, body)
    }
}

/// Reads an answer, all of it.
#[must_use]
pub fn parse(answer: &[u8]) -> Response {
    let end = find(answer, b"\r\n\r\n").expect("an end of the headers");
    let head = std::str::from_utf8(&answer[..end]).expect("headers are text");
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|line| line.get(..3)?.parse().ok())
        .expect("a status line");
    let headers = lines
        .map(|line| {
            let (name, value) = line.split_once(':').expect("a header line");
            (name.to_ascii_lowercase(), value.trim().to_owned())
        })
        .collect();
    let mut response = Response {
        status,
        headers,
        body: Vec::new(),
    };
    let body = &answer[end + 4..];
    response.body = if response.header("transfer-encoding") == Some("chunked") {
        unchunk(body)
    } else {
        if let Some(length) = response.header("content-length") {
            assert_eq!(length, body.len().to_string(), "content-length");
        }
        body.to_owned()
    };
    response
}

fn unchunk(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let end = find(body, b"\r\n").expect("a chunk's length");
        let length = std::str::from_utf8(&body[..end]).expect("a chunk's length is text");
        let length = usize::from_str_radix(length, 16).expect("a chunk's length is hexadecimal");
        if length == 0 {
            return whole;
        }
        let chunk = &body[end + 2..];
        whole.extend_from_slice(&chunk[..length]);
        body = &chunk[length + 2..];
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len())
        .position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::parse;

    /// Check that both ways of sending a body are read.
    #[test]
    fn bodies() {
        let plain = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
        assert_eq!(
            (plain.status, plain.body.as_slice()),
            (200, b"hi".as_slice())
        );
        let chunked =
            b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\na\r\n, everyone\r\n0\r\n\r\n";
        let chunked = parse(chunked);
        assert_eq!(
            (chunked.status, chunked.body.as_slice()),
            (404, b"hi, everyone".as_slice())
        );
    }
}
