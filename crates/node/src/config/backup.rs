//! Where backups go: the table `[backup]`, with Gitaly's names.

use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tabularium_common::config::{Fault, Validate};

/// The `[backup]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// `file://` and an absolute path, percent-encoded, or the path itself: a directory that all nodes see.
    pub go_cloud_url: String,
    /// In which layout backups are written. Older ones are read whatever this says.
    #[serde(default)]
    pub layout: BackupLayout,
}

/// How backups lie in the sink.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupLayout {
    /// Manifests name the files.
    #[default]
    Manifest,
}

impl BackupConfig {
    /// The directory; `None`: it is something else.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let path = match self.go_cloud_url.strip_prefix("file://") {
            Some(path) if path.contains(['?', '#']) => return None,
            Some(path) => percent_decode_str(path).decode_utf8().ok()?.into_owned(),
            None => self.go_cloud_url.clone(),
        };
        Path::new(&path).is_absolute().then(|| path.into())
    }
}

impl Validate for BackupConfig {
    fn faults(&self) -> Vec<Fault> {
        let key = "backup.go_cloud_url";
        match self.directory() {
            Some(directory) if directory.is_dir() => Vec::new(),
            Some(directory) => vec![Fault::new(key, directory.display(), "a directory that exists")],
            None => {
                // There may be secrets in what follows.
                let scheme = self.go_cloud_url.split_once("://").map_or("", |(scheme, _)| scheme);
                let allowed = "file:/// and a directory; object storage is not supported";
                vec![Fault::new(key, format_args!("{scheme}://…"), allowed)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str) -> BackupConfig {
        BackupConfig { go_cloud_url: url.to_owned(), layout: BackupLayout::Manifest }
    }

    #[test]
    fn only_directories_are_taken() {
        let directory = |url: &str| config(url).directory().map(|path| path.display().to_string());
        for (url, expected) in [
            ("file:///a/b", Some("/a/b")),
            ("file:///a%20b", Some("/a b")),
            ("/a/b", Some("/a/b")),
            ("file://host/a", None),
            ("file:///a?x=y", None),
            ("a/b", None),
            ("s3://bucket", None),
            ("", None),
        ] {
            assert_eq!(directory(url).as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_without_secrets() {
        let said = |url: &str| config(url).faults().first().map(ToString::to_string).unwrap();
        let allowed = "file:/// and a directory; object storage is not supported";
        assert_eq!(
            said("s3://bucket?secret=x"),
            format!("`backup.go_cloud_url` is `s3://…`; allowed: {allowed}")
        );
        let text = "`backup.go_cloud_url` is `/no/such`; allowed: a directory that exists";
        assert_eq!(said("file:///no/such"), text);
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(config(&format!("file://{}", directory.path().display())).faults(), []);
    }

    #[test]
    fn there_is_one_layout() {
        let parse = |layout: &str| {
            toml::from_str::<BackupConfig>(&format!("go_cloud_url = \"/x\"\nlayout = \"{layout}\""))
        };
        assert_eq!(parse("manifest").unwrap().layout, BackupLayout::Manifest);
        assert!(parse("pointer").unwrap_err().to_string().contains("expected `manifest`"));
    }
}
