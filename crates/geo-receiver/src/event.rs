//! What an event asks for. A plain function of the body: no clock, no bus.

use serde::Deserialize;
use tabularium_common::{
    duties::SyncEvent,
    ids::{ParseIdError, RelativePath},
};

/// The parts of an event that are looked at. Everything else a sender may put there is passed over.
#[derive(Debug, Deserialize)]
pub(crate) struct Body {
    event_name: Option<String>,
    object_kind: Option<String>,
    path_with_namespace: Option<String>,
    old_path_with_namespace: Option<String>,
    project: Option<Project>,
}

#[derive(Debug, Deserialize)]
struct Project {
    path_with_namespace: Option<String>,
}

/// What is to be done about an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Sync this repository.
    Sync { relative_path: RelativePath, event: SyncEvent },
    /// Nothing: it is not about the contents of a repository.
    Ignore,
}

/// An event that names no repository we could look at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EventError {
    /// Neither `event_name` nor `object_kind`.
    #[error("names no event: `event_name` and `object_kind` are absent")]
    Unnamed,
    /// No path.
    #[error("`{field}` is absent")]
    Absent { field: &'static str },
    /// A path that no repository can have.
    #[error("`{field}` {reason}")]
    Path { field: &'static str, reason: ParseIdError },
}

const PROJECT_PATH: &str = "path_with_namespace";
const OLD_PROJECT_PATH: &str = "old_path_with_namespace";
const NESTED_PATH: &str = "project.path_with_namespace";

impl Body {
    /// The event's name: `event_name` where there is one, else `object_kind`.
    pub(crate) fn name(&self) -> Option<&str> {
        self.event_name.as_deref().or(self.object_kind.as_deref())
    }

    /// What the event asks for.
    pub(crate) fn asked(&self) -> Result<Asked, EventError> {
        let name = self.name().ok_or(EventError::Unnamed)?;
        let project = self.project.as_ref().and_then(|project| project.path_with_namespace.as_deref());
        let (relative_path, event) = match name {
            "repository_update" | "push" | "tag_push" => (path(NESTED_PATH, project)?, SyncEvent::Updated),
            // The default branch may have changed; no other event says so.
            "project_create" | "project_update" => (self.path()?, SyncEvent::Updated),
            "project_destroy" => (self.path()?, SyncEvent::Removed),
            "project_rename" | "project_transfer" => {
                let from = path(OLD_PROJECT_PATH, self.old_path_with_namespace.as_deref())?;
                let to = self.path()?;
                let event = if from == to { SyncEvent::Updated } else { SyncEvent::Renamed { from } };
                (to, event)
            }
            _ => return Ok(Asked::Ignore),
        };
        Ok(Asked::Sync { relative_path, event })
    }

    fn path(&self) -> Result<RelativePath, EventError> {
        path(PROJECT_PATH, self.path_with_namespace.as_deref())
    }
}

/// A project's path as the name of its repository.
fn path(field: &'static str, text: Option<&str>) -> Result<RelativePath, EventError> {
    let text = text.ok_or(EventError::Absent { field })?;
    if text.is_empty() {
        return Err(EventError::Path { field, reason: ParseIdError::Empty });
    }
    // A path that ends in a separator would become the repository `.git` of a group.
    let named = text.rsplit('/').next().is_some_and(|last| !matches!(last, "" | "." | ".."));
    if !named {
        return Err(EventError::Path { field, reason: ParseIdError::Escapes });
    }
    format!("{text}.git").parse().map_err(|reason| EventError::Path { field, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<Asked, EventError> {
        serde_json::from_str::<Body>(json).unwrap().asked()
    }

    #[expect(clippy::unnecessary_wraps, reason = "compared with results")]
    fn sync(path: &str, event: SyncEvent) -> Result<Asked, EventError> {
        Ok(Asked::Sync { relative_path: path.parse().unwrap(), event })
    }

    #[test]
    fn events_about_contents_ask_for_a_sync() {
        for name in ["repository_update", "push", "tag_push"] {
            let json = format!(
                r#"{{"object_kind":"x","event_name":"{name}","project":{{"id":1,"path_with_namespace":"foundry/kiln",
                "git_http_url":"https://evil.test/foundry/kiln.git"}},"changes":[]}}"#
            );
            assert_eq!(check(&json), sync("foundry/kiln.git", SyncEvent::Updated));
        }
        assert_eq!(
            check(r#"{"object_kind":"push","project":{"path_with_namespace":"a/b"}}"#),
            sync("a/b.git", SyncEvent::Updated),
            "object_kind counts where there is no event_name"
        );
    }

    #[test]
    fn events_about_projects_ask_for_a_sync() {
        let project = |name: &str| {
            check(&format!(
                r#"{{"event_name":"{name}","path_with_namespace":"eu/kiln","old_path_with_namespace":"eu/oven"}}"#
            ))
        };
        assert_eq!(project("project_create"), sync("eu/kiln.git", SyncEvent::Updated));
        assert_eq!(project("project_update"), sync("eu/kiln.git", SyncEvent::Updated));
        assert_eq!(project("project_destroy"), sync("eu/kiln.git", SyncEvent::Removed));
        let from = "eu/oven.git".parse().unwrap();
        assert_eq!(project("project_rename"), sync("eu/kiln.git", SyncEvent::Renamed { from }));
        assert_eq!(
            check(
                r#"{"event_name":"project_transfer","path_with_namespace":"a","old_path_with_namespace":"a"}"#
            ),
            sync("a.git", SyncEvent::Updated)
        );
    }

    #[test]
    fn everything_else_is_passed_over() {
        for json in [
            r#"{"event_name":"key_create","id":5512}"#,
            r#"{"object_kind":"merge_request","event_type":"merge_request","project":{"id":4117}}"#,
            r#"{"event_name":"something_of_a_later_gitlab"}"#,
        ] {
            assert_eq!(check(json), Ok(Asked::Ignore));
        }
    }

    #[test]
    fn a_path_that_cannot_be_is_named() {
        assert_eq!(check("{}"), Err(EventError::Unnamed));
        assert_eq!(check(r#"{"event_name":"push"}"#), Err(EventError::Absent { field: NESTED_PATH }));
        for path in ["../x", "a/../../etc", "/etc/x", "a/", "", "a/..", "."] {
            let json = format!(r#"{{"event_name":"project_create","path_with_namespace":"{path}"}}"#);
            assert!(
                matches!(check(&json), Err(EventError::Path { field: PROJECT_PATH, .. })),
                "{path:?}: {:?}",
                check(&json)
            );
        }
        let missing = r#"{"event_name":"project_rename","path_with_namespace":"a/b"}"#;
        assert_eq!(check(missing), Err(EventError::Absent { field: OLD_PROJECT_PATH }));
    }
}
