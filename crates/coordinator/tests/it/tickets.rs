//! The write ticket: who gets it, on what terms, and what it costs.

use std::time::Duration;

use tabularium_common::config::ConfigDuration;
use tabularium_coordinator::{DatabaseUrl, QuorumPolicy};
use tabularium_proto::coordinator::{self as wire, WriteKind, abort_write_request::Outcome};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::{relay::Relay, support::*};

async fn begin_with_votes(routing: &mut Routing, path: &str) -> wire::BeginWriteResponse {
    routing.begin_write(begin_voted(path, WriteKind::Update)).await.unwrap().into_inner()
}

async fn report(
    routing: &mut Routing,
    begun: &wire::BeginWriteResponse,
    storages: &[String],
) -> Result<wire::CommitWriteResponse, Status> {
    let request = wire::CommitWriteRequest {
        write_id: begun.write_id.clone(),
        router_id: "router".into(),
        committed_storages: storages.to_vec(),
        unvoted: false,
    };
    routing.commit_write(request).await.map(tonic::Response::into_inner)
}

fn asked(route: &wire::Route, storages: &[String]) -> wire::BeginWriteRequest {
    wire::BeginWriteRequest {
        asked_nodes: Some(wire::AskedNodes {
            repository_id: route.repository_id,
            epoch: route.epoch,
            primary: route.primary.clone(),
            storages: storages.to_vec(),
            can_ask_again: false,
        }),
        ..begin_voted("a.git", WriteKind::Update)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_has_one_holder_and_everybody_gets_it_in_turn() {
    const WRITERS: usize = 24;
    const WRITES: usize = 8;
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    create(&mut routing, "a.git").await;
    let holders = std::sync::atomic::AtomicUsize::new(0);
    let writers = (0..WRITERS).map(|number| {
        let (mut routing, _, _) = clients(&coordinators[number % 2]);
        let holders = &holders;
        async move {
            let mut seen = Vec::new();
            for _ in 0..WRITES {
                let begun = begin_with_votes(&mut routing, "a.git").await;
                assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0, "two at once");
                assert_eq!(begun.participants.len(), 3);
                assert_eq!(begun.participants[0], begun.route.as_ref().unwrap().primary);
                holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                seen.push(report(&mut routing, &begun, &begun.participants).await.unwrap().generation);
            }
            seen
        }
    });
    let seen = futures::future::join_all(writers).await;
    // Fair: of those who wait at one coordinator nobody writes often before others have written at all. Between coordinators
    // time decides, and how many writes that is nobody can say.
    for coordinator in 0..2 {
        let waiting: Vec<_> = seen.iter().skip(coordinator).step_by(2).collect();
        let last_first = waiting.iter().map(|seen| seen[0]).max().unwrap();
        let before = waiting.iter().flat_map(|seen| seen.iter()).filter(|write| **write < last_first).count();
        assert!(before < WRITERS * WRITES / 4, "somebody had to wait for {before} writes");
    }
    let mut all = seen.concat();
    all.sort_unstable();
    let last = i64::try_from(WRITERS * WRITES).unwrap() + 1;
    assert_eq!(all, (2..=last).collect::<Vec<_>>(), "each counts once");
    let route = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(generations(&route), [last, last, last]);
    assert_eq!(route.write_quorum, 2);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_or_hangs_up_does_not_get_the_ticket() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let held = begin_with_votes(&mut routing, "a.git").await;
    let hasty = wire::BeginWriteRequest { wait_milliseconds: 50, ..begin("a.git", WriteKind::Update) };
    let refused = routing.begin_write(hasty).await;
    assert_refused(refused, Code::Unavailable, "another write holds the repository; try again");
    let mut impatient = routing.clone();
    let waiting = impatient.begin_write(begin_voted("a.git", WriteKind::Update));
    assert!(tokio::time::timeout(Duration::from_millis(200), waiting).await.is_err());
    abort(&mut routing, &held, Outcome::NotApplied, &[]).await.unwrap();
    let asked = Instant::now();
    let next = begin_with_votes(&mut routing, "a.git").await;
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}: nobody else had it", asked.elapsed());
    assert!(u128::from(next.waited_milliseconds) <= asked.elapsed().as_millis());
    // One that waited is told how long, or it would think its lease over before it began.
    let mut waiter = routing.clone();
    let waiting = waiter.begin_write(begin_voted("a.git", WriteKind::Update));
    let ending = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        report(&mut routing, &next, &next.participants).await.unwrap();
    };
    let (waited, ()) = tokio::join!(waiting, ending);
    let next = waited.unwrap().into_inner();
    assert!((200..5000).contains(&next.waited_milliseconds), "{}", next.waited_milliseconds);
    report(&mut routing, &next, &next.participants).await.unwrap();
    eventually("no write is left", || {
        let mut operator = operator.clone();
        async move {
            let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
            (status.writes_under_way == 0).then_some(())
        }
    })
    .await;
    let _ = &mut operator;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_were_asked_by_an_old_route_are_not_told_to_go_on() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let mut all = vec![route.primary.clone()];
    all.extend(others(&route));
    let begun = routing.begin_write(asked(&route, &all)).await.unwrap().into_inner();
    // One of them did not get it; it was asked, and is told no more.
    report(&mut routing, &begun, &all[..2]).await.unwrap();
    let begun = routing.begin_write(asked(&route, &all)).await.unwrap().into_inner();
    assert_eq!(begun.participants, all[..2], "those that are up to date");
    abort(&mut routing, &begun, Outcome::NotApplied, &[]).await.unwrap();
    // The third missed a write: with it alone the primary is no quorum.
    let few = asked(&route, &[all[0].clone(), all[2].clone()]);
    let stale = "the nodes were asked by a route that does not hold any more";
    assert_refused(routing.begin_write(few).await, Code::Aborted, stale);
    for change in [
        |route: &mut wire::Route| route.epoch += 1,
        |route: &mut wire::Route| route.repository_id += 1,
        |route: &mut wire::Route| route.primary = "node-9".into(),
    ] {
        let mut other = route.clone();
        change(&mut other);
        assert_refused(routing.begin_write(asked(&other, &all)).await, Code::Aborted, stale);
    }
    routing.begin_write(asked(&route, &all)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_left_out_who_is_well_is_told_to_ask_anew_and_not_that_nobody_can_write() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let [left_out, late] = <[String; 2]>::try_from(others(&route)).unwrap();
    let begun = begin_with_votes(&mut routing, "a.git").await;
    report(&mut routing, &begun, &[route.primary.clone(), left_out.clone()]).await.unwrap();
    // Its route was of before that write, and it could not reach the one that has it; nor can it reach the other now.
    let stale = wire::BeginWriteRequest {
        unreachable_storages: vec![left_out.clone(), late.clone()],
        ..asked(&route, &[route.primary.clone(), late.clone()])
    };
    eventually("the coordinator has found all nodes well", || async {
        let refused = routing.clone().begin_write(stale.clone()).await.unwrap_err();
        (refused.code() == Code::Aborted).then_some(())
    })
    .await;
    // Whoever was asked and fell silent since is no hope.
    let gone = wire::BeginWriteRequest {
        unreachable_storages: vec![left_out.clone(), late.clone()],
        ..asked(&route, &[route.primary.clone(), left_out.clone(), late.clone()])
    };
    let read_only = "repository is in read-only mode";
    assert_refused(routing.begin_write(gone).await, Code::FailedPrecondition, read_only);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_can_reach_too_few_is_refused_and_one_that_reached_too_few_is_not_recorded() {
    let mut site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let spare = others(&route);
    let two_gone = wire::BeginWriteRequest {
        unreachable_storages: spare.clone(),
        ..begin_voted("a.git", WriteKind::Update)
    };
    let refused = routing.begin_write(two_gone.clone()).await;
    assert_refused(refused, Code::FailedPrecondition, "repository is in read-only mode");
    let begun = begin_with_votes(&mut routing, "a.git").await;
    let refused = report(&mut routing, &begun, std::slice::from_ref(&route.primary)).await;
    let text = "1 of 2 replicas that must have the write are up to date with it";
    assert_refused(refused, Code::FailedPrecondition, text);
    let recorded = report(&mut routing, &begun, &begun.participants).await.unwrap();
    assert_eq!((recorded.generation, &recorded.primary), (route.generation + 1, &route.primary));
    let new = wire::BeginWriteRequest {
        unreachable_storages: spare.clone(),
        ..begin_voted("b.git", WriteKind::Create)
    };
    let text = "1 of 2 storages that must take part can be reached";
    assert_refused(routing.begin_write(new).await, Code::FailedPrecondition, text);

    // A repository may have a rule of its own.
    let mut sql = site.sql().await;
    sqlx::query("UPDATE repositories SET write_quorum = 'available'").execute(&mut sql).await.unwrap();
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().write_quorum, 1);
    let begun = routing.begin_write(two_gone.clone()).await.unwrap().into_inner();
    assert_eq!(begun.participants, std::slice::from_ref(&route.primary));
    report(&mut routing, &begun, std::slice::from_ref(&route.primary)).await.unwrap();
    site.check_consistency().await;

    // And so may a virtual storage.
    sqlx::query("UPDATE repositories SET write_quorum = NULL").execute(&mut sql).await.unwrap();
    coordinator.stop().await.unwrap();
    site.config.virtual_storages[0].write_quorum = QuorumPolicy::Available;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().write_quorum, 1);
    routing.begin_write(two_gone).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_waits_for_a_replica_that_is_about_to_be_up_to_date() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let old_router = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &old_router, &[&route.primary]).await.unwrap();
    let waiting = async { routing.clone().begin_write(begin_voted("a.git", WriteKind::Update)).await };
    let repairing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        repair(&site).await;
    };
    let (begun, ()) = tokio::join!(waiting, repairing);
    assert_eq!(begun.unwrap().into_inner().participants.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_without_the_primary_moves_it() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_with_votes(&mut routing, "a.git").await;
    let without: Vec<String> = begun.participants[1..].to_vec();
    let recorded = report(&mut routing, &begun, &without).await.unwrap();
    let expected = wire::CommitWriteResponse {
        generation: route.generation + 1,
        primary: without[0].clone(),
        epoch: route.epoch + 1,
    };
    assert_eq!(recorded, expected);
    let (mut other, _, _) = clients(&coordinators[1]);
    assert_eq!(report(&mut other, &begun, &without).await.unwrap(), expected, "said twice, answered alike");
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!((after.primary, after.epoch), (expected.primary, expected.epoch));
    let old = after.replicas.iter().find(|replica| replica.storage == route.primary).unwrap();
    assert_eq!(old.generation, route.generation);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_is_told_to_all_and_its_lost_answer_does_not_take_the_name() {
    let mut site = Site::start().await;
    site.config.timing.write_lease = ConfigDuration::from_secs(60);
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let request = wire::BeginWriteRequest {
        correlation_id: "request-1".into(),
        ..begin_voted("a.git", WriteKind::Create)
    };
    let lost = routing.begin_write(request.clone()).await.unwrap().into_inner();
    let mut expected = vec![lost.route.as_ref().unwrap().primary.clone()];
    expected.extend(lost.assigned_secondaries.clone());
    assert_eq!(lost.participants, expected);
    assert_eq!(expected.len(), 3);
    let other = wire::BeginWriteRequest { correlation_id: "request-2".into(), ..request.clone() };
    assert_eq!(routing.begin_write(other).await.unwrap_err().code(), Code::AlreadyExists);
    let again = routing.begin_write(request).await.unwrap().into_inner();
    assert_ne!(again.write_id, lost.write_id);
    assert_eq!(
        report(&mut routing, &lost, &lost.participants).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    report(&mut routing, &again, &again.participants[..2]).await.unwrap();
    let route = resolve(&mut routing, "a.git").await.unwrap();
    let mut sorted = generations(&route);
    sorted.sort_unstable();
    assert_eq!(sorted, [-1, 1, 1]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undisturbed_write_costs_two_statements() {
    const WRITES: usize = 20;
    let mut site = Site::start().await;
    let relay = Relay::start(&site.database).await;
    site.config.database_url = DatabaseUrl::new(relay.url.clone());
    site.config.subscribers.clear();
    let timing = &mut site.config.timing;
    for interval in [
        &mut timing.sweep_interval,
        &mut timing.probe_interval,
        &mut timing.relay_interval,
        &mut timing.reconcile_interval,
        &mut timing.movement_interval,
        &mut timing.verification_interval,
    ] {
        *interval = ConfigDuration::from_secs(3600);
    }
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    relay.statements();
    for _ in 0..WRITES {
        let begun = begin_with_votes(&mut routing, "a.git").await;
        report(&mut routing, &begun, &begun.participants).await.unwrap();
    }
    let mut run = relay.statements();
    let all = run.len();
    let begins = run.iter().filter(|sql| sql.contains("INSERT INTO writes")).count();
    let commits = run.iter().filter(|sql| sql.contains("DELETE FROM writes w USING repo")).count();
    assert_eq!((begins, commits), (WRITES, WRITES), "of {all}");
    // What the relay does when it hears the bell is not on the way of a write.
    run.retain(|sql| !sql.contains("writes w USING repo") && !sql.contains("INSERT INTO writes"));
    for sql in &run {
        let times = run.iter().filter(|other| *other == sql).count();
        let of_the_relay = sql.contains("UPDATE duties") || sql.contains("INTO duties");
        assert!(of_the_relay || times < WRITES / 2, "{times} times: {sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_a_write_fails_at_once() {
    let mut site = Site::start().await;
    let relay = Relay::start(&site.database).await;
    site.config.database_url = DatabaseUrl::new(relay.url.clone());
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let begun = begin_with_votes(&mut routing, "a.git").await;
    for away in [Relay::shut, Relay::stop] {
        away(&relay);
        let asked = Instant::now();
        let (update, creation, commit) = tokio::join!(
            async { routing.clone().begin_write(begin_voted("a.git", WriteKind::Update)).await.map(drop) },
            async { routing.clone().begin_write(begin_voted("b.git", WriteKind::Create)).await.map(drop) },
            async { report(&mut routing.clone(), &begun, &begun.participants).await.map(drop) },
        );
        let took = asked.elapsed();
        for result in [update, creation, commit] {
            assert_refused(result, Code::Unavailable, "the database cannot be reached; try again");
        }
        assert!(took < Duration::from_secs(1), "{took:?}");
        relay.open();
        eventually("the database is back", || {
            let mut routing = routing.clone();
            async move { resolve(&mut routing, "a.git").await.ok() }
        })
        .await;
    }
    eventually("a repeated report is recorded", || {
        let (mut routing, begun) = (routing.clone(), &begun);
        async move { report(&mut routing, begun, &begun.participants).await.ok() }
    })
    .await;
    eventually("the next write", || {
        let mut routing = routing.clone();
        async move { routing.begin_write(begin_voted("a.git", WriteKind::Update)).await.ok() }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_coordinator_began_for_a_lost_answer_is_given_up() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut first, _, _) = clients(&coordinators[0]);
    let (mut second, _, _) = clients(&coordinators[1]);
    create(&mut first, "a.git").await;
    let [lost, own] = [uuid::Uuid::now_v7().to_string(), uuid::Uuid::now_v7().to_string()];
    let request =
        wire::BeginWriteRequest { write_id: lost.clone(), ..begin_voted("a.git", WriteKind::Update) };
    let begun = first.begin_write(request.clone()).await.unwrap().into_inner();
    assert_eq!(begun.write_id, lost);

    let again = wire::BeginWriteRequest {
        write_id: own.clone(),
        given_up_write_ids: vec![lost],
        wait_milliseconds: 500,
        ..request
    };
    let anew = second.begin_write(again).await.expect("nothing stands in the way").into_inner();
    assert_eq!(anew.write_id, own);
    let late = report(&mut first, &begun, &begun.participants).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late:?}");
    report(&mut second, &anew, &anew.participants).await.unwrap();
}
