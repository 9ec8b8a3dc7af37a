//! What references name, read from their files (gitrepository-layout): one of its own each, or a line in `packed-refs`,
//! which counts where there is no file.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    path::Path,
};

use gix_hash::ObjectId;
use rustix::fs::OFlags;

use super::{LeftToGit, connectivity};

/// Largest `packed-refs` that is read; some hundred thousand references.
const MOST_PACKED_BYTES: u64 = 16 * 1024 * 1024;
/// A reference's file has an id and the end of a line.
const MOST_FILE_BYTES: u64 = 128;
/// Most files and directories that are looked at for a reference that names an object.
const MOST_SEARCHED: usize = 1000;

/// What a reference's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loose {
    /// There is none.
    Absent,
    Value(ObjectId),
    /// Something else: it stands for another reference, is a directory, or cannot be read.
    Other,
}

/// Reads the file of the reference of this full name.
pub(super) fn loose(repository: &Path, name: &[u8]) -> Loose {
    read(&repository.join(OsStr::from_bytes(name))).unwrap_or(Loose::Other)
}

fn read(path: &Path) -> io::Result<Loose> {
    // A link is an old way to stand for another reference.
    let no_links = OFlags::NOFOLLOW.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(no_links).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loose::Absent),
        opened => opened?,
    };
    let mut content = Vec::new();
    file.take(MOST_FILE_BYTES).read_to_end(&mut content)?;
    let hex = content.strip_suffix(b"\n").unwrap_or(&content);
    Ok(connectivity::id(hex).map_or(Loose::Other, Loose::Value))
}

/// `packed-refs`.
pub(super) struct Packed(Vec<u8>);

impl Packed {
    /// Reads all of it.
    pub(super) fn read(repository: &Path) -> Result<Self, LeftToGit> {
        let unread = LeftToGit("packed references that cannot be read");
        let file = match File::open(repository.join("packed-refs")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self(Vec::new())),
            opened => opened.map_err(|_| unread)?,
        };
        let length = file.metadata().map_err(|_| unread)?.len();
        if length > MOST_PACKED_BYTES {
            return Err(LeftToGit("very many references"));
        }
        let mut content = Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1);
        file.take(MOST_PACKED_BYTES + 1).read_to_end(&mut content).map_err(|_| unread)?;
        Ok(Self(content))
    }

    /// Every reference and the object it names, in hex.
    fn lines(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let lines = self.0.split(|byte| *byte == b'\n');
        // A comment, or what the tag in the line before is of.
        let references = lines.filter(|line| !matches!(line.first(), None | Some(b'#' | b'^')));
        references.filter_map(|line| {
            let (hex, name) = line.split_at_checked(40)?;
            Some((name.strip_prefix(b" ")?, hex))
        })
    }

    /// What the reference of this full name names here.
    pub(super) fn value(&self, name: &[u8]) -> Result<Option<ObjectId>, LeftToGit> {
        let Some((_, hex)) = self.lines().find(|(packed, _)| *packed == name) else { return Ok(None) };
        connectivity::id(hex).map(Some).ok_or(LeftToGit("a malformed packed reference"))
    }

    /// Whether there is one whose name would have to be a directory for this one, or the other way round.
    pub(super) fn conflicts(&self, name: &[u8]) -> bool {
        let within =
            |inner: &[u8], outer: &[u8]| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with(b"/"));
        self.lines().any(|(packed, _)| within(packed, name) || within(name, packed))
    }
}

/// Whether any reference names this object, as far as that is found out in a bounded time.
pub(super) fn is_named(repository: &Path, id: &ObjectId, likely: &[Vec<u8>]) -> bool {
    let value = Loose::Value(*id);
    if likely.iter().any(|name| loose(repository, name) == value) {
        return true;
    }
    let mut left = MOST_SEARCHED;
    if search(&repository.join("refs"), value, &mut left).unwrap_or(false) {
        return true;
    }
    let Ok(packed) = Packed::read(repository) else { return false };
    let hex = id.to_string();
    packed.lines().any(|(name, named)| {
        // One that has a file names what is in it.
        named == hex.as_bytes()
            && name.starts_with(b"refs/")
            && matches!(loose(repository, name), Loose::Absent)
    })
}

fn search(directory: &Path, value: Loose, left: &mut usize) -> io::Result<bool> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Some(fewer) = left.checked_sub(1) else { return Ok(false) };
        *left = fewer;
        let kind = entry.file_type()?;
        let is_lock = entry.file_name().as_bytes().ends_with(b".lock");
        let found = if kind.is_dir() {
            search(&entry.path(), value, left)?
        } else {
            kind.is_file() && !is_lock && read(&entry.path())? == value
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(digit: char) -> ObjectId {
        ObjectId::from_hex(digit.to_string().repeat(40).as_bytes()).unwrap()
    }

    /// `a` has a file, `b` is packed, `c` is packed and has moved since; the tag is of `5…`.
    fn repository() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let heads = directory.path().join("refs/heads");
        fs::create_dir_all(heads.join("d")).unwrap();
        fs::write(heads.join("a"), format!("{}\n", id('1'))).unwrap();
        fs::write(heads.join("c"), id('4').to_string()).unwrap();
        fs::write(heads.join("d/e.lock"), format!("{}\n", id('7'))).unwrap();
        fs::write(heads.join("s"), "ref: refs/heads/a\n").unwrap();
        let packed = format!(
            "# pack-refs with: peeled fully-peeled sorted \n{} refs/heads/b\n{} refs/heads/c\n{} refs/tags/t\n^{}\n",
            id('2'),
            id('3'),
            id('6'),
            id('5'),
        );
        fs::write(directory.path().join("packed-refs"), packed).unwrap();
        directory
    }

    #[test]
    fn a_file_goes_before_a_line() {
        let directory = repository();
        let loose = |name: &str| loose(directory.path(), name.as_bytes());
        assert_eq!(loose("refs/heads/a"), Loose::Value(id('1')));
        assert_eq!(loose("refs/heads/b"), Loose::Absent);
        assert_eq!(loose("refs/heads/c"), Loose::Value(id('4')));
        assert_eq!((loose("refs/heads/d"), loose("refs/heads/s")), (Loose::Other, Loose::Other));
        assert_eq!(loose("refs/heads/a/b"), Loose::Other);
        for (name, target) in [("link", "a"), ("dangling", "nothing")] {
            std::os::unix::fs::symlink(target, directory.path().join("refs/heads").join(name)).unwrap();
            assert_eq!(loose(&format!("refs/heads/{name}")), Loose::Other);
        }
        let packed = Packed::read(directory.path()).unwrap();
        assert_eq!(packed.value(b"refs/heads/b"), Ok(Some(id('2'))));
        assert_eq!(packed.value(b"refs/tags/t"), Ok(Some(id('6'))));
        assert_eq!(packed.value(b"refs/heads/a"), Ok(None));
        for (name, conflicts) in
            [("refs/heads/b/x", true), ("refs/tags", true), ("refs/heads/bx", false), ("refs/heads/b", false)]
        {
            assert_eq!(packed.conflicts(name.as_bytes()), conflicts, "{name}");
        }
    }

    #[test]
    fn only_what_a_reference_names_now_is_named() {
        let directory = repository();
        let named = |digit| is_named(directory.path(), &id(digit), &[b"refs/heads/a".to_vec()]);
        assert_eq!("1234567".chars().filter(|digit| named(*digit)).collect::<String>(), "1246");
        let other = tempfile::tempdir().unwrap();
        assert!(!is_named(other.path(), &id('1'), &[]), "nothing at all");
    }

    #[test]
    fn what_cannot_be_read_is_left_to_git() {
        let directory = repository();
        let packed = directory.path().join("packed-refs");
        fs::write(&packed, format!("{} refs/heads/b\n", "x".repeat(40))).unwrap();
        assert!(Packed::read(directory.path()).unwrap().value(b"refs/heads/b").is_err());
        fs::remove_file(&packed).unwrap();
        fs::create_dir(&packed).unwrap();
        assert!(Packed::read(directory.path()).is_err());
        assert!(!is_named(directory.path(), &id('9'), &[]));
    }
}
