//! The stable shapes of answers: what `--json` prints, field for field, and what the tables are made of.

pub(crate) mod corruption;
pub(crate) mod placement;
pub(crate) mod rebuild;
pub(crate) mod takeover;

use serde::Serialize;
use tabularium_proto::coordinator as wire;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// A repository and its replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct RepositoryView {
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) repository_id: i64,
    pub(crate) replica_path: String,
    pub(crate) primary: String,
    pub(crate) generation: i64,
    pub(crate) epoch: i64,
    /// Replicas that have the newest generation.
    pub(crate) up_to_date: usize,
    pub(crate) replicas: Vec<ReplicaView>,
    pub(crate) created_at: Option<String>,
    pub(crate) written_at: Option<String>,
    pub(crate) mirror: Option<MirrorView>,
    pub(crate) clone_urls: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ReplicaView {
    pub(crate) storage: String,
    /// -1: nothing is known to be there.
    pub(crate) generation: i64,
    pub(crate) up_to_date: bool,
    pub(crate) primary: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct MirrorView {
    pub(crate) home_site: String,
    pub(crate) home_url: String,
    pub(crate) state: String,
    pub(crate) last_error: String,
    pub(crate) synced_at: Option<String>,
}

impl RepositoryView {
    /// Replicas in the order of their storages. `gateways` are base URLs.
    pub(crate) fn new(details: wire::RepositoryDetails, gateways: &[String]) -> Self {
        let route = details.route.unwrap_or_default();
        let name = route.name.unwrap_or_default();
        let mut replicas: Vec<_> = route
            .replicas
            .into_iter()
            .map(|replica| ReplicaView {
                up_to_date: replica.generation == route.generation,
                primary: replica.storage == route.primary,
                storage: replica.storage,
                generation: replica.generation,
            })
            .collect();
        replicas.sort_by(|a, b| a.storage.cmp(&b.storage));
        Self {
            clone_urls: clone_urls(gateways, &name.relative_path),
            virtual_storage: name.virtual_storage,
            relative_path: name.relative_path,
            repository_id: route.repository_id,
            replica_path: route.replica_path,
            primary: route.primary,
            generation: route.generation,
            epoch: route.epoch,
            up_to_date: replicas.iter().filter(|replica| replica.up_to_date).count(),
            replicas,
            created_at: timestamp(details.created_at),
            written_at: timestamp(details.written_at),
            mirror: details.mirror.map(|mirror| MirrorView {
                home_site: mirror.home_site,
                home_url: mirror.home_url,
                state: mirror.state,
                last_error: mirror.last_error,
                synced_at: timestamp(mirror.synced_at),
            }),
        }
    }
}

/// Where people clone a repository from.
pub(crate) fn clone_urls(gateways: &[String], relative_path: &str) -> Vec<String> {
    gateways.iter().map(|gateway| format!("{gateway}/{}", escaped(relative_path))).collect()
}

/// As it stands in a URL, and on a command line without quotes.
fn escaped(path: &str) -> String {
    path.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' | b'@' | b'+' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// RFC 3339, in UTC.
fn timestamp(timestamp: Option<prost_types::Timestamp>) -> Option<String> {
    let timestamp = timestamp?;
    let time = OffsetDateTime::from_unix_timestamp(timestamp.seconds).ok()?;
    time.format(&Rfc3339).ok()
}

/// The cluster as a coordinator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct StatusView {
    pub(crate) site: String,
    pub(crate) version: String,
    pub(crate) healthy: bool,
    /// Why it is not.
    pub(crate) problems: Vec<String>,
    pub(crate) message_bus_connected: bool,
    pub(crate) writes_under_way: i64,
    pub(crate) geo_log_position: i64,
    pub(crate) virtual_storages: Vec<VirtualStorageView>,
    pub(crate) coordinators: Vec<CoordinatorView>,
    pub(crate) routers: Vec<RouterView>,
    pub(crate) duties: DutyCountsView,
    pub(crate) sites: Vec<SiteView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct VirtualStorageView {
    pub(crate) name: String,
    pub(crate) repositories: i64,
    pub(crate) repositories_behind: i64,
    pub(crate) storages: Vec<StorageView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct StorageView {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) healthy: bool,
    pub(crate) problem: String,
    pub(crate) replicas: i64,
    pub(crate) replicas_behind: i64,
    pub(crate) primaries: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CoordinatorView {
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) answering: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct RouterView {
    pub(crate) router_id: String,
    pub(crate) coordinator_id: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DutyCountsView {
    pub(crate) pending: i64,
    pub(crate) published: i64,
    pub(crate) started: i64,
    pub(crate) parked: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct SiteView {
    pub(crate) name: String,
    /// `subscriber`: it mirrors this site; `home`: this site mirrors it.
    pub(crate) role: &'static str,
    pub(crate) notified_position: i64,
    pub(crate) mirrors: i64,
    pub(crate) mirrors_synced: i64,
    pub(crate) mirrors_failed: i64,
}

impl From<wire::GetStatusResponse> for StatusView {
    fn from(status: wire::GetStatusResponse) -> Self {
        let duties = status.duties.unwrap_or_default();
        let mut view = Self {
            site: status.site,
            version: status.version,
            healthy: true,
            problems: Vec::new(),
            message_bus_connected: status.message_bus_connected,
            writes_under_way: status.writes_under_way,
            geo_log_position: status.geo_log_position,
            virtual_storages: status.virtual_storages.into_iter().map(Into::into).collect(),
            coordinators: status
                .coordinators
                .into_iter()
                .map(|c| CoordinatorView { id: c.id, address: c.address, answering: c.answering })
                .collect(),
            routers: status
                .routers
                .into_iter()
                .map(|r| RouterView { router_id: r.router_id, coordinator_id: r.coordinator_id })
                .collect(),
            duties: DutyCountsView {
                pending: duties.pending,
                published: duties.published,
                started: duties.started,
                parked: duties.parked,
            },
            sites: status.sites.into_iter().map(Into::into).collect(),
        };
        view.problems = view.find_problems();
        view.healthy = view.problems.is_empty();
        view
    }
}

impl StatusView {
    /// What somebody has to do something about. Copies that are under way are not among it.
    fn find_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.message_bus_connected {
            problems.push("the message bus is not connected".to_owned());
        }
        for storage in self.virtual_storages.iter().flat_map(|virtual_storage| &virtual_storage.storages) {
            if !storage.healthy {
                problems.push(format!("storage {} is not healthy: {}", storage.name, storage.problem));
            }
        }
        if self.duties.parked > 0 {
            problems.push(format!("{} duties are parked", self.duties.parked));
        }
        for site in self.sites.iter().filter(|site| site.mirrors_failed > 0) {
            problems.push(format!("{} mirrors of {} cannot be synced", site.mirrors_failed, site.name));
        }
        problems
    }
}

impl From<wire::VirtualStorageStatus> for VirtualStorageView {
    fn from(status: wire::VirtualStorageStatus) -> Self {
        let storages = status.storages.into_iter().map(|storage| StorageView {
            name: storage.name,
            address: storage.address,
            healthy: storage.healthy,
            problem: storage.problem,
            replicas: storage.replicas,
            replicas_behind: storage.replicas_behind,
            primaries: storage.primaries,
        });
        Self {
            name: status.name,
            repositories: status.repositories,
            repositories_behind: status.repositories_behind,
            storages: storages.collect(),
        }
    }
}

impl From<wire::SiteStatus> for SiteView {
    fn from(site: wire::SiteStatus) -> Self {
        Self {
            name: site.name,
            role: if site.subscriber { "subscriber" } else { "home" },
            notified_position: site.notified_position,
            mirrors: site.mirrors,
            mirrors_synced: site.mirrors_synced,
            mirrors_failed: site.mirrors_failed,
        }
    }
}

/// A duty of the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DutyView {
    pub(crate) duty_id: String,
    pub(crate) subject: String,
    pub(crate) state: String,
    pub(crate) repository_id: i64,
    pub(crate) relative_path: String,
    pub(crate) target: String,
    pub(crate) attempts: u32,
    pub(crate) last_error: String,
    pub(crate) created_at: Option<String>,
    pub(crate) next_attempt_at: Option<String>,
}

impl From<wire::DutyDetails> for DutyView {
    fn from(duty: wire::DutyDetails) -> Self {
        Self {
            duty_id: duty.duty_id,
            subject: duty.subject,
            state: duty.state,
            repository_id: duty.repository_id,
            relative_path: duty.relative_path,
            target: duty.target,
            attempts: duty.attempts,
            last_error: duty.last_error,
            created_at: timestamp(duty.created_at),
            next_attempt_at: timestamp(duty.next_attempt_at),
        }
    }
}

/// A storage node that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct NodeView {
    pub(crate) virtual_storage: String,
    pub(crate) storage: String,
    pub(crate) address: String,
    pub(crate) ok: bool,
    pub(crate) reachable: bool,
    pub(crate) storage_served: bool,
    pub(crate) server_version: String,
    pub(crate) git_version: String,
    pub(crate) problem: String,
    pub(crate) round_trip_microseconds: u32,
}

impl From<wire::NodeDialled> for NodeView {
    fn from(node: wire::NodeDialled) -> Self {
        Self {
            ok: node.reachable && node.storage_served && node.problem.is_empty(),
            virtual_storage: node.virtual_storage,
            storage: node.storage,
            address: node.address,
            reachable: node.reachable,
            storage_served: node.storage_served,
            server_version: node.server_version,
            git_version: node.git_version,
            problem: node.problem,
            round_trip_microseconds: node.round_trip_microseconds,
        }
    }
}

/// One line of `check` and of the demonstration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CheckView {
    pub(crate) check: String,
    pub(crate) ok: bool,
    pub(crate) detail: String,
    /// What to do when it is not ok.
    pub(crate) hint: String,
}

impl CheckView {
    pub(crate) fn new(check: impl Into<String>, result: Result<String, String>, hint: &str) -> Self {
        let ok = result.is_ok();
        let hint = if ok { "" } else { hint };
        let detail = result.unwrap_or_else(|problem| problem);
        Self { check: check.into(), ok, detail, hint: hint.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details() -> wire::RepositoryDetails {
        let name =
            wire::RepositoryName { virtual_storage: "default".into(), relative_path: "a/b.git".into() };
        let replica = |storage: &str, generation| wire::Replica { storage: storage.into(), generation };
        wire::RepositoryDetails {
            route: Some(wire::Route {
                repository_id: 1,
                name: Some(name),
                replica_path: "@cluster/repositories/6b/86/1".into(),
                primary: "node-2".into(),
                generation: 3,
                epoch: 1,
                replicas: vec![replica("node-2", 3), replica("node-1", -1)],
                home_site: String::new(),
                ..wire::Route::default()
            }),
            created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
            ..wire::RepositoryDetails::default()
        }
    }

    /// Scripts read this: fields may be added, none renamed.
    #[test]
    fn the_json_of_a_repository_is_stable() {
        let view = RepositoryView::new(details(), &["http://127.0.0.1:8080".into()]);
        let expected = serde_json::json!({
            "virtual_storage": "default",
            "relative_path": "a/b.git",
            "repository_id": 1,
            "replica_path": "@cluster/repositories/6b/86/1",
            "primary": "node-2",
            "generation": 3,
            "epoch": 1,
            "up_to_date": 1,
            "replicas": [
                { "storage": "node-1", "generation": -1, "up_to_date": false, "primary": false },
                { "storage": "node-2", "generation": 3, "up_to_date": true, "primary": true },
            ],
            "created_at": "2023-11-14T22:13:20Z",
            "written_at": null,
            "mirror": null,
            "clone_urls": ["http://127.0.0.1:8080/a/b.git"],
        });
        assert_eq!(serde_json::to_value(view).unwrap(), expected);
    }

    #[test]
    fn clone_urls_can_be_pasted() {
        let urls = clone_urls(&["http://a".into()], "b c/ü$(d).git");
        assert_eq!(urls, ["http://a/b%20c/%C3%BC%24%28d%29.git"]);
    }

    #[test]
    fn what_somebody_has_to_act_on_makes_a_cluster_unhealthy() {
        let well = wire::GetStatusResponse { message_bus_connected: true, ..Default::default() };
        assert!(StatusView::from(well.clone()).healthy);
        let mut copying = well.clone();
        copying.duties = Some(wire::DutyCounts { started: 4, pending: 9, ..Default::default() });
        assert!(StatusView::from(copying).healthy);

        let mut ill = well;
        ill.message_bus_connected = false;
        ill.duties = Some(wire::DutyCounts { parked: 2, ..Default::default() });
        let storage =
            wire::StorageStatus { name: "n".into(), problem: "refused".into(), ..Default::default() };
        ill.virtual_storages =
            vec![wire::VirtualStorageStatus { storages: vec![storage], ..Default::default() }];
        let view = StatusView::from(ill);
        assert!(!view.healthy);
        assert_eq!(
            view.problems,
            ["the message bus is not connected", "storage n is not healthy: refused", "2 duties are parked"]
        );
    }
}
