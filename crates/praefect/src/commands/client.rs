//! The way to the process that serves.

use std::time::Duration;

use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
};
use tonic::{service::interceptor::InterceptedService, transport::Channel};

use super::Failure;
use crate::{
    file::File,
    translation::{own_address, tokens},
};

/// How long dialling may take, retries included.
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries to dial.
const PAUSE: Duration = Duration::from_millis(100);

/// A channel that signs its calls.
pub(super) type Signed = InterceptedService<Channel, SendToken>;

/// Dials the process of the same file.
pub(super) async fn dial(file: &File) -> Result<Signed, Failure> {
    dial_as(file, "error dialing").await
}

/// The same, with a command's own word for what failed.
pub(super) async fn dial_as(file: &File, what: &str) -> Result<Signed, Failure> {
    dial_within(DIAL_TIMEOUT, file, what).await
}

/// The same, for whoever has less time.
pub(super) async fn dial_within(timeout: Duration, file: &File, what: &str) -> Result<Signed, Failure> {
    let address = own_address(file)?;
    let token = SendToken(tokens(file).clients);
    match reach(&address, timeout).await {
        Ok(()) => Ok(InterceptedService::new(channel(&address), token)),
        Err(error) => Err(Failure::Told(format!("{what}: {address}: {error}"))),
    }
}

/// Waits until something listens there.
pub(super) async fn reach(address: &Address, timeout: Duration) -> Result<(), std::io::Error> {
    let end = tokio::time::Instant::now() + timeout;
    loop {
        match address.connect().await {
            Ok(_) => return Ok(()),
            Err(error) if tokio::time::Instant::now() + PAUSE > end => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
