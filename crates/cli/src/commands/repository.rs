//! `repo`: creation and removal through a router, as clients do it; the rest is asked of a coordinator.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use serde_json::json;
use tabularium_common::ids::RelativePath;
use tabularium_proto::{
    coordinator::{GetRepositoryRequest, ListRepositoriesRequest, RenameRepositoryRequest, RepositoryName},
    gitaly,
};

use super::request;
use crate::{
    arguments::Global,
    failure::Failure,
    output,
    target::Target,
    views::{RepositoryView, clone_urls},
};

/// Repositories asked for at once.
const PAGE_SIZE: u32 = 200;

pub(crate) struct Repositories<'a> {
    pub(crate) target: &'a Target,
    pub(crate) global: &'a Global,
}

impl Repositories<'_> {
    pub(crate) async fn create(&self, path: &str, default_branch: &str) -> Result<(), Failure> {
        let path = new_path(path)?;
        let (mut router, whom) = self.target.repositories().await?;
        let create = gitaly::CreateRepositoryRequest {
            repository: Some(self.gitaly_repository(&path)),
            default_branch: default_branch.as_bytes().to_vec(),
            ..Default::default()
        };
        let created = router.create_repository(request(create)).await;
        created.map_err(|status| Failure::of_status(&format!("creating {path}"), &whom, &status))?;
        let urls = clone_urls(&self.target.gateways, path.as_str());
        let answer = json!({
            "virtual_storage": self.global.virtual_storage,
            "relative_path": path,
            "clone_urls": urls,
        });
        output::print(self.global.json, &answer, |_| {
            let urls: Vec<_> = urls.iter().map(|url| format!("  git clone {url}")).collect();
            format!("created {path}\n{}", urls.join("\n"))
        })
    }

    pub(crate) async fn list(&self, prefix: &str, limit: u32) -> Result<(), Failure> {
        let (mut operator, whom) = self.target.operator().await?;
        let mut found: Vec<RepositoryView> = Vec::new();
        let mut page_token = String::new();
        loop {
            let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
            if left == 0 {
                break;
            }
            let list = ListRepositoriesRequest {
                virtual_storage: self.global.virtual_storage.clone(),
                prefix: prefix.to_owned(),
                page_size: left.min(PAGE_SIZE),
                page_token,
            };
            let page = operator.list_repositories(request(list)).await;
            let page = page.map_err(|status| Failure::of_status("listing repositories", &whom, &status))?;
            let page = page.into_inner();
            let views = page.repositories.into_iter();
            found.extend(views.map(|details| RepositoryView::new(details, &self.target.gateways)));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        found.truncate(limit as usize);
        output::print(self.global.json, &found, output::repositories)
    }

    pub(crate) async fn show(&self, path: &str) -> Result<(), Failure> {
        let view = self.fetch(&repository_path(path)?).await?;
        output::print(self.global.json, &view, output::repository)
    }

    /// What the coordinator knows about one repository.
    pub(crate) async fn fetch(&self, path: &RelativePath) -> Result<RepositoryView, Failure> {
        let (mut operator, whom) = self.target.operator().await?;
        let answer =
            operator.get_repository(request(GetRepositoryRequest { name: Some(self.name(path)) })).await;
        let answer = answer
            .map_err(|status| Failure::of_status(&format!("showing {path}"), &whom, &status))?
            .into_inner();
        Ok(RepositoryView::new(answer.repository.unwrap_or_default(), &self.target.gateways))
    }

    pub(crate) async fn remove(&self, path: &str, yes: bool) -> Result<(), Failure> {
        let path = repository_path(path)?;
        if !yes {
            confirm(&path, &format!("This removes {path} with all of its replicas"))?;
        }
        let (mut router, whom) = self.target.repositories().await?;
        let remove = gitaly::RemoveRepositoryRequest { repository: Some(self.gitaly_repository(&path)) };
        let removed = router.remove_repository(request(remove)).await;
        removed.map_err(|status| Failure::of_status(&format!("removing {path}"), &whom, &status))?;
        output::print(self.global.json, &json!({ "relative_path": path, "removed": true }), |_| {
            format!("removed {path}")
        })
    }

    pub(crate) async fn rename(&self, path: &str, new_path: &str) -> Result<(), Failure> {
        let (path, new_path) = (repository_path(path)?, self::new_path(new_path)?);
        let (mut operator, whom) = self.target.operator().await?;
        let rename =
            RenameRepositoryRequest { name: Some(self.name(&path)), new_relative_path: new_path.to_string() };
        let renamed = operator.rename_repository(request(rename)).await;
        renamed.map_err(|status| Failure::of_status(&format!("renaming {path}"), &whom, &status))?;
        output::print(self.global.json, &json!({ "relative_path": new_path, "was": path }), |_| {
            format!("{path} is now {new_path}")
        })
    }

    fn name(&self, path: &RelativePath) -> RepositoryName {
        RepositoryName {
            virtual_storage: self.global.virtual_storage.clone(),
            relative_path: path.to_string(),
        }
    }

    fn gitaly_repository(&self, path: &RelativePath) -> gitaly::Repository {
        gitaly::Repository {
            storage_name: self.global.virtual_storage.clone(),
            relative_path: path.to_string(),
            ..Default::default()
        }
    }
}

/// What people type: with or without `.git`, perhaps with a slash in front.
pub(crate) fn repository_path(text: &str) -> Result<RelativePath, Failure> {
    let bare = text.trim_matches('/');
    let bare = bare.strip_suffix(".git").unwrap_or(bare);
    if bare.is_empty() {
        return Err(Failure::Usage(format!("`{text}` names no repository; allowed: group/project")));
    }
    format!("{bare}.git")
        .parse()
        .map_err(|error| Failure::Usage(format!("`{text}` is not the name of a repository: {error}")))
}

/// As [`repository_path`], for a name that is to come into being: it must be one that people can clone.
fn new_path(text: &str) -> Result<RelativePath, Failure> {
    let path = repository_path(text)?;
    match path.as_str().split('/').next() {
        Some("api" | "api.git") => Err(Failure::Usage(format!(
            "`{text}` could not be cloned: gateways serve their own interface below `api/`; choose another first name"
        ))),
        _ => Ok(path),
    }
}

/// On a terminal the name has to be typed; elsewhere `--yes` is needed. `what` is a sentence without its end.
pub(super) fn confirm(path: &RelativePath, what: &str) -> Result<(), Failure> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::Usage(format!("{what} and cannot be undone; add --yes to do it")));
    }
    let mut typed = String::new();
    eprint!("{what} and cannot be undone.\nType the name of the repository to go on: ");
    let read = std::io::stderr().flush().and_then(|()| stdin.lock().read_line(&mut typed));
    read.map_err(|error| Failure::Internal(format!("cannot read the answer: {error}")))?;
    match repository_path(typed.trim()) {
        Ok(typed) if typed == *path => Ok(()),
        _ => Err(Failure::No(format!("nothing was done to {path}: the name typed is another"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_people_type_them() {
        for text in ["group/project", "group/project.git", "/group/project/", "group//project"] {
            assert_eq!(repository_path(text).unwrap().as_str(), "group/project.git", "{text}");
        }
        for text in ["", "/", ".git", "../x", "a/../../b", "a\nb"] {
            assert_eq!(repository_path(text).unwrap_err().code(), 2, "{text}");
        }
    }

    #[test]
    fn names_that_no_gateway_serves_are_not_given() {
        for text in ["api", "api/x", "/api/v1/x.git"] {
            assert_eq!(new_path(text).unwrap_err().code(), 2, "{text}");
        }
        assert_eq!(new_path("apis/api").unwrap().as_str(), "apis/api.git");
    }
}
