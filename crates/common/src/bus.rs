//! The connection to the message bus: made once, kept for ever.
//!
//! A service starts without the bus and goes on without it; the client dials again until it is back. What the
//! connection is like at the moment is told through a watch, from which services set their readiness.

use async_nats::{Client, ConnectOptions, Event};
use tokio::sync::watch;

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
    let client = ConnectOptions::new()
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
