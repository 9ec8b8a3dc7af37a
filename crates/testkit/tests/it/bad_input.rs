//! What no well-behaved client sends, through gateways and routers into real nodes: the error that Gitaly's clients
//! expect, nothing left on disk or in the process table, and a log line under the client's own correlation id.

use std::{collections::BTreeSet, fs};

use bytes::Bytes;
use futures::future::join_all;
use tabularium_proto::gitaly::{
    CreateRepositoryRequest, RepositoryExistsRequest, repository_service_client::RepositoryServiceClient,
};
use tabularium_testkit::{
    cluster::{Signed, TestCluster, VIRTUAL_STORAGE, local_cluster::HOME, service::Kind},
    git::GitClient,
    wait::wait_until,
};
use tonic::Code;

use crate::{
    raw::{field, http, repository, stream, unary},
    support::{
        Disks, FOLLOW, PACK_BYTES, SOON, equal_replicas, git_processes, home_only, incompressible,
        kill_group, logged, must_git, named, no_open_writes, node, open_writes, primary, read_ref, request,
        router, spawn_git, start, under_way, within,
    },
};

const LIST_REFS: &str = "/gitaly.RefService/ListRefs";
const WRITE_REF: &str = "/gitaly.RepositoryService/WriteRef";
const RECEIVE_PACK: &str = "/gitaly.SmartHTTPService/PostReceivePack";
const CREATE: &str = "/gitaly.RepositoryService/CreateRepository";
const SIZE: &str = "/gitaly.RepositoryService/RepositorySize";

fn refused(code: Code, text: &str) -> (Code, String) {
    (code, text.to_owned())
}

/// A small repository `a/b.git`, equal everywhere.
async fn with_a_repository(test: &TestCluster, git: &GitClient) -> Disks {
    git.work_tree("source", 1).await;
    test.create("a/b.git").await;
    must_git(git, "source", &["push", "--quiet", &test.url(HOME, 0, "a/b.git"), "main"]).await;
    equal_replicas(test, "a/b.git").await;
    Disks::of(test, "a/b.git").await
}

async fn nothing_happened(test: &TestCluster, disks: &Disks, checksum: &str) {
    no_open_writes(test, SOON).await;
    equal_replicas(test, "a/b.git").await;
    disks.clean(test).await;
    assert_eq!(test.equal_checksums("a/b.git", 3).await.unwrap(), checksum);
}

#[tokio::test]
async fn names_and_messages_that_mean_nothing() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let disks = with_a_repository(&test, &git).await;
    let checksum = test.equal_checksums("a/b.git", 3).await.unwrap();
    let router = router(&test, 0);

    let escapes = "relative path escapes root directory";
    let target = |storage: &str, path: &str| field(1, &repository(storage, path));
    let cut = |message: Vec<u8>| message[..message.len() - 1].to_vec();
    // The revision is a number, which only the node can see.
    let wrong_type = [target("default", "a/b.git"), vec![3 << 3, 1]].concat();
    let mut cases = vec![
        (WRITE_REF, vec![], refused(Code::InvalidArgument, "repository not set")),
        (LIST_REFS, target("", "a/b.git"), refused(Code::InvalidArgument, "storage name not set")),
        (LIST_REFS, target("default", ""), refused(Code::InvalidArgument, "repository path not set")),
        (LIST_REFS, target("default", "a/none.git"), refused(Code::NotFound, "repository not found")),
        (WRITE_REF, target("default", "a/none.git"), refused(Code::NotFound, "repository not found")),
        (RECEIVE_PACK, target("default", "a/none.git"), refused(Code::NotFound, "repository not found")),
        (
            CREATE,
            target("default", "a/b.git"),
            refused(
                Code::AlreadyExists,
                "route repository creation: reserve repository id: repository already exists",
            ),
        ),
        (
            "/gitaly.RefService/Nonsense",
            target("default", "a/b.git"),
            refused(Code::Internal, "full method name not found: /gitaly.RefService/Nonsense"),
        ),
        (
            "/gitaly.NonsenseService/ListRefs",
            target("default", "a/b.git"),
            refused(Code::Internal, "full method name not found: /gitaly.NonsenseService/ListRefs"),
        ),
        (
            "/other.Service/Method",
            target("default", "a/b.git"),
            refused(Code::Internal, "full method name not found: /other.Service/Method"),
        ),
        (
            LIST_REFS,
            cut(target("default", "a/b.git")),
            refused(Code::InvalidArgument, "malformed request message: unexpected end"),
        ),
        (
            RECEIVE_PACK,
            cut(target("default", "a/b.git")),
            refused(Code::InvalidArgument, "malformed request message: unexpected end"),
        ),
        (
            CREATE,
            vec![0xff; 20],
            refused(Code::InvalidArgument, "malformed request message: varint too long"),
        ),
    ];
    for method in [LIST_REFS, WRITE_REF, RECEIVE_PACK, CREATE] {
        let unknown = refused(Code::InvalidArgument, "storage name not found");
        cases.push((method, target("nowhere", "a/b.git"), unknown));
        cases.push((method, target("default", "../../etc"), refused(Code::InvalidArgument, escapes)));
        cases.push((method, target("default", "a/../../b.git"), refused(Code::InvalidArgument, escapes)));
    }
    for (number, (method, message, expected)) in cases.into_iter().enumerate() {
        let id = format!("bad-name-{number}-of-test");
        let said = unary(&router, method, &message, &id).await;
        assert_eq!(said, expected, "{id} {method} {:?}", String::from_utf8_lossy(&message));
        let line = logged(&test, Kind::Router, &id).await;
        assert!(line.contains("grpc_code="), "{line}");
    }
    assert_eq!(open_writes(&test).await, 0);

    // Well-formed for the router, and nonsense for the node.
    for method in [LIST_REFS, WRITE_REF] {
        let id = format!("bad-field-{}-of-test", method.len());
        let (code, text) = unary(&router, method, &wrong_type, &id).await;
        assert!(matches!(code, Code::Internal | Code::InvalidArgument), "{method}: {code:?} {text}");
        for kind in [Kind::Router, Kind::Node] {
            logged(&test, kind, &id).await;
        }
    }
    nothing_happened(&test, &disks, &checksum).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

/// A node trusts no router to have looked.
#[tokio::test]
async fn a_node_refuses_by_itself_and_a_gateway_says_so_to_people() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let disks = with_a_repository(&test, &git).await;
    let checksum = test.equal_checksums("a/b.git", 3).await.unwrap();
    let first = node(&test, "node-1");
    let target = |storage: &str, path: &str| field(1, &repository(storage, path));
    let cases = [
        (target("node-2", "a.git"), refused(Code::InvalidArgument, "storage name not found")),
        (
            target("node-1", "../node-2/storage"),
            refused(Code::InvalidArgument, "relative path escapes root directory"),
        ),
        (target("node-1", "a/none.git"), refused(Code::NotFound, "repository not found")),
        (target("node-1", ""), refused(Code::InvalidArgument, "repository path not set")),
        (vec![], refused(Code::InvalidArgument, "repository not set")),
    ];
    for (number, (message, expected)) in cases.into_iter().enumerate() {
        for method in [SIZE, WRITE_REF] {
            let id = format!("bad-at-node-{number}-of-test");
            let said = unary(&first, method, &message, &id).await;
            // What WriteRef misses first is up to it.
            assert_eq!(said.0, expected.0, "{method}: {}", said.1);
            assert!(method != SIZE || said == expected, "{said:?} instead of {expected:?}");
            logged(&test, Kind::Node, &id).await;
        }
    }
    let nonsense = unary(&first, "/gitaly.RefService/Nonsense", b"", "bad-at-node-method").await;
    assert_eq!(nonsense.0, Code::Unimplemented);

    let gateway = test.home().urls(Kind::Gateway)[0].clone();
    let cases = [
        ("GET /a/none.git/info/refs?service=git-upload-pack", 404, "repository 'a/none' not found"),
        ("GET /a/none.git/info/refs?service=git-receive-pack", 404, "repository 'a/none' not found"),
        (
            "GET /%2e%2e/%2e%2e/etc.git/info/refs?service=git-upload-pack",
            400,
            "relative path escapes root directory",
        ),
        ("GET /a/../../b.git/info/refs?service=git-upload-pack", 400, "relative path escapes root directory"),
        ("GET /a/b.git/info/refs?service=git-nonsense", 403, "git-nonsense"),
        ("PUT /a/b.git/git-receive-pack", 405, "POST"),
    ];
    for (number, (head, status, text)) in cases.into_iter().enumerate() {
        let id = format!("bad-at-gateway-{number}-of-test");
        let (code, said) = http(&gateway, head, &format!("X-Gitlab-Correlation-Id: {id}\r\n"), b"").await;
        assert!(code == status && said.contains(text), "{head}: {code} {said}");
        logged(&test, Kind::Gateway, &id).await;
    }
    nothing_happened(&test, &disks, &checksum).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn oversized_metadata_harms_nobody_else() {
    let (test, _logs) = start(home_only).await;
    test.create("a/b.git").await;
    let client = |signed: &Signed| RepositoryServiceClient::new(signed.clone());
    let exists = |bytes: usize, id: &str| {
        let message = RepositoryExistsRequest { repository: named(VIRTUAL_STORAGE, "a/b.git") };
        let mut request = request(message, id);
        request.metadata_mut().insert("x-large", "x".repeat(bytes).parse().unwrap());
        request
    };
    let router = router(&test, 0);
    // What Gitaly's clients do send.
    let large = client(&router).repository_exists(exists(40 << 10, "large-metadata-of-test")).await.unwrap();
    assert!(large.into_inner().exists);
    let read = read_ref(&router, "a/b.git", "refs/heads/main").await.unwrap();
    assert_eq!(read, None);
    // On one connection with the others: theirs go on.
    let (mut good, mut bad) = (client(&router), client(&router));
    for _ in 0..5 {
        let (refused, served) = within("large and small side by side", SOON, async {
            tokio::join!(
                bad.repository_exists(exists(200 << 10, "oversized-metadata-of-test")),
                good.repository_exists(exists(1, "small-metadata-of-test"))
            )
        })
        .await;
        let status = refused.expect_err("more metadata than is taken");
        assert!(!matches!(status.code(), Code::DeadlineExceeded | Code::Ok), "{status:?}");
        assert!(served.unwrap().into_inner().exists);
    }
    let gateway = test.home().urls(Kind::Gateway)[0].clone();
    let head = "GET /a/b.git/info/refs?service=git-upload-pack";
    let (status, _) = http(&gateway, head, &format!("x-large: {}\r\n", "x".repeat(1 << 20)), b"").await;
    assert_eq!(status, 431);
    let (status, said) = http(&gateway, head, "", b"").await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(open_writes(&test).await, 0);
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn two_routers_create_one_name_at_once() {
    const NAMES: usize = 8;
    let (test, _logs) = start(home_only).await;
    let routers = [router(&test, 0), router(&test, 1)];
    let create = |through: &Signed, path: &str, id: &str| {
        let mut client = RepositoryServiceClient::new(through.clone());
        let message =
            CreateRepositoryRequest { repository: named(VIRTUAL_STORAGE, path), ..Default::default() };
        let request = request(message, id);
        async move { within("creating", SOON, client.create_repository(request)).await }
    };
    for number in 0..NAMES {
        let path = format!("same/{number}.git");
        let ids = [0, 1, 0, 1].map(|index| format!("create-{number}-{index}-of-test"));
        let racing = ids.iter().enumerate().map(|(index, id)| create(&routers[index % 2], &path, id));
        let results = join_all(racing).await;
        let won = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(won, 1, "{results:?}");
        for status in results.into_iter().filter_map(Result::err) {
            let said = (status.code(), status.message().to_owned());
            let text = "route repository creation: reserve repository id: repository already exists";
            assert_eq!(said, refused(Code::AlreadyExists, text));
        }
        for id in ids {
            logged(&test, Kind::Router, &id).await;
        }
    }
    let mut kept = BTreeSet::new();
    for number in 0..NAMES {
        let path = format!("same/{number}.git");
        equal_replicas(&test, &path).await;
        kept.insert(test.details(&path).await.unwrap().route.unwrap().replica_path);
    }
    no_open_writes(&test, SOON).await;
    for node in test.home().of(Kind::Node) {
        let root = node.storage.clone().unwrap();
        wait_until("one repository per name on disk", FOLLOW, || async {
            let on_disk = repositories_below(&root, &root);
            if on_disk == kept { Ok(()) } else { Err(format!("{}: {on_disk:?}, not {kept:?}", node.name)) }
        })
        .await;
    }
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

/// Paths, below the root, of directories with a `HEAD`.
fn repositories_below(root: &std::path::Path, directory: &std::path::Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let directories = entries.filter(|path| path.is_dir() && !path.ends_with("+gitaly"));
    directories
        .flat_map(|path| {
            if path.join("HEAD").exists() {
                BTreeSet::from([path.strip_prefix(root).unwrap().to_string_lossy().into_owned()])
            } else {
                repositories_below(root, &path)
            }
        })
        .collect()
}

#[tokio::test]
async fn garbage_instead_of_packets_and_packs() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let disks = with_a_repository(&test, &git).await;
    let checksum = test.equal_checksums("a/b.git", 3).await.unwrap();
    let gateway = test.home().urls(Kind::Gateway)[0].clone();
    let zero = "0".repeat(40);
    let one = "1".repeat(40);
    let command = format!("{zero} {one} refs/heads/garbage\0report-status");
    let command = format!("{:04x}{command}0000", command.len() + 4);
    let garbage = "zzzzthis is no packet line".to_owned();
    let endless = "fff0want".to_owned();
    let want = format!("0032want {one}\n00000009done\n");
    let no_pack = format!("{command}this is no pack");
    let truncated_pack = format!("{command}PACK\0\0\0\x02\0\0\0\x05garbage");
    let mut cases = vec![
        ("receive-pack", &garbage, false),
        ("receive-pack", &endless, false),
        ("receive-pack", &no_pack, true),
        ("receive-pack", &truncated_pack, true),
        ("upload-pack", &garbage, false),
        ("upload-pack", &endless, false),
    ];
    // Git's last word and its end race each other to the client.
    cases.extend([("upload-pack", &want, true); 10]);
    for (number, (service, body, spoken)) in cases.into_iter().enumerate() {
        let id = format!("garbage-{number}-of-test");
        let headers =
            format!("content-type: application/x-git-{service}-request\r\nX-Gitlab-Correlation-Id: {id}\r\n");
        let head = format!("POST /a/b.git/git-{service}");
        let (status, said) = http(&gateway, &head, &headers, body.as_bytes()).await;
        println!("{service} {body:?}: {status} {said:?}");
        // Git answers within its protocol once it has understood the request.
        let told = said.contains("ERR ") || said.contains("unpack ") && !said.contains("unpack ok");
        assert!(if spoken { status == 200 && told } else { status >= 400 || told }, "{status} {said:?}");
        for kind in [Kind::Gateway, Kind::Router, Kind::Node] {
            logged(&test, kind, &id).await;
        }
    }
    nothing_happened(&test, &disks, &checksum).await;
    must_git(&git, "source", &["push", "--quiet", &test.url(HOME, 1, "a/b.git"), "main:refs/heads/garbage"])
        .await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}

#[tokio::test]
async fn clients_that_hang_up_in_the_middle_of_a_pack() {
    let (test, _logs) = start(home_only).await;
    let git = GitClient::new();
    let disks = with_a_repository(&test, &git).await;
    let checksum = test.equal_checksums("a/b.git", 3).await.unwrap();
    incompressible(&git, "large", PACK_BYTES).await;
    let storage = primary(&test, "a/b.git").await;
    let url = test.url(HOME, 0, "a/b.git");
    let header = |id: &str| format!("http.extraHeader=X-Gitlab-Correlation-Id: {id}");

    // A push.
    let push = ["-c", &header("hang-up-push-of-test"), "push", "--quiet", &url, "main:refs/heads/large"];
    let mut pushing = spawn_git(&git, "large", &push);
    under_way("a push", || disks.quarantines(&storage)).await;
    kill_group(&pushing);
    pushing.wait().await.unwrap();
    for kind in [Kind::Gateway, Kind::Router, Kind::Node] {
        logged(&test, kind, "hang-up-push-of-test").await;
    }
    nothing_happened(&test, &disks, &checksum).await;

    // A push by a client of the router itself, which ends its connection in the middle of its pack.
    let head = [field(1, &repository("default", "a/b.git")), field(3, b"key-1")].concat();
    let zero = "0".repeat(40);
    let command = format!("{zero} {} refs/heads/large\0report-status", "1".repeat(40));
    let command = format!("{:04x}{command}0000PACK\0\0\0\x02\0\0\0\x7f", command.len() + 4);
    let (messages, waiting) = tokio::sync::mpsc::channel(4);
    for message in [head, field(2, &command.as_bytes()[..100]), field(2, &command.as_bytes()[100..])] {
        messages.send(Bytes::from(message)).await.unwrap();
    }
    let (id, through) = ("hang-up-router-of-test", router(&test, 0));
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    // Nothing is answered before a node has said something: until then the push may begin again elsewhere.
    let mut calling = Box::pin(stream(&through, RECEIVE_PACK, waiting, id));
    let quarantined = wait_until("a quarantine", SOON, || async {
        if disks.quarantines(&storage).is_empty() { Err("none".to_owned()) } else { Ok(()) }
    });
    tokio::select! {
        answered = &mut calling => panic!("half a push was answered: {}", answered.is_ok()),
        () = quarantined => {}
    }
    drop((calling, messages));
    for kind in [Kind::Router, Kind::Node] {
        logged(&test, kind, id).await;
    }
    nothing_happened(&test, &disks, &checksum).await;

    // A clone.
    must_git(&git, "large", &["push", "--quiet", &url, "main:refs/heads/large"]).await;
    let clone = ["-c", &header("hang-up-clone-of-test"), "clone", "--quiet", "--mirror", &url, "clone"];
    let mut cloning = spawn_git(&git, ".", &clone);
    let packs = git.path("clone").join("objects/pack");
    under_way("a clone", || vec![packs.clone()]).await;
    assert!(!git_processes(test.cluster.state_directory()).is_empty());
    kill_group(&cloning);
    cloning.wait().await.unwrap();
    for kind in [Kind::Gateway, Kind::Node] {
        logged(&test, kind, "hang-up-clone-of-test").await;
    }
    equal_replicas(&test, "a/b.git").await;
    disks.clean(&test).await;
    within("a stop", FOLLOW, test.cluster.stop()).await.unwrap();
}
