//! Accepts connections and serves them, with a bound on how many there are and on how long each may stay silent: the
//! callers are other sites, and whoever else can reach the port.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{Router, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tabularium_common::{grpc::Listener, lifecycle::Tasks};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Connections at once; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
/// Until the headers of a request are complete; also how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Header lines of one request.
const MAX_HEADERS: usize = 100;
/// All of a request's head, in bytes.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// After a failure to accept a connection, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the service stops. The connections are tasks of their own.
pub(crate) async fn accept(listener: Listener, app: Router, tasks: Tasks) {
    let stopping = tasks.stopping();
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            // Closed never: the semaphore lives as long as this task.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = stopping.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok(accepted) => {
                let (app, stopping) = (app.clone(), stopping.clone());
                tasks.spawn("connection", async move {
                    let secured = tokio::select! {
                        secured = accepted.secure() => Some(secured),
                        () = stopping.cancelled() => None,
                    };
                    match secured {
                        Some(Ok(stream)) => serve(stream, app, HEADER_TIMEOUT, stopping).await,
                        Some(Err(error)) => tracing::debug!(%error, "connection came to nothing"),
                        None => {}
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves a connection to its end. After `stopping` it takes no further request.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    app: Router,
    header_timeout: Duration,
    stopping: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let app = app.clone();
        async move { Ok::<_, Infallible>(app.oneshot(request).await.unwrap_or_else(|never| match never {})) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut draining = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = stopping.cancelled(), if !draining => {
                connection.as_mut().graceful_shutdown();
                draining = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// What a caller that sends `request`, and then nothing more, gets until the connection is closed.
    async fn answer_to(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().route("/", axum::routing::get(|| async { "here" }));
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            serve(stream, app, Duration::from_millis(100), CancellationToken::new()).await;
        };
        let client = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(server, client).1 })
            .await
            .expect("the connection is not kept for ever")
    }

    #[tokio::test]
    async fn a_request_is_answered_and_the_idle_connection_closed() {
        assert!(answer_to(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.ends_with("here"));
    }

    #[tokio::test]
    async fn a_caller_that_never_ends_its_headers_is_let_go() {
        assert!(!answer_to(b"GET / HTTP/1.1\r\nhost: x\r\n").await.contains("200"));
        assert_eq!(answer_to(b"").await, "");
    }

    #[tokio::test]
    async fn headers_are_bounded() {
        let mut request = b"GET / HTTP/1.1\r\n".to_vec();
        request.extend(b"a: b\r\n".repeat(MAX_HEADERS + 1));
        request.extend(b"\r\n");
        assert!(answer_to(&request).await.starts_with("HTTP/1.1 431"));
    }
}
