//! How the relay's messages travel: over NATS' streams, or within this process.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use async_nats::{
    HeaderMap,
    jetstream::{self, Context},
};
use tabularium_common::{
    bus::{Bus, Exchange},
    duties::Class,
    telemetry::CORRELATION_ID,
};

/// How long the bus may take to confirm a message.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(5);

/// The bus did not take a message, or is not ready for one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct CarrierError(String);

fn failed(error: impl std::fmt::Display) -> CarrierError {
    CarrierError(error.to_string())
}

/// What stands on a message.
pub(super) struct Envelope<'a> {
    pub(super) class: Class,
    pub(super) subject: String,
    /// Another message with the same id is this one again.
    pub(super) message_id: String,
    /// Of the request that caused it; empty: none is known.
    pub(super) correlation_id: &'a str,
}

/// The bus, as far as the relay uses it.
pub(super) enum Carrier {
    JetStream {
        context: Box<Context>,
        /// When each stream was made, as its server says: another time is another stream.
        made: HashMap<Class, String>,
    },
    InProcess {
        exchange: Exchange,
        /// What the process before this one was told has been asked for.
        prepared: bool,
    },
}

impl Carrier {
    pub(super) fn new(bus: &Bus) -> Self {
        match bus {
            Bus::Nats { client, .. } => {
                let mut context = jetstream::new(client.clone());
                context.set_timeout(PUBLISH_DEADLINE);
                Self::JetStream { context: Box::new(context), made: HashMap::new() }
            }
            Bus::InProcess(exchange) => Self::InProcess { exchange: exchange.clone(), prepared: false },
        }
    }

    /// Makes the streams that are missing, and notes the classes of which published messages may have been lost.
    pub(super) async fn prepare(&mut self, lost: &mut HashSet<Class>) -> Result<(), CarrierError> {
        match self {
            Self::JetStream { context, made } => check_streams(context, made, lost).await,
            Self::InProcess { prepared, .. } => {
                // Messages die with their process.
                if !std::mem::replace(prepared, true) {
                    lost.extend(Class::ALL);
                }
                Ok(())
            }
        }
    }

    /// Sends a message; it has been taken when this is done.
    pub(super) async fn send(
        &self,
        envelope: Envelope<'_>,
        body: &impl serde::Serialize,
    ) -> Result<(), CarrierError> {
        let body = serde_json::to_vec(body).map_err(failed)?.into();
        match self {
            Self::InProcess { exchange, .. } => {
                exchange.publish(envelope.class, body, envelope.correlation_id).map_err(failed)
            }
            Self::JetStream { context, .. } => {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", envelope.message_id.as_str());
                if !envelope.correlation_id.is_empty() {
                    headers.insert(CORRELATION_ID, envelope.correlation_id);
                }
                let sent = context.publish_with_headers(envelope.subject, headers, body).await;
                sent.map_err(failed)?.await.map_err(failed)?;
                Ok(())
            }
        }
    }
}

async fn check_streams(
    context: &Context,
    made: &mut HashMap<Class, String>,
    lost: &mut HashSet<Class>,
) -> Result<(), CarrierError> {
    for class in Class::ALL {
        let stream = context.get_or_create_stream(class.stream_config()).await.map_err(failed)?;
        let info = stream.cached_info();
        let created = info.created.to_string();
        let unused = info.state.last_sequence == 0;
        match made.insert(class, created.clone()) {
            Some(known) if known == created => {}
            Some(_) => _ = lost.insert(class),
            None if unused => _ = lost.insert(class),
            None => {}
        }
    }
    Ok(())
}
