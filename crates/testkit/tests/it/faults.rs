//! The fault harness itself, in a session short enough for every day.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::process::Command;

/// Of the whole session: starting, faults, healing, inspection.
const DEADLINE: Duration = Duration::from_secs(240);

#[tokio::test]
async fn a_short_session_breaks_no_promise() {
    let directory = tempfile::tempdir().unwrap();
    let history = directory.path().join("session");
    let (well, said) = session(&["--seconds", "20", "--seed", "7", "--writers", "2"], &history).await;
    assert!(well, "{said}");
    assert!(said.contains("acknowledged"), "{said}");

    // What was kept is judged the same, and one acknowledged write that is missing on the disks is noticed.
    let (well, again) = check(&history).await;
    assert!(well, "{again}");
    let path = history.join("history.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let without: Vec<_> = text.lines().map(|line| without_closing(line, "hot-0.git")).collect();
    std::fs::write(&path, without.join("\n")).unwrap();
    let (well, said) = check(&history).await;
    assert!(!well && said.contains("BROKEN lost: hot-0.git refs/heads/closing"), "{said}");
}

/// Takes a ref off every disk of a repository.
fn without_closing(line: &str, repository: &str) -> String {
    let mut event: serde_json::Value = serde_json::from_str(line).unwrap();
    if event["event"] == "disk" && event["repository"] == repository {
        let removed = event["refs"].as_object_mut().unwrap().remove("refs/heads/closing");
        assert!(removed.is_some(), "{line}");
    }
    event.to_string()
}

async fn session(arguments: &[&str], directory: &Path) -> (bool, String) {
    // Crash points and disks cost time and rights; the long sessions have them.
    const ONLY: &str = "kill-primary,kill-router,kill-coordinator,stop-node,cut-node,nats-empty";
    run(arguments.iter().copied().chain(["--only", ONLY, "--directory", directory.to_str().unwrap()])).await
}

async fn check(directory: &Path) -> (bool, String) {
    run(["--check", directory.to_str().unwrap()].into_iter()).await
}

async fn run<'a>(arguments: impl Iterator<Item = &'a str>) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabularium-faults"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output =
        tokio::time::timeout(DEADLINE, command.output()).await.expect("a session that ends").unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}
