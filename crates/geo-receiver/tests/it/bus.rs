//! A bus that is not there.

use std::time::{Duration, Instant};

use crate::support::{World, update};

#[tokio::test]
async fn without_the_bus_nothing_is_taken() {
    let mut world = World::ready().await;
    world.nats.stop().await;
    // Before and after the receiver has noticed.
    let asked = Instant::now();
    let answer = world.post(&[], &update("a/b")).await;
    assert_eq!((answer.status, answer.text.as_str()), (503, r#"{"message":"503 Service Unavailable"}"#));
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
    world.wait_ready(false).await;
    assert_eq!(world.post(&[], &update("a/b")).await.status, 503);
    assert_eq!(world.admin("/live").await.status, 200);

    world.nats.restart().await;
    world.wait_ready(true).await;
    let key = [("idempotency-key", "k")];
    assert_eq!(world.post(&key, &update("a/b")).await.status, 201);
    world.receiver.stop().await;
}

#[tokio::test]
async fn a_bus_that_lost_everything_is_set_up_again() {
    let mut world = World::ready().await;
    assert_eq!(world.post(&[], &update("a/b")).await.status, 201);
    world.nats.stop().await;
    world.wait_ready(false).await;
    world.nats.restart_empty().await;
    world.wait_ready(true).await;
    assert_eq!(world.post(&[], &update("a/c")).await.status, 201);
    let events = world.events().await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].relative_path.as_str(), "a/c.git");
}

#[tokio::test]
async fn a_stream_that_was_deleted_is_made_again() {
    let world = World::ready().await;
    let bus = async_nats::jetstream::new(async_nats::connect(world.nats.url()).await.unwrap());
    bus.delete_stream(tabularium_common::duties::Class::GeoSync.stream()).await.unwrap();
    assert_eq!(world.post(&[], &update("a/b")).await.status, 201);
    assert_eq!(world.events().await.len(), 1);
}

#[tokio::test]
async fn a_receiver_starts_before_the_bus_does() {
    let mut nats = tabularium_testkit::nats::Nats::start_own().await;
    nats.stop().await;
    let mut world = World::on(nats).await;
    assert_eq!(world.admin("/ready").await.status, 503);
    assert_eq!(world.post(&[], &update("a/b")).await.status, 503);
    world.nats.restart().await;
    world.wait_ready(true).await;
    assert_eq!(world.post(&[], &update("a/b")).await.status, 201);
}
