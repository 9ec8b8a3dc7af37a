//! What git leaves to the file system: it syncs the files it writes (`core.fsync`), but not the directories it renames
//! them into. Until those are on disk a power cut can undo an update that was acknowledged.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::leftovers::TIMESTAMP_LAG;

/// Makes every name that was given or taken in the repository since then durable.
pub(crate) fn sync_changed(repository: &Path, since: SystemTime) -> io::Result<()> {
    for directory in changed(repository, since)? {
        if let Some(directory) = unless_gone(File::open(directory))? {
            directory.sync_all()?;
        }
    }
    Ok(())
}

/// Directories that git writes into and that have changed, the inner ones first.
fn changed(repository: &Path, since: SystemTime) -> io::Result<Vec<PathBuf>> {
    let since = since - TIMESTAMP_LAG;
    let mut found = Vec::new();
    let objects = repository.join("objects");
    for directory in directories(&objects)? {
        // Of a push that is not accepted yet; what comes of it is renamed into the others.
        if !is_incoming(&directory) {
            look(&directory, since, &mut found)?;
        }
    }
    look(&objects.join("info/commit-graphs"), since, &mut found)?;
    look(&objects, since, &mut found)?;
    walk(&repository.join("refs"), since, &mut found)?;
    look(repository, since, &mut found)?;
    Ok(found)
}

fn is_incoming(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tmp_objdir-"))
}

fn walk(directory: &Path, since: SystemTime, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for inner in directories(directory)? {
        walk(&inner, since, found)?;
    }
    look(directory, since, found)
}

fn look(directory: &Path, since: SystemTime, found: &mut Vec<PathBuf>) -> io::Result<()> {
    if let Some(metadata) = unless_gone(fs::metadata(directory))?
        && metadata.modified()? >= since
    {
        found.push(directory.to_owned());
    }
    Ok(())
}

fn directories(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let Some(entries) = unless_gone(fs::read_dir(directory))? else { return Ok(found) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Git removes directories that became empty.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn directories_that_changed_are_found_and_no_others() {
        let repository = tempfile::tempdir().unwrap();
        let root = repository.path();
        for path in ["refs/heads/a", "refs/tags", "objects/ab", "objects/pack", "objects/tmp_objdir-x/pack"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        let age = |path: &Path| {
            let past = SystemTime::now() - Duration::from_secs(60);
            File::open(path).unwrap().set_modified(past).unwrap();
        };
        let all =
            ["refs/heads/a", "refs/heads", "refs/tags", "refs", "objects/ab", "objects/pack", "objects"];
        for path in all {
            age(&root.join(path));
        }
        age(root);
        let since = SystemTime::now();
        assert_eq!(changed(root, since).unwrap(), Vec::<PathBuf>::new());
        fs::write(root.join("refs/heads/a/b"), "").unwrap();
        fs::write(root.join("objects/pack/p.idx"), "").unwrap();
        fs::write(root.join("packed-refs"), "").unwrap();
        let mut found = changed(root, since).unwrap();
        found.sort();
        assert_eq!(found, [root.to_owned(), root.join("objects/pack"), root.join("refs/heads/a")]);
        sync_changed(root, since).unwrap();
        fs::remove_dir_all(root.join("refs")).unwrap();
        sync_changed(root, since).unwrap();
    }
}
