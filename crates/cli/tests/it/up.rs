//! `tabularium up` from its start to its end, whichever way it ends.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{run, tabularium, text};

/// How long processes may take to vanish.
const VANISH: Duration = Duration::from_secs(15);

/// A running `up`. A test that fails leaves none behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already cannot be killed, and need not.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Starts the smallest cluster; answers once it is up.
fn up(state: &Path) -> Running {
    let child = tabularium(state)
        .args(["up", "--json", "--base-port", "0", "--no-mirror", "--nodes", "1"])
        .args(["--coordinators", "1", "--routers", "1", "--replicators", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut running = Running(child);
    let mut line = String::new();
    BufReader::new(running.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    if !line.contains(r#""event":"up""#) {
        let mut said = String::new();
        running.0.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        panic!("not up: {line}{said}");
    }
    running
}

fn signal(running: &Running, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(running.0.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Command lines of processes that name the directory.
fn processes_of(state: &Path) -> Vec<String> {
    let state = state.display().to_string();
    let ids = fs::read_dir("/proc").unwrap().flatten();
    let lines = ids.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| text(&line).replace('\0', " "));
    lines.filter(|line| line.contains(&state)).collect()
}

#[expect(clippy::disallowed_methods, reason = "a plain thread of a test")]
fn assert_nothing_runs(state: &Path) {
    let deadline = Instant::now() + VANISH;
    while !processes_of(state).is_empty() {
        assert!(Instant::now() < deadline, "left running: {:#?}", processes_of(state));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn data_survives_an_interrupt_and_a_second_start() {
    let directory = tempfile::Builder::new().prefix("tabularium-test-up-").tempdir_in("/tmp").unwrap();
    let state = directory.path().join("state");
    let mut child = up(&state);
    let (code, output) = run(&state, &["repo", "create", "group/project", "--json"]);
    assert_eq!(code, 0, "{}", text(&output.stderr));
    let (code, output) = run(&state, &["repo", "create", "group/project"]);
    assert_eq!(code, 1, "already there: {}", text(&output.stderr));
    let (code, output) = run(&state, &["check", "--json"]);
    assert_eq!(code, 0, "{}", text(&output.stdout));
    signal(&child, Signal::INT);
    assert!(child.0.wait().unwrap().success());
    assert_nothing_runs(&state);
    assert_eq!(run(&state, &["status"]).0, 69);

    let mut child = up(&state);
    let (code, output) = run(&state, &["repo", "list", "--json"]);
    assert_eq!(code, 0, "{}", text(&output.stderr));
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(listed[0]["relative_path"], "group/project.git");
    assert_eq!(run(&state, &["repo", "rename", "group/project", "group/other"]).0, 0);
    assert_eq!(run(&state, &["repo", "show", "group/project"]).0, 1);
    assert_eq!(run(&state, &["repo", "show", "group/other"]).0, 0);
    assert_eq!(run(&state, &["repo", "remove", "group/other", "--yes"]).0, 0);
    assert_eq!(run(&state, &["repo", "remove", "group/other", "--yes"]).0, 1);
    assert_eq!(run(&state, &["status"]).0, 0);
    signal(&child, Signal::TERM);
    assert!(child.0.wait().unwrap().success());
    assert_nothing_runs(&state);
}

#[test]
fn nothing_outlives_a_killed_up_and_a_second_one_is_refused() {
    let directory = tempfile::Builder::new().prefix("tabularium-test-up-").tempdir_in("/tmp").unwrap();
    let state = directory.path().join("state");
    let mut child = up(&state);
    let (code, output) = run(&state, &["up", "--base-port", "0"]);
    assert_eq!(code, 1);
    assert!(text(&output.stderr).contains("already running"), "{}", text(&output.stderr));
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert_nothing_runs(&state);
}

#[test]
fn a_process_that_dies_is_started_again() {
    let directory = tempfile::Builder::new().prefix("tabularium-test-up-").tempdir_in("/tmp").unwrap();
    let state = directory.path().join("state");
    let mut child = up(&state);
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(state.join("cluster.json")).unwrap()).unwrap();
    let processes = record["sites"][0]["processes"].as_array().unwrap();
    let node = processes.iter().find(|process| process["kind"] == "node").unwrap();
    let node = Pid::from_raw(i32::try_from(node["pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(node, Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut said = String::new();
    let mut lines = BufReader::new(child.0.stderr.take().unwrap());
    while !said.contains("home/node-1 runs again") {
        assert!(Instant::now() < deadline && lines.read_line(&mut said).unwrap() > 0, "{said}");
    }
    assert_eq!(run(&state, &["dial-nodes"]).0, 0);
    signal(&child, Signal::INT);
    drop(lines);
    assert!(child.0.wait().unwrap().success());
    assert_nothing_runs(&state);
}

#[test]
fn the_database_is_reached_through_the_coordinators_program() {
    let directory = tempfile::Builder::new().prefix("tabularium-test-up-").tempdir_in("/tmp").unwrap();
    let state = directory.path().join("state");
    let mut child = up(&state);
    let (code, output) = run(&state, &["sql-migrate"]);
    assert_eq!(code, 0, "{}", text(&output.stderr));
    let (code, output) = run(&state, &["sql-ping"]);
    assert_eq!(code, 0, "{}", text(&output.stderr));
    signal(&child, Signal::INT);
    assert!(child.0.wait().unwrap().success());
    let config = state.join("home/coordinator-1/config.toml");
    let (code, _) = run(&state, &["sql-ping", "--config", config.to_str().unwrap()]);
    assert_eq!(code, 69, "nobody answers any more");
}
