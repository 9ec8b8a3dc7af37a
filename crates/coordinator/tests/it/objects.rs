//! Replicas whose objects are looked through: at leisure and on demand, what is damaged, and what was kept of it.

use tabularium_common::{config::ConfigDuration, lifecycle::Tasks};
use tabularium_coordinator::{Coordinator, FsckConfig};
use tabularium_proto::coordinator::{
    self as wire, check_objects_response::Found, repair_service_client::RepairServiceClient,
};
use tonic::{Code, Status, transport::Channel};

use crate::support::*;

type Repair = RepairServiceClient<Channel>;

fn repairs(coordinator: &Coordinator) -> Repair {
    Repair::new(tabularium_common::grpc::channel(coordinator.grpc_address()))
}

async fn replicas(repairs: &Repair, path: &str) -> wire::RepositoryReplicas {
    let repository = Some(wire::get_replicas_request::Repository::Name(name(path)));
    let answer = repairs.clone().get_replicas(wire::GetReplicasRequest { repository }).await;
    answer.unwrap().into_inner().repository.unwrap()
}

async fn replica(repairs: &Repair, path: &str, storage: &str) -> wire::ReplicaDetails {
    let found = replicas(repairs, path).await.replicas.into_iter();
    found.into_iter().find(|replica| replica.storage == storage).unwrap()
}

/// Of each replica its state and what was found, by storage, and which are made again.
async fn check(repairs: &Repair, path: &str) -> Result<(Vec<(String, String, String)>, Vec<String>), Status> {
    let request = wire::CheckObjectsRequest { name: Some(name(path)) };
    let mut stream = repairs.clone().check_objects(request).await?.into_inner();
    let (mut found, mut outcome) = (Vec::new(), None);
    while let Some(next) = stream.message().await? {
        match next.found.unwrap() {
            Found::Replica(replica) => found.push((replica.storage, replica.state, replica.findings)),
            Found::Outcome(last) => assert!(outcome.replace(last.made_again).is_none()),
        }
    }
    found.sort();
    Ok((found, outcome.unwrap()))
}

fn states(found: &[(String, String, String)]) -> Vec<&str> {
    found.iter().map(|(_, state, _)| state.as_str()).collect()
}

/// A site whose objects are looked through all the time.
async fn eager() -> Site {
    let mut site = Site::start().await;
    site.config.fsck =
        FsckConfig { share_percent: 100, interval: ConfigDuration::from_millis(50), ..FsckConfig::default() };
    site
}

/// Has everything looked through as soon as may be.
async fn demand(repairs: &Repair) -> i64 {
    let storage = wire::StorageName { virtual_storage: "default".into(), storage: String::new() };
    let everything = wire::MarkUnverifiedRequest { name: None, storage: Some(storage), objects: true };
    repairs.clone().mark_unverified(everything).await.unwrap().into_inner().replicas
}

async fn all_whole(repairs: &Repair, path: &str) {
    eventually("all are found whole", || async {
        let found = replicas(repairs, path).await.replicas;
        found.iter().all(|replica| replica.checked_at.is_some() && replica.damage.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_replica_is_found_at_leisure_and_made_again() {
    let site = eager().await;
    let (coordinator, other) = (site.coordinator().await, site.coordinator().await);
    let (mut routing, _, mut operator) = clients(&coordinator);
    let repairs = repairs(&coordinator);
    let route = create(&mut routing, "a.git").await;
    assert_eq!(demand(&repairs).await, 3);
    all_whole(&repairs, "a.git").await;
    let looks: usize = site.nodes.iter().map(Node::looks).sum();
    assert_eq!(looks, 3, "each replica once, whoever looks");

    let router = Router::start(other.grpc_address(), "router", "a.git").await;
    assert!(router.fill().await);
    let rotten = others(&route).remove(0);
    site.node(&rotten).finds(Objects::Damaged("missing blob 1"));
    assert_eq!(demand(&repairs).await, 3);
    let found = eventually("it is taken out", || async {
        let found = replica(&repairs, "a.git", &rotten).await;
        (found.generation == -1).then_some(found)
    })
    .await;
    assert_eq!(found.damage, "missing blob 1");
    eventually("no router reads it", || async { router.cached_generation().is_none().then_some(()) }).await;
    assert_eq!(site.node(&rotten).marks(), [("missing blob 1".to_owned(), true)], "it is to be kept aside");
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(
        (&after.primary, after.generation),
        (&route.primary, route.generation),
        "nothing else happens"
    );
    site.check_consistency().await;
    let owed = operator.list_duties(wire::ListDutiesRequest::default()).await.unwrap().into_inner().duties;
    assert!(owed.iter().any(|duty| duty.target == rotten), "{owed:?}");

    // What has taken its place is looked through soon, and nothing is said against it.
    site.node(&rotten).finds(Objects::Whole);
    repair(&site).await;
    all_whole(&repairs, "a.git").await;
    assert_eq!(replica(&repairs, "a.git", &rotten).await.generation, route.generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_none_is_whole_none_is_taken_out_and_it_is_shown() {
    let site = eager().await;
    let coordinator = site.coordinator().await;
    let (mut routing, ..) = clients(&coordinator);
    let repairs = repairs(&coordinator);
    for node in &site.nodes {
        node.finds(Objects::Damaged("missing tree 2"));
    }
    let route = create(&mut routing, "a.git").await;
    demand(&repairs).await;
    eventually("all are known to be damaged", || async {
        let found = replicas(&repairs, "a.git").await.replicas;
        found.iter().all(|replica| replica.damage == "missing tree 2").then_some(())
    })
    .await;
    let mut sql = site.sql().await;
    eventually("nobody looks again soon", || {
        let due = sqlx::query_scalar::<_, i64>(
            "SELECT count(*) FROM replicas WHERE check_due_at < now() + interval '20 days'",
        );
        let url = site.database.clone();
        async move {
            let mut sql = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.unwrap();
            sqlx::query("SET search_path = tabularium").execute(&mut sql).await.unwrap();
            (due.fetch_one(&mut sql).await.unwrap() == 0).then_some(())
        }
    })
    .await;
    let (found, made_again) = check(&repairs, "a.git").await.unwrap();
    assert_eq!(states(&found), ["damaged"; 3]);
    assert!(made_again.is_empty());
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!(generations(&after), generations(&route));
    assert_eq!(after.primary, route.primary);
    assert!(site.nodes.iter().all(|node| node.marks().is_empty()));
    let owed: i64 = sqlx::query_scalar("SELECT count(*) FROM duties WHERE kind = 'replicate'")
        .fetch_one(&mut sql)
        .await
        .unwrap();
    assert_eq!(owed, 0, "there is nothing to make them from");
    let request =
        wire::DataLossRequest { virtual_storage: "default".into(), ..wire::DataLossRequest::default() };
    let losses = repairs.clone().data_loss(request).await.unwrap().into_inner().repositories;
    assert_eq!(losses.len(), 1);
    assert!(!losses[0].unavailable && losses[0].replicas.iter().all(|replica| !replica.damage.is_empty()));
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_on_demand_tells_of_each_replica_and_moves_a_damaged_primary() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, ..) = clients(&coordinator);
    let repairs = repairs(&coordinator);
    assert_eq!(check(&repairs, "none.git").await.unwrap_err().code(), Code::NotFound);
    let route = create(&mut routing, "a.git").await;
    let (found, made_again) = check(&repairs, "a.git").await.unwrap();
    assert_eq!((states(&found), made_again.len()), (vec!["whole"; 3], 0));
    all_whole(&repairs, "a.git").await;

    // Of one nobody knows, and it is none to go on with.
    let others = others(&route);
    site.node(&route.primary).finds(Objects::Damaged("bad object"));
    for (unknown, said) in [(Objects::Unknown, "unknown service"), (Objects::Absent, "no repository")] {
        site.node(&others[0]).finds(unknown);
        site.node(&others[1]).finds(unknown);
        let (found, made_again) = check(&repairs, "a.git").await.unwrap();
        assert!(made_again.is_empty());
        for (storage, state, findings) in found {
            let damaged = storage == route.primary;
            assert_eq!(state, if damaged { "damaged" } else { "unknown" });
            assert!(findings.contains(if damaged { "bad object" } else { said }), "{findings}");
        }
    }
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().primary, route.primary);

    site.node(&others[1]).finds(Objects::Whole);
    let (_, made_again) = check(&repairs, "a.git").await.unwrap();
    assert_eq!(made_again.join(" "), route.primary);
    let after = resolve(&mut routing, "a.git").await.unwrap();
    assert_eq!((after.primary.as_str(), after.epoch), (others[1].as_str(), route.epoch + 1));
    let (found, made_again) = check(&repairs, "a.git").await.unwrap();
    let gone = found.iter().find(|(storage, ..)| *storage == route.primary).unwrap();
    assert!(gone.1 == "unknown" && gone.2.contains("behind") && made_again.is_empty(), "{found:?}");
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_is_found_during_a_write_counts_after_it() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, ..) = clients(&coordinator);
    let repairs = repairs(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let rotten = others(&route).remove(0);
    site.node(&rotten).finds(Objects::Damaged("missing blob 1"));
    let begun =
        routing.begin_write(begin_voted("a.git", wire::WriteKind::Update)).await.unwrap().into_inner();
    let checking = {
        let repairs = repairs.clone();
        Tasks::new().spawn("check", async move { check(&repairs, "a.git").await })
    };
    eventually("its node is told", || async { (!site.node(&rotten).marks().is_empty()).then_some(()) }).await;
    assert_eq!(replica(&repairs, "a.git", &rotten).await.generation, route.generation, "it takes part");
    let written = commit(&mut routing, &begun, &["node-0", "node-1", "node-2"]).await.unwrap();
    let (_, made_again) = checking.await.unwrap().unwrap();
    assert_eq!(made_again.join(" "), rotten);
    assert_eq!(replica(&repairs, "a.git", &rotten).await.generation, -1);
    assert_eq!(resolve(&mut routing, "a.git").await.unwrap().generation, written);
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nodes_kept_is_listed_and_removed() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let mut repairs = repairs(&coordinator);
    site.nodes[0].keeps("1-1");
    site.nodes[1].keeps("2-1");
    site.nodes[1].keeps("2-2");
    let list =
        |storage: &str| wire::ListKeptRequest { virtual_storage: "default".into(), storage: storage.into() };
    let ids = |listed: &wire::ListKeptResponse| -> Vec<(String, String)> {
        let found = listed.kept.iter();
        found.map(|kept| (kept.storage.clone().unwrap().storage, kept.kept_id.clone())).collect()
    };
    let of = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|(storage, id)| (storage.to_string(), id.to_string())).collect()
    };
    let all = repairs.list_kept(list("")).await.unwrap().into_inner();
    assert_eq!(ids(&all), of(&[("node-0", "1-1"), ("node-1", "2-1"), ("node-1", "2-2")]));
    assert_eq!(all.kept[0].kept_at.unwrap().seconds, 7);
    let remove = |storage: &str, kept_id: &str| wire::RemoveKeptRequest {
        storage: Some(wire::StorageName { virtual_storage: "default".into(), storage: storage.into() }),
        kept_id: kept_id.into(),
    };
    repairs.remove_kept(remove("node-1", "2-1")).await.unwrap();
    for absent in [remove("node-1", "2-1"), remove("node-9", "x")] {
        assert_eq!(repairs.remove_kept(absent).await.unwrap_err().code(), Code::NotFound);
    }
    let one = repairs.list_kept(list("node-1")).await.unwrap().into_inner();
    assert_eq!(ids(&one), of(&[("node-1", "2-2")]));
    site.nodes[1].kill();
    eventually("the node is gone", || {
        let mut repairs = repairs.clone();
        let request = list("");
        async move {
            let listed = repairs.list_kept(request).await.unwrap().into_inner();
            (listed.kept.len() == 1 && listed.unread.len() == 1).then_some(())
        }
    })
    .await;
}
