//! Tables for people, JSON for scripts.

#![expect(
    clippy::format_push_string,
    reason = "a page of text, built once: clarity counts, not an allocation"
)]

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::{
    failure::Failure,
    views::{CheckView, DutyView, NodeView, RepositoryView, StatusView},
};

/// Prints `value` as JSON, or else the text that `human` makes of it.
pub(crate) fn print<T: Serialize>(
    json: bool,
    value: &T,
    human: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    use std::io::Write as _;
    let text = if json {
        serde_json::to_string_pretty(value).map_err(|error| Failure::Internal(error.to_string()))?
    } else {
        human(value)
    };
    // Not println!: a reader that has gone away (`| head`) is no reason to panic.
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Internal(format!("cannot write the answer: {error}")))
        }
        _ => Ok(()),
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.iter().copied());
    table
}

pub(crate) fn repositories(repositories: &Vec<RepositoryView>) -> String {
    if repositories.is_empty() {
        return "no repositories".to_owned();
    }
    let mut table =
        table(&["repository", "primary", "generation", "replicas up to date", "written", "mirror of"]);
    for repository in repositories {
        table.add_row([
            repository.relative_path.clone(),
            repository.primary.clone(),
            repository.generation.to_string(),
            format!("{} of {}", repository.up_to_date, repository.replicas.len()),
            repository.written_at.clone().unwrap_or_default(),
            repository.mirror.as_ref().map(|mirror| mirror.home_site.clone()).unwrap_or_default(),
        ]);
    }
    table.to_string()
}

pub(crate) fn repository(repository: &RepositoryView) -> String {
    let mut text = format!(
        "{}  (id {}, generation {}, epoch {})\nkept at  {}\ncreated  {}\nwritten  {}\n",
        repository.relative_path,
        repository.repository_id,
        repository.generation,
        repository.epoch,
        repository.replica_path,
        repository.created_at.as_deref().unwrap_or("-"),
        repository.written_at.as_deref().unwrap_or("-"),
    );
    for url in &repository.clone_urls {
        text += &format!("clone    {url}\n");
    }
    if let Some(mirror) = &repository.mirror {
        text += &format!("mirror   of {} ({}), {}", mirror.home_site, mirror.home_url, mirror.state);
        text += &mirror.synced_at.as_ref().map(|at| format!(", synced {at}")).unwrap_or_default();
        if !mirror.last_error.is_empty() {
            text += &format!(": {}", mirror.last_error);
        }
        text.push('\n');
    }
    let mut table = table(&["storage", "generation", "state", "role"]);
    for replica in &repository.replicas {
        let generation =
            if replica.generation < 0 { "unknown".to_owned() } else { replica.generation.to_string() };
        let state = if replica.up_to_date { "up to date" } else { "behind" };
        let role = if replica.primary { "primary" } else { "" };
        table.add_row([replica.storage.as_str(), &generation, state, role]);
    }
    text + &table.to_string()
}

pub(crate) fn status(status: &StatusView) -> String {
    let mut storages =
        table(&["virtual storage", "storage", "address", "state", "replicas", "behind", "primaries"]);
    for virtual_storage in &status.virtual_storages {
        for storage in &virtual_storage.storages {
            let state = if storage.healthy { "healthy".to_owned() } else { storage.problem.clone() };
            storages.add_row([
                virtual_storage.name.clone(),
                storage.name.clone(),
                storage.address.clone(),
                state,
                storage.replicas.to_string(),
                storage.replicas_behind.to_string(),
                storage.primaries.to_string(),
            ]);
        }
    }
    let repositories: i64 = status.virtual_storages.iter().map(|storage| storage.repositories).sum();
    let behind: i64 = status.virtual_storages.iter().map(|storage| storage.repositories_behind).sum();
    let duties = &status.duties;
    let mut text = format!(
        "site {} (version {})\n{storages}\nrepositories  {repositories}, of which {behind} have a replica that is behind\n\
         writes        {} under way\nduties        {} pending, {} published, {} started, {} parked\n\
         message bus   {}\ngeo log       position {}\n",
        status.site,
        status.version,
        status.writes_under_way,
        duties.pending,
        duties.published,
        duties.started,
        duties.parked,
        if status.message_bus_connected { "connected" } else { "not connected" },
        status.geo_log_position,
    );
    for coordinator in &status.coordinators {
        let answering = if coordinator.answering { " (answers here)" } else { "" };
        text += &format!("coordinator   {} at {}{answering}\n", coordinator.id, coordinator.address);
    }
    for router in &status.routers {
        text += &format!("router        {} with coordinator {}\n", router.router_id, router.coordinator_id);
    }
    for site in &status.sites {
        text += &match site.role {
            "subscriber" => {
                format!("site          {} mirrors us, told up to {}\n", site.name, site.notified_position)
            }
            _ => format!(
                "site          {} is mirrored here: {} repositories, {} synced, {} failed\n",
                site.name, site.mirrors, site.mirrors_synced, site.mirrors_failed
            ),
        };
    }
    for problem in &status.problems {
        text += &format!("problem       {problem}\n");
    }
    text
}

pub(crate) fn duties(duties: &Vec<DutyView>) -> String {
    if duties.is_empty() {
        return "no duties".to_owned();
    }
    let mut table = table(&["duty", "subject", "state", "repository", "attempts", "next", "last error"]);
    for duty in duties {
        table.add_row([
            duty.duty_id.clone(),
            duty.subject.clone(),
            duty.state.clone(),
            duty.relative_path.clone(),
            duty.attempts.to_string(),
            duty.next_attempt_at.clone().unwrap_or_default(),
            duty.last_error.clone(),
        ]);
    }
    table.to_string()
}

pub(crate) fn nodes(nodes: &Vec<NodeView>) -> String {
    let mut table = table(&["storage", "address", "state", "round trip", "server", "git"]);
    for node in nodes {
        let state = match (node.ok, node.reachable, node.problem.as_str()) {
            (true, _, _) => "ok",
            (false, false, "") => "cannot be reached",
            (false, true, "") => "does not serve this storage",
            (false, _, problem) => problem,
        };
        table.add_row([
            format!("{}/{}", node.virtual_storage, node.storage),
            node.address.clone(),
            state.to_owned(),
            format!("{} µs", node.round_trip_microseconds),
            node.server_version.clone(),
            node.git_version.clone(),
        ]);
    }
    table.to_string()
}

pub(crate) fn checks(checks: &Vec<CheckView>) -> String {
    let mut table = table(&["what", "value", "ok"]);
    for check in checks {
        let value = if check.hint.is_empty() {
            check.detail.clone()
        } else {
            format!("{}\n→ {}", check.detail, check.hint)
        };
        table.add_row([check.check.as_str(), &value, if check.ok { "ok" } else { "failed" }]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_shows_its_hint() {
        let rows = vec![
            CheckView::new("router", Ok("tcp://a:1".into()), "start it"),
            CheckView::new("gateway", Err("refused".into()), "start it"),
        ];
        let text = checks(&rows);
        assert_eq!(text.matches("start it").count(), 1, "{text}");
        assert!(text.contains("failed") && text.contains("refused"), "{text}");
    }

    #[test]
    fn empty_answers_are_said_in_words() {
        assert_eq!(repositories(&Vec::new()), "no repositories");
        assert_eq!(duties(&Vec::new()), "no duties");
    }
}
