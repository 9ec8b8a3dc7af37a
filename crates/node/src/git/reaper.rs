//! The end of git processes that nobody waits for any more.

use std::{sync::Arc, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use tabularium_common::lifecycle::Tasks;
use tokio::{
    process::{Child, ChildStdout},
    task::JoinHandle,
    time::timeout,
};

use super::{
    Slot,
    leftovers::{Ended, WriterGuard},
};
use crate::{hooks::Session, keyed_locks::KeyedLock, metrics::Metrics};

/// Between SIGTERM and SIGKILL.
const TERMINATE_GRACE: Duration = Duration::from_secs(3);
/// How long a process that did not end well counts as writing after it was reaped. Longer than the coarsest file time
/// stamp, so that what it left can be told from what a later process makes.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a process that moves references may go on with that when nobody wants it any more.
const APPLY_GRACE: Duration = Duration::from_secs(60);

/// A process, and what it holds as long as it runs.
pub(super) struct Running {
    pub(super) child: Child,
    pub(super) slot: Slot,
    pub(super) writer: Option<WriterGuard>,
    pub(super) session: Option<Arc<Session>>,
    pub(super) _lock: Option<Arc<KeyedLock>>,
}

impl Running {
    /// Ends the process and everything it has started, in the background.
    pub(super) fn kill(
        mut self,
        tasks: &Tasks,
        metrics: Metrics,
        stdout: Option<ChildStdout>,
        stderr: Option<JoinHandle<Vec<u8>>>,
    ) {
        let at_once = self.session.as_ref().is_none_or(|session| session.may_be_killed());
        if at_once {
            self.terminate();
        }
        // Without a runtime the process ends: then `kill_on_drop` has to do.
        if tokio::runtime::Handle::try_current().is_ok() {
            tasks.spawn("git reaper", async move {
                if !at_once {
                    self.let_it_apply().await;
                }
                // Closed before that, it would end a process that writes.
                drop(stdout);
                self.reap(&metrics, stderr).await;
            });
        }
    }

    fn group(&self) -> Option<Pid> {
        self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
    }

    fn terminate(&self) {
        if let Some(group) = self.group() {
            signal(group, Signal::TERM);
        }
    }

    /// References that it was told to move are moved, all of them, before it is told to end.
    async fn let_it_apply(&mut self) {
        if let Some(session) = self.session.clone() {
            let applied = async {
                tokio::select! {
                    () = session.until_it_may_be_killed() => {}
                    // Then there is nothing left to wait for; how it ended is looked at below.
                    _ = self.child.wait() => {}
                }
            };
            if timeout(APPLY_GRACE, applied).await.is_err() {
                tracing::error!("references are still being moved; git is stopped in the midst of it");
            }
        }
        self.terminate();
    }

    async fn reap(mut self, metrics: &Metrics, stderr: Option<JoinHandle<Vec<u8>>>) {
        let group = self.group();
        let ended = timeout(TERMINATE_GRACE, self.child.wait()).await;
        // Also after a polite end: the leader may have left children behind.
        if let Some(group) = group {
            signal(group, Signal::KILL);
        }
        let ended = match ended {
            Ok(ended) => ended,
            Err(_) => self.child.wait().await,
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "a killed git process could not be reaped");
        }
        if let Some(stderr) = stderr {
            stderr.abort();
        }
        metrics.git_ended();
        if let Some(writer) = self.writer.take() {
            settle(writer, Ended::Killed).await;
        }
        drop(self.slot);
    }

    /// The process has died of itself, of a full disk say: what it left is removed in the background.
    pub(super) fn died(mut self, tasks: &Tasks) {
        if let Some(writer) = self.writer.take() {
            tasks.spawn("git sweeper", settle(writer, Ended::Died));
        }
    }
}

async fn settle(writer: WriterGuard, ended: Ended) {
    tokio::time::sleep(SETTLE).await;
    writer.ended(ended).await;
}

fn signal(group: Pid, signal: Signal) {
    match kill_process_group(group, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::warn!(%error, "a git process group could not be signalled"),
    }
}
