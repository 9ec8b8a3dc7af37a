//! RangeDiff and RawRangeDiff: how one series of commits became another.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    RangeDiffRequest, RangeDiffResponse, RawRangeDiffRequest, RawRangeDiffResponse, range_diff_request,
    range_diff_response::Comparator, raw_range_diff_request,
};
use tonic::{Response, Status};

use super::{check_arguments, commits::whole_ids, pieces, refused};
use crate::{
    git::{
        Exit, GitCommand,
        diff::range::{Comparison, Pair, Parser},
        lines::Lines,
        revision::ObjectHash,
    },
    node::Node,
    services::{
        listing::{self, Messages},
        streams::{self, ResponseStream},
    },
    storage::RepositoryPath,
};

/// The series, by what the request names them, and what git is told.
struct Series {
    named: Vec<(&'static str, String)>,
    symmetric: bool,
}

impl Series {
    fn new(symmetric: bool, named: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        Self { named: named.into_iter().collect(), symmetric }
    }

    /// Names that are missing are told of in this order.
    fn arguments(self, order: &[&str]) -> Result<Vec<String>, Status> {
        for wanted in order {
            if self.named.iter().any(|(name, value)| name == wanted && value.is_empty()) {
                return Err(Status::invalid_argument(format!("empty {wanted}")));
            }
        }
        let values: Vec<String> = self.named.into_iter().map(|(_, value)| value).collect();
        let arguments = if self.symmetric { vec![values.join("...")] } else { values };
        check_arguments("cmd", arguments.iter().map(String::as_bytes))?;
        Ok(arguments)
    }
}

const ORDER: [&str; 5] = ["Range1", "Range2", "Rev1", "Rev2", "Base"];

macro_rules! series {
    ($spec:expr, $module:ident) => {
        match $spec {
            Some($module::RangeSpec::RangePair(pair)) => {
                Series::new(false, [("Range1", pair.range1), ("Range2", pair.range2)])
            }
            Some($module::RangeSpec::RevisionRange(range)) => {
                Series::new(true, [("Rev1", range.rev1), ("Rev2", range.rev2)])
            }
            Some($module::RangeSpec::BaseWithRevisions(base)) => {
                Series::new(false, [("Base", base.base), ("Rev1", base.rev1), ("Rev2", base.rev2)])
            }
            None => Series::new(false, []),
        }
    };
}

async fn command(
    node: &Node,
    repository: &RepositoryPath,
    arguments: &[String],
) -> Result<GitCommand, Status> {
    let hash = ObjectHash::of(repository).await?;
    let command = node.git.command(repository, "range-diff").reads().arg(whole_ids(hash));
    // It does not know `--end-of-options`; nothing here begins with a dash.
    Ok(command.args(["--no-ext-diff", "--no-textconv", "--no-color"]).args(arguments))
}

pub(super) fn range_diff(
    node: &Arc<Node>,
    request: RangeDiffRequest,
) -> Result<Response<ResponseStream<RangeDiffResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let arguments = series!(request.range_spec, range_diff_request).arguments(&ORDER)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "RangeDiff", |messages| async move {
        let command = command(&node, &repository, &arguments).await?;
        let mut lines = Lines::start(command, "range-diff", b'\n').await?;
        let mut parser = Parser::default();
        while let Some(line) = lines.next().await? {
            let complete = parser.line(&line);
            let complete =
                complete.map_err(|error| Status::internal(format!("RangeDiff: parse failure: {error}")))?;
            if let Some(pair) = complete {
                send(&messages, pair).await?;
            }
        }
        if let Some(pair) = parser.finish() {
            send(&messages, pair).await?;
        }
        let (exit, _) = lines.finish().await?;
        if exit.success() { Ok(()) } else { Err(refused("RangeDiff: ", exit)) }
    }))
}

async fn send(messages: &Messages<RangeDiffResponse>, pair: Pair) -> Result<(), Status> {
    let comparison = match pair.comparison {
        Comparison::Equal => Comparator::EqualUnspecified,
        Comparison::Added => Comparator::GreaterThan,
        Comparison::Removed => Comparator::LessThan,
        Comparison::Different => Comparator::NotEqual,
    };
    let mut message = RangeDiffResponse {
        from_commit_id: pair.from,
        to_commit_id: pair.to,
        comparison: comparison.into(),
        commit_message_title: String::from_utf8_lossy(&pair.title).into_owned(),
        ..RangeDiffResponse::default()
    };
    for (piece, last) in pieces(&pair.patch) {
        message.patch_data = piece.to_vec();
        message.end_of_patch = last;
        messages.send(std::mem::take(&mut message)).await?;
    }
    Ok(())
}

pub(super) async fn raw_range_diff(
    node: &Node,
    request: RawRangeDiffRequest,
) -> Result<Response<ResponseStream<RawRangeDiffResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let arguments = series!(request.range_spec, raw_range_diff_request).arguments(&ORDER)?;
    let process = command(node, &repository, &arguments).await?.spawn(false).await?;
    let ended = |exit: Exit, _: Vec<u8>| {
        if exit.success() { Ok(Vec::new()) } else { Err(Status::internal(exit.to_string())) }
    };
    let wrap = |data: bytes::Bytes| RawRangeDiffResponse { data: data.to_vec() };
    Ok(Response::new(streams::relay(Vec::new(), process, None, wrap, ended)))
}
