//! The test's own view of the bus.

use std::time::Duration;

use async_nats::jetstream::{self, Context};
use tabularium_common::{duties::Class, telemetry::CORRELATION_ID};

pub(crate) const CORRELATION: &str = "test-correlation";

pub(crate) struct Bus(pub(crate) Context);

impl Bus {
    pub(crate) async fn connect(url: &str) -> Self {
        Self(jetstream::new(async_nats::connect(url).await.unwrap()))
    }

    /// Publishes on some subject of the class, making the stream first.
    pub(crate) async fn publish(&self, class: Class, body: Vec<u8>) {
        self.0.get_or_create_stream(class.stream_config()).await.unwrap();
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(CORRELATION_ID, CORRELATION);
        let subject = class.subjects().replace('>', "test");
        self.0.publish_with_headers(subject, headers, body.into()).await.unwrap().await.unwrap();
    }

    /// How many messages the stream holds.
    pub(crate) async fn messages(&self, class: Class) -> u64 {
        let mut stream = self.0.get_stream(class.stream()).await.unwrap();
        stream.info().await.unwrap().state.messages
    }

    /// Makes the consumer before any replicator does, with a short acknowledgement window.
    pub(crate) async fn shorten_ack_wait(&self, class: Class, ack_wait: Duration) {
        let stream = self.0.get_or_create_stream(class.stream_config()).await.unwrap();
        let config = jetstream::consumer::pull::Config { ack_wait, ..class.consumer_config(100) };
        stream.create_consumer(config).await.unwrap();
    }
}
