//! ObjectPoolService: pools lend their members objects, and lose none.

use std::{fs, path::Path};

use tabularium_proto::gitaly::{
    CreateObjectPoolRequest, DisconnectGitAlternatesRequest, FetchIntoObjectPoolRequest,
    GetObjectPoolRequest, LinkRepositoryToObjectPoolRequest, ObjectPool, OptimizeRepositoryRequest,
    PruneUnreachableObjectsRequest, RemoveRepositoryRequest, Repository,
    object_pool_service_client::ObjectPoolServiceClient, optimize_repository_request::Strategy,
};
use tonic::{Code, Status};

use crate::{
    harness::{Client, TestNode, commit, git, git_command},
    seed::{self, id, invalid, refusal},
};

pub(crate) const POOL: &str = "@cluster/pools/6b/86/17";

pub(crate) fn pools(node: &TestNode) -> ObjectPoolServiceClient<Client> {
    ObjectPoolServiceClient::new(node.channel())
}

pub(crate) fn pool(node: &TestNode) -> ObjectPool {
    ObjectPool { repository: Some(node.named(POOL)) }
}

pub(crate) async fn create(node: &TestNode, origin: &Repository) -> Result<(), Status> {
    let request = CreateObjectPoolRequest { object_pool: Some(pool(node)), origin: Some(origin.clone()) };
    pools(node).create_object_pool(request).await.map(drop)
}

pub(crate) async fn link(node: &TestNode, member: &Repository) -> Result<(), Status> {
    let request =
        LinkRepositoryToObjectPoolRequest { object_pool: Some(pool(node)), repository: Some(member.clone()) };
    pools(node).link_repository_to_object_pool(request).await.map(drop)
}

async fn fetch(node: &TestNode, origin: &Repository) -> Result<(), Status> {
    let request = FetchIntoObjectPoolRequest { origin: Some(origin.clone()), object_pool: Some(pool(node)) };
    pools(node).fetch_into_object_pool(request).await.map(drop)
}

async fn disconnect(node: &TestNode, member: &Repository) -> Result<(), Status> {
    let request = DisconnectGitAlternatesRequest { repository: Some(member.clone()) };
    pools(node).disconnect_git_alternates(request).await.map(drop)
}

async fn pool_of(node: &TestNode, member: &Repository) -> Option<String> {
    let request = GetObjectPoolRequest { repository: Some(member.clone()) };
    let pool = pools(node).get_object_pool(request).await.unwrap().into_inner().object_pool;
    pool.map(|pool| pool.repository.unwrap().relative_path)
}

fn alternates(node: &TestNode, member: &str) -> Option<String> {
    fs::read_to_string(node.path(member).join("objects/info/alternates")).ok()
}

fn has(repository: &Path, object: &str) -> bool {
    git_command(repository).args(["cat-file", "-e", object]).status().unwrap().success()
}

async fn repack(node: &TestNode, repository: &Repository) {
    let request =
        OptimizeRepositoryRequest { repository: Some(repository.clone()), strategy: Strategy::Eager.into() };
    node.repositories().optimize_repository(request).await.unwrap();
}

#[tokio::test]
async fn a_pool_lends_its_members_objects() {
    let node = TestNode::start().await;
    let origin = seed::repository(&node, "a.git").await;
    create(&node, &origin).await.unwrap();
    let path = node.path(POOL);
    assert_eq!(git(&path, &["for-each-ref"]), git(&node.path("a.git"), &["for-each-ref"]));
    assert_eq!(git(&path, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    git(&path, &["fsck", "--strict"]);
    assert_eq!(pool_of(&node, &origin).await, None);

    link(&node, &origin).await.unwrap();
    assert_eq!(alternates(&node, "a.git").unwrap(), format!("../../{POOL}/objects"));
    assert_eq!(pool_of(&node, &origin).await.as_deref(), Some(POOL));
    link(&node, &origin).await.unwrap();
    // What the pool has the member has not any more.
    repack(&node, &node.named(POOL)).await;
    repack(&node, &origin).await;
    let own = git(&node.path("a.git"), &["count-objects", "-v"]);
    assert!(own.contains("count: 0\n") && own.contains("in-pack: 0\n"), "{own}");
    git(&node.path("a.git"), &["fsck", "--strict"]);

    disconnect(&node, &origin).await.unwrap();
    assert_eq!(alternates(&node, "a.git"), None);
    assert_eq!(pool_of(&node, &origin).await, None);
    fs::remove_dir_all(&path).unwrap();
    git(&node.path("a.git"), &["fsck", "--strict"]);
    disconnect(&node, &origin).await.unwrap();
}

#[tokio::test]
async fn a_pool_follows_its_origin_and_loses_nothing() {
    let node = TestNode::start().await;
    let origin = seed::repository(&node, "a.git").await;
    let (source, path) = (node.path("a.git"), node.path(POOL));
    create(&node, &origin).await.unwrap();
    fetch(&node, &origin).await.unwrap();
    let [first, third] = ["v1", "main"].map(|name| id(&node, "a.git", name));
    assert_eq!(id(&node, POOL, "refs/remotes/origin/heads/main"), third);
    assert_eq!(git(&path, &["for-each-ref", "refs/dangling"]), "");

    // One that moves on, one that is thrown away, a tag that goes, and a name that becomes a directory.
    let thrown = commit(&source, Some(&third), "thrown away");
    git(&source, &["update-ref", "refs/heads/thrown", &thrown]);
    git(&source, &["tag", "-a", "-m", "tag", "gone", &third]);
    let tag = id(&node, "a.git", "refs/tags/gone");
    fetch(&node, &origin).await.unwrap();
    let further = commit(&source, Some(&third), "further");
    git(&source, &["update-ref", "refs/heads/main", &further]);
    for name in ["refs/heads/thrown", "refs/tags/gone"] {
        git(&source, &["update-ref", "-d", name]);
    }
    git(&source, &["update-ref", "refs/heads/thrown/more", &first]);
    fetch(&node, &origin).await.unwrap();
    assert_eq!(id(&node, POOL, "refs/remotes/origin/heads/main"), further);
    assert_eq!(id(&node, POOL, "refs/remotes/origin/heads/thrown/more"), first);
    let mut dangling = [thrown.clone(), tag.clone()];
    dangling.sort();
    assert_eq!(
        git(&path, &["for-each-ref", "--format=%(refname)", "refs/dangling"]),
        dangling.map(|id| format!("refs/dangling/{id}")).join("\n")
    );

    // Whatever upkeep does, also to what no reference holds.
    let loose = commit(&path, None, "nobody's");
    repack(&node, &node.named(POOL)).await;
    repack(&node, &node.named(POOL)).await;
    for kept in [&thrown, &tag, &loose] {
        assert!(has(&path, kept));
    }
    let prune = PruneUnreachableObjectsRequest { repository: Some(node.named(POOL)) };
    let refused = refusal(node.repositories().prune_unreachable_objects(prune).await);
    assert_eq!(refused, invalid("pruning objects for object pool"));
    git(&path, &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_pool_that_goes_gives_its_members_what_they_have_borrowed() {
    let node = TestNode::start().await;
    let origin = seed::repository(&node, "a.git").await;
    create(&node, &origin).await.unwrap();
    link(&node, &origin).await.unwrap();
    repack(&node, &origin).await;
    let gone = RemoveRepositoryRequest { repository: Some(node.named(POOL)) };
    node.repositories().remove_repository(gone).await.unwrap();
    assert!(!node.path(POOL).exists());
    assert_eq!(alternates(&node, "a.git"), None);
    git(&node.path("a.git"), &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_link_that_holds_something_is_not_cut() {
    let node = TestNode::start().await;
    let origin = seed::repository(&node, "a.git").await;
    create(&node, &origin).await.unwrap();
    link(&node, &origin).await.unwrap();
    // A reference to what neither has.
    let path = node.path("a.git");
    fs::write(path.join("refs/heads/broken"), format!("{}\n", "12".repeat(20))).unwrap();
    let (code, text) = refusal(disconnect(&node, &origin).await);
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("git connectivity error while disconnected: "), "{text}");
    assert!(alternates(&node, "a.git").is_some());
    fs::remove_file(path.join("refs/heads/broken")).unwrap();

    let internal = |text: &str| (Code::Internal, text.to_owned());
    let file = path.join("objects/info/alternates");
    fs::write(&file, "../../b.git/objects\n").unwrap();
    assert_eq!(
        refusal(link(&node, &origin).await),
        internal("unexpected alternates content: \"../../b.git/objects\"")
    );
    assert_eq!(pool_of(&node, &origin).await, None);
    assert_eq!(
        refusal(disconnect(&node, &origin).await),
        internal("alternate object entry is not a directory")
    );
    fs::write(&file, "a\nb\n").unwrap();
    assert_eq!(refusal(disconnect(&node, &origin).await), internal("multiple alternate object directories"));
    // The whole way instead of the short one: it is written anew.
    fs::write(&file, node.path(POOL).join("objects").to_str().unwrap()).unwrap();
    link(&node, &origin).await.unwrap();
    assert_eq!(alternates(&node, "a.git").unwrap(), format!("../../{POOL}/objects"));
}

#[tokio::test]
async fn what_is_no_pool() {
    let node = TestNode::start().await;
    let origin = seed::repository(&node, "a.git").await;
    let elsewhere = Some(ObjectPool { repository: Some(node.named("b.git")) });
    let nothing = Some(ObjectPool { repository: None });
    let whole = CreateObjectPoolRequest { object_pool: Some(pool(&node)), origin: Some(origin.clone()) };
    for (request, text) in [
        (CreateObjectPoolRequest { origin: None, ..whole.clone() }, "no origin repository"),
        (CreateObjectPoolRequest { object_pool: None, ..whole.clone() }, "no object pool repository"),
        (
            CreateObjectPoolRequest { object_pool: nothing.clone(), ..whole.clone() },
            "no object pool repository",
        ),
        (
            CreateObjectPoolRequest { object_pool: elsewhere.clone(), ..whole.clone() },
            "invalid object pool directory",
        ),
    ] {
        assert_eq!(refusal(pools(&node).create_object_pool(request).await), invalid(text));
    }
    let failed = |text: &str| (Code::FailedPrecondition, text.to_owned());
    let invalid_pool = "object pool is not a valid git repository";
    assert_eq!(refusal(link(&node, &origin).await), failed(invalid_pool));
    let fetched = refusal(fetch(&node, &origin).await);
    assert_eq!(fetched, invalid(&format!("object pool invalid: {invalid_pool}")));
    create(&node, &origin).await.unwrap();
    let again = refusal(create(&node, &origin).await);
    assert_eq!(again, failed("creating object pool: repository exists already"));

    let whole = LinkRepositoryToObjectPoolRequest {
        object_pool: Some(pool(&node)),
        repository: Some(origin.clone()),
    };
    for (request, text) in [
        (LinkRepositoryToObjectPoolRequest { repository: None, ..whole.clone() }, "repository not set"),
        (
            LinkRepositoryToObjectPoolRequest { object_pool: None, ..whole.clone() },
            "no object pool repository",
        ),
        (
            LinkRepositoryToObjectPoolRequest { object_pool: elsewhere.clone(), ..whole.clone() },
            "invalid object pool directory",
        ),
    ] {
        assert_eq!(refusal(pools(&node).link_repository_to_object_pool(request).await), invalid(text));
    }
    let whole = FetchIntoObjectPoolRequest { origin: Some(origin.clone()), object_pool: Some(pool(&node)) };
    let far = Repository { storage_name: "far".into(), ..origin };
    for (request, text) in [
        (FetchIntoObjectPoolRequest { origin: None, ..whole.clone() }, "origin is empty"),
        (FetchIntoObjectPoolRequest { object_pool: None, ..whole.clone() }, "object pool is empty"),
        (
            FetchIntoObjectPoolRequest { origin: Some(far), ..whole.clone() },
            "origin has different storage than object pool",
        ),
        (
            FetchIntoObjectPoolRequest { object_pool: elsewhere, ..whole.clone() },
            "object pool invalid: invalid object pool directory",
        ),
    ] {
        assert_eq!(refusal(pools(&node).fetch_into_object_pool(request).await), invalid(text));
    }
    let nothing = DisconnectGitAlternatesRequest { repository: None };
    assert_eq!(refusal(pools(&node).disconnect_git_alternates(nothing).await), invalid("repository not set"));
    let absent = GetObjectPoolRequest { repository: Some(node.named("none.git")) };
    let refused = refusal(pools(&node).get_object_pool(absent).await);
    assert_eq!(refused, (Code::NotFound, "repository not found".into()));
}
