//! BlobService.

use tabularium_proto::gitaly::{
    GetBlobRequest, GetBlobResponse, GetBlobsRequest, GetBlobsResponse, ObjectType,
    blob_service_client::BlobServiceClient, get_blobs_request::RevisionPath,
};

use crate::{
    harness::{Client, PATIENCE, TestNode, eventually},
    seed::{self, BIG, all, id, invalid, refusal},
};

fn blobs(node: &TestNode) -> BlobServiceClient<Client> {
    BlobServiceClient::new(node.channel())
}

#[tokio::test]
async fn a_blob_comes_in_chunks_up_to_the_limit() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let big = id(&node, "a.git", "main:big.bin");
    let ask = async |oid: &str, limit| {
        let request = GetBlobRequest { repository: Some(repository.clone()), oid: oid.into(), limit };
        all(blobs(&node).get_blob(request).await).await
    };
    let whole: Vec<GetBlobResponse> = ask(&big, -1).await.unwrap();
    assert_eq!((whole[0].size, &whole[0].oid), (300 * 1024, &big));
    assert!(whole[1..].iter().all(|message| message.oid.is_empty() && message.size == 0));
    assert!(whole.iter().all(|message| message.data.len() <= 128 * 1024));
    assert_eq!(whole.iter().flat_map(|message| message.data.to_vec()).collect::<Vec<u8>>(), BIG);
    let part = ask(&big, 10).await.unwrap();
    assert_eq!((part.len(), part[0].data.len(), part[0].size), (1, 10, 300 * 1024));
    let metadata = ask(&big, 0).await.unwrap();
    assert_eq!((metadata.len(), metadata[0].data.len(), &metadata[0].oid), (1, 0, &big));
    for other in [id(&node, "a.git", "main"), "12".repeat(20)] {
        assert_eq!(ask(&other, -1).await.unwrap(), [GetBlobResponse::default()]);
    }
    assert_eq!(refusal(ask("", -1).await), invalid("empty Oid"));
    assert_eq!(refusal(ask("-x", -1).await), invalid("revision can't start with '-'"));
}

#[tokio::test]
async fn blobs_by_path_with_everything_else_a_path_can_be() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let ask = async |pairs: &[(&str, &str)], limit| {
        let revision_paths = pairs
            .iter()
            .map(|(revision, path)| RevisionPath {
                revision: (*revision).into(),
                path: path.as_bytes().to_vec(),
            })
            .collect();
        let request = GetBlobsRequest { repository: Some(repository.clone()), revision_paths, limit };
        all(blobs(&node).get_blobs(request).await).await
    };
    let pairs = [
        ("main", "README"),
        ("main", "none"),
        ("main", "module"),
        ("main", "a"),
        ("v1", "run.sh"),
        ("none", "x"),
    ];
    let found: Vec<GetBlobsResponse> = ask(&pairs, -1).await.unwrap();
    assert_eq!(found.len(), pairs.len());
    for (message, (revision, path)) in found.iter().zip(pairs) {
        assert_eq!((message.revision.as_str(), message.path.as_slice()), (revision, path.as_bytes()));
    }
    assert_eq!(
        (found[0].data.as_slice(), found[0].size, found[0].r#type()),
        (&b"hello again"[..], 11, ObjectType::Blob)
    );
    assert_eq!((found[1].oid.as_str(), found[1].size), ("", 0));
    assert!(found[2].is_submodule && found[2].oid == "11".repeat(20));
    assert_eq!((found[3].r#type(), found[3].data.len()), (ObjectType::Tree, 0));
    assert_eq!((found[4].mode, found[4].data.as_slice()), (0o100_755, &b"#!/bin/sh"[..]));
    assert!(found[5].oid.is_empty());

    let big = ask(&[("main", "big.bin"), ("main", "README")], -1).await.unwrap();
    let data: Vec<u8> = big[..big.len() - 1].iter().flat_map(|message| message.data.clone()).collect();
    assert_eq!(data, BIG);
    assert!(big[1].revision.is_empty() && big.last().unwrap().path == b"README");
    assert!(ask(&[("main", "big.bin")], 0).await.unwrap()[0].data.is_empty());
    assert_eq!(refusal(ask(&[], -1).await), invalid("empty RevisionPaths"));
    assert!(ask(&[("main", "")], -1).await.unwrap()[0].oid.is_empty());
    assert_eq!(refusal(ask(&[("", "x")], -1).await), invalid("empty revision"));
}

#[tokio::test]
async fn a_client_that_goes_away_ends_git() {
    let node = TestNode::start().await;
    let repository = node.create("big.git").await;
    let mut stream =
        b"commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\nM 100644 inline f\ndata 33554432\n"
            .to_vec();
    stream.resize(stream.len() + 33_554_432, b'y');
    seed::fast_import(&node.path("big.git"), &stream);
    let request =
        GetBlobRequest { repository: Some(repository), oid: id(&node, "big.git", "main:f"), limit: -1 };
    let mut blob = blobs(&node).get_blob(request).await.unwrap().into_inner();
    blob.message().await.unwrap().unwrap();
    // The connection's window is far smaller than the blob, so git is still there.
    assert_eq!(node.metric("tabularium_node_git_processes_running").await, 1);
    drop(blob);
    eventually("git is gone", async || node.metric("tabularium_node_git_processes_running").await == 0).await;
    tokio::time::timeout(PATIENCE, node.stop()).await.unwrap();
}
