//! The connection to the message bus: made once, kept for ever.
//!
//! A service starts without the bus and goes on without it; the client dials again until it is back. What the
//! connection is like at the moment is told through a watch, from which services set their readiness.
//!
//! Messages are hints and Postgres holds what is owed, so where coordinator and replicator are one process no server is
//! needed between them: [`Exchange`] takes NATS' place.

mod exchange;

use async_nats::{Client, ConnectOptions, Event};
use tokio::sync::watch;

use crate::tls;

pub use exchange::{Exchange, Full, Hint};

/// What carries the messages of a service.
#[derive(Clone)]
pub enum Bus {
    /// A NATS server.
    Nats {
        /// Keeps the connection.
        client: Client,
        /// How it is.
        link: watch::Receiver<Link>,
    },
    /// This process.
    InProcess(Exchange),
}

impl Bus {
    /// Connects to `url` under the name `service`. Errors are those of the URL itself.
    pub async fn connect(url: &str, service: &str) -> Result<Self, async_nats::ConnectError> {
        let (client, link) = connect(url, service).await?;
        Ok(Self::Nats { client, link })
    }

    /// How the connection is.
    pub fn link(&self) -> watch::Receiver<Link> {
        match self {
            Self::Nats { link, .. } => link.clone(),
            Self::InProcess(exchange) => exchange.link(),
        }
    }
}

/// How the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Dialling.
    Down,
    /// Connected.
    Up,
    /// Given up for good: the server refuses our credentials. Only a restart helps.
    Closed,
}

/// Connects to `url` under the name `service`, and keeps dialling when that fails now or later. Errors are those of the
/// URL itself.
pub async fn connect(
    url: &str,
    service: &str,
) -> Result<(Client, watch::Receiver<Link>), async_nats::ConnectError> {
    let (sender, receiver) = watch::channel(Link::Down);
    let options = match tls::dialer() {
        Ok(dialer) => ConnectOptions::new().tls_client_config(dialer.settings()),
        Err(error) => {
            tracing::debug!(%error, "the message bus cannot be reached over TLS");
            ConnectOptions::new()
        }
    };
    let client = options
        .name(service)
        .retry_on_initial_connect()
        .max_reconnects(None)
        .event_callback(move |event| {
            match event {
                Event::Connected => sender.send_replace(Link::Up),
                Event::Disconnected => sender.send_replace(Link::Down),
                Event::Closed => sender.send_replace(Link::Closed),
                _ => *sender.borrow(),
            };
            tracing::info!(%event, "message bus");
            std::future::ready(())
        })
        .connect(url)
        .await?;
    Ok((client, receiver))
}

/// Ends when the connection was given up for good. Only a service that keeps the client may wait for it: when the client
/// is dropped this never ends.
pub async fn closed(link: &mut watch::Receiver<Link>) {
    if link.wait_for(|link| *link == Link::Closed).await.is_err() {
        std::future::pending::<()>().await;
    }
}
