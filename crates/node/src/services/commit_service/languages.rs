//! CommitLanguages: how much of a commit's files is written in which language.
//!
//! Counted are files of programming and markup languages that people wrote for this project: not what was taken over from
//! elsewhere, documentation, or what programs wrote, unless `.gitattributes` say otherwise. What a tree counted up to is
//! remembered, so that a page that is looked at again costs one look at the commit.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tabularium_proto::gitaly::{
    CommitLanguagesRequest, CommitLanguagesResponse, commit_languages_response::Language as Share,
};
use tonic::{Response, Status};

use super::{
    invalid,
    trees::{Line, parse_line},
};
use crate::{
    git::{Slot, catfile::CatFile, lines::Lines, objects::ItemKind, references, revision},
    linguist::{self, Kind, Language},
    node::Node,
    storage::RepositoryPath,
};

/// As much of a file's beginning as is looked at.
const LOOKED_AT_BYTES: usize = 16 * 1024;
/// Files whose attributes are asked for at once.
const FILES_AT_ONCE: usize = 4096;
/// Most files of one commit.
const MAX_FILES: usize = 2_000_000;
/// Trees whose counts are remembered.
const MAX_REMEMBERED: usize = 512;

/// What `.gitattributes` may say of a file.
const ATTRIBUTES: [&str; 5] = [
    "linguist-documentation",
    "linguist-vendored",
    "linguist-generated",
    "linguist-detectable",
    "linguist-language",
];

/// Bytes by the name of a language.
type Counts = BTreeMap<&'static str, (&'static Language, u64)>;

/// The counts of the trees that were asked for last.
#[derive(Default)]
pub(crate) struct RememberedLanguages(Mutex<VecDeque<(PathBuf, String, Arc<Counts>)>>);

impl RememberedLanguages {
    /// Of a tree in the repository at this path, whose `info/attributes` have a say in it.
    fn get(&self, path: &Path, tree: &str) -> Option<Arc<Counts>> {
        let mut remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = remembered.iter().position(|(of, counted, _)| of.as_path() == path && counted == tree)?;
        let entry = remembered.remove(at)?;
        let counts = Arc::clone(&entry.2);
        remembered.push_back(entry);
        Some(counts)
    }

    /// In place of the tree that was asked for longest ago, when there are too many.
    fn put(&self, path: &Path, tree: String, counts: Arc<Counts>) {
        let mut remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while remembered.len() >= MAX_REMEMBERED {
            remembered.pop_front();
        }
        remembered.push_back((path.to_owned(), tree, counts));
    }
}

pub(super) async fn commit_languages(
    node: &Node,
    request: CommitLanguagesRequest,
) -> Result<Response<CommitLanguagesResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check_or_empty(&request.revision).map_err(invalid)?;
    let revision = if request.revision.is_empty() {
        let branch = references::default_branch(&node.git, &repository).await?;
        branch.ok_or_else(|| Status::internal("no default branch"))?
    } else {
        request.revision
    };
    // A branch goes before whatever else has its name.
    let branch = [b"refs/heads/", revision.as_slice()].concat();
    let tree = match references::read(&node.git, &repository, &branch).await? {
        Some(id) => [id.as_bytes(), b"^{tree}"].concat(),
        None => [revision.as_slice(), b"^{tree}"].concat(),
    };
    let tree = references::resolve(&node.git, &repository, &tree).await?.ok_or_else(|| {
        let revision = String::from_utf8_lossy(&revision);
        Status::internal(format!("looking up revision: exit status 128: unknown revision {revision:?}"))
    })?;
    let remembered = node.languages.get(&repository.path, &tree);
    let counts = if let Some(counts) = remembered {
        counts
    } else {
        let counts = Arc::new(count(node, &repository, &tree).await?);
        node.languages.put(&repository.path, tree, Arc::clone(&counts));
        counts
    };
    Ok(Response::new(CommitLanguagesResponse { languages: shares(&counts) }))
}

/// The largest first.
fn shares(counts: &Counts) -> Vec<Share> {
    let total: u64 = counts.values().map(|(_, bytes)| bytes).sum();
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a share, in percent")]
    let share = |bytes: u64| (100.0 * bytes as f64 / total.max(1) as f64) as f32;
    let mut shares: Vec<Share> = counts
        .values()
        .map(|(language, bytes)| Share {
            name: language.name.to_owned(),
            share: share(*bytes),
            color: language.color(),
            bytes: *bytes,
            language_id: language.id,
        })
        .collect();
    shares.sort_by_key(|share| Reverse(share.bytes));
    shares
}

async fn count(node: &Node, repository: &RepositoryPath, tree: &str) -> Result<Counts, Status> {
    let (asking, reading) = node.git.two_slots().await?;
    let files = files(node, repository, tree, &asking).await?;
    let mut objects = CatFile::start_in(&node.git, repository, &reading).await?;
    let mut counts = Counts::new();
    for files in files.chunks(FILES_AT_ONCE) {
        let said = attributes(node, repository, tree, files, &asking).await?;
        for file in files {
            let said = said.get(&file.path).cloned().unwrap_or_default();
            if said.excludes(&file.path) {
                continue;
            }
            let Some((info, mut beginning)) = objects.head(file.id.as_bytes(), LOOKED_AT_BYTES).await? else {
                return Err(Status::internal(format!("language stats: object {} is missing", file.id)));
            };
            beginning.truncate(LOOKED_AT_BYTES);
            if let Some(language) = said.language(&file.path, &beginning).filter(|_| info.size > 0) {
                counts.entry(language.name).or_insert((language, 0)).1 += info.size;
            }
        }
    }
    objects.close().await?;
    Ok(counts)
}

async fn files(
    node: &Node,
    repository: &RepositoryPath,
    tree: &str,
    slot: &Slot,
) -> Result<Vec<Line>, Status> {
    let command = node.git.command(repository, "ls-tree").slot(slot).args(["-z", "-r", "--full-tree", tree]);
    let mut lines = Lines::start(command, "ls-tree", 0).await?;
    let mut files = Vec::new();
    while let Some(line) = lines.next().await? {
        let Some(file) = parse_line(&line).filter(|line| line.kind == ItemKind::Blob) else { continue };
        if files.len() == MAX_FILES {
            return Err(Status::internal(format!("language stats: more than {MAX_FILES} files")));
        }
        files.push(file);
    }
    lines.checked().await?;
    Ok(files)
}

/// What is said of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Said {
    documentation: Option<bool>,
    vendored: Option<bool>,
    generated: Option<bool>,
    detectable: Option<bool>,
    language: Option<Vec<u8>>,
}

impl Said {
    /// Whether the file counts for nothing, going by its path.
    fn excludes(&self, path: &[u8]) -> bool {
        self.documentation.unwrap_or_else(|| linguist::is_documentation(path))
            || self.vendored.unwrap_or_else(|| linguist::is_vendored(path))
    }

    /// The language that the file counts for.
    fn language(&self, path: &[u8], beginning: &[u8]) -> Option<&'static Language> {
        if self.generated.unwrap_or_else(|| linguist::is_generated(path, beginning)) {
            return None;
        }
        let language = match &self.language {
            Some(name) => linguist::by_alias(name),
            None => linguist::language(path, beginning),
        }?;
        let counted = matches!(language.kind, Kind::Programming | Kind::Markup);
        self.detectable.unwrap_or(counted).then_some(language)
    }
}

async fn attributes(
    node: &Node,
    repository: &RepositoryPath,
    tree: &str,
    files: &[Line],
    slot: &Slot,
) -> Result<HashMap<Vec<u8>, Said>, Status> {
    let command = node.git.command(repository, "check-attr").slot(slot).args(["--stdin", "-z", "--source"]);
    let command = command.arg(OsStr::from_bytes(tree.as_bytes())).args(ATTRIBUTES);
    let mut input = Vec::new();
    for file in files {
        input.extend_from_slice(&file.path);
        input.push(0);
    }
    let mut words = Lines::start_with(command, "check-attr", 0, input).await?;
    let mut said = HashMap::<Vec<u8>, Said>::new();
    while let (Some(path), Some(attribute), Some(value)) =
        (words.next().await?, words.next().await?, words.next().await?)
    {
        if value == b"unspecified" {
            continue;
        }
        let flag = match value.as_slice() {
            b"set" | b"true" => Some(true),
            b"unset" | b"false" => Some(false),
            _ => None,
        };
        let file = said.entry(path).or_default();
        match attribute.as_slice() {
            b"linguist-documentation" => file.documentation = flag,
            b"linguist-vendored" => file.vendored = flag,
            b"linguist-generated" => file.generated = flag,
            b"linguist-detectable" => file.detectable = flag,
            b"linguist-language" => file.language = Some(value).filter(|_| flag.is_none()),
            _ => {}
        }
    }
    words.checked().await?;
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_goes_before_what_is_guessed() {
        let nothing = Said::default();
        assert!(nothing.excludes(b"vendor/a.rs") && nothing.excludes(b"docs/a.rs"));
        assert!(!Said { vendored: Some(false), ..Said::default() }.excludes(b"vendor/a.rs"));
        assert!(Said { documentation: Some(true), ..Said::default() }.excludes(b"src/a.rs"));
        let name = |said: &Said, path: &str| said.language(path.as_bytes(), b"x\n").map(|found| found.name);
        assert_eq!(name(&nothing, "a.rs"), Some("Rust"));
        assert_eq!(name(&nothing, "a.json"), None);
        assert_eq!(name(&Said { detectable: Some(true), ..Said::default() }, "a.json"), Some("JSON"));
        assert_eq!(name(&Said { detectable: Some(false), ..Said::default() }, "a.rs"), None);
        assert_eq!(name(&Said { generated: Some(true), ..Said::default() }, "a.rs"), None);
        assert_eq!(
            name(&Said { generated: Some(false), ..Said::default() }, "node_modules/a.js"),
            Some("JavaScript")
        );
        assert_eq!(name(&Said { language: Some(b"ruby".to_vec()), ..Said::default() }, "a.rs"), Some("Ruby"));
        assert_eq!(name(&Said { language: Some(b"no such".to_vec()), ..Said::default() }, "a.rs"), None);
    }

    #[test]
    fn shares_are_percents_and_the_largest_comes_first() {
        let rust = linguist::by_alias(b"rust").unwrap();
        let ruby = linguist::by_alias(b"ruby").unwrap();
        let counts = Counts::from([("Rust", (rust, 1)), ("Ruby", (ruby, 3))]);
        let shares = shares(&counts);
        assert_eq!((shares[0].name.as_str(), shares[0].share, shares[0].bytes), ("Ruby", 75.0, 3));
        assert_eq!((shares[1].name.as_str(), shares[1].share, shares[1].language_id), ("Rust", 25.0, 327));
        assert_eq!(super::shares(&Counts::new()), []);
    }

    #[test]
    fn only_so_many_are_remembered() {
        let remembered = RememberedLanguages::default();
        let path = PathBuf::from("/a");
        for number in 0..MAX_REMEMBERED {
            remembered.put(&path, number.to_string(), Arc::default());
        }
        assert!(remembered.get(&path, "0").is_some());
        remembered.put(&path, "new".into(), Arc::default());
        assert!(remembered.get(&path, "0").is_some() && remembered.get(&path, "new").is_some());
        assert!(remembered.get(&path, "1").is_none() && remembered.get(Path::new("/b"), "0").is_none());
    }
}
