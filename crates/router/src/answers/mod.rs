//! What the router answers itself, as Praefect does.

mod clock;
pub(crate) mod object_pool;
pub(crate) mod passage;
pub(crate) mod praefect;
pub(crate) mod repositories;
pub(crate) mod repository;
pub(crate) mod server;
pub(crate) mod transaction;

use std::future::Future;

use tokio::time::timeout;
use tonic::Status;

use crate::relay::QUESTION;

/// Bounds a question to a node.
async fn asked<T>(question: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match timeout(QUESTION, question).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::unavailable("the storage node did not answer in time")),
    }
}
