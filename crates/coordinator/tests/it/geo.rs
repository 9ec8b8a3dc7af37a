//! The geo log and the registry of mirrors.

use tabularium_proto::coordinator::{
    self as wire, GeoEventKind, WriteKind, begin_sync_response::Decision,
    duty_service_client::DutyServiceClient, finish_duty_request, finish_sync_request::Outcome,
    finish_sync_response::Next, start_duty_response::Work,
};
use tonic::{Code, transport::Channel};

use crate::support::*;

async fn notification(
    duties: &mut DutyServiceClient<Channel>,
    operator: &mut wire::operator_service_client::OperatorServiceClient<Channel>,
) -> (String, wire::NotifyWork) {
    let id = eventually("a notification is owed", || {
        let mut operator = operator.clone();
        async move {
            let duties =
                operator.list_duties(wire::ListDutiesRequest::default()).await.unwrap().into_inner().duties;
            duties.into_iter().find(|duty| duty.subject == "geo.notify.tokyo" && duty.state != "started")
        }
    })
    .await
    .duty_id;
    let request = wire::StartDutyRequest { duty_id: id.clone(), worker_id: "w".into() };
    match duties.start_duty(request).await.unwrap().into_inner().work.unwrap() {
        Work::Notify(work) => (id, work),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_is_told_everything_in_order_and_without_gaps() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, mut duties, mut operator) = clients(&coordinators[0]);
    let a = create(&mut routing, "a.git").await;
    create(&mut routing, "b.git").await;
    let writers = (0..6).map(|number| {
        let (mut routing, _, _) = clients(&coordinators[number % 2]);
        let primary = a.primary.clone();
        async move {
            let begun = begin_write(&mut routing, "a.git").await;
            commit(&mut routing, &begun, &[&primary]).await.unwrap();
        }
    });
    futures::future::join_all(writers).await;
    let rename =
        wire::RenameRepositoryRequest { name: Some(name("b.git")), new_relative_path: "c.git".into() };
    operator.rename_repository(rename).await.unwrap();
    routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("c.git")) }).await.unwrap();

    let mut events: Vec<wire::GeoEvent> = Vec::new();
    while events.len() < 10 {
        let (duty_id, work) = notification(&mut duties, &mut operator).await;
        let reached = work.events.last().unwrap().position;
        events.extend(work.events);
        let outcome = Some(finish_duty_request::Outcome::Succeeded(wire::DutySucceeded { reached }));
        let request = wire::FinishDutyRequest { duty_id, worker_id: "w".into(), outcome, attempt: 0 };
        duties.finish_duty(request).await.unwrap();
    }
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    assert_eq!(positions, (1..=10).collect::<Vec<_>>());
    let of_a: Vec<i64> =
        events.iter().filter(|event| event.relative_path == "a.git").map(|event| event.generation).collect();
    assert_eq!(of_a, (1..=7).collect::<Vec<_>>(), "one repository's events are in order");
    let renamed = events.iter().find(|event| event.kind() == GeoEventKind::Renamed).unwrap();
    assert_eq!((renamed.old_relative_path.as_str(), renamed.relative_path.as_str()), ("b.git", "c.git"));
    assert_eq!(events.iter().filter(|event| event.kind() == GeoEventKind::Created).count(), 2);
    assert_eq!(events.last().unwrap().kind(), GeoEventKind::Deleted);
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.geo_log_position, 10);
    let tokyo = status.sites.iter().find(|site| site.subscriber).unwrap();
    assert_eq!((tokyo.name.as_str(), tokyo.notified_position), ("tokyo", 10));
}

async fn begin_sync(duties: &mut DutyServiceClient<Channel>, site: &str, path: &str) -> Decision {
    let request = wire::BeginSyncRequest {
        home_site: site.into(),
        virtual_storage: "default".into(),
        relative_path: path.into(),
        worker_id: "w".into(),
    };
    duties.begin_sync(request).await.unwrap().into_inner().decision.unwrap()
}

async fn finish_sync(
    duties: &mut DutyServiceClient<Channel>,
    claim_id: &str,
    outcome: Outcome,
) -> Result<Next, tonic::Status> {
    let request = wire::FinishSyncRequest { claim_id: claim_id.into(), outcome: Some(outcome) };
    Ok(duties.finish_sync(request).await?.into_inner().next.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_takes_writes_from_its_home_only_and_is_synced_once_at_a_time() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    assert!(matches!(begin_sync(&mut duties, "nowhere", "m.git").await, Decision::Refused(_)));
    let Decision::Claim(claim) = begin_sync(&mut duties, "amsterdam", "m.git").await else { panic!("claim") };
    assert!(!claim.repository_exists);
    let creation =
        wire::BeginWriteRequest { sync_from_site: "amsterdam".into(), ..begin("m.git", WriteKind::Create) };
    let begun = routing.begin_write(creation.clone()).await.unwrap().into_inner();
    let route = begun.route.clone().unwrap();
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    assert_eq!(resolve(&mut routing, "m.git").await.unwrap().home_site, "amsterdam");

    assert!(matches!(begin_sync(&mut duties, "amsterdam", "m.git").await, Decision::UnderWay(_)));
    let succeeded = || Outcome::Succeeded(wire::SyncSucceeded {});
    let next = finish_sync(&mut duties, &claim.claim_id, succeeded()).await.unwrap();
    assert!(matches!(next, Next::Again(_)), "an event came meanwhile");
    let twice = finish_sync(&mut duties, &claim.claim_id, succeeded()).await;
    assert_eq!(twice.unwrap_err().code(), Code::FailedPrecondition);
    let Decision::Claim(claim) = begin_sync(&mut duties, "amsterdam", "m.git").await else { panic!("claim") };
    assert!(claim.repository_exists);
    let failure = Outcome::Failed(wire::SyncFailed { message: "refused".into(), unreachable: false });
    assert!(matches!(finish_sync(&mut duties, &claim.claim_id, failure).await.unwrap(), Next::Again(_)));
    let details = |operator: &wire::operator_service_client::OperatorServiceClient<Channel>| {
        let mut operator = operator.clone();
        async move {
            let request = wire::GetRepositoryRequest { name: Some(name("m.git")) };
            operator.get_repository(request).await.unwrap().into_inner().repository.unwrap().mirror.unwrap()
        }
    };
    let mirror = details(&operator).await;
    assert_eq!((mirror.state.as_str(), mirror.last_error.as_str()), ("failed", "refused"));
    let Decision::Claim(claim) = begin_sync(&mut duties, "amsterdam", "m.git").await else { panic!("claim") };
    assert!(matches!(
        finish_sync(&mut duties, &claim.claim_id, succeeded()).await.unwrap(),
        Next::Settled(_)
    ));
    let mirror = details(&operator).await;
    assert_eq!(mirror.state, "synced");
    assert_eq!(mirror.home_url, "https://git.amsterdam.example/m.git");

    let push = routing.begin_write(begin("m.git", WriteKind::Update)).await;
    assert_refused(
        push,
        Code::FailedPrecondition,
        "repository is a mirror of amsterdam; push to https://git.amsterdam.example/m.git",
    );
    let fetch = wire::BeginWriteRequest { kind: WriteKind::Update.into(), ..creation };
    let begun = routing.begin_write(fetch.clone()).await.unwrap().into_inner();
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    create(&mut routing, "ours.git").await;
    let wrong = wire::BeginWriteRequest { name: Some(name("ours.git")), ..fetch };
    let refused = routing.begin_write(wrong).await;
    assert_refused(refused, Code::FailedPrecondition, "repository is not a mirror of amsterdam");
    assert!(matches!(begin_sync(&mut duties, "amsterdam", "ours.git").await, Decision::Refused(_)));
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.geo_log_position, 1, "what happens to a mirror is its home's to tell");

    let rename =
        wire::RenameRepositoryRequest { name: Some(name("m.git")), new_relative_path: "n.git".into() };
    operator.rename_repository(rename).await.unwrap();
    let Decision::Claim(claim) = begin_sync(&mut duties, "amsterdam", "n.git").await else { panic!("claim") };
    assert!(claim.repository_exists);
    routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("n.git")) }).await.unwrap();
    let gone = finish_sync(&mut duties, &claim.claim_id, Outcome::Gone(wire::SyncGone {})).await.unwrap();
    assert!(matches!(gone, Next::Settled(_)));
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.sites.iter().find(|site| !site.subscriber).unwrap().mirrors, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_not_finished_falls_to_the_next_and_is_rung_for() {
    use futures::StreamExt as _;
    use tabularium_common::{
        config::ConfigDuration,
        duties::{Class, SyncMessage, read_body},
    };
    let mut site = Site::start().await;
    site.config.timing.sync_lease = ConfigDuration::from_millis(50);
    site.config.timing.republish_after = ConfigDuration::from_millis(100);
    let coordinator = site.coordinator().await;
    let (_, mut duties, _) = clients(&coordinator);
    let Decision::Claim(lost) = begin_sync(&mut duties, "amsterdam", "m.git").await else { panic!("claim") };
    let context = async_nats::jetstream::new(async_nats::connect(&site.config.nats_url).await.unwrap());
    let stream =
        eventually("the stream", || async { context.get_stream(Class::GeoSync.stream()).await.ok() }).await;
    let consumer = stream.create_consumer(Class::GeoSync.consumer_config(10)).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    let message = tokio::time::timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap();
    let body: SyncMessage = read_body(&message.payload).unwrap();
    assert_eq!((body.home_site.as_str(), body.relative_path.as_str()), ("amsterdam", "m.git"));
    let Decision::Claim(claim) = begin_sync(&mut duties, "amsterdam", "m.git").await else { panic!("claim") };
    assert_ne!(claim.claim_id, lost.claim_id);
    let late = finish_sync(&mut duties, &lost.claim_id, Outcome::Succeeded(wire::SyncSucceeded {})).await;
    assert_eq!(late.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_everybody_was_told_of_leaves_the_log_and_positions_go_on() {
    use tabularium_common::config::ConfigDuration;
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, mut duties, mut operator) = clients(&coordinator);
    let a = create(&mut routing, "a.git").await;
    let write = async |routing: &mut Routing| {
        let begun = begin_write(routing, "a.git").await;
        commit(routing, &begun, &[&a.primary]).await.unwrap();
    };
    for _ in 0..3 {
        write(&mut routing).await;
    }
    let rows = || async {
        let mut sql = site.sql().await;
        let positions: Vec<Option<i64>> =
            sqlx::query_scalar("SELECT position FROM geo_log ORDER BY id").fetch_all(&mut sql).await.unwrap();
        positions.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>()
    };
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(rows().await.len(), 4, "nobody was told yet");
    let (duty_id, work) = notification(&mut duties, &mut operator).await;
    let reached = work.events[2].position;
    let outcome = Some(finish_duty_request::Outcome::Succeeded(wire::DutySucceeded { reached }));
    duties
        .finish_duty(wire::FinishDutyRequest { duty_id, worker_id: "w".into(), outcome, attempt: 0 })
        .await
        .unwrap();
    eventually("what was told is gone", || async { (rows().await == [4]).then_some(()) }).await;
    let (duty_id, work) = notification(&mut duties, &mut operator).await;
    let reached = work.events[0].position;
    assert_eq!((work.events.len(), reached), (1, 4));
    let outcome = Some(finish_duty_request::Outcome::Succeeded(wire::DutySucceeded { reached }));
    duties
        .finish_duty(wire::FinishDutyRequest { duty_id, worker_id: "w".into(), outcome, attempt: 0 })
        .await
        .unwrap();
    write(&mut routing).await;
    let (_, work) = notification(&mut duties, &mut operator).await;
    assert_eq!(work.events.iter().map(|event| event.position).collect::<Vec<_>>(), [5]);

    let mut alone = Site::start().await;
    alone.config.subscribers.clear();
    alone.config.timing.keep_geo_log = ConfigDuration::from_millis(200);
    let coordinator = alone.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    for path in ["a.git", "b.git", "c.git"] {
        create(&mut routing, path).await;
    }
    eventually("without subscribers only the newest stays", || async {
        let mut sql = alone.sql().await;
        let left: Vec<Option<i64>> =
            sqlx::query_scalar("SELECT position FROM geo_log").fetch_all(&mut sql).await.unwrap();
        (left == [Some(3)]).then_some(())
    })
    .await;
}
