//! Writes of which nobody knows whether they took effect.

use std::time::Duration;

use tabularium_common::config::ConfigDuration;
use tabularium_proto::coordinator::{self as wire, WriteKind, abort_write_request::Outcome};
use tokio::time::Instant;
use tonic::Code;

use crate::support::*;

/// A site whose write is in doubt, with what its three participants hold by then: the primary's first.
async fn in_doubt(
    site: &Site,
    routing: &mut Routing,
    path: &str,
    holdings: [Option<Holding>; 3],
) -> (wire::Route, wire::BeginWriteResponse) {
    let before = create(routing, path).await;
    let begun = routing.begin_write(begin_voted(path, WriteKind::Update)).await.unwrap().into_inner();
    for (storage, holding) in begun.participants.iter().zip(holdings) {
        match holding {
            Some(holding) => site.node(storage).holds(holding),
            None => site.node(storage).kill(),
        }
    }
    abort(routing, &begun, Outcome::InDoubt, &[]).await.unwrap();
    (before, begun)
}

/// Generations above the one before, of the participants in their order; `None`: nothing is known of it.
fn gained(before: &wire::Route, begun: &wire::BeginWriteResponse, after: &wire::Route) -> Vec<Option<i64>> {
    begun
        .participants
        .iter()
        .map(|storage| {
            let replica = after.replicas.iter().find(|replica| replica.storage == *storage).unwrap();
            (replica.generation >= 0).then_some(replica.generation - before.generation)
        })
        .collect()
}

const OLD: Option<Holding> = Some(Holding::State("old"));
const NEW: Option<Holding> = Some(Holding::State("new"));
const SILENT: Option<Holding> = Some(Holding::Silent);
const LOST: Option<Holding> = Some(Holding::Nothing);
const GONE: Option<Holding> = None;

#[tokio::test(flavor = "multi_thread")]
async fn the_state_that_most_participants_hold_counts() {
    let kept = Some(1);
    let cases = [
        ([NEW, NEW, NEW], [kept, kept, kept], 0),
        ([OLD, OLD, OLD], [kept, kept, kept], 0),
        ([NEW, NEW, OLD], [kept, kept, None], 0),
        ([NEW, OLD, OLD], [None, kept, kept], 1),
        ([OLD, NEW, NEW], [None, kept, kept], 1),
        ([LOST, LOST, NEW], [None, None, kept], 2),
        ([GONE, NEW, NEW], [None, kept, kept], 1),
        ([SILENT, NEW, NEW], [None, kept, kept], 1),
        ([NEW, GONE, OLD], [kept, None, None], 0),
        ([GONE, GONE, OLD], [None, None, kept], 2),
    ];
    let run = cases.map(|(holdings, expected, primary)| async move {
        let site = Site::start().await;
        let coordinator = site.coordinator().await;
        let (mut routing, _, _) = clients(&coordinator);
        let (before, begun) = in_doubt(&site, &mut routing, "a.git", holdings).await;
        let after = resolve(&mut routing, "a.git").await.unwrap();
        assert_eq!(gained(&before, &begun, &after), expected, "{holdings:?}");
        assert_eq!(after.generation, before.generation + 1, "{holdings:?}");
        assert_eq!(after.primary, begun.participants[primary], "{holdings:?}");
        assert_eq!(after.epoch, before.epoch + i64::from(primary > 0), "{holdings:?}");
        site.check_consistency().await;
        let late = commit(&mut routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap_err();
        assert_eq!(late.code(), Code::FailedPrecondition);
        coordinator.stop().await.unwrap();
    });
    for case in run {
        case.await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_to_ask_a_write_stays_in_doubt_until_there_is_somebody() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let (before, begun) = in_doubt(&site, &mut routing, "a.git", [SILENT, SILENT, GONE]).await;
    let hasty = wire::BeginWriteRequest { wait_milliseconds: 300, ..begin("a.git", WriteKind::Update) };
    assert_eq!(routing.begin_write(hasty).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap(), before, "what was acknowledged is served");
    let late = commit(&mut routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "it is not its router's any more");
    let renew =
        wire::RenewWritesRequest { router_id: "router".into(), write_ids: vec![begun.write_id.clone()] };
    let lost = routing.renew_writes(renew).await.unwrap().into_inner().lost_write_ids;
    assert_eq!(lost, std::slice::from_ref(&begun.write_id));
    site.node(&begun.participants[1]).holds(Holding::State("new"));
    let after = eventually("it is settled", || {
        let (mut routing, generation) = (routing.clone(), before.generation);
        async move {
            let route = resolve(&mut routing, "a.git").await.unwrap();
            (route.generation > generation).then_some(route)
        }
    })
    .await;
    assert_eq!(gained(&before, &begun, &after), [None, Some(1), None]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_routers_write_is_settled_once_and_in_time_with_several_coordinators() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await, site.coordinator().await];
    let started = Instant::now();
    let (mut routing, _, _) = clients(&coordinators[0]);
    let before = create(&mut routing, "a.git").await;
    // They give routers the time to come back first.
    let grace = site.config.timing.write_lease.0;
    tokio::time::sleep_until(started + grace + Duration::from_millis(200)).await;
    let begun = routing.begin_write(begin_voted("a.git", WriteKind::Update)).await.unwrap().into_inner();
    let died = Instant::now();
    site.node(&begun.participants[2]).holds(Holding::State("new"));
    let waiting = routing.clone().begin_write(begin_voted("a.git", WriteKind::Update)).await;
    let next = waiting.unwrap().into_inner();
    let took = died.elapsed();
    assert!(took >= grace, "{took:?}: not before its lease ran out");
    assert!(took < Duration::from_secs(5), "{took:?}");
    println!("settled, and the next one begun, after {} ms", took.as_millis());
    assert_eq!(next.participants, begun.participants[..2]);
    assert_eq!(next.route.unwrap().generation, before.generation + 1, "once");
    let mut sql = site.sql().await;
    let ended: i64 = sqlx::query_scalar("SELECT count(*) FROM ended_writes WHERE outcome = 'settled'")
        .fetch_one(&mut sql)
        .await
        .unwrap();
    assert_eq!(ended, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_was_away_lets_routers_come_back_first() {
    let mut site = Site::start().await;
    site.config.timing.write_lease = ConfigDuration::from_millis(1500);
    site.config.timing.sweep_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let begun = routing.begin_write(begin_voted("a.git", WriteKind::Update)).await.unwrap().into_inner();
    drop(routing);
    coordinator.stop().await.unwrap();
    tokio::time::sleep(Duration::from_millis(1600)).await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    tokio::time::sleep(Duration::from_millis(300)).await;
    commit(&mut routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn gitalys_nodes_are_compared_in_their_own_words_and_looked_at_again() {
    const GITALY_OLD: Option<Holding> = Some(Holding::Gitaly("old"));
    const GITALY_NEW: Option<Holding> = Some(Holding::Gitaly("new"));
    let mut site = Site::start().await;
    site.config.timing.settle_again_after = ConfigDuration::from_millis(800);
    site.config.timing.sweep_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let (before, begun) = in_doubt(&site, &mut routing, "a.git", [GITALY_OLD, OLD, GITALY_NEW]).await;
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(gained(&before, &begun, &after), [Some(1), Some(1), None]);
    // One that was still at it goes on, and is found to differ.
    repair(&site).await;
    site.node(&begun.participants[2]).holds(Holding::Gitaly("old"));
    site.node(&begun.participants[1]).holds(Holding::Gitaly("late"));
    let after = eventually("it is looked at again", || {
        let (mut routing, generation) = (routing.clone(), after.generation);
        async move {
            let route = resolve(&mut routing, "a.git").await.unwrap();
            (route.generation > generation).then_some(route)
        }
    })
    .await;
    assert_eq!(gained(&before, &begun, &after), [Some(2), None, Some(2)]);
    site.check_consistency().await;
    // Once; and a look that finds all equal leaves no trace.
    repair(&site).await;
    site.node(&begun.participants[1]).holds(Holding::Gitaly("old"));
    let doubtful = || async {
        let mut sql = site.sql().await;
        let left: i64 = sqlx::query_scalar(
            "SELECT (SELECT count(*) FROM ended_writes WHERE doubtful) + (SELECT count(*) FROM writes)",
        )
        .fetch_one(&mut sql)
        .await
        .unwrap();
        (left == 0).then_some(())
    };
    eventually("nothing is doubtful", doubtful).await;
    // A router that was stopped reports late: there is one more look.
    let late = commit(&mut routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert!(doubtful().await.is_none());
    eventually("nothing is doubtful", doubtful).await;
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().generation, after.generation);
}

/// A router that counts no votes tells the primary alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_without_votes_follows_its_primary_or_is_given_up_with_it() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let before = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    assert_eq!(begun.participants, std::slice::from_ref(&before.primary));
    site.node(&before.primary).holds(Holding::State("new"));
    abort(&mut routing, &begun, Outcome::InDoubt, &[]).await.unwrap();
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!((after.generation, &after.primary), (before.generation + 1, &before.primary));
    let current = after.replicas.iter().filter(|replica| replica.generation == after.generation);
    assert_eq!(current.count(), 1, "the others lack it");
    site.check_consistency().await;
    repair(&site).await;

    let begun = begin_write(&mut routing, "a.git").await;
    site.node(&before.primary).kill();
    abort(&mut routing, &begun, Outcome::InDoubt, &[&before.primary]).await.unwrap();
    let last = resolve(&mut routing, "a.git").await.unwrap();
    assert_ne!(last.primary, before.primary);
    assert_eq!((last.generation, last.epoch), (after.generation + 1, after.epoch + 1));
    let mut sorted = generations(&last);
    sorted.sort_unstable();
    assert_eq!(sorted, [-1, last.generation, last.generation]);
    site.check_consistency().await;
}

/// A worker that copies while nobody writes, and falls silent.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_of_a_repair_that_runs_out_is_free_again_and_its_target_unknown() {
    let mut site = Site::start().await;
    site.config.timing.write_lease = ConfigDuration::from_millis(500);
    site.config.timing.sweep_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let before = create(&mut routing, "a.git").await;
    let target = &others(&before)[0];
    let begun = begin_voted("a.git", WriteKind::Update);
    let write = routing.begin_write(begun.clone()).await.unwrap().into_inner();
    let two: Vec<&str> =
        write.participants.iter().filter(|storage| *storage != target).map(String::as_str).collect();
    commit(&mut routing, &write, &two).await.unwrap();
    let mut sql = site.sql().await;
    sqlx::query(
        "INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id,
                             participants, expires_at)
         SELECT gen_random_uuid(), id, 'repair', epoch, primary_storage, 'worker', 'repair', '', ARRAY[$1::text],
                now() + interval '300 milliseconds'
         FROM repositories",
    )
    .bind(target)
    .execute(&mut sql)
    .await
    .unwrap();
    let next = routing.begin_write(begun).await.unwrap().into_inner();
    let route = next.route.as_ref().unwrap();
    let copy = route.replicas.iter().find(|replica| replica.storage == *target).unwrap();
    assert_eq!((copy.generation, route.generation), (-1, before.generation + 1));
    abort(&mut routing, &next, Outcome::NotApplied, &[]).await.unwrap();
    site.check_consistency().await;
}
