//! UpdateRemoteMirror: a repository outside the cluster is given the branches and tags of one within.

use std::collections::{BTreeMap, BTreeSet};

use tabularium_proto::gitaly::{UpdateRemoteMirrorRequest, UpdateRemoteMirrorResponse};
use tonic::{Status, Streaming};

use crate::{
    git::{GitCommand, merge, references},
    node::Node,
    remote_url::{REMOTE, RemoteUrl},
    ssh_keys::SshKeys,
    storage::RepositoryPath,
};

/// References that are pushed at once.
const BATCH: usize = 10;
/// Most references that clients are told about.
const MAX_DIVERGENT: usize = 100;

/// References and what they point to.
type References = BTreeMap<Vec<u8>, String>;

/// Everything about the request that git has to know.
struct Mirror<'a> {
    node: &'a Node,
    repository: RepositoryPath,
    url: RemoteUrl,
    keys: SshKeys,
    request: UpdateRemoteMirrorRequest,
}

pub(super) async fn update(
    node: &Node,
    mut requests: Streaming<UpdateRemoteMirrorRequest>,
) -> Result<UpdateRemoteMirrorResponse, Status> {
    let first = requests.message().await?;
    let mut request = first.ok_or_else(|| Status::internal("receive first request: EOF"))?;
    let repository = node.storages.open(request.repository.as_ref())?;
    let remote = request.remote.as_ref().ok_or_else(|| Status::invalid_argument("missing Remote"))?;
    if remote.url.is_empty() {
        return Err(Status::invalid_argument("remote is missing URL"));
    }
    let url = RemoteUrl::parse(&remote.url)?;
    while let Some(more) = requests.message().await? {
        request.only_branches_matching.extend(more.only_branches_matching);
    }
    let keys = SshKeys::write(node, &repository, &request.ssh_key, &request.known_hosts)?;
    let mirror = Mirror { node, repository, url, keys, request };
    mirror.update().await
}

impl Mirror<'_> {
    fn command(&self, subcommand: &'static str) -> Result<GitCommand, Status> {
        let remote = self.request.remote.clone().unwrap_or_default();
        let command = self.node.git.command(&self.repository, subcommand).reads();
        let command =
            self.url.configure(command, &remote.http_authorization_header, &remote.resolved_address)?;
        Ok(self.keys.apply(command, self.url.host_key_alias(&remote.resolved_address)))
    }

    async fn update(self) -> Result<UpdateRemoteMirrorResponse, Status> {
        let theirs = self.theirs().await?;
        let ours = self.ours().await?;
        let head = references::head_target(&self.node.git, &self.repository).await?;
        let head = head.filter(|head| ours.contains_key(head));
        let keep = self.request.keep_divergent_refs;
        let mut changes = compare(&ours, &theirs);
        let mut divergent_refs = Vec::new();
        if keep {
            let mut diverged = BTreeSet::new();
            for name in &changes.moved {
                if let (Some(theirs), Some(ours)) = (theirs.get(name), ours.get(name))
                    && !self.contains(ours, theirs).await?
                {
                    diverged.insert(name.clone());
                }
            }
            changes.moved.retain(|name| !diverged.contains(name));
            divergent_refs.extend(diverged.into_iter().filter(|name| self.wants(name)).take(MAX_DIVERGENT));
        }
        let mut refspecs: Vec<Vec<u8>> = changes.new.into_iter().chain(changes.moved).collect();
        if let Some(head) = head.as_ref().and_then(|head| ours.get(head)).filter(|_| !keep) {
            // What is nowhere else stays: it may be somebody's work.
            for name in changes.gone {
                if let Some(theirs) = theirs.get(&name)
                    && self.contains(head, theirs).await?
                {
                    refspecs.push([b":", name.as_slice()].concat());
                }
            }
        }
        refspecs.retain(|refspec| self.wants(refspec.strip_prefix(b":").unwrap_or(refspec)));
        // A repository has its first branch for its default branch.
        refspecs.sort_by_key(|refspec| Some(refspec) != head.as_ref());
        for batch in refspecs.chunks(BATCH) {
            self.push(batch).await?;
        }
        Ok(UpdateRemoteMirrorResponse { divergent_refs })
    }

    /// Whether a branch or tag is to be looked after.
    fn wants(&self, name: &[u8]) -> bool {
        let patterns = &self.request.only_branches_matching;
        match name.strip_prefix(b"refs/heads/") {
            Some(branch) => patterns.is_empty() || patterns.iter().any(|pattern| matches(pattern, branch)),
            None => true,
        }
    }

    async fn theirs(&self) -> Result<References, Status> {
        let command = self.command("ls-remote")?;
        let listed = command.args([REMOTE, "refs/heads/*", "refs/tags/*"]).output().await?;
        if !listed.exit.success() {
            return Err(failure("get remote references", &listed.stderr));
        }
        // `<tag>^{}` is what a tag stands for, and no reference.
        Ok(parse(&listed.stdout, b'\t').filter(|(name, _)| !name.ends_with(b"^{}")).collect())
    }

    async fn ours(&self) -> Result<References, Status> {
        let command = self.node.git.command(&self.repository, "for-each-ref").reads();
        let format = "--format=%(if)%(symref)%(then)%(else)%(objectname) %(refname)%(end)";
        let listed = command.args([format, "refs/heads/", "refs/tags/"]).checked().await?;
        Ok(parse(&listed, b' ').collect())
    }

    /// Whether a commit of ours leads to one of theirs, which we need not have.
    async fn contains(&self, ours: &str, theirs: &str) -> Result<bool, Status> {
        let git = &self.node.git;
        for id in [ours, theirs] {
            let commit = format!("{id}^{{commit}}");
            if references::resolve(git, &self.repository, commit.as_bytes()).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(merge::is_ancestor(git, &self.repository, theirs, ours).await?)
    }

    async fn push(&self, refspecs: &[Vec<u8>]) -> Result<(), Status> {
        use std::os::unix::ffi::OsStrExt as _;
        let mut command = self.command("push")?.args(["--quiet", "--no-verify", "--no-recurse-submodules"]);
        if !self.request.keep_divergent_refs {
            command = command.arg("--force");
        }
        let refspecs = refspecs.iter().map(|refspec| std::ffi::OsStr::from_bytes(refspec));
        let pushed = command.arg(REMOTE).args(refspecs).output().await?;
        if pushed.exit.success() { Ok(()) } else { Err(failure("push to mirror: git push", &pushed.stderr)) }
    }
}

fn failure(doing: &str, stderr: &[u8]) -> Status {
    Status::internal(format!("{doing}: {:?}", String::from_utf8_lossy(stderr).trim_end()))
}

fn parse(listed: &[u8], gap: u8) -> impl Iterator<Item = (Vec<u8>, String)> {
    listed.split(|byte| *byte == b'\n').filter_map(move |line| {
        let at = line.iter().position(|byte| *byte == gap)?;
        let id = String::from_utf8_lossy(line.get(..at)?).into_owned();
        Some((line.get(at + 1..)?.to_vec(), id))
    })
}

/// In what the other side differs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// What it lacks.
    new: Vec<Vec<u8>>,
    /// What is elsewhere there.
    moved: Vec<Vec<u8>>,
    /// What only it has.
    gone: Vec<Vec<u8>>,
}

fn compare(ours: &References, theirs: &References) -> Changes {
    let mut changes = Changes::default();
    for (name, id) in ours {
        match theirs.get(name) {
            None => changes.new.push(name.clone()),
            Some(there) if there != id => changes.moved.push(name.clone()),
            Some(_) => {}
        }
    }
    changes.gone = theirs.keys().filter(|name| !ours.contains_key(*name)).cloned().collect();
    changes
}

/// Whether a name fits a pattern, in which `*` stands for anything.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let mut parts = pattern.split(|byte| *byte == b'*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&[u8]> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        if part.is_empty() {
            continue;
        }
        let Some(at) = rest.windows(part.len()).position(|window| window == part) else { return false };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("main", "main", true),
            ("main", "main2", false),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c", "ac", true),
            ("a*a", "a", false),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c2b", false),
            ("a.c", "abc", false),
            ("a**c", "abc", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn what_differs() {
        let references = |pairs: &[(&str, &str)]| -> References {
            pairs.iter().map(|(name, id)| (name.as_bytes().to_vec(), (*id).to_owned())).collect()
        };
        let changes = compare(
            &references(&[("a", "1"), ("b", "2"), ("c", "3")]),
            &references(&[("b", "2"), ("c", "4"), ("d", "5")]),
        );
        let names = |name: &str| vec![name.as_bytes().to_vec()];
        assert_eq!(changes, Changes { new: names("a"), moved: names("c"), gone: names("d") });
    }
}
