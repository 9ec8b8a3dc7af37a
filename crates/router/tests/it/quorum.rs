//! Writes on which the nodes vote.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use tabularium_proto::{
    coordinator::abort_write_request::Outcome,
    gitaly::{
        PostReceivePackRequest, UserSquashRequest, WriteRefRequest, WriteRefResponse,
        operation_service_client::OperationServiceClient, ref_transaction_client::RefTransactionClient,
        repository_service_client::RepositoryServiceClient, vote_transaction_response::TransactionState,
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, client::Grpc};

use crate::{
    house::{House, Raw, repository, soon, until},
    voter::{Play, Told},
};

/// Three nodes, of which two must agree.
pub(crate) async fn house() -> House {
    House::with("workers = 1\n", |coordinator| coordinator.state().quorum = 2).await
}

pub(crate) async fn update(house: &House) -> Result<Response<WriteRefResponse>, Status> {
    let request = WriteRefRequest { repository: repository(), r#ref: b"HEAD".to_vec(), ..Default::default() };
    let mut request = Request::new(request);
    request.metadata_mut().insert("x-votes", "update".parse().unwrap());
    soon(RepositoryServiceClient::new(house.channel.clone()).write_ref(request)).await
}

pub(crate) fn chunk(size: usize) -> Bytes {
    let data = Bytes::from(vec![7; size]);
    Bytes::from(PostReceivePackRequest { data, ..Default::default() }.encode_to_vec())
}

pub(crate) fn opening() -> Bytes {
    let first = PostReceivePackRequest { repository: repository(), ..Default::default() };
    Bytes::from(first.encode_to_vec())
}

/// Pushes, and answers how it ended.
pub(crate) async fn push_of(
    house: &House,
    messages: impl futures::Stream<Item = Bytes> + Send + 'static,
) -> Result<(), Status> {
    let mut grpc = Grpc::new(house.channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(messages);
    request.metadata_mut().insert("x-votes", "push".parse().unwrap());
    let path = "/gitaly.SmartHTTPService/PostReceivePack".parse().unwrap();
    let mut answer = grpc.streaming(request, path, Raw).await?.into_inner();
    while let Some(message) = answer.next().await {
        message?;
    }
    Ok(())
}

pub(crate) async fn push(house: &House) -> Result<(), Status> {
    soon(push_of(house, futures::stream::iter([opening(), chunk(100)]))).await
}

pub(crate) fn play(house: &House, node: usize, play: Play) {
    *house.nodes[node].0.play.lock().unwrap() = play;
}

pub(crate) fn committed(house: &House) -> Vec<Vec<String>> {
    let commits = house.coordinator.state().commits.clone();
    commits
        .into_iter()
        .map(|mut commit| {
            assert!(!commit.unvoted);
            commit.committed_storages.sort();
            commit.committed_storages
        })
        .collect()
}

pub(crate) fn outcomes(house: &House) -> Vec<Outcome> {
    house
        .coordinator
        .state()
        .aborts
        .iter()
        .map(tabularium_proto::coordinator::AbortWriteRequest::outcome)
        .collect()
}

#[tokio::test]
async fn three_nodes_that_agree_have_the_push_and_the_ticket_is_taken_at_the_vote() {
    let house = house().await;
    push(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2", "node-3"]]);
    for node in &house.nodes {
        until("every vote is answered", async || node.commits() == 6).await;
    }
    let state = house.coordinator.state();
    let asked = state.begins[0].asked_nodes.as_ref().unwrap();
    assert_eq!((&asked.primary[..], asked.epoch), ("node-1", 1));
    assert_eq!(asked.storages, ["node-1", "node-2", "node-3"]);
    assert!(state.aborts.is_empty());
}

#[tokio::test]
async fn an_update_has_its_ticket_before_a_node_is_asked() {
    let house = house().await;
    update(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2", "node-3"]]);
    assert!(house.coordinator.state().begins[0].asked_nodes.is_none());
    for node in &house.nodes {
        let seen = node.seen("WriteRef");
        let request = WriteRefRequest::decode(&seen[0].message[..]).unwrap();
        assert_eq!(request.repository.unwrap().storage_name, node.0.storage);
    }
}

#[tokio::test]
async fn the_hooks_after_a_push_wait_for_its_record() {
    let house = house().await;
    house.coordinator.commits_allowed().acquire_many(1_000_000).await.unwrap().forget();
    let mut pending = std::pin::pin!(push(&house));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut pending).await;
    assert!(early.is_err());
    assert!(house.nodes.iter().all(|node| node.commits() == 4), "changed, and not told of it");
    house.coordinator.commits_allowed().add_permits(1);
    pending.await.unwrap();
}

#[tokio::test]
async fn a_node_of_another_mind_is_left_behind() {
    let house = house().await;
    play(&house, 2, Play { differs: Some(2), ..Play::default() });
    push(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2"]]);
    assert_eq!(house.nodes[2].commits(), 2);
}

#[tokio::test]
async fn without_a_quorum_nothing_is_changed() {
    let house = house().await;
    play(&house, 1, Play { differs: Some(0), ..Play::default() });
    play(&house, 2, Play { differs: Some(0), ..Play::default() });
    assert_eq!(update(&house).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(outcomes(&house), [Outcome::NotApplied]);
    assert!(house.nodes.iter().all(|node| node.commits() == 0));
    play(&house, 1, Play { differs: Some(2), ..Play::default() });
    play(&house, 2, Play { differs: Some(2), ..Play::default() });
    assert_eq!(push(&house).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(outcomes(&house), [Outcome::NotApplied, Outcome::NotApplied]);
}

#[tokio::test]
async fn a_node_that_stalls_is_left_behind_and_told_nothing_later() {
    for at in [0, 2, 3, 4] {
        let house = house().await;
        play(&house, 2, Play { stalls: Some(at), ..Play::default() });
        let started = Instant::now();
        push(&house).await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(3), "{at}: {:?}", started.elapsed());
        // Whoever has changed its refs has the write, whatever it does then.
        let expected = if at == 4 { vec!["node-1", "node-2", "node-3"] } else { vec!["node-1", "node-2"] };
        assert_eq!(committed(&house), [expected], "{at}");
    }
}

#[tokio::test]
async fn a_slow_node_holds_up_writes_less_and_less() {
    let house = house().await;
    play(&house, 2, Play { delay: Duration::from_millis(200), ..Play::default() });
    for _ in 0..6 {
        push(&house).await.unwrap();
    }
    let started = Instant::now();
    push(&house).await.unwrap();
    let slow = started.elapsed();
    assert!(slow < Duration::from_millis(150), "{slow:?}");
    assert_eq!(committed(&house).last().unwrap(), &["node-1", "node-2"]);
}

#[tokio::test]
async fn a_secondary_that_dies_does_not_matter() {
    for at in 0..6 {
        let house = house().await;
        play(&house, 1, Play { dies: Some(at), ..Play::default() });
        push(&house).await.unwrap();
        // Its part failed before the record, so that what it holds is looked at again; afterwards that is too late.
        let has_it = at == 5;
        assert_eq!(committed(&house)[0].contains(&"node-2".to_owned()), has_it, "{at}");
    }
}

#[tokio::test]
async fn a_primary_that_dies_before_it_may_change_anything_is_a_pause() {
    for at in [0, 1, 2] {
        let house = house().await;
        play(&house, 0, Play { dies: Some(at), ..Play::default() });
        push(&house).await.unwrap_or_else(|status| panic!("{at}: {status}"));
        assert_eq!(committed(&house), [["node-2", "node-3"]], "{at}");
        assert!(outcomes(&house).iter().all(|outcome| *outcome == Outcome::NotApplied));
    }
    for at in [0] {
        let house = house().await;
        play(&house, 0, Play { dies: Some(at), ..Play::default() });
        update(&house).await.unwrap_or_else(|status| panic!("{at}: {status}"));
        assert_eq!(committed(&house), [["node-2", "node-3"]], "{at}");
    }
}

#[tokio::test]
async fn a_primary_that_is_dead_from_the_start_is_a_pause() {
    let house = house().await;
    house.nodes[0].kill();
    push(&house).await.unwrap();
    update(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-2", "node-3"], ["node-2", "node-3"]]);
}

#[tokio::test]
async fn a_primary_that_dies_while_refs_change_does_not_take_the_write_along() {
    for at in [3, 4] {
        let house = house().await;
        play(&house, 0, Play { dies: Some(at), ..Play::default() });
        let status = push(&house).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        let with_primary = at == 4;
        assert_eq!(committed(&house)[0].contains(&"node-1".to_owned()), with_primary, "{at}");
        assert!(committed(&house)[0].len() >= 2);
    }
}

#[tokio::test]
async fn when_nobody_says_whether_it_changed_anything_it_is_in_doubt() {
    let house = house().await;
    for node in 0..3 {
        play(&house, node, Play { dies: Some(3), ..Play::default() });
    }
    assert_eq!(push(&house).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
}

#[tokio::test]
async fn a_route_that_is_out_of_date_is_a_pause() {
    let house = house().await;
    house.coordinator.state().outdated = 2;
    push(&house).await.unwrap();
    assert_eq!(committed(&house).len(), 1);
    assert_eq!(house.coordinator.state().begins.len(), 3);
}

#[tokio::test]
async fn pushes_to_one_repository_take_turns() {
    let house = house().await;
    let pushes = futures::future::join_all((0..20).map(|_| push(&house))).await;
    assert!(pushes.into_iter().all(|push| push.is_ok()));
    assert_eq!(house.coordinator.state().most_tickets, 1);
    assert_eq!(committed(&house).len(), 20);
    assert!(committed(&house).iter().all(|storages| storages.len() >= 2));
}

/// Opens a push whose stream stays open.
fn open_push(
    house: &House,
) -> (tokio::sync::mpsc::Sender<Bytes>, tokio::task::JoinHandle<Result<(), Status>>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let channel = house.channel.clone();
    let push = house.tasks.spawn("push", async move {
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.unwrap();
        let mut request = Request::new(ReceiverStream::new(receiver));
        request.metadata_mut().insert("x-votes", "push".parse().unwrap());
        let path = "/gitaly.SmartHTTPService/PostReceivePack".parse().unwrap();
        let mut answer = grpc.streaming(request, path, Raw).await?.into_inner();
        while let Some(message) = answer.next().await {
            message?;
        }
        Ok(())
    });
    (sender, push)
}

#[tokio::test]
async fn a_client_that_leaves_before_the_ticket_leaves_nothing() {
    let house = house().await;
    let (sender, push) = open_push(&house);
    sender.send(opening()).await.unwrap();
    until("the upload is under way", async || house.metrics("/metrics").await.contains("open_streams 1"))
        .await;
    push.abort();
    drop(sender);
    until("the nodes are told", async || {
        house.nodes.iter().all(|node| node.0.cut.load(std::sync::atomic::Ordering::Relaxed) == 1)
    })
    .await;
    let state = house.coordinator.state();
    assert!(state.begins.is_empty() && state.commits.is_empty() && state.aborts.is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_after_the_ticket_leaves_a_write_that_ends_well() {
    let house = house().await;
    house.coordinator.commits_allowed().acquire_many(1_000_000).await.unwrap().forget();
    let (sender, push) = open_push(&house);
    sender.send(opening()).await.unwrap();
    drop(sender);
    until("the change", async || house.nodes.iter().all(|node| node.commits() == 4)).await;
    push.abort();
    until("the client has gone", async || house.metrics("/metrics").await.contains("open_streams 0")).await;
    house.coordinator.commits_allowed().add_permits(1);
    until("it is recorded", async || house.coordinator.state().commits.len() == 1).await;
    assert_eq!(committed(&house), [["node-1", "node-2", "node-3"]]);
    for node in &house.nodes {
        until("the hooks run", async || node.commits() >= 5).await;
    }
}

#[tokio::test]
async fn an_upload_does_not_wait_for_a_secondary_that_reads_no_more() {
    let house = house().await;
    house.nodes[2].0.deaf.store(true, std::sync::atomic::Ordering::Relaxed);
    let messages = futures::stream::iter(
        std::iter::once(opening()).chain(std::iter::repeat_with(|| chunk(128 * 1024)).take(200)),
    );
    let started = Instant::now();
    soon(push_of(&house, messages)).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    assert_eq!(committed(&house), [["node-1", "node-2"]]);
}

#[tokio::test]
async fn votes_that_belong_to_nothing_are_refused() {
    let house = house().await;
    play(&house, 1, Play { stalls: Some(2), ..Play::default() });
    play(&house, 2, Play { stalls: Some(2), ..Play::default() });
    let pushing = push_of(&house, futures::stream::iter([opening()]));
    let voting = async {
        until("the primary waits", async || house.nodes[1].commits() == 2).await;
        let back = house.nodes[0].0.back.lock().unwrap().clone().unwrap();
        let mut seat = crate::voter::Seat::at(1, "nobody", back.clone());
        let phase = tabularium_proto::gitaly::vote_transaction_request::Phase::PreparedPhase;
        assert_eq!(
            seat.cast(phase, 1).await,
            Told::Refused(Code::Internal, "invalid node for transaction: \"nobody\"".into())
        );
        let mut seat = crate::voter::Seat::at(77, "node-1", back.clone());
        assert_eq!(
            seat.cast(phase, 1).await,
            Told::Refused(Code::NotFound, "transaction not found: 77".into())
        );
        let seat = || crate::voter::Seat::at(1, "node-2", back.clone());
        let cast = async |mut seat: crate::voter::Seat| seat.cast(phase, 2).await;
        let (first, second) = (Box::pin(cast(seat())), Box::pin(cast(seat())));
        let (refused, waits) = futures::future::select(first, second).await.factor_first();
        assert_eq!(refused, Told::Refused(Code::Internal, "node \"node-2\" already cast a vote".into()));
        let stop = tabularium_proto::gitaly::StopTransactionRequest { repository: None, transaction_id: 1 };
        RefTransactionClient::new(back.clone()).stop_transaction(stop).await.unwrap();
        assert_eq!(waits.await, Told::State(TransactionState::Stop));
    };
    let (pushed, ()) = soon(async { tokio::join!(pushing, voting) }).await;
    assert_eq!(pushed.unwrap_err().code(), Code::Aborted);
    assert_eq!(outcomes(&house), [Outcome::NotApplied]);
}

#[tokio::test]
async fn no_vote_is_answered_under_a_lease_that_may_be_over() {
    let house = House::with("workers = 1\n", |coordinator| {
        let mut state = coordinator.state();
        state.quorum = 2;
        state.write_lease_milliseconds = 300;
        state.renewals_hang = true;
    })
    .await;
    for node in 0..3 {
        play(&house, node, Play { delay: Duration::from_millis(400), ..Play::default() });
    }
    update(&house).await.unwrap_err();
    assert!(house.nodes.iter().all(|node| node.commits() == 0));
    until("it is settled", async || outcomes(&house) == [Outcome::NotApplied]).await;
    assert!(house.coordinator.state().commits.is_empty());
}

#[tokio::test]
async fn a_missing_time_is_the_same_everywhere() {
    let house = house().await;
    let mut request = Request::new(UserSquashRequest { repository: repository(), ..Default::default() });
    request.metadata_mut().insert("x-votes", "none".parse().unwrap());
    // The fake's answer is not one to this request; what counts is what the nodes got.
    let _ = OperationServiceClient::new(house.channel.clone()).user_squash(request).await;
    let times: Vec<_> = house
        .nodes
        .iter()
        .map(|node| UserSquashRequest::decode(&node.seen("UserSquash")[0].message[..]).unwrap().timestamp)
        .collect();
    assert!(times[0].is_some());
    assert!(times.iter().all(|time| *time == times[0]));
    let commits = house.coordinator.state().commits.clone();
    assert!(commits[0].unvoted, "nobody voted");
    assert_eq!(commits[0].committed_storages, ["node-1"]);
    assert!(house.metrics("/metrics").await.contains("tabularium_router_unvoted_writes_total 1"));
}
