//! `tabularium-node fetch-proxy`: what git runs in the place of `ssh` to fetch from another node.
//!
//! Git talks to it over its standard input and output; it carries both over a sidechannel of the source's
//! `SSHUploadPackWithSidechannel`, which real Gitaly nodes have too, and routers. A node of ours that does not know that yet
//! is asked for its `UploadPackService`. Where the source is, the token and which repository come through environment
//! variables, so that the process list shows none of it.

mod bands;
pub(crate) mod pipes;

use std::{env, ffi::OsString};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::BytesMut;
use prost::Message as _;
use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    grpc::{self, Address},
    lifecycle::Tasks,
    multiplex::{
        self,
        sidechannel::{Client, METADATA, Sidechannels},
    },
    telemetry::CORRELATION_ID,
    tls::{self, TlsConfig},
};
use tabularium_proto::{
    gitaly::{self, SshUploadPackWithSidechannelRequest, ssh_service_client::SshServiceClient},
    node::{
        UploadPackRequest, upload_pack_response::Output, upload_pack_service_client::UploadPackServiceClient,
    },
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

use bands::{Bands, NotBanded};

/// Address of the source node.
pub(crate) const ADDRESS: &str = "TABULARIUM_FETCH_ADDRESS";
/// Secret for calls to the source node; absent or empty when it asks for none.
pub(crate) const TOKEN: &str = "TABULARIUM_FETCH_TOKEN";
/// The `gitaly.Repository` to fetch from, base64 of its protobuf encoding.
pub(crate) const REPOSITORY: &str = "TABULARIUM_FETCH_REPOSITORY";
/// `all` to see the refs that are normally hidden too.
pub(crate) const REFS: &str = "TABULARIUM_FETCH_REFS";
/// Correlation id of the call that caused the fetch.
pub(crate) const CORRELATION: &str = "TABULARIUM_FETCH_CORRELATION_ID";
/// `messages` to go through messages in any case.
const TRANSPORT: &str = "TABULARIUM_FETCH_TRANSPORT";

/// Pieces of standard input; the pipe rarely holds more.
const INPUT_BYTES: usize = 64 * 1024;
/// Pieces read ahead of the connection.
const INPUT_QUEUE: usize = 4;
/// What git expects of a transport that failed.
const FAILED: u8 = 128;

/// What git passes to `ssh`: a host and a command. Both are fixed by whoever set up the fetch and not looked at.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    ignored: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum ProxyError {
    #[error("{0} is not set")]
    Missing(&'static str),
    #[error("{0} cannot be read")]
    Malformed(&'static str),
    #[error("{}: {}", .0.code(), .0.message())]
    Source(#[from] tonic::Status),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("standard input: {0}")]
    Input(String),
    #[error("too many sidechannels")]
    NoOffer,
    #[error("the source ended without opening a sidechannel")]
    NotOpened,
    #[error(transparent)]
    NotBanded(#[from] NotBanded),
}

/// Carries one fetch and answers the exit code, with which the process must end at once. What goes wrong is said on
/// standard error, which git shows to whoever asked for the fetch.
#[expect(clippy::print_stderr, reason = "the protocol of a transport helper")]
pub async fn run(_arguments: &Arguments) -> u8 {
    match carry().await {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("fetch-proxy: {error}");
            FAILED
        }
    }
}

fn variable(name: &'static str) -> Result<String, ProxyError> {
    env::var(name).map_err(|_| ProxyError::Missing(name))
}

/// What is fetched, and how.
struct Source {
    address: Address,
    token: SendToken,
    repository: gitaly::Repository,
    git_config_options: Vec<String>,
    correlation: Option<String>,
}

impl Source {
    fn of_environment() -> Result<Self, ProxyError> {
        let address = variable(ADDRESS)?.parse().map_err(|_| ProxyError::Malformed(ADDRESS))?;
        let token = variable(TOKEN).ok().filter(|token| !token.is_empty()).map(SecretString::from);
        let encoded =
            STANDARD.decode(variable(REPOSITORY)?).map_err(|_| ProxyError::Malformed(REPOSITORY))?;
        let repository =
            gitaly::Repository::decode(encoded.as_slice()).map_err(|_| ProxyError::Malformed(REPOSITORY))?;
        let mut git_config_options = vec!["uploadpack.allowAnySHA1InWant=true".to_owned()];
        if variable(REFS).is_ok_and(|refs| refs == "all") {
            git_config_options.push("transfer.hideRefs=!refs".to_owned());
        }
        let correlation = variable(CORRELATION).ok();
        Ok(Self { address, token: SendToken(token), repository, git_config_options, correlation })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(id) = self.correlation.as_ref().and_then(|id| id.parse().ok()) {
            request.metadata_mut().insert(CORRELATION_ID, id);
        }
        request
    }
}

async fn carry() -> Result<(), ProxyError> {
    let source = Source::of_environment()?;
    tls::install(&TlsConfig::of_environment());
    if !variable(TRANSPORT).is_ok_and(|transport| transport == "messages") {
        match beside(&source).await {
            // Nothing has been read from git so far.
            Err(ProxyError::Source(status)) if status.code() == Code::Unimplemented => {}
            carried => return carried,
        }
    }
    through_messages(source).await
}

/// Over a sidechannel. What is asked comes from git only once that is open.
async fn beside(source: &Source) -> Result<(), ProxyError> {
    let (tasks, sidechannels) = (Tasks::new(), Sidechannels::default());
    let channel = multiplex::channel(&source.address, sidechannels.clone(), &tasks);
    let mut offer = sidechannels.offer().ok_or(ProxyError::NoOffer)?;
    let mut request = source.request(SshUploadPackWithSidechannelRequest {
        repository: Some(source.repository.clone()),
        git_protocol: "version=2".to_owned(),
        git_config_options: source.git_config_options.clone(),
    });
    request.metadata_mut().as_mut().insert(METADATA, offer.id().header());
    let mut client = SshServiceClient::with_interceptor(channel, source.token.clone());
    let call = client.ssh_upload_pack_with_sidechannel(request);
    tokio::pin!(call);
    let opened = tokio::select! {
        biased;
        opened = offer.opened() => opened,
        answer = &mut call => {
            answer?;
            return Err(ProxyError::NotOpened);
        }
    };
    let side = Client::new(opened.accept().await?);
    let said = converse(&side).await;
    drop(side);
    // The source knows better than its stream what went wrong.
    call.await?;
    said
}

/// Moves bytes between git and the source until that has said all; git may keep its side open.
async fn converse(side: &Client) -> Result<(), ProxyError> {
    let input = async {
        let (mut stdin, mut buffer) = (pipes::stdin(), BytesMut::new());
        loop {
            buffer.reserve(INPUT_BYTES);
            if stdin.read_buf(&mut buffer).await? == 0 {
                return side.finish().await;
            }
            side.write(buffer.split()).await?;
        }
    };
    let output = async {
        let (mut stdout, mut stderr) = (pipes::stdout(), tokio::io::stderr());
        let mut bands = Bands::default();
        while let Some(mut piece) = side.read().await? {
            while let Some((band, piece)) = bands.next(&mut piece)? {
                match band {
                    bands::STDOUT => stdout.write_all(&piece).await?,
                    _ => stderr.write_all(&piece).await?,
                }
            }
            stdout.flush().await?;
        }
        stderr.flush().await?;
        Ok::<(), ProxyError>(())
    };
    tokio::pin!(input, output);
    tokio::select! {
        result = &mut output => result,
        result = &mut input => {
            // A source that wants no more says why, or how it ended.
            if let Err(error) = result {
                tracing::debug!(%error, "nothing more goes to the source");
            }
            output.await
        }
    }
}

/// As messages of the RPC itself.
async fn through_messages(source: Source) -> Result<(), ProxyError> {
    let first = UploadPackRequest {
        repository: Some(source.repository.clone()),
        git_protocol: "version=2".to_owned(),
        git_config_options: source.git_config_options.clone(),
        ..UploadPackRequest::default()
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(INPUT_QUEUE);
    let requests = tokio_stream::once(first).chain(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let channel = grpc::channel(&source.address);
    let mut client = UploadPackServiceClient::with_interceptor(channel, source.token.clone());
    let request = source.request(requests);

    let input = async move {
        let (mut stdin, mut buffer) = (pipes::stdin(), BytesMut::new());
        loop {
            buffer.reserve(INPUT_BYTES);
            let length = stdin.read_buf(&mut buffer).await?;
            if length == 0 {
                // Ends the request stream; what git still has to say comes through the other one.
                drop(sender);
                return Ok(());
            }
            let data = buffer.split().freeze();
            if sender.send(UploadPackRequest { data, ..UploadPackRequest::default() }).await.is_err() {
                return Ok(());
            }
        }
    };
    let output = async move {
        let mut responses = client.upload_pack(request).await?.into_inner();
        let (mut stdout, mut stderr) = (pipes::stdout(), tokio::io::stderr());
        while let Some(response) = responses.message().await? {
            match response.output {
                Some(Output::Stdout(data)) => {
                    stdout.write_all(&data).await?;
                    stdout.flush().await?;
                }
                Some(Output::Stderr(data)) => stderr.write_all(&data).await?,
                None => {}
            }
        }
        stdout.flush().await?;
        stderr.flush().await?;
        Ok::<(), ProxyError>(())
    };
    tokio::pin!(input, output);
    // The source's end is the end: git may keep its side open.
    tokio::select! {
        result = &mut output => result,
        result = &mut input => {
            result.map_err(|error: std::io::Error| ProxyError::Input(error.to_string()))?;
            output.await
        }
    }
}
