//! Events that are taken, and what of them reaches the bus.

use tabularium_common::duties::SyncEvent;

use crate::support::{World, update};

#[tokio::test]
async fn an_update_is_on_the_bus_before_it_is_answered() {
    let world = World::ready().await;
    let answer = world.post(&[("x-gitlab-correlation-id", "abc")], &update("foundry/kiln")).await;
    assert_eq!((answer.status, answer.text.as_str()), (201, r#"{"message":"201 Created"}"#));
    assert_eq!(answer.headers["x-gitlab-correlation-id"], "abc");
    let events = world.events().await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].home_site.as_str(), "rome");
    assert_eq!(events[0].virtual_storage.as_str(), "default");
    assert_eq!(events[0].relative_path.as_str(), "foundry/kiln.git");
    assert_eq!(events[0].event, SyncEvent::Updated);
    assert!(!serde_json::to_string(&events).unwrap().contains("elsewhere"), "no URL of the payload is kept");
    assert!(world.admin("/metrics").await.text.contains("outcome=\"Accepted\"} 1"));
    world.receiver.stop().await;
}

#[tokio::test]
async fn the_token_says_which_site_it_is() {
    let world = World::ready().await;
    world.post(&[("x-gitlab-token", "lima-secret")], &update("a/b")).await;
    assert_eq!(world.events().await[0].home_site.as_str(), "lima");
}

#[tokio::test]
async fn a_repeated_event_is_on_the_bus_once() {
    let world = World::ready().await;
    let resent = [("idempotency-key", "rome-7"), ("x-gitlab-webhook-uuid", "1")];
    let again = [("idempotency-key", "rome-7"), ("x-gitlab-webhook-uuid", "2")];
    assert_eq!(world.post(&resent, &update("a/b")).await.status, 201);
    assert_eq!(world.post(&again, &update("a/b")).await.status, 201);
    assert_eq!(world.events().await.len(), 1);
    assert!(world.admin("/metrics").await.text.contains("outcome=\"Duplicate\"} 1"));

    let lima = [("idempotency-key", "rome-7"), ("x-gitlab-token", "lima-secret")];
    world.post(&lima, &update("a/b")).await;
    assert_eq!(world.events().await.len(), 2, "another site's keys are its own");
}

#[tokio::test]
async fn events_of_one_chain_are_told_apart() {
    let world = World::ready().await;
    let chain = [("x-gitlab-event-uuid", "c0ffee")];
    world.post(&chain, &update("a/b")).await;
    world.post(&chain, &update("a/b")).await;
    world.post(&chain, &update("a/c")).await;
    assert_eq!(world.events().await.len(), 2);
}

#[tokio::test]
async fn events_of_an_old_gitlab_are_all_taken() {
    let world = World::ready().await;
    for _ in 0..2 {
        assert_eq!(world.post(&[], &update("a/b")).await.status, 201);
    }
    assert_eq!(world.events().await.len(), 2);
}

#[tokio::test]
async fn renames_and_removals_keep_their_meaning() {
    let world = World::ready().await;
    let project = |name: &str| {
        format!(
            r#"{{"event_name":"{name}","created_at":"2026-01-05 08:00:00 UTC","path_with_namespace":"foundry/kiln",
            "old_path_with_namespace":"foundry/oven","project_id":4117,"owners":[],"project_visibility":"internal"}}"#
        )
    };
    for name in ["project_create", "project_destroy", "project_rename", "project_transfer", "project_update"]
    {
        assert_eq!(world.post(&[], &project(name)).await.status, 201, "{name}");
    }
    let mut events: Vec<_> = world.events().await.into_iter().map(|event| event.event).collect();
    events.sort_by_key(|event| format!("{event:?}"));
    let renamed = SyncEvent::Renamed { from: "foundry/oven.git".parse().unwrap() };
    assert_eq!(
        events,
        [SyncEvent::Removed, renamed.clone(), renamed, SyncEvent::Updated, SyncEvent::Updated]
    );
}

#[tokio::test]
async fn what_is_not_about_contents_is_passed_over() {
    let world = World::ready().await;
    for body in [
        r#"{"event_name":"key_create","key":"ssh-ed25519 AAAA","id":5512}"#,
        r#"{"object_kind":"merge_request","event_type":"merge_request","project":{"path_with_namespace":"a/b"}}"#,
        r#"{"event_name":"never_heard_of"}"#,
    ] {
        let answer = world.post(&[], body).await;
        assert_eq!(answer.status, 200, "{body}: {}", answer.text);
    }
    assert!(world.events().await.is_empty());
}
