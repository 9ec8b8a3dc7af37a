//! What git has told a hook about a push, as the hook passes it on.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use tokio::io::AsyncRead;

use super::{
    read_frame,
    wire::{Frame, VARIABLES},
};
use crate::access::ObjectDirectories;

/// Most bytes of reference updates that are looked at together; some hundred thousand references.
const MAX_CHANGES_BYTES: usize = 64 * 1024 * 1024;
/// Most bytes of push options and the like.
const MAX_VARIABLES_BYTES: usize = 1024 * 1024;

/// What `pre-receive` and `post-receive` are told.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Lines of `<old> <new> <reference>`.
    pub(super) changes: Vec<u8>,
    variables: BTreeMap<String, String>,
}

impl Told {
    /// Reads it to its end; what nobody wants to know is not kept.
    pub(super) async fn read(hook: &mut (impl AsyncRead + Unpin), wanted: bool) -> io::Result<Self> {
        let mut told = Self::default();
        let mut variables = 0;
        loop {
            let (kind, payload) = read_frame(hook).await?;
            match kind {
                Frame::End => return Ok(told),
                Frame::Input | Frame::Variable if !wanted => {}
                Frame::Input => {
                    require_room(told.changes.len() + payload.len(), MAX_CHANGES_BYTES)?;
                    told.changes.extend_from_slice(&payload);
                }
                Frame::Variable => {
                    variables += payload.len();
                    require_room(variables, MAX_VARIABLES_BYTES)?;
                    let payload = String::from_utf8_lossy(&payload);
                    let known = |name: &str| VARIABLES.iter().any(|known| name.starts_with(known));
                    if let Some((name, value)) = payload.split_once('=').filter(|(name, _)| known(name)) {
                        told.variables.insert(name.to_owned(), value.to_owned());
                    }
                }
                Frame::Hello | Frame::Ran | Frame::Run | Frame::Exit | Frame::Say => {
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
        }
    }

    /// The options of the push, in order.
    pub(super) fn push_options(&self) -> Vec<String> {
        let count = self.variables.get("GIT_PUSH_OPTION_COUNT").and_then(|count| count.parse().ok());
        let numbers = 0..count.unwrap_or(0).min(self.variables.len());
        numbers
            .filter_map(|number| self.variables.get(&format!("GIT_PUSH_OPTION_{number}")).cloned())
            .collect()
    }

    /// Where the new objects are until they are accepted.
    pub(super) fn objects(&self, repository: &Path) -> Option<ObjectDirectories> {
        let value = |name| self.variables.get(name).filter(|value| !value.is_empty());
        let directory = value("GIT_OBJECT_DIRECTORY")?;
        let alternates = value("GIT_ALTERNATE_OBJECT_DIRECTORIES")?;
        let alternates: Vec<PathBuf> = alternates.split(':').map(PathBuf::from).collect();
        Some(ObjectDirectories::relative_to(repository, Path::new(directory), &alternates))
    }
}

fn require_room(taken: usize, room: usize) -> io::Result<()> {
    if taken <= room {
        return Ok(());
    }
    Err(io::Error::other(format!("more than {room} bytes of reference updates or push options at once")))
}

#[cfg(test)]
mod tests {
    use super::{super::wire::frame, *};

    async fn told(frames: &[(Frame, &[u8])], wanted: bool) -> io::Result<Told> {
        let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
        Told::read(&mut bytes.as_slice(), wanted).await
    }

    #[tokio::test]
    async fn what_git_says_is_put_together() {
        let frames: [(Frame, &[u8]); 7] = [
            (Frame::Variable, b"GIT_OBJECT_DIRECTORY=/s/a.git/objects/tmp_objdir-incoming-x"),
            (Frame::Variable, b"GIT_ALTERNATE_OBJECT_DIRECTORIES=/s/a.git/objects:/s/b.git/objects"),
            (Frame::Variable, b"GIT_PUSH_OPTION_COUNT=2"),
            (Frame::Variable, b"GIT_PUSH_OPTION_0=a=b"),
            (Frame::Variable, b"GIT_PUSH_OPTION_1="),
            (Frame::Input, b"0 1 refs/heads/a\n0 2 "),
            (Frame::Input, b"refs/heads/b\n"),
        ];
        assert_eq!(told(&frames, true).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let whole = [&frames[..], &[(Frame::End, b"")]].concat();
        let heard = told(&whole, true).await.unwrap();
        assert_eq!(heard.changes, b"0 1 refs/heads/a\n0 2 refs/heads/b\n");
        assert_eq!(heard.push_options(), ["a=b", ""]);
        let objects = heard.objects(Path::new("/s/a.git")).unwrap();
        assert_eq!(objects.directory, "objects/tmp_objdir-incoming-x");
        assert_eq!(objects.alternates, ["objects", "../b.git/objects"]);
        let unheard = told(&whole, false).await.unwrap();
        assert!(unheard.changes.is_empty() && unheard.objects(Path::new("/")).is_none());
        assert_eq!(unheard.push_options(), [""; 0]);
        assert!(told(&[(Frame::Ran, b"")], true).await.is_err());
    }

    #[tokio::test]
    async fn nobody_can_fill_the_memory() {
        let piece = vec![b'x'; super::super::wire::MAX_PAYLOAD_BYTES];
        let frames = vec![(Frame::Variable, piece.as_slice()); 17];
        assert!(told(&frames, true).await.unwrap_err().to_string().contains("1048576"));
    }
}
