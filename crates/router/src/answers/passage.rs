//! The way through the router to its coordinator, for operators and other coordinators that know the router's address only.
//! Requests and answers pass as they are, but for the token: ours in place of the caller's.

use std::{
    convert::Infallible,
    marker::PhantomData,
    task::{Context, Poll},
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use tabularium_proto::coordinator::{
    import_service_server::ImportServiceServer, operator_service_server::OperatorServiceServer,
    peer_service_server::PeerServiceServer, rebuild_service_server::RebuildServiceServer,
    repair_service_server::RepairServiceServer, storage_service_server::StorageServiceServer,
};
use tonic::{Status, body::Body, server::NamedService, service::Routes};
use tower::Service;

use crate::coordinator::{Coordinators, Link};

/// Below this are the services of coordinators.
const COORDINATORS: &str = "/tabularium.coordinator.v1.";

/// Whether a path may be one of theirs.
pub(crate) fn is_passed(path: &str) -> bool {
    path.starts_with(COORDINATORS)
}

/// The way to one service, whose name is `S`'s.
struct Passage<S> {
    coordinators: Coordinators,
    service: PhantomData<fn() -> S>,
}

impl<S> Clone for Passage<S> {
    fn clone(&self) -> Self {
        Self { coordinators: self.coordinators.clone(), service: PhantomData }
    }
}

impl<S: NamedService> NamedService for Passage<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Passage<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let mut link = self.coordinators.preferred_link();
        request.headers_mut().remove(http::header::AUTHORIZATION);
        async move { Ok(pass(&mut link, request).await.unwrap_or_else(Status::into_http)) }.boxed()
    }
}

async fn pass(link: &mut Link, request: Request<Body>) -> Result<Response<Body>, Status> {
    let lost = |error: tonic::transport::Error| Status::unavailable(format!("coordinator: {error}"));
    std::future::poll_fn(|cx| Service::<Request<Body>>::poll_ready(link, cx)).await.map_err(lost)?;
    let answer = link.call(request).await.map_err(lost)?;
    Ok(answer.map(Body::new))
}

/// Adds what operators and peers ask. Not what routers and workers do: they are told where coordinators are.
pub(crate) fn add(routes: Routes, coordinators: &Coordinators) -> Routes {
    fn to<S>(coordinators: &Coordinators) -> Passage<S> {
        Passage { coordinators: coordinators.clone(), service: PhantomData }
    }
    routes
        .add_service(to::<OperatorServiceServer<()>>(coordinators))
        .add_service(to::<StorageServiceServer<()>>(coordinators))
        .add_service(to::<RepairServiceServer<()>>(coordinators))
        .add_service(to::<RebuildServiceServer<()>>(coordinators))
        .add_service(to::<ImportServiceServer<()>>(coordinators))
        .add_service(to::<PeerServiceServer<()>>(coordinators))
}
