//! One log line and one count for every RPC, written when its last byte is out or its caller has gone.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use tabularium_common::{methods::Registry, telemetry::CorrelationId};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::metrics::Metrics;

/// Services outside the method registry whose paths may appear in metrics.
const OWN_METHODS: [&str; 2] = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];

/// Wraps the server. Puts the [`CorrelationId`] into each request's extensions.
#[derive(Clone)]
pub(crate) struct RpcLogLayer {
    methods: Arc<Registry>,
    metrics: Metrics,
}

impl RpcLogLayer {
    pub(crate) fn new(methods: Arc<Registry>, metrics: Metrics) -> Self {
        Self { methods, metrics }
    }
}

impl<S> Layer<S> for RpcLogLayer {
    type Service = RpcLog<S>;
    fn layer(&self, inner: S) -> RpcLog<S> {
        RpcLog { inner, layer: self.clone() }
    }
}

/// See [`RpcLogLayer`].
#[derive(Clone)]
pub(crate) struct RpcLog<S> {
    inner: S,
    layer: RpcLogLayer,
}

impl<S, B, C> Service<Request<B>> for RpcLog<S>
where
    S: Service<Request<B>, Response = Response<C>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    C: Send + 'static,
{
    type Response = Response<LoggedBody<C>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let correlation_id = CorrelationId::of(request.headers());
        request.extensions_mut().insert(correlation_id.clone());
        let path = request.uri().path();
        let known = self.layer.methods.get(path).is_some() || OWN_METHODS.contains(&path);
        let span = tracing::info_span!("rpc", %correlation_id);
        let mut entry = Entry {
            method: path.to_owned(),
            label: if known { path.to_owned() } else { "unknown".to_owned() },
            correlation_id,
            began: Instant::now(),
            code: None,
            metrics: self.layer.metrics.clone(),
        };
        let future = self.inner.call(request).instrument(span);
        Box::pin(async move {
            let response = future.await?;
            entry.see(response.headers());
            Ok(response.map(|inner| LoggedBody { inner: Box::pin(inner), entry }))
        })
    }
}

/// What is known of one RPC; written out when it is dropped.
struct Entry {
    method: String,
    label: String,
    correlation_id: CorrelationId,
    began: Instant,
    /// `None` until the status is out: then the caller has gone.
    code: Option<Code>,
    metrics: Metrics,
}

impl Entry {
    fn see(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.code = Some(status.code());
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        self.metrics.rpc(&self.label, code);
        let elapsed = self.began.elapsed().as_secs_f64() * 1000.0;
        tracing::info!(
            correlation_id = %self.correlation_id,
            method = %self.method,
            grpc_code = ?code,
            elapsed_ms = elapsed,
            "rpc"
        );
    }
}

/// A response body that notes the status in its trailers.
pub(crate) struct LoggedBody<C> {
    inner: Pin<Box<C>>,
    entry: Entry,
}

impl<C: Body> Body for LoggedBody<C> {
    type Data = C::Data;
    type Error = C::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<C::Data>, C::Error>>> {
        let frame = self.inner.as_mut().poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.entry.see(trailers);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
