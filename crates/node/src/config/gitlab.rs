//! Whom changes are checked with, and whose hooks run besides a repository's own: the tables `[gitlab]` and `[hooks]`, with
//! Gitaly's names for everything.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use http::Uri;
use percent_encoding::percent_decode_str;
use secrecy::SecretString;
use serde::{Deserialize, Deserializer};
use tabularium_common::config::{Fault, SecretFile, Validate};

/// What stands for a Unix socket in a URL; what follows is its path, percent-encoded.
const UNIX: &str = "http+unix://";

/// The `[gitlab]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GitlabConfig {
    /// `http://host`, `https://host` or `http+unix://<path of a socket, percent-encoded>`.
    pub url: String,
    /// Where below it GitLab is, for sockets only. With a host it is part of the URL.
    #[serde(default)]
    pub relative_url_root: String,
    /// The file with the secret that GitLab has in `.gitlab_shell_secret`.
    pub secret_file: SecretFile,
    /// How GitLab is called.
    #[serde(default, rename = "http-settings")]
    pub http_settings: HttpSettings,
}

/// The `[gitlab.http-settings]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSettings {
    /// How long a call may take from its beginning to the end of the answer, in seconds.
    pub read_timeout: u64,
    /// For basic authentication at something in front of GitLab; with `password`.
    pub user: String,
    /// For basic authentication; with `user`.
    #[serde(deserialize_with = "secret")]
    pub password: SecretString,
    /// A file of certificates in PEM that are trusted besides the system's: of authorities, or GitLab's own.
    pub ca_file: Option<PathBuf>,
    /// A directory of such files.
    pub ca_path: Option<PathBuf>,
    /// Certificates are always checked, so this must be `false`; GitLab's own one is named in `ca_file`.
    pub self_signed_cert: bool,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            read_timeout: 300,
            user: String::new(),
            password: SecretString::from(String::new()),
            ca_file: None,
            ca_path: None,
            self_signed_cert: false,
        }
    }
}

impl HttpSettings {
    /// How long a call may take. Zero stands for the default, as in Gitaly.
    pub(crate) fn patience(&self) -> Duration {
        let default = Self::default().read_timeout;
        Duration::from_secs(if self.read_timeout == 0 { default } else { self.read_timeout })
    }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    String::deserialize(deserializer).map(SecretString::from)
}

/// The `[hooks]` table.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HooksConfig {
    /// Hooks for all repositories: `pre-receive.d`, `update.d` and `post-receive.d` in this directory.
    pub custom_hooks_dir: Option<PathBuf>,
}

/// Where GitLab is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// At a host; everything before `/api`.
    Web(String),
    /// Behind a socket.
    Unix {
        /// The socket.
        socket: PathBuf,
        /// Everything before `/api` in paths.
        root: String,
    },
}

impl GitlabConfig {
    /// Where GitLab is, if the URL says so.
    pub(crate) fn place(&self) -> Option<Place> {
        if let Some(encoded) = self.url.strip_prefix(UNIX) {
            let socket = percent_decode_str(encoded).decode_utf8().ok()?;
            let root = self.relative_url_root.trim_matches('/');
            let root = if root.is_empty() { String::new() } else { format!("/{root}") };
            return socket.starts_with('/').then(|| Place::Unix { socket: Path::new(&*socket).into(), root });
        }
        let url = self.url.trim_end_matches('/');
        let parsed: Uri = url.parse().ok()?;
        let known = matches!(parsed.scheme_str(), Some("http" | "https"));
        let plain = parsed.query().is_none() && !parsed.authority()?.as_str().contains('@');
        (known && plain).then(|| Place::Web(url.to_owned()))
    }
}

impl Validate for GitlabConfig {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.place().is_none() {
            let allowed = format!("http://host, https://host or {UNIX}<path of a socket, percent-encoded>");
            faults.push(Fault::new("gitlab.url", shown(&self.url), allowed));
        }
        let settings = &self.http_settings;
        let has_password = !secrecy::ExposeSecret::expose_secret(&settings.password).is_empty();
        if settings.user.is_empty() == has_password {
            let found = if has_password { "without user" } else { "without password" };
            faults.push(Fault::new("gitlab.http-settings.user", found, "both user and password, or neither"));
        }
        if settings.self_signed_cert {
            let allowed = "false; name the certificate in ca_file";
            faults.push(Fault::new("gitlab.http-settings.self_signed_cert", true, allowed));
        }
        let file = settings.ca_file.as_ref().filter(|file| !file.is_file());
        let directory = settings.ca_path.as_ref().filter(|directory| !directory.is_dir());
        for (key, path, allowed) in
            [("ca_file", file, "a file that exists"), ("ca_path", directory, "a directory that exists")]
        {
            if let Some(path) = path {
                faults.push(Fault::new(format!("gitlab.http-settings.{key}"), path.display(), allowed));
            }
        }
        faults
    }
}

/// Credentials in a URL are nobody's business.
fn shown(url: &str) -> &str {
    if url.contains('@') { "(not shown)" } else { url }
}

impl Validate for HooksConfig {
    fn faults(&self) -> Vec<Fault> {
        let directory = self.custom_hooks_dir.iter();
        let relative = directory.filter(|directory| !directory.is_absolute());
        let fault = |directory: &PathBuf| {
            Fault::new(
                "hooks.custom_hooks_dir",
                directory.display(),
                "a path from the root of the file system",
            )
        };
        relative.map(fault).collect()
    }
}

#[cfg(test)]
mod tests {
    use tabularium_common::config::{ConfigError, parse};

    use super::*;

    fn gitlab(url: &str, relative_url_root: &str) -> GitlabConfig {
        GitlabConfig {
            url: url.to_owned(),
            relative_url_root: relative_url_root.to_owned(),
            secret_file: SecretFile("/s".into()),
            http_settings: HttpSettings::default(),
        }
    }

    fn parsed(text: &str) -> Result<GitlabConfig, ConfigError> {
        parse(Path::new("x"), &format!("secret_file = \"/s\"\n{text}"))
    }

    fn faults(text: &str) -> Vec<String> {
        match parsed(text) {
            Ok(_) => Vec::new(),
            Err(ConfigError::Invalid { faults, .. }) => faults.into_iter().map(|fault| fault.key).collect(),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_url_says_where_gitlab_is() {
        let web = |url: &str| gitlab(url, "").place();
        assert_eq!(web("http://a"), Some(Place::Web("http://a".into())));
        assert_eq!(web("https://a:8443/gitlab/"), Some(Place::Web("https://a:8443/gitlab".into())));
        let socket = |root: &str| gitlab("http+unix://%2Frun%2Fw%20h.socket", root).place();
        let place = |root: &str| Some(Place::Unix { socket: "/run/w h.socket".into(), root: root.into() });
        assert_eq!((socket(""), socket("/"), socket("/gitlab/")), (place(""), place(""), place("/gitlab")));
        for url in ["", "a", "ftp://a", "http://", "http+unix://", "http+unix://relative", "http://u:p@a"] {
            assert_eq!(web(url), None, "{url}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_a_fault() {
        let url = "url = \"https://a\"\n[http-settings]\n";
        assert_eq!(faults(url), [""; 0]);
        assert_eq!(faults("url = \"nonsense\"\n"), ["gitlab.url"]);
        for half in ["user = \"u\"", "password = \"p\""] {
            assert_eq!(faults(&format!("{url}{half}")), ["gitlab.http-settings.user"]);
        }
        assert_eq!(faults(&format!("{url}user = \"u\"\npassword = \"p\"")), [""; 0]);
        assert_eq!(
            faults(&format!("{url}self_signed_cert = true\nca_file = \"/no\"\nca_path = \"/no\"")).len(),
            3
        );
        let shown = gitlab("http://u:hunter2@a", "").faults()[0].to_string();
        assert!(!shown.contains("hunter2"), "{shown}");
        let shown = format!("{:?}", parsed(&format!("{url}user = \"u\"\npassword = \"hunter2\"")).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn zero_seconds_are_the_default() {
        let patience =
            |text: &str| parsed(&format!("url = \"http://a\"\n{text}")).unwrap().http_settings.patience();
        assert_eq!(patience(""), Duration::from_secs(300));
        assert_eq!(patience("[http-settings]\nread_timeout = 0"), Duration::from_secs(300));
        assert_eq!(patience("[http-settings]\nread_timeout = 7"), Duration::from_secs(7));
    }
}
