//! Copies: their rounds, leases, sources, and ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tabularium_common::config::ConfigDuration;
use tabularium_coordinator::QuorumPolicy;
use tabularium_proto::coordinator::{
    self as wire, WriteKind, duty_service_client::DutyServiceClient, finish_duty_request::Outcome,
    finish_duty_response::Disposition, start_duty_response::Work,
};
use tonic::{Code, transport::Channel};

use crate::{
    duties::{failed, finish, finish_attempt, open, start, start_copy, succeeded},
    support::*,
};

type Duties = DutyServiceClient<Channel>;

fn bad_source() -> Outcome {
    Outcome::Failed(wire::DutyFailed { message: "torn".into(), unreachable: false, bad_source: true })
}

async fn renew(duties: &mut Duties, duty_id: &str, worker: &str) -> Result<(), Code> {
    let request = wire::RenewDutyRequest { duty_id: duty_id.into(), worker_id: worker.into() };
    duties.renew_duty(request).await.map(drop).map_err(|status| status.code())
}

/// Writes to the primary and to `also`; the rest is left behind.
async fn write(routing: &mut Routing, path: &str, also: &[&str]) -> i64 {
    let request = if also.is_empty() { begin } else { begin_voted };
    let begun = routing.begin_write(request(path, WriteKind::Update)).await.unwrap().into_inner();
    let primary = begun.route.as_ref().unwrap().primary.clone();
    let storages: Vec<&str> = std::iter::once(primary.as_str()).chain(also.iter().copied()).collect();
    commit(routing, &begun, &storages).await.unwrap()
}

async fn generation_of(routing: &mut Routing, path: &str, storage: &str) -> (i64, i64) {
    let route = resolve(routing, path).await.unwrap();
    let copy = route.replicas.iter().find(|replica| replica.storage == storage).unwrap();
    (copy.generation, route.generation)
}

fn round(disposition: Disposition) -> wire::ReplicateWork {
    match disposition {
        Disposition::AnotherRound(work) => work,
        other => panic!("no other round: {other:?}"),
    }
}

async fn history(site: &Site, duty_id: &str) -> Vec<(String, bool)> {
    let mut sql = site.sql().await;
    sqlx::query_as("SELECT outcome, under_ticket FROM duty_history WHERE duty_id = $1::uuid ORDER BY id")
        .bind(duty_id)
        .fetch_all(&mut sql)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_round_runs_while_nobody_writes() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let also = others(&create(&mut routing, "a.git").await).remove(0);
    write(&mut routing, "a.git", &[&also]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let (id, target) = (duty.duty_id.as_str(), duty.target.as_str());
    let first = start_copy(&mut duties, id, "w").await;
    assert!(!first.under_ticket && first.attempt > 0 && first.lease_milliseconds == 10_000);
    let newer = write(&mut routing, "a.git", &[&also]).await;
    let last = round(finish_attempt(&mut duties, id, "w", first.attempt, succeeded(first.generation)).await);
    assert!(last.under_ticket && last.attempt > first.attempt);
    assert_eq!((last.generation, last.deadline_milliseconds), (newer, 5000));
    assert_eq!(generation_of(&mut routing, "a.git", target).await, (first.generation, newer));

    let hasty = wire::BeginWriteRequest { wait_milliseconds: 100, ..begin("a.git", WriteKind::Update) };
    assert_eq!(routing.begin_write(hasty).await.unwrap_err().code(), Code::Unavailable, "nobody writes");
    renew(&mut duties, id, "w").await.unwrap();
    let patient = {
        let mut routing = routing.clone();
        let request =
            wire::BeginWriteRequest { wait_milliseconds: 9000, ..begin("a.git", WriteKind::Update) };
        async move { routing.begin_write(request).await.unwrap().into_inner() }
    };
    let ended = finish_attempt(&mut duties, id, "w", last.attempt, succeeded(last.generation));
    let (begun, ended) = tokio::join!(patient, ended);
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    assert_eq!(generation_of(&mut routing, "a.git", target).await, (newer, newer));
    assert!(begun.participants.iter().any(|storage| storage == target), "and takes part from now on");
    abort(&mut routing, &begun, wire::abort_write_request::Outcome::NotApplied, &[]).await.unwrap();
    assert_eq!(history(&site, id).await, [("round".to_owned(), false), ("done".to_owned(), true)]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_during_a_write_does_not_count_before_the_write_is_over() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let before = write(&mut routing, "a.git", &[]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let work = start_copy(&mut duties, &duty.duty_id, "w").await;
    let begun = begin_write(&mut routing, "a.git").await;
    // What it holds may be half of that write; only when that is given up it is known to be none of it.
    let reporting = {
        let (mut duties, id) = (duties.clone(), duty.duty_id.clone());
        async move { finish_attempt(&mut duties, &id, "w", work.attempt, succeeded(work.generation)).await }
    };
    let aborting = async {
        let waits = async {
            assert!(generation_of(&mut routing.clone(), "a.git", &duty.target).await.0 < before);
        };
        waits.await;
        abort(&mut routing, &begun, wire::abort_write_request::Outcome::NotApplied, &[]).await.unwrap();
    };
    let (ended, ()) = tokio::join!(reporting, aborting);
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    assert_eq!(generation_of(&mut routing, "a.git", &duty.target).await, (before, before));
    let begun = begin_write(&mut routing, "a.git").await;
    abort(&mut routing, &begun, wire::abort_write_request::Outcome::NotApplied, &[]).await.unwrap();
    site.check_consistency().await;
}

/// Ends a copy's first round while somebody writes, so that it waits for the ticket; that write is recorded, `overtake`
/// happens to the duty and its target, and nobody may hold a ticket after it.
async fn overtaken_while_it_waits(overtake: &'static str) {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let also = others(&create(&mut routing, "a.git").await).remove(0);
    write(&mut routing, "a.git", &[&also]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let work = start_copy(&mut duties, &duty.duty_id, "w").await;
    let begun = routing.begin_write(begin_voted("a.git", WriteKind::Update)).await.unwrap().into_inner();
    let reporting = {
        let (mut duties, id) = (duties.clone(), duty.duty_id.clone());
        async move { finish_attempt(&mut duties, &id, "w", work.attempt, succeeded(work.generation)).await }
    };
    let overtaking = async {
        // It waits by then; that this may take longer changes nothing.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut sql = site.sql().await;
        sqlx::query(overtake).bind(&duty.duty_id).execute(&mut sql).await.unwrap();
        let primary = begun.route.as_ref().unwrap().primary.clone();
        commit(&mut routing, &begun, &[&primary, &also]).await.unwrap();
    };
    let (ended, ()) = tokio::join!(reporting, overtaking);
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    let held: i64 =
        sqlx::query_scalar("SELECT count(*) FROM writes").fetch_one(&mut site.sql().await).await.unwrap();
    assert_eq!(held, 0, "left to run out it would undo the next copy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_overtaken_while_it_waited_for_the_ticket_gives_that_back() {
    overtaken_while_it_waits("UPDATE duties SET state = 'done', finished_at = now() WHERE id = $1::uuid")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_has_nothing_to_copy_under_the_ticket_gives_that_back() {
    overtaken_while_it_waits(
        "UPDATE replicas SET generation = 1000 FROM duties
         WHERE id = $1::uuid AND replicas.repository_id = duties.repository_id AND storage = target",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_takes_too_long_gives_the_ticket_back_and_plain_rounds_go_on() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    write(&mut routing, "a.git", &[]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let id = duty.duty_id.as_str();
    let first = start_copy(&mut duties, id, "w").await;
    write(&mut routing, "a.git", &[]).await;
    let last = round(finish_attempt(&mut duties, id, "w", first.attempt, succeeded(0)).await);
    assert!(last.under_ticket);
    let plain = round(finish_attempt(&mut duties, id, "w", last.attempt, failed(true)).await);
    assert!(!plain.under_ticket && plain.attempt > last.attempt);
    let newer = write(&mut routing, "a.git", &[]).await;
    let second = round(finish_attempt(&mut duties, id, "w", plain.attempt, succeeded(0)).await);
    assert!(second.under_ticket, "it is tried again after rounds without");
    let ended = finish_attempt(&mut duties, id, "w", second.attempt, succeeded(0)).await;
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    assert_eq!(generation_of(&mut routing, "a.git", &duty.target).await, (newer, newer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_worker_loses_the_copy_and_what_it_says_later_counts_nothing() {
    let mut site = Site::start().await;
    site.config.repair.lease = ConfigDuration::from_millis(400);
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let generation = write(&mut routing, "a.git", &[]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let id = duty.duty_id.clone();
    let silent = start_copy(&mut duties, &id, "silent").await;
    assert_eq!(renew(&mut duties, &id, "other").await, Err(Code::FailedPrecondition));
    // Renewed it is kept for longer than one lease.
    let kept_until = std::time::Instant::now() + Duration::from_millis(900);
    while std::time::Instant::now() < kept_until {
        renew(&mut duties, &id, "silent").await.unwrap();
        let request = wire::StartDutyRequest { duty_id: id.clone(), worker_id: "next".into() };
        assert_eq!(duties.start_duty(request).await.unwrap_err().code(), Code::Unavailable);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let next = eventually("another worker gets it", || {
        let (mut duties, duty_id) = (duties.clone(), id.clone());
        async move {
            let request = wire::StartDutyRequest { duty_id, worker_id: "next".into() };
            match duties.start_duty(request).await.ok()?.into_inner().work? {
                Work::Replicate(work) => Some(work),
                _ => None,
            }
        }
    })
    .await;
    assert!(next.attempt > silent.attempt);
    assert_eq!(renew(&mut duties, &id, "silent").await, Err(Code::FailedPrecondition));
    let ended = finish_attempt(&mut duties, &id, "silent", silent.attempt, succeeded(generation)).await;
    assert!(matches!(ended, Disposition::Done(_)));
    assert!(generation_of(&mut routing, "a.git", &duty.target).await.0 < generation);
    finish_attempt(&mut duties, &id, "next", next.attempt, succeeded(generation)).await;
    assert_eq!(generation_of(&mut routing, "a.git", &duty.target).await, (generation, generation));
    assert_eq!(history(&site, &id).await, [("lost".to_owned(), false), ("done".to_owned(), false)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bus_is_told_again_of_a_copy_whose_worker_is_silent() {
    let mut site = Site::start().await;
    site.config.repair.lease = ConfigDuration::from_millis(200);
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    write(&mut routing, "a.git", &[]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let published = async |times: i32| {
        eventually("it is published", || async {
            let mut sql = site.sql().await;
            let published: i32 = sqlx::query_scalar("SELECT publications FROM duties WHERE id = $1::uuid")
                .bind(&duty.duty_id)
                .fetch_one(&mut sql)
                .await
                .unwrap();
            (published >= times).then_some(())
        })
        .await;
    };
    // The first time has nothing to do with the worker.
    published(1).await;
    start_copy(&mut duties, &duty.duty_id, "silent").await;
    published(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_is_repeated_vouches_for_no_round_that_nobody_worked_on() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    write(&mut routing, "a.git", &[]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let id = duty.duty_id.as_str();
    let first = start_copy(&mut duties, id, "w").await;
    let newer = write(&mut routing, "a.git", &[]).await;
    let lost = round(finish_attempt(&mut duties, id, "w", first.attempt, succeeded(0)).await);
    let again = round(finish_attempt(&mut duties, id, "w", first.attempt, succeeded(0)).await);
    assert!(again.attempt > lost.attempt);
    assert!(generation_of(&mut routing, "a.git", &duty.target).await.0 < newer);
    let ended = finish_attempt(&mut duties, id, "w", again.attempt, succeeded(0)).await;
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    assert_eq!(generation_of(&mut routing, "a.git", &duty.target).await, (newer, newer));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_source_is_taken_after_a_bad_one_which_is_made_again_when_others_can_go_on() {
    for policy in [QuorumPolicy::Majority, QuorumPolicy::Available] {
        let mut site = Site::start().await;
        site.config.virtual_storages[0].write_quorum = policy;
        let coordinator = site.coordinator().await;
        let (mut routing, mut duties, mut operator) = clients(&coordinator);
        let route = create(&mut routing, "a.git").await;
        let others = others(&route);
        let (bad, target) = (others[0].as_str(), others[1].as_str());
        let newest = write(&mut routing, "a.git", &[bad]).await;
        let duty = open(&mut operator, "replication").await.remove(0);
        assert_eq!(duty.target, target);
        let id = duty.duty_id.as_str();
        let work = start_copy(&mut duties, id, "w").await;
        assert_eq!(work.source.unwrap().storage, bad, "the primary is spared");
        assert_eq!(work.witness.unwrap().storage, route.primary);
        let retried = finish_attempt(&mut duties, id, "w", work.attempt, bad_source()).await;
        assert!(matches!(retried, Disposition::Retry(_)), "{retried:?}");
        let held = generation_of(&mut routing, "a.git", bad).await.0;
        let owed = open(&mut operator, "replication").await;
        let remade = owed.iter().any(|duty| duty.target == bad);
        match policy {
            // Two of three must take a write: it cannot be missed yet.
            QuorumPolicy::Majority => assert_eq!((held, remade), (newest, false)),
            QuorumPolicy::Available => assert_eq!((held, remade), (-1, true)),
        }
        let work = start_copy(&mut duties, id, "w").await;
        assert_eq!(work.source.unwrap().storage, route.primary);
        finish_attempt(&mut duties, id, "w", work.attempt, succeeded(newest)).await;
        assert_eq!(generation_of(&mut routing, "a.git", target).await, (newest, newest));
        assert_eq!(history(&site, id).await[0].0, "failed");
        site.check_consistency().await;
        coordinator.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_given_up_meanwhile_makes_no_good_copy() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let others = others(&route);
    write(&mut routing, "a.git", &[&others[0]]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let work = start_copy(&mut duties, &duty.duty_id, "w").await;
    assert_eq!(work.source.as_ref().unwrap().storage, others[0]);
    let mut sql = site.sql().await;
    sqlx::query("UPDATE replicas SET generation = -1, behind = true WHERE storage = $1")
        .bind(&others[0])
        .execute(&mut sql)
        .await
        .unwrap();
    let again = finish_attempt(&mut duties, &duty.duty_id, "w", work.attempt, succeeded(0)).await;
    let again = round(again);
    assert_eq!(again.source.unwrap().storage, route.primary);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_repository_rests_between_tries_and_others_do_not_wait_for_it() {
    let mut site = Site::start().await;
    site.config.repair.parked_pause = ConfigDuration::from_secs(3600);
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "bad.git").await;
    let others = others(&route);
    write(&mut routing, "bad.git", &[&others[0]]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    for _ in 0..2 {
        start_copy(&mut duties, &duty.duty_id, "w").await;
        finish(&mut duties, &duty.duty_id, "w", failed(false)).await;
    }
    // Written to again and again, it is owed, but not told to anybody.
    for _ in 0..3 {
        write(&mut routing, "bad.git", &[&others[0]]).await;
    }
    create(&mut routing, "good.git").await;
    write(&mut routing, "good.git", &[]).await;
    eventually("the others are told", || {
        let mut operator = operator.clone();
        async move {
            let owed = open(&mut operator, "replication").await;
            let good: Vec<_> = owed.iter().filter(|duty| duty.relative_path == "good.git").collect();
            (good.len() == 2 && good.iter().all(|duty| duty.state == "published")).then_some(())
        }
    })
    .await;
    let owed = open(&mut operator, "replication").await;
    let parked = owed.iter().find(|owed| owed.duty_id == duty.duty_id).unwrap();
    let ends: Vec<_> = parked
        .ended_attempts
        .iter()
        .map(|ended| (ended.outcome.as_str(), ended.error.as_str(), ended.copy_attempt))
        .collect();
    assert!(
        matches!(ends[..], [("failed", "no", second), ("failed", "no", first)] if second > first),
        "{ends:?}"
    );
    let states = |owed: Vec<wire::DutyDetails>| {
        let mut states: Vec<String> =
            owed.into_iter().filter(|duty| duty.relative_path == "bad.git").map(|duty| duty.state).collect();
        states.sort();
        states
    };
    assert_eq!(states(open(&mut operator, "replication").await), ["parked", "pending"]);
    operator.retry_duty(wire::RetryDutyRequest { duty_id: duty.duty_id.clone() }).await.unwrap();
    let work = start_copy(&mut duties, &duty.duty_id, "w").await;
    let ended = finish_attempt(&mut duties, &duty.duty_id, "w", work.attempt, succeeded(0)).await;
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_aside_is_set_aside_again_after_one_failure() {
    let mut site = Site::start().await;
    site.config.timing.parked_after = 3;
    site.config.repair.parked_pause = ConfigDuration::from_millis(1);
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let others = others(&route);
    write(&mut routing, "a.git", &[&others[0]]).await;
    let first = open(&mut operator, "replication").await.remove(0);
    for _ in 0..3 {
        start_copy(&mut duties, &first.duty_id, "w").await;
        finish(&mut duties, &first.duty_id, "w", failed(false)).await;
    }
    write(&mut routing, "a.git", &[&others[0]]).await;
    let owed = open(&mut operator, "replication").await;
    let second = owed.iter().find(|duty| duty.state != "parked").unwrap();
    start(&mut duties, &second.duty_id, "w").await;
    let ended = finish(&mut duties, &second.duty_id, "w", failed(false)).await;
    assert!(matches!(ended, Disposition::Parked(_)), "{ended:?}");
    let owed = open(&mut operator, "replication").await;
    assert_eq!(owed.len(), 1, "the newer one stays: {owed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn routers_learn_that_a_replica_is_up_to_date() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    write(&mut routing, "a.git", &[]).await;
    let router = Router::start(coordinator.grpc_address(), "r", "a.git").await;
    assert!(router.fill().await);
    let duty = open(&mut operator, "replication").await.remove(0);
    let work = start_copy(&mut duties, &duty.duty_id, "w").await;
    assert!(router.cached_generation().is_some());
    finish_attempt(&mut duties, &duty.duty_id, "w", work.attempt, succeeded(0)).await;
    eventually("the cached route is taken back", || async {
        router.cached_generation().is_none().then_some(())
    })
    .await;
    assert!(router.fill().await, "and the new one may be cached");
}

/// One push: nodes are asked by the route, the upload takes its time, then the ticket is taken. Answers who took part, or
/// nothing when it has to be begun anew.
async fn push(routing: &mut Routing, path: &str, upload: Duration) -> Option<Vec<String>> {
    let route = resolve(routing, path).await.unwrap();
    let newest = route.replicas.iter().filter(|replica| replica.generation == route.generation);
    let storages = newest.map(|replica| replica.storage.clone()).collect();
    tokio::time::sleep(upload).await;
    let asked = wire::AskedNodes {
        repository_id: route.repository_id,
        epoch: route.epoch,
        primary: route.primary,
        storages,
        can_ask_again: true,
    };
    let request =
        wire::BeginWriteRequest { asked_nodes: Some(asked), ..begin_voted(path, WriteKind::Update) };
    let begun = match routing.begin_write(request).await {
        Ok(begun) => begun.into_inner(),
        Err(status) if status.code() == Code::Aborted => return None,
        Err(status) => panic!("{status}"),
    };
    let storages: Vec<&str> = begun.participants.iter().map(String::as_str).collect();
    commit(routing, &begun, &storages).await.unwrap();
    Some(begun.participants)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_catches_up_with_a_repository_that_is_pushed_to_all_the_time_and_stays_level() {
    const UPLOAD: Duration = Duration::from_millis(150);
    const PAUSE: Duration = Duration::from_millis(120);
    const COPY: Duration = Duration::from_millis(200);
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, duties, operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let others = others(&route);
    write(&mut routing, "a.git", &[&others[0]]).await;
    let late = others[1].clone();

    let level = Arc::new(AtomicU32::new(0));
    let pushes = Arc::new(AtomicU32::new(0));
    let tasks = tabularium_common::lifecycle::Tasks::new();
    let stop = tasks.stopping();
    let mut running = Vec::new();
    for _ in 0..3 {
        let (mut routing, late, stop) = (routing.clone(), late.clone(), stop.clone());
        let (level, pushes) = (Arc::clone(&level), Arc::clone(&pushes));
        running.push(tasks.spawn("pusher", async move {
            while !stop.is_cancelled() {
                if let Some(participants) = push(&mut routing, "a.git", UPLOAD).await {
                    pushes.fetch_add(1, Ordering::SeqCst);
                    if participants.contains(&late) {
                        level.fetch_add(1, Ordering::SeqCst);
                    } else {
                        level.store(0, Ordering::SeqCst);
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        }));
    }
    let worker = {
        let (mut duties, mut operator, stop) = (duties.clone(), operator.clone(), stop.clone());
        tasks.spawn("worker", async move {
            while !stop.is_cancelled() {
                for duty in open(&mut operator, "replication").await {
                    let mut next = match start(&mut duties, &duty.duty_id, "w").await {
                        Work::Replicate(work) => Some(work),
                        _ => None,
                    };
                    while let Some(work) = next.take() {
                        tokio::time::sleep(COPY).await;
                        let outcome = succeeded(work.generation);
                        let id = &duty.duty_id;
                        if let Disposition::AnotherRound(work) =
                            finish_attempt(&mut duties, id, "w", work.attempt, outcome).await
                        {
                            next = Some(work);
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    let began = std::time::Instant::now();
    eventually("it takes part in thirty pushes in a row", || async {
        (level.load(Ordering::SeqCst) >= 30).then_some(())
    })
    .await;
    let rate = f64::from(pushes.load(Ordering::SeqCst)) / began.elapsed().as_secs_f64();
    println!("{rate:.1} pushes a second, level after {:.1} s", began.elapsed().as_secs_f64());
    tasks.drain(PATIENCE).await.unwrap();
    for task in running {
        task.await.unwrap();
    }
    worker.await.unwrap();
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(generations(&after), [after.generation; 3]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_waits_for_a_copy_lets_it_have_the_ticket() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let also = others(&create(&mut routing, "a.git").await).remove(0);
    write(&mut routing, "a.git", &[&also]).await;
    let duty = open(&mut operator, "replication").await.remove(0);
    let first = start_copy(&mut duties, &duty.duty_id, "w").await;
    write(&mut routing, "a.git", &[&also]).await;
    let primary = resolve(&mut routing, "a.git").await.unwrap().primary;

    // Two of three have to agree: without the primary the write needs the replica that is being copied to.
    let waiting = {
        let mut routing = routing.clone();
        let request = wire::BeginWriteRequest {
            unreachable_storages: vec![primary],
            wait_milliseconds: 9000,
            ..begin("a.git", WriteKind::Update)
        };
        async move { routing.begin_write(request).await }
    };
    let copying = async {
        // The write is at the head of the queue by then; that this may take longer changes nothing.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = std::time::Instant::now();
        let report =
            finish_attempt(&mut duties, &duty.duty_id, "w", first.attempt, succeeded(first.generation));
        let last = round(report.await);
        assert!(last.under_ticket && begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        finish_attempt(&mut duties, &duty.duty_id, "w", last.attempt, succeeded(last.generation)).await
    };
    let (begun, ended) = tokio::join!(waiting, copying);
    assert!(matches!(ended, Disposition::Done(_)), "{ended:?}");
    let begun = begun.expect("what it waited for has come").into_inner();
    assert!(begun.participants.contains(&duty.target));
    abort(&mut routing, &begun, wire::abort_write_request::Outcome::NotApplied, &[]).await.unwrap();
    site.check_consistency().await;
}
