//! Whether a repository is one in which nothing is done in another way than here: where `git` would look at an option, an
//! extension or a file that is not known here, it is left to `git`.

use std::{fs, io, path::Path};

use super::LeftToGit;

/// Largest `config` that is read.
const MOST_BYTES: u64 = 16 * 1024;
/// Each says that objects or references are elsewhere too, or that more is written than a reference's value.
const FILES: [&str; 8] = [
    "commondir",
    "logs",
    "objects/info/alternates",
    "objects/info/http-alternates",
    "info/grafts",
    "reftable",
    "shallow",
    "config.worktree",
];

/// Looks at the repository in this directory.
pub(super) fn check(repository: &Path) -> Result<(), LeftToGit> {
    for name in FILES {
        match fs::symlink_metadata(repository.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return Err(LeftToGit("a repository with more than objects and references")),
        }
    }
    let unread = |_| LeftToGit("a configuration that cannot be read");
    let path = repository.join("config");
    if fs::metadata(&path).map_err(unread)?.len() > MOST_BYTES {
        return Err(LeftToGit("a long configuration"));
    }
    let text = fs::read_to_string(path).map_err(unread)?;
    if is_ordinary(&text) { Ok(()) } else { Err(LeftToGit("a configuration with more than the usual")) }
}

/// Only what `git init` writes, and options that say nothing of how objects and references are kept.
fn is_ordinary(config: &str) -> bool {
    let mut section = "";
    let mut version = None;
    for line in config.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if line.starts_with('[') {
            // One of which more could be said in the same line is not among them.
            if !["[core]", "[gitlab]"].contains(&line) {
                return false;
            }
            section = line;
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { return false };
        // A value may go on in the next line.
        if value.ends_with('\\') {
            return false;
        }
        match (section, key.trim().to_ascii_lowercase().as_str(), value.trim()) {
            ("[core]", "repositoryformatversion", value) => version = Some(value),
            ("[core]", "bare", "true")
            | ("[core]", "filemode" | "symlinks" | "ignorecase" | "precomposeunicode", _)
            | ("[gitlab]", "fullpath", _) => {}
            _ => return false,
        }
    }
    version == Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_init_makes_is_ordinary() {
        let directory = tempfile::tempdir().unwrap();
        let init = std::process::Command::new("git")
            .args(["init", "--quiet", "--bare", "--template="])
            .arg(directory.path())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .status();
        assert!(init.unwrap().success());
        assert_eq!(check(directory.path()), Ok(()));
        for name in FILES {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            assert!(check(directory.path()).is_err(), "{name}");
            fs::remove_file(path).unwrap();
        }
        assert_eq!(check(directory.path()), Ok(()));
        fs::remove_file(directory.path().join("config")).unwrap();
        assert!(check(directory.path()).is_err());
    }

    #[test]
    fn an_option_that_is_not_known_is_left_to_git() {
        let usual = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n";
        assert!(is_ordinary(usual) && is_ordinary(&format!("# x\n{usual}\n[gitlab]\n\tfullpath = a/b\n")));
        for more in [
            "\tlogAllRefUpdates = true\n",
            "\tsharedRepository = group\n",
            "\tlogAllRefUpdates\n",
            "[extensions]\n\tobjectFormat = sha256\n",
            "[extensions]\n\trefStorage = reftable\n",
            "[include]\n\tpath = x\n",
            "[remote \"a\"]\n\tpromisor = true\n",
            "[core] logAllRefUpdates = true\n",
            "[gitlab]\n\tfullpath = a\\\n[core]\n",
            "\trepositoryformatversion = 1\n",
        ] {
            assert!(!is_ordinary(&format!("{usual}{more}")), "{more}");
        }
        assert!(!is_ordinary(""));
        assert!(!is_ordinary("[core]\n\trepositoryformatversion = 0\n\tbare = false\n"));
    }
}
