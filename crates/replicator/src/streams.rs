//! The streams and consumers of the bus. They are made by whoever needs them first, always with the same words, and made
//! again when a bus comes back without them.

use async_nats::jetstream::{
    Context, consumer::PullConsumer, context::CreateStreamError, stream::ConsumerError,
};
use tabularium_common::duties::Class;

/// Messages of one class that may be delivered and not settled, over all replicators. Those waiting out a delay count, so
/// it is far above what runs at once.
const MAX_UNSETTLED: i64 = 20_000;

/// Why a class cannot be pulled from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamFault {
    #[error("stream: {0}")]
    Stream(#[from] CreateStreamError),
    #[error("consumer: {0}")]
    Consumer(#[from] ConsumerError),
}

/// The consumer of a class; stream and consumer are made when they are missing.
pub(crate) async fn consumer(bus: &Context, class: Class) -> Result<PullConsumer, StreamFault> {
    let stream = bus.get_or_create_stream(class.stream_config()).await?;
    Ok(stream.get_or_create_consumer(class.consumer(), class.consumer_config(MAX_UNSETTLED)).await?)
}
