//! BlobService: listings of blobs and of the pointers among them.

use tabularium_proto::gitaly::{
    GetLfsPointersRequest, LfsPointer, ListAllBlobsRequest, ListAllLfsPointersRequest, ListBlobsRequest,
    ListLfsPointersRequest, Repository, blob_service_client::BlobServiceClient, list_blobs_response::Blob,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, git},
    seed::{self, BIG, all, id, invalid, refusal},
};

fn blobs(node: &TestNode) -> BlobServiceClient<Client> {
    BlobServiceClient::new(node.channel())
}

fn listing(repository: &Repository, revisions: &[&str]) -> ListBlobsRequest {
    ListBlobsRequest {
        repository: Some(repository.clone()),
        revisions: revisions.iter().map(|&revision| revision.to_owned()).collect(),
        ..Default::default()
    }
}

async fn list(node: &TestNode, request: ListBlobsRequest) -> Result<Vec<Blob>, Status> {
    let messages = all(blobs(node).list_blobs(request).await).await?;
    Ok(messages.into_iter().flat_map(|message| message.blobs).collect())
}

#[tokio::test]
async fn blobs_that_revisions_lead_to() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let found = list(&node, listing(&repository, &["main"])).await.unwrap();
    assert_eq!(found.len(), 5, "{found:?}");
    assert!(found.iter().all(|blob| blob.data.is_empty() && blob.path.is_empty() && blob.size > 0));
    let with_paths =
        ListBlobsRequest { with_paths: true, bytes_limit: -1, ..listing(&repository, &["main", "^v2"]) };
    let found = list(&node, with_paths).await.unwrap();
    assert!(found.iter().all(|blob| blob.path == b"big.bin"));
    assert_eq!(
        (found[0].oid.as_str(), found[0].size),
        (id(&node, "a.git", "main:big.bin").as_str(), 300 * 1024)
    );
    assert!(found[1..].iter().all(|blob| blob.oid.is_empty() && blob.size == 0));
    assert_eq!(found.iter().flat_map(|blob| blob.data.clone()).collect::<Vec<u8>>(), BIG);
    let part = ListBlobsRequest { bytes_limit: 3, limit: 1, ..listing(&repository, &["main:README"]) };
    let found = list(&node, part).await.unwrap();
    assert_eq!((found.len(), found[0].data.as_slice(), found[0].size), (1, &b"hel"[..], 11));
    assert_eq!(list(&node, listing(&repository, &["--not", "--all"])).await.unwrap(), []);
    assert_eq!(list(&node, listing(&repository, &["--all"])).await.unwrap().len(), 5);
    let two = ListBlobsRequest { limit: 2, ..listing(&repository, &["main"]) };
    assert_eq!(list(&node, two).await.unwrap().len(), 2);

    for (revisions, text) in [
        (&[][..], "missing revisions"),
        (&["--output=/tmp/x"], "invalid revision: revision can't start with '-'"),
        (&["a b"], "invalid revision: revision can't contain whitespace"),
        (&[""], "invalid revision: empty revision"),
    ] {
        assert_eq!(refusal(list(&node, listing(&repository, revisions)).await), invalid(text));
    }
    let (code, text) = refusal(list(&node, listing(&repository, &["none"])).await);
    assert_eq!(code, Code::Internal);
    let beginning =
        "processing blobs: rev-list pipeline command: exit status 128, stderr: \"fatal: bad revision";
    assert!(text.starts_with(beginning), "{text}");
}

#[tokio::test]
async fn all_blobs_and_those_that_nothing_leads_to() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let empty = git(&node.path("a.git"), &["hash-object", "-w", "--stdin"]);
    let list = async |limit, bytes_limit| {
        let request = ListAllBlobsRequest { repository: Some(repository.clone()), limit, bytes_limit };
        let messages = all(blobs(&node).list_all_blobs(request).await).await.unwrap();
        messages.into_iter().flat_map(|message| message.blobs).collect::<Vec<_>>()
    };
    assert_eq!(list(0, 0).await.len(), 6);
    assert_eq!(list(4, 0).await.len(), 4);
    let found = list(0, -1).await;
    assert_eq!(found.iter().filter(|blob| !blob.oid.is_empty()).count(), 6);
    assert_eq!(found.iter().map(|blob| blob.data.len()).sum::<usize>(), BIG.len() + 5 + 11 + 9 + 4);
    let empty = found.iter().find(|blob| blob.oid == empty).unwrap();
    assert_eq!((empty.size, empty.data.len()), (0, 0));
}

#[tokio::test]
async fn pointers_are_found_among_other_files() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let id = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393";
    let pointer =
        |size: u32| format!("version https://git-lfs.github.com/spec/v1\noid sha256:{id}\nsize {size}\n");
    let mut stream = "commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\n".to_owned();
    for (path, content) in [
        ("one", pointer(1)),
        ("two", pointer(2)),
        ("other", "x".to_owned()),
        ("long", pointer(3) + &"x".repeat(200)),
    ] {
        let length = content.len().to_string();
        for part in ["M 100644 inline ", path, "\ndata ", &length, "\n", &content, "\n"] {
            stream.push_str(part);
        }
    }
    seed::fast_import(&node.path("a.git"), stream.as_bytes());
    let object = |path: &str| seed::id(&node, "a.git", &format!("main:{path}"));
    let sizes = |mut found: Vec<LfsPointer>| -> Vec<i64> {
        found.sort_by_key(|pointer| pointer.file_size);
        found.iter().map(|pointer| pointer.file_size).collect()
    };
    let reachable = async |revisions: &[&str], limit| {
        let revisions = revisions.iter().map(|&revision| revision.to_owned()).collect();
        let request = ListLfsPointersRequest { repository: Some(repository.clone()), revisions, limit };
        let messages = all(blobs(&node).list_lfs_pointers(request).await).await?;
        Ok::<Vec<_>, Status>(messages.into_iter().flat_map(|message| message.lfs_pointers).collect())
    };
    let found = reachable(&["main"], 0).await.unwrap();
    let one = found.iter().find(|pointer| pointer.file_size == 1).unwrap();
    assert_eq!((one.oid.as_str(), one.data.as_slice()), (object("one").as_str(), pointer(1).as_bytes()));
    assert_eq!(
        (one.size, one.file_oid.as_slice()),
        (i64::try_from(pointer(1).len()).unwrap(), id.as_bytes())
    );
    assert_eq!(sizes(found), [1, 2]);
    assert_eq!(reachable(&["main"], 1).await.unwrap().len(), 1);
    assert_eq!(reachable(&["--not", "main"], 0).await.unwrap(), []);
    assert_eq!(refusal(reachable(&[], 0).await), invalid("missing revisions"));
    let text = "invalid revision: revision can't start with '-'";
    assert_eq!(refusal(reachable(&["--output=x"], 0).await), invalid(text));
    assert_eq!(refusal(reachable(&["none"], 0).await).0, Code::Internal);

    let every = async |limit| {
        let request = ListAllLfsPointersRequest { repository: Some(repository.clone()), limit };
        let messages = all(blobs(&node).list_all_lfs_pointers(request).await).await.unwrap();
        messages.into_iter().flat_map(|message| message.lfs_pointers).collect::<Vec<_>>()
    };
    assert_eq!(sizes(every(0).await), [1, 2]);
    assert_eq!(every(1).await.len(), 1);

    let get = async |ids: &[&str]| {
        let blob_ids = ids.iter().map(|&id| id.to_owned()).collect();
        let request = GetLfsPointersRequest { repository: Some(repository.clone()), blob_ids };
        let messages = all(blobs(&node).get_lfs_pointers(request).await).await?;
        Ok::<Vec<_>, Status>(messages.into_iter().flat_map(|message| message.lfs_pointers).collect())
    };
    assert_eq!(sizes(get(&[&object("two"), &object("other"), &object("long"), "main"]).await.unwrap()), [2]);
    assert_eq!(refusal(get(&[]).await), invalid("empty BlobIds"));
    let missing = "12".repeat(20);
    let text = format!("retrieving object info for \"{missing}\": object not found");
    assert_eq!(refusal(get(&[&missing]).await), (Code::Internal, text));
}
