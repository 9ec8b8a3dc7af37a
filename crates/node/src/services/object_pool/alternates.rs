//! The file by which a repository says whose objects it borrows.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use crate::{place::replace_file, storage::RepositoryPath};

/// Below a repository.
const FILE: &str = "objects/info/alternates";

/// What the file says, as it stands there; `None` if the repository borrows nothing.
pub(crate) fn read(repository: &Path) -> io::Result<Option<Vec<String>>> {
    let text = match fs::read_to_string(repository.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let lines: Vec<String> =
        text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect();
    Ok((!lines.is_empty()).then_some(lines))
}

/// The object directory that a line of the file means.
pub(crate) fn resolve(repository: &Path, line: &str) -> PathBuf {
    normal(&repository.join("objects").join(line))
}

/// Without `.` and `..`. Links are not followed: the paths are the node's own.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

/// How a member names the object directory of a pool: the way from its own one.
pub(super) fn line(member: &Path, pool: &Path) -> String {
    let (from, to) = (member.join("objects"), pool.join("objects"));
    let (mut from_parts, mut to_parts) = (from.components().peekable(), to.components().peekable());
    while from_parts.peek().is_some() && from_parts.peek() == to_parts.peek() {
        from_parts.next();
        to_parts.next();
    }
    let up = from_parts.map(|_| "..".to_owned());
    let down = to_parts.map(|part| part.as_os_str().to_string_lossy().into_owned());
    up.chain(down).collect::<Vec<_>>().join("/")
}

/// Has the repository borrow from there. No line end: this is what is voted on.
pub(super) fn write(repository: &RepositoryPath, line: &str) -> io::Result<()> {
    match fs::create_dir(repository.path.join("objects/info")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    replace_file(repository, FILE, line.as_bytes())
}

/// From now on the repository borrows nothing.
pub(super) fn remove(repository: &Path) -> io::Result<()> {
    let file = repository.join(FILE);
    match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => crate::place::sync_parent(&file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lead_from_a_member_to_its_pool() {
        let (member, pool) = (Path::new("/s/@hashed/aa/bb/c.git"), Path::new("/s/@pools/dd/ee/f.git"));
        let line = line(member, pool);
        assert_eq!(line, "../../../../../@pools/dd/ee/f.git/objects");
        assert_eq!(resolve(member, &line), Path::new("/s/@pools/dd/ee/f.git/objects"));
        assert_eq!(resolve(member, "/elsewhere/objects"), Path::new("/elsewhere/objects"));
    }

    #[test]
    fn files_without_lines_lend_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(directory.path()).unwrap(), None);
        fs::create_dir_all(directory.path().join("objects/info")).unwrap();
        for (text, lines) in [("", None), ("# no\n\n", None), ("a\n#\nb", Some(vec!["a".into(), "b".into()]))]
        {
            fs::write(directory.path().join(FILE), text).unwrap();
            assert_eq!(read(directory.path()).unwrap(), lines);
        }
        remove(directory.path()).unwrap();
        remove(directory.path()).unwrap();
        assert_eq!(read(directory.path()).unwrap(), None);
    }
}
