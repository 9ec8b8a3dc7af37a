//! Replicas of which a router, or a comparison, has found that something is wrong.

use tabularium_common::config::ConfigDuration;
use tabularium_proto::coordinator as wire;
use tonic::Code;

use crate::{
    node::{Holding, OLDER},
    operators::*,
    support::*,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_of_which_no_replica_can_be_read_is_shown_until_one_can() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(200);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let storages: Vec<String> = others(&route).into_iter().chain([route.primary.clone()]).collect();
    for storage in &storages {
        site.node(storage).holds(Holding::Older);
    }
    let request = wire::ReportReplicaRequest {
        repository_id: route.repository_id,
        storage: route.primary.clone(),
        generation: route.generation,
        what: format!("DataLoss: {OLDER}"),
    };
    assert!(operators.routing.report_replica(request).await.unwrap().into_inner().looked_into);
    let lost = wire::DataLossRequest {
        virtual_storage: "default".into(),
        only_unavailable: true,
        ..wire::DataLossRequest::default()
    };
    let shown = eventually("it is shown with its reasons", || {
        let (mut repair, lost) = (operators.repair.clone(), lost.clone());
        async move {
            let shown = repair.data_loss(lost).await.unwrap().into_inner().repositories.pop()?;
            shown.replicas.iter().all(|replica| replica.damage == OLDER).then_some(shown)
        }
    })
    .await;
    assert!(shown.unavailable && shown.replicas.iter().all(|replica| replica.up_to_date));

    // An operator's word makes one of them the truth, and the others are copied to.
    let chosen = &storages[0];
    site.node(chosen).holds(Holding::State("old"));
    let accept =
        wire::AcceptDataLossRequest { name: Some(name("a.git")), authoritative_storage: chosen.clone() };
    let accepted = operators.repair.accept_data_loss(accept).await.unwrap().into_inner().repository.unwrap();
    assert!(!accepted.unavailable);
    assert!(accepted.replicas.iter().all(|replica| replica.damage.is_empty()));
    assert_eq!(operators.repair.data_loss(lost).await.unwrap().into_inner().repositories, []);
}

/// Its generation there is unknown: it is not read from, and made again.
async fn taken_out(operators: &Operators, path: &'static str, storage: &str) {
    eventually("it is taken out", || {
        let mut operators = operators_clone(operators);
        async move {
            let replicas = operators.replicas(path).await.replicas;
            let replica = replicas.iter().find(|replica| replica.storage == storage).unwrap();
            (replica.generation == -1).then_some(())
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_suspected_while_its_storage_is_down_is_looked_at_when_that_is_back() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(100);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let route = create(&mut operators.routing, "a.git").await;
    let suspect = others(&route).remove(0);
    let (node, witness) = (site.node(&suspect), site.node(&route.primary));
    let other = operators_clone(&operators);
    let listed = async |healthy: bool| {
        eventually("its health is seen", || {
            let (mut operators, suspect) = (operators_clone(&other), suspect.clone());
            async move { (operators.listed(&suspect).await?.healthy == healthy).then_some(()) }
        })
        .await;
    };
    eventually("all are compared", || {
        let mut operators = operators_clone(&other);
        async move {
            let replicas = operators.replicas("a.git").await.replicas;
            replicas.iter().all(|replica| replica.verified_at.is_some()).then_some(())
        }
    })
    .await;
    disk_known(&other, &suspect).await;
    node.exchange_disk("not mounted yet");
    listed(false).await;
    node.holds(Holding::Older);
    let before = witness.asked();
    let request = wire::ReportReplicaRequest {
        repository_id: route.repository_id,
        storage: suspect.clone(),
        generation: route.generation,
        what: format!("DataLoss: {OLDER}"),
    };
    assert!(operators.routing.report_replica(request).await.unwrap().into_inner().looked_into);
    // All looks that a suspicion is worth.
    eventually("the others are looked at", || async { (witness.asked() >= before + 5).then_some(()) }).await;
    node.exchange_disk(&format!("disk of {suspect}"));
    taken_out(&other, "a.git", &suspect).await;
    site.check_consistency().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_older_than_it_was_is_found_though_nobody_reads_it() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(100);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    for number in 0..3 {
        site.node(&format!("node-{number}")).holds(Holding::State("new"));
    }
    let route = create(&mut operators.routing, "a.git").await;
    let older = others(&route).remove(0);
    site.node(&older).holds(Holding::Older);
    unverify(&site).await;
    taken_out(&operators, "a.git", &older).await;
    site.check_consistency().await;
}

/// All replicas are due to be compared.
async fn unverify(site: &Site) {
    let forgetting = sqlx::query("UPDATE replicas SET verified_at = NULL, comparing = NULL");
    forgetting.execute(&mut site.sql().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_a_router_suspects_is_looked_at_before_anything_is_done() {
    let mut site = Site::start().await;
    site.config.timing.verification_interval = ConfigDuration::from_millis(200);
    let coordinator = site.coordinator().await;
    let mut operators = operators(&coordinator);
    let other = operators_clone(&operators);
    let reported = async |operators: &mut Operators, route: &wire::Route, storage: &str| {
        let request = wire::ReportReplicaRequest {
            repository_id: route.repository_id,
            storage: storage.into(),
            generation: route.generation,
            what: "NotFound: repository not found".into(),
        };
        operators.routing.report_replica(request).await.map(|answer| answer.into_inner().looked_into)
    };
    let compared = async |path: &str| {
        eventually("all are compared", || {
            let mut operators = operators_clone(&other);
            async move {
                let replicas = operators.replicas(path).await;
                replicas.replicas.iter().all(|replica| replica.verified_at.is_some()).then_some(replicas)
            }
        })
        .await
    };
    for (path, holding) in
        [("a.git", Holding::Nothing), ("b.git", Holding::Invalid), ("c.git", Holding::Broken)]
    {
        let route = create(&mut operators.routing, path).await;
        compared(path).await;
        let suspect = others(&route).remove(0);
        site.node(&suspect).holds(holding);
        assert!(reported(&mut operators, &route, &suspect).await.unwrap());
        assert!(!reported(&mut operators, &route, &suspect).await.unwrap(), "once is enough");
        eventually("it is taken out", || {
            let (mut operators, suspect) = (operators_clone(&other), suspect.clone());
            async move {
                let replicas = operators.replicas(path).await.replicas;
                let generation = |storage: &str| {
                    replicas.iter().find(|replica| replica.storage == storage).unwrap().generation
                };
                let rest = replicas.iter().filter(|replica| replica.storage != suspect);
                assert!(rest.into_iter().all(|replica| replica.generation == route.generation));
                (generation(&suspect) == -1).then_some(())
            }
        })
        .await;
        site.node(&suspect).holds(Holding::State("old"));
        if holding == Holding::Broken {
            assert_eq!(site.node(&suspect).marks().last().map(|(_, rebuild)| *rebuild), Some(true));
        }
    }

    // A router's word alone does nothing, and what it cannot know is refused.
    let route = create(&mut operators.routing, "sound.git").await;
    assert!(reported(&mut operators, &route, &route.primary).await.unwrap());
    let sound = compared("sound.git").await;
    assert!(sound.replicas.iter().all(|replica| replica.generation == route.generation));
    assert_eq!(sound.primary, route.primary);
    let unknown = wire::Route { repository_id: 999, ..route.clone() };
    assert!(!reported(&mut operators, &unknown, &route.primary).await.unwrap());
    assert_eq!(reported(&mut operators, &route, "").await.unwrap_err().code(), Code::InvalidArgument);
    site.check_consistency().await;
}
