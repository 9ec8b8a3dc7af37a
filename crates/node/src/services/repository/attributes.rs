//! What `.gitattributes` say of files.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, sync::Arc};

use tabularium_proto::gitaly::{
    GetFileAttributesRequest, GetFileAttributesResponse, GetInfoAttributesRequest, GetInfoAttributesResponse,
    get_file_attributes_response::AttributeInfo,
};
use tonic::{Response, Status};

use crate::{
    git::{catfile::CatFile, catfile::ObjectKind, revision},
    node::Node,
    services::{listing, streams::ResponseStream},
};

/// The value of an attribute that nothing is said of.
const UNSPECIFIED: &[u8] = b"unspecified";

pub(super) async fn of_files(
    node: &Node,
    request: GetFileAttributesRequest,
) -> Result<GetFileAttributesResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    for (missing, text) in [
        (request.revision.is_empty(), "revision is required"),
        (request.paths.is_empty(), "file paths are required"),
        (request.attributes.is_empty(), "attributes are required"),
    ] {
        if missing {
            return Err(Status::invalid_argument(text));
        }
    }
    for name in &request.attributes {
        revision::check_argument(name.as_bytes())
            .map_err(|error| Status::internal(format!("check attr: start check-attr command: {error}")))?;
    }
    if request.paths.iter().any(|path| path.contains('\0')) {
        return Err(Status::internal("check attr: path with NUL byte not allowed"));
    }
    let command = node.git.command(&repository, "check-attr").reads();
    let command = command.args(["--stdin", "-z", "--source"]).arg(OsStr::from_bytes(&request.revision));
    let command = command.args(&request.attributes);
    let mut input = request.paths.join("\0");
    input.push('\0');
    let output = command.output_with(input).await?;
    if !output.exit.success() {
        return Err(Status::internal("check attr: read line: EOF"));
    }
    Ok(GetFileAttributesResponse { attribute_infos: parse(&output.stdout) })
}

/// Path, attribute and value, again and again.
fn parse(output: &[u8]) -> Vec<AttributeInfo> {
    let words: Vec<&[u8]> = output.split(|byte| *byte == 0).collect();
    let text = |word: &[u8]| String::from_utf8_lossy(word).into_owned();
    let said = |words: &[&[u8]]| match words {
        [path, attribute, value] if *value != UNSPECIFIED => {
            Some(AttributeInfo { path: text(path), attribute: text(attribute), value: text(value) })
        }
        _ => None,
    };
    words.chunks_exact(3).filter_map(said).collect()
}

/// `.gitattributes` of the default branch, which stood in `info/attributes` once.
pub(super) fn of_head(
    node: &Arc<Node>,
    request: &GetInfoAttributesRequest,
) -> Result<Response<ResponseStream<GetInfoAttributesResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), "GetInfoAttributes", |messages| async move {
        let mut objects = CatFile::start(&node.git, &repository).await?;
        let found = objects.open(b"HEAD:.gitattributes").await?;
        let mut empty = true;
        if found.is_some_and(|info| info.kind == ObjectKind::Blob) {
            while let Some(piece) = objects.chunk().await? {
                empty = false;
                messages.send(GetInfoAttributesResponse { attributes: piece.to_vec() }).await?;
            }
        }
        objects.close().await?;
        if empty { messages.send(GetInfoAttributesResponse::default()).await } else { Ok(()) }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_and_what_is_not() {
        let found = parse(b"a b\0text\0set\0a b\0diff\0unspecified\0c\0text\0unset\0");
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].path.as_str(), found[0].value.as_str()), ("a b", "set"));
        assert_eq!((found[1].path.as_str(), found[1].value.as_str()), ("c", "unset"));
        assert_eq!(parse(b""), []);
    }
}
