//! Clients that push and list without end, each in its own way.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};
use tabularium_cli::local::git::Git;
use tabularium_common::lifecycle::Tasks;
use tokio::time::Instant;

use crate::{
    history::{self, Event, Outcome, Recorder, Value},
    push::{self, Destination, Wish},
};

/// After an answer that was an error, so that a cluster that is down is not also stormed.
const AFTER_ERROR: Duration = Duration::from_millis(100);
/// Between two pushes to cold repositories by one client.
const COLD_PAUSE: Duration = Duration::from_millis(700);
/// Between two reads by one client.
const READ_PAUSE: Duration = Duration::from_millis(60);
/// Now and then a push brings a file of this size that does not compress, so that it is under way for a while.
const LARGE_BYTES: usize = 2 << 20;
/// So many references come in one push that is not atomic: each is voted on for itself, so that it is under way for long.
const MANY: usize = 16;
/// Branches that a hook refuses begin so.
pub(crate) const REFUSED: &str = "refs/heads/refused-";

/// A repository that clients write to. They share one object store, so that no push waits for a fetch.
pub(crate) struct Tested {
    pub(crate) path: String,
    pub(crate) hot: bool,
    /// A hook of it refuses branches that say so in their names.
    pub(crate) refuses: bool,
    pub(crate) store: PathBuf,
    pub(crate) tree: String,
    /// What each ref was when it was last heard of. Only a guess: the server compares.
    known: Mutex<BTreeMap<String, String>>,
}

impl Tested {
    pub(crate) async fn new(git: &Git, directory: &Path, path: &str, hot: bool) -> Result<Self> {
        let store = directory.join(path);
        push::local(git, directory, &["init", "--quiet", "--bare", path], b"").await?;
        let tree = push::local(git, &store, &["mktree"], b"").await?;
        Ok(Self { path: path.to_owned(), hot, refuses: false, store, tree, known: Mutex::default() })
    }

    fn known(&self, reference: &str) -> Value {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(reference).cloned()
    }

    fn learn(&self, reference: &str, value: &Value) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Some(value) => known.insert(reference.to_owned(), value.clone()),
            None => known.remove(reference),
        };
    }
}

/// What all clients share.
pub(crate) struct Clients {
    pub(crate) git: Git,
    /// `http://host:port` each.
    pub(crate) gateways: Vec<String>,
    pub(crate) repositories: Vec<Tested>,
    pub(crate) recorder: Arc<Recorder>,
    /// So many of 256 pushes bring many references.
    many: u8,
    commits: AtomicU64,
}

impl Clients {
    pub(crate) fn new(
        git: Git,
        gateways: Vec<String>,
        repositories: Vec<Tested>,
        recorder: Arc<Recorder>,
        many: u8,
    ) -> Self {
        Self { git, gateways, repositories, recorder, many, commits: AtomicU64::new(0) }
    }

    /// Starts `writers` for hot repositories, half as many for cold ones, and `readers`. They end when told to, after the
    /// push that they are at.
    pub(crate) fn start(self: &Arc<Self>, writers: u64, readers: u64, seed: u64) -> Tasks {
        let tasks = Tasks::new();
        let mut next_seed = seed;
        let mut random = || {
            next_seed = next_seed.wrapping_add(1);
            StdRng::seed_from_u64(next_seed)
        };
        for number in 0..writers {
            let mut client = Client::new(self, format!("writer-{number}"), random());
            // Each repository is written through every gateway, by somebody who does not wait for another one.
            let hot = self.repositories.iter().filter(|repository| repository.hot).count();
            client.own_gateway = Some(usize::try_from(number).unwrap_or(0) / hot % self.gateways.len());
            tasks.spawn("writer", client.write_hot(number, tasks.stopping()));
        }
        for number in 0..writers.div_ceil(2) {
            let client = Client::new(self, format!("cold-{number}"), random());
            tasks.spawn("cold writer", client.write_cold(tasks.stopping()));
        }
        for number in 0..readers {
            let client = Client::new(self, format!("reader-{number}"), random());
            tasks.spawn("reader", client.read_all(tasks.stopping()));
        }
        tasks
    }
}

/// How long a write may take when nothing is wrong any more.
const CLOSING_WITHIN: Duration = Duration::from_secs(30);

impl Clients {
    /// One more push to each repository, when the others have ended: everything has to work again. Answers where it does
    /// not.
    pub(crate) async fn close(self: &Arc<Self>, seed: u64) -> Result<Vec<String>> {
        let mut client = Client::new(self, "closing".to_owned(), StdRng::seed_from_u64(seed));
        let mut unusable = Vec::new();
        for repository in &self.repositories {
            let began = Instant::now();
            let reference = "refs/heads/closing";
            while repository.known(reference).is_none() && began.elapsed() < CLOSING_WITHIN {
                let wish = client.wish(repository, reference.to_owned(), true).await?;
                client.push(repository, &[wish], false).await?;
            }
            if repository.known(reference).is_none() {
                unusable.push(repository.path.clone());
            }
        }
        Ok(unusable)
    }
}

struct Client {
    shared: Arc<Clients>,
    name: String,
    random: StdRng,
    /// Else it takes one or another.
    own_gateway: Option<usize>,
}

/// What a client tells when it cannot go on: the session is worth nothing then.
fn give_up(name: &str, error: &anyhow::Error) {
    tracing::error!(client = name, "{error:#}");
}

type Stopping = tokio_util::sync::CancellationToken;

impl Client {
    fn new(shared: &Arc<Clients>, name: String, random: StdRng) -> Self {
        Self { shared: Arc::clone(shared), name, random, own_gateway: None }
    }

    async fn write_hot(mut self, number: u64, stopping: Stopping) {
        let shared = Arc::clone(&self.shared);
        let hot: Vec<_> = shared.repositories.iter().filter(|repository| repository.hot).collect();
        let repository = hot[usize::try_from(number).unwrap_or(0) % hot.len()];
        while !stopping.is_cancelled() {
            if let Err(error) = self.write(repository).await {
                return give_up(&self.name, &error);
            }
        }
    }

    async fn write_cold(mut self, stopping: Stopping) {
        let shared = Arc::clone(&self.shared);
        let cold: Vec<_> = shared.repositories.iter().filter(|repository| !repository.hot).collect();
        let refusing = cold.iter().position(|repository| repository.refuses);
        while !stopping.is_cancelled() {
            // What is refused is to be seen as well, so that is asked for more often.
            let chosen = refusing.filter(|_| self.random.random_ratio(1, 4));
            let repository = cold[chosen.unwrap_or_else(|| self.random.random_range(0..cold.len()))];
            if let Err(error) = self.write(repository).await {
                return give_up(&self.name, &error);
            }
            tokio::time::sleep(COLD_PAUSE).await;
        }
    }

    async fn read_all(mut self, stopping: Stopping) {
        let shared = Arc::clone(&self.shared);
        while !stopping.is_cancelled() {
            // Mostly where much is written: there a stale answer would be seen.
            let hot = self.random.random_ratio(3, 4);
            let repositories: Vec<_> =
                shared.repositories.iter().filter(|repository| repository.hot == hot).collect();
            let repository = repositories[self.random.random_range(0..repositories.len())];
            match self.read(repository).await {
                Ok(true) => tokio::time::sleep(READ_PAUSE).await,
                Ok(false) => tokio::time::sleep(AFTER_ERROR).await,
                Err(error) => return give_up(&self.name, &error),
            }
        }
    }

    fn gateway(&mut self) -> usize {
        self.own_gateway.unwrap_or_else(|| self.random.random_range(0..self.shared.gateways.len()))
    }

    /// One push of a kind that chance chooses, and a look when it was not done.
    async fn write(&mut self, repository: &Tested) -> Result<()> {
        let (name, kind) = (self.name.clone(), self.random.random());
        let own = |branch: &str| format!("refs/heads/{name}/{branch}");
        if repository.refuses && self.random.random_bool(0.5) {
            let wish = self.wish(repository, format!("{REFUSED}{name}"), false).await?;
            return self.push(repository, &[wish], false).await;
        }
        if self.random.random_ratio(self.shared.many.into(), 256) {
            let wishes = self.many(repository, &own("many")).await?;
            return self.push(repository, &wishes, false).await;
        }
        let (wishes, atomic) = match kind {
            0_u8..=99 => (vec![self.wish(repository, own("main"), true).await?], false),
            // Everybody's: of those who push at once one wins.
            100..=149 => (vec![self.wish(repository, "refs/heads/shared".into(), false).await?], false),
            150..=174 => (vec![self.rewrite(repository, "refs/heads/rewritten".into()).await?], false),
            175..=199 => (vec![self.come_and_go(repository, own("topic")).await?], false),
            // Both halves are new, or one of them competes.
            200..=229 => {
                let one = self.wish(repository, own("left"), true).await?;
                (vec![one, self.wish(repository, own("right"), true).await?], true)
            }
            _ => {
                let one = self.wish(repository, own("release"), true).await?;
                (vec![one, self.wish(repository, "refs/heads/shared".into(), false).await?], true)
            }
        };
        self.push(repository, &wishes, atomic).await
    }

    async fn push(&mut self, repository: &Tested, wishes: &[Wish], atomic: bool) -> Result<()> {
        let gateway = self.gateway();
        let destination = Destination {
            git: &self.shared.git,
            store: &repository.store,
            recorder: &self.shared.recorder,
            client: &self.name,
            gateway,
            gateway_url: &self.shared.gateways[gateway],
            repository: &repository.path,
        };
        let write = destination.push(wishes, atomic).await?;
        let done = write.updates.iter().all(|update| update.outcome == Outcome::Acknowledged);
        for update in write.updates.iter().filter(|update| update.outcome == Outcome::Acknowledged) {
            repository.learn(&update.reference, &update.new);
        }
        let failed = write.error.is_some();
        self.shared.recorder.record(&Event::Write(write))?;
        if failed {
            tokio::time::sleep(AFTER_ERROR).await;
        }
        if !done {
            // What is there now decides what is pushed next. When that cannot be read either, the guess stays.
            self.read(repository).await?;
        }
        Ok(())
    }

    /// Answers whether it succeeded.
    async fn read(&mut self, repository: &Tested) -> Result<bool> {
        let gateway = self.gateway();
        let url = format!("{}/{}", self.shared.gateways[gateway], repository.path);
        let invoked = self.shared.recorder.now();
        let answer = push::list(&self.shared.git, &repository.store, &url).await?;
        let completed = self.shared.recorder.now();
        let (refs, said) = match answer {
            Ok(refs) => {
                *repository.known.lock().unwrap_or_else(PoisonError::into_inner) = refs.clone();
                (Some(refs), String::new())
            }
            Err(said) => (None, said),
        };
        let succeeded = refs.is_some();
        self.shared.recorder.record(&Event::Read(history::Read {
            client: self.name.clone(),
            gateway,
            repository: repository.path.clone(),
            invoked,
            completed,
            refs,
            said,
        }))?;
        Ok(succeeded)
    }

    /// A commit on top of what is known.
    async fn wish(&mut self, repository: &Tested, reference: String, lease: bool) -> Result<Wish> {
        let old = repository.known(&reference);
        let new = Some(self.commit(repository, old.as_deref()).await?);
        Ok(Wish { reference, old, new, lease })
    }

    /// New branches, each of which is decided for itself, and that nobody changes later.
    async fn many(&mut self, repository: &Tested, prefix: &str) -> Result<Vec<Wish>> {
        let mut wishes = Vec::with_capacity(MANY);
        for number in 0..MANY {
            let new = self.commit(repository, None).await?;
            let reference = format!("{prefix}/{number}-{}", &new[..10]);
            wishes.push(Wish { reference, old: None, new: Some(new), lease: true });
        }
        Ok(wishes)
    }

    /// Another history in place of what is known.
    async fn rewrite(&mut self, repository: &Tested, reference: String) -> Result<Wish> {
        let old = repository.known(&reference);
        Ok(Wish { reference, old, new: Some(self.commit(repository, None).await?), lease: true })
    }

    /// Creates the branch when it is not there, deletes it when it is.
    async fn come_and_go(&mut self, repository: &Tested, reference: String) -> Result<Wish> {
        match repository.known(&reference) {
            None => self.wish(repository, reference, true).await,
            old => Ok(Wish { reference, old, new: None, lease: true }),
        }
    }

    /// A commit that nobody else makes.
    async fn commit(&mut self, repository: &Tested, parent: Option<&str>) -> Result<String> {
        let number = self.shared.commits.fetch_add(1, Ordering::Relaxed);
        let tree = if self.random.random_ratio(1, 40) {
            self.large_tree(repository).await?
        } else {
            repository.tree.clone()
        };
        let message = format!("{} {number}", self.name);
        let mut arguments = vec!["commit-tree", "-m", &message];
        if let Some(parent) = parent {
            arguments.extend(["-p", parent]);
        }
        arguments.push(&tree);
        push::local(&self.shared.git, &repository.store, &arguments, b"").await
    }

    async fn large_tree(&mut self, repository: &Tested) -> Result<String> {
        let mut content = vec![0; LARGE_BYTES];
        self.random.fill_bytes(&mut content);
        let git = &self.shared.git;
        let blob = push::local(git, &repository.store, &["hash-object", "-w", "--stdin"], &content).await?;
        push::local(git, &repository.store, &["mktree"], format!("100644 blob {blob}\tlarge\n").as_bytes())
            .await
    }
}
