//! What operators see and do.

use std::io::Write as _;

use tabularium_common::{
    auth::SendToken,
    config::SecretFile,
    grpc::{self, Address},
};
use tabularium_proto::coordinator::{
    self as wire, duty_service_client::DutyServiceClient, operator_service_client::OperatorServiceClient,
    peer_service_client::PeerServiceClient, routing_service_client::RoutingServiceClient,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, service::interceptor::InterceptedService};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::*;

pub(crate) async fn get(address: &Address, path: &str) -> (u16, String) {
    let mut stream = address.connect_http().await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_are_paged_by_name() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let mut names: Vec<String> = (0..7).map(|number| format!("g/{number}.git")).collect();
    names.extend(["g/é.git".to_owned(), "h/0.git".to_owned(), "G/0.git".to_owned()]);
    for path in &names {
        create(&mut routing, path).await;
    }
    let mut list = async |prefix: &str, page_size: u32| {
        let mut seen = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = wire::ListRepositoriesRequest {
                virtual_storage: "default".into(),
                prefix: prefix.into(),
                page_size,
                page_token,
            };
            let page = operator.list_repositories(request).await.unwrap().into_inner();
            assert!(page_size == 0 || page.repositories.len() <= page_size as usize);
            seen.extend(page.repositories.into_iter().map(|details| {
                assert!(details.created_at.is_some() && details.mirror.is_none());
                details.route.unwrap().name.unwrap().relative_path
            }));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return seen;
            }
        }
    };
    names.sort();
    assert_eq!(list("", 3).await, names);
    assert_eq!(list("", 5).await, names);
    let of_g: Vec<String> = names.iter().filter(|name| name.starts_with("g/")).cloned().collect();
    assert_eq!(list("g/", 2).await, of_g);
    assert_eq!(list("g/", 0).await, of_g);
    let bad = wire::ListRepositoriesRequest {
        virtual_storage: "default".into(),
        page_token: "!".into(),
        ..wire::ListRepositoriesRequest::default()
    };
    assert_eq!(operator.list_repositories(bad).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_moves_the_name_and_nothing_else() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let before = create(&mut routing, "a.git").await;
    create(&mut routing, "b.git").await;
    let open = begin_write(&mut routing, "a.git").await;
    let mut rename = async |from: &str, to: &str| {
        let request = wire::RenameRepositoryRequest { name: Some(name(from)), new_relative_path: to.into() };
        operator.rename_repository(request).await
    };
    assert_refused(rename("a.git", "b.git").await, Code::AlreadyExists, "target repo exists already");
    assert_refused(rename("x.git", "y.git").await, Code::NotFound, "repository not found");
    assert_eq!(rename("a.git", "../y").await.unwrap_err().code(), Code::InvalidArgument);
    rename("a.git", "z.git").await.unwrap();
    assert_refused(resolve(&mut routing, "a.git").await, Code::NotFound, "repository not found");
    let after = resolve(&mut routing, "z.git").await.unwrap();
    assert_eq!((after.repository_id, &after.replica_path), (before.repository_id, &before.replica_path));
    commit(&mut routing, &open, &[&before.primary]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn status_metrics_and_nodes_are_shown() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let _router = Router::start(coordinator.grpc_address(), "router-1", "a.git").await;
    eventually("the router is listed", || {
        let mut operator = operator.clone();
        async move {
            let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
            (status.routers.len() == 1 && status.message_bus_connected).then_some(())
        }
    })
    .await;
    let (code, body) = get(coordinator.http_address().unwrap(), "/api/v1/status").await;
    assert_eq!(code, 200);
    for expected in [
        "\"site\":\"here\"",
        "\"repositories\":1",
        "\"router_id\":\"router-1\"",
        "\"answering\":true",
        "\"healthy\":true",
        "\"message_bus_connected\":true",
    ] {
        assert!(body.contains(expected), "{expected}: {body}");
    }
    let metrics = eventually("the gauges are counted", || async {
        let (code, metrics) = get(coordinator.http_address().unwrap(), "/metrics").await;
        assert_eq!(code, 200);
        let counted = [
            "tabularium_coordinator_repositories{virtual_storage=\"default\"} 1",
            "tabularium_coordinator_replicas_behind",
            "tabularium_coordinator_duties{state=\"pending\"}",
        ];
        counted.iter().all(|gauge| metrics.contains(gauge)).then_some(metrics)
    })
    .await;
    let expected = "tabularium_coordinator_writes_total{step=\"Commit\",result=\"Ok\"} 1";
    assert!(metrics.contains(expected), "{expected}: {metrics}");
    assert_eq!(get(coordinator.http_address().unwrap(), "/ready").await.0, 200);
    site.nodes[2].kill();
    let nodes = eventually("one node is gone", || {
        let mut operator = operator.clone();
        async move {
            let nodes = operator.dial_nodes(wire::DialNodesRequest {}).await.unwrap().into_inner().nodes;
            (!nodes[2].reachable).then_some(nodes)
        }
    })
    .await;
    assert!(nodes[0].reachable && nodes[0].storage_served, "{nodes:?}");
    assert_eq!((nodes[0].server_version.as_str(), nodes[0].git_version.as_str()), ("19.0", "2.50"));
    assert!(!nodes[2].problem.is_empty());
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    let storages = &status.virtual_storages[0].storages;
    assert_eq!(storages.iter().map(|storage| storage.healthy).collect::<Vec<_>>(), [true, true, false]);
    assert_eq!(storages.iter().map(|storage| storage.replicas).sum::<i64>(), 3);
    coordinator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_service_wants_the_token() {
    let mut secret = tempfile::NamedTempFile::new().unwrap();
    secret.write_all(b"s3cret\n").unwrap();
    let mut site = Site::start().await;
    let file = SecretFile(secret.path().to_owned());
    site.config.token_file = Some(file.clone());
    let coordinator = site.coordinator().await;
    let channel = grpc::channel(coordinator.grpc_address());
    let health = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
    let resolve = wire::ResolveRepositoryRequest { name: Some(name("a.git")), session_id: String::new() };
    let routing = RoutingServiceClient::new(channel.clone()).resolve_repository(resolve.clone()).await;
    let duty = DutyServiceClient::new(channel.clone()).start_duty(wire::StartDutyRequest::default()).await;
    let operator = OperatorServiceClient::new(channel.clone()).get_status(wire::GetStatusRequest {}).await;
    let peer =
        PeerServiceClient::new(channel.clone()).revoke_routes(wire::RevokeRoutesRequest::default()).await;
    let refused = [health.map(drop), routing.map(drop), duty.map(drop), operator.map(drop), peer.map(drop)];
    for result in refused {
        assert_refused(result, Code::Unauthenticated, "authentication required");
    }
    let signed = InterceptedService::new(channel, SendToken(Some(file.read().unwrap())));
    let found = RoutingServiceClient::new(signed).resolve_repository(resolve).await;
    assert_refused(found, Code::NotFound, "repository not found");
}

#[tokio::test(flavor = "multi_thread")]
async fn routers_are_shown_with_the_coordinator_that_holds_them() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let mut statuses = Vec::new();
    for coordinator in &coordinators {
        let (mut routing, _, mut operator) = clients(coordinator);
        let _ = create(&mut routing, &format!("{}.git", statuses.len())).await;
        statuses.push(operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner());
    }
    let id = |status: &wire::GetStatusResponse| {
        status.coordinators.iter().find(|peer| peer.answering).unwrap().id.clone()
    };
    let expected = [("r0".to_owned(), id(&statuses[0])), ("r1".to_owned(), id(&statuses[1]))];
    let mut routers = Vec::new();
    // One of them opens a second session before its first has run out, as after a cut connection.
    for (number, router_id) in [(0, "r0"), (1, "r1"), (1, "r1")] {
        routers.push(Router::start(coordinators[number].grpc_address(), router_id, "0.git").await);
    }
    let shown = |coordinator: usize| {
        let (_, _, mut operator) = clients(&coordinators[coordinator]);
        async move {
            let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
            status
                .routers
                .into_iter()
                .map(|router| (router.router_id, router.coordinator_id))
                .collect::<Vec<_>>()
        }
    };
    assert!(shown(0).await.contains(&expected[0]), "its own, at once");
    eventually("the other's too", || async { (shown(0).await == expected).then_some(()) }).await;
    eventually("and the other way round", || async { (shown(1).await == expected).then_some(()) }).await;
}
