//! Migrations of a database that is in use.

use sqlx::{Connection as _, PgConnection};
use tabularium_testkit::postgres::Postgres;

/// The migration of that number, as it is shipped.
fn migration(number: u32) -> String {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
    let prefix = format!("{number:04}_");
    let found = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
        .unwrap();
    std::fs::read_to_string(found).unwrap()
}

#[tokio::test]
async fn of_several_writes_that_are_open_the_last_keeps_the_ticket_and_the_others_are_looked_at_again() {
    let postgres = Postgres::start().await;
    let mut sql = PgConnection::connect(&postgres.database().await).await.unwrap();
    for number in 1..=2 {
        sqlx::raw_sql(sqlx::AssertSqlSafe(migration(number))).execute(&mut sql).await.unwrap();
    }
    sqlx::raw_sql(
        "INSERT INTO virtual_storages VALUES ('default', 0);
         INSERT INTO repositories (id, virtual_storage, relative_path, replica_path, state, primary_storage)
         SELECT n, 'default', n::text, n::text, 'ready', 'a' FROM generate_series(1, 2) n;
         INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, expires_at)
         SELECT lpad(n::text, 32, '0')::uuid, n / 3 + 1, 'update', 0, 'a', 'router', 'm', '', now()
         FROM generate_series(1, 3) n;",
    )
    .execute(&mut sql)
    .await
    .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(migration(3))).execute(&mut sql).await.unwrap();
    let left: Vec<i64> = sqlx::query_scalar("SELECT right(id::text, 1)::bigint FROM writes ORDER BY id")
        .fetch_all(&mut sql)
        .await
        .unwrap();
    assert_eq!(left, [2, 3]);
    let doubtful: Vec<i64> =
        sqlx::query_scalar("SELECT right(id::text, 1)::bigint FROM ended_writes WHERE doubtful")
            .fetch_all(&mut sql)
            .await
            .unwrap();
    assert_eq!(doubtful, [1]);
    // What the previous binary writes has what the new one reads.
    let begun = sqlx::raw_sql(
        "DELETE FROM writes;
         INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, expires_at)
         VALUES (gen_random_uuid(), 1, 'update', 0, 'a', 'router', 'm', '', now())",
    );
    begun.execute(&mut sql).await.unwrap();
    let participants: i32 =
        sqlx::query_scalar("SELECT cardinality(participants) FROM writes").fetch_one(&mut sql).await.unwrap();
    assert_eq!(participants, 0);
}
