//! One `git push` or `git ls-remote`, and what its words mean.

use std::{collections::BTreeMap, path::Path, process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use tabularium_cli::local::git::Git;
use tokio::{io::AsyncWriteExt as _, time::timeout};

use crate::history::{ErrorKind, Outcome, Recorder, Update, Value, Write};

/// Longer than any fault lasts: what is over then hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What a client asks of one ref.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) reference: String,
    /// What the client believes to be there.
    pub(crate) old: Value,
    pub(crate) new: Value,
    /// Whether git is told to replace nothing but `old`, by force if need be. Else it wants a fast-forward.
    pub(crate) lease: bool,
}

/// Whose pushes these are, and where they go.
pub(crate) struct Destination<'a> {
    pub(crate) git: &'a Git,
    /// The repository that is pushed from.
    pub(crate) store: &'a Path,
    pub(crate) recorder: &'a Recorder,
    pub(crate) client: &'a str,
    /// Of all gateways.
    pub(crate) gateway: usize,
    pub(crate) gateway_url: &'a str,
    /// The repository's path.
    pub(crate) repository: &'a str,
}

impl Destination<'_> {
    /// Pushes, and tells what became of it as it is to be recorded.
    pub(crate) async fn push(&self, wishes: &[Wish], atomic: bool) -> Result<Write> {
        let url = format!("{}/{}", self.gateway_url, self.repository);
        let invoked = self.recorder.now();
        let answer = push(self.git, self.store, &url, wishes, atomic).await?;
        Ok(Write {
            client: self.client.to_owned(),
            gateway: self.gateway,
            repository: self.repository.to_owned(),
            invoked,
            completed: self.recorder.now(),
            atomic,
            updates: answer.updates,
            error: answer.error,
            said: answer.said,
        })
    }
}

/// What became of a push.
#[derive(Debug)]
struct Answer {
    updates: Vec<Update>,
    error: Option<ErrorKind>,
    said: String,
}

/// Runs git in a group of its own, which is killed when it takes too long. `None` then.
async fn run(git: &Git, directory: &Path, arguments: &[String], input: &[u8]) -> Result<Option<Output>> {
    let mut command = git.command(directory, arguments);
    command.process_group(0).stdin(std::process::Stdio::piped());
    let mut child = command.spawn().context("git")?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    // Small, so it fits into the pipe; a git that reads nothing has ended, which its status tells.
    if let Some(mut stdin) = child.stdin.take() {
        let _not_read = stdin.write_all(input).await;
    }
    let output = timeout(DEADLINE, child.wait_with_output()).await;
    if output.is_err()
        && let Some(group) = group
    {
        // Its helpers may be gone already.
        let _gone = kill_process_group(group, Signal::KILL);
    }
    output.ok().transpose().context("git")
}

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|argument| (*argument).to_owned()).collect()
}

/// Runs a local git command that has no reason to fail.
pub(crate) async fn local(git: &Git, directory: &Path, arguments: &[&str], input: &[u8]) -> Result<String> {
    let output = run(git, directory, &words(arguments), input).await?.context("git hangs")?;
    ensure!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// `git ls-remote`; the refs, or what git said.
pub(crate) async fn list(
    git: &Git,
    directory: &Path,
    url: &str,
) -> Result<Result<BTreeMap<String, String>, String>> {
    let arguments = words(&["ls-remote", "--refs", url]);
    let Some(output) = run(git, directory, &arguments, b"").await? else {
        return Ok(Err(format!("no answer within {} s", DEADLINE.as_secs())));
    };
    if !output.status.success() {
        return Ok(Err(one_line(&String::from_utf8_lossy(&output.stderr))));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let refs = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(Ok(refs.map(|(value, name)| (name.to_owned(), value.to_owned())).collect()))
}

/// `git push`.
async fn push(git: &Git, directory: &Path, url: &str, wishes: &[Wish], atomic: bool) -> Result<Answer> {
    let mut arguments = words(&["-c", "core.abbrev=40", "push", "--porcelain"]);
    if atomic {
        arguments.push("--atomic".to_owned());
    }
    for wish in wishes.iter().filter(|wish| wish.lease) {
        let old = wish.old.as_deref().unwrap_or_default();
        arguments.push(format!("--force-with-lease={}:{old}", wish.reference));
    }
    arguments.push(url.to_owned());
    for wish in wishes {
        arguments.push(format!("{}:{}", wish.new.as_deref().unwrap_or_default(), wish.reference));
    }
    Ok(match run(git, directory, &arguments, b"").await? {
        Some(output) => judge(
            wishes,
            output.status.code(),
            &String::from_utf8_lossy(&output.stdout),
            &String::from_utf8_lossy(&output.stderr),
        ),
        None => Answer {
            updates: wishes.iter().map(|wish| update(wish, Outcome::Unknown)).collect(),
            error: Some(ErrorKind::UnderWay),
            said: format!("no answer within {} s", DEADLINE.as_secs()),
        },
    })
}

fn update(wish: &Wish, outcome: Outcome) -> Update {
    Update { reference: wish.reference.clone(), old: wish.old.clone(), new: wish.new.clone(), outcome }
}

/// What git's exit code and words say about each ref.
///
/// git prints the server's report also when the connection breaks behind it, with exit code 128: nobody was told that
/// the push is done then. A refusal is one, however the connection ends.
fn judge(wishes: &[Wish], code: Option<i32>, stdout: &str, stderr: &str) -> Answer {
    let broke = !matches!(code, Some(0 | 1)) || stderr.contains("fatal:") || stderr.contains("RPC failed");
    // The first request only reads; git stops there when it fails.
    let before_sending = stderr.contains("fatal: unable to access");
    let updates = wishes.iter().map(|wish| {
        let line = stdout.lines().find_map(|line| {
            let (flag, rest) = line.split_once('\t')?;
            let (names, summary) = rest.split_once('\t')?;
            (names.rsplit(':').next() == Some(&wish.reference)).then_some((flag, summary))
        });
        match line {
            Some(("!", summary))
                if summary.starts_with("[rejected]") || summary.starts_with("[remote rejected]") =>
            {
                update(wish, Outcome::Failed)
            }
            Some((" " | "+" | "*" | "-", summary)) if !broke => acknowledged(wish, summary),
            None if before_sending => update(wish, Outcome::Failed),
            _ => update(wish, Outcome::Unknown),
        }
    });
    let updates: Vec<_> = updates.collect();
    let error = match () {
        () if before_sending => Some(ErrorKind::BeforeSending),
        () if updates.iter().any(|update| update.outcome == Outcome::Unknown) => Some(ErrorKind::UnderWay),
        () => None,
    };
    let calm = updates.iter().all(|update| update.outcome == Outcome::Acknowledged);
    let refusals = stdout.lines().filter(|line| line.starts_with('!')).collect::<Vec<_>>().join(" ");
    let said = if calm { String::new() } else { one_line(&format!("{refusals} {stderr}")) };
    Answer { updates, error, said }
}

/// A done update stands on what the server advertised, which git tells.
fn acknowledged(wish: &Wish, summary: &str) -> Update {
    let old = match summary.split_whitespace().next().and_then(|range| range.split_once("..")) {
        Some((old, _)) => Some(old.to_owned()),
        None if summary.starts_with("[new") => None,
        None => wish.old.clone(),
    };
    Update { old, ..update(wish, Outcome::Acknowledged) }
}

fn one_line(text: &str) -> String {
    const LONGEST: usize = 400;
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(reference: &str) -> Wish {
        Wish { reference: reference.into(), old: Some("a1".into()), new: Some("b2".into()), lease: false }
    }

    fn outcomes(answer: &Answer) -> Vec<Outcome> {
        answer.updates.iter().map(|update| update.outcome).collect()
    }

    #[test]
    fn a_done_push_stands_on_what_was_advertised() {
        let told = "To http://x/a.git\n \tb2:refs/heads/m\tc3..b2\n*\tb2:refs/heads/n\t[new branch]\nDone\n";
        let answer = judge(&[wish("refs/heads/m"), wish("refs/heads/n")], Some(0), told, "");
        assert_eq!(outcomes(&answer), [Outcome::Acknowledged; 2]);
        assert_eq!(answer.updates[0].old.as_deref(), Some("c3"));
        assert_eq!(answer.updates[1].old, None);
        let forced = "+\tb2:refs/heads/m\tc3...b2 (forced update)\n-\t:refs/heads/n\t[deleted]\n";
        let answer = judge(&[wish("refs/heads/m"), wish("refs/heads/n")], Some(0), forced, "");
        assert_eq!(answer.updates[0].old.as_deref(), Some("c3"));
        assert_eq!(answer.updates[1].old.as_deref(), Some("a1"));
    }

    #[test]
    fn the_report_of_a_push_that_broke_behind_it_is_no_acknowledgement() {
        let told = "To http://x/a.git\n \tb2:refs/heads/m\tc3..b2\n";
        let broke = "error: RPC failed; curl 18 transfer closed\nfatal: the remote end hung up";
        for (code, stderr) in [(Some(128), ""), (Some(1), broke), (None, "")] {
            let answer = judge(&[wish("refs/heads/m")], code, told, stderr);
            assert_eq!(outcomes(&answer), [Outcome::Unknown]);
            assert_eq!(answer.error, Some(ErrorKind::UnderWay));
        }
    }

    #[test]
    fn refusals_are_failures_and_silence_is_not() {
        let told = "!\tb2:refs/heads/m\t[remote rejected] (failed to update ref)\n\
                    !\tb2:refs/heads/n\t[remote failure] (remote failed to report status)\n";
        let answer = judge(&[wish("refs/heads/m"), wish("refs/heads/n")], Some(1), told, "error: failed");
        assert_eq!(outcomes(&answer), [Outcome::Failed, Outcome::Unknown]);
        let answer = judge(&[wish("refs/heads/m")], Some(128), "", "fatal: the remote end hung up");
        assert_eq!(outcomes(&answer), [Outcome::Unknown]);
    }

    #[test]
    fn what_was_never_sent_has_failed() {
        let told = "fatal: unable to access 'http://x/': The requested URL returned error: 503";
        let answer = judge(&[wish("refs/heads/m")], Some(128), "", told);
        assert_eq!(outcomes(&answer), [Outcome::Failed]);
        assert_eq!(answer.error, Some(ErrorKind::BeforeSending));
    }
}
