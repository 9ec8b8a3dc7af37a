//! Custom hooks: programs that may refuse a change, or want to hear of it (wire reference, section i.2). A repository has its
//! own in `custom_hooks`; a directory of the configuration has those of all repositories.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

/// The directory of custom hooks in a repository.
pub(crate) const DIRECTORY: &str = "custom_hooks";

/// Where custom hooks are.
#[derive(Debug, Clone, Default)]
pub(crate) struct CustomHooks {
    everywhere: Option<PathBuf>,
}

impl CustomHooks {
    /// Those of repositories, and those in this directory.
    pub(crate) fn new(everywhere: Option<PathBuf>) -> Self {
        Self { everywhere }
    }

    /// Whether a repository may have any. Says yes when in doubt.
    pub(crate) fn may_exist(&self, repository: &Path) -> bool {
        self.everywhere.is_some() || repository.join(DIRECTORY).exists()
    }

    /// Those of a name, in the order in which they run: the repository's own one, those of its directory, those of all
    /// repositories. What cannot be executed or ends in `~` does not count.
    pub(crate) async fn find(&self, repository: &Path, name: &'static str) -> io::Result<Vec<PathBuf>> {
        let own = repository.join(DIRECTORY);
        let everywhere = self.everywhere.clone();
        let finding = tokio::task::spawn_blocking(move || {
            let mut found: Vec<_> = Some(own.join(name)).into_iter().filter(|hook| is_hook(hook)).collect();
            for directory in Some(own).into_iter().chain(everywhere) {
                found.extend(hooks_in(&directory.join(format!("{name}.d")))?);
            }
            Ok(found)
        });
        finding.await.map_err(io::Error::other)?
    }
}

/// By name. A directory that is not there holds none.
fn hooks_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut hooks = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if is_hook(&path) {
            hooks.push(path);
        }
    }
    hooks.sort();
    Ok(hooks)
}

fn is_hook(path: &Path) -> bool {
    !path.as_os_str().as_encoded_bytes().ends_with(b"~")
        && fs::metadata(path).is_ok_and(|found| !found.is_dir())
        && access(path, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn hooks_run_from_the_nearest_to_the_farthest_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let (repository, everywhere) = (directory.path().join("a.git"), directory.path().join("all"));
        let write = |path: PathBuf, mode: u32| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "#!/bin/sh\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let own = repository.join(DIRECTORY);
        let expected = [
            write(own.join("update"), 0o755),
            write(own.join("update.d/.first"), 0o755),
            write(own.join("update.d/10"), 0o755),
            write(own.join("update.d/2"), 0o755),
            write(everywhere.join("update.d/1"), 0o755),
        ];
        write(own.join("update.d/backup~"), 0o755);
        write(own.join("update.d/directory.d/x"), 0o755);
        write(own.join("pre-receive"), 0o644);
        write(everywhere.join("update"), 0o755);
        let hooks = CustomHooks::new(Some(everywhere.clone()));
        assert_eq!(hooks.find(&repository, "update").await.unwrap(), expected);
        assert_eq!(
            hooks.find(&repository, "pre-receive").await.unwrap(),
            Vec::<PathBuf>::new(),
            "not executable"
        );
        assert_eq!(CustomHooks::default().find(&repository, "update").await.unwrap(), expected[..4]);
        let none = directory.path().join("none.git");
        assert!(hooks.may_exist(&none) && !CustomHooks::default().may_exist(&none));
        assert!(CustomHooks::default().may_exist(&repository));
    }
}
