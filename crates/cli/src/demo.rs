//! `demo`: the main job by itself. Pushes a checkout's history through one router, clones it through the other, compares
//! the replicas and the mirror site, and leaves nothing running.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use tabularium_common::{
    auth::SendToken,
    config::SecretFile,
    grpc::{Address, channel},
    ids::RelativePath,
};
use tabularium_proto::gitaly::{
    CalculateChecksumRequest, Repository, repository_service_client::RepositoryServiceClient,
};
use tonic::service::interceptor::InterceptedService;

use crate::{
    arguments::{Demo, Global},
    commands::{repository::Repositories, request, yes_or_no},
    failure::Failure,
    local::{
        cluster::{Cluster, ClusterOptions, Gateways, HOME, MIRROR},
        git::Git,
        postgres::Durability,
        record::{ClusterRecord, SiteRecord},
        service::Kind,
    },
    output,
    target::Target,
    up::Live,
    views::{CheckView, RepositoryView},
};

/// The repository that is made.
const REPOSITORY: &str = "demo/history.git";
/// How long copies and the mirror may take to follow a push.
const FOLLOW_DEADLINE: Duration = Duration::from_secs(300);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long processes may take to vanish after the cluster has stopped.
const VANISH_DEADLINE: Duration = Duration::from_secs(5);
/// Commits of the history that is made up where there is none.
const MADE_UP_COMMITS: u32 = 20;

pub(crate) async fn run(global: &Global, demo: &Demo) -> Result<ExitCode, Failure> {
    let live = Live::new();
    let scratch = tempfile::Builder::new()
        .prefix("tabularium-demo-")
        .tempdir_in("/tmp")
        .map_err(|error| Failure::Internal(format!("cannot make a directory in /tmp: {error}")))?;
    let mut rows = Rows { rows: Vec::new(), live: &live };
    let shown = tokio::select! {
        shown = show(global, demo, scratch.path(), &mut rows) => shown,
        _ = tabularium_common::lifecycle::stop_signal() => Err(Failure::No("interrupted".into())),
    };
    if let Err(failure) = shown
        && rows.rows.iter().all(|row| row.ok)
    {
        rows.add("what stopped it", Err(failure.to_string()));
    }
    let left = nothing_left(scratch.path()).await;
    rows.add("nothing left running", left);
    live.finish();
    let rows = rows.rows;
    let failed = rows.iter().find(|row| !row.ok);
    output::print(global.json, &rows, output::checks)?;
    if !global.json {
        match failed {
            None => println!("demo: ok"),
            Some(row) => println!("demo: failed: {}", row.check),
        }
    }
    Ok(yes_or_no(failed.is_none()))
}

/// What has been seen so far.
struct Rows<'a> {
    rows: Vec<CheckView>,
    live: &'a Live,
}

impl Rows<'_> {
    fn add(&mut self, what: &str, result: Result<String, String>) {
        self.rows.push(CheckView::new(what, result, ""));
    }

    /// Adds a row for a step. One that failed ends the demonstration.
    fn step<T, E: ToString>(
        &mut self,
        what: &str,
        result: Result<T, E>,
        value: impl FnOnce(&T) -> String,
    ) -> Result<T, Failure> {
        match result {
            Ok(answer) => {
                self.add(what, Ok(value(&answer)));
                Ok(answer)
            }
            Err(error) => {
                let text = error.to_string();
                self.add(what, Err(text.clone()));
                Err(Failure::No(text))
            }
        }
    }
}

async fn show(global: &Global, demo: &Demo, scratch: &Path, rows: &mut Rows<'_>) -> Result<(), Failure> {
    let git = Git::new(&scratch.join("home")).map_err(|error| Failure::Internal(error.to_string()))?;
    let source = Source::find(&git, &demo.source, scratch).await;
    let source = rows.step("history", source, |source| source.description.clone())?;
    let started = Instant::now();
    let mut options = ClusterOptions::new(scratch.join("state"));
    options.gateways = Gateways::PerRouter;
    // Thrown away at the end: what a power cut would do to it does not matter.
    options.durability = Durability::ThrowAway;
    let live = rows.live;
    let cluster = Cluster::start(options, &|name| live.now(&format!("starting {name}"))).await;
    let cluster = rows.step("cluster", cluster, |cluster| {
        format!("{} processes in {:.1} s", cluster.pids().len(), started.elapsed().as_secs_f64())
    })?;
    let shown =
        Show { global, git: &git, source: &source, scratch, record: cluster.record() }.run(rows).await;
    live.now("stopping");
    let stopped = cluster.stop().await.map_err(Failure::from);
    shown.and(stopped)
}

/// Everything that the steps need.
struct Show<'a> {
    global: &'a Global,
    git: &'a Git,
    source: &'a Source,
    scratch: &'a Path,
    record: ClusterRecord,
}

impl Show<'_> {
    async fn run(&self, rows: &mut Rows<'_>) -> Result<(), Failure> {
        let home = self.site(HOME)?;
        let mirror = self.site(MIRROR)?;
        let gateways = home.urls(Kind::Gateway);
        let [first, second] = gateways.as_slice() else {
            return Err(Failure::Internal("the demonstration needs two gateways".into()));
        };
        let mirror_gateway = mirror.urls(Kind::Gateway).into_iter().next().unwrap_or_default();
        let target = Target::from_parts(self.global, Some(home.clone()))?;

        rows.live.now("pushing");
        let created = self.create(&target).await;
        rows.step("repository created", created, |()| format!("{REPOSITORY} through router 1"))?;
        let started = Instant::now();
        let pushed = self.push(&format!("{first}/{REPOSITORY}")).await;
        rows.step("pushed through router 1", pushed, |()| {
            format!(
                "{} in {:.1} s",
                count_of(self.source.ref_count(), "ref"),
                started.elapsed().as_secs_f64()
            )
        })?;

        rows.live.now("cloning");
        let started = Instant::now();
        let cloned = self.clone_and_compare(&format!("{second}/{REPOSITORY}"), "clone").await;
        rows.step("cloned through router 2", cloned, |refs| {
            format!("HEAD and {} equal, {:.1} s", count_of(refs, "ref"), started.elapsed().as_secs_f64())
        })?;

        rows.live.now("waiting for the copies");
        let equal = self.equal_replicas(&target, home).await;
        rows.step("replicas equal", equal, |(count, checksum)| {
            format!("{count} of {count} at {}", &checksum[..checksum.len().min(12)])
        })?;

        rows.live.now("waiting for the mirror site");
        let started = Instant::now();
        let url = format!("{mirror_gateway}/{REPOSITORY}");
        let mirrored = self.equal_mirror(&url).await;
        rows.step("mirror site equal", mirrored, |refs| {
            format!("HEAD and {}, waited {:.1} s", count_of(refs, "ref"), started.elapsed().as_secs_f64())
        })?;
        let refused = self.push_is_refused(&url, &format!("{first}/{REPOSITORY}")).await;
        rows.step("mirror refuses pushes", refused, Clone::clone)?;
        Ok(())
    }

    fn site(&self, name: &str) -> Result<&SiteRecord, Failure> {
        self.record.site(name).ok_or_else(|| Failure::Internal(format!("no site {name}")))
    }

    async fn create(&self, target: &Target) -> Result<(), Failure> {
        let (mut router, whom) = target.repositories().await?;
        let create = tabularium_proto::gitaly::CreateRepositoryRequest {
            repository: Some(Repository {
                storage_name: self.global.virtual_storage.clone(),
                relative_path: REPOSITORY.to_owned(),
                ..Default::default()
            }),
            default_branch: self.source.branch.clone().into_bytes(),
            ..Default::default()
        };
        let created = router.create_repository(request(create)).await;
        created.map(drop).map_err(|status| Failure::of_status("creating it", &whom, &status))
    }

    async fn push(&self, url: &str) -> Result<(), String> {
        let mut arguments = vec!["push".to_owned(), "--quiet".to_owned(), url.to_owned()];
        arguments.extend(self.source.refspecs.iter().cloned());
        self.git.run(&self.source.directory, arguments).await.map(drop).map_err(|error| error.to_string())
    }

    /// Clones with all refs; answers how many there are once they equal the source's.
    async fn clone_and_compare(&self, url: &str, name: &str) -> Result<usize, String> {
        let directory = self.scratch.join(name);
        let _none_yet = fs::remove_dir_all(&directory);
        let text = |error: crate::local::git::GitError| error.to_string();
        let to = directory.display().to_string();
        self.git.run(self.scratch, ["clone", "--quiet", "--mirror", url, &to]).await.map_err(text)?;
        let head = self.git.run(&directory, ["rev-parse", "HEAD"]).await.map_err(text)?;
        if head != self.source.head {
            return Err(format!("HEAD is {head} there and {} here", self.source.head));
        }
        let refs = self.git.refs(&directory).await.map_err(text)?;
        if refs != self.source.refs {
            let count = |refs: &str| refs.lines().count();
            return Err(format!(
                "the refs differ: {} there, {} here",
                count(&refs),
                count(&self.source.refs)
            ));
        }
        Ok(refs.lines().count())
    }

    /// Waits until the coordinator says that all replicas are up to date, then asks every node itself.
    async fn equal_replicas(&self, target: &Target, home: &SiteRecord) -> Result<(usize, String), String> {
        let repositories = Repositories { target, global: self.global };
        let path: RelativePath = REPOSITORY.parse().map_err(|error| format!("{REPOSITORY} {error}"))?;
        let nodes = home.grpc(Kind::Node);
        let deadline = Instant::now() + FOLLOW_DEADLINE;
        let repository = loop {
            let repository = repositories.fetch(&path).await.map_err(|failure| failure.to_string())?;
            if repository.up_to_date == nodes.len() {
                break repository;
            }
            if Instant::now() > deadline {
                return Err(format!("only {} of {} are up to date", repository.up_to_date, nodes.len()));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        };
        let mut checksums = Vec::new();
        for (replica, address) in repository.replicas.iter().zip(&nodes) {
            checksums.push(checksum(home, &repository, &replica.storage, address).await?);
        }
        match checksums.iter().find(|checksum| **checksum != checksums[0]) {
            Some(other) => Err(format!("checksums differ: {} and {other}", checksums[0])),
            None => Ok((checksums.len(), checksums.swap_remove(0))),
        }
    }

    async fn equal_mirror(&self, url: &str) -> Result<usize, String> {
        let deadline = Instant::now() + FOLLOW_DEADLINE;
        loop {
            match self.clone_and_compare(url, "mirror").await {
                Err(_) if Instant::now() < deadline => tokio::time::sleep(POLL_INTERVAL * 3).await,
                result => return result,
            }
        }
    }

    /// The refusal has to name the place where pushing is possible, exactly.
    async fn push_is_refused(&self, url: &str, home_url: &str) -> Result<String, String> {
        let refspec = format!("{}:refs/heads/not-here", self.source.head);
        let output = self.git.output(&self.source.directory, ["push", url, &refspec]).await;
        let output = output.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let named = format!("push to {home_url}");
        let sentence = said.lines().map(str::trim_end).find(|line| line.ends_with(&named));
        match (output.status.success(), sentence) {
            (true, _) => Err("the mirror took a push".into()),
            (false, Some(sentence)) => Ok(sentence.trim_start_matches("remote:").trim().to_owned()),
            (false, None) => Err(format!("the refusal does not name the home site: {}", said.trim())),
        }
    }
}

async fn checksum(
    site: &SiteRecord,
    repository: &RepositoryView,
    storage: &str,
    address: &str,
) -> Result<String, String> {
    let address: Address = address.parse().map_err(|error| format!("{address}: {error}"))?;
    let token = SecretFile(site.node_token_file.clone()).read().map_err(|error| error.to_string())?;
    let signed = InterceptedService::new(channel(&address), SendToken(Some(token)));
    let calculate = CalculateChecksumRequest {
        repository: Some(Repository {
            storage_name: storage.to_owned(),
            relative_path: repository.replica_path.clone(),
            ..Default::default()
        }),
    };
    let answer = RepositoryServiceClient::new(signed).calculate_checksum(request(calculate)).await;
    let answer = answer.map_err(|status| format!("{storage}: {:?} {}", status.code(), status.message()))?;
    Ok(answer.into_inner().checksum)
}

/// What is pushed, and what every clone has to equal.
struct Source {
    directory: PathBuf,
    description: String,
    /// Branch that HEAD names.
    branch: String,
    head: String,
    refs: String,
    refspecs: Vec<String>,
}

impl Source {
    /// The checkout itself where it is whole. Git refuses to push a shallow history into a new repository, and a
    /// checkout must not be changed by showing it: of a shallow one the files are committed afresh, elsewhere. Where
    /// there is no history at all one is made up.
    async fn find(git: &Git, checkout: &Path, scratch: &Path) -> Result<Self, String> {
        let checkout = std::path::absolute(checkout).map_err(|error| error.to_string())?;
        let shallow = git.run(&checkout, ["rev-parse", "--is-shallow-repository"]).await;
        let has_head =
            git.run(&checkout, ["rev-parse", "--verify", "--quiet", "HEAD^{commit}"]).await.is_ok();
        let (directory, why) = match shallow.as_deref() {
            Ok("false") if has_head => (checkout, "this checkout's own"),
            Ok("true") if has_head => {
                (afresh(git, &checkout, scratch).await?, "shallow checkout: its files, committed afresh")
            }
            _ => (made_up(git, scratch).await?, "no history here: made up"),
        };
        Self::describe(git, directory, why).await.map_err(|error| error.to_string())
    }

    async fn describe(git: &Git, directory: PathBuf, why: &str) -> Result<Self, crate::local::git::GitError> {
        let head = git.run(&directory, ["rev-parse", "HEAD"]).await?;
        let commits = git.run(&directory, ["rev-list", "--count", "--all", "HEAD"]).await?;
        let on_branch = git.run(&directory, ["symbolic-ref", "--quiet", "--short", "HEAD"]).await.ok();
        let mut refs = git.refs(&directory).await?;
        let mut refspecs = vec!["refs/heads/*:refs/heads/*".to_owned(), "refs/tags/*:refs/tags/*".to_owned()];
        let branch = on_branch.unwrap_or_else(|| {
            // A detached HEAD becomes a branch, else no clone could have it.
            let branch = "detached-head".to_owned();
            refspecs.push(format!("HEAD:refs/heads/{branch}"));
            let mut lines: Vec<_> = refs.lines().map(str::to_owned).collect();
            lines.push(format!("{head} refs/heads/{branch}"));
            lines.sort_by(|a, b| a.split(' ').nth(1).cmp(&b.split(' ').nth(1)));
            refs = lines.join("\n");
            branch
        });
        let description =
            format!("{why}; {}, {}", count_of(commits, "commit"), count_of(refs.lines().count(), "ref"));
        Ok(Self { directory, description, branch, head, refs, refspecs })
    }

    fn ref_count(&self) -> usize {
        self.refs.lines().count()
    }
}

/// One commit with the files of a shallow checkout's HEAD.
async fn afresh(git: &Git, checkout: &Path, scratch: &Path) -> Result<PathBuf, String> {
    let make = async {
        let objects =
            git.run(checkout, ["rev-parse", "--path-format=absolute", "--git-path", "objects"]).await?;
        let tree = git.run(checkout, ["rev-parse", "HEAD^{tree}"]).await?;
        let directory = scratch.join("source");
        git.run(scratch, ["init", "--quiet", "source"]).await?;
        fs::write(directory.join(".git/objects/info/alternates"), format!("{objects}\n"))?;
        let commit =
            git.run(&directory, ["commit-tree", "-m", "The files of a shallow checkout", &tree]).await?;
        git.run(&directory, ["update-ref", "refs/heads/main", &commit]).await?;
        Ok(directory)
    };
    make.await.map_err(|error: crate::local::git::GitError| error.to_string())
}

fn count_of(count: impl std::fmt::Display, one: &str) -> String {
    let count = count.to_string();
    let ending = if count == "1" { "" } else { "s" };
    format!("{count} {one}{ending}")
}

/// A few commits, where there is no repository at all.
async fn made_up(git: &Git, scratch: &Path) -> Result<PathBuf, String> {
    let make = async {
        let directory = scratch.join("source");
        git.run(scratch, ["init", "--quiet", "source"]).await?;
        for number in 1..=MADE_UP_COMMITS {
            fs::write(directory.join("numbers"), format!("{number}\n").repeat(number as usize))?;
            git.run(&directory, ["add", "numbers"]).await?;
            git.run(&directory, ["commit", "--quiet", "-m", &format!("Number {number}")]).await?;
        }
        git.run(&directory, ["tag", "-a", "-m", "The last", "last"]).await?;
        Ok(directory)
    };
    make.await.map_err(|error: crate::local::git::GitError| error.to_string())
}

/// Looks for processes that are children of this one or whose command line names the directory.
async fn nothing_left(scratch: &Path) -> Result<String, String> {
    let deadline = Instant::now() + VANISH_DEADLINE;
    loop {
        let left = processes_of(scratch);
        if left.is_empty() {
            return Ok("no process of it is left".into());
        }
        if Instant::now() > deadline {
            return Err(left.join(", "));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn processes_of(scratch: &Path) -> Vec<String> {
    let here = std::process::id();
    let scratch = scratch.display().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|pid| *pid != here)
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit(") ").next()?.split(' ');
            let (state, parent) = (fields.next()?, fields.next()?);
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let ours = parent.parse() == Ok(here) || line.contains(&scratch);
            (ours && state != "Z").then(|| format!("{pid} ({})", line.trim()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shallow_checkout_is_committed_afresh_and_a_bare_directory_made_up() {
        let scratch = tempfile::tempdir().unwrap();
        let git = Git::new(&scratch.path().join("home")).unwrap();
        let whole = made_up(&git, scratch.path()).await.unwrap();
        let source = Source::find(&git, &whole, scratch.path()).await.unwrap();
        assert_eq!((source.branch.as_str(), source.ref_count()), ("main", 2));
        assert!(source.description.contains("own; 20 commits"), "{}", source.description);

        let url = format!("file://{}", whole.display());
        git.run(scratch.path(), ["clone", "--quiet", "--depth", "1", &url, "shallow"]).await.unwrap();
        let second = scratch.path().join("second");
        fs::create_dir(&second).unwrap();
        let source = Source::find(&git, &scratch.path().join("shallow"), &second).await.unwrap();
        assert!(source.description.contains("afresh; 1 commit, 1 ref"), "{}", source.description);
        git.run(&source.directory, ["push", "--quiet", &url, "main:refs/heads/afresh"]).await.unwrap();

        let third = scratch.path().join("third");
        fs::create_dir(&third).unwrap();
        let source = Source::find(&git, &third, &third).await.unwrap();
        assert!(source.description.contains("made up; 20 commits"), "{}", source.description);
    }

    #[tokio::test]
    async fn a_detached_head_becomes_a_branch() {
        let scratch = tempfile::tempdir().unwrap();
        let git = Git::new(&scratch.path().join("home")).unwrap();
        let whole = made_up(&git, scratch.path()).await.unwrap();
        git.run(&whole, ["checkout", "--quiet", "--detach", "HEAD~3"]).await.unwrap();
        let source = Source::find(&git, &whole, scratch.path()).await.unwrap();
        assert_eq!(source.branch, "detached-head");
        assert_eq!(source.ref_count(), 3);
        let names: Vec<_> = source.refs.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
        assert!(names.is_sorted(), "{names:?}");
    }
}
