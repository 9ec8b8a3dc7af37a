//! How repositories come into being and go: built under `+gitaly/tmp`, synced to disk, and renamed into place while
//! `<repository>.lock` is held, so that nobody ever sees half of one, also not after a crash. Replicas vote before the rename.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use tabularium_common::lifecycle::Tasks;
use tonic::Status;

use crate::{
    copy_attempts,
    error::{CreationError, RepositoryError, internal_io},
    node::Node,
    records,
    storage::{MAX_DEPTH, RepositoryPath, Storage, check_repository},
    votes::{Ballots, VoteError, Voter, agreed, ballot, made},
};

/// A killed git may still write into a directory that is being removed; so often is it tried again.
const REMOVE_ATTEMPTS: u32 = 5;
/// Between the attempts. Together longer than git gets between SIGTERM and SIGKILL.
const REMOVE_PAUSE: Duration = Duration::from_secs(1);

/// A directory under `+gitaly/tmp`, removed in the background when dropped.
pub(crate) struct Temporary {
    path: PathBuf,
    tasks: Tasks,
}

impl Temporary {
    /// A new, empty one.
    pub(crate) fn new(node: &Node, storage: &Storage, prefix: &str) -> Result<Self, Status> {
        let directory = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(storage.temporary())
            .map_err(internal_io("creating a temporary directory"))?;
        Ok(Self { path: directory.keep(), tasks: node.tasks.clone() })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if tokio::runtime::Handle::try_current().is_err() {
            // The process ends; the next start clears the directory.
            return;
        }
        let path = std::mem::take(&mut self.path);
        self.tasks.spawn("temporary directory", async move {
            for attempt in 1..=REMOVE_ATTEMPTS {
                let target = path.clone();
                match tokio::task::spawn_blocking(move || fs::remove_dir_all(target)).await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return,
                    Ok(Err(error)) if attempt == REMOVE_ATTEMPTS => {
                        tracing::warn!(%error, path = %path.display(), "temporary directory stays");
                    }
                    Ok(Err(_)) => tokio::time::sleep(REMOVE_PAUSE).await,
                    Err(error) => tracing::warn!(%error, "removing a temporary directory"),
                }
            }
        });
    }
}

/// One at a time looks at locks and takes them.
static TAKING: Mutex<()> = Mutex::new(());

/// The exclusive right to create or remove a repository; `<repository>.lock`.
struct Lock(PathBuf);

impl Lock {
    /// Takes the lock. One left by an earlier process of this node is void: the storage's claim says it is dead.
    fn take(repository: &RepositoryPath, instance: &str) -> Result<Self, Status> {
        // Two that find the same void lock must not remove each other's new one.
        let _alone = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        Self::take_alone(repository, instance)
    }

    /// Takes the lock of a repository that is to come into being, in directories that may have to be made.
    fn take_new(repository: &RepositoryPath, instance: &str) -> Result<(Self, Parents), Status> {
        let _alone = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let parents = Parents::create(repository).map_err(internal_io("creating parent directories"))?;
        Ok((Self::take_alone(repository, instance)?, parents))
    }

    fn take_alone(repository: &RepositoryPath, instance: &str) -> Result<Self, Status> {
        let path = repository.lock_file();
        let temporary = repository.storage.temporary();
        let mut content = tempfile::NamedTempFile::new_in(temporary).map_err(internal_io("locking"))?;
        content.write_all(instance.as_bytes()).map_err(internal_io("locking"))?;
        for _ in 0..2 {
            // A link appears with its content, so a lock without one is not ours.
            match fs::hard_link(content.path(), &path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(internal_io("locking")(error)),
            }
            match fs::read_to_string(&path) {
                Ok(holder) if is_instance(&holder) && holder != instance => {
                    fs::remove_file(&path).map_err(internal_io("removing a stale lock"))?;
                }
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(internal_io("locking")(error)),
            }
        }
        Err(Status::failed_precondition("repository is already locked"))
    }
}

fn is_instance(text: &str) -> bool {
    text.parse::<uuid::Uuid>().is_ok()
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::error!(%error, path = %self.0.display(), "a repository's lock stays");
        }
    }
}

/// A repository that is being built.
pub(crate) struct Building {
    target: RepositoryPath,
    repository: RepositoryPath,
    temporary: Temporary,
    instance: String,
}

impl Building {
    /// Starts with an empty repository of the given format. Fails at once when the target is there already.
    pub(crate) async fn begin(
        node: &Node,
        target: &RepositoryPath,
        branch: &str,
        object_format: &str,
    ) -> Result<Self, CreationError> {
        check_vacant(target)?;
        Ok(Self::begin_instead(node, target, branch, object_format).await?)
    }

    /// The same for a target that is there, and whose place it is to take.
    pub(crate) async fn begin_instead(
        node: &Node,
        target: &RepositoryPath,
        branch: &str,
        object_format: &str,
    ) -> Result<Self, Status> {
        let building = Self::beside(node, target)?;
        node.git
            .bare_command("init")
            .args(["--bare", "--quiet", "--template="])
            .arg(format!("--initial-branch={branch}"))
            .arg(format!("--object-format={object_format}"))
            .arg(&building.repository.path)
            .checked()
            .await?;
        Ok(building)
    }

    /// Starts with nothing.
    pub(crate) fn prepare(node: &Node, target: &RepositoryPath) -> Result<Self, CreationError> {
        check_vacant(target)?;
        Ok(Self::beside(node, target)?)
    }

    fn beside(node: &Node, target: &RepositoryPath) -> Result<Self, Status> {
        if !target.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        let temporary = Temporary::new(node, &target.storage, "repository-")?;
        let repository = target.elsewhere(temporary.path().join("repository"));
        Ok(Self { target: target.clone(), repository, temporary, instance: node.instance.clone() })
    }

    /// The repository as git commands want it.
    pub(crate) fn repository(&self) -> &RepositoryPath {
        &self.repository
    }

    /// Where else to put files meanwhile.
    pub(crate) fn scratch(&self) -> &Path {
        self.temporary.path()
    }

    /// Syncs everything and moves it into place. Not cancelled midway.
    pub(crate) async fn publish(self) -> Result<(), CreationError> {
        blocking(move || Ok(self.complete()?.move_in()?)).await
    }

    /// The same, if the replicas agree on what has been built. If they do not, nothing stays.
    pub(crate) async fn publish_agreed(self, node: &Node, voter: &Voter) -> Result<(), CreationError> {
        if !voter.takes_part() {
            let _section = node.sections.enter(&self.target.path).await;
            return self.publish().await;
        }
        self.move_agreed(node, voter, "publishing", Self::complete, Complete::move_in).await
    }

    /// Syncs everything, has `away` take away what is at the target, and moves it there. Not cancelled midway.
    pub(crate) async fn publish_instead(
        self,
        away: impl FnOnce(&RepositoryPath) -> io::Result<()> + Send + 'static,
    ) -> Result<(), Status> {
        blocking(move || {
            check_repository(&self.repository.path)?;
            sync_tree(&self.repository.path).map_err(internal_io("syncing the repository"))?;
            let lock = Lock::take(&self.target, &self.instance)?;
            check_holds_no_others(&self.target)?;
            away(&self.target).map_err(internal_io("moving a corrupt replica aside"))?;
            Complete { building: self, _lock: lock, parents: Parents(Vec::new()) }.move_in()
        })
        .await
    }

    /// The same over a repository that is there, in one step; what the node has noted beside that one stays.
    pub(crate) async fn take_over_agreed(self, node: &Node, voter: &Voter) -> Result<(), Status> {
        self.move_agreed(node, voter, "taking over", Self::succeed, Successor::take_over).await
    }

    /// Has what has been built made `ready`, and moved when the replicas agree on it. Not cancelled midway.
    async fn move_agreed<Ready, Error>(
        self,
        node: &Node,
        voter: &Voter,
        doing: &'static str,
        ready: fn(Self) -> Result<Ready, Error>,
        go: fn(Ready) -> Result<(), Status>,
    ) -> Result<(), Error>
    where
        Ready: Send + 'static,
        Error: From<Status> + From<VoteError> + Send + 'static,
    {
        let built = self.repository.path.clone();
        let reading = blocking(move || made::on_files(&built).map_err(internal_io("reading the repository")));
        let ballot = reading.await?;
        let (sections, voter) = (Arc::clone(&node.sections), voter.clone());
        let moving = node.tasks.spawn(doing, async move {
            let target = self.target.path.clone();
            let ready = blocking(move || ready(self)).await?;
            let going = blocking(move || Ok(go(ready)?));
            agreed(&sections, &voter, &target, ballot.into(), going).await
        });
        moving.await.unwrap_or_else(|error| Err(Status::internal(format!("{doing}: {error}")).into()))
    }

    fn succeed(self) -> Result<Successor, Status> {
        check_repository(&self.repository.path)?;
        sync_tree(&self.repository.path).map_err(internal_io("syncing the repository"))?;
        let lock = Lock::take(&self.target, &self.instance)?;
        check_holds_no_others(&self.target)?;
        Ok(Successor { building: self, _lock: lock })
    }

    fn complete(self) -> Result<Complete, CreationError> {
        check_repository(&self.repository.path).map_err(Status::from)?;
        sync_tree(&self.repository.path).map_err(internal_io("syncing the repository"))?;
        let (lock, parents) = Lock::take_new(&self.target, &self.instance)?;
        check_vacant(&self.target)?;
        Ok(Complete { building: self, _lock: lock, parents })
    }
}

/// A repository that is on disk and has only to be moved into place, which is free and stays so.
struct Complete {
    building: Building,
    // Before its directory.
    _lock: Lock,
    parents: Parents,
}

impl Complete {
    fn move_in(mut self) -> Result<(), Status> {
        let (from, to) = (&self.building.repository.path, &self.building.target.path);
        fs::rename(from, to)
            .and_then(|()| sync_parent(to))
            .map_err(internal_io("moving the repository into place"))?;
        self.parents.0.clear();
        Ok(())
    }
}

/// A repository that is on disk and is to take the place of another one.
struct Successor {
    building: Building,
    // Before its directory.
    _lock: Lock,
}

impl Successor {
    fn take_over(self) -> Result<(), Status> {
        let (from, to) = (&self.building.repository.path, &self.building.target.path);
        let taking_over = || {
            for noted in [records::FILE, copy_attempts::FILE] {
                match fs::copy(to.join(noted), from.join(noted)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                    Ok(_) => File::open(from.join(noted))?.sync_all()?,
                }
            }
            File::open(from)?.sync_all()?;
            exchange(from, to, &self.building.scratch().join("replaced"))
        };
        taking_over().map_err(internal_io("moving the repository into place"))
    }
}

/// Directories made for a repository. When this is dropped they go, as far as nothing else has come into them.
struct Parents(Vec<PathBuf>);

impl Parents {
    fn create(target: &RepositoryPath) -> io::Result<Self> {
        let mut missing = Self(Vec::new());
        let Some(parent) = target.path.parent() else { return Ok(missing) };
        let mut directory = parent;
        while !directory.is_dir() {
            missing.0.push(directory.to_owned());
            match directory.parent() {
                Some(next) => directory = next,
                None => break,
            }
        }
        fs::create_dir_all(parent)?;
        missing.0.iter().try_for_each(|directory| sync_parent(directory))?;
        Ok(missing)
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        if self.0.is_empty() {
            return;
        }
        // Whoever has just found one of them there takes its lock first.
        let _alone = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        for directory in &self.0 {
            // Not empty: somebody else needs it.
            if fs::remove_dir(directory).is_err() {
                return;
            }
        }
    }
}

fn check_vacant(target: &RepositoryPath) -> Result<(), CreationError> {
    if target.path.symlink_metadata().is_ok() {
        return Err(CreationError::Exists);
    }
    let mut parent = target.path.parent();
    while let Some(directory) = parent.filter(|directory| *directory != target.storage.root) {
        if check_repository(directory).is_ok() {
            return Err(CreationError::InsideAnother);
        }
        parent = directory.parent();
    }
    Ok(())
}

/// Moves the repository out of the way, if the replicas agree, and deletes it in the background.
pub(crate) async fn remove_agreed(node: &Node, target: RepositoryPath, voter: &Voter) -> Result<(), Status> {
    let about = |step: &str| ballot(format!("{step} {}", target.relative_path).as_bytes());
    let ballots = Ballots { before: about("pre-remove"), after: about("post-remove") };
    let (sections, voter, path) = (Arc::clone(&node.sections), voter.clone(), target.path.clone());
    let condemned = Condemned::new(node, target)?;
    let removing = node.tasks.spawn("removing", async move {
        let locked = blocking(move || condemned.lock()).await?;
        agreed(&sections, &voter, &path, ballots, blocking(move || locked.move_out())).await
    });
    removing.await.unwrap_or_else(|error| Err(Status::internal(format!("removing: {error}"))))
}

/// A repository that is to go.
struct Condemned {
    target: RepositoryPath,
    grave: Temporary,
    instance: String,
    lock: Option<Lock>,
}

impl Condemned {
    fn new(node: &Node, target: RepositoryPath) -> Result<Self, Status> {
        let name =
            target.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let grave = Temporary::new(node, &target.storage, &format!("{name}+removed-"))?;
        Ok(Self { target, grave, instance: node.instance.clone(), lock: None })
    }

    fn absent() -> Status {
        Status::not_found("repository does not exist")
    }

    fn lock(mut self) -> Result<Self, Status> {
        let target = &self.target;
        if !target.path.is_dir() {
            return Err(Self::absent());
        }
        check_holds_no_others(target)?;
        self.lock = Some(Lock::take(target, &self.instance)?);
        Ok(self)
    }

    fn move_out(self) -> Result<(), Status> {
        match fs::rename(&self.target.path, self.grave.path().join("repo")) {
            Ok(()) => sync_parent(&self.target.path).map_err(internal_io("removing the repository")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Self::absent()),
            Err(error) => Err(internal_io("removing the repository")(error)),
        }
    }
}

/// What is no repository may be a directory of repositories.
fn check_holds_no_others(target: &RepositoryPath) -> Result<(), Status> {
    if check_repository(&target.path).is_err() && holds_repository(&target.path, 0) {
        return Err(Status::failed_precondition("not a repository, but a directory of repositories"));
    }
    Ok(())
}

/// Whether a repository lies somewhere below the directory. What cannot be looked at may be one.
fn holds_repository(directory: &Path, depth: usize) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return true };
    entries.into_iter().any(|entry| {
        let Ok(entry) = entry else { return true };
        match entry.file_type() {
            Ok(kind) if !kind.is_dir() => false,
            Ok(_) if depth < MAX_DEPTH => {
                check_repository(&entry.path()).is_ok() || holds_repository(&entry.path(), depth + 1)
            }
            Ok(_) | Err(_) => true,
        }
    })
}

/// Runs file-system work where blocking is allowed. It runs to its end even when the caller goes away.
pub(crate) async fn blocking<T: Send + 'static, Error: From<Status> + Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // Logs inside keep the caller's span, and drops inside may still start tasks.
    let span = tracing::Span::current();
    let joined = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    joined.unwrap_or_else(|error| Err(Status::internal(format!("file-system work: {error}")).into()))
}

/// Puts the directory `from` in the place of the one at `to`, in one durable step. That one goes to `from`, or to `aside` on a
/// file system that cannot exchange two names; there, for a moment, nothing is at `to`.
pub(crate) fn exchange(from: &Path, to: &Path, aside: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::rename(to, aside)?;
            fs::rename(from, to)?;
        }
        exchanged => exchanged?,
    }
    sync_parent(to)
}

/// Makes a name in the file's directory durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Makes a directory and everything below it durable.
pub(crate) fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

/// Replaces a file of a repository in one durable step.
pub(crate) fn replace_file(repository: &RepositoryPath, name: &str, content: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(repository.storage.temporary())?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    let path = repository.path.join(name);
    file.persist(&path)?;
    sync_parent(&path)
}
