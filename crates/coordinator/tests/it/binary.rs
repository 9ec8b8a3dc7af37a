//! The program: arguments, exit codes, start and stop; and what it does while Postgres is away.

use std::{
    path::Path,
    process::{Command, Output},
};

use tabularium_common::announce::Announcement;
use tabularium_proto::coordinator as wire;
use tonic::Code;

use crate::{relay::Relay, support::*};

/// The site's configuration as a file, with `timing` lines added.
pub(crate) fn toml(site: &Site, timing: &str) -> String {
    use std::fmt::Write as _;
    let mut text = format!(
        "site = \"here\"\nlisten = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n\
         database_url = \"{}\"\nnats_url = \"{}\"\n[[virtual_storage]]\nname = \"default\"\n",
        site.database, site.config.nats_url
    );
    for storage in &site.config.virtual_storages[0].storages {
        let (name, address) = (&storage.name, &storage.address);
        writeln!(text, "[[virtual_storage.storage]]\nname = \"{name}\"\naddress = \"{address}\"").unwrap();
    }
    format!("{text}[timing]\n{timing}\n")
}

fn command(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabularium-coordinator"));
    command.arg("--config").arg(config);
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_a_bad_configuration_from_a_missing_database() {
    let site = Site::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("c.toml");
    std::fs::write(&config, toml(&site, "parked_after = 0")).unwrap();
    let output = command(&config).arg("--check-config").output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(
        stderr(&output).contains("`timing.parked_after` is `0`; allowed: 1 or more"),
        "{}",
        stderr(&output)
    );

    let elsewhere = toml(&site, "database_start = \"300ms\"")
        .replace(&site.database, "postgres://nobody@127.0.0.1:1/none");
    std::fs::write(&config, elsewhere).unwrap();
    assert!(command(&config).arg("--check-config").status().unwrap().success());
    let output = command(&config).output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    assert!(stderr(&output).contains("no usable database after 300ms"), "{}", stderr(&output));
    let output = command(&config).arg("--sql-ping").output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_wants_the_database_and_our_schema_in_it() {
    let site = Site::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("c.toml");
    std::fs::write(&config, toml(&site, "")).unwrap();
    let output = command(&config).arg("--sql-ping").output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    assert!(stderr(&output).contains("its schema `tabularium` is not set up"), "{}", stderr(&output));
    assert!(command(&config).arg("--migrate-only").status().unwrap().success());
    assert!(command(&config).arg("--sql-ping").status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_may_migrate_at_once_and_again() {
    let site = Site::start().await;
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("c.toml");
    std::fs::write(&config, toml(&site, "")).unwrap();
    let running: Vec<_> = (0..4).map(|_| command(&config).arg("--migrate-only").spawn().unwrap()).collect();
    for mut process in running {
        assert!(process.wait().unwrap().success());
    }
    assert!(command(&config).arg("--migrate-only").status().unwrap().success());
    let mut sql = site.sql().await;
    let elsewhere: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('tabularium', 'pg_catalog', 'information_schema')",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    assert_eq!(elsewhere, 0, "all tables are in the schema");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_coordinator_leaves_no_lease_behind() {
    let site = Site::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (config, announce) = (directory.path().join("c.toml"), directory.path().join("c.json"));
    std::fs::write(&config, toml(&site, "")).unwrap();
    let mut process = command(&config).arg("--announce").arg(&announce).spawn().unwrap();
    let announced = eventually("the announcement", || async { Announcement::read(&announce).unwrap() }).await;
    assert_eq!(announced.pid, process.id());
    let address = announced.grpc.unwrap().parse().unwrap();
    let (mut routing, _, _) = clients_of(&address);
    create(&mut routing, "a.git").await;
    let _router = Router::start(&address, "r", "a.git").await;
    Command::new("kill").arg(process.id().to_string()).status().unwrap();
    let status = eventually("it ends", || {
        let status = process.try_wait().unwrap();
        async move { status }
    })
    .await;
    assert_eq!(status.code(), Some(0));
    let mut sql = site.sql().await;
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM coordinators").fetch_one(&mut sql).await.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_away_calls_are_unavailable_and_then_they_work_again() {
    // A relay that can be shut stands for a server that goes and comes back.
    let mut site = Site::start().await;
    let relay = Relay::start(&site.database).await;
    site.config.database_url = tabularium_coordinator::DatabaseUrl::new(relay.url.clone());
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    create(&mut routing, "a.git").await;
    relay.shut();
    let ready = |code: u16| {
        let address = coordinator.http_address().unwrap();
        async move { (crate::operator::get(address, "/ready").await.0 == code).then_some(()) }
    };
    eventually("not ready", || ready(503)).await;
    let status = resolve(&mut routing, "a.git").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(!status.message().contains("127.0.0.1"), "{status}");
    relay.open();
    eventually("ready again", || ready(200)).await;
    eventually("resolves again", || {
        let mut routing = routing.clone();
        async move { resolve(&mut routing, "a.git").await.ok() }
    })
    .await;
    let begun: wire::BeginWriteResponse = begin_write(&mut routing, "a.git").await;
    let primary = begun.route.as_ref().unwrap().primary.clone();
    commit(&mut routing, &begun, &[&primary]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_nobody_could_renew_survive_an_outage_of_postgres() {
    use std::time::Duration;
    use tabularium_common::config::ConfigDuration;
    let mut site = Site::start().await;
    let relay = Relay::start(&site.database).await;
    site.config.database_url = tabularium_coordinator::DatabaseUrl::new(relay.url.clone());
    site.config.timing.write_lease = ConfigDuration::from_secs(2);
    site.config.timing.sweep_interval = ConfigDuration::from_millis(50);
    let coordinator = site.coordinator().await;
    let (mut routing, _, _) = clients(&coordinator);
    let route = create(&mut routing, "a.git").await;
    let begun = begin_write(&mut routing, "a.git").await;
    relay.shut();
    tokio::time::sleep(Duration::from_secs(3)).await;
    relay.open();
    let renewed = eventually("a renewal", || {
        let mut routing = routing.clone();
        let write_ids = vec![begun.write_id.clone()];
        async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let renew = wire::RenewWritesRequest { router_id: "router".into(), write_ids };
            routing.renew_writes(renew).await.ok()
        }
    })
    .await;
    assert_eq!(renewed.into_inner().lost_write_ids, [""; 0]);
    commit(&mut routing, &begun, &[&route.primary]).await.unwrap();
}
