//! Requests that no well-made client sends: bytes for messages, over gRPC and HTTP/1.1.

use bytes::{Buf as _, BufMut as _, Bytes};
use futures::Stream;
use tabularium_testkit::cluster::Signed;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::support::{SOON, within};

/// One field of a message.
pub(crate) fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).ok().filter(|length| *length < 0x80).expect("a short field");
    [&[number << 3 | 2, length], content].concat()
}

/// A `gitaly.Repository`.
pub(crate) fn repository(storage: &str, relative_path: &str) -> Vec<u8> {
    [field(2, storage.as_bytes()), field(3, relative_path.as_bytes())].concat()
}

/// Sends one message; answers what the server says in the end.
pub(crate) async fn unary(
    through: &Signed,
    path: &str,
    message: &[u8],
    correlation_id: &str,
) -> (Code, String) {
    let one = futures::stream::iter([Bytes::copy_from_slice(message)]);
    let answers = stream(through, path, one, correlation_id).await;
    let drain = async {
        let mut answers = answers?;
        while answers.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    match within(path, SOON, drain).await {
        Ok(()) => (Code::Ok, String::new()),
        Err(status) => (status.code(), status.message().to_owned()),
    }
}

/// Opens a stream of messages.
pub(crate) async fn stream(
    through: &Signed,
    path: &str,
    messages: impl Stream<Item = Bytes> + Send + 'static,
    correlation_id: &str,
) -> Result<Streaming<Bytes>, Status> {
    let mut grpc = Grpc::new(through.clone());
    let open = async {
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut request = Request::new(messages);
        request.metadata_mut().insert("x-gitlab-correlation-id", correlation_id.parse().unwrap());
        grpc.streaming(request, path.parse().unwrap(), Raw).await
    };
    within(path, SOON, open).await.map(tonic::Response::into_inner)
}

/// Messages as bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Status and body of one HTTP/1.1 request to `base`, a URL without a path.
pub(crate) async fn http(base: &str, head: &str, headers: &str, body: &[u8]) -> (u16, String) {
    let host = base.strip_prefix("http://").unwrap();
    let exchange = async {
        let mut socket = TcpStream::connect(host).await.unwrap();
        let length = body.len();
        let head = format!(
            "{head} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        // The server may have said no before all is written.
        let _refused = socket.write_all(&[head.as_bytes(), body].concat()).await;
        let mut answer = Vec::new();
        let _reset = socket.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let answer = within(head, SOON, exchange).await;
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status.unwrap_or_else(|| panic!("{head}: no HTTP answer: {answer:?}")), body)
}
