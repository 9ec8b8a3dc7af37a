//! Copies and removals, and how their messages are settled.

use std::time::Duration;

use tabularium_common::duties::Class;
use tabularium_proto::coordinator::{
    CleanupWork, DutyParked, DutyRetry, ReplicateWork, StorageAddress, finish_duty_request::Outcome,
    finish_duty_response::Disposition, start_duty_response::Work,
};
use uuid::Uuid;

use crate::{
    bus::CORRELATION,
    node::Refs,
    support::{World, admin, until},
};

pub(crate) const PATH: &str = "@cluster/repositories/6b/86/1";

impl World {
    pub(crate) fn storage(&self, name: &str) -> StorageAddress {
        StorageAddress { storage: name.into(), address: self.node.address.clone() }
    }

    pub(crate) fn copy(&self) -> Work {
        Work::Replicate(ReplicateWork {
            repository_id: 1,
            virtual_storage: "default".into(),
            relative_path: "a/b.git".into(),
            replica_path: PATH.into(),
            source: Some(self.storage("node-1")),
            target: Some(self.storage("node-2")),
            generation: 42,
            ..ReplicateWork::default()
        })
    }

    pub(crate) async fn owe_copy(&self) -> Uuid {
        self.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
        self.owe_work(self.copy()).await
    }

    pub(crate) async fn owe_work(&self, work: Work) -> Uuid {
        let duty = self.coordinator.owe(work);
        self.ring(Class::Replication, duty).await;
        duty
    }
}

pub(crate) fn failure(outcome: Outcome) -> (String, bool) {
    match outcome {
        Outcome::Failed(failed) => (failed.message, failed.unreachable),
        Outcome::Succeeded(succeeded) => panic!("{succeeded:?}"),
    }
}

fn reached(outcome: &Outcome) -> i64 {
    match outcome {
        Outcome::Succeeded(succeeded) => succeeded.reached,
        Outcome::Failed(failed) => panic!("{failed:?}"),
    }
}

#[tokio::test]
async fn a_copy_is_acknowledged_only_after_it_was_reported() {
    let world = World::new().await;
    world.coordinator.finish_gate.forget_permits(usize::MAX);
    world.owe_copy().await;
    let replicator = world.replicator().await;

    until("the copy is there", || async { world.node.get("node-2", PATH).is_some() }).await;
    until("the report is under way", || async {
        world.coordinator.with(|state| state.correlation_ids.len()) >= 2
    })
    .await;
    assert_eq!(
        world.bus.messages(Class::Replication).await,
        1,
        "not acknowledged before the report was taken"
    );
    world.coordinator.finish_gate.add_permits(1);
    world.settled(Class::Replication).await;

    assert_eq!(reached(&world.coordinator.outcome().await), 42);
    let request = world.node.with(|state| state.replications[0].clone());
    let (target, source) = (request.repository.unwrap(), request.source.unwrap());
    assert_eq!((target.storage_name.as_str(), target.relative_path.as_str()), ("node-2", PATH));
    assert_eq!((source.storage_name.as_str(), source.relative_path.as_str()), ("node-1", PATH));
    let metadata = world.node.with(|state| state.writes[0].1.clone());
    assert_eq!(metadata.get("x-gitlab-correlation-id").unwrap(), CORRELATION);
    assert!(metadata.get("authorization").unwrap().to_str().unwrap().starts_with("Bearer v2."));
    let servers = base64::Engine::decode(
        &base64::engine::general_purpose::STANDARD,
        metadata.get("gitaly-servers").unwrap().as_bytes(),
    );
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&servers.unwrap()).unwrap(),
        serde_json::json!({"node-1": {"address": world.node.address, "token": "node-secret"}})
    );
    assert!(world.coordinator.with(|state| state.correlation_ids.iter().all(|id| id == CORRELATION)));
    until("the outcome is counted", || async {
        admin(&replicator, "/metrics").await.1.contains("class=\"Replication\",outcome=\"Done\"} 1")
    })
    .await;
    replicator.stop().await;
}

#[tokio::test]
async fn a_copy_that_did_not_happen_is_a_failure() {
    let world = World::new().await;
    world.node.put("node-2", PATH, &[("refs/heads/main", "00")]);
    world.node.with(|state| state.lie = true);
    world.owe_copy().await;
    let replicator = world.replicator().await;
    let (message, unreachable) = failure(world.coordinator.outcome().await);
    assert!(message.contains("checksum") && message.contains("node-2"), "{message}");
    assert!(!unreachable);
    replicator.stop().await;
}

#[tokio::test]
async fn a_source_that_moves_on_during_the_copy_is_no_failure() {
    let world = World::new().await;
    world.node.with(|state| state.source_moves_to = Some(Refs::from([("refs/heads/x".into(), "22".into())])));
    world.owe_copy().await;
    let replicator = world.replicator().await;
    assert_eq!(reached(&world.coordinator.outcome().await), 42, "the generation read before the copy");
    replicator.stop().await;
}

#[tokio::test]
async fn a_node_that_is_not_there_is_unreachable() {
    let world = World::new().await;
    let Work::Replicate(mut work) = world.copy() else { unreachable!() };
    work.source.as_mut().unwrap().address = "unix:/nonexistent/node.sock".into();
    let duty = world.coordinator.owe(Work::Replicate(work));
    world.ring(Class::Replication, duty).await;
    let replicator = world.replicator().await;
    let (message, unreachable) = failure(world.coordinator.outcome().await);
    assert!(unreachable, "{message}");
    replicator.stop().await;
}

#[tokio::test]
async fn a_duty_waits_for_a_coordinator_that_is_down() {
    let world = World::new().await;
    world.coordinator.with(|state| state.down = 2);
    world.owe_copy().await;
    let replicator = world.replicator().await;
    assert_eq!(reached(&world.coordinator.outcome().await), 42);
    world.settled(Class::Replication).await;
    assert_eq!(world.coordinator.with(|state| (state.down, state.started.len())), (0, 1));
    replicator.stop().await;
}

#[tokio::test]
async fn another_coordinator_is_asked_when_one_is_down() {
    let world = World::new().await;
    world.owe_copy().await;
    let mut config = world.config();
    config.coordinators.insert(0, "unix:/nonexistent/coordinator.sock".parse().unwrap());
    let replicator = tabularium_replicator::start(config).await.unwrap();
    assert_eq!(reached(&world.coordinator.outcome().await), 42);
    world.settled(Class::Replication).await;
    replicator.stop().await;
}

#[tokio::test]
async fn a_failed_duty_comes_again_after_the_coordinators_delay() {
    let world = World::new().await;
    let delay = prost_types::Duration { seconds: 1, nanos: 500_000_000 };
    world.coordinator.with(|state| {
        state.dispositions.push_back(Disposition::Retry(DutyRetry { delay: Some(delay) }));
    });
    world.node.with(|state| state.lie = true);
    world.owe_copy().await;
    let replicator = world.replicator().await;
    world.coordinator.outcome().await;
    world.node.with(|state| state.lie = false);
    world.settled(Class::Replication).await;
    let started = world.coordinator.with(|state| state.started.clone());
    assert_eq!(started.len(), 2);
    assert!(started[1] - started[0] >= Duration::from_millis(1500), "{:?}", started[1] - started[0]);
    replicator.stop().await;
}

#[tokio::test]
async fn a_parked_duty_does_not_come_again() {
    let world = World::new().await;
    world.coordinator.with(|state| {
        state.dispositions.push_back(Disposition::Parked(DutyParked { attempts: 10 }));
    });
    world.node.with(|state| state.lie = true);
    world.owe_copy().await;
    let replicator = world.replicator().await;
    world.coordinator.outcome().await;
    world.settled(Class::Replication).await;
    assert_eq!(world.coordinator.with(|state| state.started.len()), 1);
    replicator.stop().await;
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_dropped_and_counted() {
    let world = World::new().await;
    world.bus.publish(Class::Replication, b"{\"version\":1}".to_vec()).await;
    world.bus.publish(Class::Replication, b"{\"version\":99}".to_vec()).await;
    let replicator = world.replicator().await;
    world.settled(Class::Replication).await;
    until("both are counted", || async {
        admin(&replicator, "/metrics").await.1.contains("class=\"Replication\",outcome=\"Undecodable\"} 2")
    })
    .await;
    assert!(world.coordinator.with(|state| state.started.is_empty()));
    replicator.stop().await;
}

#[tokio::test]
async fn a_removal_is_done_when_nothing_is_left() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[]);
    let work = || {
        let target = Some(world.storage("node-1"));
        Work::Cleanup(CleanupWork { repository_id: 1, replica_path: PATH.into(), target })
    };
    for _ in 0..2 {
        let duty = world.coordinator.owe(work());
        world.ring(Class::Cleanup, duty).await;
    }
    let replicator = world.replicator().await;
    world.settled(Class::Cleanup).await;
    assert!(world.node.get("node-1", PATH).is_none());
    let finished = world.coordinator.with(|state| state.finished.clone());
    assert!(matches!(finished[..], [Outcome::Succeeded(_), Outcome::Succeeded(_)]), "{finished:?}");
    replicator.stop().await;
}
