//! Storages and replicas that come and go, are lost, given up, found and compared.

use tabularium_common::config::ConfigDuration;
use tabularium_proto::coordinator::{self as wire, repair_service_client::RepairServiceClient};
use tonic::Code;

use crate::{
    node::{Holding, Node},
    operators::*,
    support::*,
};

/// Creates a repository with all who take part in it; answers its route.
async fn create_placed(routing: &mut Routing, path: &str) -> wire::Route {
    let begun = routing.begin_write(begin_voted(path, wire::WriteKind::Create)).await.unwrap().into_inner();
    let participants: Vec<&str> = begun.participants.iter().map(String::as_str).collect();
    commit(routing, &begun, &participants).await.unwrap();
    resolve(routing, path).await.unwrap()
}

fn storages_of(replicas: &wire::RepositoryReplicas) -> Vec<&str> {
    replicas.replicas.iter().map(|replica| replica.storage.as_str()).collect()
}

/// A write by those that may take part.
async fn write(routing: &mut Routing, path: &str) -> wire::BeginWriteResponse {
    let begun = routing.begin_write(begin_voted(path, wire::WriteKind::Update)).await.unwrap().into_inner();
    let participants: Vec<&str> = begun.participants.iter().map(String::as_str).collect();
    commit(routing, &begun, &participants).await.unwrap();
    begun
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replication_factor_is_changed_while_clients_write() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;

    let leaving = operators.set_factor("a.git", 1).await.unwrap();
    assert_eq!(leaving.replication_factor, 1);
    let alone = eventually("two replicas leave", || {
        let mut operators = operators_clone(&operators);
        async move {
            let replicas = operators.replicas("a.git").await;
            (replicas.replicas.len() == 1).then_some(replicas)
        }
    })
    .await;
    assert_eq!(storages_of(&alone), [route.primary.as_str()], "the primary stays");
    assert_eq!(alone.write_quorum, 1);
    let mut sql = site.sql().await;
    let removals = "SELECT count(*) FROM duties WHERE kind = 'cleanup' AND state = 'pending'
                    AND next_attempt_at > now() + interval '30 seconds'";
    let owed: i64 = sqlx::query_scalar(removals).fetch_one(&mut sql).await.unwrap();
    assert_eq!(owed, 2, "the files stay for a while");
    write(&mut operators.routing, "a.git").await;

    let grown = operators.set_factor("a.git", 3).await.unwrap();
    assert_eq!(storages_of(&grown), ["node-0", "node-1", "node-2"]);
    let owed: i64 = sqlx::query_scalar(removals).fetch_one(&mut sql).await.unwrap();
    assert_eq!(owed, 0, "what comes back is not removed");
    assert_eq!(grown.write_quorum, 1, "a replica that is not made yet does not hold up writes");
    let begun = write(&mut operators.routing, "a.git").await;
    assert_eq!(begun.participants, [route.primary]);
    repair(&site).await;
    assert_eq!(operators.replicas("a.git").await.write_quorum, 2);

    let too_many = operators.set_factor("a.git", 4).await.unwrap_err();
    assert_eq!(too_many.code(), Code::InvalidArgument);
    assert_refused(operators.set_factor("b.git", 2).await, Code::NotFound, "repository not found");
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_leaves_first_and_nothing_leaves_while_the_others_are_behind() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let behind = others(&route)[0].clone();
    let kept = others(&route)[1].clone();
    let begin = begin_voted("a.git", wire::WriteKind::Update);
    let begun = operators.routing.begin_write(begin).await.unwrap().into_inner();
    commit(&mut operators.routing, &begun, &[&route.primary, &kept]).await.unwrap();
    operators.set_factor("a.git", 2).await.unwrap();
    eventually("the one that is behind leaves", || {
        let mut operators = operators_clone(&operators);
        let behind = behind.clone();
        async move { (!storages_of(&operators.replicas("a.git").await).contains(&&*behind)).then_some(()) }
    })
    .await;

    let begun = routing_write_by_primary(&mut operators.routing, &route.primary).await;
    assert!(begun, "recorded by the primary alone");
    operators.set_factor("a.git", 3).await.unwrap();
    let drained = operators.drain(&kept, true).await;
    drained.unwrap();
    eventually("it is to leave, and does not while others are behind", || {
        let mut operators = operators_clone(&operators);
        let kept = kept.clone();
        async move {
            let replicas = operators.replicas("a.git").await.replicas;
            let leaving = replicas.iter().find(|replica| replica.storage == kept).unwrap();
            (!leaving.assigned).then_some(())
        }
    })
    .await;
    repair(&site).await;
    eventually("now it leaves", || {
        let mut operators = operators_clone(&operators);
        let kept = kept.clone();
        async move { (!storages_of(&operators.replicas("a.git").await).contains(&&*kept)).then_some(()) }
    })
    .await;
}

/// A write that nodes did not vote on: only the primary has it.
async fn routing_write_by_primary(routing: &mut Routing, primary: &str) -> bool {
    let begun = begin_write(routing, "a.git").await;
    let request = wire::CommitWriteRequest {
        write_id: begun.write_id,
        router_id: "router".into(),
        committed_storages: vec![primary.to_owned()],
        unvoted: true,
    };
    routing.commit_write(request).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_is_added_drained_and_removed_while_clients_work() {
    let mut site = Site::start().await;
    site.config.virtual_storages[0].default_replication_factor = 2;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let paths: Vec<String> = (0..6).map(|number| format!("{number}.git")).collect();
    for path in &paths {
        create_placed(&mut operators.routing, path).await;
    }
    let fourth = Node::start("node-3").await;
    let add = |address: String| wire::AddStorageRequest { storage: Some(storage("node-3")), address };
    let nobody = operators.storages.add_storage(add("tcp://127.0.0.1:1".into())).await;
    assert_eq!(nobody.unwrap_err().code(), Code::Unavailable);
    let added = operators.storages.add_storage(add(fourth.address.to_string())).await.unwrap().into_inner();
    let added = added.storage.unwrap();
    assert!(added.healthy && added.takes_replicas && added.filesystem_id == "disk of node-3", "{added:?}");
    let again = operators.storages.add_storage(add(fourth.address.to_string())).await;
    assert_eq!(again.unwrap_err().code(), Code::AlreadyExists);

    let remove = |force_lost| wire::RemoveStorageRequest { storage: Some(storage("node-0")), force_lost };
    let refused = operators.storages.remove_storage(remove(false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("storage drain node-0"), "{}", refused.message());
    operators.drain("node-0", false).await.unwrap();
    eventually("everything moves away", || {
        let mut operators = operators_clone(&operators);
        let site = &site;
        async move {
            repair(site).await;
            let listed = operators.listed("node-0").await.unwrap();
            assert_eq!(listed.state, "draining");
            (listed.replicas == 0 && listed.primaries == 0).then_some(())
        }
    })
    .await;
    for path in &paths {
        let replicas = operators.replicas(path).await;
        assert_eq!(replicas.replicas.len(), 2, "{replicas:?}");
        assert!(replicas.replicas.iter().all(|replica| replica.assigned && replica.up_to_date));
        write(&mut operators.routing, path).await;
    }
    assert!(operators.listed("node-3").await.unwrap().replicas > 0, "the empty one takes its share");

    operators.storages.remove_storage(remove(false)).await.unwrap();
    assert_eq!(operators.listed("node-0").await, None);
    let second = site.coordinator().await;
    assert_eq!(self::operators(&second).listed("node-0").await, None, "though the configuration names it");
    let back = wire::AddStorageRequest {
        storage: Some(storage("node-0")),
        address: site.nodes[0].address.to_string(),
    };
    operators.storages.add_storage(back).await.unwrap();
    assert!(operators.listed("node-0").await.unwrap().takes_replicas);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_is_not_drained_when_there_is_nowhere_to_go_and_can_be_kept_after_all() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    create(&mut operators.routing, "a.git").await;
    operators.set_factor("a.git", 3).await.unwrap();
    let refused = operators.drain("node-1", false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("3 replicas, and only 2 other"), "{}", refused.message());
    operators.drain("node-1", true).await.unwrap();
    let twice = operators.drain("node-1", true).await.unwrap_err();
    assert_refused::<()>(Err(twice), Code::FailedPrecondition, "storage `node-1` is not active");
    operators
        .storages
        .undrain_storage(wire::UndrainStorageRequest { storage: Some(storage("node-1")) })
        .await
        .unwrap();
    eventually("all three hold it again", || {
        let mut operators = operators_clone(&operators);
        let site = &site;
        async move {
            repair(site).await;
            let replicas = operators.replicas("a.git").await.replicas;
            (replicas.len() == 3 && replicas.iter().all(|replica| replica.assigned)).then_some(())
        }
    })
    .await;
    let unknown = operators.drain("node-9", true).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_with_another_disk_is_not_used_until_that_is_accepted() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let primary = route.primary.clone();
    disk_known(&operators, &primary).await;
    let accept = |force_lost| wire::AcceptStorageRequest { storage: Some(storage(&primary)), force_lost };
    let same = operators.storages.accept_storage(accept(false)).await.unwrap_err();
    assert_eq!(same.code(), Code::FailedPrecondition);

    site.node(&primary).exchange_disk("an empty disk");
    let listed = eventually("it is seen", || {
        let mut operators = operators_clone(&operators);
        let primary = primary.clone();
        async move { Some(operators.listed(&primary).await.unwrap()).filter(|listed| !listed.healthy) }
    })
    .await;
    assert!(listed.problem.contains("an empty disk"), "{}", listed.problem);
    assert_eq!(listed.filesystem_id, format!("disk of {primary}"), "nothing is taken over by itself");

    // A write that only the lost disk has is not given up by accident.
    let begun = routing_write_by_primary(&mut operators.routing, &primary).await;
    assert!(begun);
    let refused = operators.storages.accept_storage(accept(false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("1 repositories"), "{}", refused.message());
    repair(&site).await;
    let accepted = operators.storages.accept_storage(accept(false)).await.unwrap().into_inner();
    assert_eq!((accepted.replicas, accepted.lost_repositories), (1, 0));
    let replicas = operators.replicas("a.git").await;
    assert_ne!(replicas.primary, primary, "the primary moved");
    assert!(replicas.epoch > route.epoch);
    let forgotten = replicas.replicas.iter().find(|replica| replica.storage == primary).unwrap();
    assert_eq!(forgotten.generation, -1);
    assert!(forgotten.behind_since.is_some());
    write(&mut operators.routing, "a.git").await;
    eventually("it is healthy with its new disk", || {
        let mut operators = operators_clone(&operators);
        let primary = primary.clone();
        async move {
            let listed = operators.listed(&primary).await.unwrap();
            (listed.healthy && listed.filesystem_id == "an empty disk").then_some(())
        }
    })
    .await;
    eventually("copies are owed", || async {
        let mut sql = site.sql().await;
        let owed: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM duties WHERE kind = 'replicate' AND target = $1 AND state <> 'done'",
        )
        .bind(&primary)
        .fetch_one(&mut sql)
        .await
        .unwrap();
        (owed == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_are_shown_and_given_up_by_an_operators_word() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    for path in ["a.git", "b.git", "c.git", "d.git"] {
        create(&mut operators.routing, path).await;
    }
    assert_eq!(operators.losses(false).await, []);
    let route = resolve(&mut operators.routing, "a.git").await.unwrap();
    for path in ["a.git", "c.git", "d.git"] {
        let primary = resolve(&mut operators.routing, path).await.unwrap().primary;
        let begun = begin_write(&mut operators.routing, path).await;
        let request = wire::CommitWriteRequest {
            write_id: begun.write_id,
            router_id: "router".into(),
            committed_storages: vec![primary],
            unvoted: true,
        };
        operators.routing.commit_write(request).await.unwrap();
    }
    let losses = operators.losses(false).await;
    let names: Vec<_> =
        losses.iter().map(|loss| loss.name.as_ref().unwrap().relative_path.as_str()).collect();
    assert_eq!(names, ["a.git", "c.git", "d.git"]);
    let behind: Vec<_> = losses[0].replicas.iter().filter(|replica| !replica.up_to_date).collect();
    assert!(behind.len() == 2 && behind.iter().all(|replica| replica.behind_since.is_some()), "{behind:?}");
    assert_eq!(operators.losses(true).await, [], "the primaries are there");

    site.node(&route.primary).kill();
    eventually("nobody can serve it", || {
        let mut operators = operators_clone(&operators);
        async move {
            let lost = operators.losses(true).await;
            lost.iter()
                .any(|loss| loss.repository_id == route_id(&lost, "a.git") && loss.unavailable)
                .then_some(())
        }
    })
    .await;

    let chosen = others(&route)[0].clone();
    let accept = |storage: &str| wire::AcceptDataLossRequest {
        name: Some(name("a.git")),
        authoritative_storage: storage.to_owned(),
    };
    let gone = operators.repair.accept_data_loss(accept(&route.primary)).await.unwrap_err();
    assert_eq!(gone.code(), Code::Unavailable, "{gone:?}");
    site.node(&chosen).holds(Holding::Nothing);
    let empty = operators.repair.accept_data_loss(accept(&chosen)).await.unwrap_err();
    assert_eq!(empty.code(), Code::FailedPrecondition, "the node is asked, not the record");
    site.node(&chosen).holds(Holding::State("old"));
    let accepted = operators.repair.accept_data_loss(accept(&chosen)).await.unwrap().into_inner();
    let accepted = accepted.repository.unwrap();
    let before = resolve_generation(&losses, "a.git");
    assert_eq!((accepted.primary.as_str(), accepted.generation), (chosen.as_str(), before + 1));
    assert!(accepted.epoch > route.epoch && !accepted.unavailable);
    let others = accepted.replicas.iter().filter(|replica| replica.storage != chosen);
    assert!(others.clone().all(|replica| replica.generation == -1), "{accepted:?}");
    site.check_consistency().await;
    let begun =
        operators.routing.begin_write(begin("a.git", wire::WriteKind::Update)).await.unwrap().into_inner();
    assert_eq!(begun.route.as_ref().unwrap().primary, chosen);
    let busy = operators.repair.accept_data_loss(accept(&chosen)).await.unwrap_err();
    assert_eq!(busy.code(), Code::Aborted, "not under somebody's ticket");
}

fn route_id(losses: &[wire::RepositoryReplicas], path: &str) -> i64 {
    let found = losses.iter().find(|loss| loss.name.as_ref().unwrap().relative_path == path);
    found.map_or(-1, |loss| loss.repository_id)
}

fn resolve_generation(losses: &[wire::RepositoryReplicas], path: &str) -> i64 {
    losses.iter().find(|loss| loss.name.as_ref().unwrap().relative_path == path).unwrap().generation
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_differs_is_found_and_made_again() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let verified = |replicas: &wire::RepositoryReplicas| {
        replicas.replicas.iter().filter(|replica| replica.verified_at.is_some()).count()
    };
    eventually("all are found equal", || {
        let mut operators = operators_clone(&operators);
        async move { (verified(&operators.replicas("a.git").await) == 3).then_some(()) }
    })
    .await;

    site.node(&route.primary).holds(Holding::State("rotten"));
    let unverify = wire::MarkUnverifiedRequest { name: Some(name("a.git")), storage: None, objects: false };
    let marked = operators.repair.mark_unverified(unverify).await.unwrap().into_inner();
    assert_eq!(marked.replicas, 3);
    let replicas = eventually("the rotten one is taken out", || {
        let mut operators = operators_clone(&operators);
        let rotten = route.primary.clone();
        async move {
            let replicas = operators.replicas("a.git").await;
            let found = replicas.replicas.iter().find(|replica| replica.storage == rotten).unwrap();
            (found.generation == -1).then_some(replicas)
        }
    })
    .await;
    assert_ne!(replicas.primary, route.primary, "and is not the primary any more");
    let marks = site.node(&route.primary).marks();
    assert!(marks.len() == 1 && marks[0].0.contains("differs") && !marks[0].1, "to be kept aside: {marks:?}");
    assert_eq!(replicas.generation, route.generation, "nothing was written");
    site.check_consistency().await;

    let everything = wire::MarkUnverifiedRequest { name: None, storage: Some(storage("")), objects: false };
    operators.repair.mark_unverified(everything).await.unwrap();
    let nothing = wire::MarkUnverifiedRequest::default();
    assert_eq!(operators.repair.mark_unverified(nothing).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_that_was_under_way_satisfies_nobody_who_asks_for_one() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(50);
    site.config.timing.verification_patience = ConfigDuration::from_secs(60);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let other = operators_clone(&operators);
    let all_are_verified = async |verified: bool| {
        eventually("all are verified, or none", || {
            let mut operators = operators_clone(&other);
            async move {
                let replicas = operators.replicas("a.git").await.replicas;
                replicas.iter().all(|replica| replica.verified_at.is_some() == verified).then_some(())
            }
        })
        .await;
    };
    all_are_verified(true).await;
    for by_storage in [false, true] {
        let target = if by_storage { (None, Some(storage(""))) } else { (Some(name("a.git")), None) };
        let unverify = wire::MarkUnverifiedRequest { name: target.0, storage: target.1, objects: false };
        let primary = site.node(&route.primary);
        let gate = primary.close_answer_gate().await;
        let asked = primary.asked();
        operators.repair.mark_unverified(unverify.clone()).await.unwrap();
        eventually("a comparison is under way", || async { (primary.asked() > asked).then_some(()) }).await;
        let marked = operators.repair.mark_unverified(unverify).await.unwrap().into_inner();
        assert_eq!(marked.replicas, 3);
        drop(gate);
        eventually("it is made once more", || async { (primary.asked() > asked + 1).then_some(()) }).await;
        all_are_verified(true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_quorum_is_changed_and_what_is_missing_is_owed_at_once() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    create(&mut operators.routing, "a.git").await;
    let mut set = async |policy: &str| {
        let request = wire::SetWriteQuorumRequest { name: Some(name("a.git")), policy: policy.into() };
        operators.repair.set_write_quorum(request).await.map(|answer| answer.into_inner().repository.unwrap())
    };
    let available = set("available").await.unwrap();
    assert_eq!((available.write_quorum_policy.as_str(), available.write_quorum), ("available", 1));
    assert_eq!(set("default").await.unwrap().write_quorum, 2);
    assert_eq!(set("all").await.unwrap_err().code(), Code::InvalidArgument);
    operators.repair.reconcile(wire::ReconcileRequest {}).await.unwrap();
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_no_record_is_listed_and_tracked() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    site.nodes[1].has_on_disk(&route.replica_path);
    site.nodes[1].has_on_disk("old/lost.git");
    let list = wire::ListUntrackedRequest { virtual_storage: "default".into(), older_than_seconds: 3600 };
    let mut listed = async || {
        let mut stream = operators.repair.list_untracked(list.clone()).await.unwrap().into_inner();
        let mut found = Vec::new();
        while let Some(untracked) = stream.message().await.unwrap() {
            found.push((untracked.storage, untracked.replica_path));
        }
        found
    };
    assert_eq!(listed().await, [("node-1".to_owned(), "old/lost.git".to_owned())]);

    let track = |path: &str, replica_path: &str| wire::TrackRepositoryRequest {
        name: Some(name(path)),
        replica_path: replica_path.into(),
        authoritative_storage: "node-1".into(),
    };
    let mut repair = RepairServiceClient::new(tabularium_common::grpc::channel(coordinator.grpc_address()));
    let taken = repair.track_repository(track("a.git", "old/lost.git")).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    let tracked = repair.track_repository(track("found.git", "old/lost.git")).await.unwrap().into_inner();
    let tracked = tracked.repository.unwrap();
    assert_eq!((tracked.primary.as_str(), tracked.replica_path.as_str()), ("node-1", "old/lost.git"));
    assert_eq!(storages_of(&tracked), ["node-0", "node-1", "node-2"], "the others get their copies");
    assert_eq!(tracked.write_quorum, 1);
    let twice = repair.track_repository(track("again.git", "old/lost.git")).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists);
    assert_eq!(listed().await, []);
    site.check_consistency().await;
}
