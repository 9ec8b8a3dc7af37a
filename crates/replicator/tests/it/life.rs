//! Workers that die, stop, or lose the bus.

use std::time::{Duration, Instant};

use tabularium_common::duties::Class;

use crate::support::{World, admin, until};

const PATH: &str = "@cluster/repositories/6b/86/1";

#[test]
fn what_a_dead_worker_had_goes_to_another() {
    let test = tokio::runtime::Runtime::new().unwrap();
    let world = test.block_on(async {
        let world = World::new().await;
        world.bus.shorten_ack_wait(Class::Replication, Duration::from_secs(2)).await;
        world.node.copy_gate.forget_permits(usize::MAX);
        world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
        let duty = world.coordinator.owe(world.copy());
        world.ring(Class::Replication, duty).await;
        world
    });
    // A runtime that is shut down drops its tasks where they stand, as a crash does.
    let doomed = tokio::runtime::Runtime::new().unwrap();
    let _running = doomed.block_on(world.replicator());
    test.block_on(until("the copy runs", || async { world.node.methods() == ["replicate"] }));
    doomed.shutdown_background();

    test.block_on(async {
        assert!(world.coordinator.with(|state| state.finished.is_empty()));
        world.node.copy_gate.add_permits(1000);
        let replicator = world.replicator().await;
        world.coordinator.outcome().await;
        world.settled(Class::Replication).await;
        assert_eq!(world.coordinator.with(|state| state.started.len()), 2);
        replicator.stop().await;
    });
}

#[tokio::test]
async fn what_is_not_done_when_the_drain_ends_goes_to_another_at_once() {
    let world = World::new().await;
    world.node.copy_gate.forget_permits(usize::MAX);
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    let duty = world.coordinator.owe(world.copy());
    world.ring(Class::Replication, duty).await;
    let mut config = world.config();
    config.drain_seconds = 1;
    let first = tabularium_replicator::start(config).await.unwrap();
    until("the copy runs", || async { world.node.methods() == ["replicate"] }).await;
    let stopped = Instant::now();
    first.stop().await;
    assert!(stopped.elapsed() >= Duration::from_secs(1), "the drain was waited for");

    world.node.copy_gate.add_permits(1000);
    let second = world.replicator().await;
    world.coordinator.outcome().await;
    world.settled(Class::Replication).await;
    assert!(stopped.elapsed() < Duration::from_secs(15), "{:?}: not given back at once", stopped.elapsed());
    second.stop().await;
}

#[tokio::test]
async fn running_work_is_finished_before_the_service_stops() {
    let world = World::new().await;
    world.node.copy_gate.forget_permits(usize::MAX);
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    let duty = world.coordinator.owe(world.copy());
    world.ring(Class::Replication, duty).await;
    let replicator = world.replicator().await;
    until("the copy runs", || async { world.node.methods() == ["replicate"] }).await;
    let release = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.node.copy_gate.add_permits(1000);
    };
    tokio::join!(replicator.stop(), release);
    assert_eq!(world.coordinator.with(|state| state.finished.len()), 1);
    assert_eq!(world.bus.messages(Class::Replication).await, 0);
}

#[tokio::test]
async fn a_bus_that_lost_everything_is_set_up_again() {
    let mut world = World::new().await;
    let replicator = world.replicator().await;
    until("ready", || async { admin(&replicator, "/ready").await.0 == 200 }).await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    let first = world.coordinator.owe(world.copy());
    world.ring(Class::Replication, first).await;
    until("the first is done", || async { world.coordinator.with(|state| state.finished.len()) == 1 }).await;

    world.nats.stop().await;
    until("not ready", || async { admin(&replicator, "/ready").await.0 == 503 }).await;
    assert_eq!(admin(&replicator, "/live").await.0, 200);
    world.nats.restart_empty().await;
    until("ready again", || async { admin(&replicator, "/ready").await.0 == 200 }).await;
    world.bus = crate::bus::Bus::connect(world.nats.url()).await;

    let second = world.coordinator.owe(world.copy());
    world.ring(Class::Replication, second).await;
    until("the second is done", || async { world.coordinator.with(|state| state.finished.len()) == 2 }).await;
    world.settled(Class::Replication).await;
    replicator.stop().await;
}

#[tokio::test]
async fn a_replicator_starts_before_the_bus_does() {
    let mut world = World::new().await;
    world.nats.stop().await;
    let replicator = world.replicator().await;
    assert_eq!(admin(&replicator, "/ready").await.0, 503);
    world.nats.restart().await;
    until("ready", || async { admin(&replicator, "/ready").await.0 == 200 }).await;
    replicator.stop().await;
}
