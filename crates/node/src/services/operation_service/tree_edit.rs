//! The tree of a commit being made: actions of UserCommitFiles applied to what the parent commit holds.
//!
//! Only directories on the way to a changed path are ever read or written. This is the pure half: it says which tree it
//! needs next, is given its entries, and says which trees have to be written, the deepest first.

use std::collections::BTreeMap;

use tabularium_proto::gitaly::{IndexError as IndexErrorDetail, index_error::ErrorType};

use crate::git::objects::{ItemKind, TreeItem};

/// Names from the root to a file.
pub(super) type Path = Vec<Vec<u8>>;

/// Why an action does not fit the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    EmptyPath,
    InvalidPath,
    DirectoryExists,
    DirectoryTraversal,
    FileExists,
    FileNotFound,
}

/// An action that does not fit, and its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IndexError {
    pub(super) fault: Fault,
    pub(super) path: Vec<u8>,
}

impl IndexError {
    pub(super) fn text(&self) -> String {
        match self.fault {
            Fault::EmptyPath => "You must provide a file path".to_owned(),
            Fault::InvalidPath => format!("invalid path: {:?}", String::from_utf8_lossy(&self.path)),
            Fault::DirectoryExists => "A directory with this name already exists".to_owned(),
            Fault::DirectoryTraversal => "Path cannot include directory traversal".to_owned(),
            Fault::FileExists => "A file with this name already exists".to_owned(),
            Fault::FileNotFound => "A file with this name doesn't exist".to_owned(),
        }
    }

    pub(super) fn code(&self) -> tonic::Code {
        match self.fault {
            Fault::EmptyPath | Fault::InvalidPath | Fault::DirectoryTraversal => tonic::Code::InvalidArgument,
            Fault::DirectoryExists | Fault::FileExists => tonic::Code::AlreadyExists,
            Fault::FileNotFound => tonic::Code::NotFound,
        }
    }

    pub(super) fn detail(&self) -> IndexErrorDetail {
        let kind = match self.fault {
            Fault::EmptyPath => ErrorType::EmptyPath,
            Fault::InvalidPath => ErrorType::InvalidPath,
            Fault::DirectoryExists => ErrorType::DirectoryExists,
            Fault::DirectoryTraversal => ErrorType::DirectoryTraversal,
            Fault::FileExists => ErrorType::FileExists,
            Fault::FileNotFound => ErrorType::FileNotFound,
        };
        IndexErrorDetail { path: self.path.clone(), error_type: kind as i32 }
    }
}

/// The path of a request as names; `.` and inner `..` are resolved.
pub(super) fn parse_path(path: &[u8]) -> Result<Path, IndexError> {
    let fault = |fault| IndexError { fault, path: path.to_vec() };
    if path.is_empty() {
        return Err(fault(Fault::EmptyPath));
    }
    if path.windows(2).any(|pair| pair == b"//") || path.contains(&0) {
        return Err(fault(Fault::InvalidPath));
    }
    let mut names: Path = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop().ok_or_else(|| fault(Fault::DirectoryTraversal))?;
            }
            name => names.push(name.to_vec()),
        }
    }
    // A checkout would write such a file into the client's own repository.
    let own = |name: &Vec<u8>| name.eq_ignore_ascii_case(b".git") || name.eq_ignore_ascii_case(b"git~1");
    if names.is_empty() || names.iter().any(own) {
        return Err(fault(Fault::InvalidPath));
    }
    Ok(names)
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Create {
        path: Path,
        id: String,
        executable: bool,
    },
    /// `keep` is the id of the empty blob behind `.gitkeep`.
    CreateDirectory {
        path: Path,
        keep: String,
    },
    Update {
        path: Path,
        id: String,
    },
    /// Without an id the content stays as it is.
    Move {
        from: Path,
        to: Path,
        id: Option<String>,
    },
    Delete {
        path: Path,
    },
    ChangeMode {
        path: Path,
        executable: bool,
    },
    /// Another commit of the repository that is at the path.
    SetSubmodule {
        path: Path,
        id: String,
    },
}

impl Action {
    /// Every path whose directories must be known.
    pub(super) fn paths(&self) -> Vec<&Path> {
        match self {
            Self::Create { path, .. }
            | Self::Update { path, .. }
            | Self::Delete { path }
            | Self::CreateDirectory { path, .. }
            | Self::ChangeMode { path, .. }
            | Self::SetSubmodule { path, .. } => vec![path],
            Self::Move { from, to, .. } => vec![from, to],
        }
    }
}

#[derive(Debug)]
enum Node {
    Leaf { mode: u32, id: String },
    Directory(Directory),
}

#[derive(Debug)]
struct Directory {
    /// Id of the tree while it is unchanged.
    id: Option<String>,
    /// `None` while it has not been read.
    entries: Option<BTreeMap<Vec<u8>, Node>>,
}

impl Directory {
    fn empty() -> Self {
        Self { id: None, entries: Some(BTreeMap::new()) }
    }

    fn touch(&mut self) -> &mut BTreeMap<Vec<u8>, Node> {
        self.id = None;
        self.entries.get_or_insert_default()
    }
}

const REGULAR: u32 = 0o100_644;
const EXECUTABLE: u32 = 0o100_755;
/// A commit of another repository.
pub(super) const SUBMODULE: u32 = 0o160_000;

/// A tree with changes.
#[derive(Debug)]
pub(super) struct TreeEdit {
    root: Directory,
}

impl TreeEdit {
    /// On top of a tree, or of nothing.
    pub(super) fn new(tree: Option<String>) -> Self {
        let root = match tree {
            Some(id) => Directory { id: Some(id), entries: None },
            None => Directory::empty(),
        };
        Self { root }
    }

    /// The next tree that has to be read before an action at `path` can be applied: its place and its id.
    pub(super) fn unread(&self, path: &Path) -> Option<(Path, String)> {
        let mut directory = &self.root;
        let mut place = Path::new();
        let mut names = path.iter();
        loop {
            let Some(entries) = &directory.entries else {
                return directory.id.clone().map(|id| (place, id));
            };
            // The last name is looked up in its directory; what is below it does not matter.
            let name = names.next()?;
            if names.len() == 0 {
                return None;
            }
            match entries.get(name) {
                Some(Node::Directory(next)) => {
                    place.push(name.clone());
                    directory = next;
                }
                Some(Node::Leaf { .. }) | None => return None,
            }
        }
    }

    /// Takes the entries of the tree at `place`.
    pub(super) fn read(&mut self, place: &Path, items: Vec<TreeItem>) {
        if let Some(directory) = self.directory(place) {
            let entries = items.into_iter().map(|item| {
                let node = if ItemKind::of_mode(item.mode) == ItemKind::Tree {
                    Node::Directory(Directory { id: Some(item.id), entries: None })
                } else {
                    Node::Leaf { mode: item.mode, id: item.id }
                };
                (item.name, node)
            });
            directory.entries = Some(entries.collect());
        }
    }

    fn directory(&mut self, place: &[Vec<u8>]) -> Option<&mut Directory> {
        let mut directory = &mut self.root;
        for name in place {
            match directory.entries.as_mut()?.get_mut(name)? {
                Node::Directory(next) => directory = next,
                Node::Leaf { .. } => return None,
            }
        }
        Some(directory)
    }

    fn node(&mut self, path: &[Vec<u8>]) -> Option<&mut Node> {
        let (name, place) = path.split_last()?;
        self.directory(place)?.entries.as_mut()?.get_mut(name)
    }

    /// Applies one action. Every tree on its paths has been read.
    pub(super) fn apply(&mut self, action: &Action) -> Result<(), IndexError> {
        match action {
            Action::Create { path, id, executable } => {
                let mode = if *executable { EXECUTABLE } else { REGULAR };
                self.add(path, mode, id)
            }
            Action::CreateDirectory { path, keep } => {
                match self.node(path) {
                    Some(Node::Directory(_) | Node::Leaf { mode: SUBMODULE, .. }) => {
                        return Err(fault(Fault::DirectoryExists, path));
                    }
                    Some(Node::Leaf { .. }) => return Err(fault(Fault::FileExists, path)),
                    None => {}
                }
                let mut file = path.clone();
                file.push(b".gitkeep".to_vec());
                self.add(&file, REGULAR, keep).map_err(|_| fault(Fault::DirectoryExists, path))
            }
            Action::Update { path, id } => {
                let (mode, _) = self.file(path)?;
                self.replace(path, mode, id.clone());
                Ok(())
            }
            Action::ChangeMode { path, executable } => {
                let (mode, id) = self.file(path)?;
                let mode = match (executable, mode) {
                    (true, _) => EXECUTABLE,
                    (false, EXECUTABLE) => REGULAR,
                    (false, other) => other,
                };
                self.replace(path, mode, id);
                Ok(())
            }
            Action::Move { from, to, id } => {
                let (mode, old) = self.file(from)?;
                self.remove(from)?;
                self.add(to, mode, id.as_ref().unwrap_or(&old))
            }
            Action::Delete { path } => self.remove(path),
            Action::SetSubmodule { path, id } => match self.node(path) {
                Some(Node::Leaf { mode: SUBMODULE, .. }) => {
                    self.replace(path, SUBMODULE, id.clone());
                    Ok(())
                }
                _ => Err(fault(Fault::FileNotFound, path)),
            },
        }
    }

    fn file(&mut self, path: &Path) -> Result<(u32, String), IndexError> {
        match self.node(path) {
            Some(Node::Leaf { mode, id }) if *mode != SUBMODULE => Ok((*mode, id.clone())),
            _ => Err(fault(Fault::FileNotFound, path)),
        }
    }

    /// Marks every directory on the way as changed and answers the one the path's last name is in. Directories that are
    /// not there are made; a file in the way is an error.
    fn touch(&mut self, path: &Path) -> Result<&mut BTreeMap<Vec<u8>, Node>, IndexError> {
        let place = path.split_last().map_or(&[][..], |(_, place)| place);
        let mut directory = &mut self.root;
        for name in place {
            let next =
                directory.touch().entry(name.clone()).or_insert_with(|| Node::Directory(Directory::empty()));
            match next {
                Node::Directory(next) => directory = next,
                Node::Leaf { .. } => return Err(fault(Fault::FileExists, path)),
            }
        }
        Ok(directory.touch())
    }

    fn replace(&mut self, path: &Path, mode: u32, id: String) {
        if let (Some(name), Ok(entries)) = (path.last(), self.touch(path)) {
            entries.insert(name.clone(), Node::Leaf { mode, id });
        }
    }

    /// A new file. A directory of that name gives way, a file does not.
    fn add(&mut self, path: &Path, mode: u32, id: &str) -> Result<(), IndexError> {
        if let Some(Node::Leaf { .. }) = self.node(path) {
            return Err(fault(Fault::FileExists, path));
        }
        let entries = self.touch(path)?;
        if let Some(name) = path.last() {
            entries.insert(name.clone(), Node::Leaf { mode, id: id.to_owned() });
        }
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> Result<(), IndexError> {
        if self.node(path).is_none() {
            return Err(fault(Fault::FileNotFound, path));
        }
        let entries = self.touch(path)?;
        if let Some(name) = path.last() {
            entries.remove(name);
        }
        Ok(())
    }

    /// Places of all changed directories, every one behind those inside of it; the root is the last.
    pub(super) fn changed(&self) -> Vec<Path> {
        fn walk(directory: &Directory, place: &mut Path, found: &mut Vec<Path>) {
            if directory.id.is_some() {
                return;
            }
            for (name, node) in directory.entries.iter().flatten() {
                if let Node::Directory(inner) = node {
                    place.push(name.clone());
                    walk(inner, place, found);
                    place.pop();
                }
            }
            found.push(place.clone());
        }
        let mut found = Vec::new();
        walk(&self.root, &mut Path::new(), &mut found);
        found
    }

    /// What the tree at `place` is to hold; directories that have become empty are left out. The trees inside of it
    /// have been written.
    pub(super) fn entries(&mut self, place: &Path) -> Vec<TreeItem> {
        let Some(entries) = self.directory(place).and_then(|directory| directory.entries.as_mut()) else {
            return Vec::new();
        };
        entries.retain(|_, node| match node {
            Node::Directory(inner) => inner.entries.as_ref().is_none_or(|entries| !entries.is_empty()),
            Node::Leaf { .. } => true,
        });
        let item = |(name, node): (&Vec<u8>, &Node)| match node {
            Node::Leaf { mode, id } => TreeItem { mode: *mode, name: name.clone(), id: id.clone() },
            Node::Directory(inner) => {
                TreeItem { mode: 0o040_000, name: name.clone(), id: inner.id.clone().unwrap_or_default() }
            }
        };
        entries.iter().map(item).collect()
    }

    /// The tree at `place` has been written.
    pub(super) fn written(&mut self, place: &Path, id: String) {
        if let Some(directory) = self.directory(place) {
            directory.id = Some(id);
        }
    }

    /// The id of the whole, once everything has been written.
    pub(super) fn id(&self) -> Option<&str> {
        self.root.id.as_deref()
    }
}

fn fault(fault: Fault, path: &Path) -> IndexError {
    IndexError { fault, path: path.join(&b'/') }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        parse_path(text.as_bytes()).unwrap()
    }

    fn item(mode: u32, name: &str, id: &str) -> TreeItem {
        TreeItem { mode, name: name.into(), id: id.into() }
    }

    /// `a` (file), `d/` with `x` (executable) and `e/` (unread).
    fn tree() -> TreeEdit {
        let mut edit = TreeEdit::new(Some("root".into()));
        assert_eq!(edit.unread(&path("d/x")), Some((vec![], "root".into())));
        edit.read(&vec![], vec![item(REGULAR, "a", "ida"), item(0o040_000, "d", "idd")]);
        assert_eq!(edit.unread(&path("a")), None);
        assert_eq!(edit.unread(&path("d")), None, "a directory itself need not be read");
        assert_eq!(edit.unread(&path("d/x")), Some((path("d"), "idd".into())));
        edit.read(&path("d"), vec![item(EXECUTABLE, "x", "idx"), item(0o040_000, "e", "ide")]);
        assert_eq!(edit.unread(&path("d/x")), None);
        edit
    }

    fn create(at: &str) -> Action {
        Action::Create { path: path(at), id: "new".into(), executable: false }
    }

    fn faults(action: &Action) -> Option<Fault> {
        tree().apply(action).err().map(|error| error.fault)
    }

    /// Writes everything with ids made of places, and answers `place: names`.
    fn write(edit: &mut TreeEdit) -> Vec<String> {
        edit.changed()
            .iter()
            .map(|place| {
                let entries = edit.entries(place);
                let text = |item: TreeItem| {
                    format!("{:o} {} {}", item.mode, String::from_utf8_lossy(&item.name), item.id)
                };
                let entries: Vec<String> = entries.into_iter().map(text).collect();
                let name = String::from_utf8_lossy(&place.join(&b'/')).into_owned();
                edit.written(place, format!("<{name}>"));
                format!("{name}: {}", entries.join(", "))
            })
            .collect()
    }

    #[test]
    fn paths() {
        assert_eq!(parse_path(b"a/./b/../c").unwrap(), path("a/c"));
        assert_eq!(parse_path(b"/a").unwrap(), path("a"));
        for (given, expected) in [
            ("", Fault::EmptyPath),
            ("a//b", Fault::InvalidPath),
            ("../a", Fault::DirectoryTraversal),
            ("a/../../b", Fault::DirectoryTraversal),
            (".git/config", Fault::InvalidPath),
            ("a/.GIT", Fault::InvalidPath),
            (".", Fault::InvalidPath),
            ("a\0b", Fault::InvalidPath),
        ] {
            assert_eq!(parse_path(given.as_bytes()).unwrap_err().fault, expected, "{given}");
        }
    }

    #[test]
    fn actions_that_do_not_fit() {
        assert_eq!(faults(&create("a")), Some(Fault::FileExists));
        assert_eq!(faults(&create("a/b")), Some(Fault::FileExists));
        assert_eq!(faults(&create("d/x/y")), Some(Fault::FileExists));
        assert_eq!(faults(&create("d")), None, "a directory gives way");
        let directory = |at: &str| Action::CreateDirectory { path: path(at), keep: "keep".into() };
        assert_eq!(faults(&directory("d")), Some(Fault::DirectoryExists));
        assert_eq!(faults(&directory("a")), Some(Fault::FileExists));
        assert_eq!(faults(&directory("a/b")), Some(Fault::DirectoryExists));
        for gone in ["none", "d", "d/none", "a/b"] {
            assert_eq!(
                faults(&Action::Update { path: path(gone), id: "n".into() }),
                Some(Fault::FileNotFound)
            );
            assert_eq!(
                faults(&Action::ChangeMode { path: path(gone), executable: true }),
                Some(Fault::FileNotFound)
            );
        }
        let moved = |from: &str, to: &str| Action::Move { from: path(from), to: path(to), id: None };
        assert_eq!(faults(&moved("none", "b")), Some(Fault::FileNotFound));
        assert_eq!(faults(&moved("a", "d/x")), Some(Fault::FileExists));
        assert_eq!(faults(&Action::Delete { path: path("none") }), Some(Fault::FileNotFound));
        assert_eq!(faults(&Action::Delete { path: path("d") }), None);
    }

    #[test]
    fn only_changed_trees_are_written_the_deepest_first() {
        let mut edit = tree();
        edit.apply(&create("n/m/f")).unwrap();
        edit.apply(&Action::Update { path: path("d/x"), id: "upd".into() }).unwrap();
        assert_eq!(
            write(&mut edit),
            [
                "d: 40000 e ide, 100755 x upd",
                "n/m: 100644 f new",
                "n: 40000 m <n/m>",
                ": 100644 a ida, 40000 d <d>, 40000 n <n>",
            ]
        );
        assert_eq!(edit.id(), Some("<>"));
    }

    #[test]
    fn directories_that_became_empty_go() {
        let mut edit = TreeEdit::new(None);
        edit.apply(&create("p/q/f")).unwrap();
        edit.apply(&create("keep")).unwrap();
        edit.apply(&Action::Move { from: path("p/q/f"), to: path("g"), id: Some("other".into()) }).unwrap();
        assert_eq!(write(&mut edit), ["p/q: ", "p: ", ": 100644 g other, 100644 keep new"]);
    }

    #[test]
    fn modes() {
        let mut edit = tree();
        edit.apply(&Action::ChangeMode { path: path("a"), executable: true }).unwrap();
        edit.apply(&Action::ChangeMode { path: path("d/x"), executable: false }).unwrap();
        let written = write(&mut edit);
        assert_eq!(written, ["d: 40000 e ide, 100644 x idx", ": 100755 a ida, 40000 d <d>"]);
    }
}
