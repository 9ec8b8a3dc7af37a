//! Puts an event on the bus and waits until the bus has it.

use std::time::Duration;

use async_nats::jetstream::{
    Context,
    context::{PublishError, PublishErrorKind},
    message::PublishMessage,
};
use bytes::Bytes;
use tabularium_common::{
    bus::Link,
    duties::{Class, SyncMessage, sync_subject},
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio::sync::watch;

/// How long the bus may take to confirm an event.
pub(crate) const PUBLISH_DEADLINE: Duration = Duration::from_secs(5);

/// The bus, as far as the receiver uses it.
pub(crate) struct Publisher {
    pub(crate) bus: Context,
    pub(crate) link: watch::Receiver<Link>,
}

/// Why the bus does not have an event.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishFault {
    #[error("the message bus is not connected")]
    Disconnected,
    #[error("the message bus did not confirm within {} s", PUBLISH_DEADLINE.as_secs())]
    Late,
    #[error("the stream cannot be made: {0}")]
    Stream(#[from] async_nats::jetstream::context::CreateStreamError),
    #[error("the message bus refused: {0}")]
    Refused(#[from] PublishError),
    #[error("the event cannot be written: {0}")]
    Body(#[from] serde_json::Error),
}

impl Publisher {
    /// Publishes, makes the stream when it is missing, and answers whether the bus had the event already.
    pub(crate) async fn publish(
        &self,
        event: &SyncMessage,
        correlation_id: &CorrelationId,
    ) -> Result<bool, PublishFault> {
        // The client would keep what it cannot send and send it later, when the caller has long been told otherwise.
        if *self.link.borrow() != Link::Up {
            return Err(PublishFault::Disconnected);
        }
        let body = Bytes::from(serde_json::to_vec(event)?);
        let published = async {
            match self.publish_once(event, &body, correlation_id).await {
                Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
                    self.bus.get_or_create_stream(Class::GeoSync.stream_config()).await?;
                    Ok(self.publish_once(event, &body, correlation_id).await?)
                }
                other => Ok(other?),
            }
        };
        tokio::time::timeout(PUBLISH_DEADLINE, published).await.unwrap_or(Err(PublishFault::Late))
    }

    async fn publish_once(
        &self,
        event: &SyncMessage,
        body: &Bytes,
        correlation_id: &CorrelationId,
    ) -> Result<bool, PublishError> {
        let message = PublishMessage::build()
            .payload(body.clone())
            .message_id(format!("{}:{}", event.home_site, event.event_id))
            .header(CORRELATION_ID, correlation_id.as_str());
        let subject = sync_subject(&event.home_site, &event.relative_path);
        let ack = self.bus.send_publish(subject, message).await?.await?;
        Ok(ack.duplicate)
    }
}
