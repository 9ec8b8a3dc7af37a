use bytes::Bytes;
use prost::Message as _;
use tabularium_proto::gitaly::{
    FindRemoteRepositoryRequest, RefExistsRequest, RefExistsResponse, ref_service_client::RefServiceClient,
};
use tonic::{Code, Request, Status};

use crate::house::{House, exists, named, until};

fn said<T>(result: Result<T, Status>) -> (Code, String) {
    let status = result.err().expect("a refusal");
    (status.code(), status.message().to_owned())
}

fn refused(code: Code, text: &str) -> (Code, String) {
    (code, text.to_owned())
}

#[tokio::test]
async fn every_target_that_cannot_be_found_has_gitalys_error() {
    let house = House::new().await;
    for (storage, path, expected) in [
        ("", "", refused(Code::InvalidArgument, "repository not set")),
        ("", "a.git", refused(Code::InvalidArgument, "storage name not set")),
        ("default", "", refused(Code::InvalidArgument, "repository path not set")),
        ("nowhere", "a.git", refused(Code::InvalidArgument, "storage name not found")),
        ("default", "../a.git", refused(Code::InvalidArgument, "relative path escapes root directory")),
        ("default", "none.git", refused(Code::NotFound, "repository not found")),
    ] {
        let request = RefExistsRequest { repository: named(storage, path), ..Default::default() };
        assert_eq!(said(house.ref_exists(Request::new(request)).await), expected, "{storage}:{path}");
    }
    let missing = house.ref_exists(Request::new(RefExistsRequest::default())).await;
    assert_eq!(said(missing), refused(Code::InvalidArgument, "repository not set"));
    for (name, text) in
        [("", "storage scoped: target storage is invalid"), ("nowhere", "virtual storage does not exist")]
    {
        let request =
            FindRemoteRepositoryRequest { storage_name: name.into(), ..Default::default() }.encode_to_vec();
        let answer = house.raw("/gitaly.RemoteService/FindRemoteRepository", &request).await;
        assert_eq!(said(answer), refused(Code::InvalidArgument, text));
    }
}

#[tokio::test]
async fn methods_that_are_not_relayed_are_told_apart() {
    let house = House::new().await;
    for path in [
        "/gitaly.RefService/Nonsense",
        "/gitaly.Nonsense/X",
        "/other.Service/X",
        "/grpc.health.v1.Health/Nonsense",
    ] {
        let expected = refused(Code::Internal, &format!("full method name not found: {path}"));
        assert_eq!(said(house.raw(path, b"").await), expected);
    }
    let path = "/gitaly.RaftService/GetClusterInfo";
    let expected = refused(Code::Unimplemented, &format!("{path} is not supported by this router"));
    assert_eq!(said(house.raw(path, b"").await), expected);
}

#[tokio::test]
async fn a_malformed_first_message_is_an_invalid_argument() {
    let house = House::new().await;
    for message in
        [&b"\x0a\x05\x01"[..], b"\x00", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0a\x00\x0a\x00"]
    {
        let (code, text) = said(house.raw("/gitaly.RefService/RefExists", message).await);
        assert_eq!(code, Code::InvalidArgument, "{text}");
        assert!(text.starts_with("malformed request message"), "{text}");
    }
    let large = vec![0; 4 * 1024 * 1024 + 1];
    let (code, text) = said(house.raw("/gitaly.RefService/RefExists", &large).await);
    assert_eq!(
        (code, &text[..]),
        (Code::ResourceExhausted, "grpc: received message larger than max (4194305 vs. 4194304)")
    );
    let none =
        House::raw_stream(house.channel.clone(), "/gitaly.RefService/RefExists", futures::stream::empty())
            .await;
    assert_eq!(said(none).0, Code::InvalidArgument);
    assert!(house.nodes.iter().all(|node| node.seen("RefExists").is_empty()));
}

#[tokio::test]
async fn a_compressed_request_is_refused_by_name() {
    let house = House::new().await;
    let body = http_body_util::Full::new(Bytes::from_static(b"\x01\0\0\0\x01x"));
    let mut request = http::Request::new(tonic::body::Body::new(body));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = "http://x/gitaly.RefService/RefExists".parse().unwrap();
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let mut channel = house.channel.clone();
    std::future::poll_fn(|cx| tower::Service::poll_ready(&mut channel, cx)).await.unwrap();
    let answer = tower::Service::call(&mut channel, request).await.unwrap();
    assert_eq!(answer.headers().get("grpc-status").unwrap(), "12");
}

#[tokio::test]
async fn oversized_metadata_is_refused_and_the_connection_lives() {
    let house = House::new().await;
    let mut request = Request::new(exists());
    request.metadata_mut().insert("x-large", "x".repeat(100_000).parse().unwrap());
    let (_, text) = said(house.ref_exists(request).await);
    assert!(text.contains("431"), "{text}");
    let mut fits = Request::new(exists());
    fits.metadata_mut().insert("x-large", "x".repeat(40_000).parse().unwrap());
    house.ref_exists(fits).await.unwrap();
    assert!(house.metrics("/metrics").await.contains("tabularium_router_connections 1"));
}

#[tokio::test]
async fn every_service_wants_the_token_and_nodes_get_their_own() {
    use tabularium_common::auth::{RequireToken, SendToken};
    let directory = tempfile::tempdir().unwrap();
    let (token, node_token) = (directory.path().join("token"), directory.path().join("node"));
    std::fs::write(&token, "client secret").unwrap();
    std::fs::write(&node_token, "node secret").unwrap();
    let config = format!("token_file = {token:?}\nnode_token_file = {node_token:?}\n");
    let house = House::with(&config, |_| {}).await;
    let unsigned = refused(Code::Unauthenticated, "authentication required");
    assert_eq!(said(house.ref_exists(Request::new(exists())).await), unsigned);
    for path in
        ["/grpc.health.v1.Health/Check", "/gitaly.ServerService/ServerInfo", "/gitaly.X/Y", "/other/X"]
    {
        assert_eq!(said(house.raw(path, b"").await), unsigned, "{path}");
    }

    let send = |secret: &str| SendToken(Some(secret.to_owned().into()));
    let mut wrong = RefServiceClient::with_interceptor(house.channel.clone(), send("node secret"));
    assert_eq!(said(wrong.ref_exists(exists()).await).0, Code::PermissionDenied);
    let mut right = RefServiceClient::with_interceptor(house.channel.clone(), send("client secret"));
    let answer: RefExistsResponse = right.ref_exists(exists()).await.unwrap().into_inner();
    assert!(answer.value);
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("RefExists")).collect();
    RequireToken::new(Some("node secret".to_owned().into())).check(&seen[0].headers).unwrap();
    assert_eq!(seen[0].headers.get_all("authorization").iter().count(), 1);
}

#[tokio::test]
async fn what_is_no_grpc_is_refused() {
    let house = House::new().await;
    let mut request = http::Request::new(tonic::body::Body::empty());
    *request.uri_mut() = "http://x/".parse().unwrap();
    let mut channel = house.channel.clone();
    std::future::poll_fn(|cx| tower::Service::poll_ready(&mut channel, cx)).await.unwrap();
    let answer = tower::Service::call(&mut channel, request).await.unwrap();
    assert_eq!(answer.status(), 415);
}

#[tokio::test]
async fn without_any_node_the_error_is_praefects() {
    let house = House::new().await;
    for node in &house.nodes {
        node.kill();
    }
    until("all nodes are known to be dead", async || {
        said(house.ref_exists(Request::new(exists())).await) == refused(Code::Internal, "no healthy nodes")
    })
    .await;
}
