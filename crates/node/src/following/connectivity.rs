//! Whether nothing is missing from what a new object leads to, found out from the new objects and the few old ones beside
//! them. Nothing here reads or writes anything but through [`Present`].
//!
//! What a reference names is here with all that it leads to; that an object merely is here says nothing, for what it leads
//! to may have been lost. So the new objects are walked through, and where they lead outside there must stand what a
//! reference names (a commit), or what the tree of such a commit has in one of the directories that changed (a tree or a
//! file). That is so for nearly every push. Of any other git is asked; nothing is refused here.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use gix_hash::ObjectId;
use gix_object::Kind;

use super::{LeftToGit, pack::Object};

/// Most objects that are looked up among the old ones.
const MOST_LOOKED_UP: usize = 500;
/// What these may have of bytes together.
const MOST_BYTES: usize = 16 * 1024 * 1024;
/// Directories in directories.
const DEEPEST: usize = 200;
const ID_BYTES: usize = 20;

/// What was here before.
pub(super) trait Present {
    /// The object of this id.
    fn object(&mut self, id: &ObjectId) -> Option<(Kind, Vec<u8>)>;
    /// Whether a reference names it.
    fn is_named(&mut self, id: &ObjectId) -> bool;
}

/// Answers what `tip` is if nothing is missing from what it leads to, now that these objects have come.
pub(super) fn check(
    tip: ObjectId,
    arrived: &[Object],
    present: &mut impl Present,
) -> Result<Kind, LeftToGit> {
    let arrived = arrived.iter().map(|object| (object.id, object)).collect();
    let mut walk = Walk {
        arrived,
        present,
        named: HashMap::new(),
        lookups: MOST_LOOKED_UP,
        room: MOST_BYTES,
        complete: HashSet::new(),
        outside: Vec::new(),
        read: HashMap::new(),
    };
    let (kind, roots) = walk.history(tip)?;
    walk.directories(roots)?;
    let Walk { outside, complete, .. } = walk;
    if outside.iter().any(|entry| !complete.contains(entry)) {
        return Err(LeftToGit("something that is not beside what changed"));
    }
    Ok(kind)
}

/// One line of a tree object.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    name: &'a [u8],
    id: ObjectId,
    /// `None`: a commit of another repository.
    kind: Option<Kind>,
}

struct Walk<'a, P> {
    arrived: HashMap<ObjectId, &'a Object>,
    present: &'a mut P,
    /// By references, of those that were come to; and what they are.
    named: HashMap<ObjectId, Kind>,
    lookups: usize,
    room: usize,
    /// Here with all that they lead to.
    complete: HashSet<(ObjectId, Kind)>,
    /// Wanted, and not among what has come.
    outside: Vec<(ObjectId, Kind)>,
    /// Old trees.
    read: HashMap<ObjectId, Rc<Vec<u8>>>,
}

impl<P: Present> Walk<'_, P> {
    /// Goes through commits and tags; answers what the tip is, and the trees of the new commits.
    fn history(&mut self, tip: ObjectId) -> Result<(Kind, HashSet<ObjectId>), LeftToGit> {
        let (mut seen, mut roots) = (HashSet::new(), HashSet::new());
        let mut waiting = vec![(tip, None)];
        let mut kind_of_tip = None;
        while let Some((id, expected)) = waiting.pop() {
            let kind = match self.arrived.get(&id) {
                Some(object) => object.kind,
                None => self.named(id)?,
            };
            if expected.is_some_and(|expected| expected != kind) {
                return Err(LeftToGit("an object of another kind"));
            }
            kind_of_tip.get_or_insert(kind);
            let Some(object) = self.arrived.get(&id).copied().filter(|_| seen.insert(id)) else { continue };
            let malformed = LeftToGit("a malformed object");
            match kind {
                Kind::Commit => {
                    let (tree, parents) = commit(&object.data).ok_or(malformed)?;
                    roots.insert(tree);
                    waiting.extend(parents.into_iter().map(|parent| (parent, Some(Kind::Commit))));
                }
                Kind::Tag => {
                    let (target, kind) = tag(&object.data).ok_or(malformed)?;
                    waiting.push((target, Some(kind)));
                }
                Kind::Tree | Kind::Blob => return Err(LeftToGit("a tag of what is no commit")),
            }
        }
        Ok((kind_of_tip.ok_or(LeftToGit("nothing"))?, roots))
    }

    /// What an old object is that a reference must name.
    fn named(&mut self, id: ObjectId) -> Result<Kind, LeftToGit> {
        if let Some(kind) = self.named.get(&id) {
            return Ok(*kind);
        }
        if !self.present.is_named(&id) {
            return Err(LeftToGit("history that no reference names"));
        }
        let (kind, data) = self.look_up(&id)?;
        self.named.insert(id, kind);
        if kind == Kind::Commit {
            let (tree, _) = commit(&data).ok_or(LeftToGit("a malformed object"))?;
            self.complete.insert((tree, Kind::Tree));
        }
        Ok(kind)
    }

    fn look_up(&mut self, id: &ObjectId) -> Result<(Kind, Vec<u8>), LeftToGit> {
        let many = LeftToGit("too much to look up");
        self.lookups = self.lookups.checked_sub(1).ok_or(many)?;
        let (kind, data) = self.present.object(id).ok_or(LeftToGit("an object that cannot be read"))?;
        self.room = self.room.checked_sub(data.len()).ok_or(many)?;
        Ok((kind, data))
    }

    /// Goes through the new trees, and beside each through the old ones of the same directory.
    fn directories(&mut self, roots: HashSet<ObjectId>) -> Result<(), LeftToGit> {
        let before: Vec<ObjectId> = self.complete.iter().map(|(id, _)| *id).collect();
        let mut seen = HashSet::new();
        let mut waiting: Vec<_> = roots.into_iter().map(|root| (root, before.clone(), 0)).collect();
        while let Some((id, before, depth)) = waiting.pop() {
            let Some(tree) = self.arrived.get(&id).copied() else {
                self.outside.push((id, Kind::Tree));
                continue;
            };
            if tree.kind != Kind::Tree || depth > DEEPEST {
                return Err(LeftToGit("an object of another kind"));
            }
            if !seen.insert(id) {
                continue;
            }
            let before = self.before(&before)?;
            let inner = |name: &[u8]| {
                let same = |entry: &&Entry<'_>| entry.name == name && entry.kind == Some(Kind::Tree);
                let trees = before.iter().filter_map(|tree| entries(tree));
                trees.filter_map(|entries| entries.iter().find(same).map(|entry| entry.id)).collect()
            };
            for entry in entries(&tree.data).ok_or(LeftToGit("a malformed tree"))? {
                let Some(kind) = entry.kind else { continue };
                match self.arrived.get(&entry.id) {
                    Some(_) if kind == Kind::Tree => waiting.push((entry.id, inner(entry.name), depth + 1)),
                    Some(object) if object.kind != kind => {
                        return Err(LeftToGit("an object of another kind"));
                    }
                    Some(_) => {}
                    None => self.outside.push((entry.id, kind)),
                }
            }
        }
        Ok(())
    }

    /// These old trees. What they have is complete, since they are.
    fn before(&mut self, trees: &[ObjectId]) -> Result<Vec<Rc<Vec<u8>>>, LeftToGit> {
        trees.iter().map(|id| self.old_tree(id)).collect()
    }

    fn old_tree(&mut self, id: &ObjectId) -> Result<Rc<Vec<u8>>, LeftToGit> {
        if let Some(tree) = self.read.get(id) {
            return Ok(Rc::clone(tree));
        }
        let (kind, data) = self.look_up(id)?;
        let entries = entries(&data).filter(|_| kind == Kind::Tree).ok_or(LeftToGit("a malformed tree"))?;
        self.complete.extend(entries.iter().filter_map(|entry| Some((entry.id, entry.kind?))));
        let tree = Rc::new(data);
        self.read.insert(*id, Rc::clone(&tree));
        Ok(tree)
    }
}

/// The value of a header line that must come next.
fn line<'a>(rest: &mut &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let after = rest.strip_prefix(key)?;
    let end = after.iter().position(|byte| *byte == b'\n')?;
    *rest = after.get(end + 1..)?;
    after.get(..end)
}

/// An id in hex, as git writes it.
pub(super) fn id(hex: &[u8]) -> Option<ObjectId> {
    (hex.len() == 2 * ID_BYTES).then(|| ObjectId::from_hex(hex).ok())?
}

/// Tree and parents.
fn commit(data: &[u8]) -> Option<(ObjectId, Vec<ObjectId>)> {
    let mut rest = data;
    let tree = id(line(&mut rest, b"tree ")?)?;
    let mut parents = Vec::new();
    while rest.starts_with(b"parent ") {
        parents.push(id(line(&mut rest, b"parent ")?)?);
    }
    line(&mut rest, b"author ")?;
    line(&mut rest, b"committer ")?;
    Some((tree, parents))
}

/// What a tag is of.
fn tag(data: &[u8]) -> Option<(ObjectId, Kind)> {
    let mut rest = data;
    let target = id(line(&mut rest, b"object ")?)?;
    let kind = match line(&mut rest, b"type ")? {
        b"commit" => Kind::Commit,
        b"tag" => Kind::Tag,
        b"tree" => Kind::Tree,
        b"blob" => Kind::Blob,
        _ => return None,
    };
    line(&mut rest, b"tag ")?;
    line(&mut rest, b"tagger ")?;
    Some((target, kind))
}

/// The lines of a tree object.
fn entries(data: &[u8]) -> Option<Vec<Entry<'_>>> {
    let mut rest = data;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let space = rest.iter().position(|byte| *byte == b' ')?;
        let mode = mode(rest.get(..space)?)?;
        rest = rest.get(space + 1..)?;
        let end = rest.iter().position(|byte| *byte == 0).filter(|end| *end > 0)?;
        let name = rest.get(..end)?;
        let (id, after) = rest.get(end + 1..)?.split_at_checked(ID_BYTES)?;
        rest = after;
        let kind = match mode & 0o170_000 {
            0o040_000 => Some(Kind::Tree),
            0o100_000 | 0o120_000 => Some(Kind::Blob),
            0o160_000 => None,
            _ => return None,
        };
        entries.push(Entry { name, id: ObjectId::try_from(id).ok()?, kind });
    }
    Some(entries)
}

/// In octal digits and nothing else.
fn mode(text: &[u8]) -> Option<u32> {
    let digits = (1..=6).contains(&text.len()) && text.iter().all(|byte| matches!(byte, b'0'..=b'7'));
    let text = std::str::from_utf8(text).ok().filter(|_| digits)?;
    u32::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Old {
        objects: HashMap<ObjectId, Object>,
        named: Vec<ObjectId>,
        lookups: usize,
    }

    impl Present for Old {
        fn object(&mut self, id: &ObjectId) -> Option<(Kind, Vec<u8>)> {
            self.lookups += 1;
            self.objects.get(id).map(|object| (object.kind, object.data.clone()))
        }

        fn is_named(&mut self, id: &ObjectId) -> bool {
            self.named.contains(id)
        }
    }

    fn object(kind: Kind, data: impl Into<Vec<u8>>) -> Object {
        let data = data.into();
        let id = gix_object::compute_hash(gix_hash::Kind::Sha1, kind, &data).unwrap();
        Object { id, kind, data }
    }

    fn blob(data: &str) -> Object {
        object(Kind::Blob, data)
    }

    fn tree(entries: &[(&str, &str, ObjectId)]) -> Object {
        let line = |(mode, name, id): &(&str, &str, ObjectId)| {
            [mode.as_bytes(), b" ", name.as_bytes(), b"\0", id.as_slice()].concat()
        };
        object(Kind::Tree, entries.iter().map(line).collect::<Vec<_>>().concat())
    }

    fn commit_of(tree: ObjectId, parents: &[ObjectId]) -> Object {
        let mut lines = vec![format!("tree {tree}")];
        lines.extend(parents.iter().map(|parent| format!("parent {parent}")));
        lines.extend(["author", "committer"].map(|who| format!("{who} a <a> 0 +0000")));
        object(Kind::Commit, lines.join("\n") + "\n\nx")
    }

    const FILE: &str = "100644";
    const DIRECTORY: &str = "40000";

    /// Files `a`, `d/b` and `e/c`, in a commit that a reference names.
    struct History {
        old: Old,
        commit: Object,
        files: [Object; 3],
        inner: [Object; 2],
    }

    fn history() -> History {
        let files = [blob("a"), blob("b"), blob("c")];
        let inner = [tree(&[(FILE, "b", files[1].id)]), tree(&[(FILE, "c", files[2].id)])];
        let root =
            tree(&[(FILE, "a", files[0].id), (DIRECTORY, "d", inner[0].id), (DIRECTORY, "e", inner[1].id)]);
        let commit = commit_of(root.id, &[]);
        let mut old = Old { named: vec![commit.id], ..Old::default() };
        let all = files.iter().chain(&inner).chain([&root, &commit]).cloned();
        old.objects = all.map(|object| (object.id, object)).collect();
        History { old, commit, files, inner }
    }

    #[test]
    fn a_change_beside_what_a_reference_names_is_complete() {
        let History { mut old, commit, files, inner } = history();
        let file = blob("new");
        let directory = tree(&[(FILE, "b", files[1].id), (FILE, "n", file.id)]);
        let root = tree(&[
            (FILE, "renamed", files[0].id),
            (DIRECTORY, "d", directory.id),
            (DIRECTORY, "e", inner[1].id),
            ("160000", "other", file.id),
        ]);
        let first = commit_of(root.id, &[commit.id]);
        let second = commit_of(root.id, &[first.id, commit.id]);
        let arrived = [file, directory, root, first.clone(), second.clone()];
        assert_eq!(check(second.id, &arrived, &mut old), Ok(Kind::Commit));
        assert_eq!(old.lookups, 3, "the commit, its tree, and the directory that changed");
        assert_eq!(check(first.id, &arrived, &mut old), Ok(Kind::Commit));
        assert_eq!(check(commit.id, &[], &mut old), Ok(Kind::Commit), "a name for what is here");
        for missing in 0..4 {
            let mut fewer = arrived.to_vec();
            fewer.remove(missing);
            assert!(check(second.id, &fewer, &mut old).is_err(), "{missing}");
        }
        old.named.clear();
        assert!(check(second.id, &arrived, &mut old).is_err(), "it is here, but perhaps not with all");
    }

    #[test]
    fn what_is_here_and_not_beside_what_changed_is_left_to_git() {
        let History { mut old, commit, files, .. } = history();
        let stray = blob("stray");
        old.objects.insert(stray.id, stray.clone());
        for (id, complete) in [(files[0].id, true), (files[1].id, false), (stray.id, false)] {
            let root = tree(&[(FILE, "x", id)]);
            let new = commit_of(root.id, &[commit.id]);
            assert_eq!(check(new.id, &[root, new.clone()], &mut old).is_ok(), complete, "{id}");
        }
    }

    #[test]
    fn objects_are_what_they_are_taken_for() {
        let History { mut old, commit, files, inner } = history();
        let new = blob("new");
        let takes = |entry: (&str, &str, ObjectId), arrived: &[Object], old: &mut Old| {
            let root = tree(&[entry]);
            let new = commit_of(root.id, &[commit.id]);
            check(new.id, &[&[root, new.clone()], arrived].concat(), old).is_ok()
        };
        assert!(takes((FILE, "x", new.id), std::slice::from_ref(&new), &mut old));
        assert!(!takes((DIRECTORY, "x", new.id), std::slice::from_ref(&new), &mut old));
        assert!(!takes((FILE, "x", inner[0].id), &[], &mut old), "a directory as a file");
        assert!(takes((DIRECTORY, "x", inner[0].id), &[], &mut old));
        assert!(!takes((DIRECTORY, "x", files[0].id), &[], &mut old));
        let wrong = commit_of(new.id, &[]);
        assert!(check(wrong.id, &[new.clone(), wrong.clone()], &mut old).is_err(), "a file as a root");
        let child = commit_of(inner[0].id, &[new.id]);
        assert!(check(child.id, &[new.clone(), child.clone()], &mut old).is_err(), "a file as a parent");
    }

    #[test]
    fn tags_are_as_complete_as_what_they_are_of() {
        let History { mut old, commit, .. } = history();
        let tag = |target: ObjectId, kind: &str| {
            object(Kind::Tag, format!("object {target}\ntype {kind}\ntag t\ntagger a <a> 0 +0000\n\nx"))
        };
        let of_old = tag(commit.id, "commit");
        assert_eq!(check(of_old.id, std::slice::from_ref(&of_old), &mut old), Ok(Kind::Tag));
        let of_tag = tag(of_old.id, "tag");
        assert_eq!(check(of_tag.id, &[of_old.clone(), of_tag.clone()], &mut old), Ok(Kind::Tag));
        assert!(check(of_tag.id, std::slice::from_ref(&of_tag), &mut old).is_err());
        let lying = tag(commit.id, "tag");
        assert!(check(lying.id, std::slice::from_ref(&lying), &mut old).is_err());
    }

    #[test]
    fn malformed_objects_are_left_to_git() {
        let id = "1".repeat(40);
        let people = "author a <a> 0 +0000\ncommitter a <a> 0 +0000\n\nx";
        assert!(commit(format!("tree {id}\n{people}").as_bytes()).is_some());
        for wrong in [
            format!("tree {}\n{people}", &id[1..]),
            format!("tree {id}\nparent {}\n{people}", &id[1..]),
            format!("parent {id}\n{people}"),
            format!("tree {id}\ncommitter a <a> 0 +0000\n\nx"),
            format!("tree {id}"),
        ] {
            assert!(commit(wrong.as_bytes()).is_none(), "{wrong}");
        }
        let raw = |text: &str| [text.as_bytes(), &[1; 20]].concat();
        assert!(entries(&raw("100644 a\0")).is_some());
        for wrong in ["100644 \0", "+0644 a\0", " a\0", "100648 a\0", "0100644 a\0", "20000 a\0", "100644 a"]
        {
            assert!(entries(&raw(wrong)).is_none(), "{wrong}");
        }
        let mut cut = raw("100644 a\0");
        cut.pop();
        assert!(entries(&cut).is_none());
    }
}
