//! Every metadata key of the wire reference, section f, on its way through the router.

use http::HeaderMap;
use tabularium_proto::gitaly::{
    CreateForkRequest, OptimizeRepositoryRequest, WriteRefRequest,
    repository_service_client::RepositoryServiceClient,
};
use tonic::{Code, Request, metadata::MetadataMap};

use crate::house::{House, REPOSITORY, exists, named, repository};

/// What clients send that no router has to understand.
const PASSED_ON: [(&str, &str); 18] = [
    ("gitaly-servers", "eyJub3doZXJlIjp7ImFkZHJlc3MiOiJ0Y3A6Ly94OjEiLCJ0b2tlbiI6IiJ9fQ=="),
    ("gitaly-route-repository-accessor-policy", "any"),
    ("gitaly-sidechannel-socket", "/run/x"),
    ("gitaly-feature-some-flag", "true"),
    ("gitaly-feature-of-a-later-version", "false"),
    ("x-gitlab-correlation-id", "01HZXKQ0000000000000000000"),
    ("x-gitlab-client-name", "gitlab-workhorse"),
    ("client_name", "gitlab-web"),
    ("call_site", "Repository#commit"),
    ("deadline_type", "regular"),
    ("gitaly-session-id", "b3a6"),
    ("user_id", "7"),
    ("username", "ada"),
    ("gl_user_id", "user-7"),
    ("remote_ip", "192.0.2.7"),
    ("key_id", "3"),
    ("retry_config", "{}"),
    ("x-of-a-later-version", "kept"),
];

/// The same, in binary.
const PASSED_ON_IN_BINARY: [(&str, &[u8]); 2] =
    [("gitaly-client-context-bin", b"{\"glBuildId\":7}\xff\0"), ("relative-path-bin", b"@hashed/\xff.git")];

fn with_everything<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    for (key, value) in PASSED_ON {
        metadata.append(key, value.parse().unwrap());
    }
    for (key, value) in PASSED_ON_IN_BINARY {
        metadata.append_bin(key, tonic::metadata::MetadataValue::from_bytes(value));
    }
    // Whatever a client says of these is not true.
    metadata.append("gitaly-reference-transaction", "e30=".parse().unwrap());
    metadata.append("virtual_storage", "another".parse().unwrap());
    request.set_timeout(std::time::Duration::from_secs(55));
    request
}

fn check(seen: &HeaderMap) {
    let metadata = MetadataMap::from_headers(seen.clone());
    for (key, value) in PASSED_ON {
        let values: Vec<_> = metadata.get_all(key).iter().map(|value| value.to_str().unwrap()).collect();
        assert_eq!(values, [value], "{key}");
    }
    for (key, value) in PASSED_ON_IN_BINARY {
        assert_eq!(metadata.get_bin(key).unwrap().to_bytes().unwrap(), value, "{key}");
    }
    assert_eq!(seen.get_all("virtual_storage").iter().collect::<Vec<_>>(), ["default"]);
    assert!(seen.get("authorization").is_none(), "a client's token is for nobody else");
    let left = seen.get("grpc-timeout").expect("a deadline").to_str().unwrap();
    assert!(left.len() > 1, "{left}");
}

#[tokio::test]
async fn every_key_reaches_whoever_serves_a_read() {
    let house = House::new().await;
    house.ref_exists(with_everything(exists())).await.unwrap();
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("RefExists")).collect();
    check(&seen[0].headers);
    assert!(seen[0].headers.get("gitaly-reference-transaction").is_none(), "nobody votes on a read");
}

#[tokio::test]
async fn every_key_reaches_all_that_take_part_in_a_write() {
    let house = House::with("", |coordinator| coordinator.state().quorum = 2).await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let mut request = with_everything(WriteRefRequest { repository: repository(), ..Default::default() });
    request.metadata_mut().insert("x-votes", "update".parse().unwrap());
    client.write_ref(request).await.unwrap();
    for node in &house.nodes {
        let seen = node.seen("WriteRef");
        check(&seen[0].headers);
        let introductions: Vec<_> = seen[0].headers.get_all("gitaly-reference-transaction").iter().collect();
        assert_eq!(introductions.len(), 1, "the router's own word alone");
        assert_ne!(introductions[0], "e30=");
    }
}

#[tokio::test]
async fn every_key_reaches_all_that_tidy_up() {
    let house = House::new().await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let request = OptimizeRepositoryRequest { repository: repository(), ..Default::default() };
    client.optimize_repository(with_everything(request)).await.unwrap();
    for node in &house.nodes {
        let seen = node.seen("OptimizeRepository");
        check(&seen[0].headers);
        assert!(seen[0].headers.get("gitaly-reference-transaction").is_none());
    }
}

#[tokio::test]
async fn what_clients_leave_open_of_feature_flags_is_said_to_all_nodes() {
    let config = "[feature_flags]\nsome_flag = false\nunnamed = true\n";
    let house = House::with(config, |coordinator| coordinator.state().quorum = 2).await;
    house.ref_exists(with_everything(exists())).await.unwrap();
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    client
        .write_ref(with_everything(WriteRefRequest { repository: repository(), ..Default::default() }))
        .await
        .unwrap();
    let mut seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("WriteRef")).collect();
    assert_eq!(seen.len(), 3);
    seen.extend(house.nodes.iter().flat_map(|node| node.seen("RefExists")));
    for seen in seen {
        check(&seen.headers);
        assert_eq!(seen.headers["gitaly-feature-unnamed"], "true");
    }
}

#[tokio::test]
async fn an_id_is_made_for_what_has_none() {
    let house = House::new().await;
    house.ref_exists(Request::new(exists())).await.unwrap();
    let seen: Vec<_> = house.nodes.iter().flat_map(|node| node.seen("RefExists")).collect();
    assert!(!seen[0].headers.get("x-gitlab-correlation-id").unwrap().is_empty());
}

#[tokio::test]
async fn a_policy_sends_a_read_to_the_primary_and_only_that_one_does() {
    let house = House::new().await;
    let read = async |policy: &str| {
        for _ in 0..6 {
            let mut request = Request::new(exists());
            request.metadata_mut().insert("gitaly-route-repository-accessor-policy", policy.parse().unwrap());
            house.ref_exists(request).await.unwrap();
        }
        house.nodes.iter().map(|node| node.seen("RefExists").len()).collect::<Vec<_>>()
    };
    assert_eq!(read("primary-only").await, [6, 0, 0]);
    assert_eq!(read("any").await, [8, 2, 2]);
}

/// A node that groups repositories (19.x) is told beside which one a new one belongs, by the path that it knows.
#[tokio::test]
async fn a_hint_is_translated_and_decides_where_a_repository_goes() {
    let house = House::new().await;
    let mut client = RepositoryServiceClient::new(house.channel.clone());
    let hint = "gitaly-partitioning-hint";
    let mut request = Request::new(WriteRefRequest { repository: repository(), ..Default::default() });
    house.coordinator.add("beside.git");
    request.metadata_mut().insert(hint, "beside.git".parse().unwrap());
    client.write_ref(request).await.unwrap();
    let seen = house.nodes[0].seen("WriteRef");
    assert_eq!(seen[0].headers.get(hint).unwrap(), "@cluster/repositories/aa/bb/2");

    // A fork goes where the repository is that it is a fork of, which nodes find through `gitaly-servers`.
    let fork = |source: &str| CreateForkRequest {
        repository: named("default", &format!("fork-of-{source}")),
        source_repository: named("default", source),
        ..Default::default()
    };
    client.create_fork(fork(REPOSITORY)).await.unwrap();
    let begun = house.coordinator.state().begins.last().unwrap().clone();
    assert_eq!(begun.additional_repository.unwrap().relative_path, REPOSITORY);
    let seen = house.nodes[0].seen("CreateFork");
    assert_eq!(seen[0].headers.get(hint).unwrap(), "@cluster/repositories/aa/bb/1");
    let request: CreateForkRequest = prost::Message::decode(&seen[0].message[..]).unwrap();
    assert_eq!(request.source_repository, named("default", REPOSITORY), "as the client named it");
    let status = client.create_fork(fork("no.git")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);

    // From another virtual storage there is nothing to be near to.
    let mut far = fork(REPOSITORY);
    far.repository = named("default", "far.git");
    far.source_repository = named("other", REPOSITORY);
    client.create_fork(far).await.unwrap();
    assert!(house.coordinator.state().begins.last().unwrap().additional_repository.is_none());
    assert!(house.nodes[0].seen("CreateFork")[1].headers.get(hint).is_none());
}
