//! Throw-away Postgres and NATS.

use sqlx::{Connection as _, PgConnection};
use tabularium_cli::local::postgres::{Durability, PostgresServer};
use tabularium_testkit::{nats::Nats, postgres::Postgres};

async fn database_name(url: &str) -> String {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("select current_database()::text").fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn every_database_is_another_one() {
    let postgres = Postgres::start().await;
    let (first, second) = (postgres.database().await, postgres.database().await);
    assert_ne!(database_name(&first).await, database_name(&second).await);
}

#[tokio::test]
async fn a_second_handle_finds_a_server_too() {
    let url = Postgres::start().await.database().await;
    drop(url);
    let postgres = Postgres::start().await;
    let url = postgres.database().await;
    assert!(database_name(&url).await.starts_with("t_"));
}

#[tokio::test]
async fn nats_keeps_its_port_and_its_messages_over_a_restart_and_loses_them_when_told() {
    let mut nats = Nats::start_own().await;
    let url = nats.url().to_owned();
    let stream =
        |jetstream: async_nats::jetstream::Context| async move { jetstream.get_stream("S").await.is_ok() };
    let connect = async |url: &str| async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
    let config = async_nats::jetstream::stream::Config {
        name: "S".into(),
        subjects: vec!["s.>".into()],
        ..Default::default()
    };
    connect(&url).await.create_stream(config).await.unwrap();
    nats.restart().await;
    assert_eq!(nats.url(), url);
    assert!(stream(connect(&url).await).await);
    nats.stop().await;
    assert!(async_nats::connect(&url).await.is_err());
    nats.restart_empty().await;
    assert!(!stream(connect(&url).await).await);
}

/// A directory closed to others (as `/root` is) cannot hold the data of a Postgres that runs as another user.
#[tokio::test]
async fn postgres_runs_below_a_closed_directory_and_recovers_from_a_crash() {
    let closed = tempfile::tempdir().unwrap();
    let mut server =
        PostgresServer::start(&closed.path().join("postgres"), Durability::ThrowAway).await.unwrap();
    server.create_database("site_home").await.unwrap();
    server.create_database("site_home").await.unwrap();
    let url = server.url("site_home");
    server.kill().unwrap();
    assert!(PgConnection::connect(&url).await.is_err());
    server.restart().await.unwrap();
    assert_eq!(database_name(&url).await, "site_home");
    server.drop_database("site_home").await.unwrap();
    assert!(PgConnection::connect(&url).await.is_err());
    let directory = server.directory().to_owned();
    drop(server);
    assert!(!directory.exists());
}
