//! Random pushes to random repositories, each done here and by git: what is taken here git takes too, and both end with
//! the same objects and references.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command as Process, Stdio},
    sync::Arc,
};

use gix_hash::ObjectId;
use gix_object::Kind;
use proptest::{prelude::*, sample::Index};

use super::{in_process, moving, opening::Command, pack::Object, store};
use crate::git::{leftovers::Writers, quarantine};

const PATHS: [&str; 6] = ["a", "b", "d/a", "d/b", "d/e/a", "f/a"];
const MAIN: &[u8] = b"refs/heads/main";

/// What a commit does to its first parent's files.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Write(usize, u8, u8),
    Delete(usize),
    Rename(usize, usize),
    /// With the other branch.
    Merge,
    Nothing,
}

fn step() -> impl Strategy<Value = Step> {
    let path = 0..PATHS.len();
    prop_oneof![
        6 => (path.clone(), 0_u8..40, 0_u8..4).prop_map(|(path, line, value)| Step::Write(path, line, value)),
        1 => path.clone().prop_map(Step::Delete),
        1 => (path.clone(), path).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => Just(Step::Merge),
        1 => Just(Step::Nothing),
    ]
}

/// What is done to a push that would be right.
#[derive(Debug, Clone)]
enum Mischief {
    None,
    /// These of the new objects are not in the pack; of those some are in the repository.
    Missing(Vec<(Index, bool)>),
    /// A bit of the pack is another one, and the digest at its end is made to fit, or not.
    Changed(Index, u8, bool),
    /// The reference is not what the push says.
    Stale,
}

fn mischief() -> impl Strategy<Value = Mischief> {
    prop_oneof![
        4 => Just(Mischief::None),
        3 => prop::collection::vec((any::<Index>(), any::<bool>()), 1..3).prop_map(Mischief::Missing),
        2 => (any::<Index>(), 0_u8..8, any::<bool>()).prop_map(|(at, bit, fits)| Mischief::Changed(at, bit, fits)),
        1 => Just(Mischief::Stale),
    ]
}

#[derive(Debug, Clone)]
struct Case {
    before: Vec<(bool, Step)>,
    pushed: Vec<Step>,
    /// Pushed as a branch of its own.
    new_branch: bool,
    packed: bool,
    thin: bool,
    mischief: Mischief,
}

fn case() -> impl Strategy<Value = Case> {
    let before = prop::collection::vec((any::<bool>(), step()), 0..6);
    let pushed = prop::collection::vec(step(), 1..4);
    (before, pushed, any::<(bool, bool, bool)>(), mischief()).prop_map(
        |(before, pushed, (new_branch, packed, thin), mischief)| Case {
            before,
            pushed,
            new_branch,
            packed,
            thin,
            mischief,
        },
    )
}

pub(super) type Files = BTreeMap<String, String>;

/// Every object there is anywhere.
#[derive(Default)]
pub(super) struct World {
    objects: HashMap<ObjectId, Object>,
    leads_to: HashMap<ObjectId, Vec<ObjectId>>,
    commits: usize,
}

impl World {
    fn add(&mut self, kind: Kind, data: Vec<u8>, leads_to: Vec<ObjectId>) -> ObjectId {
        let id = gix_object::compute_hash(gix_hash::Kind::Sha1, kind, &data).unwrap();
        self.objects.insert(id, Object { id, kind, data });
        self.leads_to.insert(id, leads_to);
        id
    }

    fn tree(&mut self, files: &Files) -> ObjectId {
        let mut directories: BTreeMap<&str, Files> = BTreeMap::new();
        let mut entries = Vec::new();
        for (path, content) in files {
            match path.split_once('/') {
                None => {
                    let id = self.add(Kind::Blob, content.clone().into_bytes(), Vec::new());
                    entries.push((path.clone(), format!("100644 {path}"), id));
                }
                Some((directory, rest)) => {
                    directories.entry(directory).or_default().insert(rest.to_owned(), content.clone());
                }
            }
        }
        for (name, files) in directories {
            entries.push((format!("{name}/"), format!("40000 {name}"), self.tree(&files)));
        }
        entries.sort();
        let lines = entries.iter().map(|(_, line, id)| [line.as_bytes(), b"\0", id.as_slice()].concat());
        let data = lines.collect::<Vec<_>>().concat();
        self.add(Kind::Tree, data, entries.iter().map(|(_, _, id)| *id).collect())
    }

    pub(super) fn commit(&mut self, files: &Files, parents: &[ObjectId]) -> ObjectId {
        self.commits += 1;
        let tree = self.tree(files);
        let mut lines = vec![format!("tree {tree}")];
        lines.extend(parents.iter().map(|parent| format!("parent {parent}")));
        lines.extend(["author", "committer"].map(|who| format!("{who} a <a> {} +0000", self.commits)));
        let data = lines.join("\n") + "\n\nx\n";
        self.add(Kind::Commit, data.into_bytes(), [&[tree], parents].concat())
    }

    pub(super) fn follow(
        &mut self,
        step: &Step,
        (files, tip): &mut (Files, ObjectId),
        other: &(Files, ObjectId),
    ) {
        let mut parents = vec![*tip];
        match step {
            Step::Write(path, line, value) => {
                let lines =
                    (0..40).map(|at| if at == *line { u32::from(*value) } else { 100 + u32::from(at) });
                let lines: Vec<String> = lines.map(|line| format!("line {line}\n")).collect();
                files.insert(PATHS[*path].to_owned(), lines.concat());
            }
            Step::Delete(path) => drop(files.remove(PATHS[*path])),
            Step::Rename(from, to) => {
                if let Some(content) = files.remove(PATHS[*from]) {
                    files.insert(PATHS[*to].to_owned(), content);
                }
            }
            Step::Merge => {
                parents.push(other.1);
                files.extend(other.0.clone());
            }
            Step::Nothing => {}
        }
        *tip = self.commit(files, &parents);
    }

    pub(super) fn closure(&self, tips: &[ObjectId]) -> BTreeSet<ObjectId> {
        let (mut found, mut waiting) = (BTreeSet::new(), tips.to_vec());
        while let Some(id) = waiting.pop() {
            if found.insert(id) {
                waiting.extend(&self.leads_to[&id]);
            }
        }
        found
    }

    pub(super) fn get(&self, ids: impl IntoIterator<Item = ObjectId>) -> Vec<Object> {
        ids.into_iter().map(|id| self.objects[&id].clone()).collect()
    }
}

/// A pack of these objects. Files are deltas to another file, in the pack or (thin) not, if there is one.
pub(super) fn pack(objects: &[Object], bases: &[Object], thin: bool) -> Vec<u8> {
    let count = u32::try_from(objects.len()).unwrap().to_be_bytes();
    let mut pack = [b"PACK\0\0\0\x02".as_slice(), &count].concat();
    let mut whole: Vec<&Object> = if thin { bases.iter().collect() } else { Vec::new() };
    for object in objects {
        let base = whole.iter().rfind(|base| {
            (base.kind, object.kind) == (Kind::Blob, Kind::Blob) && base.data.len() == object.data.len()
        });
        if let Some(base) = base.filter(|base| base.id != object.id) {
            let delta = delta(&base.data, &object.data);
            pack.extend(header(7, delta.len()));
            pack.extend(base.id.as_slice());
            pack.extend(deflated(&delta));
        } else {
            let kind = match object.kind {
                Kind::Commit => 1,
                Kind::Tree => 2,
                Kind::Blob => 3,
                Kind::Tag => 4,
            };
            pack.extend(header(kind, object.data.len()));
            pack.extend(deflated(&object.data));
        }
        whole.push(object);
    }
    sealed(pack)
}

fn header(kind: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(size & 15).unwrap() | (kind << 4)];
    let mut rest = size >> 4;
    while rest > 0 {
        *bytes.last_mut().unwrap() |= 0x80;
        bytes.push(u8::try_from(rest & 0x7f).unwrap());
        rest >>= 7;
    }
    bytes
}

fn deflated(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn sealed(mut pack: Vec<u8>) -> Vec<u8> {
    let mut digest = gix_hash::hasher(gix_hash::Kind::Sha1);
    digest.update(&pack);
    pack.extend(digest.try_finalize().unwrap().as_slice());
    pack
}

/// Copies what two of the same length begin and end with.
fn delta(base: &[u8], object: &[u8]) -> Vec<u8> {
    let same = |(one, other): &(&u8, &u8)| one == other;
    let front = base.iter().zip(object).take_while(same).count();
    let back = base[front..].iter().rev().zip(object[front..].iter().rev()).take_while(same).count();
    let size = |size: usize| [u8::try_from(size & 0x7f).unwrap() | 0x80, u8::try_from(size >> 7).unwrap()];
    let copy = |from: usize, length: usize| {
        let numbers = [from, length].map(|number| u16::try_from(number).unwrap().to_le_bytes());
        if length > 0 { [&[0b1011_0011], numbers.as_flattened()].concat() } else { Vec::new() }
    };
    let middle = object[front..object.len() - back].chunks(100);
    let middle = middle.flat_map(|piece| [&[u8::try_from(piece.len()).unwrap()], piece].concat());
    [
        size(base.len()).to_vec(),
        size(object.len()).to_vec(),
        copy(0, front),
        middle.collect(),
        copy(base.len() - back, back),
    ]
    .concat()
}

pub(super) fn git(
    repository: &Path,
    quarantine: Option<&Path>,
    arguments: &[&str],
    input: &[u8],
) -> Option<String> {
    let mut command = Process::new("git");
    command.arg("--git-dir").arg(repository).args(arguments).env("GIT_CONFIG_NOSYSTEM", "1");
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("LC_ALL", "C");
    if let Some(quarantine) = quarantine {
        command.env("GIT_OBJECT_DIRECTORY", quarantine);
        command.env("GIT_ALTERNATE_OBJECT_DIRECTORIES", repository.join("objects"));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // One that has read enough closes its end.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

pub(super) fn migrate(quarantine: &Path, repository: &Path) {
    quarantine::migrate(quarantine, &repository.join("objects")).unwrap();
}

/// Whether git takes the push.
fn by_git(repository: &Path, command: &Command, pack: &[u8]) -> bool {
    let quarantine = tempfile::tempdir().unwrap();
    let seen = Some(quarantine.path());
    let new = format!("{}\n", command.new);
    let name = String::from_utf8(command.reference.clone()).unwrap();
    let taken = git(repository, seen, &["unpack-objects", "-q"], pack).is_some()
        && git(
            repository,
            seen,
            &["rev-list", "--objects", "--stdin", "--not", "--all", "--quiet"],
            new.as_bytes(),
        )
        .is_some();
    taken && {
        migrate(quarantine.path(), repository);
        git(repository, None, &["update-ref", &name, &command.new, &command.old], b"").is_some()
    }
}

/// Whether it is taken here, without git.
fn in_process(repository: &Path, command: &Command, pack: &[u8]) -> bool {
    let quarantine = tempfile::tempdir().unwrap();
    let head = Some(MAIN.to_vec());
    let Ok(taken_in) = in_process::take_in(repository, quarantine.path(), command, head, pack) else {
        return false;
    };
    if !taken_in.connected || !taken_in.nameable {
        return false;
    }
    migrate(quarantine.path(), repository);
    let writers: Arc<Writers> = Arc::default();
    let locked = moving::lock(repository, command, writers.enter(repository));
    locked.map(|locked| locked.apply().unwrap()).is_ok()
}

/// References, and what they lead to.
fn contents(repository: &Path) -> (String, BTreeSet<String>) {
    let references = git(repository, None, &["for-each-ref"], b"").unwrap();
    let objects = git(repository, None, &["rev-list", "--objects", "--no-object-names", "--all"], b"");
    (references, objects.unwrap().lines().map(str::to_owned).collect())
}

pub(super) struct Pair {
    _directory: tempfile::TempDir,
    pub(super) repositories: [PathBuf; 2],
}

/// Two repositories with the same branches and stray objects.
pub(super) fn pair(world: &World, tips: [ObjectId; 2], strays: &[ObjectId], packed: bool) -> Pair {
    let directory = tempfile::tempdir().unwrap();
    let repositories = ["here", "git"].map(|name| directory.path().join(name));
    for repository in &repositories {
        let arguments = ["init", "--quiet", "--bare", "--template=", "--initial-branch=main"];
        git(repository, None, &arguments, b"").unwrap();
        store::write(&repository.join("objects"), &world.get(world.closure(&tips))).unwrap();
        for (name, tip) in ["main", "side"].iter().zip(tips) {
            fs::write(repository.join("refs/heads").join(name), format!("{tip}\n")).unwrap();
        }
        if packed {
            git(repository, None, &["repack", "-adq"], b"").unwrap();
            git(repository, None, &["pack-refs", "--all"], b"").unwrap();
        }
        let loose = tempfile::tempdir().unwrap();
        store::write(loose.path(), &world.get(strays.iter().copied())).unwrap();
        migrate(loose.path(), repository);
    }
    Pair { _directory: directory, repositories }
}

/// What became of a case: whether it was taken here, and by git.
fn play(case: &Case) -> (bool, bool) {
    let mut world = World::default();
    let files = Files::from([("z".to_owned(), "z".to_owned())]);
    let root = world.commit(&files, &[]);
    let (mut main, mut side) = ((files.clone(), root), (files, root));
    for (on_main, step) in &case.before {
        let (this, other) = if *on_main { (&mut main, &side) } else { (&mut side, &main) };
        world.follow(step, this, other);
    }
    let before = [main.1, side.1];
    for step in &case.pushed {
        world.follow(step, &mut main, &side);
    }

    let base = world.closure(&before);
    let new: Vec<ObjectId> = world.closure(&[main.1]).difference(&base).copied().collect();
    let (mut strays, mut sent) = (Vec::new(), new);
    if let Mischief::Missing(missing) = &case.mischief {
        for (which, stray) in missing {
            if !sent.is_empty() {
                let id = sent.remove(which.index(sent.len()));
                strays.extend(stray.then_some(id));
            }
        }
    }
    let mut pack = pack(&world.get(sent), &world.get(base), case.thin);
    if let Mischief::Changed(at, bit, fits) = &case.mischief {
        let at = at.index(pack.len());
        pack[at] ^= 1 << bit;
        if *fits {
            pack.truncate(pack.len() - 20);
            pack = sealed(pack);
        }
    }
    let zero = ObjectId::null(gix_hash::Kind::Sha1);
    let (name, old) = if case.new_branch { (&b"refs/heads/n/m"[..], zero) } else { (MAIN, before[0]) };
    let old = if matches!(case.mischief, Mischief::Stale) { main.1 } else { old };
    let command = Command::of(name, old, main.1);

    let pair = pair(&world, before, &strays, case.packed);
    let [here, there] = &pair.repositories;
    let references = contents(here).0;
    let (taken_here, taken_by_git) = (in_process(here, &command, &pack), by_git(there, &command, &pack));
    if taken_here {
        assert!(taken_by_git, "git refuses it");
        assert_eq!(contents(here), contents(there));
        // Of stray objects it says that they lead to nothing.
        let fsck = || git(here, None, &["fsck", "--strict"], b"");
        assert!(matches!(case.mischief, Mischief::Missing(_)) || fsck().is_some());
    } else {
        assert_eq!(contents(here).0, references);
    }
    (taken_here, taken_by_git)
}

#[test]
fn ordinary_pushes_need_no_git() {
    let write = |path, line| Step::Write(path, line, 1);
    let before = vec![(true, write(0, 1)), (true, write(2, 2)), (true, write(4, 3)), (false, write(5, 4))];
    for pushed in [
        vec![write(0, 10)],
        vec![write(4, 10), write(1, 11), write(4, 12)],
        vec![Step::Delete(2), Step::Nothing],
        vec![Step::Rename(0, 1)],
        vec![Step::Merge, write(5, 10)],
    ] {
        for bits in 0..8 {
            let case = Case {
                before: before.clone(),
                pushed: pushed.clone(),
                new_branch: bits & 1 != 0,
                packed: bits & 2 != 0,
                thin: bits & 4 != 0,
                mischief: Mischief::None,
            };
            assert_eq!(play(&case), (true, true), "{case:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_is_taken_that_git_refuses(case in case()) {
        let (taken_here, taken_by_git) = play(&case);
        match case.mischief {
            Mischief::None => prop_assert!(taken_by_git),
            Mischief::Stale => prop_assert!(!taken_here),
            Mischief::Missing(_) | Mischief::Changed(..) => {}
        }
    }
}
