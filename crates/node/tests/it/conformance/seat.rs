//! Whoever sits behind the RPCs: the node, or GitLab's Gitaly where its program is at hand. Both get the same storage.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use tabularium_common::grpc::{self, Address};
use tabularium_node::config::Config;
use tempfile::TempDir;
use tokio::process::Child;
use tonic::service::interceptor::InterceptedService;

use crate::{
    custom_hooks::archive,
    gitlab::fake::Gitlab,
    harness::{Caller, Client, TOKEN, TestNode, eventually, git},
    seed::fast_import,
};

pub(super) const STORAGE: &str = "default";
/// A pool, and a repository that borrows from it.
pub(super) const POOL: &str =
    "@pools/6b/86/6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b.git";
/// The repositories of the storage, as every exchange that writes finds them.
const REPOSITORIES: &[&str] = &["a.git", "other.git", "empty.git", "broken.git", "member.git", POOL];

/// How objects are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Sha1,
    Sha256,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }

    fn hex_digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
        }
    }
}

/// Who answers.
enum Sitter {
    Node(Box<TestNode>),
    Gitaly { _process: Box<Child>, _directory: TempDir },
}

/// One who answers, its storage, and the names of what is in it.
pub(super) struct Seat {
    sitter: Sitter,
    address: Address,
    root: PathBuf,
    templates: TempDir,
    format: Format,
    /// What the disk shows at the beginning.
    pub(super) beginning: BTreeSet<String>,
    /// Words of the tables, and what they stand for.
    words: BTreeMap<&'static str, String>,
}

impl Seat {
    pub(super) async fn node(format: Format) -> Self {
        Self::node_with(format, |_| ()).await
    }

    /// A node that is configured differently.
    pub(super) async fn node_with(format: Format, change: impl FnOnce(&mut Config)) -> Self {
        let node = TestNode::start_with(change).await;
        let (address, root) = (node.address.clone(), node.root());
        Self::new(Sitter::Node(Box::new(node)), address, root, format)
    }

    /// GitLab's program in this folder.
    pub(super) async fn gitaly(programs: &Path, format: Format) -> Self {
        Self::gitaly_with(programs, format, "").await
    }

    /// That program with these settings about git.
    pub(super) async fn gitaly_with(programs: &Path, format: Format, settings: &str) -> Self {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let at = |name: &str| directory.path().join(name);
        let quoted = |path: PathBuf| format!("\"{}\"", path.display());
        for name in ["storage", "run", "shell"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("secret"), "secret").unwrap();
        let socket = at("gitaly.socket");
        let config = format!(
            "socket_path = {}\nbin_dir = {}\nruntime_dir = {}\n[auth]\ntoken = {TOKEN:?}\n\
             [git]\nbin_path = \"/usr/bin/git\"\n{settings}\n[gitlab]\nurl = {:?}\nsecret_file = {}\n\
             [gitlab-shell]\ndir = {}\n[[storage]]\nname = {STORAGE:?}\npath = {}\n",
            quoted(socket.clone()),
            quoted(programs.to_owned()),
            quoted(at("run")),
            Gitlab::agreeing().serve().await,
            quoted(at("secret")),
            quoted(at("shell")),
            quoted(at("storage")),
        );
        fs::write(at("config.toml"), config).unwrap();
        let log = fs::File::create(at("log")).unwrap();
        let process = tokio::process::Command::new(programs.join("gitaly"))
            .arg("serve")
            .arg(at("config.toml"))
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        eventually("Gitaly listens", async || socket.exists()).await;
        let address = format!("unix:{}", socket.display()).parse().unwrap();
        let root = at("storage");
        Self::new(
            Sitter::Gitaly { _process: Box::new(process), _directory: directory },
            address,
            root,
            format,
        )
    }

    fn new(sitter: Sitter, address: Address, root: PathBuf, format: Format) -> Self {
        let templates = tempfile::tempdir().unwrap();
        let words = seed(templates.path(), format);
        let beginning = BTreeSet::new();
        let mut seat = Self { sitter, address, root, templates, format, beginning, words };
        seat.reset();
        seat.beginning = seat.disk();
        seat
    }

    pub(super) fn channel(&self) -> Client {
        InterceptedService::new(grpc::channel(&self.address), Caller::known())
    }

    /// The `gitaly-servers` metadata that leads back here.
    pub(super) fn servers(&self) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        STANDARD.encode(format!(r#"{{"{STORAGE}":{{"address":"{}","token":"{TOKEN}"}}}}"#, self.address))
    }

    pub(super) async fn leave(self) {
        if let Sitter::Node(node) = self.sitter {
            node.stop().await;
        }
    }

    /// The storage as it was at the beginning.
    pub(super) fn reset(&self) {
        for entry in fs::read_dir(&self.root).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with(['+', '.']) || !entry.file_type().unwrap().is_dir() {
                continue;
            }
            fs::remove_dir_all(entry.path()).unwrap();
        }
        let mut copy = std::process::Command::new("cp");
        copy.arg("-a").arg(self.templates.path().join(".")).arg(&self.root);
        assert!(copy.status().unwrap().success());
    }

    /// What can be seen of the storage: references, HEAD, configuration, custom hooks, attributes, alternates.
    pub(super) fn disk(&self) -> BTreeSet<String> {
        let mut lines = BTreeSet::new();
        self.look(&self.root, &mut lines);
        lines
    }

    fn look(&self, directory: &Path, lines: &mut BTreeSet<String>) {
        let name = directory.strip_prefix(&self.root).unwrap().display().to_string();
        if directory.join("HEAD").exists() {
            let mut see = |what: &str, text: &str| {
                lines.extend(text.lines().map(|line| format!("{name} {what}{line}")));
            };
            for (what, file) in [
                ("HEAD ", "HEAD"),
                ("alternates ", "objects/info/alternates"),
                ("attributes ", "info/attributes"),
            ] {
                see(what, &fs::read_to_string(directory.join(file)).unwrap_or_default());
            }
            see("config ", &configuration(directory));
            for (reference, id) in references(directory) {
                see("", &format!("{reference} {id}"));
            }
            let hooks = directory.join("custom_hooks");
            for entry in fs::read_dir(&hooks).into_iter().flatten().flatten() {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                see(&format!("custom_hooks/{} ", entry.file_name().display()), text.trim_end());
            }
            return;
        }
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let inner = entry.file_name();
            let ours = directory == self.root && inner.to_string_lossy().starts_with(['+', '.']);
            if entry.file_type().unwrap().is_dir() && !ours {
                self.look(&entry.path(), lines);
            }
        }
    }

    /// Puts what words stand for in their places.
    pub(super) fn fill_in(&self, text: &str) -> String {
        let mut text = text.to_owned();
        // A word that another one begins with comes later.
        for (word, meaning) in self.words.iter().rev() {
            text = text.replace(word, meaning);
        }
        text
    }

    /// The reverse, for answers. Which git it is they do not tell.
    pub(super) fn by_words(&self, text: &str) -> String {
        let agent = regex::Regex::new("agent=git/[-._0-9A-Za-z]+").unwrap();
        let text = text.replace(&*self.root.to_string_lossy(), "$storage");
        let mut text = agent.replace_all(&text, "agent=git").into_owned();
        for (word, meaning) in &self.words {
            if meaning.len() == self.format.hex_digits() {
                text = text.replace(meaning, word);
            }
        }
        text
    }
}

/// Bytes as the text format has them.
fn escaped(bytes: &[u8]) -> String {
    let octal = |byte: &u8| ['\\', digit(byte >> 6), digit((byte >> 3) & 7), digit(byte & 7)];
    bytes.iter().flat_map(octal).collect()
}

fn digit(value: u8) -> char {
    char::from(b'0' + value)
}

/// What is configured beside what git itself writes.
fn configuration(repository: &Path) -> String {
    let text = fs::read_to_string(repository.join("config")).unwrap_or_default();
    let sections = text.split('[').skip(1);
    let sections = sections.filter(|section| !section.starts_with("core") && !section.starts_with("ext"));
    let lines =
        sections.map(|section| format!("[{}", section.split_whitespace().collect::<Vec<_>>().join(" ")));
    lines.collect::<Vec<_>>().join("\n")
}

/// The references of a repository, read as git reads them: starting it for each would take most of a test's time.
fn references(repository: &Path) -> BTreeMap<String, String> {
    let packed = fs::read_to_string(repository.join("packed-refs")).unwrap_or_default();
    let packed = packed.lines().filter(|line| !line.starts_with(['#', '^']));
    let mut references: BTreeMap<String, String> = packed
        .map(|line| line.split_once(' ').map(|(id, name)| (name.to_owned(), id.to_owned())).unwrap())
        .collect();
    let mut directories = vec![repository.join("refs")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(repository).unwrap().display().to_string();
                references.insert(name, fs::read_to_string(entry.path()).unwrap().trim_end().to_owned());
            }
        }
    }
    references
}

/// Makes the repositories, and answers what words stand for.
fn seed(templates: &Path, format: Format) -> BTreeMap<&'static str, String> {
    for path in REPOSITORIES {
        let repository = templates.join(path);
        fs::create_dir_all(&repository).unwrap();
        let option = format!("--object-format={}", format.name());
        git(
            &repository,
            &["init", "--quiet", "--bare", "--template=", "--initial-branch=main", &option, "."],
        );
    }
    let a = templates.join("a.git");
    let module = "11".repeat(format.hex_digits() / 2);
    fast_import(&a, include_str!("a.import").replace("$module", &module).as_bytes());
    fast_import(
        &templates.join("other.git"),
        b"commit refs/heads/main\ncommitter O <o@x> 1700001000 +0000\ndata 5\nother\nM 100644 inline other\ndata 1\no\n\n",
    );
    for path in [POOL, "member.git"] {
        git(&templates.join(path), &["fetch", "--quiet", a.to_str().unwrap(), "+refs/heads/*:refs/heads/*"]);
    }
    let up = "../".repeat(2);
    fs::write(templates.join("member.git/objects/info/alternates"), format!("{up}{POOL}/objects\n")).unwrap();
    for path in REPOSITORIES {
        git(&templates.join(path), &["pack-refs", "--all"]);
    }
    fs::remove_file(templates.join("broken.git/HEAD")).unwrap();

    let id = |revision: &str| git(&a, &["rev-parse", "--verify", revision]);
    // GitLab's hooks ask whose repository it is.
    let here = |path: &str| {
        let project = path.trim_end_matches(".git");
        format!(
            r#"storage_name: "{STORAGE}" relative_path: "{path}" gl_repository: "{project}" gl_project_path: "a/b""#
        )
    };
    let digits = format.hex_digits();
    let bundle = templates.join("other.bundle");
    git(&templates.join("other.git"), &["bundle", "create", "--quiet", bundle.to_str().unwrap(), "--all"]);
    let other_bundle = fs::read(&bundle).unwrap();
    fs::remove_file(bundle).unwrap();
    let line = format!("{} {} refs/heads/side\\000report-status\\n", id("side"), "0".repeat(digits));
    BTreeMap::from([
        // A push that removes a branch.
        ("$delete", format!("{:04x}{line}0000", line.len())),
        ("$nothing", String::new()),
        ("$bundle", escaped(&other_bundle)),
        ("$hooks", escaped(&archive(&[("custom_hooks/update", 0o755, "#!/bin/sh\n")]))),
        ("$first", id("main~2")),
        ("$second", id("main~1")),
        ("$main", id("main")),
        ("$feature", id("feature")),
        ("$conflict", id("conflict")),
        ("$tag", id("v2")),
        ("$blob", id("main:README")),
        ("$oldblob", id("main~1~1:README")),
        ("$pointer", id("main:lfs.bin")),
        ("$tree", id("main^{tree}")),
        ("$subtree", id("main:a")),
        ("$missing", "de".repeat(digits / 2)),
        ("$zero", "0".repeat(digits)),
        ("$module", module),
        ("$other", here("other.git")),
        ("$empty", here("empty.git")),
        ("$here", here("a.git")),
        ("$pool", here(POOL)),
        ("$member", here("member.git")),
        ("$new", here("x/y/new.git")),
        ("$absent", here("absent.git")),
        (
            "$user",
            r#"gl_id: "user-1" name: "Jane Doe" email: "jane@example.com" gl_username: "jane" timezone: "Europe/Berlin""#
                .to_owned(),
        ),
        ("$time", "seconds: 1690000000".to_owned()),
    ])
}
