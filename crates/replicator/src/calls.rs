//! What every outgoing gRPC call carries: the correlation id, a deadline that both ends know, a token.

use std::time::Duration;

use tabularium_common::{
    auth::SendToken,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tonic::{
    Request, Response, Status, metadata::MetadataValue, service::interceptor::InterceptedService,
    transport::Channel,
};

use crate::failure::Failure;

/// A connection whose calls are signed.
pub(crate) type Signed = InterceptedService<Channel, SendToken>;

/// Deadline of calls that only look something up.
pub(crate) const LOOKUP_DEADLINE: Duration = Duration::from_secs(60);

/// A request with its correlation id and deadline.
pub(crate) fn request<T>(body: T, correlation_id: &CorrelationId, deadline: Duration) -> Request<T> {
    let mut request = Request::new(body);
    if let Ok(value) = MetadataValue::try_from(correlation_id.as_str()) {
        request.metadata_mut().insert(CORRELATION_ID, value);
    }
    request.set_timeout(deadline);
    request
}

/// Waits for a call, at most `deadline`. The transport keeps the deadline too, but reports it as a cancellation.
pub(crate) async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} ms", deadline.as_millis()))),
    }
}

/// As [`within`], with a failure that says what was being done.
pub(crate) async fn attempt<T>(
    doing: &str,
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    within(deadline, call).await.map_err(|status| Failure::of_call(doing, &status))
}
