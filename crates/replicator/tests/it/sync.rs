//! Mirrors become what their home is, whatever the events say.

use tabularium_common::duties::{BODY_VERSION, Class, SyncEvent, SyncMessage};
use tabularium_proto::coordinator::{
    SyncAgain, SyncFailed, SyncGone, SyncRefused, SyncSucceeded, SyncUnderWay, begin_sync_response::Decision,
    finish_sync_request::Outcome, finish_sync_response::Next,
};
use uuid::Uuid;

use crate::{
    node::Refs,
    support::{World, until},
};

const PATH: &str = "foundry/kiln.git";

fn message(path: &str, event: SyncEvent) -> SyncMessage {
    SyncMessage {
        version: BODY_VERSION,
        event_id: Uuid::new_v4(),
        home_site: "rome".parse().unwrap(),
        virtual_storage: "default".parse().unwrap(),
        relative_path: path.parse().unwrap(),
        event,
    }
}

impl World {
    /// The home site has these refs, for whoever asks and for whoever fetches.
    fn home(&self, refs: &[(&str, &str)]) {
        self.site.put(PATH, "refs/heads/trunk", refs);
        let refs: Refs = refs.iter().map(|(name, id)| ((*name).into(), (*id).into())).collect();
        self.node.with(|state| state.remote = refs);
    }

    /// Publishes the event, waits until it is settled, answers what was reported.
    async fn sync(&self, event: SyncEvent) -> Vec<(String, Outcome)> {
        self.event(&message(PATH, event)).await;
        let replicator = self.replicator().await;
        let syncs = self.syncs_settled().await;
        replicator.stop().await;
        syncs
    }

    async fn syncs_settled(&self) -> Vec<(String, Outcome)> {
        self.settled(Class::GeoSync).await;
        self.coordinator.syncs(0).await
    }
}

fn succeeded(path: &str) -> (String, Outcome) {
    (path.to_owned(), Outcome::Succeeded(SyncSucceeded {}))
}

fn gone(path: &str) -> (String, Outcome) {
    (path.to_owned(), Outcome::Gone(SyncGone {}))
}

fn failed(syncs: &[(String, Outcome)]) -> SyncFailed {
    match syncs {
        [(_, Outcome::Failed(failed))] => failed.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_new_mirror_is_made_and_filled() {
    let world = World::new().await;
    world.home(&[("refs/heads/trunk", "11"), ("refs/tags/v1", "22")]);
    assert_eq!(world.sync(SyncEvent::Updated).await, [succeeded(PATH)]);
    let mirror = world.node.get("default", PATH).unwrap();
    assert_eq!((mirror.head.as_str(), mirror.refs.len()), ("refs/heads/trunk", 2));
    assert_eq!(world.node.methods(), ["create", "fetch"]);
    world.node.with(|state| {
        for (method, metadata) in &state.writes {
            assert_eq!(metadata.get("tabularium-sync-from-site").unwrap(), "rome", "{method}");
        }
        let fetch = &state.fetches[0];
        let remote = fetch.remote_params.as_ref().unwrap();
        assert_eq!(remote.url, format!("{}/{PATH}", world.site.url));
        assert_eq!(remote.http_authorization_header, "Bearer home-secret");
        assert_eq!(remote.mirror_refmaps, ["all_refs"]);
        assert!(fetch.force && !fetch.no_prune && fetch.timeout > 0);
    });
    world.site.with(|state| assert_eq!(state.asked[0].1["authorization"], "Bearer home-secret"));
}

#[tokio::test]
async fn a_mirror_that_has_everything_is_not_written() {
    let world = World::new().await;
    world.coordinator.with(|state| state.exists = true);
    world.home(&[("refs/heads/trunk", "11")]);
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Updated).await, [succeeded(PATH)]);
    assert_eq!(world.node.methods(), ["write_ref"], "only HEAD differed");
    assert_eq!(world.node.get("default", PATH).unwrap().head, "refs/heads/trunk");
}

#[tokio::test]
async fn a_fetch_that_did_not_bring_the_refs_is_a_failure() {
    let world = World::new().await;
    world.coordinator.with(|state| {
        state.exists = true;
        state.nexts.push_back(Next::Again(SyncAgain {
            delay: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        }));
    });
    world.home(&[("refs/heads/trunk", "11")]);
    world.node.put("default", PATH, &[]);
    world.node.with(|state| state.remote = Refs::new());
    world.event(&message(PATH, SyncEvent::Updated)).await;
    let replicator = world.replicator().await;
    let failed = failed(&world.coordinator.syncs(1).await);
    assert!(failed.message.contains("refs") && !failed.unreachable, "{failed:?}");
    assert_eq!(world.bus.messages(Class::GeoSync).await, 1, "it stays until it is time again");
    replicator.stop().await;
}

#[tokio::test]
async fn a_home_that_has_it_no_more_is_reported() {
    let world = World::new().await;
    world.coordinator.with(|state| state.exists = true);
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Updated).await, [gone(PATH)]);
    assert!(world.node.get("default", PATH).is_some(), "nothing is removed without a removal");
}

#[tokio::test]
async fn a_removal_is_carried_out_when_the_home_confirms_it() {
    let world = World::new().await;
    world.coordinator.with(|state| state.exists = true);
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Removed).await, [gone(PATH)]);
    assert!(world.node.get("default", PATH).is_none());
}

#[tokio::test]
async fn a_removal_that_was_overtaken_removes_nothing() {
    let world = World::new().await;
    world.coordinator.with(|state| state.exists = true);
    world.home(&[("refs/heads/trunk", "12")]);
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Removed).await, [succeeded(PATH)]);
    assert_eq!(world.node.get("default", PATH).unwrap().refs["refs/heads/trunk"], "12");
}

#[tokio::test]
async fn a_removal_of_what_is_no_mirror_is_refused() {
    let world = World::new().await;
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    world.coordinator.with(|state| {
        state.decisions.push_back(Decision::Refused(SyncRefused { reason: "its home is here".into() }));
    });
    assert_eq!(world.sync(SyncEvent::Removed).await, []);
    assert!(world.node.get("default", PATH).is_some());
    assert!(world.site.with(|state| state.asked.is_empty()));
}

#[tokio::test]
async fn a_rename_makes_the_new_and_removes_the_old() {
    let world = World::new().await;
    world.coordinator.with(|state| state.exists = true);
    world.home(&[("refs/heads/trunk", "11")]);
    world.node.put("default", PATH, &[]);
    world.node.put("default", "foundry/oven.git", &[("refs/heads/trunk", "11")]);
    let from = "foundry/oven.git".parse().unwrap();
    let syncs = world.sync(SyncEvent::Renamed { from }).await;
    assert_eq!(syncs, [succeeded(PATH), gone("foundry/oven.git")]);
    assert!(world.node.get("default", "foundry/oven.git").is_none());
    assert_eq!(world.node.get("default", PATH).unwrap().refs.len(), 1);
}

#[tokio::test]
async fn a_home_that_does_not_answer_is_unreachable_and_no_reason_to_remove() {
    let world = World::new().await;
    world.coordinator.with(|state| {
        state.exists = true;
        state.nexts.push_back(Next::Again(SyncAgain {
            delay: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        }));
    });
    world.node.put("default", PATH, &[]);
    world.site.with(|state| state.status = Some(502));
    world.event(&message(PATH, SyncEvent::Removed)).await;
    let replicator = world.replicator().await;
    let failed = failed(&world.coordinator.syncs(1).await);
    assert!(failed.unreachable && failed.message.contains("502"), "{failed:?}");
    assert!(world.node.get("default", PATH).is_some());
    replicator.stop().await;
}

#[tokio::test]
async fn an_event_during_a_sync_makes_it_look_again() {
    let world = World::new().await;
    world.coordinator.with(|state| {
        state.exists = true;
        state.nexts.push_back(Next::Again(SyncAgain {
            delay: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        }));
    });
    world.home(&[("refs/heads/trunk", "11")]);
    world.node.put("default", PATH, &[]);
    assert_eq!(world.sync(SyncEvent::Updated).await.len(), 2);
}

#[tokio::test]
async fn an_event_for_a_repository_that_is_being_synced_is_done() {
    let world = World::new().await;
    world.coordinator.with(|state| state.decisions.push_back(Decision::UnderWay(SyncUnderWay {})));
    assert_eq!(world.sync(SyncEvent::Updated).await, []);
    assert_eq!(world.coordinator.with(|state| state.syncs.len()), 1);
}

/// The sync that is under way looks again as what it is: an update, and an update removes nothing.
#[tokio::test]
async fn a_removal_during_a_sync_is_carried_out_after_it() {
    let world = World::new().await;
    world.coordinator.with(|state| {
        state.exists = true;
        state.decisions.push_back(Decision::UnderWay(SyncUnderWay {}));
    });
    world.node.put("default", PATH, &[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Removed).await, [gone(PATH)]);
    assert!(world.node.get("default", PATH).is_none());
}

#[tokio::test]
async fn events_wait_for_a_coordinator_that_is_down() {
    let world = World::new().await;
    world.coordinator.with(|state| state.down = 1);
    world.home(&[("refs/heads/trunk", "11")]);
    assert_eq!(world.sync(SyncEvent::Updated).await, [succeeded(PATH)]);
}

#[tokio::test]
async fn an_event_of_an_unknown_site_is_kept_for_a_while() {
    let world = World::new().await;
    let mut event = message(PATH, SyncEvent::Updated);
    event.home_site = "lima".parse().unwrap();
    world.event(&event).await;
    let replicator = world.replicator().await;
    until("it is looked at", || async {
        crate::support::admin(&replicator, "/metrics").await.1.contains("outcome=\"UnknownSite\"} 1")
    })
    .await;
    assert_eq!(world.bus.messages(Class::GeoSync).await, 1);
    assert!(world.coordinator.with(|state| state.syncs.is_empty()));
    replicator.stop().await;
}
