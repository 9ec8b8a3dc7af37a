//! SearchFilesByContent and SearchFilesByName.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use regex::bytes::{Regex, RegexBuilder};
use tabularium_proto::gitaly::{
    SearchFilesByContentRequest, SearchFilesByContentResponse, SearchFilesByNameRequest,
    SearchFilesByNameResponse,
};
use tonic::{Response, Status};

use crate::{
    git::{CHUNK_BYTES, lines::Lines},
    node::Node,
    services::{
        listing::{self, FLUSH_BYTES, Messages},
        streams::ResponseStream,
    },
};

/// Longest filter.
const MAX_FILTER_BYTES: usize = 1000;
/// Most memory that a compiled filter takes.
const MAX_FILTER_MEMORY: usize = 4 * 1024 * 1024;
/// What stands between matches.
const SEPARATOR: &[u8] = b"--\n";

fn check(query: &str, reference: &[u8]) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    if query.is_empty() {
        return refuse("no query given");
    }
    if reference.is_empty() {
        return refuse("no ref given");
    }
    if reference.starts_with(b"-") {
        return refuse("invalid ref argument");
    }
    Ok(())
}

/// A match is sent as it is found.
struct Matches {
    messages: Messages<SearchFilesByContentResponse>,
    data: Vec<u8>,
    open: bool,
}

impl Matches {
    async fn add(&mut self, piece: &[u8]) -> Result<(), Status> {
        self.open = true;
        self.data.extend_from_slice(piece);
        while self.data.len() >= CHUNK_BYTES {
            let rest = self.data.split_off(CHUNK_BYTES);
            let match_data = std::mem::replace(&mut self.data, rest);
            self.messages.send(SearchFilesByContentResponse { match_data, end_of_match: false }).await?;
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<(), Status> {
        self.open = false;
        let match_data = std::mem::take(&mut self.data);
        if !match_data.is_empty() {
            self.messages.send(SearchFilesByContentResponse { match_data, end_of_match: false }).await?;
        }
        let match_data = Vec::new();
        self.messages.send(SearchFilesByContentResponse { match_data, end_of_match: true }).await
    }
}

pub(super) fn by_content(
    node: &Arc<Node>,
    request: SearchFilesByContentRequest,
) -> Result<Response<ResponseStream<SearchFilesByContentResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check(&request.query, &request.r#ref)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "SearchFilesByContent", |messages| async move {
        let command = node.git.command(&repository, "grep");
        let command = command.args(["--ignore-case", "-I", "--line-number", "--null", "--no-textconv"]);
        let command = command.args(["--before-context=2", "--after-context=2", "--perl-regexp", "-e"]);
        let command = command.arg(&request.query).arg(OsStr::from_bytes(&request.r#ref)).arg("--");
        let mut lines = Lines::start(command, "grep", b'\n').await?;
        let mut matches = Matches { messages, data: Vec::new(), open: false };
        let mut piece = Vec::new();
        while let Some(begins) = lines.piece(&mut piece).await? {
            if begins && piece == SEPARATOR {
                matches.end().await?;
            } else {
                matches.add(&piece).await?;
            }
        }
        // To Gitaly's clients a reference that does not exist, and a query that is none, match nothing.
        lines.finish().await?;
        if matches.open { matches.end().await } else { Ok(()) }
    }))
}

fn filter(text: &str) -> Result<Option<Regex>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    if text.len() > MAX_FILTER_BYTES {
        return Err(Status::invalid_argument("filter exceeds maximum length"));
    }
    let compiled = RegexBuilder::new(text).size_limit(MAX_FILTER_MEMORY).build();
    compiled.map(Some).map_err(|error| {
        Status::invalid_argument(format!("filter did not compile: error parsing regexp: {error}"))
    })
}

pub(super) fn by_name(
    node: &Arc<Node>,
    request: SearchFilesByNameRequest,
) -> Result<Response<ResponseStream<SearchFilesByNameResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check(&request.query, &request.r#ref)?;
    let filter = filter(&request.filter)?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "SearchFilesByName", |messages| async move {
        let command = node.git.command(&repository, "ls-tree");
        let command = command.args(["--full-tree", "--name-only", "-r", "-z", "--end-of-options"]);
        let command = command.arg(OsStr::from_bytes(&request.r#ref)).arg("--").arg(&request.query);
        let mut paths = Lines::start(command, "ls-tree", 0).await?;
        let (mut files, mut bytes) = (Vec::new(), 0);
        let (mut skip, mut left) = (request.offset, (request.limit > 0).then_some(request.limit));
        while let Some(path) = paths.next().await? {
            if filter.as_ref().is_some_and(|filter| !filter.is_match(&path)) {
                continue;
            }
            if skip > 0 {
                skip -= 1;
                continue;
            }
            bytes += path.len() + 8;
            files.push(path);
            left = left.map(|left| left - 1);
            if left == Some(0) {
                break;
            }
            if bytes >= FLUSH_BYTES {
                bytes = 0;
                messages.send(SearchFilesByNameResponse { files: std::mem::take(&mut files) }).await?;
            }
        }
        // A reference that does not exist has no files. There is a message in any case.
        messages.send(SearchFilesByNameResponse { files }).await
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters() {
        assert!(filter("").unwrap().is_none());
        assert!(filter(r"(?i)\.rb$").unwrap().unwrap().is_match(b"\xff.RB"));
        for (bad, text) in
            [("a".repeat(1001), "filter exceeds maximum length"), ("+".into(), "filter did not compile: ")]
        {
            let status = filter(&bad).unwrap_err();
            assert!(status.message().starts_with(text), "{status:?}");
        }
        assert!(filter("((a{1000}){1000}){1000}").is_err(), "too large when it is compiled");
    }
}
