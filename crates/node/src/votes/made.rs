//! The vote on a repository that has been built and is still to be moved into its place.
//!
//! It is what Gitaly 16 votes on: all files but the objects, and but `FETCH_HEAD`, which names where they came from, one behind the
//! other in the order of a walk by name. Gitaly 19 votes on its settings and references instead.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    path::Path,
};

use sha1::{Digest as _, Sha1};

use super::Ballot;

/// Read of a file at once.
const CHUNK: usize = 64 * 1024;
/// How files of our own begin, which no other node has.
const OWN: &[u8] = b"tabularium-";

/// The vote on the repository in `directory`.
pub(crate) fn on_files(directory: &Path) -> io::Result<Ballot> {
    let mut digest = Sha1::new();
    walk(directory, true, &mut digest)?;
    Ok(digest.finalize().into())
}

fn is_left_out(name: &OsStr) -> bool {
    name == "objects" || name == "FETCH_HEAD" || name.as_encoded_bytes().starts_with(OWN)
}

fn walk(directory: &Path, top: bool, digest: &mut Sha1) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries.into_iter().filter(|entry| !top || !is_left_out(&entry.file_name())) {
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), false, digest)?;
            continue;
        }
        let mut file = fs::File::open(entry.path())?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                length => digest.update(&chunk[..length]),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_but_objects_count_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let write = |path: &str, content: &str| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        write("refs/heads/main", "3");
        write("refs/heads-of-others", "4");
        write("HEAD", "1");
        write("config", "2");
        write("objects/aa/bb", "x");
        write("FETCH_HEAD", "x");
        write("tabularium-record", "x");
        let expected: Ballot = Sha1::digest(b"1234").into();
        assert_eq!(on_files(directory.path()).unwrap(), expected);
        write("config", "5");
        assert_ne!(on_files(directory.path()).unwrap(), expected);
    }
}
