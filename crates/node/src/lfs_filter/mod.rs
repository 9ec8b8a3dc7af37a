//! Git LFS in archives: a file that stands for one that is kept elsewhere is replaced by that one.
//!
//! Git asks a filter about each file whose `.gitattributes` name it: [`run`], the subcommand `tabularium-node lfs-filter`,
//! which only carries what git says to a socket of the node that started git, and back. The node's side, [`Filter`], lives
//! as long as the archive is made; it speaks the filter's protocol ([`conversation`]) and fetches files from GitLab
//! ([`crate::access`]). What GitLab does not give stays as it is in the repository.

mod conversation;

use std::{env, io, path::Path, sync::Arc};

use tabularium_common::lifecycle::Tasks;
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt as _,
    net::{UnixListener, UnixStream},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{fetch_proxy::pipes, git::GitCommand, hooks::Judges, peer::quoted};

/// The socket that the subcommand connects to.
const SOCKET: &str = "TABULARIUM_LFS_SOCKET";
/// The exit code of a filter that could not reach the node.
const FAILED: u8 = 1;

/// What git passes to a filter: nothing.
#[derive(Debug, clap::Args)]
pub struct Arguments {}

/// Carries one conversation and answers the exit code, with which the process must end at once.
#[expect(clippy::print_stderr, reason = "git shows it to the node")]
pub async fn run(_arguments: &Arguments) -> u8 {
    match carry().await {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("lfs-filter: {error}");
            FAILED
        }
    }
}

async fn carry() -> io::Result<()> {
    let socket = env::var_os(SOCKET).ok_or_else(|| io::Error::other(format!("{SOCKET} is not set")))?;
    let (mut from_node, mut to_node) = UnixStream::connect(socket).await?.into_split();
    let (mut stdin, mut stdout) = (pipes::stdin(), pipes::stdout());
    let asking = async {
        tokio::io::copy(&mut stdin, &mut to_node).await?;
        to_node.shutdown().await
    };
    let answering = async {
        tokio::io::copy(&mut from_node, &mut stdout).await?;
        stdout.flush().await
    };
    // The node ends the conversation: when it has heard the end, or does not want to hear more.
    let mut answering = std::pin::pin!(answering);
    tokio::select! {
        ended = &mut answering => return ended,
        asked = asking => asked?,
    }
    answering.await
}

/// The node's side of the filters of one archive. Dropping it ends them.
pub(crate) struct Filter {
    /// Only this user can enter it.
    directory: TempDir,
    _ends: DropGuard,
}

impl Filter {
    /// For archives of the repository that GitLab knows by this name.
    pub(crate) fn start(tasks: &Tasks, judges: &Arc<Judges>, gl_repository: String) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("tabularium-lfs-").tempdir()?;
        let listener = UnixListener::bind(directory.path().join("socket"))?;
        let ends = CancellationToken::new();
        let (over, stopping, judges) = (ends.clone(), tasks.stopping(), Arc::clone(judges));
        tasks.spawn("LFS filter", async move {
            let served = async {
                // Git starts one filter for each archive.
                while let Ok((stream, _)) = listener.accept().await {
                    let (from, to) = stream.into_split();
                    if let Err(error) = conversation::hold(from, to, &judges.access, &gl_repository).await {
                        tracing::warn!(%error, "LFS filter");
                    }
                }
            };
            stopping.run_until_cancelled(over.run_until_cancelled(served)).await;
        });
        Ok(Self { directory, _ends: ends.drop_guard() })
    }

    /// The command, whose files go through the filter; `program` is the node's own.
    pub(crate) fn attach(&self, command: GitCommand, program: &Path) -> GitCommand {
        command
            .config(format!("filter.lfs.process={} lfs-filter", quoted(program)))
            .config("filter.lfs.required=false")
            .env(SOCKET, self.directory.path().join("socket"))
    }
}
