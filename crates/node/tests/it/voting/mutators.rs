//! Everything that changes a repository is voted on, and equal nodes cast equal votes.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use tabularium_common::methods::{Operation, Registry};
use tabularium_proto::gitaly::{
    CreateForkRequest, CreateRepositoryFromSnapshotRequest, CreateRepositoryRequest, DeleteRefsRequest,
    FetchBundleRequest, FetchRemoteRequest, Remote, RemoveRepositoryRequest, Repository,
    RestoreCustomHooksRequest, RewriteHistoryRequest, SetCustomHooksRequest, UpdateReferencesRequest,
    UserCommitFilesAction, UserCommitFilesActionHeader, UserCommitFilesRequest, UserCommitFilesRequestHeader,
    UserCreateBranchRequest, UserCreateTagRequest, UserDeleteBranchRequest, UserDeleteTagRequest,
    UserMergeBranchRequest, UserUpdateBranchRequest, WriteRefRequest, update_references_request::Update,
    user_commit_files_action::UserCommitFilesActionPayload,
    user_commit_files_request::UserCommitFilesRequestPayload, vote_transaction_request::Phase,
};
use tonic::{Code, Status, client::Grpc};

use super::{
    operations, repositories,
    router::{Answer, Router},
};
use crate::{
    api::{self, Raw},
    bridge,
    custom_hooks::archive,
    files::serve_once,
    harness::{Client, TestNode, eventually, git, servers},
    operations::{moment, user},
    seed::{self, fast_import},
    transport::leftovers,
};

/// Votes of a change that users make: they wait for each other around hooks, and vote on the reference.
pub(super) const BY_USER: &str = "SSPCS";

/// A request, and what it takes.
pub(super) struct Case {
    pub(super) path: &'static str,
    pub(super) votes: &'static str,
    /// The request's messages for a repository on a node.
    pub(super) messages: fn(&Scene) -> Vec<Vec<u8>>,
}

/// A node with a repository that has commits, and what requests need beside it.
pub(super) struct Scene {
    pub(super) node: TestNode,
    repository: Repository,
    /// What two branches are at; the second one is from an earlier commit of the first.
    pub(super) main: String,
    pub(super) side: String,
    /// Another repository, over HTTP.
    pub(super) remote: String,
    snapshot: String,
    /// Of another repository.
    pub(super) bundle: Vec<u8>,
}

impl Scene {
    async fn new(storage: &str) -> Self {
        let node = TestNode::start_with_backups(storage).await;
        let repository = seed::repository(&node, "a.git").await;
        let path = node.path("a.git");
        fast_import(
            &path,
            b"commit refs/heads/feature\ncommitter A <a@x> 1700000500 +0000\ndata 1\nf\nfrom refs/heads/side\nM 100644 inline new\ndata 1\nn\n\n",
        );
        let (main, side) = (seed::id(&node, "a.git", "main"), seed::id(&node, "a.git", "feature"));
        node.create_with_commits("other.git").await;
        let other = node.path("other.git");
        let file = node.root().join("bundle");
        git(&other, &["bundle", "create", "--quiet", file.to_str().unwrap(), "--all"]);
        let bundle = std::fs::read(file).unwrap();
        let refs = format!("{}\n", git(&other, &["show-ref", "--head"]));
        std::fs::write(node.backups().join("other.bundle"), &bundle).unwrap();
        std::fs::write(node.backups().join("other.refs"), refs).unwrap();
        let remote = format!("{}/other.git", bridge::serve(&node, None).await);
        let tar = crate::files::snapshot(&node, &node.named("other.git")).await;
        let (snapshot, _) = serve_once(tar).await;
        let scene = Self { node, repository, main, side, remote, snapshot, bundle };
        repositories::make_pool(&scene);
        scene
    }

    pub(super) fn named(&self, path: &str) -> Repository {
        self.node.named(path)
    }

    pub(super) fn target(&self) -> Repository {
        self.repository.clone()
    }
}

pub(super) fn one(message: &impl Message) -> Vec<Vec<u8>> {
    vec![message.encode_to_vec()]
}

fn commit_files(scene: &Scene) -> Vec<Vec<u8>> {
    let header = UserCommitFilesRequestHeader {
        repository: Some(scene.target()),
        user: Some(user()),
        branch_name: b"main".to_vec(),
        commit_message: b"more".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let action = UserCommitFilesActionHeader { file_path: b"more".to_vec(), ..Default::default() };
    let payloads = [
        UserCommitFilesRequestPayload::Header(header),
        UserCommitFilesRequestPayload::Action(UserCommitFilesAction {
            user_commit_files_action_payload: Some(UserCommitFilesActionPayload::Header(action)),
        }),
    ];
    let request =
        |payload| UserCommitFilesRequest { user_commit_files_request_payload: Some(payload) }.encode_to_vec();
    payloads.map(request).to_vec()
}

fn merge(scene: &Scene) -> Vec<Vec<u8>> {
    let first = UserMergeBranchRequest {
        repository: Some(scene.target()),
        user: Some(user()),
        commit_id: scene.side.clone(),
        branch: b"main".to_vec(),
        message: b"merge".to_vec(),
        timestamp: Some(moment()),
        ..Default::default()
    };
    let second = UserMergeBranchRequest { apply: true, ..Default::default() };
    vec![first.encode_to_vec(), second.encode_to_vec()]
}

const CASES: &[Case] = &[
    Case {
        path: "/gitaly.RepositoryService/CreateRepository",
        votes: "PC",
        messages: |scene| {
            one(&CreateRepositoryRequest {
                repository: Some(scene.named("x/y/new.git")),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/CreateFork",
        votes: "PC",
        messages: |scene| {
            one(&CreateForkRequest {
                repository: Some(scene.named("x/y/new.git")),
                source_repository: Some(scene.target()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/CreateRepositoryFromSnapshot",
        votes: "PC",
        messages: |scene| {
            one(&CreateRepositoryFromSnapshotRequest {
                repository: Some(scene.named("x/y/new.git")),
                http_url: scene.snapshot.clone(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/RemoveRepository",
        votes: "PC",
        messages: |scene| one(&RemoveRepositoryRequest { repository: Some(scene.target()) }),
    },
    Case {
        path: "/gitaly.RepositoryService/SetCustomHooks",
        votes: "PC",
        messages: |scene| {
            let data = archive(&[("custom_hooks/update", 0o755, "#!/bin/sh\n")]);
            one(&SetCustomHooksRequest { repository: Some(scene.target()), data })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/RestoreCustomHooks",
        votes: "PC",
        messages: |scene| {
            one(&RestoreCustomHooksRequest { repository: Some(scene.target()), ..Default::default() })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/WriteRef",
        votes: "PC",
        messages: |scene| {
            one(&WriteRefRequest {
                repository: Some(scene.target()),
                r#ref: b"refs/heads/new".to_vec(),
                revision: b"main".to_vec(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/WriteRef",
        votes: "PC",
        messages: |scene| {
            one(&WriteRefRequest {
                repository: Some(scene.target()),
                r#ref: b"HEAD".to_vec(),
                revision: b"refs/heads/side".to_vec(),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/FetchRemote",
        votes: "PCC",
        messages: |scene| {
            one(&FetchRemoteRequest {
                repository: Some(scene.target()),
                remote_params: Some(Remote { url: scene.remote.clone(), ..Default::default() }),
                force: true,
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RepositoryService/FetchBundle",
        votes: "PCC",
        messages: |scene| {
            one(&FetchBundleRequest {
                repository: Some(scene.target()),
                data: scene.bundle.clone().into(),
                update_head: true,
            })
        },
    },
    Case {
        path: "/gitaly.RefService/DeleteRefs",
        votes: "PC",
        messages: |scene| {
            one(&DeleteRefsRequest {
                repository: Some(scene.target()),
                refs: vec![b"refs/heads/side".to_vec(), b"refs/tags/none".to_vec()],
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.RefService/UpdateReferences",
        votes: "PC",
        messages: |scene| {
            let update = |name: &str| Update {
                reference: name.into(),
                old_object_id: Vec::new(),
                new_object_id: scene.main.clone().into(),
            };
            one(&UpdateReferencesRequest {
                repository: Some(scene.target()),
                updates: vec![update("refs/heads/side"), update("refs/heads/new")],
            })
        },
    },
    Case {
        path: "/gitaly.CleanupService/RewriteHistory",
        votes: "PCPC",
        messages: |scene| {
            one(&RewriteHistoryRequest {
                repository: Some(scene.target()),
                redactions: vec![b"hello".to_vec()],
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserCreateBranch",
        votes: BY_USER,
        messages: |scene| {
            one(&UserCreateBranchRequest {
                repository: Some(scene.target()),
                branch_name: b"new".to_vec(),
                user: Some(user()),
                start_point: b"main".to_vec(),
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserUpdateBranch",
        votes: BY_USER,
        messages: |scene| {
            one(&UserUpdateBranchRequest {
                repository: Some(scene.target()),
                branch_name: b"feature".to_vec(),
                user: Some(user()),
                newrev: scene.main.clone().into(),
                oldrev: scene.side.clone().into(),
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserDeleteBranch",
        votes: BY_USER,
        messages: |scene| {
            one(&UserDeleteBranchRequest {
                repository: Some(scene.target()),
                branch_name: b"side".to_vec(),
                user: Some(user()),
                ..Default::default()
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserCreateTag",
        votes: BY_USER,
        messages: |scene| {
            one(&UserCreateTagRequest {
                repository: Some(scene.target()),
                tag_name: b"v9".to_vec(),
                user: Some(user()),
                target_revision: b"main".to_vec(),
                message: b"nine".to_vec(),
                timestamp: Some(moment()),
            })
        },
    },
    Case {
        path: "/gitaly.OperationService/UserDeleteTag",
        votes: BY_USER,
        messages: |scene| {
            one(&UserDeleteTagRequest {
                repository: Some(scene.target()),
                tag_name: b"v1".to_vec(),
                user: Some(user()),
                ..Default::default()
            })
        },
    },
    Case { path: "/gitaly.OperationService/UserCommitFiles", votes: BY_USER, messages: commit_files },
    Case { path: "/gitaly.OperationService/UserMergeBranch", votes: BY_USER, messages: merge },
];

fn cases() -> impl Iterator<Item = &'static Case> {
    CASES.iter().chain(operations::CASES).chain(repositories::CASES)
}

/// Mutators that are tested elsewhere, or that routers send without a transaction.
const ELSEWHERE: [(&str, &str); 3] = [
    ("/gitaly.SmartHTTPService/PostReceivePack", "pushes.rs"),
    ("/gitaly.SSHService/SSHReceivePack", "../ssh.rs"),
    ("/gitaly.RepositoryService/ReplicateRepository", "a copy makes one replica equal; nobody votes on it"),
];

async fn call(client: Client, scene: &Scene, case: &Case) -> Result<(), Status> {
    let mut client = Grpc::new(client);
    client.ready().await.unwrap();
    let messages: Vec<Bytes> = (case.messages)(scene).into_iter().map(Bytes::from).collect();
    let mut request = tonic::Request::new(tokio_stream::iter(messages));
    request.metadata_mut().insert("gitaly-servers", servers(&[&scene.node]).parse().unwrap());
    let mut answers = client.streaming(request, case.path.parse().unwrap(), Raw).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

/// What the node's disk shows: every repository's references and HEAD.
fn state(node: &TestNode) -> BTreeMap<String, String> {
    let paths = ["a.git", "other.git", "x/y/new.git", "x", repositories::POOL, repositories::MEMBER];
    let shown = paths.into_iter().filter(|path| node.path(path).exists()).map(|path| {
        let directory = node.path(path);
        let head = std::fs::read_to_string(directory.join("HEAD")).unwrap_or_default();
        let references = if head.is_empty() { String::new() } else { git(&directory, &["for-each-ref"]) };
        let hooks = if directory.join("custom_hooks").exists() { "custom hooks" } else { "" };
        (path.to_owned(), head + &references + hooks)
    });
    shown.collect()
}

#[test]
fn no_mutator_is_forgotten() {
    let page = api::on_node();
    let registry = Registry::read().unwrap();
    for method in registry.iter().filter(|method| method.operation == Operation::Mutator) {
        if !page.contains(&method.path) {
            continue;
        }
        let tested = cases().any(|case| case.path == method.path);
        let elsewhere = ELSEWHERE.iter().any(|(path, _)| *path == method.path);
        assert!(tested != elsewhere, "{} is served, but is it voted on?", method.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_nodes_cast_equal_votes() {
    for case in cases() {
        let router = Router::agreeing();
        let (one, other) = tokio::join!(Scene::new("one"), Scene::new("other"));
        for (scene, primary) in [(&one, true), (&other, false)] {
            let answer = call(router.client(&scene.node, primary), scene, case).await;
            answer.unwrap_or_else(|status| panic!("{}: {status:?}", case.path));
        }
        assert_eq!(router.phases(&one.node), case.votes, "{}", case.path);
        let cast = |scene: &Scene| -> Vec<(Phase, Vec<u8>)> {
            router.votes(&scene.node).into_iter().map(|vote| (vote.phase, vote.ballot)).collect()
        };
        assert_eq!(cast(&one), cast(&other), "{}", case.path);
        assert_eq!(state(&one.node), state(&other.node), "{}", case.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_replicas_do_not_agree_on_leaves_nothing() {
    for case in cases() {
        let router = Router::deciding(|vote| match vote.phase {
            Phase::PreparedPhase => Answer::Abort,
            _ => Answer::Commit,
        });
        let scene = Scene::new("one").await;
        let before = state(&scene.node);
        let refused = call(router.client(&scene.node, true), &scene, case).await.unwrap_err();
        let expected = (Code::Aborted, "transaction was aborted");
        assert_eq!((refused.code(), refused.message()), expected, "{}", case.path);
        assert_eq!(state(&scene.node), before, "{}", case.path);
        let root = scene.node.root();
        eventually("no lock is left", async || leftovers(&root).iter().all(|name| name == "node.lock")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_needs_a_connection_with_a_way_back() {
    let scene = Scene::new("one").await;
    for case in cases() {
        let refused = call(scene.node.in_transaction(), &scene, case).await.unwrap_err();
        let expected = (Code::Internal, "get backchannel: no backchannel for peer 0");
        assert_eq!((refused.code(), refused.message()), expected, "{}", case.path);
    }
}
