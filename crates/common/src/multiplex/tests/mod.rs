//! Both ends against each other, over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests: what they start ends with their runtime"
)]

mod deaths;
mod process;
mod sidechannels;
mod traffic;

use std::{convert::Infallible, sync::Arc};

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    routing::post,
};
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use hyper::{body::Incoming as Answer, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::{Service as _, ServiceExt as _, util::MapRequestLayer};

use super::{Backchannel, Incoming, Stream, VOTE_PING_INTERVAL, VOTE_PING_TIMEOUT, dial, introduce};
use crate::{
    grpc::{
        self, Address, CONNECTION_WINDOW_BYTES, ListenAddress, Listener, MAX_FRAME_BYTES, STREAM_WINDOW_BYTES,
    },
    lifecycle::Tasks,
};

const MIB: usize = 1024 * 1024;

/// One request of the router's end.
type Sender = SendRequest<Body>;

/// The end that accepts.
struct Node {
    address: Address,
    tasks: Tasks,
    stop: CancellationToken,
    /// A handler that waits for the router's word has asked for it.
    asked: Arc<Notify>,
    /// How such a wait ended.
    told: tokio::sync::mpsc::UnboundedReceiver<Result<String, String>>,
}

async fn start_node() -> Node {
    let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await.unwrap();
    let (address, tasks, stop) = (listener.address().unwrap(), Tasks::new(), CancellationToken::new());
    let (asked, (told, outcomes)) = (Arc::<Notify>::default(), tokio::sync::mpsc::unbounded_channel());
    let vote = {
        let asked = Arc::clone(&asked);
        async move |back: Option<Extension<Backchannel>>, question: String| {
            let Some(Extension(back)) = back else { return (StatusCode::FORBIDDEN, String::new()) };
            asked.notify_one();
            // As a node's git child would: it goes on when the RPC is gone.
            let vote = tokio::spawn(async move {
                let outcome = ask(&back, &question).await;
                let _ = told.send(outcome.clone());
                outcome
            });
            match vote.await.unwrap() {
                Ok(answer) => (StatusCode::OK, answer),
                Err(error) => (StatusCode::BAD_GATEWAY, error),
            }
        }
    };
    let services = Router::new()
        .route("/echo", post(async |body: Body| body))
        .route("/count", post(async |body: Body| count(body).await.to_string()))
        .route("/plenty", post(async |bytes: String| plenty(bytes.parse().unwrap())))
        .route("/vote", post(vote))
        .route("/id", post(async |Extension(back): Extension<Backchannel>| back.id().to_string()));
    let server = grpc::server().layer(MapRequestLayer::new(introduce)).add_routes(Routes::from(services));
    let incoming = Incoming::new(listener, tasks.clone());
    tasks.spawn("grpc", server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
    Node { address, tasks, stop, asked, told: outcomes }
}

/// What the router's end serves: `/never` does not answer, and `/late` not while silence would be borne.
fn answers() -> Routes {
    Router::new()
        .route("/commit", post(async |question: String| format!("{question}: commit")))
        .route("/never", post(std::future::pending::<String>))
        .route("/late", post(late))
        .into()
}

async fn late() -> &'static str {
    tokio::time::sleep(2 * (VOTE_PING_INTERVAL + VOTE_PING_TIMEOUT)).await;
    "commit"
}

/// The node's question to the router.
async fn ask(back: &Backchannel, path: &str) -> Result<String, String> {
    let mut channel = back.channel();
    let channel = channel.ready().await.map_err(|error| format!("{error:?}"))?;
    let request = request(path, "change".to_owned()).map(tonic::body::Body::new);
    let answer = channel.call(request).await.map_err(|error| format!("{error:?}"))?;
    text(Body::new(answer.into_body())).await
}

fn request(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(format!("http://multiplexed{path}")).body(body.into()).unwrap()
}

async fn text(body: Body) -> Result<String, String> {
    let bytes = axum::body::to_bytes(body, MIB).await.map_err(|error| format!("{error:?}"))?;
    Ok(String::from_utf8(bytes.to_vec()).unwrap())
}

fn plenty(bytes: usize) -> Body {
    let piece = Bytes::from(vec![7; 128 * 1024]);
    let pieces = bytes / piece.len();
    Body::from_stream(futures::stream::repeat(piece).take(pieces).map(Ok::<_, Infallible>))
}

async fn count(body: Body) -> usize {
    body.into_data_stream().fold(0, async |sum, piece| sum + piece.unwrap().len()).await
}

/// HTTP/2 over whatever it is.
async fn http2<IO>(io: IO) -> Sender
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (sender, driver) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .handshake(TokioIo::new(io))
        .await
        .unwrap();
    tokio::spawn(driver);
    sender
}

async fn multiplexed(address: &Address, tasks: &Tasks) -> Sender {
    let stream: Stream = dial(address, answers(), tasks).await.unwrap();
    http2(stream).await
}

async fn plain(address: &Address) -> Sender {
    http2(address.connect().await.unwrap()).await
}

async fn post_to(sender: &mut Sender, path: &str, body: impl Into<Body>) -> hyper::Result<Response<Answer>> {
    sender.send_request(request(path, body)).await
}

/// The whole answer as text.
async fn said(sender: &mut Sender, path: &str, body: impl Into<Body>) -> (StatusCode, String) {
    let answer = post_to(sender, path, body).await.unwrap();
    (answer.status(), text(Body::new(answer.into_body())).await.unwrap())
}
