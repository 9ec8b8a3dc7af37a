//! What gitlab-shell is to git clients: a listener of git's own protocol (`git://`), which says what `ssh` would carry, in
//! front of a node's `SSHService`.

use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use tabularium_common::{
    lifecycle::Tasks,
    multiplex::{
        self,
        sidechannel::{Client as Sidechannel, METADATA, Sidechannels},
    },
    pktline::{self, Packet},
};
use tabularium_proto::gitaly::{
    ExitStatus, Repository, SshReceivePackRequest, SshUploadArchiveRequest, SshUploadPackRequest,
    SshUploadPackWithSidechannelRequest, ssh_service_client::SshServiceClient,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, service::interceptor::InterceptedService};

use crate::harness::{Caller, Client, TestNode};

/// How an RPC ended: exit status, if one was told, and code with text.
pub(crate) type End = (Option<i32>, Code, String);

/// A listener in front of a node.
pub(crate) struct Bridge {
    /// Repositories' paths go behind it.
    pub(crate) url: String,
    ends: Arc<Mutex<Vec<End>>>,
}

impl Bridge {
    /// How the last RPC ended.
    pub(crate) async fn end(&self) -> End {
        crate::harness::eventually("an RPC has ended", async || !self.ends.lock().unwrap().is_empty()).await;
        self.ends.lock().unwrap().pop().unwrap()
    }
}

/// How fetches go.
#[derive(Clone)]
pub(crate) enum Fetches {
    Messages,
    Sidechannel(Sidechannels),
}

/// A client of a node over a multiplexed connection, and what it can offer.
pub(crate) fn multiplexed(node: &TestNode) -> (SshServiceClient<Client>, Sidechannels) {
    let sidechannels = Sidechannels::default();
    let channel = multiplex::channel(&node.address, sidechannels.clone(), &Tasks::new());
    (SshServiceClient::new(InterceptedService::new(channel, Caller::known())), sidechannels)
}

pub(crate) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(work)
}

pub(crate) async fn serve(client: SshServiceClient<Client>, storage: &str, fetches: Fetches) -> Bridge {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("git://{}", listener.local_addr().unwrap());
    let ends = Arc::<Mutex<Vec<End>>>::default();
    let (kept, storage) = (Arc::clone(&ends), storage.to_owned());
    spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let call = Call { client: client.clone(), storage: storage.clone(), fetches: fetches.clone() };
            let ends = Arc::clone(&kept);
            spawn(async move {
                let end = call.serve(connection).await;
                ends.lock().unwrap().push(end);
            });
        }
    });
    Bridge { url, ends }
}

struct Call {
    client: SshServiceClient<Client>,
    storage: String,
    fetches: Fetches,
}

/// What the client says, in messages.
fn said<T: Send + 'static>(
    first: T,
    (more, mut from): (Bytes, OwnedReadHalf),
    wrap: fn(Bytes) -> T,
) -> ReceiverStream<T> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    spawn(async move {
        let _ = sender.send(first).await;
        let _ = sender.send(wrap(more)).await;
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        while from.read_buf(&mut buffer).await.unwrap_or(0) > 0 {
            if sender.send(wrap(buffer.split().freeze())).await.is_err() {
                return;
            }
            buffer.reserve(64 * 1024);
        }
    });
    ReceiverStream::new(receiver)
}

macro_rules! relay {
    ($answer:expr, $to:expr) => {{
        let (answer, mut to): (_, OwnedWriteHalf) = ($answer, $to);
        let mut status = None;
        match answer {
            Err(error) => (status, error.code(), error.message().to_owned()),
            Ok(answer) => {
                let mut messages = answer.into_inner();
                loop {
                    match messages.next().await {
                        None => break (status, Code::Ok, String::new()),
                        Some(Err(error)) => break (status, error.code(), error.message().to_owned()),
                        Some(Ok(message)) => {
                            let _ = to.write_all(&message.stdout).await;
                            status = message.exit_status.map(|ExitStatus { value }| value).or(status);
                        }
                    }
                }
            }
        }
    }};
}

impl Call {
    async fn serve(self, mut connection: TcpStream) -> End {
        let mut buffer = BytesMut::new();
        let request = loop {
            if let Some(Packet::Data(request)) = pktline::decode(&mut buffer).unwrap() {
                break String::from_utf8(request.to_vec()).unwrap();
            }
            connection.read_buf(&mut buffer).await.unwrap();
        };
        // Who wants an archive says so at once; others wait for the server.
        let more = buffer.freeze();
        let (service, rest) = request.split_once(" /").unwrap();
        let path = rest.split('\0').next().unwrap().to_owned();
        let git_protocol = rest.split('\0').find(|part| part.starts_with("version=")).unwrap_or_default();
        let repository = Some(Repository {
            storage_name: self.storage.clone(),
            relative_path: path,
            gl_repository: "project-1".to_owned(),
            ..Repository::default()
        });
        let (from, to) = connection.into_split();
        let mut client = self.client.clone();
        match service {
            "git-receive-pack" => {
                let first = SshReceivePackRequest {
                    repository,
                    gl_id: "user-1".to_owned(),
                    gl_username: "someone".to_owned(),
                    git_protocol: git_protocol.to_owned(),
                    ..Default::default()
                };
                let said =
                    said(first, (more, from), |stdin| SshReceivePackRequest { stdin, ..Default::default() });
                relay!(client.ssh_receive_pack(said).await, to)
            }
            "git-upload-archive" => {
                let first = SshUploadArchiveRequest { repository, ..Default::default() };
                let said = said(first, (more, from), |stdin| SshUploadArchiveRequest {
                    stdin,
                    ..Default::default()
                });
                relay!(client.ssh_upload_archive(said).await, to)
            }
            "git-upload-pack" => match self.fetches.clone() {
                Fetches::Messages => {
                    let git_protocol = git_protocol.to_owned();
                    let first = SshUploadPackRequest { repository, git_protocol, ..Default::default() };
                    let said = said(first, (more, from), |stdin| SshUploadPackRequest {
                        stdin,
                        ..Default::default()
                    });
                    relay!(client.ssh_upload_pack(said).await, to)
                }
                Fetches::Sidechannel(sidechannels) => {
                    let git_protocol = git_protocol.to_owned();
                    let message = SshUploadPackWithSidechannelRequest {
                        repository,
                        git_protocol,
                        ..Default::default()
                    };
                    beside(client, &sidechannels, message, from, to).await
                }
            },
            other => panic!("{other}"),
        }
    }
}

async fn beside(
    mut client: SshServiceClient<Client>,
    sidechannels: &Sidechannels,
    message: SshUploadPackWithSidechannelRequest,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
) -> End {
    let mut offer = sidechannels.offer().unwrap();
    let mut request = Request::new(message);
    request.metadata_mut().as_mut().insert(METADATA, offer.id().header());
    let call = spawn(async move { client.ssh_upload_pack_with_sidechannel(request).await });
    let side = Arc::new(Sidechannel::new(offer.opened().await.accept().await.unwrap()));
    let speaking = Arc::clone(&side);
    let speaker = spawn(async move {
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        while from.read_buf(&mut buffer).await.unwrap_or(0) > 0 {
            if speaking.write(buffer.split()).await.is_err() {
                return;
            }
            buffer.reserve(64 * 1024);
        }
        let _ = speaking.finish().await;
    });
    let mut heard = BytesMut::new();
    while let Some(piece) = side.read().await.unwrap() {
        heard.extend_from_slice(&piece);
        while let Some(packet) = pktline::decode(&mut heard).unwrap() {
            let Packet::Data(packet) = packet else { panic!("{packet:?}") };
            match packet[0] {
                1 => drop(to.write_all(&packet[1..]).await),
                2 => {}
                band => panic!("band {band}"),
            }
        }
    }
    assert!(heard.is_empty(), "the last packet is whole");
    let end = call.await.unwrap();
    speaker.abort();
    match end {
        Ok(_) => (None, Code::Ok, String::new()),
        Err(error) => (None, error.code(), error.message().to_owned()),
    }
}
