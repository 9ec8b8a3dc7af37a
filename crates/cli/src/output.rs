//! Tables for people, JSON for scripts.

#![expect(
    clippy::format_push_string,
    reason = "a page of text, built once: clarity counts, not an allocation"
)]

pub(crate) mod corruption;
pub(crate) mod placement;
pub(crate) mod rebuild;
pub(crate) mod takeover;

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table, presets};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

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

/// Green or red where there are colours: on terminals, unless `NO_COLOR` is set.
fn coloured(text: impl Into<String>, good: bool) -> Cell {
    Cell::new(text.into()).fg(if good { Color::Green } else { Color::Red })
}

/// Green or yellow: a copy that is behind will follow by itself.
fn followed(text: impl Into<String>, up_to_date: bool) -> Cell {
    Cell::new(text.into()).fg(if up_to_date { Color::Green } else { Color::Yellow })
}

fn counted(count: i64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `4 min ago`, `in 3 s`; what is no time stays as it is.
fn relative(at: &str, now: OffsetDateTime) -> String {
    let Ok(time) = OffsetDateTime::parse(at, &Rfc3339) else { return at.to_owned() };
    let seconds = (now - time).whole_seconds();
    let amount = match seconds.unsigned_abs() {
        0 => return "now".to_owned(),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    };
    if seconds > 0 { format!("{amount} ago") } else { format!("in {amount}") }
}

fn since(at: Option<&String>) -> String {
    at.map(|at| relative(at, OffsetDateTime::now_utc())).unwrap_or_default()
}

/// For one repository: the exact time too.
fn exactly(at: Option<&String>) -> String {
    at.map_or_else(|| "-".to_owned(), |at| format!("{at}  ({})", since(Some(at))))
}

pub(crate) fn repositories(repositories: &Vec<RepositoryView>) -> String {
    if repositories.is_empty() {
        return "no repositories".to_owned();
    }
    let mirrors = repositories.iter().any(|repository| repository.mirror.is_some());
    let mut header = vec!["repository", "primary", "generation", "up to date", "written"];
    header.extend(mirrors.then_some("mirror of"));
    let mut table = table(&header);
    for repository in repositories {
        let (up_to_date, all) = (repository.up_to_date, repository.replicas.len());
        let mut row = vec![
            Cell::new(&repository.relative_path),
            Cell::new(&repository.primary),
            Cell::new(repository.generation),
            followed(format!("{up_to_date} of {all}"), up_to_date == all),
            Cell::new(since(repository.written_at.as_ref())),
        ];
        if mirrors {
            row.push(Cell::new(repository.mirror.as_ref().map_or("", |mirror| &mirror.home_site)));
        }
        table.add_row(row);
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
        exactly(repository.created_at.as_ref()),
        exactly(repository.written_at.as_ref()),
    );
    for url in &repository.clone_urls {
        text += &format!("clone    {url}\n");
    }
    if let Some(mirror) = &repository.mirror {
        text += &format!("mirror   of {}, {}", mirror.home_site, mirror.state);
        text += &mirror
            .synced_at
            .as_ref()
            .map(|at| format!("; last synced {at}  ({})", since(Some(at))))
            .unwrap_or_default();
        if !mirror.last_error.is_empty() {
            text += &format!(": {}", mirror.last_error);
        }
        text.push('\n');
        if !mirror.home_url.is_empty() {
            text += &format!("push to  {}\n", mirror.home_url);
        }
    }
    let mut table = table(&["storage", "generation", "state", "role"]);
    for replica in &repository.replicas {
        let generation =
            if replica.generation < 0 { "unknown".to_owned() } else { replica.generation.to_string() };
        let state = if replica.up_to_date { "up to date" } else { "behind" };
        let role = if replica.primary { "primary" } else { "" };
        table.add_row([
            Cell::new(&replica.storage),
            Cell::new(generation),
            followed(state, replica.up_to_date),
            Cell::new(role),
        ]);
    }
    text + &table.to_string()
}

pub(crate) fn status(status: &StatusView) -> String {
    let mut text = format!("site {} (version {})\n{}\n", status.site, status.version, storages(status));
    let mut line = |what: &str, value: String| text += &format!("{what:<14}{value}\n");
    let repositories: i64 = status.virtual_storages.iter().map(|storage| storage.repositories).sum();
    let behind: i64 = status.virtual_storages.iter().map(|storage| storage.repositories_behind).sum();
    let copies = match behind {
        0 => "all copies up to date".to_owned(),
        1 => "1 has a copy that is behind".to_owned(),
        _ => format!("{behind} have a copy that is behind"),
    };
    line("repositories", format!("{repositories}; {copies}"));
    line("writes", format!("{} under way", status.writes_under_way));
    let duties = &status.duties;
    let states = [
        (duties.pending, "pending"),
        (duties.published, "published"),
        (duties.started, "started"),
        (duties.parked, "parked"),
    ];
    let owed: Vec<_> = states
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    line("duties", if owed.is_empty() { "none owed".to_owned() } else { owed.join(", ") });
    let bus = if status.message_bus_connected { "connected" } else { "not connected" };
    line("message bus", bus.to_owned());
    let coordinators: Vec<_> = status
        .coordinators
        .iter()
        .map(|found| format!("{}{}", found.address, if found.answering { " (this answer)" } else { "" }))
        .collect();
    line("coordinators", coordinators.join(", "));
    line("routers", format!("{} connected", status.routers.len()));
    for site in &status.sites {
        match site.role {
            "subscriber" => line(
                "mirrored by",
                format!(
                    "{}; told {} of {} changes",
                    site.name, site.notified_position, status.geo_log_position
                ),
            ),
            _ => line(
                "mirrors",
                format!(
                    "{} of {}: {} synced, {} failed",
                    counted(site.mirrors, "repository", "repositories"),
                    site.name,
                    site.mirrors_synced,
                    site.mirrors_failed
                ),
            ),
        }
    }
    for problem in &status.problems {
        line("problem", problem.clone());
    }
    text
}

fn storages(status: &StatusView) -> Table {
    let several = status.virtual_storages.len() > 1;
    let mut header = vec!["storage", "address", "state", "replicas", "behind", "primaries"];
    if several {
        header.insert(0, "virtual storage");
    }
    let mut storages = table(&header);
    for virtual_storage in &status.virtual_storages {
        for storage in &virtual_storage.storages {
            // Why it is not healthy stands below, among the problems.
            let state = if storage.healthy { "healthy" } else { "not healthy" };
            let mut row = vec![
                Cell::new(&storage.name),
                Cell::new(&storage.address),
                coloured(state, storage.healthy),
                Cell::new(storage.replicas),
                Cell::new(storage.replicas_behind),
                Cell::new(storage.primaries),
            ];
            if several {
                row.insert(0, Cell::new(&virtual_storage.name));
            }
            storages.add_row(row);
        }
    }
    storages
}

pub(crate) fn duties(duties: &Vec<DutyView>) -> String {
    if duties.is_empty() {
        return "no duties".to_owned();
    }
    let mut table = table(&["duty", "what", "repository", "state"]);
    for duty in duties {
        table.add_row([
            Cell::new(&duty.duty_id),
            Cell::new(work(duty)),
            Cell::new(&duty.relative_path),
            Cell::new(duty_state(duty)),
        ]);
    }
    // A broken id could not be copied.
    if let Some(ids) = table.column_mut(0) {
        ids.set_constraint(ColumnConstraint::ContentWidth);
    }
    let mut text = table.to_string();
    for duty in duties.iter().filter(|duty| !duty.last_error.is_empty()) {
        text += &format!("\n{}: {}", duty.duty_id, duty.last_error);
    }
    text
}

/// The subject's first word says what kind of work it is.
fn work(duty: &DutyView) -> String {
    let verb = match duty.subject.split('.').next() {
        Some("replication") => "copy to",
        Some("cleanup") => "remove from",
        Some("geo") => "tell site",
        _ => return duty.subject.clone(),
    };
    format!("{verb} {}", duty.target)
}

fn duty_state(duty: &DutyView) -> String {
    let mut state = duty.state.clone();
    if duty.attempts > 1 {
        state += &format!(", {} tries", duty.attempts);
    }
    if duty.state == "pending" && duty.attempts > 0 {
        state += &format!(", again {}", since(duty.next_attempt_at.as_ref()));
    }
    state
}

pub(crate) fn nodes(nodes: &Vec<NodeView>) -> String {
    let several = nodes.iter().any(|node| node.virtual_storage != nodes[0].virtual_storage);
    let mut table = table(&["storage", "address", "state", "round trip", "server", "git"]);
    for node in nodes {
        let state = match (node.ok, node.reachable, node.problem.as_str()) {
            (true, _, _) => "ok",
            (false, false, "") => "cannot be reached",
            (false, true, "") => "does not serve this storage",
            (false, _, problem) => problem,
        };
        let name = &node.storage;
        let milliseconds = f64::from(node.round_trip_microseconds) / 1000.0;
        table.add_row([
            Cell::new(if several { format!("{}/{name}", node.virtual_storage) } else { name.clone() }),
            Cell::new(&node.address),
            coloured(state, node.ok),
            Cell::new(if node.reachable { format!("{milliseconds:.1} ms") } else { String::new() }),
            Cell::new(&node.server_version),
            Cell::new(&node.git_version),
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
        let ok = coloured(if check.ok { "ok" } else { "failed" }, check.ok);
        table.add_row([Cell::new(&check.check), Cell::new(value), ok]);
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

    #[test]
    fn times_are_told_as_distances() {
        let now = OffsetDateTime::parse("2026-01-02T12:00:00Z", &Rfc3339).unwrap();
        for (at, expected) in [
            ("2026-01-02T12:00:00Z", "now"),
            ("2026-01-02T11:59:57Z", "3 s ago"),
            ("2026-01-02T12:00:05Z", "in 5 s"),
            ("2026-01-02T11:50:00Z", "10 min ago"),
            ("2026-01-02T02:00:00Z", "10 h ago"),
            ("2025-12-01T12:00:00Z", "32 days ago"),
            ("yesterday", "yesterday"),
        ] {
            assert_eq!(relative(at, now), expected, "{at}");
        }
    }

    fn duty(state: &str, attempts: u32, last_error: &str) -> DutyView {
        DutyView {
            duty_id: "67bb65bb-5d8c-4b8d-b02d-74a0ebc3bd65".into(),
            subject: "replication.default.node-2".into(),
            state: state.into(),
            repository_id: 1,
            relative_path: "some-group/some-project.git".into(),
            target: "node-2".into(),
            attempts,
            last_error: last_error.into(),
            created_at: None,
            next_attempt_at: Some("2020-01-01T00:00:00Z".into()),
        }
    }

    #[test]
    fn a_parked_duty_shows_its_whole_id_and_its_error_within_a_terminal() {
        let text = duties(&vec![duty("parked", 10, "disk full"), duty("done", 1, "")]);
        assert!(text.contains("67bb65bb-5d8c-4b8d-b02d-74a0ebc3bd65: disk full"), "{text}");
        assert!(text.contains("copy to node-2") && text.contains("parked, 10 tries"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 110), "{text}");
        assert!(!text.contains('\u{1b}'), "no colours where there is no terminal");
    }

    #[test]
    fn columns_that_say_nothing_are_left_out() {
        let storage = |name: &str| crate::views::VirtualStorageView {
            name: name.into(),
            repositories: 0,
            repositories_behind: 0,
            storages: Vec::new(),
        };
        let mut view = StatusView::from(tabularium_proto::coordinator::GetStatusResponse::default());
        view.virtual_storages = vec![storage("a")];
        assert!(!status(&view).contains("virtual storage"));
        view.virtual_storages.push(storage("b"));
        assert!(status(&view).contains("virtual storage"));
    }
}
