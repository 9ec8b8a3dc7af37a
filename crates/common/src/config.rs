//! Configuration files: TOML, every key known, every value checked before a port is bound.
//!
//! A service's configuration is one struct deriving `Deserialize` with `#[serde(deny_unknown_fields, default)]` where
//! defaults exist, whose fields say their unit and meaning, and which implements [`Validate`] for what types alone
//! cannot express. Secrets are never written into the file: a [`SecretFile`] names the file that holds one.

pub mod example;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;
use serde::{Deserialize, de::DeserializeOwned};

/// Largest configuration or secret file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why a configuration cannot be used. The text is meant for the operator as it is.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key, or a value of the wrong kind. The text names line, key and what is allowed.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// From the parser.
        message: String,
    },
    /// Values that parse but cannot be used; all of them at once.
    #[error("{}: {}", path.display(), faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Every fault found.
        faults: Vec<Fault>,
    },
}

/// One value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key, dotted, as in the file.
    pub key: String,
    /// The value found. Never a secret.
    pub value: String,
    /// What would be accepted.
    pub allowed: String,
}

impl Fault {
    /// A fault of `key`.
    pub fn new(key: impl Into<String>, value: impl fmt::Display, allowed: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.to_string(), allowed: allowed.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is `{}`; allowed: {}", self.key, self.value, self.allowed)
    }
}

/// What a configuration checks beyond the types of its fields.
pub trait Validate {
    /// Every fault, not only the first. Empty: usable.
    fn faults(&self) -> Vec<Fault>;
}

/// Reads and checks a configuration file.
pub fn load<C: DeserializeOwned + Validate>(path: &Path) -> Result<C, ConfigError> {
    let text = read_bounded(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Checks the text of a configuration; `path` is only named in errors.
pub fn parse<C: DeserializeOwned + Validate>(path: &Path, text: &str) -> Result<C, ConfigError> {
    let config: C = toml::from_str(text)
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: told(&error.to_string()) })?;
    let faults = config.faults();
    if faults.is_empty() { Ok(config) } else { Err(ConfigError::Invalid { path: path.to_owned(), faults }) }
}

/// The parser's text, which quotes the line: without the credentials of a URL in it, and with what is allowed where the
/// standard library's parsers do not say it.
fn told(text: &str) -> String {
    let mut told = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(scheme) = rest.find("://") {
        let (before, after) = rest.split_at(scheme + "://".len());
        told.push_str(before);
        let end = after.find([' ', '\n', '"', '\'']).unwrap_or(after.len());
        let credentials = after[..end].rfind('@').unwrap_or(0);
        if credentials > 0 {
            told.push_str("(not shown)");
        }
        rest = &after[credentials..];
    }
    told.push_str(rest);
    if told.trim_end().ends_with("invalid socket address syntax") {
        told.truncate(told.trim_end().len());
        told.push_str("; allowed: an IP address with a port such as 127.0.0.1:9236\n");
    }
    told
}

pub(crate) fn read_bounded(path: &Path) -> std::io::Result<String> {
    let length = fs::metadata(path)?.len();
    if length > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("{length} bytes; at most {MAX_FILE_BYTES} are read")));
    }
    fs::read_to_string(path)
}

/// The path of a file that holds one secret. White space around the secret is dropped.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretFile(pub PathBuf);

impl SecretFile {
    /// Reads the secret. An empty file is an error: it would switch authentication off unseen.
    pub fn read(&self) -> Result<SecretString, ConfigError> {
        let text =
            read_bounded(&self.0).map_err(|source| ConfigError::Read { path: self.0.clone(), source })?;
        let secret = text.trim();
        if secret.is_empty() {
            return Err(ConfigError::Parse { path: self.0.clone(), message: "holds no secret".to_owned() });
        }
        Ok(SecretString::from(secret.to_owned()))
    }
}

/// A length of time in a configuration file, written with its unit: `250ms`, `30s`, `5m`, `2h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigDuration(pub Duration);

impl ConfigDuration {
    /// From milliseconds, for defaults.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// From seconds, for defaults.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl fmt::Display for ConfigDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

impl<'de> Deserialize<'de> for ConfigDuration {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map(Self).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "`{text}` is not a length of time; allowed: a whole number with ms, s, m or h, such as 250ms or 30s"
            ))
        })
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Example {
        workers: u32,
        grace: ConfigDuration,
    }

    impl Validate for Example {
        fn faults(&self) -> Vec<Fault> {
            let mut faults = Vec::new();
            if self.workers == 0 {
                faults.push(Fault::new("workers", self.workers, "1 or more"));
            }
            faults
        }
    }

    fn error(text: &str) -> String {
        parse::<Example>(Path::new("x.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn an_error_names_key_value_and_what_is_allowed() {
        let unknown = error("workers = 1\ngrace = \"1s\"\nworker = 2\n");
        assert!(unknown.contains("worker") && unknown.contains("expected"), "{unknown}");
        let kind = error("workers = \"many\"\ngrace = \"1s\"\n");
        assert!(kind.contains("many") && kind.contains("u32"), "{kind}");
        let unit = error("workers = 1\ngrace = \"soon\"\n");
        assert!(unit.contains("grace") && unit.contains("soon") && unit.contains("250ms"), "{unit}");
        assert_eq!(error("workers = 0\ngrace = \"1s\"\n"), "x.toml: `workers` is `0`; allowed: 1 or more");
    }

    #[test]
    fn lengths_of_time_carry_their_unit() {
        let config: Example = parse(Path::new("x.toml"), "workers = 1\ngrace = \"5m\"\n").unwrap();
        assert_eq!((config.workers, config.grace.0), (1, Duration::from_secs(300)));
        assert_eq!(parse_duration("10"), None);
        assert_eq!(parse_duration("-1s"), None);
    }

    #[test]
    fn an_empty_secret_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, " \n").unwrap();
        assert!(SecretFile(path.clone()).read().is_err());
        fs::write(&path, "s3cret\n").unwrap();
        use secrecy::ExposeSecret as _;
        assert_eq!(SecretFile(path).read().unwrap().expose_secret(), "s3cret");
    }

    #[test]
    fn a_quoted_line_shows_no_credentials() {
        let twice =
            "nats_url = 'nats://user:hunter2@host:4222'\nnats_url = 'nats://user:hunter2@host:4222'\n";
        let error = toml::from_str::<toml::Table>(twice).unwrap_err().to_string();
        assert!(error.contains("hunter2"), "the parser quotes the line: {error}");
        assert!(!told(&error).contains("hunter2"), "{}", told(&error));
        assert_eq!(told("a://u:p@w/@h/x b://h/z"), "a://(not shown)@h/x b://h/z");
    }

    #[test]
    fn an_address_that_is_none_is_told_what_one_is() {
        #[derive(Debug, Deserialize)]
        struct Listens {
            #[expect(dead_code, reason = "only parsed")]
            admin_listen: std::net::SocketAddr,
        }
        impl Validate for Listens {
            fn faults(&self) -> Vec<Fault> {
                Vec::new()
            }
        }
        let error = parse::<Listens>(Path::new("x.toml"), "admin_listen = 'localhost:1'").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("admin_listen = 'localhost:1'") && text.contains("such as 127.0.0.1:9236"),
            "{text}"
        );
    }
}
