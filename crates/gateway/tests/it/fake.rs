//! A stand-in for a router, its nodes and a coordinator: the services the gateway calls, on bare repositories in a
//! directory. It notes what it was asked and how calls ended.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream::BoxStream};
use tabularium_common::{
    auth::RequireToken,
    grpc::{self, Address, ListenAddress, Listener},
    lifecycle::Tasks,
    multiplex::{
        self, Backchannel,
        sidechannel::{self, Server, SidechannelId, generation},
    },
};
use tabularium_proto::{
    coordinator::{
        GetRepositoryRequest, GetRepositoryResponse, ListRepositoriesRequest, ListRepositoriesResponse,
        MirrorDetails, Replica, RepositoryDetails, RepositoryName, Route,
        operator_service_server::{OperatorService, OperatorServiceServer},
    },
    gitaly::{
        CreateRepositoryRequest, CreateRepositoryResponse, InfoRefsRequest, InfoRefsResponse, ObjectFormat,
        PostReceivePackRequest, PostReceivePackResponse, PostUploadPackWithSidechannelRequest,
        PostUploadPackWithSidechannelResponse, RemoveRepositoryRequest, RemoveRepositoryResponse, Repository,
        repository_service_server::{RepositoryService, RepositoryServiceServer},
        smart_http_service_server::{SmartHttpService, SmartHttpServiceServer},
    },
    node::{
        UploadPackRequest, UploadPackResponse,
        upload_pack_response::Output,
        upload_pack_service_server::{UploadPackService, UploadPackServiceServer},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};
use tonic::{Request, Response, Status, Streaming};
use tower::util::MapRequestLayer;

/// What is sent in one message, as the nodes do.
const CHUNK: usize = 128 * 1024;

#[derive(Default)]
pub(crate) struct Seen {
    /// Method, and what its first message or metadata said.
    pub(crate) calls: Vec<(&'static str, BTreeMap<&'static str, String>)>,
    /// How the input of a push or a fetch ended: `end` or the code of its failure.
    pub(crate) inputs: Vec<String>,
    /// Calls whose answer nobody took to its end.
    pub(crate) abandoned: usize,
    /// Git processes running.
    pub(crate) running: usize,
}

#[derive(Clone)]
pub(crate) struct Fake {
    root: Arc<PathBuf>,
    pub(crate) seen: Arc<Mutex<Seen>>,
    /// Home site and URL of repositories that are mirrors.
    pub(crate) mirrors: Arc<Mutex<HashMap<String, (String, String)>>>,
    /// What the next calls of a method answer instead of being served; of `<method>:once`, the next call alone.
    pub(crate) failures: Arc<Mutex<HashMap<&'static str, Status>>>,
    tasks: Tasks,
}

impl Fake {
    pub(crate) fn new(root: &Path, tasks: Tasks) -> Self {
        Self {
            root: Arc::new(root.to_owned()),
            seen: Arc::default(),
            mirrors: Arc::default(),
            failures: Arc::default(),
            tasks,
        }
    }

    /// Serves on a port of its own.
    pub(crate) async fn serve(&self, token: Option<&str>) -> Address {
        self.listen(token, false).await
    }

    /// The same, to clients with multiplexed connections too.
    pub(crate) async fn serve_multiplexed(&self, token: Option<&str>) -> Address {
        self.listen(token, true).await
    }

    async fn listen(&self, token: Option<&str>, multiplexed: bool) -> Address {
        let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let address = listener.address().unwrap();
        let token = RequireToken::new(token.map(|text| text.to_owned().into()));
        let stopping = self.tasks.stopping();
        let server = grpc::server()
            .layer(MapRequestLayer::new(multiplex::introduce))
            .layer(tonic::service::InterceptorLayer::new(token))
            .add_service(SmartHttpServiceServer::new(self.clone()))
            .add_service(UploadPackServiceServer::new(self.clone()))
            .add_service(RepositoryServiceServer::new(self.clone()))
            .add_service(OperatorServiceServer::new(self.clone()));
        let sessions = self.tasks.clone();
        self.tasks.spawn("fake", async move {
            let stopping = stopping.cancelled_owned();
            if multiplexed {
                let incoming = multiplex::Incoming::new(listener, sessions);
                server.serve_with_incoming_shutdown(incoming, stopping).await.unwrap();
            } else {
                server.serve_with_incoming_shutdown(listener.connections(), stopping).await.unwrap();
            }
        });
        address
    }

    pub(crate) fn path(&self, relative_path: &str) -> PathBuf {
        self.root.join(relative_path)
    }

    /// What the last call of a method said.
    pub(crate) fn last(&self, method: &str) -> BTreeMap<&'static str, String> {
        let seen = self.seen.lock().unwrap();
        seen.calls.iter().rev().find(|(name, _)| *name == method).unwrap().1.clone()
    }

    pub(crate) fn count(&self, method: &str) -> usize {
        self.seen.lock().unwrap().calls.iter().filter(|(name, _)| *name == method).count()
    }

    fn note<T>(&self, method: &'static str, request: &Request<T>, mut said: BTreeMap<&'static str, String>) {
        let metadata = request.metadata();
        for key in [
            "x-gitlab-correlation-id",
            "x-gitlab-client-name",
            "grpc-timeout",
            "tabularium-at-least-generation",
            "tabularium-wait",
        ] {
            if let Some(value) = metadata.get(key) {
                said.insert(key, value.to_str().unwrap().to_owned());
            }
        }
        self.seen.lock().unwrap().calls.push((method, said));
    }

    fn fail(&self, method: &'static str) -> Result<(), Status> {
        let mut failures = self.failures.lock().unwrap();
        let once = failures.remove(&*format!("{method}:once"));
        once.or_else(|| failures.get(method).cloned()).map_or(Ok(()), Err)
    }

    fn resolve(&self, repository: Option<&Repository>) -> Result<PathBuf, Status> {
        let repository = repository.ok_or_else(|| Status::invalid_argument("repository not set"))?;
        assert_eq!(repository.storage_name, "default");
        let path = self.path(&repository.relative_path);
        if path.is_dir() { Ok(path) } else { Err(Status::not_found("accessor call: repository not found")) }
    }

    fn git(&self, arguments: &[&str], repository: &Path, protocol: &str) -> Child {
        let mut command = Command::new("git");
        command
            .args(["-c", "uploadpack.allowFilter=true", "-c", "uploadpack.allowAnySHA1InWant=true"])
            .args(["-c", "receive.advertisePushOptions=true", "-c", "http.receivepack=true"])
            .args(arguments)
            .arg(repository)
            .env_remove("GIT_PROTOCOL")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if protocol == "version=1" || protocol == "version=2" {
            command.env("GIT_PROTOCOL", protocol);
        }
        self.seen.lock().unwrap().running += 1;
        command.spawn().unwrap()
    }

    /// Feeds `input` to git and streams its output; `failed` makes the status of a failed process.
    fn run(
        &self,
        mut child: Child,
        input: impl Stream<Item = Result<Bytes, Status>> + Send + 'static,
        failed: impl Fn(String) -> Status + Send + 'static,
    ) -> BoxStream<'static, Result<Bytes, Status>> {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let seen = Arc::clone(&self.seen);
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        self.tasks.spawn("git", async move {
            let mut input = Box::pin(input);
            let feed = async {
                let mut ended = "end".to_owned();
                while let Some(data) = input.next().await {
                    match data {
                        Ok(data) => {
                            // Git may stop reading early; what it says tells why.
                            let _ = stdin.write_all(&data).await;
                        }
                        Err(status) => {
                            ended = format!("{:?}", status.code());
                            break;
                        }
                    }
                }
                drop(stdin);
                seen.lock().unwrap().inputs.push(ended);
            };
            let read = async {
                loop {
                    let mut chunk = vec![0; CHUNK];
                    let length = stdout.read(&mut chunk).await.unwrap();
                    chunk.truncate(length);
                    if length == 0 || sender.send(Ok(Bytes::from(chunk))).await.is_err() {
                        return;
                    }
                }
            };
            let abandoned = tokio::select! {
                ((), ()) = async { tokio::join!(feed, read) } => sender.is_closed(),
                () = sender.closed() => true,
            };
            if abandoned {
                child.kill().await.unwrap();
            } else {
                let output = child.wait_with_output().await.unwrap();
                if !output.status.success() {
                    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
                    let _ = sender.send(Err(failed(stderr))).await;
                }
            }
            let mut seen = seen.lock().unwrap();
            seen.running -= 1;
            seen.abandoned += usize::from(abandoned);
        });
        tokio_stream::wrappers::ReceiverStream::new(receiver).boxed()
    }

    fn advertise(
        &self,
        service: &'static str,
        request: &InfoRefsRequest,
    ) -> Result<BoxStream<'static, Result<InfoRefsResponse, Status>>, Status> {
        let path = self.resolve(request.repository.as_ref())?;
        let command = service.strip_prefix("git-").unwrap();
        let child = self.git(&[command, "--stateless-rpc", "--advertise-refs"], &path, &request.git_protocol);
        let line = format!("# service={service}\n");
        let header = Bytes::from(format!("{:04x}{line}0000", line.len() + 4));
        let output = self.run(child, futures::stream::empty(), Status::internal);
        Ok(futures::stream::iter([Ok(header)])
            .chain(output)
            .map(|data| data.map(|data| InfoRefsResponse { data }))
            .boxed())
    }
}

fn said(repository: Option<&Repository>, protocol: &str) -> BTreeMap<&'static str, String> {
    let relative_path = repository.map(|repository| repository.relative_path.clone()).unwrap_or_default();
    BTreeMap::from([("relative_path", relative_path), ("git_protocol", protocol.to_owned())])
}

/// An answer that says, as a router does, how new the repository is.
fn at_generation<T>(answer: T, generation: &'static str) -> Response<T> {
    let mut response = Response::new(answer);
    response.metadata_mut().insert("tabularium-generation", generation.parse().unwrap());
    response
}

#[tonic::async_trait]
impl SmartHttpService for Fake {
    async fn info_refs_upload_pack(
        &self,
        request: Request<InfoRefsRequest>,
    ) -> Result<Response<BoxStream<'static, Result<InfoRefsResponse, Status>>>, Status> {
        let message = request.get_ref();
        self.note("InfoRefsUploadPack", &request, said(message.repository.as_ref(), &message.git_protocol));
        self.fail("InfoRefsUploadPack")?;
        self.advertise("git-upload-pack", message).map(|answer| at_generation(answer, "41"))
    }

    async fn info_refs_receive_pack(
        &self,
        request: Request<InfoRefsRequest>,
    ) -> Result<Response<BoxStream<'static, Result<InfoRefsResponse, Status>>>, Status> {
        let message = request.get_ref();
        self.note("InfoRefsReceivePack", &request, said(message.repository.as_ref(), &message.git_protocol));
        self.fail("InfoRefsReceivePack")?;
        self.advertise("git-receive-pack", message).map(Response::new)
    }

    async fn post_upload_pack_with_sidechannel(
        &self,
        request: Request<PostUploadPackWithSidechannelRequest>,
    ) -> Result<Response<PostUploadPackWithSidechannelResponse>, Status> {
        const METHOD: &str = "PostUploadPackWithSidechannel";
        let message = request.get_ref();
        self.note(METHOD, &request, said(message.repository.as_ref(), &message.git_protocol));
        self.fail(METHOD)?;
        let path = self.resolve(message.repository.as_ref())?;
        let id = SidechannelId::offered(request.metadata().as_ref()).unwrap();
        let asks = request.metadata().contains_key(generation::ASK)
            && self.fail("PostUploadPackWithSidechannel:silent").is_ok();
        let side = sidechannel::open(request.extensions().get::<Backchannel>(), id).await;
        let side = Arc::new(Server::new(side.map_err(|error| Status::internal(error.to_string()))?));
        let child = self.git(&["upload-pack", "--stateless-rpc"], &path, &message.git_protocol);
        let input = futures::stream::unfold(Arc::clone(&side), |side| async move {
            let piece =
                side.read().await.map_err(|error| Status::cancelled(error.to_string())).transpose()?;
            Some((piece, side))
        });
        let mut output = self
            .run(child, input.boxed(), |stderr| Status::internal(format!("running upload-pack: {stderr}")));
        if asks {
            let said = generation::preface(41);
            side.write(said).await.map_err(|error| Status::cancelled(error.to_string()))?;
        }
        while let Some(piece) = output.next().await.transpose()? {
            side.write(piece).await.map_err(|error| Status::cancelled(error.to_string()))?;
            let broken = self.fail("PostUploadPackWithSidechannel:mid").err();
            if let Some(status) = broken {
                return Err(status);
            }
        }
        side.finish();
        Ok(Response::new(PostUploadPackWithSidechannelResponse::default()))
    }

    async fn post_receive_pack(
        &self,
        mut request: Request<Streaming<PostReceivePackRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<PostReceivePackResponse, Status>>>, Status> {
        let first = request.get_mut().message().await?.ok_or_else(|| Status::cancelled("left"))?;
        assert!(first.data.is_empty());
        let mut said = said(first.repository.as_ref(), &first.git_protocol);
        said.insert("gl_id", first.gl_id.clone());
        said.insert("gl_username", first.gl_username.clone());
        said.insert("gl_repository", first.gl_repository.clone());
        self.note("PostReceivePack", &request, said);
        self.fail("PostReceivePack")?;
        let path = self.resolve(first.repository.as_ref())?;
        let child = self.git(&["receive-pack", "--stateless-rpc"], &path, &first.git_protocol);
        let input = request.into_inner().map(|message| {
            message.map(|message| {
                assert!(message.data.len() <= CHUNK && message.repository.is_none());
                message.data
            })
        });
        let output = self.run(child, input, |stderr| {
            Status::failed_precondition(format!("waiting for receive-pack: exit status 128, {stderr}"))
        });
        Ok(at_generation(output.map(|data| data.map(|data| PostReceivePackResponse { data })).boxed(), "42"))
    }
}

#[tonic::async_trait]
impl UploadPackService for Fake {
    async fn upload_pack(
        &self,
        mut request: Request<Streaming<UploadPackRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<UploadPackResponse, Status>>>, Status> {
        let first = request.get_mut().message().await?.ok_or_else(|| Status::cancelled("left"))?;
        assert!(first.stateless_rpc);
        self.note("UploadPack", &request, said(first.repository.as_ref(), &first.git_protocol));
        self.fail("UploadPack")?;
        let path = self.resolve(first.repository.as_ref())?;
        let child = self.git(&["upload-pack", "--stateless-rpc"], &path, &first.git_protocol);
        let input = futures::stream::iter([Ok(first.data)])
            .chain(request.into_inner().map(|message| message.map(|message| message.data)));
        let output = self
            .run(child, input, |stderr| Status::internal(format!("running upload-pack: {stderr}")))
            .map(|data| data.map(|data| UploadPackResponse { output: Some(Output::Stdout(data)) }));
        let stderr = UploadPackResponse { output: Some(Output::Stderr(Bytes::from_static(b"a warning\n"))) };
        let broken = self.fail("UploadPack:mid").err();
        if let Some(status) = broken {
            return Ok(Response::new(output.take(1).chain(futures::stream::iter([Err(status)])).boxed()));
        }
        Ok(at_generation(futures::stream::iter([Ok(stderr)]).chain(output).boxed(), "41"))
    }
}

#[tonic::async_trait]
impl RepositoryService for Fake {
    async fn create_repository(
        &self,
        request: Request<CreateRepositoryRequest>,
    ) -> Result<Response<CreateRepositoryResponse>, Status> {
        let message = request.get_ref();
        let branch = String::from_utf8(message.default_branch.clone()).unwrap();
        let mut said = said(message.repository.as_ref(), "");
        said.insert("default_branch", branch.clone());
        self.note("CreateRepository", &request, said);
        self.fail("CreateRepository")?;
        let repository = message.repository.as_ref().unwrap();
        let path = self.path(&repository.relative_path);
        if path.exists() {
            return Err(Status::already_exists("creating repository: repository exists already"));
        }
        let format = if message.object_format() == ObjectFormat::Sha256 { "sha256" } else { "sha1" };
        let branch = if branch.is_empty() { "main".to_owned() } else { branch };
        let output = Command::new("git")
            .args(["init", "-q", "--bare", "--object-format", format, "-b", &branch])
            .arg(&path)
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Ok(Response::new(CreateRepositoryResponse {}))
    }

    async fn remove_repository(
        &self,
        request: Request<RemoveRepositoryRequest>,
    ) -> Result<Response<RemoveRepositoryResponse>, Status> {
        let path = self.resolve(request.get_ref().repository.as_ref())?;
        std::fs::remove_dir_all(path).unwrap();
        Ok(Response::new(RemoveRepositoryResponse {}))
    }
}

impl Fake {
    fn details(&self, relative_path: &str) -> Option<RepositoryDetails> {
        let mirror = self.mirrors.lock().unwrap().get(relative_path).cloned();
        if mirror.is_none() && !self.path(relative_path).is_dir() {
            return None;
        }
        let replica = |storage: &str, generation| Replica { storage: storage.to_owned(), generation };
        Some(RepositoryDetails {
            route: Some(Route {
                repository_id: 7,
                name: Some(RepositoryName {
                    virtual_storage: "default".to_owned(),
                    relative_path: relative_path.to_owned(),
                }),
                primary: "node-1".to_owned(),
                generation: 3,
                epoch: 1,
                replicas: vec![replica("node-1", 3), replica("node-2", 2)],
                home_site: mirror.as_ref().map(|(site, _)| site.clone()).unwrap_or_default(),
                ..Route::default()
            }),
            mirror: mirror.map(|(home_site, home_url)| MirrorDetails {
                home_site,
                home_url,
                state: "synced".to_owned(),
                ..MirrorDetails::default()
            }),
            ..RepositoryDetails::default()
        })
    }
}

#[tonic::async_trait]
impl OperatorService for Fake {
    async fn get_repository(
        &self,
        request: Request<GetRepositoryRequest>,
    ) -> Result<Response<GetRepositoryResponse>, Status> {
        let name = request.get_ref().name.clone().unwrap();
        self.note("GetRepository", &request, BTreeMap::from([("relative_path", name.relative_path.clone())]));
        self.fail("GetRepository")?;
        let repository =
            self.details(&name.relative_path).ok_or_else(|| Status::not_found("repository not found"))?;
        Ok(Response::new(GetRepositoryResponse { repository: Some(repository) }))
    }

    async fn list_repositories(
        &self,
        request: Request<ListRepositoriesRequest>,
    ) -> Result<Response<ListRepositoriesResponse>, Status> {
        let message = request.into_inner();
        let mut names: Vec<String> = std::fs::read_dir(self.path("g"))
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        names.sort();
        let start = names.iter().position(|name| *name > message.page_token).unwrap_or(names.len());
        let size = if message.page_size == 0 { 100 } else { message.page_size as usize };
        let page: Vec<String> = names[start..].iter().take(size).cloned().collect();
        let next_page_token = if start + page.len() < names.len() {
            page.last().cloned().unwrap_or_default()
        } else {
            String::new()
        };
        let repositories = page.iter().filter_map(|name| self.details(&format!("g/{name}"))).collect();
        Ok(Response::new(ListRepositoriesResponse { repositories, next_page_token }))
    }
}
