//! The outbox, the bus, and workers.

use futures::StreamExt as _;
use tabularium_common::duties::{Class, DutyMessage, read_body};
use tabularium_proto::coordinator::{
    self as wire, WriteKind, abort_write_request::Outcome as AbortOutcome,
    duty_service_client::DutyServiceClient, finish_duty_request::Outcome, finish_duty_response::Disposition,
    start_duty_response::Work,
};
use tonic::{Code, transport::Channel};

use crate::support::*;

pub(crate) async fn start(duties: &mut DutyServiceClient<Channel>, duty_id: &str, worker: &str) -> Work {
    let request = wire::StartDutyRequest { duty_id: duty_id.into(), worker_id: worker.into() };
    duties.start_duty(request).await.unwrap().into_inner().work.unwrap()
}

/// A worker starts a copy.
pub(crate) async fn start_copy(
    duties: &mut DutyServiceClient<Channel>,
    duty_id: &str,
    worker: &str,
) -> wire::ReplicateWork {
    match start(duties, duty_id, worker).await {
        Work::Replicate(work) => work,
        other => panic!("no copy: {other:?}"),
    }
}

/// Reports about whichever attempt is under way.
pub(crate) async fn finish(
    duties: &mut DutyServiceClient<Channel>,
    duty_id: &str,
    worker: &str,
    outcome: Outcome,
) -> Disposition {
    finish_attempt(duties, duty_id, worker, 0, outcome).await
}

pub(crate) async fn finish_attempt(
    duties: &mut DutyServiceClient<Channel>,
    duty_id: &str,
    worker: &str,
    attempt: i64,
    outcome: Outcome,
) -> Disposition {
    let (duty_id, worker_id) = (duty_id.into(), worker.into());
    let request = wire::FinishDutyRequest { duty_id, worker_id, outcome: Some(outcome), attempt };
    duties.finish_duty(request).await.unwrap().into_inner().disposition.unwrap()
}

pub(crate) fn succeeded(reached: i64) -> Outcome {
    Outcome::Succeeded(wire::DutySucceeded { reached })
}

pub(crate) fn failed(unreachable: bool) -> Outcome {
    Outcome::Failed(wire::DutyFailed { message: "no".into(), unreachable, bad_source: false })
}

/// Duties of a class that are not done.
pub(crate) async fn open(
    operator: &mut wire::operator_service_client::OperatorServiceClient<Channel>,
    class: &str,
) -> Vec<wire::DutyDetails> {
    let request = wire::ListDutiesRequest::default();
    let mut duties = operator.list_duties(request).await.unwrap().into_inner().duties;
    duties.retain(|duty| duty.subject.starts_with(class));
    duties.sort_by(|a, b| a.target.cmp(&b.target));
    duties
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_rings_for_every_copy_and_the_copies_catch_up() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, _) = clients(&coordinator);
    let route = create(&mut routing, "g/a.git").await;
    let begun =
        wire::BeginWriteRequest { correlation_id: "corr-1".into(), ..begin("g/a.git", WriteKind::Update) };
    let begun = routing.begin_write(begun).await.unwrap().into_inner();
    let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();

    let client = async_nats::connect(&site.config.nats_url).await.unwrap();
    let context = async_nats::jetstream::new(client);
    let stream =
        eventually("the stream", || async { context.get_stream(Class::Replication.stream()).await.ok() })
            .await;
    let consumer = stream.create_consumer(Class::Replication.consumer_config(10)).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    let mut targets = Vec::new();
    while targets.len() < 2 {
        let message = tokio::time::timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap();
        let body: DutyMessage = read_body(&message.payload).unwrap();
        let headers = message.headers.as_ref().unwrap();
        assert_eq!(headers.get("x-gitlab-correlation-id").unwrap().as_str(), "corr-1");
        assert_eq!(headers.get("Nats-Msg-Id").unwrap().as_str(), format!("{}:1", body.duty_id));
        let id = body.duty_id.to_string();
        let Work::Replicate(work) = start(&mut duties, &id, "w").await else { panic!("replicate") };
        let target = work.target.unwrap();
        assert_eq!(message.subject.as_str(), format!("replication.default.{}", target.storage));
        let source = work.source.unwrap().storage;
        assert!(if targets.is_empty() { source == route.primary } else { source == targets[0] }, "{source}");
        assert_eq!((work.generation, work.relative_path.as_str()), (generation, "g/a.git"));
        let busy = wire::StartDutyRequest { duty_id: id.clone(), worker_id: "other".into() };
        assert_eq!(duties.start_duty(busy).await.unwrap_err().code(), Code::Unavailable);
        assert!(matches!(finish(&mut duties, &id, "other", succeeded(99)).await, Disposition::Done(_)));
        let before = resolve(&mut routing, "g/a.git").await.unwrap();
        let copy = before.replicas.iter().find(|replica| replica.storage == target.storage).unwrap();
        assert!(copy.generation < generation, "another worker's word counts nothing");
        assert!(matches!(
            finish(&mut duties, &id, "w", succeeded(work.generation)).await,
            Disposition::Done(_)
        ));
        message.ack().await.unwrap();
        assert!(matches!(start(&mut duties, &id, "w").await, Work::Nothing(_)));
        targets.push(target.storage);
    }
    targets.sort();
    assert_eq!(targets, others(&route));
    assert_eq!(generations(&resolve(&mut routing, "g/a.git").await.unwrap()), [generation; 3]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duties_for_one_copy_coalesce_and_what_came_meanwhile_is_owed_anew() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let primary = route.primary.as_str();
    for _ in 0..3 {
        let begun = begin_write(&mut routing, "a.git").await;
        commit(&mut routing, &begun, &[primary]).await.unwrap();
    }
    let waiting = open(&mut operator, "replication").await;
    assert_eq!(waiting.iter().map(|duty| duty.target.clone()).collect::<Vec<_>>(), others(&route));
    let first = &waiting[0];
    let Work::Replicate(work) = start(&mut duties, &first.duty_id, "w").await else { panic!("replicate") };
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[primary]).await.unwrap();
    let second = open(&mut operator, "replication").await;
    let second = second
        .iter()
        .find(|duty| duty.target == first.target && duty.duty_id != first.duty_id)
        .expect("a write while a copy is under way is owed beside it");
    let Work::Nothing(nothing) = start(&mut duties, &second.duty_id, "w2").await else { panic!("nothing") };
    assert_eq!(nothing.reason, "the same is under way");
    let Disposition::AnotherRound(round) =
        finish(&mut duties, &first.duty_id, "w", succeeded(work.generation)).await
    else {
        panic!("still behind")
    };
    assert!(round.generation > work.generation && round.attempt > work.attempt);
    finish(&mut duties, &first.duty_id, "w", succeeded(round.generation + 100)).await;
    let after = resolve(&mut routing, "a.git").await.unwrap();
    let copy = after.replicas.iter().find(|replica| replica.storage == first.target).unwrap();
    assert_eq!(copy.generation, after.generation, "and not more than there is");
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_retried_then_parked_then_retried_by_hand() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let duty = open(&mut operator, "replication").await.remove(0);
    let id = duty.duty_id.as_str();
    for _ in 0..4 {
        start(&mut duties, id, "w").await;
        let Disposition::Retry(retry) = finish(&mut duties, id, "w", failed(true)).await else {
            panic!("never parked for being unreachable")
        };
        assert!(retry.delay.unwrap().seconds < 30);
    }
    start(&mut duties, id, "w").await;
    assert!(matches!(finish(&mut duties, id, "w", failed(false)).await, Disposition::Retry(_)));
    start(&mut duties, id, "w").await;
    let Disposition::Parked(parked) = finish(&mut duties, id, "w", failed(false)).await else {
        panic!("parked")
    };
    assert_eq!(parked.attempts, 6);
    let listed = wire::ListDutiesRequest { state: "parked".into(), limit: 0 };
    let listed = operator.list_duties(listed).await.unwrap().into_inner().duties;
    assert_eq!((listed.len(), listed[0].last_error.as_str()), (1, "no"));
    assert_eq!(listed[0].relative_path, "a.git");
    assert!(matches!(start(&mut duties, id, "w").await, Work::Nothing(_)));
    operator.retry_duty(wire::RetryDutyRequest { duty_id: id.into() }).await.unwrap();
    let again = operator.retry_duty(wire::RetryDutyRequest { duty_id: id.into() }).await;
    assert_eq!(again.unwrap_err().code(), Code::NotFound);
    let Work::Replicate(work) = start(&mut duties, id, "w").await else { panic!("replicate") };
    finish(&mut duties, id, "w", succeeded(work.generation)).await;
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_for_a_removed_repository_is_cleaned_up() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let copy = open(&mut operator, "replication").await.remove(0);
    start(&mut duties, &copy.duty_id, "w").await;
    routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("a.git")) }).await.unwrap();
    for duty in open(&mut operator, "cleanup").await {
        let Work::Cleanup(work) = start(&mut duties, &duty.duty_id, "w").await else { panic!("cleanup") };
        assert_eq!(work.replica_path, route.replica_path);
        assert!(!work.target.unwrap().address.is_empty());
        finish(&mut duties, &duty.duty_id, "w", succeeded(0)).await;
    }
    assert_eq!(open(&mut operator, "cleanup").await.len(), 0);
    finish(&mut duties, &copy.duty_id, "w", succeeded(route.generation + 1)).await;
    let owed = open(&mut operator, "cleanup").await;
    assert_eq!(owed.iter().map(|duty| duty.target.as_str()).collect::<Vec<_>>(), [copy.target.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_forgotten_is_found_and_what_is_stale_rung_again() {
    use tabularium_common::config::ConfigDuration;
    let mut site = Site::start().await;
    site.config.timing.republish_after = ConfigDuration::from_millis(100);
    site.config.timing.keep_done_duties = ConfigDuration::from_millis(10);
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let mut sql = site.sql().await;
    sqlx::query("UPDATE duties SET state = 'done', finished_at = now()").execute(&mut sql).await.unwrap();
    eventually("the reconciler owes the copies again", || {
        let mut operator = operator.clone();
        async move { (open(&mut operator, "replication").await.len() == 2).then_some(()) }
    })
    .await;
    eventually("published again without a result", || async {
        let mut sql = site.sql().await;
        let most: Option<i32> =
            sqlx::query_scalar("SELECT max(publications) FROM duties WHERE kind = 'replicate'")
                .fetch_one(&mut sql)
                .await
                .unwrap();
        most.filter(|most| *most >= 2)
    })
    .await;
    eventually("done duties are removed", || async {
        let mut sql = site.sql().await;
        let done: i64 = sqlx::query_scalar("SELECT count(*) FROM duties WHERE state = 'done'")
            .fetch_one(&mut sql)
            .await
            .unwrap();
        (done == 0).then_some(())
    })
    .await;
    assert_eq!(open(&mut operator, "replication").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_bus_everything_else_works_and_later_nothing_is_missing() {
    let mut nats = tabularium_testkit::nats::Nats::start_own().await;
    let mut site = Site::start().await;
    site.config.nats_url = nats.url().to_owned();
    nats.stop().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(!status.message_bus_connected);
    assert_eq!(status.duties.unwrap().pending, 2);
    nats.restart().await;
    eventually("what was owed is on the bus", || {
        let mut operator = operator.clone();
        async move {
            let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
            let duties = status.duties.unwrap();
            (status.message_bus_connected && duties.pending == 0 && duties.published == 3).then_some(())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_source_was_given_up_meanwhile_does_not_count() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let spare = others(&route);
    let both = open(&mut operator, "replication").await;
    // The first copy is done; during the second the primary is given up.
    let work = start_copy(&mut duties, &both[0].duty_id, "w").await;
    finish(&mut duties, &both[0].duty_id, "w", succeeded(work.generation)).await;
    let work = start_copy(&mut duties, &both[1].duty_id, "w").await;
    assert_eq!(work.target.unwrap().storage, spare[1]);
    let moved = wire::BeginWriteRequest {
        unreachable_storages: vec![route.primary.clone()],
        ..begin("a.git", WriteKind::Update)
    };
    let moved = routing.begin_write(moved).await.unwrap().into_inner();
    assert_eq!(moved.route.as_ref().unwrap().primary, spare[0]);
    abort(&mut routing, &moved, AbortOutcome::NotApplied, &[]).await.unwrap();
    let Disposition::AnotherRound(round) =
        finish(&mut duties, &both[1].duty_id, "w", succeeded(work.generation)).await
    else {
        panic!("it may hold what was given up")
    };
    let after = resolve(&mut routing, "a.git").await.unwrap();
    let copy = after.replicas.iter().find(|replica| replica.storage == spare[1]).unwrap();
    assert!(copy.generation < after.generation, "so it is made again");
    finish(&mut duties, &both[1].duty_id, "w", succeeded(round.generation)).await;
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(generations(&after), [after.generation; 3]);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_copy_is_not_overtaken_by_the_next_write() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let long = open(&mut operator, "replication").await.remove(0);
    let Work::Replicate(work) = start(&mut duties, &long.duty_id, "w").await else { panic!("replicate") };
    let mut sql = site.sql().await;
    sqlx::query("UPDATE duties SET started_at = now() - interval '10 minutes' WHERE state = 'started'")
        .execute(&mut sql)
        .await
        .unwrap();
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let owed = open(&mut operator, "replication").await;
    let next = owed.iter().find(|duty| duty.target == long.target && duty.duty_id != long.duty_id).unwrap();
    assert!(matches!(start(&mut duties, &next.duty_id, "w2").await, Work::Nothing(_)));
    let again = finish(&mut duties, &long.duty_id, "w", succeeded(work.generation)).await;
    assert!(matches!(again, Disposition::AnotherRound(_)), "its work was not for nothing: {again:?}");
    let after = resolve(&mut routing, "a.git").await.unwrap();
    let copy = after.replicas.iter().find(|replica| replica.storage == long.target).unwrap();
    assert_eq!(copy.generation, work.generation, "and what it has is known");
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_lost_everything_is_told_at_once() {
    let mut nats = tabularium_testkit::nats::Nats::start_own().await;
    let mut site = Site::start().await;
    site.config.nats_url = nats.url().to_owned();
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    eventually("both copies are on the bus", || {
        let mut operator = operator.clone();
        async move {
            let owed = open(&mut operator, "replication").await;
            (owed.len() == 2 && owed.iter().all(|duty| duty.state == "published")).then_some(())
        }
    })
    .await;
    let before: Vec<String> =
        open(&mut operator, "replication").await.into_iter().map(|duty| duty.duty_id).collect();
    nats.restart_empty().await;
    let lost = std::time::Instant::now();
    let client = async_nats::connect(&site.config.nats_url).await.unwrap();
    let context = async_nats::jetstream::new(client);
    let stream =
        eventually("the stream", || async { context.get_stream(Class::Replication.stream()).await.ok() })
            .await;
    let consumer = stream.create_consumer(Class::Replication.consumer_config(10)).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    let mut told = std::collections::BTreeSet::new();
    while told.len() < 2 {
        let message = tokio::time::timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap();
        let body: DutyMessage = read_body(&message.payload).unwrap();
        let id = message.headers.as_ref().unwrap().get("Nats-Msg-Id").unwrap().as_str().to_owned();
        assert_ne!(id, format!("{}:1", body.duty_id), "the id of the first telling may still be refused");
        told.insert(body.duty_id.to_string());
        message.ack().await.unwrap();
    }
    assert_eq!(told, before.into_iter().collect());
    assert!(lost.elapsed() < std::time::Duration::from_secs(20), "{:?}", lost.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_owed_to_a_storage_that_is_back_is_due_at_once() {
    const FAILURES: usize = 12;
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let primary = create(&mut routing, "a.git").await.primary;
    let begun = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &begun, &[&primary]).await.unwrap();
    let duty = open(&mut operator, "replication").await.remove(0);
    for _ in 0..FAILURES {
        start(&mut duties, &duty.duty_id, "w").await;
        finish(&mut duties, &duty.duty_id, "w", failed(true)).await;
    }
    let waits = async || {
        let mut sql = site.sql().await;
        let id = uuid::Uuid::parse_str(&duty.duty_id).unwrap();
        sqlx::query_scalar::<_, f64>(
            "SELECT extract(epoch FROM next_attempt_at - now())::float8 FROM duties WHERE id = $1",
        )
        .bind(id)
        .fetch_one(&mut sql)
        .await
        .unwrap()
    };
    assert!(waits().await > 15.0, "it has failed often");

    eventually("its disk is known", || async {
        let mut sql = site.sql().await;
        let query = "SELECT count(*) FROM storages WHERE name = $1 AND filesystem_id IS NOT NULL";
        let known: i64 = sqlx::query_scalar(query).bind(&duty.target).fetch_one(&mut sql).await.unwrap();
        (known == 1).then_some(())
    })
    .await;
    let node = site.node(&duty.target);
    node.exchange_disk("another disk");
    let listed = async |healthy: bool| {
        eventually("its health is seen", || {
            let (mut operator, target) = (operator.clone(), duty.target.clone());
            async move {
                let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
                let mut storages = status.virtual_storages[0].storages.iter();
                storages.any(|storage| storage.name == target && storage.healthy == healthy).then_some(())
            }
        })
        .await;
    };
    listed(false).await;
    node.exchange_disk(&format!("disk of {}", duty.target));
    listed(true).await;
    eventually("it is due", || async { (waits().await <= 0.0).then_some(()) }).await;
}
