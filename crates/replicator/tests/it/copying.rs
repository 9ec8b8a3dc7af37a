//! Copies in rounds, and the lease they are held under.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use tabularium_common::duties::Class;
use tabularium_proto::coordinator::{
    DutyDone, DutyFailed, ReplicateWork, finish_duty_request::Outcome, finish_duty_response::Disposition,
    start_duty_response::Work,
};
use tonic::Status;

use crate::{
    duties::PATH,
    support::{World, until},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tabularium-replicator");

impl World {
    fn round(&self, attempt: i64, change: impl FnOnce(&mut ReplicateWork)) -> ReplicateWork {
        let Work::Replicate(mut work) = self.copy() else { unreachable!() };
        work.attempt = attempt;
        work.lease_milliseconds = 60_000;
        change(&mut work);
        work
    }

    async fn failed(&self) -> DutyFailed {
        match self.coordinator.outcome().await {
            Outcome::Failed(failed) => failed,
            Outcome::Succeeded(succeeded) => panic!("{succeeded:?}"),
        }
    }
}

fn attempts(world: &World) -> Vec<String> {
    world.node.with(|state| {
        let copies = state.writes.iter().filter(|(method, _)| *method == "replicate");
        copies
            .map(|(_, metadata)| {
                metadata.get("tabularium-copy-attempt").unwrap().to_str().unwrap().to_owned()
            })
            .collect()
    })
}

#[tokio::test]
async fn rounds_follow_each_other_until_the_coordinator_has_enough() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    let second = world.round(8, |work| work.generation = 43);
    let last = world.round(11, |work| {
        work.generation = 44;
        work.under_ticket = true;
        work.deadline_milliseconds = 5000;
    });
    world.coordinator.with(|state| {
        state.dispositions.extend([
            Disposition::AnotherRound(second),
            Disposition::AnotherRound(last),
            Disposition::Done(DutyDone {}),
        ]);
    });
    world.owe_work(Work::Replicate(world.round(7, |_| {}))).await;
    let replicator = world.replicator().await;
    world.settled(Class::Replication).await;
    assert_eq!(attempts(&world), ["7", "8", "11"]);
    let (started, reported, reached) = world.coordinator.with(|state| {
        let reached = state.finished.iter().map(|outcome| match outcome {
            Outcome::Succeeded(succeeded) => succeeded.reached,
            Outcome::Failed(failed) => panic!("{failed:?}"),
        });
        (state.started.len(), state.attempts.clone(), reached.collect::<Vec<_>>())
    });
    assert_eq!((started, reported, reached), (1, vec![7, 8, 11], vec![42, 43, 44]));
    replicator.stop().await;
}

#[tokio::test]
async fn a_round_that_is_over_its_time_is_given_up() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    world.node.copy_gate.forget_permits(usize::MAX);
    world
        .owe_work(Work::Replicate(world.round(7, |work| {
            work.under_ticket = true;
            work.deadline_milliseconds = 300;
        })))
        .await;
    let replicator = world.replicator().await;
    let failed = world.failed().await;
    assert!(failed.unreachable && !failed.bad_source, "{failed:?}");
    assert!(failed.message.contains("300 ms"), "{failed:?}");
    replicator.stop().await;
}

#[tokio::test]
async fn a_long_copy_is_kept_by_renewals_and_given_up_when_it_is_taken_away() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    world.node.copy_gate.forget_permits(usize::MAX);
    world.owe_work(Work::Replicate(world.round(7, |work| work.lease_milliseconds = 600))).await;
    let replicator = world.replicator().await;
    until("it is kept for longer than one lease", || async {
        world.coordinator.with(|state| state.renewals) >= 6
    })
    .await;
    assert_eq!(world.bus.messages(Class::Replication).await, 1);
    world.coordinator.with(|state| state.taken_away = true);
    world.settled(Class::Replication).await;
    assert!(world.coordinator.with(|state| state.finished.is_empty()), "it is not ours to report about");
    world.node.copy_gate.add_permits(1);
    replicator.stop().await;
}

#[tokio::test]
async fn a_copy_that_cannot_be_renewed_ends_with_its_lease() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    world.node.copy_gate.forget_permits(usize::MAX);
    world.coordinator.with(|state| state.renewals_down = true);
    world.owe_work(Work::Replicate(world.round(7, |work| work.lease_milliseconds = 500))).await;
    let replicator = world.replicator().await;
    world.settled(Class::Replication).await;
    assert_eq!(world.coordinator.with(|state| (state.renewals, state.finished.len())), (0, 0));
    replicator.stop().await;
}

/// All threads of a process are stopped.
fn stands_still(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
    })
}

#[tokio::test]
async fn a_worker_that_was_stopped_asks_no_node_for_anything_when_it_goes_on() {
    const LEASE: Duration = Duration::from_millis(1500);
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    // It waits for the source's checksum, after which it would copy.
    world.node.checksum_gate.forget_permits(usize::MAX);
    let lease = u32::try_from(LEASE.as_millis()).unwrap();
    world.owe_work(Work::Replicate(world.round(7, |work| work.lease_milliseconds = lease))).await;
    let config = world.directory().join("replicator.toml");
    std::fs::write(&config, world.config_text()).unwrap();
    let mut child = Command::new(PROGRAM).arg("--config").arg(&config).stderr(Stdio::null()).spawn().unwrap();
    let signal = |name: &str, pid: u32| {
        assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
    };
    let pid = child.id();
    until("it asks for the checksum", || async { world.node.with(|state| state.checksums) == 1 }).await;
    signal("-STOP", pid);
    // Each thread stops when it is its turn to run.
    until("it stands still", || async { stands_still(pid) }).await;
    let stopped = std::time::Instant::now();
    // The answer lies ready when it wakes up, and it has had no chance to see the time pass.
    world.node.checksum_gate.add_permits(1000);
    until("its lease is over", || async { stopped.elapsed() > LEASE * 2 }).await;
    signal("-CONT", pid);
    world.settled(Class::Replication).await;
    assert!(world.node.methods().is_empty(), "{:?}", world.node.methods());
    assert!(world.coordinator.with(|state| state.finished.is_empty()));
    signal("-TERM", pid);
    let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn a_source_that_lags_behind_the_witness_is_not_copied_from() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[]);
    world.node.put("node-3", PATH, &[("refs/heads/main", "11")]);
    let witness = Some(world.storage("node-3"));
    world.owe_work(Work::Replicate(world.round(7, |work| work.witness = witness))).await;
    let replicator = world.replicator().await;
    let failed = world.failed().await;
    assert!(failed.bad_source && !failed.unreachable, "{failed:?}");
    assert!(failed.message.contains("node-1") && failed.message.contains("node-3"), "{failed:?}");
    assert!(world.node.methods().is_empty(), "nothing was copied");
    replicator.stop().await;
}

#[tokio::test]
async fn a_source_that_is_written_to_is_no_bad_one() {
    let world = World::new().await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
    world.node.put("node-3", PATH, &[("refs/heads/main", "12")]);
    let witness = Some(world.storage("node-3"));
    world.owe_work(Work::Replicate(world.round(7, |work| work.witness = witness))).await;
    let replicator = world.replicator().await;
    until("both are compared", || async { world.node.with(|state| state.checksums) >= 2 }).await;
    world.node.put("node-1", PATH, &[("refs/heads/main", "12")]);
    world.settled(Class::Replication).await;
    assert!(matches!(world.coordinator.outcome().await, Outcome::Succeeded(_)));
    replicator.stop().await;
}

#[tokio::test]
async fn a_source_that_is_gone_or_lacks_objects_is_bad_and_one_that_is_odd_is_not() {
    for (there, fsck, bad) in [
        (false, "", true),
        (true, "missing blob 1111111111111111111111111111111111111111\n", true),
        (true, "error in commit 11: missingSpaceBeforeDate: invalid author line\n", false),
    ] {
        let world = World::new().await;
        if there {
            world.node.put("node-1", PATH, &[("refs/heads/main", "11")]);
        }
        world.node.with(|state| {
            state.copy_failure = Some(Status::internal("fetch internal remote: exit status 128"));
            state.fsck = fsck.to_owned();
        });
        world.owe_work(Work::Replicate(world.round(7, |_| {}))).await;
        let replicator = world.replicator().await;
        let failed = world.failed().await;
        assert_eq!((failed.bad_source, failed.unreachable), (bad, false), "{failed:?}");
        replicator.stop().await;
    }
}
