//! Cached routes never outlive the write that made them wrong.

use std::{
    process::{Child, Command},
    sync::atomic::Ordering,
    time::Duration,
};

use tabularium_common::announce::Announcement;
use tabularium_proto::coordinator as wire;
use tokio::time::Instant;

use crate::support::*;

async fn filled(routers: &[Router]) {
    for router in routers {
        eventually("a cached route", || async { router.fill().await.then_some(()) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_commit_no_router_of_any_coordinator_has_the_old_route() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let route = create(&mut routing, "a.git").await;
    let mut routers = Vec::new();
    for number in 0..4 {
        let address = coordinators[number % 2].grpc_address();
        routers.push(Router::start(address, &format!("r{number}"), "a.git").await);
    }
    for _ in 0..10 {
        repair(&site).await;
        filled(&routers).await;
        // Fills go on while the write is committed: some are overtaken by it.
        let filling = futures::future::join_all(routers.iter().map(Router::fill));
        let writing = async {
            let mut routing = routing.clone();
            let begun = begin_write(&mut routing, "a.git").await;
            let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
            for router in &routers {
                if let Some(cached) = router.cached_generation() {
                    assert!(cached >= generation, "{cached} after {generation}");
                }
            }
        };
        tokio::join!(filling, writing);
    }
    // The name goes: so do the routes.
    filled(&routers).await;
    routing.remove_repository(wire::RemoveRepositoryRequest { name: Some(name("a.git")) }).await.unwrap();
    assert!(routers.iter().all(|router| router.cached_generation().is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_router_delays_a_commit_by_one_lease() {
    let site = Site::start().await;
    let lease = site.config.timing.router_lease.0;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let route = create(&mut routing, "a.git").await;
    for coordinator in &coordinators {
        repair(&site).await;
        let router = Router::start(coordinator.grpc_address(), "deaf", "a.git").await;
        filled(std::slice::from_ref(&router)).await;
        router.deaf.store(true, Ordering::SeqCst);
        let begun = begin_write(&mut routing, "a.git").await;
        let asked = Instant::now();
        let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
        let waited = asked.elapsed();
        assert!(router.cached_generation().is_none_or(|cached| cached >= generation));
        assert!(waited > lease / 3, "{waited:?}: it was waited for");
        assert!(waited < lease * 3, "{waited:?}: but not for ever");
    }
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_coordinator_delays_a_commit_by_its_lease() {
    let site = Site::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (config, announce) = (directory.path().join("c.toml"), directory.path().join("c.json"));
    std::fs::write(&config, crate::binary::toml(&site, "")).unwrap();
    let mut other = Process(
        Command::new(env!("CARGO_BIN_EXE_tabularium-coordinator"))
            .args(["--config", config.to_str().unwrap(), "--announce", announce.to_str().unwrap()])
            .spawn()
            .unwrap(),
    );
    let address = eventually("the announcement", || async { Announcement::read(&announce).unwrap() }).await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, mut operator) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let router = Router::start(&address.grpc.unwrap().parse().unwrap(), "r", "a.git").await;
    filled(std::slice::from_ref(&router)).await;
    let status = operator.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.coordinators.len(), 2);

    other.0.kill().unwrap();
    other.0.wait().unwrap();
    let begun = begin_write(&mut routing, "a.git").await;
    let asked = Instant::now();
    let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    let waited = asked.elapsed();
    assert!(router.cached_generation().is_none_or(|cached| cached >= generation));
    let lease = site.config.timing.coordinator_lease.0;
    assert!(waited < lease * 2, "{waited:?}");
    repair(&site).await;
    let begun = begin_write(&mut routing, "a.git").await;
    let asked = Instant::now();
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(2), "it is waited for once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_whose_lease_the_databases_clock_has_ended_is_asked_all_the_same() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let route = create(&mut routing, "a.git").await;
    let router = Router::start(coordinators[1].grpc_address(), "r", "a.git").await;
    let mut sql = site.sql().await;
    for _ in 0..5 {
        repair(&site).await;
        filled(std::slice::from_ref(&router)).await;
        let begun = begin_write(&mut routing, "a.git").await;
        // What a clock that jumps ahead makes of all leases.
        sqlx::query("UPDATE coordinators SET lease_until = lease_until - interval '1 hour'")
            .execute(&mut sql)
            .await
            .unwrap();
        let generation = commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
        assert!(router.cached_generation().is_none_or(|cached| cached >= generation));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_coordinator_ends_its_sessions_and_comes_back() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    let router = Router::start(coordinator.grpc_address(), "r", "a.git").await;
    filled(std::slice::from_ref(&router)).await;
    let mut sql = site.sql().await;
    sqlx::query("UPDATE coordinators SET fenced = true").execute(&mut sql).await.unwrap();
    eventually("the cached route is gone", || async { router.cached_generation().is_none().then_some(()) })
        .await;
    eventually("a route is cached and usable again", || async {
        router.fill().await;
        router.cached_generation()
    })
    .await;
    let live: i64 =
        sqlx::query_scalar("SELECT count(*) FROM coordinators WHERE NOT fenced AND lease_until > now()")
            .fetch_one(&mut sql)
            .await
            .unwrap();
    assert_eq!(live, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_left_undone_is_carried_out_by_somebody() {
    let site = Site::start().await;
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let router = Router::start(coordinator.grpc_address(), "r", "a.git").await;
    filled(std::slice::from_ref(&router)).await;
    // A coordinator committed and died before it could tell anybody.
    let mut sql = site.sql().await;
    sqlx::query(
        "INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation, owed_since)
         VALUES ($1, 'default', 'a.git', $2, now() - interval '1 hour')",
    )
    .bind(route.repository_id)
    .bind(route.generation + 1)
    .execute(&mut sql)
    .await
    .unwrap();
    eventually("the row is gone", || async {
        let mut sql = site.sql().await;
        let owed: i64 =
            sqlx::query_scalar("SELECT count(*) FROM revocations").fetch_one(&mut sql).await.unwrap();
        (owed == 0).then_some(())
    })
    .await;
    assert_eq!(router.cached_generation(), None);
}

/// The first write leaves a replica behind, gives the ticket back, and waits until no router reads there. The second one
/// leaves nobody behind, and must wait for the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_also_waits_for_what_the_one_before_it_owes() {
    let site = Site::start().await;
    let coordinators = [site.coordinator().await, site.coordinator().await];
    let (mut routing, _, _) = clients(&coordinators[0]);
    let (mut other, _, _) = clients(&coordinators[1]);
    create(&mut routing, "a.git").await;
    let router = Router::start(coordinators[0].grpc_address(), "deaf", "a.git").await;
    let check = |generation: i64| {
        let cached = router.cached_generation();
        assert!(cached.is_none_or(|cached| cached >= generation), "{cached:?} after {generation}");
    };
    for _ in 0..3 {
        repair(&site).await;
        router.deaf.store(false, Ordering::SeqCst);
        filled(std::slice::from_ref(&router)).await;
        router.deaf.store(true, Ordering::SeqCst);
        let begun =
            routing.begin_write(begin_voted("a.git", wire::WriteKind::Update)).await.unwrap().into_inner();
        let first = async {
            let two: Vec<&str> = begun.participants[..2].iter().map(String::as_str).collect();
            check(commit(&mut routing, &begun, &two).await.unwrap());
            Instant::now()
        };
        let second = async {
            let begun =
                other.begin_write(begin_voted("a.git", wire::WriteKind::Update)).await.unwrap().into_inner();
            let began = Instant::now();
            let two: Vec<&str> = begun.participants.iter().map(String::as_str).collect();
            assert_eq!(two.len(), 2);
            check(commit(&mut other, &begun, &two).await.unwrap());
            began
        };
        let (first_ended, second_began) = tokio::join!(first, second);
        assert!(second_began < first_ended, "the ticket is free before everybody was told");
    }
}
