//! Where messages come from, and how they are settled there: a pull consumer of NATS, or the queues of this process.

use std::time::Duration;

use async_nats::jetstream::{self, AckKind, Context, consumer::PullConsumer};
use futures::StreamExt as _;
use tabularium_common::{
    bus::{Bus, Exchange, Full, Hint},
    duties::Class,
    telemetry::{CORRELATION_ID, CorrelationId},
};
use tokio_util::sync::CancellationToken;

use crate::{
    settlement::Settlement,
    streams::{self, StreamFault},
};

/// How long one pull waits for a message; also how long a stop may wait for a pull to end.
const PULL_WAIT: Duration = Duration::from_secs(1);
/// Pulls without a message after which the consumer is looked up anew.
const IDLE_PULLS: u32 = 30;

/// Why there is no message, or why one could not be settled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MessageFault {
    #[error(transparent)]
    Stream(#[from] StreamFault),
    #[error("{0}")]
    Bus(async_nats::Error),
    #[error(transparent)]
    Exchange(#[from] Full),
}

/// Messages of one class.
pub(crate) enum Source {
    JetStream { context: Box<Context>, class: Class, consumer: Option<Box<PullConsumer>>, idle: u32 },
    InProcess { exchange: Exchange, class: Class },
}

impl Source {
    pub(crate) fn new(bus: &Bus, class: Class) -> Self {
        match bus {
            Bus::Nats { client, .. } => {
                let context = Box::new(jetstream::new(client.clone()));
                Self::JetStream { context, class, consumer: None, idle: 0 }
            }
            Bus::InProcess(exchange) => Self::InProcess { exchange: exchange.clone(), class },
        }
    }

    /// The next message, if one comes in time. A pull runs to its end when the service stops: a message that is under way
    /// is then given back by the caller instead of being lost for the length of its acknowledgement window.
    pub(crate) async fn next(
        &mut self,
        stopping: &CancellationToken,
    ) -> Result<Option<Message>, MessageFault> {
        match self {
            Self::InProcess { exchange, class } => tokio::select! {
                () = stopping.cancelled() => Ok(None),
                hint = exchange.take(*class) => {
                    Ok(Some(Message::InProcess { exchange: exchange.clone(), class: *class, hint }))
                }
            },
            Self::JetStream { context, class, consumer, idle } => {
                let found = match consumer.take() {
                    Some(found) => found,
                    None => Box::new(streams::consumer(context, *class).await?),
                };
                let message = pull(&found).await.map_err(MessageFault::Bus)?;
                *idle = if message.is_some() { 0 } else { *idle + 1 };
                if *idle < IDLE_PULLS {
                    *consumer = Some(found);
                } else {
                    *idle = 0;
                }
                Ok(message.map(|message| Message::JetStream(Box::new(message))))
            }
        }
    }
}

async fn pull(consumer: &PullConsumer) -> Result<Option<jetstream::Message>, async_nats::Error> {
    let mut batch = consumer.batch().max_messages(1).expires(PULL_WAIT).messages().await?;
    batch.next().await.transpose()
}

/// A message that was taken.
pub(crate) enum Message {
    JetStream(Box<jetstream::Message>),
    InProcess { exchange: Exchange, class: Class, hint: Hint },
}

impl Message {
    pub(crate) fn body(&self) -> &[u8] {
        match self {
            Self::JetStream(message) => &message.payload,
            Self::InProcess { hint, .. } => &hint.body,
        }
    }

    /// The publisher's correlation id, or a new one.
    pub(crate) fn correlation_id(&self) -> CorrelationId {
        let given = match self {
            Self::JetStream(message) => message
                .headers
                .as_ref()
                .and_then(|headers| headers.get(CORRELATION_ID))
                .map(async_nats::HeaderValue::as_str),
            Self::InProcess { hint, .. } => Some(hint.correlation_id.as_str()),
        };
        let mut headers = http::HeaderMap::new();
        if let Some(value) = given.and_then(|id| http::HeaderValue::from_str(id).ok()) {
            headers.insert(CORRELATION_ID, value);
        }
        CorrelationId::of(&headers)
    }

    /// How often it was delivered, this time included.
    pub(crate) fn deliveries(&self) -> u64 {
        match self {
            Self::JetStream(message) => {
                message.info().map_or(1, |info| u64::try_from(info.delivered).unwrap_or(1))
            }
            Self::InProcess { hint, .. } => hint.deliveries,
        }
    }

    /// Says what becomes of it.
    pub(crate) async fn settle(&self, settlement: Settlement) -> Result<(), MessageFault> {
        match self {
            Self::InProcess { exchange, class, hint } => match settlement {
                Settlement::Ack | Settlement::Term => Ok(()),
                Settlement::Nak(delay) => Ok(exchange.give_back(*class, hint.clone(), delay)?),
            },
            Self::JetStream(message) => match settlement {
                Settlement::Ack => message.double_ack().await,
                Settlement::Term => message.double_ack_with(AckKind::Term).await,
                Settlement::Nak(Duration::ZERO) => message.ack_with(AckKind::Nak(None)).await,
                Settlement::Nak(delay) => message.ack_with(AckKind::Nak(Some(delay))).await,
            }
            .map_err(MessageFault::Bus),
        }
    }

    /// Says that it is still being worked on. Within a process nobody takes it over.
    pub(crate) async fn show_progress(&self) -> Result<(), MessageFault> {
        match self {
            Self::InProcess { .. } => Ok(()),
            Self::JetStream(message) => message.ack_with(AckKind::Progress).await.map_err(MessageFault::Bus),
        }
    }
}
