//! What people change through a web interface, and what GitLab does beside it, through a router: all replicas do the same and
//! stay up to date, so no write leaves work for the replicators.

use tabularium_proto::gitaly::{
    CreateObjectPoolRequest, CreateRepositoryFromBundleRequest, DisconnectGitAlternatesRequest,
    FetchIntoObjectPoolRequest, FetchSourceBranchRequest, GetObjectPoolRequest, GitCommit,
    LinkRepositoryToObjectPoolRequest, ObjectPool, Repository, ResolveConflictsRequest,
    ResolveConflictsRequestHeader, User, UserApplyPatchRequest, UserCherryPickRequest, UserFfBranchRequest,
    UserMergeToRefRequest, UserRebaseConfirmableRequest, UserRebaseToRefRequest, UserRevertRequest,
    UserSquashRequest,
    conflicts_service_client::ConflictsServiceClient,
    object_pool_service_client::ObjectPoolServiceClient,
    operation_service_client::OperationServiceClient,
    repository_service_client::RepositoryServiceClient,
    resolve_conflicts_request::ResolveConflictsRequestPayload,
    user_apply_patch_request::{Header as PatchHeader, UserApplyPatchRequestPayload},
    user_rebase_confirmable_request::{Header as RebaseHeader, UserRebaseConfirmableRequestPayload},
};
use tabularium_testkit::{
    cluster::{Signed, TestCluster, VIRTUAL_STORAGE, local_cluster::HOME, service::Kind},
    git::GitClient,
    wait::wait_until,
};

use crate::support::{FOLLOW, home_only, named, request, router, start};

const PATH: &str = "a/b.git";
const FORK: &str = "a/fork.git";
/// As GitLab names them.
const POOL: &str = "@pools/6b/86/6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b.git";

fn repository() -> Option<Repository> {
    named(VIRTUAL_STORAGE, PATH)
}

#[expect(clippy::unnecessary_wraps, reason = "as the field of a request")]
fn user() -> Option<User> {
    Some(User {
        gl_id: "user-1".into(),
        name: "Jane".into(),
        email: "j@example.com".into(),
        ..User::default()
    })
}

#[expect(clippy::unnecessary_wraps, reason = "as the field of a request")]
fn commit(id: &str) -> Option<GitCommit> {
    Some(GitCommit { id: id.to_owned(), ..GitCommit::default() })
}

/// Every replica has the newest generation, which is that of `writes` writes more than before.
async fn level(test: &TestCluster, path: &str, generation: &mut i64, writes: i64, what: &str) {
    let route = test.details(path).await.unwrap().route.unwrap();
    let held: Vec<i64> = route.replicas.iter().map(|replica| replica.generation).collect();
    assert_eq!(held, [*generation + writes; 3], "{what}");
    *generation += writes;
    wait_until(what, FOLLOW, || test.equal_checksums(path, 3)).await;
}

async fn generation(test: &TestCluster, path: &str) -> i64 {
    let replicas = test.details(path).await.unwrap().route.unwrap().replicas;
    replicas.iter().map(|replica| replica.generation).max().unwrap()
}

/// `main`, and three branches from its first commit: `feature` and `other` change other files, `conflict` the same one.
async fn filled(test: &TestCluster, git: &GitClient) -> [String; 4] {
    git.work_tree("source", 2).await;
    let mut tips = vec![git.run("source", &["rev-parse", "main"]).await];
    for (branch, file) in [("feature", "f"), ("other", "o"), ("conflict", "file")] {
        git.run("source", &["checkout", "--quiet", "-b", branch, "main~1"]).await;
        tips.push(git.commit("source", file, branch).await);
    }
    test.create(PATH).await;
    git.run("source", &["push", "--quiet", &test.url(HOME, 0, PATH), "--all"]).await;
    tips.iter().map(|tip| tip.trim().to_owned()).collect::<Vec<_>>().try_into().unwrap()
}

#[tokio::test]
async fn replicas_stay_level_whatever_users_do() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let [main, feature, other, conflict] = filled(&test, &git).await;
    let channel = router(&test, 0);
    let operations = || OperationServiceClient::new(channel.clone());
    let mut now = generation(&test, PATH).await;

    // No request says when: the router does, so that all replicas make the same commits.
    let pick = UserCherryPickRequest {
        repository: repository(),
        user: user(),
        commit: commit(&feature),
        branch_name: b"main".to_vec(),
        message: b"picked".to_vec(),
        ..UserCherryPickRequest::default()
    };
    let picked = operations().user_cherry_pick(request(pick, "pick")).await.unwrap();
    let picked = picked.into_inner().branch_update.unwrap().commit_id;
    level(&test, PATH, &mut now, 1, "picked").await;
    let revert = UserRevertRequest {
        repository: repository(),
        user: user(),
        commit: commit(&picked),
        branch_name: b"main".to_vec(),
        message: b"reverted".to_vec(),
        ..UserRevertRequest::default()
    };
    operations().user_revert(request(revert, "revert")).await.unwrap();
    level(&test, PATH, &mut now, 1, "reverted").await;
    let forward = UserFfBranchRequest {
        repository: repository(),
        user: user(),
        commit_id: picked.clone(),
        branch: b"behind".to_vec(),
        ..UserFfBranchRequest::default()
    };
    let refused = operations().user_ff_branch(request(forward, "none")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    level(&test, PATH, &mut now, 0, "refused").await;
    let squash = UserSquashRequest {
        repository: repository(),
        user: user(),
        start_sha: main.clone(),
        end_sha: feature.clone(),
        author: user(),
        commit_message: b"squashed".to_vec(),
        ..UserSquashRequest::default()
    };
    operations().user_squash(request(squash, "squash")).await.unwrap();
    level(&test, PATH, &mut now, 1, "squashed").await;
    let merge = UserMergeToRefRequest {
        repository: repository(),
        user: user(),
        source_sha: other.clone(),
        target_ref: b"refs/merge-requests/1/merge".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        message: b"merged".to_vec(),
        ..UserMergeToRefRequest::default()
    };
    operations().user_merge_to_ref(request(merge, "merge")).await.unwrap();
    level(&test, PATH, &mut now, 1, "merged").await;
    let rebase = UserRebaseToRefRequest {
        repository: repository(),
        user: user(),
        source_sha: other.clone(),
        target_ref: b"refs/merge-requests/1/rebase".to_vec(),
        first_parent_ref: b"refs/heads/main".to_vec(),
        ..UserRebaseToRefRequest::default()
    };
    operations().user_rebase_to_ref(request(rebase, "rebase")).await.unwrap();
    level(&test, PATH, &mut now, 1, "rebased").await;

    let header = RebaseHeader {
        repository: repository(),
        user: user(),
        branch: b"feature".to_vec(),
        branch_sha: feature,
        // Routers leave it as it is: the nodes know the repository by its id.
        remote_repository: repository().map(|at| Repository { gl_repository: "project-1".into(), ..at }),
        remote_branch: b"main".to_vec(),
        ..RebaseHeader::default()
    };
    let header = RebaseHeader {
        repository: repository().map(|at| Repository { gl_repository: "project-1".into(), ..at }),
        ..header
    };
    let ask =
        |payload| UserRebaseConfirmableRequest { user_rebase_confirmable_request_payload: Some(payload) };
    let messages = tokio_stream::iter([
        ask(UserRebaseConfirmableRequestPayload::Header(header)),
        ask(UserRebaseConfirmableRequestPayload::Apply(true)),
    ]);
    let answers = operations().user_rebase_confirmable(request(messages, "confirm")).await.unwrap();
    let mut answers = answers.into_inner();
    while answers.message().await.unwrap().is_some() {}
    level(&test, PATH, &mut now, 1, "rebased for good").await;

    let mails = git.run("source", &["format-patch", "--stdout", "main~1..other"]).await;
    let header = PatchHeader {
        repository: repository(),
        user: user(),
        target_branch: b"patched".to_vec(),
        ..PatchHeader::default()
    };
    let ask = |payload| UserApplyPatchRequest { user_apply_patch_request_payload: Some(payload) };
    let messages = tokio_stream::iter([
        ask(UserApplyPatchRequestPayload::Header(header)),
        ask(UserApplyPatchRequestPayload::Patches(mails.into_bytes())),
    ]);
    operations().user_apply_patch(request(messages, "patch")).await.unwrap();
    level(&test, PATH, &mut now, 1, "patched").await;

    let at = || repository().map(|at| Repository { gl_repository: "project-1".into(), ..at });
    let header = ResolveConflictsRequestHeader {
        repository: at(),
        our_commit_oid: conflict,
        target_repository: at(),
        their_commit_oid: main,
        source_branch: b"conflict".to_vec(),
        target_branch: b"main".to_vec(),
        commit_message: b"resolved".to_vec(),
        user: user(),
        ..ResolveConflictsRequestHeader::default()
    };
    for (json, answer) in [
        ("[]", "Missing resolutions for the following files: file"),
        (r#"[{"old_path":"file","new_path":"file","content":"resolved\n"}]"#, ""),
    ] {
        let ask = |payload| ResolveConflictsRequest { resolve_conflicts_request_payload: Some(payload) };
        let messages = tokio_stream::iter([
            ask(ResolveConflictsRequestPayload::Header(header.clone())),
            ask(ResolveConflictsRequestPayload::FilesJson(json.into())),
        ]);
        let mut conflicts = ConflictsServiceClient::new(channel.clone());
        let answered = conflicts.resolve_conflicts(request(messages, "resolve")).await.unwrap();
        assert_eq!(answered.into_inner().resolution_error, answer);
        level(&test, PATH, &mut now, 1, "resolved").await;
    }
    test.stop().await.unwrap();
}

/// Tells nodes to look for other storages at this router.
fn through<T>(test: &TestCluster, message: T, id: &str) -> tonic::Request<T> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let home = test.home();
    let address = &home.grpc(Kind::Router)[0];
    let token = std::fs::read_to_string(&home.router_token_file).unwrap();
    let servers = serde_json::json!({ VIRTUAL_STORAGE: { "address": address, "token": token.trim() } });
    let mut request = request(message, id);
    request.metadata_mut().insert("gitaly-servers", STANDARD.encode(servers.to_string()).parse().unwrap());
    request
}

#[tokio::test]
async fn repositories_share_a_pool_on_every_replica() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let [main, ..] = filled(&test, &git).await;
    let channel: Signed = router(&test, 0);
    let pools = || ObjectPoolServiceClient::new(channel.clone());
    let repositories = || RepositoryServiceClient::new(channel.clone());

    git.run("source", &["bundle", "create", "--quiet", "../bundle", "main"]).await;
    let bundle = CreateRepositoryFromBundleRequest {
        repository: named(VIRTUAL_STORAGE, FORK),
        data: std::fs::read(git.path("bundle")).unwrap(),
    };
    let messages = tokio_stream::iter([bundle]);
    repositories().create_repository_from_bundle(request(messages, "bundle")).await.unwrap();
    let mut fork = generation(&test, FORK).await;
    level(&test, FORK, &mut fork, 0, "made of a bundle").await;
    let fetch = FetchSourceBranchRequest {
        repository: named(VIRTUAL_STORAGE, FORK),
        source_repository: repository(),
        source_branch: b"feature".to_vec(),
        target_ref: b"refs/merge-requests/1/head".to_vec(),
        ..FetchSourceBranchRequest::default()
    };
    let fetched = repositories().fetch_source_branch(through(&test, fetch.clone(), "fetch")).await.unwrap();
    assert!(fetched.into_inner().result);
    level(&test, FORK, &mut fork, 1, "fetched").await;
    let absent = FetchSourceBranchRequest { source_branch: b"none".to_vec(), ..fetch };
    let fetched = repositories().fetch_source_branch(through(&test, absent, "none")).await.unwrap();
    assert!(!fetched.into_inner().result);
    level(&test, FORK, &mut fork, 1, "nothing fetched").await;

    let pool = Some(ObjectPool { repository: named(VIRTUAL_STORAGE, POOL) });
    let create = CreateObjectPoolRequest { object_pool: pool.clone(), origin: repository() };
    pools().create_object_pool(request(create, "pool")).await.unwrap();
    // Nobody votes on a new pool: copies of it follow.
    wait_until("the pool's replicas", FOLLOW, || async {
        let route = test.details(POOL).await.map_err(|status| status.to_string())?.route.unwrap_or_default();
        let newest = route.replicas.iter().map(|replica| replica.generation).max();
        let level = route.replicas.iter().filter(|replica| Some(replica.generation) == newest).count();
        if level == 3 { Ok(()) } else { Err(format!("{:?}", route.replicas)) }
    })
    .await;
    let mut now = generation(&test, PATH).await;
    let link = LinkRepositoryToObjectPoolRequest { object_pool: pool.clone(), repository: repository() };
    for _ in 0..2 {
        pools().link_repository_to_object_pool(request(link.clone(), "link")).await.unwrap();
        level(&test, PATH, &mut now, 1, "linked").await;
    }
    let linked = GetObjectPoolRequest { repository: repository() };
    let linked = pools().get_object_pool(request(linked, "get")).await.unwrap().into_inner().object_pool;
    assert_eq!(linked, pool);

    git.run("source", &["push", "--quiet", "--delete", &test.url(HOME, 0, PATH), "other"]).await;
    now = generation(&test, PATH).await;
    let mut pooled = generation(&test, POOL).await;
    let into = FetchIntoObjectPoolRequest { origin: repository(), object_pool: pool };
    for _ in 0..2 {
        pools().fetch_into_object_pool(request(into.clone(), "into")).await.unwrap();
        level(&test, POOL, &mut pooled, 1, "fetched into the pool").await;
    }
    let disconnect = DisconnectGitAlternatesRequest { repository: repository() };
    for _ in 0..2 {
        pools().disconnect_git_alternates(request(disconnect.clone(), "disconnect")).await.unwrap();
        level(&test, PATH, &mut now, 1, "disconnected").await;
    }
    for gateway in 0..2 {
        let refs = git.run(".", &["ls-remote", &test.url(HOME, gateway, PATH), "refs/heads/main"]).await;
        assert!(refs.starts_with(&main), "{refs}");
    }
    test.stop().await.unwrap();
}
