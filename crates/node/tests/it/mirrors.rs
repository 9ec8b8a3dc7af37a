//! UpdateRemoteMirror: branches and tags are pushed to where people want to have them as well.

use tabularium_proto::gitaly::{
    Repository, UpdateRemoteMirrorRequest, remote_service_client::RemoteServiceClient,
    update_remote_mirror_request::Remote,
};
use tonic::{Code, Status};

use crate::{
    bridge,
    harness::{TestNode, commit, git},
    seed::{self, id, invalid, refusal},
};

async fn update(
    node: &TestNode,
    request: UpdateRemoteMirrorRequest,
    branches: &[&str],
) -> Result<Vec<String>, Status> {
    let mut requests = vec![request];
    requests.extend(branches.iter().map(|branch| UpdateRemoteMirrorRequest {
        only_branches_matching: vec![branch.as_bytes().to_vec()],
        ..UpdateRemoteMirrorRequest::default()
    }));
    let answer =
        RemoteServiceClient::new(node.channel()).update_remote_mirror(tokio_stream::iter(requests)).await?;
    let names = answer.into_inner().divergent_refs.into_iter();
    Ok(names.map(|name| String::from_utf8(name).unwrap()).collect())
}

fn request(repository: &Repository, url: &str) -> UpdateRemoteMirrorRequest {
    UpdateRemoteMirrorRequest {
        repository: Some(repository.clone()),
        remote: Some(Remote { url: url.to_owned(), ..Remote::default() }),
        ..UpdateRemoteMirrorRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_given_what_it_lacks() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    node.create("mirror.git").await;
    let (ours, theirs) = (node.path("a.git"), node.path("mirror.git"));
    let url = format!("{}/mirror.git", bridge::serve(&node, None).await);
    git(&ours, &["update-ref", "refs/keep-around/x", "main"]);
    for number in 0..12 {
        git(&ours, &["update-ref", &format!("refs/heads/many/{number}"), "side"]);
    }
    assert_eq!(update(&node, request(&repository, &url), &[]).await.unwrap(), [""; 0]);
    let refs = |path| git(path, &["for-each-ref", "refs/heads", "refs/tags"]);
    assert_eq!(refs(&ours), refs(&theirs));
    assert_eq!(git(&theirs, &["for-each-ref", "refs/keep-around"]), "");

    // Merged work that is gone here goes there, other work stays.
    git(&ours, &["update-ref", "-d", "refs/heads/many/0"]);
    let own = commit(&theirs, Some(&id(&node, "mirror.git", "side")), "own");
    git(&theirs, &["update-ref", "refs/heads/own", &own]);
    update(&node, request(&repository, &url), &[]).await.unwrap();
    assert_eq!(git(&theirs, &["for-each-ref", "refs/heads/many/0"]), "");
    assert_eq!(id(&node, "mirror.git", "own"), own);

    // Only some branches.
    let further = commit(&ours, Some(&id(&node, "a.git", "main")), "further");
    for name in ["refs/heads/main", "refs/heads/many/1"] {
        git(&ours, &["update-ref", name, &further]);
    }
    update(&node, request(&repository, &url), &["none", "ma*n"]).await.unwrap();
    assert_eq!(id(&node, "mirror.git", "main"), further);
    assert_eq!(id(&node, "mirror.git", "many/1"), id(&node, "a.git", "side"));

    // What has gone another way is left alone, and told, or overwritten.
    git(&theirs, &["update-ref", "refs/heads/side", &own]);
    let keep = UpdateRemoteMirrorRequest { keep_divergent_refs: true, ..request(&repository, &url) };
    assert_eq!(update(&node, keep.clone(), &[]).await.unwrap(), ["refs/heads/side"]);
    assert_eq!(update(&node, keep, &["main"]).await.unwrap(), [""; 0]);
    assert_eq!(id(&node, "mirror.git", "side"), own);
    update(&node, request(&repository, &url), &[]).await.unwrap();
    assert_eq!(id(&node, "mirror.git", "side"), id(&node, "a.git", "side"));

    let whole = request(&repository, &url);
    for (change, text) in [
        (UpdateRemoteMirrorRequest { repository: None, ..whole.clone() }, "repository not set"),
        (UpdateRemoteMirrorRequest { remote: None, ..whole.clone() }, "missing Remote"),
        (
            UpdateRemoteMirrorRequest { remote: Some(Remote::default()), ..whole.clone() },
            "remote is missing URL",
        ),
    ] {
        assert_eq!(refusal(update(&node, change, &[]).await), invalid(text));
    }
    let astray = refusal(update(&node, request(&repository, &url.replace("mirror", "none")), &[]).await);
    assert_eq!(astray.0, Code::Internal);
    let inside = refusal(update(&node, request(&repository, "file:///tmp/x"), &[]).await);
    assert_eq!(inside.0, Code::InvalidArgument);
}
