//! GitLab's internal API as a storage node uses it (wire reference, section i.4).

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    ChangeRequest, Denied, RequestError,
    http::{Body, CallError, GitlabError, Http},
    messages::Message,
};
use crate::{config::GitlabConfig, metrics::Metrics};

/// GitLab.
pub(crate) struct Gitlab(Http);

/// What GitLab says after a push.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Received {
    #[serde(default)]
    pub(super) reference_counter_decreased: bool,
    #[serde(default)]
    pub(super) messages: Option<Vec<Message>>,
}

/// What GitLab says of itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct About {
    pub(crate) gitlab_version: String,
    #[serde(rename = "gitlab_rev")]
    pub(crate) gitlab_revision: String,
    pub(crate) api_version: String,
    pub(crate) redis: bool,
}

impl Gitlab {
    pub(super) fn new(config: &GitlabConfig, metrics: Metrics) -> Result<Self, GitlabError> {
        Http::new(config, metrics).map(Self)
    }

    /// Asks whether the change may be made. Whatever is no clear yes is a no.
    pub(super) async fn allowed(&self, change: &ChangeRequest<'_>) -> Result<(), Denied> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Verdict {
            status: bool,
            message: String,
        }
        let denied = |message: String| Denied {
            message,
            protocol: change.requester.protocol,
            user_id: change.requester.gl_id.clone(),
            changes: change.changes.to_vec(),
            rate_limited: false,
        };
        let body = allowed_body(change).map_err(denied)?;
        let asked = async {
            let answer = self.0.post("/allowed", &body, &change.requester.caller).await?;
            match answer.status.as_u16() {
                // GitLab says so when the change goes another way from here; it is allowed all the same.
                200 | 300 => answer.json::<Verdict>(),
                status => Err(CallError::Status { call: "gitlab api is not accessible", status }),
            }
        };
        match asked.await {
            Ok(Verdict { status: true, .. }) => Ok(()),
            Ok(Verdict { message, .. }) => Err(denied(message)),
            Err(error) => {
                let rate_limited = error == CallError::RateLimited;
                Err(Denied { rate_limited, ..denied(error.to_string()) })
            }
        }
    }

    /// Says that a change is about to be made, so that the repository is not moved away under it.
    pub(super) async fn pre_receive(&self, change: &ChangeRequest<'_>) -> Result<bool, RequestError> {
        #[derive(Deserialize)]
        struct Counted {
            #[serde(default)]
            reference_counter_increased: bool,
        }
        let body = json!({"gl_repository": change.requester.gl_repository});
        let asked = async {
            let answer = self.0.post("/pre_receive", &body, &change.requester.caller).await;
            let answer = answer.map_err(|error| posting("/pre_receive", &error))?;
            match answer.status.as_u16() {
                200 => answer.json::<Counted>().map_err(|error| error.to_string()),
                status => Err(format!("pre-receive call failed with status: {status}")),
            }
        };
        let counted = asked.await.map_err(RequestError::PreReceive)?;
        Ok(counted.reference_counter_increased)
    }

    /// Says that a change has been made.
    pub(super) async fn post_receive(&self, change: &ChangeRequest<'_>) -> Result<Received, RequestError> {
        let body = post_receive_body(change);
        let asked = async {
            let answer = self.0.post("/post_receive", &body, &change.requester.caller).await;
            let answer = answer.map_err(|error| posting("/post_receive", &error))?;
            match answer.status.as_u16() {
                200 => answer.json::<Received>().map_err(|error| error.to_string()),
                status => Err(format!("post-receive call failed with status: {status}")),
            }
        };
        asked.await.map_err(RequestError::PostReceive)
    }

    /// A file of Git LFS.
    pub(super) async fn lfs_object(&self, id: &str, gl_repository: &str) -> Result<Option<Body>, CallError> {
        let gl_repository = utf8_percent_encode(gl_repository, NON_ALPHANUMERIC);
        self.0.open("/lfs", &format!("gl_repository={gl_repository}&oid={id}")).await
    }

    /// Asks GitLab who it is; what is wrong with URL, secret or network shows here.
    pub(super) async fn check(&self) -> Result<About, String> {
        let answer = self.0.get("/check").await;
        let answer = answer.map_err(|error| format!("HTTP GET to GitLab endpoint /check failed: {error}"))?;
        match answer.status.as_u16() {
            200 => answer.json_of_any_type().map_err(|error| error.to_string()),
            status => Err(format!("Check HTTP request failed with status: {status}")),
        }
    }
}

fn posting(endpoint: &str, error: &CallError) -> String {
    format!("http post to gitlab api {endpoint} endpoint: {error}")
}

/// Adds what is not empty.
fn put(body: &mut Map<String, Value>, key: &str, value: impl Into<String>) {
    let value = value.into();
    if !value.is_empty() {
        body.insert(key.to_owned(), Value::String(value));
    }
}

/// JSON has no other text than Unicode; what is none of it is shown so.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn allowed_body(change: &ChangeRequest<'_>) -> Result<Value, String> {
    let requester = change.requester;
    let (user_key, user) = user(&requester.gl_id)?;
    let mut body = Map::new();
    put(&mut body, "action", "git-receive-pack");
    put(&mut body, "gl_repository", &requester.gl_repository);
    put(&mut body, "project", change.repository.path.to_string_lossy().replace('\'', ""));
    put(&mut body, "changes", text(change.changes));
    put(&mut body, "protocol", requester.protocol.name());
    put(&mut body, "relative_path", &change.repository.relative_path);
    let objects = change.objects.as_ref();
    let env = json!({
        "GIT_OBJECT_DIRECTORY_RELATIVE": objects.map_or("", |objects| objects.directory.as_str()),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE": objects.map(|objects| &objects.alternates),
    });
    put(&mut body, "env", env.to_string());
    put(&mut body, user_key, user);
    put(&mut body, "gitaly_client_context_bin", &requester.client_context);
    if !change.push_options.is_empty() {
        body.insert("push_options".to_owned(), json!(change.push_options));
    }
    Ok(Value::Object(body))
}

fn post_receive_body(change: &ChangeRequest<'_>) -> Value {
    let requester = change.requester;
    // Gitaly sends `null` when there are none.
    let options = (!change.push_options.is_empty()).then_some(change.push_options);
    let mut body = Map::new();
    body.insert("gl_repository".to_owned(), json!(requester.gl_repository));
    body.insert("identifier".to_owned(), json!(requester.gl_id));
    body.insert("changes".to_owned(), json!(text(change.changes)));
    body.insert("push_options".to_owned(), json!(options));
    put(&mut body, "gitaly_client_context_bin", &requester.client_context);
    Value::Object(body)
}

/// Under which key, and as what, GitLab is told who asks.
fn user(gl_id: &str) -> Result<(&'static str, &str), String> {
    if let Some(name) = gl_id.strip_prefix("username-") {
        return Ok(("username", name));
    }
    let numbered = [("key-", "key_id"), ("user-", "user_id")];
    let found = numbered.iter().find_map(|(prefix, key)| Some((*key, gl_id.strip_prefix(prefix)?)));
    match found {
        Some((key, id)) if !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()) => Ok((key, id)),
        _ => Err(format!("setting gl_id: gl_id='{gl_id}' is invalid")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::{ObjectDirectories, Protocol, Requester},
        storage::{RepositoryPath, Storage},
    };

    fn repository() -> RepositoryPath {
        let storage = Storage { name: "s".into(), root: "/s'1".into(), filesystem_id: "id".into() };
        let relative_path = "@cluster/repositories/6b/86/1".to_owned();
        let path = storage.root.join(&relative_path);
        RepositoryPath { storage, relative_path, path, quarantine: None }
    }

    fn requester() -> Requester {
        Requester {
            gl_id: "key-12".into(),
            gl_repository: "project-1".into(),
            protocol: Protocol::Ssh,
            ..Requester::default()
        }
    }

    #[test]
    fn a_question_is_gitalys() {
        let (repository, requester) = (repository(), requester());
        let objects = ObjectDirectories {
            directory: "objects/tmp_objdir-incoming-a".into(),
            alternates: vec!["objects".into()],
        };
        let options = ["ci.skip".to_owned()];
        let mut change = ChangeRequest {
            repository: &repository,
            requester: &requester,
            changes: b"0 1 refs/heads/\xff\n",
            objects: Some(objects),
            push_options: &options,
        };
        let env = r#"{"GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE":["objects"],"GIT_OBJECT_DIRECTORY_RELATIVE":"objects/tmp_objdir-incoming-a"}"#;
        let expected = json!({
            "action": "git-receive-pack",
            "gl_repository": "project-1",
            "project": "/s1/@cluster/repositories/6b/86/1",
            "changes": "0 1 refs/heads/\u{fffd}\n",
            "protocol": "ssh",
            "relative_path": "@cluster/repositories/6b/86/1",
            "env": env,
            "key_id": "12",
            "push_options": ["ci.skip"],
        });
        assert_eq!(allowed_body(&change).unwrap(), expected);
        assert_eq!(
            post_receive_body(&change),
            json!({
                "gl_repository": "project-1",
                "identifier": "key-12",
                "changes": "0 1 refs/heads/\u{fffd}\n",
                "push_options": ["ci.skip"],
            })
        );
        (change.objects, change.push_options) = (None, &[]);
        let body = allowed_body(&change).unwrap();
        let env = r#"{"GIT_ALTERNATE_OBJECT_DIRECTORIES_RELATIVE":null,"GIT_OBJECT_DIRECTORY_RELATIVE":""}"#;
        assert_eq!((&body["env"], body.get("push_options")), (&json!(env), None));
        assert_eq!(post_receive_body(&change)["push_options"], Value::Null);
        let requester = Requester { client_context: "e30=".into(), ..requester.clone() };
        let change = ChangeRequest { requester: &requester, ..change };
        for body in [allowed_body(&change).unwrap(), post_receive_body(&change)] {
            assert_eq!(body["gitaly_client_context_bin"], "e30=");
        }
    }

    #[test]
    fn users_are_told_apart_by_their_prefix() {
        assert_eq!(user("user-7"), Ok(("user_id", "7")));
        assert_eq!(user("key-7"), Ok(("key_id", "7")));
        assert_eq!(user("username-jane doe"), Ok(("username", "jane doe")));
        for gl_id in ["", "7", "user-", "user-7x", "key--1", "deploy-1"] {
            assert_eq!(user(gl_id), Err(format!("setting gl_id: gl_id='{gl_id}' is invalid")));
        }
    }
}
