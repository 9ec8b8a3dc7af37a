//! What is done with each gRPC path: the method registry, turned once into one lookup per RPC.

use std::{collections::HashMap, sync::Arc};

use tabularium_common::methods::{Method, Operation, Registry, Scope, TableError};
use tabularium_proto::coordinator::WriteKind;

use crate::{patience::Usual, routing::Reader};

/// One path.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The registry's word on it.
    pub(crate) method: Method,
    /// What the router does.
    pub(crate) action: Action,
    /// How long nodes usually take.
    pub(crate) usual: Usual,
}

/// What the router does with an RPC.
#[derive(Debug)]
pub(crate) enum Action {
    /// Relays it to one up-to-date replica.
    Read {
        /// Field path of the repository.
        target: Vec<u32>,
        /// Which replica may serve it.
        reader: Reader,
    },
    /// Relays it to all that take part, between `BeginWrite` and `CommitWrite`.
    Write {
        /// Field path of the repository.
        target: Vec<u32>,
        /// Field path of a second one.
        additional: Option<Vec<u32>>,
        /// Whether the repository exists already.
        kind: WriteKind,
    },
    /// Relays it to every replica.
    Maintain {
        /// Field path of the repository.
        target: Vec<u32>,
    },
    /// Relays it to any storage of the virtual storage that is named.
    ReadStorage {
        /// Field path of the message that holds the name; empty: the request itself.
        within: Vec<u32>,
        /// Field number of the name in it.
        name: u32,
    },
    /// The coordinator says whether it exists.
    RepositoryExists,
    /// The coordinator forgets it. `true`: it is an error when there is nothing to forget.
    RemoveRepository {
        /// Field path of the repository.
        target: Vec<u32>,
        /// `NOT_FOUND` when it does not exist.
        must_exist: bool,
    },
    /// One of the typed services answers.
    Typed,
    /// Known, and refused with `UNIMPLEMENTED`.
    NotBuilt,
}

/// Every path that is known.
pub(crate) struct Table {
    entries: HashMap<String, Arc<Entry>>,
}

impl Table {
    /// From the registry that is part of the program.
    pub(crate) fn read() -> Result<Self, TableError> {
        let entries = Registry::read()?
            .iter()
            .map(|method| {
                let entry = Entry { method: method.clone(), action: action(method), usual: Usual::default() };
                (method.path.clone(), Arc::new(entry))
            })
            .collect();
        Ok(Self { entries })
    }

    /// What is done with a path.
    pub(crate) fn get(&self, path: &str) -> Option<&Arc<Entry>> {
        self.entries.get(path)
    }
}

fn action(method: &Method) -> Action {
    match (method.path.as_str(), method.operation, &method.scope) {
        ("/gitaly.RepositoryService/RepositoryExists", ..) => Action::RepositoryExists,
        ("/gitaly.RepositoryService/RemoveRepository", _, Scope::Repository { target, .. }) => {
            Action::RemoveRepository { target: target.clone(), must_exist: true }
        }
        // A pool is a repository like any other: removing it on one node only would be undone by the next repair.
        ("/gitaly.ObjectPoolService/DeleteObjectPool", _, Scope::Repository { target, .. }) => {
            Action::RemoveRepository { target: target.clone(), must_exist: false }
        }
        // Nodes know repositories by their replica paths, which mean nothing to clients.
        ("/gitaly.ObjectPoolService/GetObjectPool" | "/gitaly.InternalGitaly/WalkRepos", ..) => Action::Typed,
        (_, Operation::Intercepted, _) if is_typed(&method.service) => Action::Typed,
        (_, Operation::Accessor, Scope::Repository { target, .. }) => Action::Read {
            target: target.clone(),
            reader: if method.primary_only() { Reader::Primary } else { Reader::Any },
        },
        (_, Operation::Mutator, Scope::Repository { target, additional }) => {
            Action::Write { target: target.clone(), additional: additional.clone(), kind: write_kind(method) }
        }
        (_, Operation::Maintenance, Scope::Repository { target, .. }) => {
            Action::Maintain { target: target.clone() }
        }
        (
            _,
            Operation::Accessor,
            Scope::Storage { name: Some(path) } | Scope::Partition { storage: path, .. },
        ) => match path.split_last() {
            Some((name, within)) => Action::ReadStorage { within: within.to_vec(), name: *name },
            None => Action::NotBuilt,
        },
        // A write to one storage of several that are meant to be alike would leave them different; one that names no
        // storage cannot be aimed.
        (_, Operation::Intercepted, _)
        | (_, _, Scope::None | Scope::Storage { .. } | Scope::Partition { .. }) => Action::NotBuilt,
    }
}

fn is_typed(service: &str) -> bool {
    matches!(service, "gitaly.ServerService" | "gitaly.PraefectInfoService" | "gitaly.RefTransaction")
}

fn write_kind(method: &Method) -> WriteKind {
    if method.creates() {
        WriteKind::Create
    } else if method.upserts() {
        WriteKind::Upsert
    } else {
        WriteKind::Update
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str) -> String {
        format!("{:?}", Table::read().unwrap().get(path).unwrap().action)
    }

    #[test]
    fn every_kind_of_method_has_its_way() {
        for (path, expected) in [
            ("/gitaly.RefService/ListRefs", "Read { target: [1], reader: Any }"),
            ("/gitaly.RepositoryService/RepositorySize", "Read { target: [1], reader: Primary }"),
            ("/gitaly.RepositoryService/RepositoryExists", "RepositoryExists"),
            (
                "/gitaly.RepositoryService/CreateRepository",
                "Write { target: [1], additional: None, kind: Create }",
            ),
            (
                "/gitaly.RepositoryService/ReplicateRepository",
                "Write { target: [1], additional: None, kind: Upsert }",
            ),
            (
                "/gitaly.ObjectPoolService/FetchIntoObjectPool",
                "Write { target: [2, 1], additional: Some([1]), kind: Update }",
            ),
            (
                "/gitaly.ObjectPoolService/DeleteObjectPool",
                "RemoveRepository { target: [1, 1], must_exist: false }",
            ),
            ("/gitaly.RepositoryService/OptimizeRepository", "Maintain { target: [1] }"),
            ("/gitaly.InternalGitaly/WalkRepos", "Typed"),
            ("/gitaly.ObjectPoolService/GetObjectPool", "Typed"),
            ("/gitaly.RemoteService/FindRemoteRepository", "ReadStorage { within: [], name: 2 }"),
            ("/gitaly.PartitionService/BackupPartition", "ReadStorage { within: [], name: 1 }"),
            ("/gitaly.RepositoryService/RemoveAll", "NotBuilt"),
            ("/gitaly.RaftService/GetClusterInfo", "NotBuilt"),
            ("/gitaly.ServerService/ServerInfo", "Typed"),
            ("/gitaly.RefTransaction/VoteTransaction", "Typed"),
            ("/tabularium.node.v1.UploadPackService/UploadPack", "Read { target: [1], reader: Any }"),
        ] {
            assert_eq!(check(path), expected, "{path}");
        }
    }

    /// What operators read says what is done.
    #[test]
    fn the_page_about_the_api_is_right_about_the_router() {
        let page = include_str!("../../../docs/gitaly-api.md");
        let table = Table::read().unwrap();
        let (mut service, mut seen) = (String::new(), 0);
        for line in page.lines() {
            if let Some(name) = line.strip_prefix("## ") {
                service = if name.contains('.') { name.to_owned() } else { format!("gitaly.{name}") };
            }
            let Some((name, cells)) = line.strip_prefix("| `").and_then(|line| line.split_once("` | "))
            else {
                continue;
            };
            let status = cells.split(" | ").next().unwrap();
            let path = format!("/{service}/{name}");
            let expected = match table.get(&path).unwrap().action {
                Action::Typed | Action::RepositoryExists | Action::RemoveRepository { .. } => {
                    status == "answered by the router"
                }
                Action::NotBuilt => status == "refused by the router",
                _ => matches!(status, "served" | "partly" | "relayed only"),
            };
            assert!(expected, "{path}: {status}");
            seen += 1;
        }
        assert_eq!(seen, table.entries.len());
    }
}
