//! How the file becomes a [`File`]: TOML, over which the JSON of `config_command` is laid.

use std::{io, path::Path, process::Command};

use serde::de::Error as _;
use toml::{Table, Value};

use super::File;

/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why the file cannot be used. In Praefect's words where it has any.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// It cannot be read.
    #[error("open {path}: {source}")]
    Open { path: String, source: io::Error },
    /// It is not TOML, or a value is of the wrong kind.
    #[error("toml: {message}")]
    Toml { message: String, line: usize, column: usize },
    /// `config_command` cannot be run.
    #[error("running config command: {0}")]
    Command(io::Error),
    /// `config_command` failed.
    #[error("running config command: {status}, stderr: {stderr:?}")]
    CommandFailed { status: std::process::ExitStatus, stderr: String },
    /// What `config_command` printed is not what it should be.
    #[error("unmarshalling generated config: {0}")]
    Json(#[from] serde_json::Error),
    /// What `config_command` printed does not fit.
    #[error("unmarshalling generated config: {0}")]
    Generated(toml::de::Error),
    /// The file that `auth.token_file` names.
    #[error("reading auth.token_file {path}: {source}")]
    Token { path: String, source: io::Error },
}

/// A file with the keys that nobody knows.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) file: File,
    pub(crate) unknown: Vec<String>,
}

/// Reads the file at a path.
pub(crate) fn read(path: &Path) -> Result<Read, ReadError> {
    let opened = |source| ReadError::Open { path: path.display().to_string(), source };
    let length = std::fs::metadata(path).map_err(opened)?.len();
    if length > MAX_FILE_BYTES {
        let told = format!("{length} bytes; at most {MAX_FILE_BYTES} are read");
        return Err(opened(io::Error::other(told)));
    }
    parse(&std::fs::read_to_string(path).map_err(opened)?)
}

/// Reads the file's text, and runs its `config_command`.
pub(crate) fn parse(text: &str) -> Result<Read, ReadError> {
    let mut unknown = Vec::new();
    let read = |unknown: &mut Vec<String>, deserializer| {
        serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string()))
    };
    let deserializer = toml::Deserializer::parse(text).map_err(|error| placed(text, &error))?;
    let mut file: File = read(&mut unknown, deserializer).map_err(|error| placed(text, &error))?;
    if !file.config_command.is_empty() {
        let mut table: Table = toml::from_str(text).map_err(|error| placed(text, &error))?;
        overlay(&mut table, generated(&file.config_command)?)?;
        unknown.clear();
        file = serde_ignored::deserialize(table, |path| unknown.push(path.to_string()))
            .map_err(ReadError::Generated)?;
    }
    if file.auth.token.get().is_none()
        && let Some(path) = &file.auth.token_file
    {
        let token = std::fs::read_to_string(path)
            .map_err(|source| ReadError::Token { path: path.display().to_string(), source })?;
        file.auth.token = token.trim().to_owned().into();
    }
    Ok(Read { file, unknown })
}

/// The parser's word without its picture of the line, which may show a secret.
fn placed(text: &str, error: &toml::de::Error) -> ReadError {
    let before = &text[..error.span().map_or(0, |span| span.start).min(text.len())];
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    ReadError::Toml { message: error.message().to_owned(), line, column }
}

/// Runs the command and reads its JSON.
fn generated(command: &str) -> Result<serde_json::Map<String, serde_json::Value>, ReadError> {
    let output = Command::new(command).output().map_err(ReadError::Command)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(ReadError::CommandFailed { status: output.status, stderr });
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Lays an object over a table: objects are merged, everything else is replaced, and what is null is left alone.
fn overlay(table: &mut Table, over: serde_json::Map<String, serde_json::Value>) -> Result<(), ReadError> {
    for (key, value) in over {
        // Of the one key whose name in JSON is another one than in the file.
        let key = if key == "cert_path" { "certificate_path".to_owned() } else { key };
        match (table.get_mut(&key), value) {
            (_, serde_json::Value::Null) => {}
            (Some(Value::Table(inner)), serde_json::Value::Object(object)) => overlay(inner, object)?,
            (_, value) => {
                let value = Value::try_from(value)
                    .map_err(|error| ReadError::Generated(toml::de::Error::custom(error)))?;
                table.insert(key, value);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const FULL: &str = include_str!("../../tests/praefect.config.toml");

    #[test]
    fn every_key_that_praefect_knows_is_known() {
        let read = parse(FULL).unwrap();
        assert_eq!(read.unknown, [""; 0]);
        assert_eq!(read.file.virtual_storages[0].nodes[1].storage, "gitaly-2");
        assert_eq!(read.file.database.port, 5432);
        assert_eq!(read.file.database.session_pooled.host, "postgres.internal");
    }

    #[test]
    fn unknown_keys_are_named_and_wrong_values_refused_without_showing_them() {
        let read = parse("listen_adr = 'x'\n[auth]\ntokn = 'y'\n[[virtual_storage]]\nnam = 'z'").unwrap();
        assert_eq!(read.unknown, ["auth.tokn", "listen_adr", "virtual_storage.0.nam"]);
        let error = parse("socket_path = 'x'\n[auth]\ntoken = ['hunter2']").unwrap_err();
        assert!(matches!(error, ReadError::Toml { line: 3, column: 9, .. }), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        assert!(parse("graceful_stop_timeout = '5 minutes'").is_err());
        assert!(parse("a = ").is_err());
    }

    #[test]
    fn what_config_command_prints_is_laid_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let command = directory.path().join("secrets");
        let print = |text: &str| {
            std::fs::write(&command, text).unwrap();
            std::fs::set_permissions(&command, std::fs::Permissions::from_mode(0o700)).unwrap();
        };
        print(
            "#!/bin/sh\necho '{\"auth\":{\"token\":\"t\"},\"database\":{\"password\":\"p\",\"port\":null},\"tls\":{\"cert_path\":\"/c\"}}'",
        );
        let text = format!(
            "config_command = '{}'\n[auth]\ntransitioning = true\ntoken = 'f'\n[database]\nport = 1\n",
            command.display()
        );
        let file = parse(&text).unwrap().file;
        assert_eq!((file.auth.token.expose(), file.auth.transitioning), ("t", true));
        assert_eq!((file.database.password.expose(), file.database.port), ("p", 1));
        assert_eq!(file.tls.certificate_path.to_str(), Some("/c"));
        assert!(!format!("{file:?}").contains("\"t\""));
        print("#!/bin/sh\necho no key >&2; exit 3");
        let error = parse(&text).unwrap_err().to_string();
        assert!(
            error.contains("running config command: exit status: 3") && error.contains("no key"),
            "{error}"
        );
        print("#!/bin/sh\necho '[]'");
        assert!(matches!(parse(&text).unwrap_err(), ReadError::Json(_)));
    }
}
