use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use tabularium_proto::{
    coordinator::abort_write_request::Outcome,
    gitaly::{
        CreateObjectPoolRequest, CreateRepositoryRequest, ObjectPool, OptimizeRepositoryRequest,
        PostReceivePackRequest, Repository, WriteRefRequest, WriteRefResponse,
        object_pool_service_client::ObjectPoolServiceClient,
        repository_service_client::RepositoryServiceClient,
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::house::{House, named, repository, soon, until};

fn write_ref() -> Request<WriteRefRequest> {
    Request::new(WriteRefRequest { repository: repository(), r#ref: b"HEAD".to_vec(), ..Default::default() })
}

async fn write(
    house: &House,
    request: Request<WriteRefRequest>,
) -> Result<Response<WriteRefResponse>, Status> {
    RepositoryServiceClient::new(house.channel.clone()).write_ref(request).await
}

fn outcomes(house: &House) -> Vec<Outcome> {
    house.coordinator.state().aborts.iter().map(|abort| Outcome::try_from(abort.outcome).unwrap()).collect()
}

#[tokio::test]
async fn a_write_goes_to_the_primary_between_intent_and_record() {
    let house = House::new().await;
    let mut request = write_ref();
    request.metadata_mut().insert("tabularium-sync-from-site", "amsterdam".parse().unwrap());
    request.metadata_mut().insert("x-gitlab-correlation-id", "corr-7".parse().unwrap());
    write(&house, request).await.unwrap();
    let seen = house.nodes[0].seen("WriteRef");
    let repository = WriteRefRequest::decode(&seen[0].message[..]).unwrap().repository.unwrap();
    assert_eq!(
        (&repository.storage_name[..], &repository.relative_path[..]),
        ("node-1", "@cluster/repositories/aa/bb/1")
    );
    assert!(seen[0].headers.get("tabularium-sync-from-site").is_none());

    let state = house.coordinator.state();
    let begin = &state.begins[0];
    assert_eq!(begin.sync_from_site, "amsterdam");
    assert_eq!(begin.method, "/gitaly.RepositoryService/WriteRef");
    assert_eq!(begin.correlation_id, "corr-7");
    assert_eq!(begin.kind, 1);
    assert_eq!(state.commits[0].write_id, "write-1");
    assert_eq!(state.commits[0].router_id, begin.router_id);
    assert_eq!(state.commits[0].committed_storages, ["node-1"]);
    assert!(state.aborts.is_empty());
}

#[tokio::test]
async fn no_status_reaches_the_client_before_the_record() {
    let house = House::new().await;
    house.coordinator.commits_allowed().acquire_many(1_000_000).await.unwrap().forget();
    let mut pending = std::pin::pin!(write(&house, write_ref()));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut pending).await;
    assert!(early.is_err(), "answered before the commit: {early:?}");
    assert_eq!(house.nodes[0].seen("WriteRef").len(), 1, "the node has long answered");
    house.coordinator.commits_allowed().add_permits(1);
    soon(pending).await.unwrap();
    assert_eq!(house.coordinator.state().commits.len(), 1);
}

#[tokio::test]
async fn a_write_that_cannot_be_recorded_is_not_ok() {
    let house = House::new().await;
    house.coordinator.state().commit_failure = Some(Status::failed_precondition("the write is settled"));
    let status = write(&house, write_ref()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "the write was applied but could not be recorded: the write is settled");
}

#[tokio::test]
async fn a_nodes_own_error_is_passed_on_and_the_ticket_given_back() {
    let house = House::new().await;
    let mut request = write_ref();
    request.metadata_mut().insert("x-fail", "9".parse().unwrap());
    assert_eq!(write(&house, request).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(house.coordinator.state().commits.is_empty(), "it did not ask whether it may write");
    let mut request = write_ref();
    request.metadata_mut().insert("x-fail", "12".parse().unwrap());
    assert_eq!(write(&house, request).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(outcomes(&house), [Outcome::NotApplied, Outcome::NotApplied]);
}

#[tokio::test]
async fn a_dead_primary_is_moved_away_from_in_the_same_call() {
    let house = House::new().await;
    house.nodes[0].kill();
    write(&house, write_ref()).await.unwrap();
    assert_eq!(house.nodes[1].seen("WriteRef").len(), 1);
    let state = house.coordinator.state();
    let last = state.begins.last().unwrap();
    assert_eq!(last.unreachable_storages, ["node-1"]);
    assert_eq!(state.commits[0].committed_storages, ["node-2"]);
    // A probe may have found out first; otherwise the first attempt is taken back.
    assert_eq!(state.begins.len(), state.aborts.len() + 1);
    assert!(state.aborts.iter().all(|abort| abort.outcome() == Outcome::NotApplied));
}

#[tokio::test]
async fn without_any_replica_to_move_to_the_write_is_refused() {
    let house = House::with("", |coordinator| {
        coordinator.change(crate::house::REPOSITORY, |route| route.replicas.truncate(1));
    })
    .await;
    house.nodes[0].kill();
    let status = write(&house, write_ref()).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::FailedPrecondition, "repository is in read-only mode")
    );
}

/// Opens a push and sends its first message; answers its ends.
async fn push(channel: Channel) -> (tokio::sync::mpsc::Sender<Bytes>, tonic::Streaming<Bytes>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let first = PostReceivePackRequest { repository: repository(), ..Default::default() };
    sender.send(Bytes::from(first.encode_to_vec())).await.unwrap();
    let path = "/gitaly.SmartHTTPService/PostReceivePack";
    let answer = House::raw_stream(channel, path, ReceiverStream::new(receiver)).await.unwrap();
    let mut answer = answer.into_inner();
    soon(answer.message()).await.unwrap().unwrap();
    (sender, answer)
}

/// The client has a runtime of its own, whose end cuts its connection as the end of a process would.
#[tokio::test]
async fn a_client_that_hangs_up_mid_pack_leaves_nothing() {
    let house = House::new().await;
    let client = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address = house.address.parse().unwrap();
    client.spawn(async move {
        let (_sender, _answer) = push(tabularium_common::grpc::channel(&address)).await;
        std::future::pending::<()>().await;
    });
    until("the push", async || house.nodes[0].seen("PostReceivePack").len() == 1).await;
    client.shutdown_background();
    until("the nodes are told that it is not whole", async || {
        house.nodes.iter().all(|node| node.0.cut.load(Ordering::Relaxed) == 1)
    })
    .await;
    assert_eq!(house.nodes[0].0.whole.load(Ordering::Relaxed), 0);
    let state = house.coordinator.state();
    assert!(state.begins.is_empty() && state.commits.is_empty());
}

#[tokio::test]
async fn a_primary_that_dies_mid_upload_leaves_nothing() {
    let house = House::new().await;
    let (_sender, mut answer) = push(house.connect()).await;
    house.nodes[0].kill();
    let status = soon(answer.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(house.coordinator.state().begins.is_empty());
}

/// A unary write has no headers before its end: what runs under a lost intent is stopped all the same.
#[tokio::test]
async fn an_open_write_is_renewed_and_stopped_when_the_intent_is_lost() {
    let house = House::with("", |coordinator| coordinator.state().write_lease_milliseconds = 300).await;
    let mut request = write_ref();
    request.metadata_mut().insert("x-mode", "stall".parse().unwrap());
    let lose = async {
        until("the node has it", async || house.nodes[0].seen("WriteRef").len() == 1).await;
        until("renewals", async || house.coordinator.state().renewals.len() >= 3).await;
        assert_eq!(house.coordinator.state().renewals[0].write_ids, ["write-1"]);
        house.coordinator.state().lost_writes = vec!["write-1".into()];
    };
    let (answer, ()) = soon(async { tokio::join!(write(&house, request), lose) }).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
    until("the node is stopped", async || house.nodes[0].0.cut.load(Ordering::Relaxed) == 1).await;
    until("the coordinator hears that it ran until now", async || outcomes(&house) == [Outcome::InDoubt])
        .await;
    assert!(house.coordinator.state().commits.is_empty());
    let renewals = house.coordinator.state().renewals.len();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(house.coordinator.state().renewals.len(), renewals, "nothing is open any more");
}

/// A coordinator that is stopped must not cost the writes that another one would keep.
#[tokio::test]
async fn a_coordinator_that_hangs_does_not_let_intents_run_out() {
    const LEASE: u32 = 900;
    let house = House::with("", |coordinator| {
        let mut state = coordinator.state();
        state.write_lease_milliseconds = LEASE;
        state.renewals_hang = true;
    })
    .await;
    let storages = house.coordinator.state().storages.clone();
    let second = crate::coordinator::Coordinator::start(
        house.directory.path(),
        "coordinator-2",
        &storages,
        &house.tasks,
    )
    .await;
    let begun = std::time::Instant::now();
    let mut request = write_ref();
    request.metadata_mut().insert("x-mode", "stall".parse().unwrap());
    let mut stalled = std::pin::pin!(write(&house, request));
    tokio::select! {
        _ = &mut stalled => panic!("it stalls"),
        () = until("a renewal", async || !second.state().renewals.is_empty()) => {}
    }
    let waited = begun.elapsed();
    assert!(waited < Duration::from_millis(LEASE.into()), "{waited:?}");
}

#[tokio::test]
async fn a_creation_is_reserved_first_and_taken_back_when_it_fails() {
    let house = House::new().await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let create = |path: &str| {
        Request::new(CreateRepositoryRequest { repository: named("default", path), ..Default::default() })
    };
    client.create_repository(create("new.git")).await.unwrap();
    assert_eq!(house.coordinator.state().begins[0].kind, 2);
    assert_eq!(house.coordinator.state().commits.len(), 1);
    let status = client.create_repository(create("new.git")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(
        status.message(),
        "route repository creation: reserve repository id: repository already exists"
    );
    let mut fails = create("other.git");
    fails.metadata_mut().insert("x-fail", "13".parse().unwrap());
    assert_eq!(client.create_repository(fails).await.unwrap_err().code(), Code::Internal);
    assert_eq!(outcomes(&house), [Outcome::NotApplied]);
}

#[tokio::test]
async fn a_pool_and_its_origin_are_rewritten_for_one_storage() {
    let house = House::new().await;
    let mut client = ObjectPoolServiceClient::new(house.channel.clone());
    let pool = |path: &str| Some(ObjectPool { repository: named("default", path) });
    let request = CreateObjectPoolRequest { object_pool: pool("pool.git"), origin: repository() };
    client.create_object_pool(request).await.unwrap();
    let seen = house.nodes[0].seen("CreateObjectPool");
    let request = CreateObjectPoolRequest::decode(&seen[0].message[..]).unwrap();
    let place = |repository: Option<Repository>| {
        let repository = repository.unwrap();
        (repository.storage_name, repository.relative_path)
    };
    let on = |path: &str| ("node-1".to_owned(), path.to_owned());
    assert_eq!(place(request.object_pool.unwrap().repository), on("@cluster/repositories/aa/bb/2"));
    assert_eq!(place(request.origin), on("@cluster/repositories/aa/bb/1"));

    let elsewhere = CreateObjectPoolRequest { object_pool: pool("p2.git"), origin: named("other", "a.git") };
    let status = client.create_object_pool(elsewhere).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (
            Code::InvalidArgument,
            "resolving additional repository on different storage than target repository is not supported"
        )
    );
}

#[tokio::test]
async fn a_write_to_what_does_not_exist_is_refused() {
    let house = House::new().await;
    let request =
        Request::new(WriteRefRequest { repository: named("default", "no.git"), ..Default::default() });
    let status = write(&house, request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "repository not found"));
}

#[tokio::test]
async fn maintenance_reaches_every_replica_and_fails_if_one_does() {
    let house = House::new().await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let request =
        || Request::new(OptimizeRepositoryRequest { repository: repository(), ..Default::default() });
    client.optimize_repository(request()).await.unwrap();
    for node in &house.nodes {
        let seen = node.seen("OptimizeRepository");
        let target = OptimizeRepositoryRequest::decode(&seen[0].message[..]).unwrap().repository.unwrap();
        assert_eq!(target.storage_name, node.0.storage);
    }
    let mut fails = request();
    fails.metadata_mut().insert("x-fail", "9".parse().unwrap());
    let status = client.optimize_repository(fails).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "as you wish: größer"));
    assert!(house.coordinator.state().begins.is_empty());
}
