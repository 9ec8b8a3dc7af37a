//! `git upload-pack` and `git receive-pack` as Gitaly runs them (wire reference, section b.6).

use tonic::Status;

use crate::{
    git::{Git, GitCommand},
    storage::RepositoryPath,
};

/// Refs of the server's own that fetches do not see.
const HIDDEN_FROM_FETCH: [&str; 3] = ["refs/keep-around/", "refs/remotes/", "refs/tmp/"];
/// Refs that pushes do not see and may not touch.
const HIDDEN_FROM_PUSH: [&str; 6] = [
    "refs/keep-around/",
    "refs/remotes/",
    "refs/tmp/",
    "refs/environments/",
    "refs/merge-requests/",
    "refs/pipelines/",
];
/// Sections whose settings callers may add. Others can make git run programs.
const CLIENT_SECTIONS: [&str; 4] = ["transfer", "uploadpack", "receive", "pack"];
/// In those sections, the ones that run programs all the same.
const CLIENT_FORBIDDEN: [&str; 2] = ["uploadpack.packobjectshook", "receive.certnonceseed"];

/// What callers may choose about a transport.
pub(crate) struct Choices<'a> {
    /// `key=value`; later ones win over the node's own.
    pub(crate) git_config_options: &'a [String],
    /// `version=1` or `version=2`; anything else is ignored.
    pub(crate) git_protocol: &'a str,
    /// One request and answer, as over HTTP.
    pub(crate) stateless: bool,
    /// Only the advertisement.
    pub(crate) advertise: bool,
}

/// `git upload-pack`.
pub(crate) fn upload_pack(
    git: &Git,
    repository: &RepositoryPath,
    choices: &Choices<'_>,
) -> Result<GitCommand, Status> {
    let mut command = git
        .command(repository, "upload-pack")
        .reads()
        .config("uploadpack.allowFilter=true")
        .config("uploadpack.allowAnySHA1InWant=true");
    for prefix in HIDDEN_FROM_FETCH {
        command = command.config(format!("uploadpack.hideRefs={prefix}"));
    }
    Ok(finish(command.arg("--strict"), choices)?.arg(&repository.path))
}

/// `git upload-archive`.
pub(crate) fn upload_archive(git: &Git, repository: &RepositoryPath) -> GitCommand {
    git.command(repository, "upload-archive").reads().arg(&repository.path)
}

/// `git receive-pack`.
pub(crate) fn receive_pack(
    git: &Git,
    repository: &RepositoryPath,
    choices: &Choices<'_>,
) -> Result<GitCommand, Status> {
    let mut command = git.command(repository, "receive-pack");
    for prefix in HIDDEN_FROM_PUSH {
        command = command.config(format!("receive.hideRefs={prefix}"));
    }
    for setting in [
        "receive.advertisePushOptions=true",
        "receive.autogc=false",
        "core.alternateRefsCommand=exit 0 #",
        "transfer.fsckObjects=true",
        "receive.fsck.badTimezone=ignore",
        "receive.fsck.missingSpaceBeforeDate=ignore",
        "receive.fsck.zeroPaddedFilemode=ignore",
    ] {
        command = command.config(setting);
    }
    Ok(finish(command, choices)?.arg(&repository.path))
}

fn finish(mut command: GitCommand, choices: &Choices<'_>) -> Result<GitCommand, Status> {
    for option in choices.git_config_options {
        check_option(option)?;
        command = command.config(option);
    }
    if matches!(choices.git_protocol, "version=1" | "version=2") {
        command = command.env("GIT_PROTOCOL", choices.git_protocol);
    }
    if choices.stateless {
        command = command.arg("--stateless-rpc");
    }
    if choices.advertise {
        command = command.arg("--advertise-refs");
    }
    Ok(command)
}

fn check_option(option: &str) -> Result<(), Status> {
    let refuse = |why: &str| Err(Status::invalid_argument(format!("git config option {option:?}: {why}")));
    let Some((key, _)) = option.split_once('=') else { return refuse("not key=value") };
    let lower = key.to_ascii_lowercase();
    let Some((section, rest)) = lower.split_once('.') else { return refuse("key without a section") };
    if rest.is_empty() || option.contains(['\n', '\0']) {
        return refuse("malformed key or value");
    }
    if !CLIENT_SECTIONS.contains(&section) || CLIENT_FORBIDDEN.contains(&lower.as_str()) {
        return refuse("not one that callers may set");
    }
    Ok(())
}

/// Looks for a `deepen` line in a fetch request that comes in pieces. Rounds of a shallow negotiation end early, with
/// an exit code that is no failure.
#[derive(Debug, Default)]
pub(crate) struct DeepenScan {
    found: bool,
    tail: Vec<u8>,
}

impl DeepenScan {
    const LINE: &'static [u8] = b"deepen";

    /// Looks at the next piece.
    pub(crate) fn feed(&mut self, piece: &[u8]) {
        if self.found {
            return;
        }
        let keep = 4 + Self::LINE.len();
        self.tail.extend_from_slice(piece);
        self.found = self.tail.windows(keep + 1).any(|window| {
            let (length, line) = window.split_at(4);
            length.iter().all(u8::is_ascii_hexdigit)
                && line.starts_with(Self::LINE)
                && matches!(line[Self::LINE.len()], b' ' | b'-')
        });
        let excess = self.tail.len().saturating_sub(keep);
        self.tail.drain(..excess);
    }

    /// Whether there was one.
    pub(crate) fn found(&self) -> bool {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_cannot_make_git_run_programs() {
        for option in ["transfer.hideRefs=!refs", "uploadpack.allowFilter=false", "receive.maxInputSize=1"] {
            assert!(check_option(option).is_ok(), "{option}");
        }
        for option in [
            "uploadpack.packObjectsHook=/bin/sh",
            "UploadPack.PackObjectsHook=/bin/sh",
            "core.sshCommand=x",
            "core.hooksPath=/tmp",
            "alias.x=!sh",
            "transfer.hideRefs",
            "transfer=1",
            "=x",
        ] {
            assert_eq!(check_option(option).unwrap_err().code(), tonic::Code::InvalidArgument, "{option}");
        }
    }

    #[test]
    fn a_deepen_line_is_found_however_it_is_cut() {
        let request = b"0011command=fetch0001000cdeepen 10000";
        for cut in 1..request.len() {
            let mut scan = DeepenScan::default();
            request.chunks(cut).for_each(|piece| scan.feed(piece));
            assert!(scan.found(), "{cut}");
        }
        let mut scan = DeepenScan::default();
        scan.feed(b"0098want 0123 multi_ack deepen-since deepen-not\n");
        assert!(!scan.found());
    }
}
