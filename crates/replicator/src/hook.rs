//! The events of the geo log in the shape of GitLab's system hooks, complete enough for receivers written for GitLab.
//! What GitLab knows and this cluster does not (people, visibility) is filled with its most guarded value; the refs of an
//! update are left out, since a receiver must read them from here anyway.

use serde_json::{Value, json};
use tabularium_proto::coordinator::{GeoEvent, GeoEventKind};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Value of `X-Gitlab-Event`: the same for every system hook.
pub(crate) const SYSTEM_HOOK: &str = "System Hook";

/// A repository's name as GitLab splits it.
struct Project<'a> {
    path_with_namespace: &'a str,
    namespace: &'a str,
    path: &'a str,
}

impl<'a> Project<'a> {
    fn of(relative_path: &'a str) -> Self {
        let path_with_namespace = without_suffix(relative_path);
        let (namespace, path) = path_with_namespace.rsplit_once('/').unwrap_or(("", path_with_namespace));
        Self { path_with_namespace, namespace, path }
    }

    /// The `project` object of events that have one.
    fn object(&self, id: i64, external_url: Option<&str>) -> Value {
        let homepage =
            external_url.map(|base| format!("{}/{}", base.trim_end_matches('/'), self.path_with_namespace));
        let homepage = homepage.unwrap_or_default();
        let git = if homepage.is_empty() { String::new() } else { format!("{homepage}.git") };
        json!({
            "id": id, "name": self.path, "description": "", "web_url": homepage, "avatar_url": null,
            "git_ssh_url": "", "git_http_url": git, "namespace": self.namespace, "visibility_level": 0,
            "path_with_namespace": self.path_with_namespace, "default_branch": null, "ci_config_path": null,
            "homepage": homepage, "url": git, "ssh_url": "", "http_url": git,
        })
    }
}

fn without_suffix(relative_path: &str) -> &str {
    relative_path.strip_suffix(".git").unwrap_or(relative_path)
}

/// The body of one event, or `None` for a kind this version does not know.
pub(crate) fn body(event: &GeoEvent, external_url: Option<&str>, now: OffsetDateTime) -> Option<Value> {
    let project = Project::of(&event.relative_path);
    let name = match event.kind() {
        GeoEventKind::Unspecified => return None,
        GeoEventKind::Updated => {
            return Some(json!({
                "event_name": "repository_update", "user_id": 0, "user_name": "", "user_email": "",
                "user_avatar": null, "project_id": event.repository_id,
                "project": project.object(event.repository_id, external_url), "changes": [], "refs": [],
            }));
        }
        GeoEventKind::Created => "project_create",
        GeoEventKind::Renamed => "project_rename",
        GeoEventKind::Deleted => "project_destroy",
    };
    let now = now.format(&Rfc3339).unwrap_or_default();
    let mut body = json!({
        "event_name": name, "created_at": now, "updated_at": now, "name": project.path, "path": project.path,
        "path_with_namespace": project.path_with_namespace, "project_id": event.repository_id,
        "project_namespace_id": 0, "owners": [], "owner_name": "", "owner_email": "",
        "project_visibility": "private",
    });
    if event.kind() == GeoEventKind::Renamed
        && let Some(object) = body.as_object_mut()
    {
        object.insert("old_path_with_namespace".to_owned(), without_suffix(&event.old_relative_path).into());
    }
    Some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: GeoEventKind) -> GeoEvent {
        GeoEvent {
            position: 7,
            kind: kind.into(),
            repository_id: 4117,
            virtual_storage: "default".into(),
            relative_path: "eu/foundry/kiln.git".into(),
            old_relative_path: "foundry/oven.git".into(),
            generation: 3,
        }
    }

    fn check(kind: GeoEventKind) -> Value {
        body(&event(kind), Some("https://git.test/"), OffsetDateTime::UNIX_EPOCH).unwrap()
    }

    #[test]
    fn an_update_is_a_repository_update() {
        let body = check(GeoEventKind::Updated);
        assert_eq!(body["event_name"], "repository_update");
        assert_eq!(body["project_id"], 4117);
        assert_eq!(body["project"]["path_with_namespace"], "eu/foundry/kiln");
        assert_eq!(body["project"]["namespace"], "eu/foundry");
        assert_eq!(body["project"]["git_http_url"], "https://git.test/eu/foundry/kiln.git");
        assert!(body["changes"].is_array() && body["refs"].is_array());
    }

    #[test]
    fn a_rename_names_both() {
        let body = check(GeoEventKind::Renamed);
        assert_eq!(body["event_name"], "project_rename");
        assert_eq!(body["path_with_namespace"], "eu/foundry/kiln");
        assert_eq!(body["old_path_with_namespace"], "foundry/oven");
        assert_eq!(body["path"], "kiln");
        assert_eq!(body["updated_at"], "1970-01-01T00:00:00Z");
    }

    #[test]
    fn creation_and_removal_have_no_old_name() {
        for (kind, name) in
            [(GeoEventKind::Created, "project_create"), (GeoEventKind::Deleted, "project_destroy")]
        {
            let body = check(kind);
            assert_eq!(body["event_name"], name);
            assert_eq!(body.get("old_path_with_namespace"), None);
            assert_eq!(body["project_visibility"], "private");
        }
        assert!(body(&event(GeoEventKind::Unspecified), None, OffsetDateTime::UNIX_EPOCH).is_none());
    }
}
