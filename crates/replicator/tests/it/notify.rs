//! Subscribed sites are told in order, once each, and nobody else is.

use tabularium_common::duties::Class;
use tabularium_proto::coordinator::{
    DutyFailed, DutySucceeded, GeoEvent, GeoEventKind, NotifyWork, finish_duty_request::Outcome,
    start_duty_response::Work,
};

use crate::support::World;

fn event(position: i64, kind: GeoEventKind) -> GeoEvent {
    GeoEvent {
        position,
        kind: kind.into(),
        repository_id: 9,
        virtual_storage: "default".into(),
        relative_path: "foundry/kiln.git".into(),
        old_relative_path: "foundry/oven.git".into(),
        generation: 1,
    }
}

async fn notify(world: &World, site: &str, positions: &[i64]) -> Outcome {
    let events = positions.iter().map(|position| event(*position, GeoEventKind::Updated)).collect();
    let duty = world.coordinator.owe(Work::Notify(NotifyWork { site: site.into(), events }));
    world.ring(Class::GeoNotify, duty).await;
    let replicator = world.replicator().await;
    let outcome = world.coordinator.outcome().await;
    world.settled(Class::GeoNotify).await;
    replicator.stop().await;
    outcome
}

fn positions(world: &World) -> Vec<String> {
    world.site.with(|state| {
        let keys =
            state.hooks.iter().map(|(headers, _)| headers["idempotency-key"].to_str().unwrap().to_owned());
        keys.collect()
    })
}

#[tokio::test]
async fn events_arrive_in_order_and_look_like_gitlabs() {
    let world = World::new().await;
    let outcome = notify(&world, "oslo", &[12, 11, 13]).await;
    assert_eq!(outcome, Outcome::Succeeded(DutySucceeded { reached: 13 }));
    assert_eq!(positions(&world), ["oslo-11", "oslo-12", "oslo-13"]);
    let (headers, body) = world.site.with(|state| state.hooks[0].clone());
    assert_eq!(headers["x-gitlab-token"], "hook-secret");
    assert_eq!(headers["x-gitlab-event"], "System Hook");
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["x-gitlab-correlation-id"], crate::bus::CORRELATION);
    assert_eq!(body["event_name"], "repository_update");
    assert_eq!(body["project"]["path_with_namespace"], "foundry/kiln");
}

#[tokio::test]
async fn the_first_event_that_is_not_taken_ends_the_run() {
    let world = World::new().await;
    world.site.with(|state| state.answers.extend([201, 500]));
    let outcome = notify(&world, "oslo", &[1, 2, 3]).await;
    assert_eq!(outcome, Outcome::Succeeded(DutySucceeded { reached: 1 }));
    assert_eq!(positions(&world), ["oslo-1", "oslo-2"], "the third was not sent past the second");
}

#[tokio::test]
async fn only_2xx_is_taken() {
    for (status, unreachable) in [(302, false), (401, false), (503, true)] {
        let world = World::new().await;
        world.site.with(|state| state.answers.push_back(status));
        let Outcome::Failed(DutyFailed { message, unreachable: said, .. }) =
            notify(&world, "oslo", &[1]).await
        else {
            panic!("{status} counted as delivered")
        };
        assert!(message.contains(&status.to_string()), "{message}");
        assert_eq!(said, unreachable, "{status}");
        assert_eq!(positions(&world), ["oslo-1"], "no redirect was followed");
    }
}

#[tokio::test]
async fn a_site_that_is_not_configured_is_named() {
    let world = World::new().await;
    let Outcome::Failed(failed) = notify(&world, "lima", &[1]).await else { panic!() };
    assert!(failed.message.contains("lima") && !failed.unreachable, "{failed:?}");
    assert!(positions(&world).is_empty());
}
