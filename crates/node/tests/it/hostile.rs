//! Clients that vanish half way, and requests that reach for what is not theirs.

use std::fs;

use tabularium_proto::gitaly::{
    FetchBundleRequest, FindLocalBranchesRequest, RemoveRepositoryRequest, UpdateReferencesRequest,
    UserCommitFilesAction, UserCommitFilesActionHeader, UserCommitFilesRequest, UserCommitFilesRequestHeader,
    operation_service_client::OperationServiceClient, ref_service_client::RefServiceClient,
    update_references_request::Update,
    user_commit_files_action::UserCommitFilesActionPayload as ActionPayload,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::{
    harness::{TestNode, eventually, git},
    seed::{self, refusal},
};

/// Sends `messages`, keeps the stream open, and hangs up as soon as `arrived` holds. Answers the end of the stream that
/// must not be dropped before the hang-up has arrived: that would end the stream in all form.
async fn hang_up<M, T, Call>(
    messages: Vec<M>,
    call: impl FnOnce(ReceiverStream<M>) -> Call,
    arrived: impl AsyncFnMut() -> bool,
) -> mpsc::Sender<M>
where
    Call: Future<Output = Result<T, tonic::Status>>,
{
    let (sender, receiver) = mpsc::channel(messages.len());
    for message in messages {
        sender.try_send(message).ok().unwrap();
    }
    tokio::select! {
        ended = call(ReceiverStream::new(receiver)) => panic!("ended by itself: {:?}", ended.map(drop)),
        () = eventually("the messages arrived", arrived) => {}
    }
    sender
}

/// Nothing of a call is left to wait for.
async fn quiet(node: &TestNode) {
    let temporary = node.path("+gitaly/tmp");
    eventually("the node is quiet", async || {
        node.metric("tabularium_node_git_processes_running").await == 0
            && fs::read_dir(&temporary).unwrap().next().is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn references_of_a_client_that_hangs_up_stay() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let before = git(&node.path("a.git"), &["for-each-ref"]);
    let first = UpdateReferencesRequest {
        repository: Some(repository),
        updates: vec![Update {
            reference: b"refs/heads/half".to_vec(),
            old_object_id: Vec::new(),
            new_object_id: seed::id(&node, "a.git", "main").into(),
        }],
    };
    for _ in 0..5 {
        let mut client = RefServiceClient::new(node.channel());
        let running = async || node.metric("tabularium_node_git_processes_running").await > 0;
        let open = hang_up(vec![first.clone()], |messages| client.update_references(messages), running).await;
        quiet(&node).await;
        drop(open);
        assert_eq!(git(&node.path("a.git"), &["for-each-ref"]), before);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_a_client_that_hangs_up_is_not_made() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let before = git(&node.path("a.git"), &["for-each-ref"]);
    let header = UserCommitFilesRequestHeader {
        repository: Some(repository),
        user: Some(tabularium_proto::gitaly::User {
            gl_id: "user-1".into(),
            name: "Jane".into(),
            email: "jane@example.com".into(),
            ..Default::default()
        }),
        branch_name: b"half".to_vec(),
        commit_message: b"two of three".to_vec(),
        ..Default::default()
    };
    let request = |payload| UserCommitFilesRequest { user_commit_files_request_payload: Some(payload) };
    let action = |payload| {
        request(Payload::Action(UserCommitFilesAction { user_commit_files_action_payload: Some(payload) }))
    };
    let mut messages = vec![request(Payload::Header(header))];
    for path in ["one", "two"] {
        let header = UserCommitFilesActionHeader { file_path: path.into(), ..Default::default() };
        messages.push(action(ActionPayload::Header(header)));
        messages.push(action(ActionPayload::Content(path.into())));
    }
    for _ in 0..5 {
        let mut client = OperationServiceClient::new(node.channel());
        // The second file waits for its end beside the first, which is an object by then.
        let arrived = async || {
            let quarantine = fs::read_dir(node.path("+gitaly/tmp")).unwrap().flatten().next();
            let files = quarantine.and_then(|entry| fs::read_dir(entry.path()).ok());
            files.is_some_and(|files| {
                let names: Vec<_> = files.flatten().map(|entry| entry.file_name()).collect();
                names.iter().any(|name| name == "content") && names.iter().any(|name| name.len() == 2)
            })
        };
        let open = hang_up(messages.clone(), |messages| client.user_commit_files(messages), arrived).await;
        quiet(&node).await;
        drop(open);
        assert_eq!(git(&node.path("a.git"), &["for-each-ref"]), before);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_of_a_client_that_hangs_up_is_not_fetched() {
    let node = TestNode::start().await;
    node.create_with_commits("a.git").await;
    let copy = node.create("copy.git").await;
    let file = node.root().join("whole");
    git(&node.path("a.git"), &["bundle", "create", "--quiet", file.to_str().unwrap(), "--all"]);
    let data = fs::read(&file).unwrap();
    let size = u64::try_from(data.len()).unwrap();
    let first = FetchBundleRequest { repository: Some(copy), data: data.into(), ..Default::default() };
    let mut client = node.repositories();
    let arrived = async || {
        let entries = fs::read_dir(node.path("+gitaly/tmp")).unwrap().flatten();
        entries.into_iter().any(|entry| {
            fs::metadata(entry.path().join("bundle")).is_ok_and(|metadata| metadata.len() == size)
        })
    };
    let open = hang_up(vec![first], |messages| client.fetch_bundle(messages), arrived).await;
    quiet(&node).await;
    drop(open);
    assert_eq!(git(&node.path("copy.git"), &["for-each-ref"]), "");
    node.stop().await;
}

#[tokio::test]
async fn a_bundle_that_points_at_another_repository_is_refused() {
    let node = TestNode::start().await;
    node.create_with_commits("secret.git").await;
    let own = node.create("own.git").await;
    let secret = node.path("secret.git");
    let data = format!("gitdir: {}\n", secret.display()).into_bytes();
    for data in [data, secret.display().to_string().into_bytes(), Vec::new()] {
        let request =
            FetchBundleRequest { repository: Some(own.clone()), data: data.into(), ..Default::default() };
        let (code, _) = refusal(node.repositories().fetch_bundle(tokio_stream::iter([request])).await);
        assert_eq!(code, Code::Internal);
        assert_eq!(git(&node.path("own.git"), &["for-each-ref"]), "");
    }
}

#[tokio::test]
async fn a_directory_of_repositories_is_not_removed() {
    let node = TestNode::start().await;
    let repository = node.create("group/sub/a.git").await;
    fs::create_dir_all(node.path("broken/b.git/objects")).unwrap();
    let remove = async |path: &str| {
        let request = RemoveRepositoryRequest { repository: Some(node.named(path)) };
        node.repositories().remove_repository(request).await
    };
    for path in ["group", "group/sub"] {
        assert_eq!(refusal(remove(path).await).0, Code::FailedPrecondition, "{path}");
    }
    assert_eq!(node.checksum(&repository).await, "0".repeat(40));
    // What is left of a repository may go.
    remove("broken/b.git").await.unwrap();
    assert!(!node.path("broken/b.git").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_that_need_two_processes_do_not_starve_each_other() {
    let node = TestNode::start_with(|config| config.max_git_processes = 2).await;
    let repository = node.create_with_commits("a.git").await;
    let list = async || {
        let request = FindLocalBranchesRequest { repository: Some(repository.clone()), ..Default::default() };
        seed::all(RefServiceClient::new(node.channel()).find_local_branches(request).await).await
    };
    let listings = futures::future::join_all((0..12).map(|_| list())).await;
    for listing in listings {
        assert_eq!(listing.unwrap()[0].local_branches.len(), 2);
    }
}
