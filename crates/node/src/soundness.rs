//! Whether all objects of a replica are there and can be read: `git fsck`, and what its words mean.
//!
//! Writes go on while git looks, and an object that comes meanwhile may look like one that is missing. So what is wrong is
//! looked at once more, while nothing is repacked, and only what is wrong both times is. What git finds odd about an object
//! that is whole (a time zone, a mode with a leading zero) came with the push and is the same everywhere: it is no damage.

use std::collections::BTreeSet;

use tonic::Status;

use crate::{
    git::{Git, lines::Lines},
    keyed_locks::KeyedLocks,
    storage::RepositoryPath,
};

/// Complaints that are compared; more of them say nothing new.
const MOST_COMPLAINTS: usize = 4096;
/// Characters kept of each.
const COMPLAINT_LENGTH: usize = 400;
/// How many are told.
const TOLD: usize = 20;

/// Complaints about the machine, which say nothing of the replica.
const INABILITY: [&str; 5] = [
    "out of memory",
    "cannot allocate memory",
    "too many open files",
    "unable to create thread",
    "resource temporarily unavailable",
];
/// What git says beside complaints.
const REMARKS: [&str; 6] = ["warning:", "warning in ", "notice:", "hint:", "dangling ", "unreachable "];
/// Fields of git's word about an odd object: `error in commit 1234: missingEmail: invalid author`.
const KINDS: [&str; 5] = ["blob", "tree", "commit", "tag", "unknown"];

/// What a line of git's is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Damage,
    /// An object that is whole and is not as it should be.
    Odd,
    Remark,
    /// Git could not look.
    Inability,
}

fn read(line: &str) -> Line {
    let lower = line.to_ascii_lowercase();
    if INABILITY.iter().any(|words| lower.contains(words)) {
        return Line::Inability;
    }
    if line.trim().is_empty() || REMARKS.iter().any(|start| line.starts_with(start)) {
        return Line::Remark;
    }
    if is_odd(line) { Line::Odd } else { Line::Damage }
}

fn is_odd(line: &str) -> bool {
    let Some((what, rest)) = line.strip_prefix("error in ").and_then(|rest| rest.split_once(": ")) else {
        return false;
    };
    let of_object = what.split_once(' ').is_some_and(|(kind, _)| KINDS.contains(&kind));
    // The name of the check is one word; what git itself could not do is a sentence.
    let named =
        rest.split_once(": ").is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_alphanumeric()));
    of_object && named
}

/// What one run of git complained about. None: all is there.
#[derive(Debug, Default)]
struct Complaints {
    lines: Vec<String>,
    odd: bool,
    unable: Option<String>,
}

impl Complaints {
    fn take(&mut self, line: &[u8]) {
        let line: String = String::from_utf8_lossy(line).trim_end().chars().take(COMPLAINT_LENGTH).collect();
        match read(&line) {
            Line::Damage if self.lines.len() < MOST_COMPLAINTS => self.lines.push(line),
            Line::Damage | Line::Remark => {}
            Line::Odd => self.odd = true,
            Line::Inability => self.unable = Some(line),
        }
    }
}

async fn complaints(git: &Git, replica: &RepositoryPath) -> Result<Complaints, Status> {
    let command = git.command(replica, "fsck").reads().yields();
    let command = command.args(["--full", "--no-dangling", "--no-progress", "--no-reflogs"]);
    let mut lines = Lines::start(command, "fsck", b'\n').await?;
    let mut complaints = Complaints::default();
    while let Some(line) = lines.next().await? {
        complaints.take(&line);
    }
    let (exit, stderr) = lines.finish().await?;
    if exit.success() {
        return Ok(Complaints::default());
    }
    stderr.split(|byte| *byte == b'\n').for_each(|line| complaints.take(line));
    if let Some(said) = complaints.unable {
        return Err(Status::unavailable(format!("git fsck: {said}")));
    }
    match exit.code {
        None => Err(Status::unavailable("git fsck was killed")),
        // The bit of an odd object alone.
        Some(1) if complaints.odd => Ok(complaints),
        Some(_) if complaints.lines.is_empty() => {
            Ok(Complaints { lines: vec![format!("git fsck: {exit}")], ..complaints })
        }
        Some(_) => Ok(complaints),
    }
}

/// What stands in both, in the order of the second.
fn confirmed(first: &Complaints, second: Complaints) -> Vec<String> {
    if first.lines.len() == MOST_COMPLAINTS && second.lines.len() == MOST_COMPLAINTS {
        // Cut off, so that they may differ; a race makes a few lines.
        return second.lines;
    }
    let first: BTreeSet<&str> = first.lines.iter().map(String::as_str).collect();
    second.lines.into_iter().filter(|line| first.contains(line.as_str())).collect()
}

/// Looks through all objects; answers what is wrong with them, in git's words, or `None`.
pub(crate) async fn examine(
    git: &Git,
    upkeep: &KeyedLocks,
    replica: &RepositoryPath,
) -> Result<Option<String>, Status> {
    let first = complaints(git, replica).await?;
    if first.lines.is_empty() {
        return Ok(None);
    }
    // A pack that is replaced while git looks is missing from then on.
    let _no_repack = upkeep.lock(&replica.path).await;
    let found = confirmed(&first, complaints(git, replica).await?);
    Ok((!found.is_empty()).then(|| told(&found)))
}

fn told(found: &[String]) -> String {
    let mut lines = found.to_vec();
    if found.len() > TOLD {
        lines.truncate(TOLD);
        lines.push(format!("and {} more lines", found.len() - TOLD));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_odd_is_no_damage() {
        for (line, expected) in [
            ("missing blob 8baef1b4abc478178b004d62031cf7fe6db6f903", Line::Damage),
            ("broken link from    tree 6f5e", Line::Damage),
            ("              to    blob 8bae", Line::Damage),
            ("error: 8bae: object corrupt or missing: ./objects/8b/ae", Line::Damage),
            ("error: refs/heads/main: invalid sha1 pointer 44", Line::Damage),
            ("error in tree 6f5e: broken links", Line::Damage),
            ("fatal: loose object 8bae (stored in ./objects/8b/ae) is corrupt", Line::Damage),
            ("error in commit 11: missingSpaceBeforeDate: invalid author/committer line", Line::Odd),
            ("error in tree 11: treeNotSorted: not properly sorted", Line::Odd),
            ("warning in tree 11: zeroPaddedFilemode: contains zero-padded file modes", Line::Remark),
            ("notice: HEAD points to an unborn branch (main)", Line::Remark),
            ("", Line::Remark),
            ("fatal: Out of memory, malloc failed (tried to allocate 9 bytes)", Line::Inability),
        ] {
            assert_eq!(read(line), expected, "{line}");
        }
    }

    #[test]
    fn only_what_is_wrong_twice_is_wrong() {
        let said = |lines: &[&str]| Complaints {
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
            ..Complaints::default()
        };
        assert_eq!(confirmed(&said(&["a", "b"]), said(&["b", "c"])), ["b"]);
        assert!(confirmed(&said(&["a"]), said(&["c"])).is_empty());
        let many: Vec<String> = (0..MOST_COMPLAINTS).map(|number| number.to_string()).collect();
        let others = many.iter().map(|line| format!("x{line}")).collect();
        let (many, others) = (
            Complaints { lines: many, ..Complaints::default() },
            Complaints { lines: others, ..Complaints::default() },
        );
        assert_eq!(confirmed(&many, others).len(), MOST_COMPLAINTS, "both are cut off");
    }

    #[test]
    fn little_is_told_of_much() {
        let many: Vec<String> = (0..100).map(|number| number.to_string()).collect();
        let text = told(&many);
        assert_eq!(text.lines().count(), TOLD + 1);
        assert!(text.ends_with("and 80 more lines"), "{text}");
    }
}
