//! `gitaly.AnalysisService`: whether files were written by programs.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    CheckBlobsGeneratedRequest, CheckBlobsGeneratedResponse, analysis_service_server::AnalysisService,
    check_blobs_generated_response::Blob,
};
use tonic::{Request, Response, Status, Streaming};

use super::{listing, streams::ResponseStream};
use crate::{
    git::{
        catfile::{CatFile, ObjectKind},
        revision,
    },
    linguist,
    node::Node,
};

/// As much of a file's beginning as is looked at.
const LOOKED_AT_BYTES: usize = 2048;

/// The service.
pub(crate) struct AnalysisServer(Arc<Node>);

impl AnalysisServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

fn check(request: &CheckBlobsGeneratedRequest) -> Result<(), Status> {
    let refused = |problem: String| Status::invalid_argument(format!("validating request: {problem}"));
    if request.blobs.is_empty() {
        return Err(refused("empty blobs".to_owned()));
    }
    for blob in &request.blobs {
        revision::check_path_scoped(&blob.revision).map_err(|error| refused(error.to_string()))?;
        if blob.path.is_empty() {
            return Err(refused("empty path".to_owned()));
        }
    }
    Ok(())
}

#[tonic::async_trait]
impl AnalysisService for AnalysisServer {
    async fn check_blobs_generated(
        &self,
        request: Request<Streaming<CheckBlobsGeneratedRequest>>,
    ) -> Result<Response<ResponseStream<CheckBlobsGeneratedResponse>>, Status> {
        let mut requests = request.into_inner();
        let Some(mut request) = requests.message().await? else {
            return Err(Status::internal("receiving first request: EOF"));
        };
        let repository = self.0.storages.open(request.repository.as_ref())?;
        check(&request)?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "CheckBlobsGenerated", |messages| async move {
            let mut objects = CatFile::start(&node.git, &repository).await?;
            loop {
                check(&request)?;
                let mut blobs = Vec::with_capacity(request.blobs.len());
                for asked in request.blobs {
                    let found = objects.head(&asked.revision, LOOKED_AT_BYTES).await?;
                    let (info, mut beginning) =
                        found.ok_or_else(|| Status::internal("reading object: object not found"))?;
                    if info.kind != ObjectKind::Blob {
                        return Err(Status::invalid_argument("object is not a blob"));
                    }
                    beginning.truncate(LOOKED_AT_BYTES);
                    let generated = linguist::is_generated(&asked.path, &beginning);
                    blobs.push(Blob { revision: asked.revision, generated });
                }
                messages.send(CheckBlobsGeneratedResponse { blobs }).await?;
                match requests.message().await? {
                    Some(next) => request = next,
                    None => break,
                }
            }
            objects.close().await?;
            Ok(())
        }))
    }
}
