//! What gitlab-shell and other nodes ask for: fetches beside an RPC and in messages, pushes, archives.

use std::{fs, time::Duration};

use bytes::{Buf as _, Bytes};
use tabularium_common::{
    lifecycle::Tasks,
    multiplex::{
        self,
        sidechannel::{Client as Sidechannel, METADATA, SidechannelId, Sidechannels},
    },
};
use tabularium_proto::gitaly::{
    PackfileNegotiationStatistics, PostUploadPackWithSidechannelRequest, Repository, SshReceivePackRequest,
    SshUploadArchiveRequest, SshUploadPackRequest, SshUploadPackWithSidechannelRequest,
    smart_http_service_client::SmartHttpServiceClient, ssh_service_client::SshServiceClient,
};
use tonic::{Code, Request, Status, service::interceptor::InterceptedService};

use crate::{
    harness::{Caller, TestNode, eventually, git, git_async, git_command},
    operations::hook,
    ssh_bridge::{self, Bridge, Fetches, multiplexed},
    transport::{leftovers, processes, work_tree},
    voting::router::Router,
};

async fn bridge(node: &TestNode) -> Bridge {
    let (client, sidechannels) = multiplexed(node);
    ssh_bridge::serve(client, &node.storage, Fetches::Sidechannel(sidechannels)).await
}

fn well() -> ssh_bridge::End {
    (None, Code::Ok, String::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_over_ssh_is_cloned_both_ways() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let work = work_tree(3_000_000);
    git(work.path(), &["tag", "v1"]);
    let (client, sidechannels) = multiplexed(&node);
    for fetches in [Fetches::Sidechannel(sidechannels), Fetches::Messages] {
        let bridge = ssh_bridge::serve(client.clone(), &node.storage, fetches).await;
        let url = format!("{}/a.git", bridge.url);
        git_async(work.path(), &["push", "--quiet", "--force", &url, "main", "v1"]).await;
        assert_eq!(bridge.end().await, well());
        assert_eq!(
            git(&node.path("a.git"), &["rev-parse", "main"]),
            git(work.path(), &["rev-parse", "main"])
        );
        for version in ["0", "2"] {
            let clone = tempfile::tempdir().unwrap();
            let protocol = format!("protocol.version={version}");
            git_async(clone.path(), &["-c", &protocol, "clone", "--quiet", &url, "copy"]).await;
            let copied = fs::read(clone.path().join("copy/file")).unwrap();
            assert!(copied == fs::read(work.path().join("file")).unwrap(), "version {version}");
            assert_eq!(bridge.end().await, well());
            let shallow = ["-c", &protocol, "clone", "--quiet", "--depth=1", &url, "shallow"];
            git_async(clone.path(), &shallow).await;
            assert_eq!(bridge.end().await, well());
        }
        // For the next round something to push.
        git(work.path(), &["commit", "--quiet", "--allow-empty", "-m", "next"]);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_over_ssh_is_voted_on_like_any_other_and_followed_by_secondaries() {
    for primary in [true, false] {
        let router = Router::agreeing();
        let node = TestNode::start().await;
        node.create("a.git").await;
        hook(&node, "post-receive", "env | grep ^GL_ > seen");
        let client = SshServiceClient::new(router.client(&node, primary));
        let bridge = ssh_bridge::serve(client, &node.storage, Fetches::Messages).await;
        let work = work_tree(1000);
        if primary {
            let url = format!("{}/a.git", bridge.url);
            git_async(work.path(), &["push", "--quiet", &url, "main:side"]).await;
            assert_eq!(bridge.end().await, well());
            let seen = fs::read_to_string(node.path("a.git").join("seen")).unwrap();
            assert!(seen.contains("GL_PROTOCOL=ssh") && seen.contains("GL_ID=user-1"), "{seen}");
        } else {
            // A secondary hears from a router what the primary's client says to that.
            let (status, said) = said_to_a_secondary(&router, &node, work.path()).await;
            assert!(status.is_ok(), "{status:?} {said}");
            assert!(said.contains("unpack ok") && said.contains("ok refs/heads/side"), "{said}");
        }
        assert_eq!(router.phases(&node), "SSPCS0", "{primary}");
        let pushed = git(&node.path("a.git"), &["rev-parse", "side"]);
        assert_eq!(pushed, git(work.path(), &["rev-parse", "main"]));
        node.stop().await;
    }
}

async fn said_to_a_secondary(
    router: &Router,
    node: &TestNode,
    work: &std::path::Path,
) -> (Result<(), Status>, String) {
    let id = git(work, &["rev-parse", "main"]);
    let pack = git_command(work).args(["pack-objects", "--all", "--stdout", "-q"]).output().unwrap().stdout;
    let command = format!("{} {id} refs/heads/side\0report-status", "0".repeat(40));
    let stdin = [format!("{:04x}{command}0000", command.len() + 4).into_bytes(), pack].concat();
    let first = SshReceivePackRequest {
        repository: Some(node.named("a.git")),
        gl_id: "user-1".to_owned(),
        ..SshReceivePackRequest::default()
    };
    let then = SshReceivePackRequest { stdin: stdin.into(), ..SshReceivePackRequest::default() };
    let mut client = SshServiceClient::new(router.client(node, false));
    let answer = client.ssh_receive_pack(tokio_stream::iter([first, then])).await;
    let (mut said, mut messages) = (String::new(), answer.unwrap().into_inner());
    loop {
        match messages.message().await {
            Ok(None) => return (Ok(()), said),
            Ok(Some(message)) => said += &String::from_utf8_lossy(&message.stdout),
            Err(status) => return (Err(status), said),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_brings_nothing_is_no_failure_and_one_that_breaks_off_is_the_users() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let bridge = bridge(&node).await;
    let (url, work) = (format!("{}/a.git", bridge.url), work_tree(1000));
    for _ in 0..2 {
        git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
        assert_eq!(bridge.end().await, well());
    }
    let before = node.checksum(&node.named("a.git")).await;
    let first = SshReceivePackRequest {
        repository: Some(node.named("a.git")),
        gl_id: "user-1".to_owned(),
        ..SshReceivePackRequest::default()
    };
    let (mut client, _) = multiplexed(&node);
    let half = SshReceivePackRequest { stdin: Bytes::from_static(b"00"), ..SshReceivePackRequest::default() };
    let mut messages = client.ssh_receive_pack(tokio_stream::iter([first, half])).await.unwrap().into_inner();
    let (mut exit, mut stderr) = (None, Vec::new());
    let status = loop {
        match messages.message().await {
            Ok(message) => {
                let message = message.expect("a failure");
                stderr.extend_from_slice(&message.stderr);
                exit = message.exit_status.map(|status| status.value).or(exit);
            }
            Err(status) => break status,
        }
    };
    assert_eq!(exit, Some(128));
    let hung_up = stderr == b"fatal: the remote end hung up unexpectedly\n";
    let expected = if hung_up {
        (Code::Cancelled, "user canceled the push")
    } else {
        (Code::Internal, "cmd wait: exit status 128")
    };
    assert_eq!((status.code(), status.message()), expected, "{}", String::from_utf8_lossy(&stderr));
    assert_eq!(node.checksum(&node.named("a.git")).await, before);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_is_asked_for_and_what_is_not_there_is_told() {
    let node = TestNode::start().await;
    node.create("a.git").await;
    let bridge = bridge(&node).await;
    let (url, work) = (format!("{}/a.git", bridge.url), work_tree(200_000));
    git_async(work.path(), &["push", "--quiet", &url, "main"]).await;
    bridge.end().await;
    let remote = format!("--remote={url}");
    git_async(work.path(), &["archive", "--format=tar", "--output=out.tar", &remote, "main"]).await;
    assert_eq!(bridge.end().await, (Some(0), Code::Ok, String::new()));
    let archive = fs::read(work.path().join("out.tar")).unwrap();
    let file = fs::read(work.path().join("file")).unwrap();
    assert!(archive.windows(file.len()).any(|window| window == file));
    let directory = work.path().to_owned();
    let missing = tokio::task::spawn_blocking(move || {
        git_command(&directory).args(["archive", &remote, "no-such-branch"]).output().unwrap()
    });
    let missing = missing.await.unwrap();
    let said = String::from_utf8_lossy(&missing.stderr);
    assert!(!missing.status.success() && said.contains("no such ref: no-such-branch"), "{said}");
    let (exit, code, _) = bridge.end().await;
    assert!(exit.is_some() && (code == Code::Internal || exit == Some(0)), "{exit:?} {code:?}");
}

/// Talks over a sidechannel, and answers what was heard and how the RPC ended.
async fn fetch(
    node: &TestNode,
    repository: Repository,
    says: &[u8],
) -> (Vec<u8>, Result<PackfileNegotiationStatistics, Status>) {
    let sidechannels = Sidechannels::default();
    let channel = multiplex::channel(&node.address, sidechannels.clone(), &Tasks::new());
    let mut client = SmartHttpServiceClient::new(InterceptedService::new(channel, Caller::known()));
    let mut offer = sidechannels.offer().unwrap();
    let request = offering(
        PostUploadPackWithSidechannelRequest {
            repository: Some(repository),
            git_protocol: "version=2".to_owned(),
            ..Default::default()
        },
        offer.id(),
    );
    let call = ssh_bridge::spawn(async move { client.post_upload_pack_with_sidechannel(request).await });
    let opened = tokio::time::timeout(Duration::from_secs(3), offer.opened()).await;
    let mut heard = Vec::new();
    if let Ok(opened) = opened {
        let side = Sidechannel::new(opened.accept().await.unwrap());
        side.write(says).await.unwrap();
        side.finish().await.unwrap();
        while let Ok(Some(piece)) = side.read().await {
            heard.extend_from_slice(&piece);
        }
    }
    let end = call.await.unwrap();
    (heard, end.map(|answer| answer.into_inner().packfile_negotiation_statistics.unwrap()))
}

fn offering<T>(message: T, id: SidechannelId) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().as_mut().insert(METADATA, id.header());
    request
}

fn packets(lines: &[&str]) -> Vec<u8> {
    let packet = |line: &&str| match *line {
        "0000" | "0001" => (*line).to_owned(),
        line => format!("{:04x}{line}\n", line.len() + 5),
    };
    lines.iter().map(packet).collect::<String>().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_over_http_is_answered_as_git_says_it_and_counted() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let want = format!("want {}", git(&node.path("a.git"), &["rev-parse", "main"]));
    let fetch_command = ["command=fetch", "0001", "no-progress", &want, "done", "0000"];
    let (heard, counted) = fetch(&node, repository.clone(), &packets(&fetch_command)).await;
    assert!(heard.starts_with(b"000dpackfile\n"), "{}", String::from_utf8_lossy(&heard));
    assert!(heard.windows(4).any(|window| window == b"PACK") && heard.ends_with(b"0000"));
    let counted = counted.unwrap();
    assert_eq!((counted.wants, counted.haves, counted.packets), (1, 0, 4));

    // What git refuses ends the RPC; what it said of it went before.
    let nonsense =
        packets(&["command=fetch", "0001", "want 0000000000000000000000000000000000000001", "done", "0000"]);
    let (heard, ended) = fetch(&node, repository.clone(), &nonsense).await;
    assert!(String::from_utf8_lossy(&heard).contains("not our ref"));
    let status = ended.unwrap_err();
    assert!(status.message().starts_with("running upload-pack: exit status 128"), "{}", status.message());
    assert_eq!(status.code(), Code::Internal);

    let (_, ended) = fetch(&node, node.named("b.git"), b"").await;
    let status = ended.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "repository not found"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_sidechannel_there_is_no_fetch() {
    let node = TestNode::start().await;
    let repository = node.create_with_commits("a.git").await;
    let plain = || SmartHttpServiceClient::new(node.channel());
    let http = PostUploadPackWithSidechannelRequest { repository: Some(repository), ..Default::default() };
    let ssh = SshUploadPackWithSidechannelRequest {
        repository: Some(node.named("none.git")),
        ..Default::default()
    };
    let id = Sidechannels::default().offer().unwrap().id();
    let told = |status: Status| (status.code(), status.message().to_owned());
    let expected = |text: &str| (Code::Internal, text.to_owned());

    let status = plain().post_upload_pack_with_sidechannel(http.clone()).await.unwrap_err();
    let text = "open sidechannel: sidechannel: sidechannel-id not found in incoming metadata";
    assert_eq!(told(status), expected(text));
    let status = plain().post_upload_pack_with_sidechannel(offering(http, id)).await.unwrap_err();
    let text = "open sidechannel: sidechannel: fail to extract yamux session: cannot get yamux session";
    assert_eq!(told(status), expected(text));
    // It is opened before the repository is looked for.
    let (mut client, _) = multiplexed(&node);
    let status = client.ssh_upload_pack_with_sidechannel(offering(ssh, id)).await.unwrap_err();
    let text = "opennig sidechannel: sidechannel: receive confirmation: EOF";
    assert_eq!(told(status), expected(text));
}

#[tokio::test(flavor = "multi_thread")]
async fn first_messages_are_checked_as_gitaly_does() {
    let node = TestNode::start().await;
    let repository = Some(node.create("a.git").await);
    let mut client = SshServiceClient::new(node.channel());
    let stdin = Bytes::from_static(b"x");
    let told = |status: Status| (status.code(), status.message().to_owned());
    let invalid = |text: &str| (Code::InvalidArgument, text.to_owned());

    let push = SshReceivePackRequest { repository: repository.clone(), ..Default::default() };
    let status = client.ssh_receive_pack(tokio_stream::iter([push.clone()])).await.unwrap_err();
    assert_eq!(told(status), invalid("empty GlId"));
    let push = SshReceivePackRequest { gl_id: "user-1".to_owned(), stdin: stdin.clone(), ..push };
    let status = client.ssh_receive_pack(tokio_stream::iter([push.clone()])).await.unwrap_err();
    assert_eq!(told(status), invalid("non-empty data in first request"));
    let push = SshReceivePackRequest { repository: None, stdin: Bytes::new(), ..push };
    let status = client.ssh_receive_pack(tokio_stream::iter([push])).await.unwrap_err();
    assert_eq!(told(status), invalid("repository not set"));

    let archive = SshUploadArchiveRequest { repository: repository.clone(), stdin: stdin.clone() };
    let status = client.ssh_upload_archive(tokio_stream::iter([archive])).await.unwrap_err();
    assert_eq!(told(status), invalid("non-empty stdin in first request"));
    let fetch = SshUploadPackRequest { repository: repository.clone(), stdin, ..Default::default() };
    let status = client.ssh_upload_pack(tokio_stream::iter([fetch])).await.unwrap_err();
    assert_eq!(told(status), invalid("non-empty stdin in first request"));
    let fetch = SshUploadPackRequest {
        repository,
        git_config_options: vec!["core.sshCommand=x".to_owned()],
        ..Default::default()
    };
    let status = client.ssh_upload_pack(tokio_stream::iter([fetch])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let nowhere = SshUploadPackRequest { repository: Some(node.named("b.git")), ..Default::default() };
    let status = client.ssh_upload_pack(tokio_stream::iter([nowhere])).await.unwrap_err();
    assert_eq!(told(status), (Code::NotFound, "repository not found".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_git_with_it() {
    let node = TestNode::start().await;
    node.create_with_commits("a.git").await;
    for whole in [true, false] {
        let (mut client, sidechannels) = multiplexed(&node);
        let mut offer = sidechannels.offer().unwrap();
        let message = SshUploadPackWithSidechannelRequest {
            repository: Some(node.named("a.git")),
            ..Default::default()
        };
        let request = offering(message, offer.id());
        let call = ssh_bridge::spawn(async move { client.ssh_upload_pack_with_sidechannel(request).await });
        let side = Sidechannel::new(offer.opened().await.accept().await.unwrap());
        let mut advertised = side.read().await.unwrap().unwrap();
        // Packets of band 1, git's own within them.
        assert_eq!(advertised.split_to(5)[4], 1);
        assert!(advertised.remaining() > 100);
        assert_eq!(processes(&node.path("a.git")).len(), 1);
        if whole {
            call.abort();
        } else {
            drop(side);
            let status = call.await.unwrap().unwrap_err();
            let expected = (Code::Cancelled, "running upload-pack: user canceled the request");
            assert_eq!((status.code(), status.message()), expected);
        }
        eventually("git has ended", async || processes(&node.path("a.git")).is_empty()).await;
    }
    assert_eq!(leftovers(&node.path("a.git")), [""; 0]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fetch_between_nodes_takes_a_sidechannel() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use prost::Message as _;
    let node = TestNode::start().await;
    node.create_with_commits("a.git").await;
    git(&node.path("a.git"), &["update-ref", "refs/keep-around/1", "refs/heads/side"]);
    let directory = tempfile::tempdir().unwrap();
    for (transport, refs) in [("sidechannel", "all"), ("messages", "visible")] {
        let mut command = git_command(directory.path());
        command
            .args(["clone", "--quiet", "--mirror", "ssh://gitaly/internal.git", transport])
            .env("GIT_SSH_VARIANT", "simple")
            .env("GIT_SSH_COMMAND", format!("'{}' fetch-proxy", env!("CARGO_BIN_EXE_tabularium-node")))
            .env("TABULARIUM_FETCH_ADDRESS", node.address.to_string())
            .env("TABULARIUM_FETCH_TOKEN", crate::harness::TOKEN)
            .env("TABULARIUM_FETCH_REPOSITORY", STANDARD.encode(node.named("a.git").encode_to_vec()))
            .env("TABULARIUM_FETCH_REFS", refs)
            .env("TABULARIUM_FETCH_TRANSPORT", transport);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let listed = git(&directory.path().join(transport), &["for-each-ref", "--format=%(refname)"]);
        assert_eq!(listed.contains("refs/keep-around/1"), refs == "all", "{listed}");
        assert!(listed.contains("refs/heads/main"));
    }
    let metrics = node.metrics().await;
    let served = |method: &str| metrics.lines().any(|line| line.contains(method) && !line.ends_with(" 0"));
    assert!(served("SSHUploadPackWithSidechannel") && served("UploadPack\""), "{metrics}");
}
