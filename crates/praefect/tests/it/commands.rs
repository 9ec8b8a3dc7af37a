//! Praefect's commands against the process that serves.

use tabularium_testkit::wait::wait_until;

use crate::stage::{PATIENCE, Stage};

#[tokio::test]
async fn commands_about_the_database_need_nothing_but_the_database() {
    let stage = Stage::new(1, 0).await;
    assert_eq!(stage.ok(&["sql-ping"]).await, "praefect sql-ping: OK\n");
    let status = stage.ok(&["sql-migrate-status"]).await;
    assert!(status.contains("| 0001_placement") && status.contains("| no "), "{status}");
    let migrated = stage.ok(&["sql-migrate", "-verbose"]).await;
    assert!(migrated.starts_with("praefect sql-migrate: migrations to apply: "), "{migrated}");
    assert!(
        migrated.contains("CREATE TABLE repositories")
            && migrated.contains("\npraefect sql-migrate: OK (applied ")
    );
    assert_eq!(stage.ok(&["sql-migrate"]).await, "praefect sql-migrate: all migrations are up\n");
    let status = stage.ok(&["sql-migrate-status"]).await;
    assert!(status.contains(" +0000 UTC") && !status.contains("| no "), "{status}");
    let (code, _, err) = stage.run(&["sql-migrate-down", "1"]).await;
    assert!(code == 1 && err.contains("forward only"), "{err}");
    let (code, _, err) = stage.run(&["sql-migrate-down"]).await;
    assert!(code == 1 && err.ends_with("sql-migrate-down requires a single positional argument\n"), "{err}");
    let checked = stage.ok(&["check", "-q"]).await;
    assert!(checked.contains("repositories...Failed (warning) error: error dialing: unix:"), "{checked}");
    assert!(checked.ends_with("\n1 check(s) failed, but none are fatal.\n"), "{checked}");
    let (code, _, err) = stage.run(&["dataloss"]).await;
    assert!(code == 1 && err.contains("error dialing"), "{err}");
}

#[tokio::test]
async fn nodes_are_dialled_and_everything_is_checked() {
    let mut stage = Stage::new(2, 0).await;
    stage.serve().await;
    let dialled = stage.ok(&["dial-nodes", "-timeout", "5s"]).await;
    for line in [
        "]: dialing...\n",
        "]: dialed successfully!\n",
        "]: SUCCESS: node is healthy!\n",
        "]: SUCCESS: confirmed Gitaly storage \"gitaly-2\" in virtual storages [default] is served\n",
        "]: SUCCESS: node configuration is consistent!\n",
    ] {
        assert!(dialled.contains(line), "{line} in {dialled}");
    }
    let checked = stage.ok(&["check"]).await;
    assert!(
        checked.contains("Checking praefect migrations - ") && checked.ends_with("\nAll checks passed.\n"),
        "{checked}"
    );
    let quiet = stage.ok(&["check", "-q"]).await;
    assert!(quiet.starts_with("Checking praefect migrations...Passed\n"), "{quiet}");
    let listed = stage.ok(&["list-storages", "--virtual-storage", "default"]).await;
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 3);
    let address = lines[1].split('\t').nth(2).unwrap();
    let heading = format!("VIRTUAL_STORAGE\tNODE    \t{:1$} ", "ADDRESS", address.len());
    assert_eq!(lines[0], heading);
    stage.write_config(3, 0, "");
    let (code, out, err) = stage.run(&["dial-nodes", "-timeout=1s"]).await;
    assert!(code == 1 && out.contains("ERROR: dialing failed: "), "{out}");
    assert!(err.contains("the following nodes are not healthy: unix:"), "{err}");
}

#[tokio::test]
async fn what_is_known_of_a_repository_is_told_and_steered() {
    let mut stage = Stage::new(2, 0).await;
    stage.serve().await;
    stage.create("@hashed/aa/a.git").await;
    let one = ["-virtual-storage", "default", "-relative-path", "@hashed/aa/a.git"];
    let of = |command: &'static str, more: &[&'static str]| [&[command], &one[..], more].concat();
    let told = stage.ok(&of("metadata", &[])).await;
    let (id, rest) = told.strip_prefix("Repository ID: ").unwrap().split_once('\n').unwrap();
    assert!(
        rest.starts_with("Virtual Storage: \"default\"\nRelative Path: \"@hashed/aa/a.git\"\n"),
        "{told}"
    );
    assert_eq!(stage.ok(&["metadata", "--repository-id", id]).await, told);
    assert_eq!(
        stage.ok(&["dataloss", "-partially-unavailable"]).await,
        "Virtual storage: default\n  All repositories are fully available on all assigned storages!\n"
    );
    assert_eq!(
        stage.ok(&["dataloss"]).await,
        "Virtual storage: default\n  All repositories are available!\n"
    );
    let marked = stage.ok(&["verify", "-virtual-storage", "default"]).await;
    assert!(marked.ends_with(" replicas marked unverified\n"), "{marked}");
    assert_eq!(stage.ok(&["reconcile"]).await, "0 replication jobs scheduled\n");
    assert_eq!(stage.ok(&of("accept-dataloss", &["-authoritative-storage", "gitaly-2"])).await, "");
    wait_until("the other one is copied", PATIENCE, async || {
        let told = stage.ok(&of("metadata", &[])).await;
        if told.contains("Primary: \"gitaly-2\"") && told.matches("fully up to date").count() == 2 {
            Ok(())
        } else {
            Err(told)
        }
    })
    .await;
    assert_eq!(
        stage.ok(&of("set-replication-factor", &["-replication-factor", "1"])).await,
        "current assignments: gitaly-2\n"
    );
    let (code, _, err) = stage.run(&of("set-replication-factor", &["-replication-factor", "3"])).await;
    assert!(code == 1 && err.contains("rpc error: code = InvalidArgument"), "{err}");
    let (code, _, err) = stage.run(&["metadata", "-virtual-storage", "default"]).await;
    assert!(code == 1 && err.contains("relative path is required with virtual storage"), "{err}");
    let (code, out, err) = stage.run(&["dataloss", "-virtual-storage", "none"]).await;
    assert_eq!((code, out.as_str()), (1, "Virtual storage: none\n"));
    assert!(
        err.contains("getting response: rpc error: code = Internal desc = unknown virtual storage: \"none\"")
    );
    let (code, _, err) = stage.run(&["metadata", "--repository-id", "99"]).await;
    assert!(code == 1 && err.contains("get metadata: rpc error: code = NotFound"), "{err}");
}

#[tokio::test]
async fn repositories_on_disk_are_found_tracked_and_let_go() {
    let mut stage = Stage::new(2, 0).await;
    stage.serve().await;
    for path in ["@hashed/aa/a.git", "@hashed/bb/b.git", "@hashed/cc/c.git"] {
        stage.on_disk(1, path).await;
    }
    let listed = stage.ok(&["list-untracked-repositories", "-older-than", "0s"]).await;
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 4, "{listed}");
    assert_eq!(
        lines[0],
        "The following repositories were found on disk, but missing from the tracking database:"
    );
    assert!(lines[1..].contains(
        &r#"{"relative_path":"@hashed/aa/a.git","storage":"gitaly-1","virtual_storage":"default"}"#
    ));
    let tracked = stage
        .ok(&[
            "track-repository",
            "-virtual-storage",
            "default",
            "-relative-path",
            "@hashed/aa/a.git",
            "-replica-path",
            "@hashed/aa/a.git",
            "-authoritative-storage",
            "gitaly-1",
            "-replicate-immediately",
        ])
        .await;
    assert_eq!(
        tracked,
        "Finished adding new repository to be tracked in praefect database.\nFinished replicating repository to \"gitaly-2\".\n"
    );
    assert!(stage.storage(2).join("@hashed/aa/a.git/HEAD").exists());
    let line = |path: &str| {
        format!(
            r#"{{"relative_path":"{path}","replica_path":"{path}","virtual_storage":"default","authoritative_storage":"gitaly-1"}}"#
        )
    };
    let input = stage.path("input");
    let track = ["track-repositories", "-input-path", input.to_str().unwrap()];
    let bad =
        [line("@hashed/bb/b.git"), line("@hashed/bb/b.git"), line("@hashed/aa/a.git"), line("none.git")];
    std::fs::write(&input, bad.join("\n")).unwrap();
    let (code, out, err) = stage.run(&track).await;
    assert!(code == 1 && err.contains("invalid entries found, aborting"), "{err}");
    for fault in [
        "duplicate entries for relative_path, line [1 2]",
        "already tracked by Praefect",
        "not a valid git repository",
    ] {
        assert!(out.contains(fault), "{fault} in {out}");
    }
    std::fs::write(&input, [line("@hashed/bb/b.git"), line("@hashed/cc/c.git")].join("\n")).unwrap();
    let out = stage.ok(&track).await;
    assert!(out.contains("Tracking 2 repositories in Praefect DB...\n"), "{out}");
    assert!(stage.exists("@hashed/cc/c.git").await.unwrap());
    assert_eq!(stage.ok(&["list-untracked-repositories", "-older-than", "0s"]).await, "");

    let remove = |path: &'static str, more: &[&'static str]| {
        [&["remove-repository", "-virtual-storage", "default", "-relative-path", path], more].concat()
    };
    let out = stage.ok(&remove("@hashed/bb/b.git", &[])).await;
    assert!(out.starts_with("Repository found in the database.\nRe-run the command with -apply"), "{out}");
    stage.ok(&remove("@hashed/bb/b.git", &["-apply", "-db-only"])).await;
    assert!(!stage.exists("@hashed/bb/b.git").await.unwrap());
    assert!(stage.storage(1).join("@hashed/bb/b.git/HEAD").exists(), "its files stay");
    stage.ok(&remove("@hashed/cc/c.git", &["-apply"])).await;
    wait_until("its files go", PATIENCE, async || {
        if stage.storage(1).join("@hashed/cc/c.git").exists() { Err("there".to_owned()) } else { Ok(()) }
    })
    .await;
    let (code, _, err) =
        stage.run(&["remove-repository", "-virtual-storage", "none", "-relative-path", "x"]).await;
    assert!(code == 1 && err.contains("repository is not being tracked in Praefect"), "{err}");
    let (code, _, err) = stage.run(&remove("@hashed/cc/c.git", &[])).await;
    assert!(code == 1 && err.contains("repository is not being tracked in Praefect"), "{err}");
}
