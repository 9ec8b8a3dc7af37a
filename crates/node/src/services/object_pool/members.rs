//! Who has been linked to which pool. It stands beside the storage's repositories and not in the pool, which may be made anew.
//!
//! A member is noted before it borrows anything and may be noted longer than it does: what counts is its own word.

use std::{fs, io, path::PathBuf};

use sha1::{Digest as _, Sha1};

use super::alternates;
use crate::storage::RepositoryPath;

/// A directory that is named after the pool, with a file for each member.
fn directory(pool: &RepositoryPath) -> PathBuf {
    pool.storage.pool_members().join(hex::encode(Sha1::digest(pool.relative_path.as_bytes())))
}

/// Notes a member.
pub(super) fn note(pool: &RepositoryPath, member: &RepositoryPath) -> io::Result<()> {
    let directory = directory(pool);
    fs::create_dir_all(&directory)?;
    let file = directory.join(hex::encode(Sha1::digest(member.relative_path.as_bytes())));
    fs::write(&file, &member.relative_path)?;
    fs::File::open(&file)?.sync_all()?;
    crate::place::sync_parent(&file)?;
    crate::place::sync_parent(&directory)?;
    crate::place::sync_parent(&pool.storage.pool_members())
}

/// Those that borrow from the pool.
pub(super) fn of(pool: &RepositoryPath) -> io::Result<Vec<RepositoryPath>> {
    let entries = match fs::read_dir(directory(pool)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let objects = pool.path.join("objects");
    let mut members = Vec::new();
    for entry in entries {
        let relative_path = fs::read_to_string(entry?.path())?;
        let path = pool.storage.root.join(&relative_path);
        let lines = alternates::read(&path)?.unwrap_or_default();
        if lines.iter().any(|line| alternates::resolve(&path, line) == objects) {
            members.push(RepositoryPath {
                storage: pool.storage.clone(),
                relative_path,
                path,
                quarantine: None,
            });
        }
    }
    Ok(members)
}

/// Forgets all members of a pool.
pub(super) fn forget(pool: &RepositoryPath) -> io::Result<()> {
    match fs::remove_dir_all(directory(pool)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Storage;

    #[test]
    fn whoever_says_so_itself_is_a_member() {
        let directory = tempfile::tempdir().unwrap();
        let storage =
            Storage { name: "s".into(), root: directory.path().to_owned(), filesystem_id: String::new() };
        let at = |relative_path: &str| RepositoryPath {
            storage: storage.clone(),
            relative_path: relative_path.to_owned(),
            path: directory.path().join(relative_path),
            quarantine: None,
        };
        fs::create_dir_all(storage.temporary()).unwrap();
        let (pool, one, other) = (at("pool"), at("one"), at("other"));
        assert_eq!(of(&pool).unwrap(), []);
        for member in [&one, &other] {
            fs::create_dir_all(member.path.join("objects")).unwrap();
            note(&pool, member).unwrap();
        }
        note(&pool, &at("gone")).unwrap();
        alternates::write(&one, &alternates::line(&one.path, &pool.path)).unwrap();
        assert_eq!(of(&pool).unwrap(), [one]);
        forget(&pool).unwrap();
        assert_eq!(of(&pool).unwrap(), []);
    }
}
