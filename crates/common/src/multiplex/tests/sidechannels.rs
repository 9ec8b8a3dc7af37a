//! Sidechannels between both ends, and peers that do not keep to the ways of them.

use std::{sync::Mutex, time::Duration};

use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::multiplex::sidechannel::{
    self, Client, METADATA, OPEN_TIMEOUT, OpenError, Server, SidechannelId, Sidechannels,
};

/// A node that opens what it is offered. `/fetch` says back what it hears, in capitals; `/flood` says so many bytes.
async fn start() -> Node {
    let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await.unwrap();
    let (address, tasks, stop) = (listener.address().unwrap(), Tasks::new(), CancellationToken::new());
    let (told, outcomes) = tokio::sync::mpsc::unbounded_channel();
    let open = async |headers: &HeaderMap, back: Option<Extension<Backchannel>>| {
        let id = SidechannelId::offered(headers)?;
        sidechannel::open(back.as_deref(), id).await.map(Server::new)
    };
    let fetch = async move |back: Option<Extension<Backchannel>>, headers: HeaderMap| {
        let side = match open(&headers, back).await {
            Ok(side) => side,
            Err(error) => return (StatusCode::BAD_GATEWAY, error.to_string()),
        };
        loop {
            match side.read().await {
                Ok(Some(piece)) => side.write(piece.to_ascii_uppercase().into()).await.unwrap(),
                Ok(None) => break,
                Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()),
            }
        }
        side.finish();
        (StatusCode::OK, "done".to_owned())
    };
    let flood = async move |back: Option<Extension<Backchannel>>, headers: HeaderMap, bytes: String| {
        let side = open(&headers, back).await.unwrap();
        let (mut left, piece) = (bytes.parse::<usize>().unwrap(), Bytes::from(vec![7; 64 * 1024]));
        while left > 0 {
            let part = piece.slice(..left.min(piece.len()));
            left -= part.len();
            if let Err(error) = side.write(part).await {
                let _ = told.send(Err(error.to_string()));
                return "gone";
            }
        }
        side.finish();
        "done"
    };
    let services = Router::new()
        .route("/fetch", post(fetch))
        .route("/flood", post(flood))
        .route("/echo", post(async |body: Body| body));
    let server = grpc::server().layer(MapRequestLayer::new(introduce)).add_routes(Routes::from(services));
    let incoming = Incoming::new(listener, tasks.clone());
    tasks.spawn("grpc", server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned()));
    Node { address, tasks, stop, asked: Arc::default(), told: outcomes }
}

async fn dialled(node: &Node) -> (Sender, Sidechannels) {
    let sidechannels = Sidechannels::default();
    let stream = dial(&node.address, sidechannels.clone(), &node.tasks).await.unwrap();
    (http2(stream).await, sidechannels)
}

fn offering(path: &str, id: SidechannelId, body: impl Into<Body>) -> Request<Body> {
    let mut request = request(path, body);
    request.headers_mut().append(METADATA, "99".parse().unwrap());
    // Who comes last counts.
    request.headers_mut().append(METADATA, id.header());
    request
}

async fn whole(answer: Response<Answer>) -> (StatusCode, String) {
    (answer.status(), text(Body::new(answer.into_body())).await.unwrap())
}

async fn heard(client: &Client) -> Vec<u8> {
    let mut heard = Vec::new();
    while let Some(piece) = client.read().await.unwrap() {
        heard.extend_from_slice(&piece);
    }
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn both_talk_and_each_says_when_it_has_finished() {
    let node = start().await;
    let (mut sender, sidechannels) = dialled(&node).await;
    for round in 0..3 {
        let mut offer = sidechannels.offer().unwrap();
        let answer = tokio::spawn(sender.send_request(offering("/fetch", offer.id(), "")));
        let client = Client::new(offer.opened().await.accept().await.unwrap());
        client.write(&b"hello"[..]).await.unwrap();
        // More than a packet holds, and than the windows take while nobody reads.
        let much = vec![b'x'; 150_000];
        client.write(&much[..]).await.unwrap();
        client.finish().await.unwrap();
        let expected = [&b"HELLO"[..], &much.to_ascii_uppercase()].concat();
        assert!(heard(&client).await == expected, "round {round}");
        assert_eq!(whole(answer.await.unwrap().unwrap()).await, (StatusCode::OK, "done".to_owned()));
    }
    drop(sender);
    node.stop.cancel();
    node.tasks.drain(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_was_cut_off_is_no_end() {
    let node = start().await;
    let (mut sender, sidechannels) = dialled(&node).await;
    for (says, expected) in [
        (&b"0009Hello"[..], "unexpected EOF"),
        (b"0009Hel", "unexpected EOF"),
        (b"0003", "sidechannel: invalid pktline header"),
        (b"PACK\0\0\0\x02", "sidechannel: invalid pktline header"),
    ] {
        let mut offer = sidechannels.offer().unwrap();
        let answer = tokio::spawn(sender.send_request(offering("/fetch", offer.id(), "")));
        let mut stream = offer.opened().await.accept().await.unwrap();
        stream.write_all(says).await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(
            whole(answer.await.unwrap().unwrap()).await,
            (StatusCode::BAD_REQUEST, expected.to_owned())
        );
    }
    assert_eq!(said(&mut sender, "/echo", "still there").await.1, "still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_offered_or_is_offered_no_more_is_refused_at_once() {
    let node = start().await;
    let (mut sender, sidechannels) = dialled(&node).await;
    let refused = (StatusCode::BAD_GATEWAY, "sidechannel: receive confirmation: EOF".to_owned());
    let id = sidechannels.offer().unwrap().id();
    let since = std::time::Instant::now();
    let answer = sender.send_request(offering("/fetch", id, "")).await.unwrap();
    assert_eq!(whole(answer).await, refused);
    assert!(since.elapsed() < OPEN_TIMEOUT);
    // Offered by somebody else.
    let (_other, others) = dialled(&node).await;
    let offer = others.offer().unwrap();
    let answer = sender.send_request(offering("/fetch", offer.id(), "")).await.unwrap();
    assert_eq!(whole(answer).await, refused);
    // No name at all, and no way back.
    let (_, text) = said(&mut sender, "/fetch", "").await;
    assert_eq!(text, OpenError::NotOffered.to_string());
    let answer = plain(&node.address).await.send_request(offering("/fetch", id, "")).await.unwrap();
    assert_eq!(whole(answer).await.1, OpenError::NotMultiplexed.to_string());
    assert_eq!(said(&mut sender, "/echo", "still there").await.1, "still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_midst_of_it_is_noticed() {
    let mut node = start().await;
    let (mut sender, sidechannels) = dialled(&node).await;
    let mut offer = sidechannels.offer().unwrap();
    let flood = offering("/flood", offer.id(), (1024 * MIB).to_string());
    let answer = tokio::spawn(sender.send_request(flood));
    let stream = offer.opened().await.accept().await.unwrap();
    stream.read_piece().await.unwrap().unwrap();
    drop(stream);
    assert_eq!(node.told.recv().await.unwrap(), Err("the stream was reset".to_owned()));
    assert_eq!(whole(answer.await.unwrap().unwrap()).await.1, "gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_up_itself_alone() {
    let node = start().await;
    let (mut sender, sidechannels) = dialled(&node).await;
    let mut offer = sidechannels.offer().unwrap();
    let flood = offering("/flood", offer.id(), (64 * MIB).to_string());
    let answer = tokio::spawn(sender.send_request(flood));
    let client = Client::new(offer.opened().await.accept().await.unwrap());
    assert_eq!(said(&mut sender, "/echo", "meanwhile").await.1, "meanwhile");
    let mut beside = sidechannels.offer().unwrap();
    let small = offering("/flood", beside.id(), MIB.to_string());
    let small = tokio::spawn(sender.send_request(small));
    let other = Client::new(beside.opened().await.accept().await.unwrap());
    assert_eq!(heard(&other).await.len(), MIB);
    assert_eq!(whole(small.await.unwrap().unwrap()).await.1, "done");
    assert_eq!(heard(&client).await.len(), 64 * MIB);
    assert_eq!(whole(answer.await.unwrap().unwrap()).await.1, "done");
}

/// A client on somebody else's yamux, which has its first stream for requests.
async fn foreign(node: &Node) -> (Sender, Arc<Mutex<Vec<yamux::Stream>>>) {
    use tokio_util::compat::{FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
    let mut connection = node.address.connect().await.unwrap();
    connection.write_all(crate::multiplex::BACKCHANNEL).await.unwrap();
    let mut yamux =
        yamux::Connection::new(connection.compat(), yamux::Config::default(), yamux::Mode::Client);
    let rpcs = std::future::poll_fn(|cx| yamux.poll_new_outbound(cx)).await.unwrap();
    let opened = Arc::<Mutex<Vec<_>>>::default();
    let keep = Arc::clone(&opened);
    tokio::spawn(async move {
        while let Some(Ok(stream)) = std::future::poll_fn(|cx| yamux.poll_next_inbound(cx)).await {
            keep.lock().unwrap().push(stream);
        }
    });
    (http2(rpcs.compat()).await, opened)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_opens_the_stream_and_says_nothing_is_given_up() {
    let node = start().await;
    let (mut sender, opened) = foreign(&node).await;
    let id = Sidechannels::default().offer().unwrap().id();
    let since = std::time::Instant::now();
    // Nobody there acknowledges a stream before something is said on it.
    let answers = (0..20).map(|_| sender.send_request(offering("/fetch", id, "")));
    for answer in futures::future::join_all(answers.collect::<Vec<_>>()).await {
        assert_eq!(whole(answer.unwrap()).await.1, OpenError::Silent.to_string());
    }
    assert!(since.elapsed() < 2 * OPEN_TIMEOUT, "all at once: {:?}", since.elapsed());
    assert_eq!(opened.lock().unwrap().len(), 20);
    assert_eq!(said(&mut sender, "/echo", "still there").await.1, "still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_says_something_else_than_ok_is_told_so() {
    let node = start().await;
    let (mut sender, opened) = foreign(&node).await;
    let id = Sidechannels::default().offer().unwrap().id();
    let answer = tokio::spawn(sender.send_request(offering("/fetch", id, "")));
    let stream = loop {
        if let Some(stream) = opened.lock().unwrap().pop() {
            break stream;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let mut stream = tokio_util::compat::FuturesAsyncReadCompatExt::compat(stream);
    let mut hello = [0; 19];
    stream.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"sidechannel\0\0\0\0\0\0\0\0");
    stream.write_all(b"no").await.unwrap();
    stream.flush().await.unwrap();
    let expected = "sidechannel: expected ok, got \"no\"".to_owned();
    assert_eq!(whole(answer.await.unwrap().unwrap()).await, (StatusCode::BAD_GATEWAY, expected));
}
