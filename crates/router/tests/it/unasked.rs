//! Nodes whose votes do not tell what they have: they change references without voting on them, as a Gitaly does whose hooks
//! are missing, or vote on different things of a new repository.

use std::time::Duration;

use prost::Message as _;
use tabularium_proto::{
    coordinator::abort_write_request::Outcome,
    gitaly::{
        CalculateChecksumRequest, CreateRepositoryRequest, repository_service_client::RepositoryServiceClient,
    },
};
use tonic::{Code, Request};

use crate::{
    house::{House, REPOSITORY, named, soon},
    quorum::{chunk, committed, house, opening, outcomes, play, push, push_of, update},
    voter::Play,
};

/// All nodes vote this.
fn script(house: &House, name: &'static str) {
    for node in 0..3 {
        play(house, node, Play { script: Some(name), ..Play::default() });
    }
}

fn holds(house: &House, node: usize, what: &str) {
    what.clone_into(&mut house.nodes[node].0.checksum.lock().unwrap());
}

fn comparisons(house: &House) -> usize {
    house.nodes.iter().map(|node| node.seen("CalculateChecksum").len()).sum()
}

async fn unasked_writes(house: &House, count: usize) -> bool {
    house.metrics("/metrics").await.contains(&format!("tabularium_router_unasked_writes_total {count}"))
}

#[tokio::test]
async fn a_push_that_nobody_asked_about_is_compared_and_recorded_before_it_is_answered() {
    let house = house().await;
    script(&house, "push without hooks");
    house.coordinator.commits_allowed().acquire_many(1_000_000).await.unwrap().forget();
    let mut pending = std::pin::pin!(push(&house));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut pending).await;
    assert!(early.is_err(), "answered before it is recorded");
    house.coordinator.commits_allowed().add_permits(1);
    pending.await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2", "node-3"]]);
    assert!(outcomes(&house).is_empty());
    for node in &house.nodes {
        let asked = CalculateChecksumRequest::decode(&node.seen("CalculateChecksum")[0].message[..]).unwrap();
        let repository = asked.repository.unwrap();
        assert_eq!(repository.storage_name, node.0.storage);
        assert_eq!(repository.relative_path, "@cluster/repositories/aa/bb/1");
    }
    assert!(unasked_writes(&house, 1).await);
}

#[tokio::test]
async fn who_did_something_else_without_asking_is_left_behind() {
    let house = house().await;
    script(&house, "push without hooks");
    holds(&house, 2, "something else");
    push(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2"]]);
}

#[tokio::test]
async fn what_too_few_hold_is_in_doubt_and_not_answered_as_done() {
    let house = house().await;
    script(&house, "push without hooks");
    for node in [1, 2] {
        holds(&house, node, "something else");
    }
    let status = push(&house).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(
        status.message(),
        "what became of the write is not known: too few nodes are known to hold the same"
    );
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
    assert!(committed(&house).is_empty());
}

#[tokio::test]
async fn a_primary_that_did_not_ask_leaves_doubt() {
    let house = house().await;
    play(&house, 0, Play { script: Some("push without hooks"), ..Play::default() });
    assert_eq!(push(&house).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
    assert!(committed(&house).is_empty());
}

#[tokio::test]
async fn a_primary_that_did_not_ask_and_says_that_all_is_well_is_not_believed() {
    let house = house().await;
    play(&house, 0, Play { script: Some("push without hooks"), careless: true, ..Play::default() });
    assert_eq!(push(&house).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
}

#[tokio::test]
async fn a_secondary_that_did_not_ask_is_left_behind() {
    let house = house().await;
    play(&house, 1, Play { script: Some("push without hooks"), ..Play::default() });
    push(&house).await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-3"]]);
    assert_eq!(comparisons(&house), 0);
}

#[tokio::test]
async fn a_secondary_that_did_not_ask_leaves_doubt_when_the_push_is_refused() {
    for at in [0, 1] {
        let house = house().await;
        play(&house, 0, Play { stops: Some(at), delay: Duration::from_millis(50), ..Play::default() });
        play(&house, 1, Play { script: Some("push without hooks"), ..Play::default() });
        push(&house).await.unwrap();
        assert_eq!(outcomes(&house), [Outcome::InDoubt], "{at}");
        assert!(committed(&house).is_empty());
    }
}

#[tokio::test]
async fn a_push_that_hooks_refuse_changes_nothing() {
    for at in [0, 1] {
        let house = house().await;
        play(&house, 0, Play { stops: Some(at), delay: Duration::from_millis(50), ..Play::default() });
        push(&house).await.unwrap();
        let tickets = if at == 0 { vec![] } else { vec![Outcome::NotApplied] };
        assert_eq!(outcomes(&house), tickets, "{at}");
        assert_eq!(house.coordinator.state().begins.len(), at);
        assert_eq!(comparisons(&house), 0);
    }
}

#[tokio::test]
async fn a_client_that_asks_only_whether_it_may_push_costs_nothing() {
    let house = house().await;
    script(&house, "push without hooks");
    soon(push_of(&house, futures::stream::iter([opening(), chunk(4)]))).await.unwrap();
    assert!(house.coordinator.state().begins.is_empty());
    assert_eq!(comparisons(&house), 0);
}

#[tokio::test]
async fn a_push_that_git_refused_after_the_hooks_changes_nothing() {
    let house = house().await;
    script(&house, "push without effect");
    push(&house).await.unwrap();
    assert_eq!(outcomes(&house), [Outcome::NotApplied]);
    assert_eq!(comparisons(&house), 0);
}

#[tokio::test]
async fn an_update_that_nobody_asked_about_is_compared_and_recorded() {
    for name in ["operation without hooks", "update that is announced"] {
        let house = house().await;
        script(&house, name);
        holds(&house, 1, "something else");
        update(&house).await.unwrap();
        assert_eq!(committed(&house), [["node-1", "node-3"]], "{name}");
        holds(&house, 2, "something else");
        assert_eq!(update(&house).await.unwrap_err().code(), Code::Unavailable, "{name}");
        assert_eq!(outcomes(&house), [Outcome::InDoubt], "{name}");
    }
}

#[tokio::test]
async fn a_new_repository_that_is_voted_on_differently_is_compared() {
    let house = house().await;
    play(&house, 1, Play { differs: Some(0), ..Play::default() });
    play(&house, 2, Play { script: Some("update that is announced and made"), ..Play::default() });
    let create = async |path: &str| {
        let request = CreateRepositoryRequest { repository: named("default", path), ..Default::default() };
        let mut request = Request::new(request);
        request.metadata_mut().insert("x-votes", "update".parse().unwrap());
        soon(RepositoryServiceClient::new(house.channel.clone()).create_repository(request)).await
    };
    create("alike.git").await.unwrap();
    assert_eq!(committed(&house), [["node-1", "node-2", "node-3"]]);
    assert_eq!(comparisons(&house), 3);
    assert!(unasked_writes(&house, 0).await, "they have asked");
    holds(&house, 1, "something else");
    create("different.git").await.unwrap();
    assert_eq!(committed(&house)[1], ["node-1", "node-3"]);
    holds(&house, 2, "something else");
    assert_eq!(create("in-doubt.git").await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
}

#[tokio::test]
async fn a_primary_that_says_that_all_is_well_in_doubt_is_not_believed() {
    let house = house().await;
    play(&house, 0, Play { careless: true, ..Play::default() });
    for node in [1, 2] {
        play(&house, node, Play { differs: Some(1), ..Play::default() });
    }
    assert_eq!(update(&house).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(outcomes(&house), [Outcome::InDoubt]);
}

#[tokio::test]
async fn what_was_done_without_asking_and_cannot_be_recorded_is_not_answered_as_done() {
    let house = house().await;
    // A router that does not remember would ask, and hear that nobody may write.
    house.leased().await;
    push(&house).await.unwrap();
    script(&house, "push without hooks");
    // What the router remembers is out of date: nobody may write.
    house.coordinator.change(REPOSITORY, |route| {
        for replica in &mut route.replicas[1..] {
            replica.generation = -1;
        }
    });
    let status = push(&house).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (
            Code::Unavailable,
            "the write was applied but could not be recorded: repository is in read-only mode"
        )
    );
    assert_eq!(committed(&house).len(), 1);
}
