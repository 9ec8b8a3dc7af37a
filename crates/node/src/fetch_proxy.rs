//! `tabularium-node fetch-proxy`: what git runs in the place of `ssh` to fetch from another node.
//!
//! Git talks to it over its standard input and output; it carries both over the source's `UploadPackService`. Where
//! the source is, the token and which repository come through environment variables, so that the process list shows
//! none of it.

use std::{env, ffi::OsString};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::BytesMut;
use prost::Message as _;
use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    grpc::{self, Address},
    telemetry::CORRELATION_ID,
};
use tabularium_proto::{
    gitaly,
    node::{
        UploadPackRequest, upload_pack_response::Output, upload_pack_service_client::UploadPackServiceClient,
    },
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_stream::StreamExt as _;
use tonic::Request;

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

fn first_request() -> Result<UploadPackRequest, ProxyError> {
    let encoded = STANDARD.decode(variable(REPOSITORY)?).map_err(|_| ProxyError::Malformed(REPOSITORY))?;
    let repository =
        gitaly::Repository::decode(encoded.as_slice()).map_err(|_| ProxyError::Malformed(REPOSITORY))?;
    let mut git_config_options = vec!["uploadpack.allowAnySHA1InWant=true".to_owned()];
    if variable(REFS).is_ok_and(|refs| refs == "all") {
        git_config_options.push("transfer.hideRefs=!refs".to_owned());
    }
    Ok(UploadPackRequest {
        repository: Some(repository),
        git_protocol: "version=2".to_owned(),
        git_config_options,
        ..UploadPackRequest::default()
    })
}

async fn carry() -> Result<(), ProxyError> {
    let address: Address = variable(ADDRESS)?.parse().map_err(|_| ProxyError::Malformed(ADDRESS))?;
    let token = variable(TOKEN).ok().filter(|token| !token.is_empty()).map(SecretString::from);
    let first = first_request()?;
    let (sender, receiver) = tokio::sync::mpsc::channel(INPUT_QUEUE);
    let requests = tokio_stream::once(first).chain(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let mut client = UploadPackServiceClient::with_interceptor(grpc::channel(&address), SendToken(token));
    let mut request = Request::new(requests);
    if let Some(id) = variable(CORRELATION).ok().and_then(|id| id.parse().ok()) {
        request.metadata_mut().insert(CORRELATION_ID, id);
    }

    let input = async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = BytesMut::new();
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
        let mut stdout = tokio::io::stdout();
        let mut stderr = tokio::io::stderr();
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
