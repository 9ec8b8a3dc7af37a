//! Pushes: the votes that git's hooks cast.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Output, Stdio},
    time::Instant,
};

use sha1::{Digest as _, Sha1};
use tabularium_proto::gitaly::{
    FetchRemoteRequest, PostReceivePackRequest, Remote, repository_service_client::RepositoryServiceClient,
    smart_http_service_client::SmartHttpServiceClient, vote_transaction_request::Phase,
};
use tabularium_proto::node::{
    ReadRecordRequest, ReplicaRecord, replica_service_client::ReplicaServiceClient,
};

use super::router::{Answer, Router, Vote};
use crate::{
    bridge,
    harness::{PATIENCE, TestNode, eventually, git, git_command},
    operations::hook,
    transport::{leftovers, processes, work_tree},
};

const POINTS: [&str; 3] =
    ["synchronize pre-receive hook", "synchronize update hook", "synchronize post-receive hook"];

async fn push(url: &str, work: &Path, arguments: &[&str]) -> Output {
    let mut command = git_command(work);
    command.args(["push", url]).args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn references(node: &TestNode) -> String {
    git(&node.path("a.git"), &["for-each-ref", "--format=%(refname)"])
}

/// A node with an empty `a.git`, and where to push it as part of a transaction.
async fn target(router: &Router, primary: bool) -> (TestNode, String) {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let url = bridge::serve_from(router.client(&node, primary), &node.storage, None).await;
    (node, format!("{url}/a.git"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_of_one_reference_is_six_votes() {
    let router = Router::agreeing();
    let (node, url) = target(&router, true).await;
    let work = work_tree(1000);
    // Of the branch that HEAD stands for git lists HEAD too.
    let pushed = push(&url, work.path(), &["main:side"]).await;
    assert!(pushed.status.success(), "{}", words(&pushed));
    let id = git(work.path(), &["rev-parse", "main"]);
    let update = format!("{} {id} refs/heads/side\n", "0".repeat(40));
    let cast: Vec<_> = router.votes(&node).into_iter().map(|vote| (vote.phase, vote.ballot)).collect();
    let about = |text: &str| Sha1::digest(text).to_vec();
    let expected = [
        (Phase::SynchronizedPhase, about(POINTS[0])),
        (Phase::SynchronizedPhase, about(POINTS[1])),
        (Phase::PreparedPhase, about(&update)),
        (Phase::CommittedPhase, about(&update)),
        (Phase::SynchronizedPhase, about(POINTS[2])),
        (Phase::CommittedPhase, vec![0; 20]),
    ];
    assert_eq!(cast, expected);
    assert_eq!(git(&node.path("a.git"), &["rev-parse", "side"]), id);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn references_are_voted_on_one_by_one_unless_they_move_together() {
    let work = work_tree(1000);
    let refspecs = ["main:a", "main:b", "main:c"];
    for (options, expected) in [(&[][..], "SSPCSPCSPCS0"), (&["--atomic"][..], "SSSSPCS0")] {
        let router = Router::agreeing();
        let (node, url) = target(&router, true).await;
        let pushed = push(&url, work.path(), &[options, &refspecs].concat()).await;
        assert!(pushed.status.success(), "{}", words(&pushed));
        assert_eq!(router.phases(&node), expected, "{options:?}");
        assert_eq!(references(&node), "refs/heads/a\nrefs/heads/b\nrefs/heads/c");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_count_once_also_when_the_reference_is_packed() {
    let router = Router::agreeing();
    let (node, url) = target(&router, true).await;
    let work = work_tree(1000);
    assert!(push(&url, work.path(), &["main:loose", "main:packed"]).await.status.success());
    let path = node.path("a.git");
    git(&path, &["pack-refs", "--all"]);
    git(&path, &["update-ref", "refs/heads/loose", "refs/heads/packed"]);
    for name in ["loose", "packed"] {
        let before = router.phases(&node).len();
        let deleted = push(&url, work.path(), &["--delete", name]).await;
        assert!(deleted.status.success(), "{}", words(&deleted));
        assert_eq!(&router.phases(&node)[before..], "SSPCS0", "{name}");
    }
    assert_eq!(references(&node), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_without_a_transaction_casts_no_votes() {
    let router = Router::agreeing();
    let (node, _) = target(&router, true).await;
    let url = format!("{}/a.git", bridge::serve(&node, None).await);
    assert!(push(&url, work_tree(1000).path(), &["main"]).await.status.success());
    assert_eq!(router.phases(&node), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_of_the_primary_refuses_for_all() {
    let router = Router::agreeing();
    let (node, url) = target(&router, true).await;
    hook(&node, "pre-receive", "cat >&2; echo not today; exit 3");
    let pushed = push(&url, work_tree(1000).path(), &["main"]).await;
    let said = words(&pushed);
    assert!(!pushed.status.success() && said.contains("remote: not today"), "{said}");
    assert!(said.contains("refs/heads/main") && said.contains("pre-receive hook declined"), "{said}");
    assert_eq!((router.stops(), router.phases(&node).as_str(), references(&node).as_str()), (1, "0", ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn own_hooks_run_on_the_primary_only() {
    let work = work_tree(1000);
    for (primary, seen) in [(true, "pre-receive update post-receive "), (false, "")] {
        let router = Router::agreeing();
        let (node, url) = target(&router, primary).await;
        let record = node.root().join("seen");
        for name in ["pre-receive", "update", "post-receive"] {
            let script =
                format!("env | grep -q TABULARIUM && exit 1; printf '%s ' {name} >> {}", record.display());
            hook(&node, name, &script);
        }
        let pushed = push(&url, work.path(), &["main"]).await;
        assert!(pushed.status.success(), "{}", words(&pushed));
        assert_eq!(fs::read_to_string(&record).unwrap_or_default(), seen);
        assert_eq!(router.phases(&node), "SSPCS0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn post_receive_runs_when_the_vote_on_it_is_answered() {
    let decided = |vote: &Vote| {
        if vote.ballot == Sha1::digest(POINTS[2]).to_vec() { Answer::Abort } else { Answer::Commit }
    };
    let router = Router::deciding(decided);
    let (node, url) = target(&router, true).await;
    let record = node.root().join("seen");
    hook(&node, "post-receive", &format!("touch {}", record.display()));
    let pushed = push(&url, work_tree(1000).path(), &["main"]).await;
    assert!(!pushed.status.success(), "the request fails: {}", words(&pushed));
    // The reference has moved; what follows from it is not set off.
    assert_eq!((references(&node).as_str(), router.phases(&node).as_str()), ("refs/heads/main", "SSPCS"));
    assert!(!record.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_reference_moves_against_the_votes() {
    for answer in [Answer::Abort, Answer::Stop] {
        for phase in [Phase::SynchronizedPhase, Phase::PreparedPhase] {
            let router =
                Router::deciding(move |vote| if vote.phase == phase { answer } else { Answer::Commit });
            let (node, url) = target(&router, false).await;
            let pushed = push(&url, work_tree(1000).path(), &["main:a", "main:b"]).await;
            assert!(!pushed.status.success(), "{answer:?} {phase:?}");
            assert_eq!(references(&node), "", "{answer:?} {phase:?}");
            assert_eq!(leftovers(&node.path("a.git")), Vec::<String>::new(), "{answer:?} {phase:?}");
            node.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_ends_when_its_router_dies() {
    for phase in [Phase::SynchronizedPhase, Phase::PreparedPhase] {
        let router =
            Router::deciding(move |vote| if vote.phase == phase { Answer::Silence } else { Answer::Commit });
        let (node, url) = target(&router, false).await;
        let work = work_tree(1000);
        let path = node.path("a.git");
        let pushing = push(&url, work.path(), &["main"]);
        let dying = async {
            eventually("a vote is pending", async || {
                router.votes(&node).last().is_some_and(|vote| vote.phase == phase)
            })
            .await;
            router.die().await;
            Instant::now()
        };
        let (pushed, died) = tokio::join!(pushing, dying);
        assert!(!pushed.status.success() && died.elapsed() < PATIENCE);
        eventually("git is gone", async || processes(&path).is_empty()).await;
        eventually("no lock is left", async || leftovers(&path).is_empty()).await;
        assert_eq!(references(&node), "");
        node.stop().await;
    }
}

/// What a node votes on when it is pushed to, and the objects it has in the end; and how it took part as a secondary.
async fn part(
    primary: bool,
    prepare: impl Fn(&TestNode),
    work: &Path,
    arguments: &[&str],
) -> ((Vec<Vote>, String), &'static str) {
    let router = Router::agreeing();
    let (node, url) = target(&router, primary).await;
    prepare(&node);
    let pushed = push(&url, work, arguments).await;
    assert!(pushed.status.success(), "{arguments:?}: {}", words(&pushed));
    let path = node.path("a.git");
    git(&path, &["fsck", "--strict", "--connectivity-only"]);
    let objects = git(&path, &["rev-list", "--all", "--objects"]);
    let votes = router.votes(&node).into_iter().map(|vote| Vote { node: String::new(), ..vote }).collect();
    eventually("nothing is left", async || {
        leftovers(&path).is_empty() && fs::read_dir(node.root().join("+gitaly/tmp")).unwrap().count() == 0
    })
    .await;
    let metrics = node.metrics().await;
    node.stop().await;
    let counted =
        |how: &&str| metrics.contains(&format!("tabularium_node_secondary_pushes_total{{how=\"{how}\"}} 1"));
    let how = ["in_process", "with_git", "run"].into_iter().find(counted).unwrap_or_default();
    let started = |subcommand| metrics.contains(&format!("subcommand=\"{subcommand}\""));
    assert!(how != "in_process" || !["unpack-objects", "rev-list"].into_iter().any(started));
    let moved_by_git = !metrics.contains("subcommand=\"update-ref\"} 1\n");
    assert!(how != "in_process" || !moved_by_git, "git is asked once how it votes");
    ((votes, objects), how)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_votes_like_the_primary_whatever_is_pushed() {
    let work = work_tree(1000);
    let many = work_tree(1000);
    for number in 0..150 {
        fs::write(many.path().join(format!("{number}")), format!("{number}")).unwrap();
    }
    git(many.path(), &["add", "."]);
    git(many.path(), &["commit", "--quiet", "-m", "more objects than are unpacked one by one"]);
    let symbolic = |node: &TestNode| {
        git(&node.path("a.git"), &["symbolic-ref", "refs/heads/other-name", "refs/heads/side"]);
    };
    let logging = |node: &TestNode| {
        git(&node.path("a.git"), &["config", "core.logAllRefUpdates", "true"]);
    };
    type Case<'a> = (&'a Path, &'a [&'a str], &'a dyn Fn(&TestNode), &'a str);
    let cases: [Case<'_>; 10] = [
        (work.path(), &["main"], &|_| {}, "in_process"),
        (work.path(), &["main:side"], &|_| {}, "in_process"),
        (work.path(), &["main:refs/heads/in/a.directory"], &|_| {}, "in_process"),
        (work.path(), &["main:refs/tags/t"], &|_| {}, "in_process"),
        (work.path(), &["main"], &logging, "with_git"),
        (many.path(), &["main"], &|_| {}, "with_git"),
        (work.path(), &["main:a", "main:b"], &|_| {}, "run"),
        (work.path(), &["--atomic", "main:a", "main:b"], &|_| {}, "run"),
        (work.path(), &["-o", "say=it", "main"], &|_| {}, "run"),
        (work.path(), &["main:other-name"], &symbolic, "run"),
    ];
    for (work, arguments, prepare, expected) in cases {
        let (primary, how) = part(true, prepare, work, arguments).await;
        assert_eq!(how, "", "{arguments:?}");
        let (secondary, how) = part(false, prepare, work, arguments).await;
        assert_eq!(primary, secondary, "{arguments:?}");
        assert_eq!(how, expected, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_moves_only_what_is_as_the_pusher_believes() {
    let router = Router::agreeing();
    let (node, url) = target(&router, false).await;
    let work = work_tree(1000);
    assert!(push(&url, work.path(), &["main"]).await.status.success());
    let first = git(work.path(), &["rev-parse", "main"]);
    git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "two"]);
    assert!(push(&url, work.path(), &["main"]).await.status.success(), "from what is there");
    let second = git(work.path(), &["rev-parse", "main"]);
    assert_ne!(first, second);
    assert_eq!(git(&node.path("a.git"), &["rev-parse", "main"]), second);
    let before = router.phases(&node).len();

    // What the client saw is not true any more when its push comes.
    let path = node.path("a.git");
    let moved = second.clone();
    let stale = Router::deciding(move |vote| {
        if vote.phase == Phase::SynchronizedPhase {
            git(&path, &["update-ref", "refs/heads/main", &first, &moved]);
        }
        Answer::Commit
    });
    let url = bridge::serve_from(stale.client(&node, false), &node.storage, None).await;
    git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "three"]);
    let pushed = push(&format!("{url}/a.git"), work.path(), &["main"]).await;
    assert!(!pushed.status.success());
    assert!(
        !router.phases(&node)[before..].contains(['P', 'C']),
        "nothing was voted on that could not be done"
    );
    eventually("no lock is left", async || leftovers(&node.path("a.git")).is_empty()).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_takes_nothing_that_leads_to_what_it_has_not() {
    let router = Router::agreeing();
    let (node, _) = target(&router, false).await;
    let work = work_tree(1000);
    git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "two"]);
    let id = git(work.path(), &["rev-parse", "main"]);
    // The pack of the second commit alone, as for a replica that has the first one.
    let mut packing = git_command(work.path());
    packing.args(["pack-objects", "--quiet", "--stdout"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut packing = packing.spawn().unwrap();
    packing.stdin.take().unwrap().write_all(format!("{id}\n").as_bytes()).unwrap();
    let pack = packing.wait_with_output().unwrap().stdout;
    let command = format!("{} {id} refs/heads/main\0 report-status", "0".repeat(40));
    let data = [format!("{:04x}{command}0000", command.len() + 4).as_bytes(), &pack].concat();
    let first = PostReceivePackRequest {
        repository: Some(node.named("a.git")),
        gl_id: "user-1".to_owned(),
        ..PostReceivePackRequest::default()
    };
    let rest = PostReceivePackRequest { data: data.into(), ..PostReceivePackRequest::default() };
    let mut client = SmartHttpServiceClient::new(router.client(&node, false));
    let pushing = async {
        let mut answer = client.post_receive_pack(futures::stream::iter([first, rest])).await?.into_inner();
        while answer.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    };
    let refused = pushing.await.unwrap_err();
    assert!(refused.message().starts_with("checking that nothing is missing"), "{refused}");
    assert_eq!((references(&node).as_str(), router.phases(&node).as_str()), ("", ""));
    node.stop().await;
}

/// The write that makes this generation.
fn write(generation: i64) -> ReplicaRecord {
    ReplicaRecord {
        repository_id: 7,
        virtual_storage: "default".to_owned(),
        relative_path: "a.git".to_owned(),
        generation,
        write_id: generation.to_string(),
        complete: true,
        ..ReplicaRecord::default()
    }
}

async fn recorded(node: &TestNode) -> Option<ReplicaRecord> {
    let request = ReadRecordRequest { repository: Some(node.named("a.git")) };
    let mut client = ReplicaServiceClient::new(node.channel());
    client.read_record(request).await.unwrap().into_inner().record
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_missed_a_write_makes_none() {
    for primary in [true, false] {
        let router = Router::agreeing();
        let (node, url) = target(&router, primary).await;
        let work = work_tree(1000);
        for generation in [2, 3] {
            router.tell(write(generation));
            git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "more"]);
            assert!(push(&url, work.path(), &["main"]).await.status.success());
            assert_eq!(recorded(&node).await.unwrap().generation, generation);
        }
        let before = git(&node.path("a.git"), &["rev-parse", "main"]);
        let voted = router.phases(&node).len();
        router.tell(write(5));
        git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "on top of what is not there"]);
        assert!(!push(&url, work.path(), &["main"]).await.status.success());
        assert!(!router.phases(&node)[voted..].contains('C'), "{}", router.phases(&node));
        assert_eq!(git(&node.path("a.git"), &["rev-parse", "main"]), before);
        assert_eq!(recorded(&node).await.unwrap().generation, 3);
        eventually("no lock is left", async || leftovers(&node.path("a.git")).is_empty()).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_brings_nothing_is_noted_as_well() {
    let router = Router::agreeing();
    let (node, _) = target(&router, true).await;
    node.create("empty.git").await;
    router.tell(write(2));
    let request = FetchRemoteRequest {
        repository: Some(node.named("a.git")),
        remote_params: Some(Remote {
            url: format!("{}/empty.git", bridge::serve(&node, None).await),
            ..Remote::default()
        }),
        ..FetchRemoteRequest::default()
    };
    let mut client = RepositoryServiceClient::new(router.client(&node, true));
    client.fetch_remote(request).await.unwrap();
    assert_eq!(router.phases(&node), "C");
    assert_eq!(recorded(&node).await.unwrap().generation, 2);
    node.stop().await;
}
