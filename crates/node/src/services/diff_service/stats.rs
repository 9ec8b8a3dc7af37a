//! DiffStats: lines added and removed for each file.

use std::sync::Arc;

use tabularium_proto::gitaly::{DiffStats, DiffStatsRequest, DiffStatsResponse};
use tonic::{Response, Status};

use super::{check_arguments, check_sides, commits::DiffError, diff_command};
use crate::{
    error::GitError,
    git::{
        GitCommand,
        diff::numstat::{NumStat, Parser},
        lines::Lines,
    },
    node::Node,
    services::{listing, streams::ResponseStream},
};

/// Files in one message.
const STATS_PER_MESSAGE: usize = 1000;

/// `git diff --numstat -z` that is running.
pub(super) struct NumStats {
    records: Lines,
    parser: Parser,
}

impl NumStats {
    pub(super) async fn start(command: GitCommand) -> Result<Self, GitError> {
        Ok(Self { records: Lines::start(command, "diff", 0).await?, parser: Parser::default() })
    }

    /// The next file; `None` behind the last.
    pub(super) async fn next(&mut self) -> Result<Option<NumStat>, DiffError> {
        while let Some(record) = self.records.next().await? {
            if let Some(stat) = self.parser.record(&record)? {
                return Ok(Some(stat));
            }
        }
        self.parser.finish()?;
        Ok(None)
    }

    pub(super) async fn finish(self) -> Result<(), DiffError> {
        let (exit, _) = self.records.finish().await?;
        if exit.success() { Ok(()) } else { Err(DiffError::Exit(exit)) }
    }
}

pub(super) fn diff_stats(
    node: &Arc<Node>,
    request: DiffStatsRequest,
) -> Result<Response<ResponseStream<DiffStatsResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (left, right) = (request.left_commit_id, request.right_commit_id);
    check_sides(&left, &right)?;
    check_arguments("cmd", [left.as_bytes(), right.as_bytes()])?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "DiffStats", |messages| async move {
        let command = diff_command(&node, &repository).args(["--numstat", "-z"]);
        let command = command.args(["--end-of-options", &left, &right, "--"]);
        let mut counted = NumStats::start(command).await?;
        let mut stats = Vec::new();
        while let Some(stat) = counted.next().await.map_err(|error| error.status(""))? {
            stats.push(DiffStats {
                path: stat.path,
                additions: stat.added,
                deletions: stat.removed,
                old_path: stat.old_path.unwrap_or_default(),
            });
            if stats.len() >= STATS_PER_MESSAGE {
                messages.send(DiffStatsResponse { stats: std::mem::take(&mut stats) }).await?;
            }
        }
        counted.finish().await.map_err(|error| error.status(""))?;
        if stats.is_empty() { Ok(()) } else { messages.send(DiffStatsResponse { stats }).await }
    }))
}
