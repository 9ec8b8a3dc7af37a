//! Counting what changed: CommitStats, CountDivergingCommits.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use tabularium_proto::gitaly::{
    CommitStatsRequest, CommitStatsResponse, CountDivergingCommitsRequest, CountDivergingCommitsResponse,
};
use tonic::{Response, Status};

use super::invalid;
use crate::{
    git::{
        catfile::CatFile,
        diff::{Malformed, numstat::Parser},
        lines::Lines,
        revision,
    },
    node::Node,
};

pub(super) async fn commit_stats(
    node: &Node,
    request: CommitStatsRequest,
) -> Result<Response<CommitStatsResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    let mut objects = CatFile::start(&node.git, &repository).await?;
    let commit = objects.commit(&request.revision).await?;
    let hash = objects.hash();
    objects.close().await?;
    let commit = commit.ok_or_else(|| Status::internal("object not found"))?;
    let parent = commit.parent_ids.first().map_or(hash.empty_tree(), String::as_str);
    let command = node.git.command(&repository, "diff").args(["--no-ext-diff", "--no-textconv"]);
    let command = command.args(["--numstat", "-z", parent, &commit.id, "--"]);
    let mut records = Lines::start(command, "diff", 0).await?;
    let mut response = CommitStatsResponse { oid: commit.id, ..CommitStatsResponse::default() };
    let mut parser = Parser::default();
    let malformed = |error: Malformed| Status::internal(error.to_string());
    while let Some(record) = records.next().await? {
        if let Some(stat) = parser.record(&record).map_err(malformed)? {
            response.additions = response.additions.saturating_add(stat.added);
            response.deletions = response.deletions.saturating_add(stat.removed);
            response.files = response.files.saturating_add(1);
        }
    }
    parser.finish().map_err(malformed)?;
    let (exit, _) = records.finish().await?;
    if exit.success() { Ok(Response::new(response)) } else { Err(Status::internal(exit.to_string())) }
}

pub(super) async fn count_diverging_commits(
    node: &Node,
    request: CountDivergingCommitsRequest,
) -> Result<Response<CountDivergingCommitsResponse>, Status> {
    if request.from.is_empty() || request.to.is_empty() {
        return Err(Status::invalid_argument("from and to are both required"));
    }
    let repository = node.storages.open(request.repository.as_ref())?;
    let range = [request.from.as_slice(), b"...", &request.to].concat();
    if range.starts_with(b"-") {
        let text = "git rev-list cmd: validating positional argument: revision can't start with '-'";
        return Err(Status::invalid_argument(text));
    }
    let mut command = node.git.command(&repository, "rev-list").reads().args(["--count", "--left-right"]);
    if request.max_count != 0 {
        command = command.arg(format!("--max-count={}", request.max_count));
    }
    let output = command.arg("--end-of-options").arg(OsStr::from_bytes(&range)).arg("--").output().await?;
    if !output.exit.success() {
        // Word for word, the missing letter included.
        return Err(Status::internal(format!("gi rev-list error: {}", output.exit)));
    }
    let (left_count, right_count) = parse_counts(&output.stdout).ok_or_else(|| {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        Status::internal(format!("invalid output from git rev-list --left-right: {printed}"))
    })?;
    Ok(Response::new(CountDivergingCommitsResponse { left_count, right_count }))
}

fn parse_counts(output: &[u8]) -> Option<(i32, i32)> {
    let mut words = std::str::from_utf8(output).ok()?.split_ascii_whitespace();
    let counts = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(parse_counts(b"3\t12\n"), Some((3, 12)));
        for bad in [&b""[..], b"1", b"1 2 3", b"a b", b"\xff"] {
            assert_eq!(parse_counts(bad), None);
        }
    }
}
