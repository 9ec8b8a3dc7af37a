//! The power is cut at any moment of a push that is followed without git: what is on disk then is whole, and after the
//! last moment it has the push.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    agreement::{Files, Step, World, git, migrate, pack, pair},
    in_process, moving,
    opening::Command,
};
use crate::git::{
    durable::synced::{Synced, log},
    leftovers::Writers,
};

/// What is on disk for good: only what was there before, and what was synced since.
struct Disk {
    root: PathBuf,
    names: BTreeMap<PathBuf, Vec<(OsString, u64)>>,
    contents: HashMap<u64, Vec<u8>>,
    directories: HashMap<u64, PathBuf>,
}

impl Disk {
    /// All of what is there now is on disk.
    fn of(root: &Path) -> Self {
        let mut disk = Self {
            root: root.to_owned(),
            names: BTreeMap::new(),
            contents: HashMap::new(),
            directories: HashMap::new(),
        };
        disk.look(root, true);
        disk
    }

    /// Files are on disk if `for_good`; where directories are is known in any case.
    fn look(&mut self, directory: &Path, for_good: bool) {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let (path, inode) = (entry.path(), entry.metadata().unwrap().ino());
            names.push((entry.file_name(), inode));
            if path.is_dir() {
                self.directories.insert(inode, path.clone());
                self.look(&path, for_good);
            } else if for_good {
                self.contents.insert(inode, fs::read(&path).unwrap());
            }
        }
        if for_good {
            self.names.insert(directory.to_owned(), names);
        }
    }

    fn sync(&mut self, synced: &Synced) {
        match synced {
            Synced::File { inode, content } => drop(self.contents.insert(*inode, content.clone())),
            Synced::Directory { path, names } if path.starts_with(&self.root) => {
                self.names.insert(path.clone(), names.clone());
            }
            Synced::Directory { .. } => {}
        }
    }

    /// What is found when the power is back.
    fn found(&self) -> tempfile::TempDir {
        let found = tempfile::tempdir().unwrap();
        self.lay(&self.root, found.path());
        found
    }

    fn lay(&self, directory: &Path, at: &Path) {
        for (name, inode) in self.names.get(directory).into_iter().flatten() {
            let at = at.join(name);
            if let Some(inner) = self.directories.get(inode) {
                fs::create_dir(&at).unwrap();
                self.lay(inner, &at);
            } else {
                // Nothing of one that was not synced.
                fs::write(&at, self.contents.get(inode).map_or(&[][..], Vec::as_slice)).unwrap();
            }
        }
    }
}

fn branch(repository: &Path) -> String {
    assert!(git(repository, None, &["fsck", "--strict", "--no-dangling"], b"").is_some(), "is whole");
    git(repository, None, &["rev-parse", "refs/heads/main"], b"").unwrap().trim().to_owned()
}

#[test]
fn whenever_the_power_is_cut_what_is_found_is_whole() {
    for new_branch in [false, true] {
        let mut world = World::default();
        let files = Files::from([("z".to_owned(), "z".to_owned())]);
        let root = world.commit(&files, &[]);
        let mut main = (files, root);
        let other = main.clone();
        world.follow(&Step::Write(4, 1, 1), &mut main, &other);
        let base = world.closure(&[root]);
        let sent = world.closure(&[main.1]).difference(&base).copied().collect::<Vec<_>>();
        let pack = pack(&world.get(sent), &[], false);
        let pair = pair(&world, [root, root], &[], false);
        let repository = &pair.repositories[0];
        let (name, old) = if new_branch {
            (&b"refs/heads/a/b/c"[..], gix_hash::ObjectId::null(gix_hash::Kind::Sha1))
        } else {
            (&b"refs/heads/main"[..], root)
        };
        let command = Command::of(name, old, main.1);

        let (mut disk, began) = (Disk::of(repository), log().len());
        let quarantine = tempfile::tempdir().unwrap();
        let taken_in = in_process::take_in(repository, quarantine.path(), &command, None, &pack).unwrap();
        assert!(taken_in.connected && taken_in.nameable);
        migrate(quarantine.path(), repository);
        let writers: Arc<Writers> = Arc::default();
        let locked = moving::lock(repository, &command, writers.enter(repository)).unwrap();
        let prepared = log().len();
        locked.apply().unwrap();
        let log = log();

        disk.look(repository, false);
        let ours = |synced: &&Synced| match synced {
            Synced::File { .. } => true,
            Synced::Directory { path, .. } => path.starts_with(repository),
        };
        let mut is_old = |synced: &Synced| {
            // Other names are found only when a directory has been synced.
            if matches!(synced, Synced::Directory { .. }) {
                assert_eq!(branch(disk.found().path()), root.to_string());
            }
            disk.sync(synced);
        };
        log[began..prepared].iter().filter(ours).for_each(&mut is_old);
        // The reference may be on disk by itself as soon as it has moved.
        let found = disk.found();
        fs::write(found.path().join("refs/heads/main"), format!("{}\n", main.1)).unwrap();
        assert_eq!(branch(found.path()), main.1.to_string());
        log[prepared..].iter().filter(ours).for_each(|synced| disk.sync(synced));
        let found = disk.found();
        git(found.path(), None, &["fsck", "--strict"], b"").unwrap();
        let name = std::str::from_utf8(name).unwrap();
        let value = git(found.path(), None, &["rev-parse", name], b"").unwrap();
        assert_eq!(value.trim(), main.1.to_string(), "{new_branch}");
    }
}
