//! What a backup consists of, and where it lies in the sink. Pure, but for reading and writing manifests.
//!
//! ```text
//! manifests/<storage>/<relative path>/<backup id>.toml     the manifest
//! manifests/<storage>/<relative path>/+latest.toml         of the newest backup, once more
//! <storage>/<relative path>/<backup id>/001.refs           `git show-ref --head` of the first step
//! <storage>/<relative path>/<backup id>/001.bundle
//! <storage>/<relative path>/<backup id>/001.custom_hooks.tar
//! ```
//!
//! A step that builds on others has the next number and lies in the directory of its own backup. Older layouts are read: one
//! in which files named `LATEST` say which backup and which step is the newest, and one of a single backup.

use std::{fmt, io};

use serde::{Deserialize, Serialize};
use tabularium_common::ids::{ParseIdError, RelativePath};
use tabularium_proto::gitaly::Repository;

use super::sink::{Key, OWN_DIRECTORY, Sink};
use crate::error::RepositoryError;

/// What stands in a backup's place for the newest one.
const LATEST: &str = "+latest";
/// The same in an older layout.
const OLD_LATEST: &str = "LATEST";
/// Largest manifest: thousands of steps.
const MAX_MANIFEST_BYTES: u64 = 4 * 1024 * 1024;
/// Largest file that only names a backup or a step.
const MAX_POINTER_BYTES: u64 = 4 * 1024;
/// Most steps of a backup in an older layout, which counts them with three digits.
const MAX_OLD_STEPS: usize = 9_999;
/// Longest name of a backup, so that a file can be called by it.
const MAX_ID_BYTES: usize = 200;
/// Before manifests said so.
const OLD_FORMAT: &str = "sha1";

/// The name of a backup: one part of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackupId(String);

impl BackupId {
    /// As a request or an older layout's file has it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let bad = |character: char| character == '/' || character.is_control();
        let reserved = matches!(text, "" | "." | ".." | LATEST);
        (!reserved && text.len() <= MAX_ID_BYTES && !text.contains(bad)).then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose backups: the repository as clients know it, whatever its replicas are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// `<storage>/<relative path>`.
    path: String,
    /// In older layouts.
    old_path: String,
}

impl Place {
    /// From a request. The storage need not be one of this node, or be named at all.
    pub(crate) fn of(repository: Option<&Repository>) -> Result<Self, RepositoryError> {
        let repository = repository.ok_or(RepositoryError::NotSet)?;
        let (storage, relative) = (repository.storage_name.as_str(), repository.relative_path.as_str());
        match (storage, relative) {
            ("", "") => return Err(RepositoryError::NotSet),
            (_, "") => return Err(RepositoryError::PathNotSet),
            _ => {}
        }
        let relative: RelativePath = relative.parse().map_err(|error| match error {
            ParseIdError::Escapes => RepositoryError::Escapes,
            ParseIdError::Empty => RepositoryError::PathNotSet,
            error @ (ParseIdError::TooLong { .. }
            | ParseIdError::Character { .. }
            | ParseIdError::Control) => RepositoryError::BadPath(error.to_string()),
        })?;
        let relative = relative.as_str();
        let path = match storage {
            "" => relative.to_owned(),
            _ if storage.contains('/') => return Err(RepositoryError::Escapes),
            _ => format!("{storage}/{relative}"),
        };
        let own = relative.split('/').next() == Some(OWN_DIRECTORY);
        let key = Key::parse(&path).filter(|_| !own).ok_or(RepositoryError::Escapes)?;
        let old_path = relative.strip_suffix(".git").unwrap_or(relative).to_owned();
        Ok(Self { path: key.as_str().to_owned(), old_path })
    }

    /// By which one backup waits for another.
    pub(super) fn as_str(&self) -> &str {
        &self.path
    }

    fn manifest(&self, name: &str) -> io::Result<Key> {
        known(&format!("manifests/{}/{name}.toml", self.path))
    }

    /// The files of the next step of a backup: of the first, or of one that builds on these.
    pub(super) fn next_step(&self, id: &BackupId, before: &[Step]) -> Step {
        let number = before.len() + 1;
        let file = |suffix: &str| format!("{}/{id}/{number:03}.{suffix}", self.path);
        Step {
            bundle_path: file("bundle"),
            ref_path: file("refs"),
            previous_ref_path: before.last().map(|step| step.ref_path.clone()).unwrap_or_default(),
            custom_hooks_path: file("custom_hooks.tar"),
        }
    }

    fn old_steps(&self, id: &BackupId, count: usize) -> Vec<Step> {
        let file = |number: usize, suffix: &str| format!("{}/{id}/{number:03}.{suffix}", self.old_path);
        let step = |number: usize| Step {
            bundle_path: file(number, "bundle"),
            ref_path: file(number, "refs"),
            previous_ref_path: if number > 1 { file(number - 1, "refs") } else { String::new() },
            custom_hooks_path: file(number, "custom_hooks.tar"),
        };
        (1..=count).map(step).collect()
    }

    fn oldest_step(&self) -> Step {
        Step {
            bundle_path: format!("{}.bundle", self.old_path),
            ref_path: format!("{}.refs", self.old_path),
            previous_ref_path: String::new(),
            custom_hooks_path: format!("{}/custom_hooks.tar", self.old_path),
        }
    }
}

/// A key that is put together from checked parts, or stands in a manifest.
fn known(text: &str) -> io::Result<Key> {
    Key::parse(text).ok_or_else(|| io::Error::other(format!("{text:?} is no file of a backup")))
}

/// The files of a step. A file of custom hooks need not be there, nor a bundle when there are no references.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "Gitaly's names")]
pub(super) struct Step {
    #[serde(skip_serializing_if = "String::is_empty")]
    bundle_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ref_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    previous_ref_path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    custom_hooks_path: String,
}

impl Step {
    pub(super) fn bundle(&self) -> io::Result<Key> {
        known(&self.bundle_path)
    }

    pub(super) fn references(&self) -> io::Result<Key> {
        known(&self.ref_path)
    }

    pub(super) fn custom_hooks(&self) -> io::Result<Key> {
        known(&self.custom_hooks_path)
    }

    fn shares_a_file_with(&self, other: &Self) -> bool {
        self.bundle_path == other.bundle_path
            || self.ref_path == other.ref_path
            || self.custom_hooks_path == other.custom_hooks_path
    }
}

/// The newest manifest and the one of a certain name. When they are others than before, another node has written a backup.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Trace([Option<String>; 2]);

/// A backup. Keys that are not known belong to later versions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Manifest {
    /// There is no reference.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) empty: bool,
    /// There was no repository.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) non_existent: bool,
    /// `sha1` or `sha256`.
    pub(super) object_format: String,
    /// What `HEAD` stood for; empty: not known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) head_reference: String,
    /// In the order in which they were made.
    pub(super) steps: Vec<Step>,
}

impl Manifest {
    fn read(sink: &Sink, key: &Key) -> io::Result<Option<Self>> {
        let Some(text) = sink.read_small(key, MAX_MANIFEST_BYTES)? else { return Ok(None) };
        let manifest = toml::from_str(&text);
        manifest.map(Some).map_err(|error| io::Error::other(format!("{}: {error}", key.as_str())))
    }

    /// The newest backup, in whichever layout.
    pub(super) fn latest(sink: &Sink, place: &Place) -> io::Result<Option<Self>> {
        if let Some(manifest) = Self::read(sink, &place.manifest(LATEST)?)? {
            return Ok(Some(manifest));
        }
        if let Some(name) = pointer(sink, &format!("{}/{OLD_LATEST}", place.old_path))? {
            let id =
                BackupId::parse(&name).ok_or_else(|| io::Error::other(format!("{name:?} is no backup")))?;
            return Self::find(sink, place, &id);
        }
        let oldest = place.oldest_step();
        let there = sink.read(&oldest.references()?)?.is_some();
        Ok(there.then(|| Self::of_old_steps(vec![oldest])))
    }

    /// The backup of this name, in whichever layout.
    pub(super) fn find(sink: &Sink, place: &Place, id: &BackupId) -> io::Result<Option<Self>> {
        if let Some(manifest) = Self::read(sink, &place.manifest(&id.0)?)? {
            return Ok(Some(manifest));
        }
        let Some(last) = pointer(sink, &format!("{}/{id}/{OLD_LATEST}", place.old_path))? else {
            return Ok(None);
        };
        let count = last.parse().ok().filter(|count| (1..=MAX_OLD_STEPS).contains(count));
        let count = count.ok_or_else(|| io::Error::other(format!("{last:?} is no step of a backup")))?;
        Ok(Some(Self::of_old_steps(place.old_steps(id, count))))
    }

    fn of_old_steps(steps: Vec<Step>) -> Self {
        Self { object_format: OLD_FORMAT.to_owned(), steps, ..Self::default() }
    }

    /// How it stands now.
    pub(super) fn trace(sink: &Sink, place: &Place, id: &BackupId) -> io::Result<Trace> {
        let read = |name: &str| sink.read_small(&place.manifest(name)?, MAX_MANIFEST_BYTES);
        Ok(Trace([read(LATEST)?, read(&id.0)?]))
    }

    /// Has a backup be the newest one.
    pub(super) fn commit(&self, sink: &Sink, place: &Place, id: &BackupId) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        sink.write(place.manifest(&id.0)?, text.as_bytes())?;
        sink.write(place.manifest(LATEST)?, text.as_bytes())
    }

    /// Takes back what names a file of this step, which is about to be another file.
    pub(super) fn withdraw(sink: &Sink, place: &Place, id: &BackupId, step: &Step) -> io::Result<()> {
        for name in [LATEST, &id.0] {
            let key = place.manifest(name)?;
            let named = Self::read(sink, &key)?;
            if named.is_some_and(|manifest| manifest.steps.iter().any(|other| other.shares_a_file_with(step)))
            {
                sink.remove(&key)?;
            }
        }
        Ok(())
    }
}

fn pointer(sink: &Sink, path: &str) -> io::Result<Option<String>> {
    let text = sink.read_small(&known(path)?, MAX_POINTER_BYTES)?;
    Ok(text.map(|text| text.trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(storage: &str, path: &str) -> Repository {
        Repository { storage_name: storage.into(), relative_path: path.into(), ..Repository::default() }
    }

    fn place() -> Place {
        Place::of(Some(&repository("default", "@hashed/ab/a.git"))).unwrap()
    }

    fn id(text: &str) -> BackupId {
        BackupId::parse(text).unwrap()
    }

    #[test]
    fn places_lead_nowhere_else() {
        assert_eq!(Place::of(None), Err(RepositoryError::NotSet));
        for (storage, path, error) in [
            ("", "", RepositoryError::NotSet),
            ("a", "", RepositoryError::PathNotSet),
            ("a", "../b.git", RepositoryError::Escapes),
            ("a", "b/../../c.git", RepositoryError::Escapes),
            ("a", "/etc", RepositoryError::Escapes),
            ("..", "b.git", RepositoryError::Escapes),
            ("a/../..", "b.git", RepositoryError::Escapes),
            ("+tabularium", "b.git", RepositoryError::Escapes),
            ("", "+tabularium/b.git", RepositoryError::Escapes),
        ] {
            assert_eq!(Place::of(Some(&repository(storage, path))), Err(error), "{storage} {path}");
        }
        assert_eq!(Place::of(Some(&repository("", "b.git"))).unwrap().as_str(), "b.git");
        for bad in ["", ".", "..", "a/b", "../a", "a\0", "+latest", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert_eq!(BackupId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn steps_are_called_what_gitaly_calls_them() {
        let first = place().next_step(&id("one"), &[]);
        let second = place().next_step(&id("two"), std::slice::from_ref(&first));
        let manifest = Manifest {
            object_format: "sha1".to_owned(),
            head_reference: "refs/heads/main".to_owned(),
            steps: vec![first, second],
            ..Manifest::default()
        };
        let text = "object_format = \"sha1\"\nhead_reference = \"refs/heads/main\"\n\n[[steps]]\n\
            bundle_path = \"default/@hashed/ab/a.git/one/001.bundle\"\n\
            ref_path = \"default/@hashed/ab/a.git/one/001.refs\"\n\
            custom_hooks_path = \"default/@hashed/ab/a.git/one/001.custom_hooks.tar\"\n\n[[steps]]\n\
            bundle_path = \"default/@hashed/ab/a.git/two/002.bundle\"\n\
            ref_path = \"default/@hashed/ab/a.git/two/002.refs\"\n\
            previous_ref_path = \"default/@hashed/ab/a.git/one/001.refs\"\n\
            custom_hooks_path = \"default/@hashed/ab/a.git/two/002.custom_hooks.tar\"\n";
        assert_eq!(toml::to_string(&manifest).unwrap(), text);
        assert_eq!(toml::from_str::<Manifest>(&text.replace('"', "'")).unwrap(), manifest);
    }

    #[test]
    fn older_layouts_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::open(directory.path().to_owned()).unwrap();
        let write = |key: &str, text: &str| sink.write(Key::parse(key).unwrap(), text.as_bytes()).unwrap();
        assert_eq!(Manifest::latest(&sink, &place()).unwrap(), None);
        write("@hashed/ab/a.refs", "");
        let oldest = Manifest::latest(&sink, &place()).unwrap().unwrap();
        assert_eq!(oldest.steps[0].bundle_path, "@hashed/ab/a.bundle");
        assert_eq!(oldest.steps[0].custom_hooks_path, "@hashed/ab/a/custom_hooks.tar");
        write("@hashed/ab/a/LATEST", "one\n");
        assert_eq!(Manifest::latest(&sink, &place()).unwrap(), None, "no step is complete");
        write("@hashed/ab/a/one/LATEST", "002");
        let older = Manifest::latest(&sink, &place()).unwrap().unwrap();
        assert_eq!(older, Manifest::find(&sink, &place(), &id("one")).unwrap().unwrap());
        assert_eq!((older.steps.len(), older.object_format.as_str()), (2, "sha1"));
        assert_eq!(older.steps[1].bundle_path, "@hashed/ab/a/one/002.bundle");
        assert_eq!(older.steps[1].previous_ref_path, "@hashed/ab/a/one/001.refs");
        write("@hashed/ab/a/one/LATEST", "../..");
        assert!(Manifest::find(&sink, &place(), &id("one")).is_err());
    }

    #[test]
    fn a_manifest_whose_files_are_to_change_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let sink = Sink::open(directory.path().to_owned()).unwrap();
        let there = |name: &str| Manifest::read(&sink, &place().manifest(name).unwrap()).unwrap().is_some();
        let first = place().next_step(&id("one"), &[]);
        let one = Manifest { steps: vec![first.clone()], ..Manifest::default() };
        one.commit(&sink, &place(), &id("one")).unwrap();
        let trace = || Manifest::trace(&sink, &place(), &id("one")).unwrap();
        let before = trace();
        let other = place().next_step(&id("two"), &[]);
        Manifest::withdraw(&sink, &place(), &id("two"), &other).unwrap();
        assert!(there("one") && there("+latest") && trace() == before);
        Manifest::withdraw(&sink, &place(), &id("one"), &first).unwrap();
        assert!(!there("one") && !there("+latest") && trace() != before);
    }
}
