//! A storage node that answers at once, so that what the relay adds can be seen.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use tabularium_common::{
    announce::Announcement,
    grpc::{self, ListenAddress, Listener},
};
use tabularium_proto::{
    coordinator::{
        Replica, ResolveRepositoryRequest, ResolveRepositoryResponse, Route, SessionRenewed, SessionRequest,
        SessionResponse, SessionWelcome, Storage, Topology, VirtualStorage, routing_service_server,
        session_request, session_response,
    },
    gitaly::{
        GetBlobRequest, GetBlobResponse, RefExistsRequest, RefExistsResponse, blob_service_server,
        ref_service_server,
    },
};
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status, Streaming, codegen::BoxStream};

/// Name of the one virtual storage, storage and repository that the measurements use.
pub(crate) const VIRTUAL_STORAGE: &str = "default";
pub(crate) const STORAGE: &str = "node-1";
/// Where every repository is.
pub(crate) const REPLICA_PATH: &str = "@cluster/repositories/6b/86/1";
/// Bytes per message of the long stream, as Gitaly sends them.
pub(crate) const CHUNK_BYTES: usize = 128 * 1024;

struct Backend;

#[tonic::async_trait]
impl ref_service_server::RefService for Backend {
    async fn ref_exists(&self, _: Request<RefExistsRequest>) -> Result<Response<RefExistsResponse>, Status> {
        Ok(Response::new(RefExistsResponse { value: true }))
    }
}

#[tonic::async_trait]
impl blob_service_server::BlobService for Backend {
    /// Sends `limit` bytes.
    async fn get_blob(
        &self,
        request: Request<GetBlobRequest>,
    ) -> Result<Response<BoxStream<GetBlobResponse>>, Status> {
        let total = usize::try_from(request.into_inner().limit)
            .map_err(|_| Status::invalid_argument("limit is the number of bytes to send"))?;
        let chunk = Bytes::from(vec![0x5a; CHUNK_BYTES]);
        let messages = (0..total.div_ceil(CHUNK_BYTES))
            .map(move |_| Ok(GetBlobResponse { data: chunk.clone(), ..GetBlobResponse::default() }));
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }
}

/// Serves the node until it is killed.
pub(crate) async fn serve(announce: &Path) -> Result<()> {
    let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await?;
    let mut announcement = Announcement::of_this_process();
    announcement.grpc = Some(listener.address()?.to_string());
    announcement.write(announce)?;
    let (_, health) = tonic_health::server::health_reporter();
    grpc::server()
        .add_service(health)
        .add_service(ref_service_server::RefServiceServer::new(Backend))
        .add_service(blob_service_server::BlobServiceServer::new(Backend))
        .serve_with_incoming(listener.connections())
        .await
        .context("serving the backend")
}

/// A coordinator that knows one repository on one node and whose leases never end.
pub(crate) struct OneRoute {
    address: String,
}

impl OneRoute {
    /// The one node's address.
    pub(crate) fn new(address: String) -> Self {
        Self { address }
    }

    fn topology(&self) -> Topology {
        let storage =
            Storage { name: STORAGE.to_owned(), address: self.address.clone(), ..Storage::default() };
        Topology {
            site: "bench".to_owned(),
            virtual_storages: vec![VirtualStorage {
                name: VIRTUAL_STORAGE.to_owned(),
                storages: vec![storage],
            }],
        }
    }
}

#[tonic::async_trait]
impl routing_service_server::RoutingService for OneRoute {
    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<BoxStream<SessionResponse>>, Status> {
        let topology = self.topology();
        let answers = request.into_inner().filter_map(move |message| {
            let answer = match message {
                Err(status) => return Some(Err(status)),
                Ok(SessionRequest { message: Some(session_request::Message::Hello(_)) }) => {
                    session_response::Message::Welcome(SessionWelcome {
                        session_id: "bench".to_owned(),
                        lease_milliseconds: 60_000,
                        topology: Some(topology.clone()),
                    })
                }
                Ok(SessionRequest { message: Some(session_request::Message::Renew(renew)) }) => {
                    session_response::Message::Renewed(SessionRenewed { sequence: renew.sequence })
                }
                Ok(_) => return None,
            };
            Some(Ok(SessionResponse { message: Some(answer) }))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn resolve_repository(
        &self,
        request: Request<ResolveRepositoryRequest>,
    ) -> Result<Response<ResolveRepositoryResponse>, Status> {
        let route = Route {
            repository_id: 1,
            name: request.into_inner().name,
            replica_path: REPLICA_PATH.to_owned(),
            primary: STORAGE.to_owned(),
            generation: 1,
            epoch: 1,
            replicas: vec![Replica { storage: STORAGE.to_owned(), generation: 1 }],
            home_site: String::new(),
            ..Route::default()
        };
        Ok(Response::new(ResolveRepositoryResponse { route: Some(route), cacheable: true }))
    }
}

/// How long the processes of a measurement may take to come up.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(20);
