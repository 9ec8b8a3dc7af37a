//! Objects on disk: the old ones are read, the new ones written, each as a file of its own in the quarantine.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use flate2::{Compression, write::ZlibEncoder};
use gix_hash::ObjectId;
use gix_object::{Find as _, Kind};

use super::{LeftToGit, connectivity::Present, pack::Object, references};
use crate::git::durable;

/// Nobody changes an object.
const MODE: u32 = 0o444;
/// Bytes that one old object may have, before anything is allocated for it.
const MOST_BYTES: usize = 16 * 1024 * 1024;

/// What a repository has without the new objects.
pub(super) struct Old<'a> {
    repository: &'a Path,
    objects: gix_odb::Handle,
    /// Full names of references that may well name what is asked for.
    likely: Vec<Vec<u8>>,
}

impl<'a> Old<'a> {
    pub(super) fn open(repository: &'a Path, likely: Vec<Vec<u8>>) -> Result<Self, LeftToGit> {
        let options = gix_odb::store::init::Options {
            alloc_limit_bytes: Some(MOST_BYTES),
            ..gix_odb::store::init::Options::default()
        };
        let directory = repository.join("objects");
        let objects = gix_odb::at_opts(directory, gix_hash::Kind::Sha1, None, options);
        let mut objects = objects.map_err(|_| LeftToGit("objects that cannot be read"))?;
        // What is not there has not come a moment ago either.
        objects.refresh_never();
        Ok(Self { repository, objects, likely })
    }
}

impl Present for Old<'_> {
    fn object(&mut self, id: &ObjectId) -> Option<(Kind, Vec<u8>)> {
        let mut data = Vec::new();
        let kind = self.objects.try_find(id, &mut data).ok()??.kind;
        Some((kind, data))
    }

    fn is_named(&mut self, id: &ObjectId) -> bool {
        references::is_named(self.repository, id, &self.likely)
    }
}

/// Writes the objects into an empty object directory; all of them are on disk when this returns.
pub(super) fn write(directory: &Path, objects: &[Object]) -> io::Result<()> {
    let mut files = Vec::with_capacity(objects.len());
    for object in objects {
        let hex = object.id.to_string();
        let (outer, inner) = hex.split_at(2);
        let outer = directory.join(outer);
        match fs::create_dir(&outer) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(outer.join(inner));
        match file {
            // A pack may have an object twice.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            file => {
                let mut file = file?;
                file.write_all(&encoded(object)?)?;
                files.push(file);
            }
        }
    }
    durable::sync_files(&files)
}

/// The file of an object (gitformat-loose), compressed as little as git does it.
fn encoded(object: &Object) -> io::Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    write!(encoder, "{} {}\0", object.kind, object.data.len())?;
    encoder.write_all(&object.data)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(kind: Kind, data: &[u8]) -> Object {
        let id = gix_object::compute_hash(gix_hash::Kind::Sha1, kind, data).unwrap();
        Object { id, kind, data: data.to_vec() }
    }

    #[test]
    fn what_is_written_is_found_by_us_and_by_git() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let git = |arguments: &[&str]| {
            let output = std::process::Command::new("git").arg("-C").arg(path).args(arguments).output();
            let output = output.unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        git(&["init", "--quiet", "--bare"]);
        let objects = [object(Kind::Blob, b"x"), object(Kind::Blob, b""), object(Kind::Tree, b"")];
        let twice = [&objects[..], &objects[..1]].concat();
        write(&path.join("objects"), &twice).unwrap();
        for object in &objects {
            assert_eq!(git(&["cat-file", "-t", &object.id.to_string()]).trim(), object.kind.to_string());
        }
        git(&["fsck", "--strict"]);
        let mut old = Old::open(path, Vec::new()).unwrap();
        assert_eq!(old.object(&objects[0].id), Some((Kind::Blob, b"x".to_vec())));
        let absent = object(Kind::Blob, b"absent").id;
        assert_eq!(old.object(&absent), None);
        git(&[
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "commit-tree",
            "-m",
            "x",
            &objects[2].id.to_string(),
        ]);
        git(&["repack", "-adk"]);
        let mut packed = Old::open(path, Vec::new()).unwrap();
        assert_eq!(packed.object(&objects[0].id), Some((Kind::Blob, b"x".to_vec())));
    }
}
