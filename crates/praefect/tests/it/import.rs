//! Taking over what Praefect has recorded.

use sqlx::{Connection as _, PgConnection};
use tabularium_testkit::wait::wait_until;

use crate::stage::{PATIENCE, Stage};

/// Praefect's tables, as far as an import reads them.
const TABLES: &str = r#"
    CREATE TABLE repositories (
        repository_id bigserial PRIMARY KEY, virtual_storage text, relative_path text, replica_path text,
        generation bigint, "primary" text, UNIQUE (virtual_storage, relative_path));
    CREATE TABLE storage_repositories (
        virtual_storage text, relative_path text, storage text, generation bigint NOT NULL,
        repository_id bigint REFERENCES repositories ON DELETE CASCADE,
        verified_at timestamptz, verification_leased_until timestamptz,
        PRIMARY KEY (virtual_storage, relative_path, storage));
    CREATE TABLE repository_assignments (
        virtual_storage text, relative_path text, storage text,
        repository_id bigint REFERENCES repositories ON DELETE CASCADE,
        PRIMARY KEY (virtual_storage, relative_path, storage));
    CREATE TABLE shard_primaries (
        id bigserial PRIMARY KEY, shard_name varchar(255) NOT NULL, node_name varchar(255) NOT NULL,
        elected_by_praefect varchar(255) NOT NULL, elected_at timestamptz NOT NULL);
    CREATE TABLE node_status (
        id bigserial PRIMARY KEY, praefect_name varchar(511) NOT NULL, shard_name varchar(255) NOT NULL,
        node_name varchar(255) NOT NULL, last_contact_attempt_at timestamptz, last_seen_active_at timestamptz);
"#;

struct Praefect(PgConnection);

impl Praefect {
    async fn new(stage: &Stage) -> Self {
        let mut connection = PgConnection::connect(&stage.database).await.unwrap();
        sqlx::raw_sql(TABLES).execute(&mut connection).await.unwrap();
        Self(connection)
    }

    async fn run(&mut self, statement: String) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut self.0).await.unwrap();
    }

    async fn add(
        &mut self,
        id: i64,
        path: &str,
        replica_path: &str,
        held: &[(&str, i64)],
        assigned: &[&str],
    ) {
        let newest = held.iter().map(|(_, generation)| *generation).max().unwrap_or(0);
        self.run(format!(
            "INSERT INTO repositories VALUES ({id}, 'default', '{path}', '{replica_path}', {newest}, 'gitaly-1');
             SELECT setval('repositories_repository_id_seq', {id})"
        ))
        .await;
        for (storage, generation) in held {
            self.run(format!(
                "INSERT INTO storage_repositories VALUES ('default', '{path}', '{storage}', {generation}, {id})"
            ))
            .await;
        }
        for storage in assigned {
            self.run(format!(
                "INSERT INTO repository_assignments VALUES ('default', '{path}', '{storage}', {id})"
            ))
            .await;
        }
    }
}

#[tokio::test]
async fn what_praefect_recorded_is_served_from_where_it_lies() {
    let mut stage = Stage::new(2, 0).await;
    let mut praefect = Praefect::new(&stage).await;
    stage.on_disk(1, "@cluster/repositories/4b/22/777").await;
    stage.on_disk(2, "@cluster/repositories/4b/22/777").await;
    stage.on_disk(1, "@hashed/aa/old.git").await;
    praefect
        .add(
            777,
            "@hashed/bb/b.git",
            "@cluster/repositories/4b/22/777",
            &[("gitaly-1", 3), ("gitaly-2", 2)],
            &[],
        )
        .await;
    praefect.add(5, "@hashed/aa/old.git", "@hashed/aa/old.git", &[("gitaly-1", 0)], &["gitaly-1"]).await;
    praefect.add(6, "gone.git", "gone.git", &[("gitaly-9", 0)], &[]).await;
    praefect.run("SELECT setval('repositories_repository_id_seq', 900)".to_owned()).await;
    stage.serve().await;

    let looked = stage.ok(&["import-praefect", "-dry-run"]).await;
    assert!(looked.contains("2 repositories with 3 replicas would be taken over.\n"), "{looked}");
    assert!(
        looked.contains("repository 6, default:gone.git (left out): no configured storage has a replica\n"),
        "{looked}"
    );
    assert!(!stage.exists("@hashed/bb/b.git").await.unwrap());

    praefect
        .run("INSERT INTO node_status (praefect_name, shard_name, node_name, last_contact_attempt_at) VALUES ('p-1', 'default', 'gitaly-1', now())".to_owned())
        .await;
    let (code, _, err) = stage.run(&["import-praefect"]).await;
    assert!(code == 1 && err.contains("Praefect is at work there (p-1): stop it first"), "{err}");
    praefect
        .run("UPDATE node_status SET last_contact_attempt_at = now() - interval '1 minute'".to_owned())
        .await;

    let taken = stage.ok(&["import-praefect"]).await;
    assert!(taken.contains("2 repositories with 3 replicas taken over.\n"), "{taken}");
    assert!(taken.contains("New repositories get ids above 900.\n"), "{taken}");
    assert!(stage.exists("@hashed/bb/b.git").await.unwrap());
    let told = stage.ok(&["metadata", "-repository-id", "5"]).await;
    assert!(
        told.contains("Replica Path: \"@hashed/aa/old.git\"\n") && told.matches("- Storage").count() == 1,
        "{told}"
    );
    wait_until("the replica that was behind is copied", PATIENCE, async || {
        let told = stage.ok(&["metadata", "-repository-id", "777"]).await;
        if told.matches("fully up to date").count() == 2 { Ok(()) } else { Err(told) }
    })
    .await;
    stage.create("new.git").await;
    let told = stage.ok(&["metadata", "-virtual-storage", "default", "-relative-path", "new.git"]).await;
    let id: i64 = told.lines().next().unwrap().strip_prefix("Repository ID: ").unwrap().parse().unwrap();
    assert!(id > 900, "{told}");

    let again = stage.ok(&["import-praefect"]).await;
    assert!(again.contains("0 repositories with 0 replicas taken over.\n"), "{again}");
    assert!(again.contains("2 repositories were known before; 1 are left out.\n"), "{again}");
}

#[tokio::test]
async fn a_database_without_praefects_tables_is_named() {
    let mut stage = Stage::new(1, 0).await;
    stage.serve().await;
    let (code, _, err) = stage.run(&["import-praefect"]).await;
    assert!(code == 1 && err.contains("does not have Praefect's tables"), "{err}");
}
