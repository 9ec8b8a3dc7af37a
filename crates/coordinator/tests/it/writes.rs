//! Creating, writing, failing over, settling.

use tabularium_common::{
    config::ConfigDuration,
    ids::{ReplicaPath, RepositoryId},
};
use tabularium_proto::coordinator::{self as wire, WriteKind, abort_write_request::Outcome};
use tonic::Code;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn of_two_creators_exactly_one_wins_and_nothing_is_seen_before_the_commit() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let mut tries = Vec::new();
    for number in 0..8 {
        let (mut routing, _, _) = clients(&coordinators[number % 2]);
        tries.push(async move { routing.begin_write(begin("g/a.git", WriteKind::Create)).await });
    }
    let mut begun = Vec::new();
    for result in futures::future::join_all(tries).await {
        match result {
            Ok(response) => begun.push(response.into_inner()),
            Err(status) => assert_eq!(
                (status.code(), status.message()),
                (
                    Code::AlreadyExists,
                    "route repository creation: reserve repository id: repository already exists"
                )
            ),
        }
    }
    assert_eq!(begun.len(), 1);
    let begun = &begun[0];
    let (mut routing, _, _) = clients(&coordinators[0]);
    assert_refused(resolve(&mut routing, "g/a.git").await, Code::NotFound, "repository not found");
    let update = routing.begin_write(begin("g/a.git", WriteKind::Update)).await;
    assert_refused(update, Code::NotFound, "repository not found");

    let primary = begun.route.as_ref().unwrap().primary.clone();
    assert_eq!(begun.assigned_secondaries.len(), 2);
    assert_eq!(commit(&mut routing, begun, &[&primary]).await.unwrap(), 1);
    let route = resolve(&mut clients(&coordinators[1]).0, "g/a.git").await.unwrap();
    let expected = ReplicaPath::for_repository(RepositoryId(route.repository_id));
    assert_eq!(route.replica_path, expected.as_str());
    assert_eq!((route.generation, route.primary.clone()), (1, primary));
    let mut sorted = generations(&route);
    sorted.sort_unstable();
    assert_eq!(sorted, [-1, -1, 1]);
    site.check_consistency().await;
    assert_eq!(commit(&mut routing, begun, &[&route.primary]).await.unwrap(), 1, "said twice, recorded once");
    assert_eq!(resolve(&mut routing, "g/a.git").await.unwrap(), route);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_was_lost_is_answered_again_by_any_coordinator() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let (mut other, _, _) = clients(&coordinators[1]);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let next = begin_write(&mut routing, "a.git").await;
    commit(&mut routing, &next, &[&route.primary]).await.unwrap();
    for routing in [&mut routing, &mut other] {
        assert_eq!(commit(routing, &begun, &[&route.primary]).await.unwrap(), generation);
    }
    let stranger = wire::CommitWriteRequest {
        write_id: begun.write_id.clone(),
        router_id: "another".into(),
        committed_storages: vec![route.primary.clone()],
        unvoted: false,
    };
    assert_eq!(routing.commit_write(stranger).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().generation, generation + 1);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_to_a_removed_repository_is_not_recorded() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let before = create(&mut routing, "a.git").await;
    let open = begin_write(&mut routing, "a.git").await;
    routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("a.git")) }).await.unwrap();
    let again = create(&mut routing, "a.git").await;
    let late = commit(&mut routing, &open, &[&before.primary]).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    abort(&mut routing, &open, Outcome::InDoubt, &[]).await.unwrap();
    let renew =
        wire::RenewWritesRequest { router_id: "router".into(), write_ids: vec![open.write_id.clone()] };
    assert_eq!(routing.renew_writes(renew).await.unwrap().into_inner().lost_write_ids, [open.write_id]);
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap(), again);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_creation_gives_the_name_back_and_owes_a_cleanup() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    for outcome in [Outcome::NotApplied, Outcome::InDoubt] {
        let begun = routing.begin_write(begin("a.git", WriteKind::Create)).await.unwrap().into_inner();
        abort(&mut routing, &begun, outcome, &[]).await.unwrap();
        abort(&mut routing, &begun, outcome, &[]).await.unwrap();
        assert_eq!(
            commit(&mut routing, &begun, &["node-0"]).await.unwrap_err().code(),
            Code::FailedPrecondition
        );
    }
    let first = create(&mut routing, "a.git").await;
    let removed = routing
        .remove_repository(wire::RemoveRepositoryRequest { name: Some(name("a.git")) })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(removed.repository_id, first.repository_id);
    assert_refused(resolve(&mut routing, "a.git").await, Code::NotFound, "repository not found");
    let again = routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("a.git")) }).await;
    assert_refused(again, Code::NotFound, "repository not found");
    let second = create(&mut routing, "a.git").await;
    assert_ne!(first.repository_id, second.repository_id);
    assert_ne!(first.replica_path, second.replica_path);
    let duties = operator.list_duties(wire::ListDutiesRequest::default()).await.unwrap().into_inner().duties;
    let cleanups = duties.iter().filter(|duty| duty.subject.starts_with("cleanup.default.")).count();
    assert_eq!(cleanups, 2 + 3, "one for each creation given up, three for the removal");
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_are_kept_apart_and_beside_their_members() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let member = create(&mut routing, "member.git").await;
    let pool = wire::BeginWriteRequest {
        method: "/gitaly.ObjectPoolService/CreateObjectPool".into(),
        additional_repository: Some(name("member.git")),
        ..begin("@pools/aa/bb/aabb.git", WriteKind::Create)
    };
    let missing = wire::BeginWriteRequest { additional_repository: Some(name("none.git")), ..pool.clone() };
    let refused = routing.begin_write(missing).await;
    assert_refused(refused, Code::NotFound, "additional repository not found");
    let mut elsewhere = pool.clone();
    elsewhere.additional_repository.as_mut().unwrap().virtual_storage = "other".into();
    assert_eq!(routing.begin_write(elsewhere).await.unwrap_err().code(), Code::InvalidArgument);
    let begun = routing.begin_write(pool).await.unwrap().into_inner();
    let route = begun.route.unwrap();
    assert!(route.replica_path.starts_with("@cluster/pools/"), "{}", route.replica_path);
    assert_eq!(begun.additional_replica_path, member.replica_path);
    assert_eq!(route.primary, member.primary);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_cannot_be_are_refused_in_gitalys_words() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let cases = [
        ("", "", "repository not set"),
        ("", "a.git", "storage name not set"),
        ("default", "", "repository path not set"),
        ("default", "../a.git", "relative path escapes root directory"),
        ("default", "a\nb", "relative path contains a control character"),
        ("nowhere", "a.git", "virtual storage does not exist"),
        ("no where", "a.git", "virtual storage does not exist"),
    ];
    for (virtual_storage, relative_path, text) in cases {
        let name = wire::RepositoryName {
            virtual_storage: virtual_storage.into(),
            relative_path: relative_path.into(),
        };
        let request = wire::ResolveRepositoryRequest { name: Some(name.clone()), session_id: "x-1".into() };
        assert_refused(routing.resolve_repository(request).await, Code::InvalidArgument, text);
        let request = wire::BeginWriteRequest { name: Some(name), ..begin("x", WriteKind::Upsert) };
        assert_refused(routing.begin_write(request).await, Code::InvalidArgument, text);
    }
    let request = wire::BeginWriteRequest { name: None, ..begin("x", WriteKind::Create) };
    assert_refused(routing.begin_write(request).await, Code::InvalidArgument, "repository not set");
    let status = routing.begin_write(begin("x", WriteKind::Unspecified)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writes_each_count_once() {
    const WRITERS: usize = 8;
    const WRITES: usize = 10;
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let route = create(&mut routing, "a.git").await;
    let writers = (0..WRITERS).map(|number| {
        let (mut routing, _, _) = clients(&coordinators[number % 2]);
        let primary = route.primary.clone();
        async move {
            let mut seen = Vec::new();
            for _ in 0..WRITES {
                let begun = begin_write(&mut routing, "a.git").await;
                seen.push(commit(&mut routing, &begun, &[&primary]).await.unwrap());
            }
            seen
        }
    });
    let mut seen: Vec<i64> = futures::future::join_all(writers).await.concat();
    seen.sort_unstable();
    let last = i64::try_from(WRITERS * WRITES).unwrap() + 1;
    assert_eq!(seen, (2..=last).collect::<Vec<_>>());
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(after.generation, last);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_cannot_be_reached_is_replaced_as_the_write_begins() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let before = create(&mut routing, "a.git").await;
    let moved = wire::BeginWriteRequest {
        unreachable_storages: vec![before.primary.clone()],
        ..begin("a.git", WriteKind::Update)
    };
    let begun = routing.begin_write(moved.clone()).await.unwrap().into_inner();
    let route = begun.route.as_ref().unwrap();
    assert_ne!(route.primary, before.primary);
    assert_eq!((route.epoch, &begun.participants), (before.epoch + 1, &vec![route.primary.clone()]));
    let wrong = commit(&mut routing, &begun, &[&before.primary]).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument, "{wrong}");
    commit(&mut routing, &begun, &[&route.primary.clone()]).await.unwrap();
    let after = resolve(&mut routing, "a.git").await.unwrap();
    site.check_consistency().await;

    let all = wire::BeginWriteRequest {
        unreachable_storages: vec![after.primary.clone()],
        ..begin("a.git", WriteKind::Update)
    };
    let refused = routing.begin_write(all).await;
    assert_refused(refused, Code::FailedPrecondition, "repository is in read-only mode");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intent_that_is_not_renewed_is_settled() {
    let mut site = Site::start().await;
    site.config.timing.write_lease = ConfigDuration::from_secs(3);
    site.config.timing.sweep_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    create(&mut routing, "left.git").await;
    let kept = begin_write(&mut routing, "a.git").await;
    let renewing =
        wire::RenewWritesRequest { router_id: "router".into(), write_ids: vec![kept.write_id.clone()] };
    let _left = begin_write(&mut routing, "left.git").await;
    let creating = routing.begin_write(begin("b.git", WriteKind::Create)).await.unwrap().into_inner();
    eventually("the two left are settled and the third stands", || {
        let (mut routing, mut operator, renewing) = (routing.clone(), operator.clone(), renewing.clone());
        async move {
            let lost = routing.renew_writes(renewing).await.unwrap().into_inner().lost_write_ids;
            assert_eq!(lost, [""; 0]);
            let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
            (status.writes_under_way == 1).then_some(())
        }
    })
    .await;
    let route = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(commit(&mut routing, &kept, &[&route.primary]).await.unwrap(), route.generation + 1);
    assert_eq!(
        commit(&mut routing, &creating, &["node-0"]).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    create(&mut routing, "b.git").await;
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.writes_under_way, 0);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_healthy_node_nothing_is_created() {
    let site = Site::start().await;
    for node in &site.nodes {
        node.kill();
    }
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let refused = routing.begin_write(begin("a.git", WriteKind::Create)).await;
    assert_refused(refused, Code::Internal, "no healthy nodes");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upsert_creates_or_updates() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let created = routing.begin_write(begin("a.git", WriteKind::Upsert)).await.unwrap().into_inner();
    let primary = created.route.as_ref().unwrap().primary.clone();
    assert_eq!(commit(&mut routing, &created, &[&primary]).await.unwrap(), 1);
    let updated = routing.begin_write(begin("a.git", WriteKind::Upsert)).await.unwrap().into_inner();
    assert_eq!(updated.route.as_ref().unwrap().repository_id, created.route.unwrap().repository_id);
    assert_eq!(commit(&mut routing, &updated, &[&primary]).await.unwrap(), 2);
}
