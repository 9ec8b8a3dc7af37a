//! The one HTTP request that is made here: GET of a small answer, as from `/ready`.

use std::{io, time::Duration};

use tabularium_common::grpc::Address;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(2);
/// Largest answer read.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Status and body of `GET path` at `host:port`, also with `http://` or `https://` before it.
pub(crate) async fn get(address: &str, path: &str) -> io::Result<(u16, String)> {
    let exchange = async {
        let (host, to): (_, fn(String) -> Address) = match address.strip_prefix("https://") {
            Some(host) => (host, Address::Tls),
            None => (address.strip_prefix("http://").unwrap_or(address), Address::Tcp),
        };
        let mut stream = to(host.to_owned()).connect_http().await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.take(MAX_ANSWER_BYTES).read_to_end(&mut bytes).await?;
        parse(&String::from_utf8_lossy(&bytes)).ok_or_else(|| io::Error::other("not an HTTP answer"))
    };
    tokio::time::timeout(DEADLINE, exchange)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {address}"))))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let status = answer.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Some((status, body.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_read() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 10\r\n\r\nnot ready\n";
        assert_eq!(parse(answer), Some((503, "not ready".into())));
        assert_eq!(parse("SSH-2.0"), None);
    }
}
