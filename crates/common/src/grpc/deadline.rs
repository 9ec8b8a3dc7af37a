//! `grpc-timeout`: how long the caller waits for the whole exchange.
//!
//! tonic's server ends what takes longer as `CANCELLED`, which tells the caller that somebody gave up, and not that the time
//! was too short. Gitaly, like every server on grpc-go, says `DEADLINE_EXCEEDED`.

use std::{
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request};
use tonic::Status;
use tower::{Layer, Service};

/// What a caller is told whose time is up. The text is grpc-go's.
pub const DEADLINE_EXCEEDED: &str = "context deadline exceeded";

/// A `grpc-timeout` that is not one to eight digits and a unit. The text is grpc-go's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed grpc-timeout")]
pub struct MalformedTimeout;

/// The caller's timeout; `None` when it set none.
pub fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, MalformedTimeout> {
    match headers.get("grpc-timeout") {
        None => Ok(None),
        Some(value) => parse(value.as_bytes()).map(Some).ok_or(MalformedTimeout),
    }
}

fn parse(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = digits.iter().fold(0u64, |number, digit| number * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Ends what takes longer than its caller waits until the answer begins. It has to be the outermost layer of a tonic server:
/// tonic counts the same time from a moment later.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner }
    }
}

/// See [`DeadlineLayer`].
#[derive(Debug, Clone)]
pub struct Deadline<S> {
    inner: S,
}

type BoxError = Box<dyn Error + Send + Sync>;

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let timeout = timeout_of(request.headers());
        // Counted from here, and not from when the future is first polled.
        let expiry = timeout.ok().flatten().map(tokio::time::sleep);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let Some(expiry) = expiry else { return answer.await.map_err(Into::into) };
            tokio::select! {
                biased;
                answer = answer => answer.map_err(Into::into),
                // tonic makes the answer of a status that is returned as an error.
                () = expiry => Err(Status::deadline_exceeded(DEADLINE_EXCEEDED).into()),
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "what a test starts ends with its runtime")]
mod tests {
    use std::{convert::Infallible, future};

    use http::Response;
    use hyper::client::conn::http2;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tonic::{body::Body, server::NamedService};
    use tower::{ServiceExt as _, service_fn};

    use super::*;

    /// It never answers.
    #[derive(Clone)]
    struct Silent;

    impl NamedService for Silent {
        const NAME: &'static str = "silent";
    }

    impl Service<Request<Body>> for Silent {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = future::Pending<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            future::pending()
        }
    }

    #[tokio::test]
    async fn of_the_two_that_count_the_time_ours_is_always_the_first() {
        let (ours, theirs) = tokio::io::duplex(1024 * 1024);
        let incoming = tokio_stream::iter([Ok::<_, std::io::Error>(theirs)]);
        let server = crate::grpc::server().layer(DeadlineLayer).add_service(Silent);
        tokio::spawn(server.serve_with_incoming(incoming));
        let (sender, connection) =
            http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let calls = (0..200).map(|number| {
            let mut sender = sender.clone();
            async move {
                let request = Request::post("http://tabularium.invalid/silent/Call")
                    .header("content-type", "application/grpc")
                    .header("grpc-timeout", format!("{}u", 1000 + 137 * number))
                    .body(Body::empty())
                    .unwrap();
                sender.send_request(request).await.unwrap().headers()["grpc-status"].clone()
            }
        });
        for code in futures::future::join_all(calls).await {
            assert_eq!(code, "4");
        }
    }

    #[test]
    fn units_are_those_of_grpc() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("0n", Some(Duration::ZERO)),
            ("100000000S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1s", None),
        ] {
            assert_eq!(parse(text.as_bytes()), expected, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_its_caller_waits_is_late_and_not_cancelled() {
        let takes = |time| {
            DeadlineLayer.layer(service_fn(move |_: Request<()>| async move {
                tokio::time::sleep(time).await;
                Ok::<_, Infallible>(())
            }))
        };
        let request = |timeout: &str| Request::builder().header("grpc-timeout", timeout).body(()).unwrap();
        let slow = takes(Duration::from_secs(1));
        let late = slow.clone().oneshot(request("900m")).await.unwrap_err();
        let late = late.downcast::<Status>().unwrap();
        assert_eq!((late.code(), late.message()), (tonic::Code::DeadlineExceeded, DEADLINE_EXCEEDED));
        slow.clone().oneshot(request("1100m")).await.unwrap();
        slow.oneshot(Request::new(())).await.unwrap();
    }
}
