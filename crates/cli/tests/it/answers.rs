//! Exit codes and errors, with nothing running.

use super::{run, text};

#[test]
fn without_a_cluster_commands_say_how_to_get_one() {
    let state = tempfile::tempdir().unwrap();
    for arguments in [
        &["status"][..],
        &["repo", "list"],
        &["repo", "create", "a/b"],
        &["repo", "remove", "a/b", "--yes"],
        &["duties", "list"],
        &["dial-nodes"],
        &["storage", "list"],
        &["storage", "drain", "node-1"],
        &["dataloss"],
        &["accept-dataloss", "a/b", "--authoritative-storage", "node-1", "--yes"],
        &["metadata", "a/b"],
        &["reconcile"],
        &["verify", "--all"],
        &["verify", "a/b", "--fsck"],
        &["kept", "list"],
        &["kept", "remove", "node-1", "7-1700000000000"],
        &["list-untracked"],
        &["rebuild", "--dry-run"],
        &["repo", "set-replication-factor", "a/b", "all"],
    ] {
        let (code, output) = run(state.path(), arguments);
        assert_eq!(code, 69, "{arguments:?}");
        let said = text(&output.stderr);
        assert!(said.contains("tabularium up") && said.trim().lines().count() == 1, "{said}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn an_address_where_nobody_listens_is_named() {
    let state = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", state.path().join("nobody").display());
    let (code, output) = run(state.path(), &["status", "--coordinator", &socket]);
    assert_eq!(code, 69);
    assert!(text(&output.stderr).contains(&socket));
}

#[test]
fn nonsense_is_a_usage_error() {
    let state = tempfile::tempdir().unwrap();
    for arguments in [
        &["repo", "remove", "a/b"][..],
        &["repo", "show", "../x"],
        &["accept-dataloss", "a/b", "--authoritative-storage", "node-1"],
        &["repo", "set-replication-factor", "a/b", "none"],
        &["status", "--coordinator", "tls://a"],
        &["status", "--tls-ca", "/no/such/file"],
        &["status", "--tls-key", "/no/such/file"],
        &["up", "--over", "tls"],
        &["status", "--coordinator-token-file", "/no/such/file"],
        &["sql-ping"],
        &["dance"],
    ] {
        let (code, output) = run(state.path(), arguments);
        assert_eq!(code, 2, "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn checks_fail_one_by_one_and_with_hints() {
    let state = tempfile::tempdir().unwrap();
    let (code, output) = run(state.path(), &["check", "--json"]);
    assert_eq!(code, 1);
    let checks: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = checks.as_array().unwrap();
    assert!(checks.len() >= 3);
    for check in checks {
        assert_eq!(check["ok"], false);
        assert_ne!(check["hint"], "");
    }
}
