//! One end of a connection, on a thread and a runtime of its own, so that it can be killed or frozen like a process.

use std::{sync::mpsc, thread::JoinHandle};

use tokio::sync::oneshot;

enum Fate {
    /// Every socket closes, nobody says a word.
    Kill,
    /// Sockets stay open and nothing is polled until the other half is dropped.
    Freeze(mpsc::Receiver<()>),
}

/// A running end. Dropping it kills it.
pub(super) struct Process {
    fate: Option<oneshot::Sender<Fate>>,
    frozen: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Process {
    /// Runs `main`, whose tasks go on when it has returned.
    pub(super) async fn start<F, T>(main: F) -> (Self, T)
    where
        F: AsyncFnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let (fate, decided) = oneshot::channel();
        let (started, value) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let fate = runtime.block_on(async {
                let _ = started.send(main().await);
                decided.await
            });
            if let Ok(Fate::Freeze(thawed)) = fate {
                let _ = thawed.recv();
            }
            drop(runtime);
        });
        (Self { fate: Some(fate), frozen: None, thread: Some(thread) }, value.await.unwrap())
    }

    pub(super) fn kill(&mut self) {
        let _ = self.fate.take().unwrap().send(Fate::Kill);
        self.thread.take().unwrap().join().unwrap();
    }

    pub(super) fn freeze(&mut self) {
        let (frozen, thawed) = mpsc::channel();
        self.frozen = Some(frozen);
        let _ = self.fate.take().unwrap().send(Fate::Freeze(thawed));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.frozen = None;
        self.fate = None;
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
