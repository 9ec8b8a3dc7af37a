//! `PraefectInfoService`, and what else is answered for clients who believe that this is Praefect.

use futures::TryStreamExt as _;
use tabularium_proto::gitaly::{
    DatalossRequest, GetObjectPoolRequest, GetRepositoryMetadataRequest, MarkUnverifiedRequest,
    RepositoryReplicasRequest, SetAuthoritativeStorageRequest, SetReplicationFactorRequest,
    StopTransactionRequest, VoteTransactionRequest, WalkReposRequest,
    get_repository_metadata_request::{Path, Query},
    internal_gitaly_client::InternalGitalyClient,
    mark_unverified_request::{Selector, Storage},
    object_pool_service_client::ObjectPoolServiceClient,
    praefect_info_service_client::PraefectInfoServiceClient,
    ref_transaction_client::RefTransactionClient,
};
use tonic::{Code, Response, Status, transport::Channel};

use crate::house::{House, REPOSITORY, named, repository};

type Info = PraefectInfoServiceClient<Channel>;

async fn house() -> (House, Info) {
    let house = House::with("", |coordinator| {
        coordinator.change(REPOSITORY, |route| route.replicas[1].generation = -1);
        coordinator.add("group/level.git");
        coordinator.add("group/lost.git");
        coordinator.change("group/lost.git", |route| route.generation = 7);
    })
    .await;
    let info = PraefectInfoServiceClient::new(house.channel.clone());
    (house, info)
}

fn refused<T>(answer: Result<Response<T>, Status>) -> (Code, String) {
    let status = answer.err().expect("a refusal");
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn replicas_are_shown_with_their_checksums() {
    let (_house, mut info) = house().await;
    let request = RepositoryReplicasRequest { repository: repository() };
    let answer = info.repository_replicas(request).await.unwrap().into_inner();
    let primary = answer.primary.unwrap();
    assert_eq!((primary.repository, &primary.checksum[..]), (named("node-1", REPOSITORY), "abc"));
    assert_eq!(answer.replicas.len(), 1, "one has nothing to sum up");
    assert_eq!(answer.replicas[0].repository, named("node-3", REPOSITORY));
    for (storage, path, code, text) in [
        ("default", "no.git", Code::NotFound, "repository not found"),
        ("nowhere", REPOSITORY, Code::InvalidArgument, "storage name not found"),
    ] {
        let request = RepositoryReplicasRequest { repository: named(storage, path) };
        assert_eq!(refused(info.repository_replicas(request).await), (code, text.into()));
    }
}

#[tokio::test]
async fn metadata_is_found_by_path_and_by_id() {
    let (_house, mut info) = house().await;
    let by_path = |virtual_storage: &str, path: &str| {
        let path = Path { virtual_storage: virtual_storage.into(), relative_path: path.into() };
        GetRepositoryMetadataRequest { query: Some(Query::Path(path)) }
    };
    let by_id = |id| GetRepositoryMetadataRequest { query: Some(Query::RepositoryId(id)) };
    let answer = info.get_repository_metadata(by_path("default", REPOSITORY)).await.unwrap().into_inner();
    assert_eq!((answer.repository_id, answer.generation), (1, 5));
    assert_eq!((&answer.virtual_storage[..], &answer.relative_path[..]), ("default", REPOSITORY));
    assert_eq!((&answer.replica_path[..], &answer.primary[..]), ("@cluster/repositories/aa/bb/1", "node-1"));
    let told: Vec<_> = answer
        .replicas
        .iter()
        .map(|replica| (&replica.storage[..], replica.generation, replica.healthy, replica.valid_primary))
        .collect();
    let expected = [("node-1", 5, true, true), ("node-2", -1, true, false), ("node-3", 5, false, false)];
    assert_eq!(told, expected);
    assert!(answer.replicas.iter().all(|replica| replica.assigned));
    assert_eq!(answer.replicas[0].verified_at.unwrap().seconds, 77);
    assert_eq!(info.get_repository_metadata(by_id(1)).await.unwrap().into_inner(), answer);

    let unknown = (Code::NotFound, "repository not found".to_owned());
    for request in
        [by_path("default", "no.git"), by_path("nowhere", REPOSITORY), by_path("default", ""), by_id(99)]
    {
        assert_eq!(refused(info.get_repository_metadata(request).await), unknown);
    }
    let nothing = GetRepositoryMetadataRequest { query: None };
    assert_eq!(refused(info.get_repository_metadata(nothing).await).0, Code::Internal);
}

#[tokio::test]
async fn data_loss_is_told_page_by_page() {
    let (_house, mut info) = house().await;
    let ask = |include_partially_replicated| DatalossRequest {
        virtual_storage: "default".into(),
        include_partially_replicated,
    };
    let told = async |mut info: Info, request| -> Vec<_> {
        let stream = info.dataloss(request).await.unwrap().into_inner();
        let pages: Vec<_> = stream.try_collect().await.unwrap();
        pages.into_iter().flat_map(|page| page.repositories).collect()
    };
    let partly = told(info.clone(), ask(true)).await;
    let paths: Vec<_> = partly.iter().map(|repository| &repository.relative_path[..]).collect();
    assert_eq!(paths, [REPOSITORY, "group/lost.git"]);
    assert!(!partly[0].unavailable && partly[1].unavailable);
    let behind: Vec<_> = partly[0].storages.iter().map(|storage| storage.behind_by).collect();
    assert_eq!(behind, [0, 6, 0], "all there ever was, and one for the creation");
    assert_eq!((&partly[1].primary[..], partly[1].storages[0].behind_by), ("node-1", 2));
    assert!(partly[0].storages[0].valid_primary && !partly[0].storages[2].healthy);
    let lost = told(info.clone(), ask(false)).await;
    assert_eq!(lost, partly[1..]);

    let nowhere = DatalossRequest { virtual_storage: "nowhere".into(), ..Default::default() };
    let expected = (Code::Internal, "unknown virtual storage: \"nowhere\"".to_owned());
    assert_eq!(refused(info.dataloss(nowhere).await), expected);
}

#[tokio::test]
async fn a_replica_is_made_the_truth_by_an_operators_word_alone() {
    let (house, mut info) = house().await;
    let request = |virtual_storage: &str, path: &str, storage: &str| SetAuthoritativeStorageRequest {
        virtual_storage: virtual_storage.into(),
        relative_path: path.into(),
        authoritative_storage: storage.into(),
    };
    info.set_authoritative_storage(request("default", "group/lost.git", "node-2")).await.unwrap();
    assert_eq!(house.coordinator.state().operators, ["accept 3 node-2"]);
    for (virtual_storage, path, storage, text) in [
        ("nowhere", REPOSITORY, "node-2", "unknown virtual storage: \"nowhere\""),
        ("default", REPOSITORY, "node-9", "unknown authoritative storage: \"node-9\""),
        ("default", "no.git", "node-2", "repository does not exist on virtual storage"),
    ] {
        let answer = info.set_authoritative_storage(request(virtual_storage, path, storage)).await;
        assert_eq!(refused(answer), (Code::InvalidArgument, text.into()));
    }
    assert_eq!(house.coordinator.state().operators.len(), 1);
}

#[tokio::test]
async fn replicas_are_marked_one_by_one_and_by_storage() {
    let (house, mut info) = house().await;
    let storage = |virtual_storage: &str, storage: &str| {
        Selector::Storage(Storage { virtual_storage: virtual_storage.into(), storage: storage.into() })
    };
    for (selector, marked) in [
        (Selector::RepositoryId(2), 3),
        (Selector::RepositoryId(99), 0),
        (Selector::VirtualStorage("default".into()), 9),
        (Selector::VirtualStorage("nowhere".into()), 0),
        (storage("default", "node-2"), 9),
        (storage("default", "nowhere"), 0),
    ] {
        let request = MarkUnverifiedRequest { selector: Some(selector.clone()) };
        let answer = info.mark_unverified(request).await.unwrap().into_inner();
        assert_eq!(answer.replicas_marked, marked, "{selector:?}");
    }
    assert_eq!(house.coordinator.state().operators, ["mark 2", "mark default/", "mark default/node-2"]);
    assert_eq!(refused(info.mark_unverified(MarkUnverifiedRequest::default()).await).0, Code::Internal);
}

#[tokio::test]
async fn a_replication_factor_is_one_that_can_be_had() {
    let (_house, mut info) = house().await;
    let request = |virtual_storage: &str, path: &str, factor| SetReplicationFactorRequest {
        virtual_storage: virtual_storage.into(),
        relative_path: path.into(),
        replication_factor: factor,
    };
    let answer = info.set_replication_factor(request("default", REPOSITORY, 2)).await.unwrap().into_inner();
    assert_eq!(answer.storages, ["node-1", "node-2"]);
    for (virtual_storage, path, factor, text) in [
        ("nowhere", REPOSITORY, 1, "virtual storage \"nowhere\" not found"),
        ("default", REPOSITORY, 0, "attempted to set replication factor 0 but minimum is 1"),
        ("default", REPOSITORY, -1, "attempted to set replication factor -1 but minimum is 1"),
        (
            "default",
            REPOSITORY,
            4,
            "attempted to set replication factor 4 but virtual storage only contains 3 storages",
        ),
        ("default", "no.git", 1, "repository \"default\"/\"no.git\" not found"),
    ] {
        let answer = info.set_replication_factor(request(virtual_storage, path, factor)).await;
        assert_eq!(refused(answer), (Code::InvalidArgument, format!("set replication factor: {text}")));
    }
}

#[tokio::test]
async fn repositories_are_walked_under_the_names_that_clients_know() {
    let (house, _) = house().await;
    let mut client = InternalGitalyClient::new(house.channel.clone());
    let walk = |storage: &str| WalkReposRequest { storage_name: storage.into() };
    let stream = client.walk_repos(walk("default")).await.unwrap().into_inner();
    let walked: Vec<_> = stream.map_ok(|repository| repository.relative_path).try_collect().await.unwrap();
    assert_eq!(walked, [REPOSITORY, "group/level.git", "group/lost.git"]);
    let expected = (Code::InvalidArgument, "storage name not set".to_owned());
    assert_eq!(refused(client.walk_repos(walk("")).await), expected);
    let stream = client.walk_repos(walk("nowhere")).await.unwrap().into_inner();
    let status = stream.try_collect::<Vec<_>>().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_pool_is_told_by_its_name_and_not_by_its_place() {
    let (house, _) = house().await;
    house.coordinator.change("group/lost.git", |route| {
        route.name.as_mut().unwrap().relative_path = "@pools/aa/bb/pool.git".into();
    });
    let mut client = ObjectPoolServiceClient::new(house.channel.clone());
    let request = |path: &str| GetObjectPoolRequest { repository: named("default", path) };
    let pool = |path: &str| *house.nodes[0].0.pool.lock().unwrap() = path.to_owned();
    for node in &house.nodes[1..] {
        node.kill();
    }
    let none = client.get_object_pool(request(REPOSITORY)).await.unwrap().into_inner();
    assert!(none.object_pool.is_none());
    for (kept, told) in [
        ("@cluster/pools/aa/bb/3", "@pools/aa/bb/pool.git"),
        ("@pools/cc/dd/old.git", "@pools/cc/dd/old.git"),
    ] {
        pool(kept);
        let answer = client.get_object_pool(request(REPOSITORY)).await.unwrap().into_inner();
        assert_eq!(answer.object_pool.unwrap().repository, named("default", told));
    }
    pool("@cluster/pools/aa/bb/99");
    assert_eq!(refused(client.get_object_pool(request(REPOSITORY)).await).0, Code::NotFound);
    let text = "repository not set".to_owned();
    assert_eq!(refused(client.get_object_pool(request("")).await), (Code::InvalidArgument, text));
    let text = "repository not found".to_owned();
    assert_eq!(refused(client.get_object_pool(request("no.git")).await), (Code::NotFound, text));
}

/// Praefect serves the service on its front as well, where no node votes.
#[tokio::test]
async fn there_is_no_transaction_to_vote_on_from_the_front() {
    let house = House::new().await;
    let mut client = RefTransactionClient::new(house.channel.clone());
    let vote = |hash: Vec<u8>| VoteTransactionRequest {
        transaction_id: 1,
        reference_updates_hash: hash,
        ..Default::default()
    };
    let unknown = (Code::NotFound, "transaction not found: 1".to_owned());
    assert_eq!(refused(client.vote_transaction(vote(vec![0; 20])).await), unknown);
    let text = "invalid reference update hash: invalid vote length".to_owned();
    assert_eq!(refused(client.vote_transaction(vote(vec![0; 3])).await), (Code::InvalidArgument, text));
    let stop = StopTransactionRequest { transaction_id: 1, ..Default::default() };
    assert_eq!(refused(client.stop_transaction(stop).await), unknown);
}
