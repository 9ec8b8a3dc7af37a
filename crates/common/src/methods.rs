//! The method registry: for every RPC of Gitaly 16.7 and 19.x, and our own that the router relays, what it does and
//! where in its first message the repository stands.
//!
//! The registry is data (`methods/methods.tsv`), read once. Nothing in the router is written per method. Columns:
//! service, method, client streaming, server streaming, operation in 16.7, operation in 19.x (`-`: absent there), scope,
//! and the field paths of target repository, additional repository, storage name, partition id, and of the time at which
//! the change is said to have been made.

use std::collections::HashMap;

/// What an RPC does to what it is aimed at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Accessor,
    /// Writes.
    Mutator,
    /// Tidies every replica by itself; no client sees a difference.
    Maintenance,
    /// Answered by the router itself; never relayed as it is.
    Intercepted,
}

/// What an RPC is aimed at, with the path of field numbers to it in the first request message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// One repository.
    Repository {
        /// Field path of the `gitaly.Repository` that decides where the RPC goes.
        target: Vec<u32>,
        /// Field path of a second `gitaly.Repository` that is rewritten for the same storage.
        additional: Option<Vec<u32>>,
    },
    /// One storage.
    Storage {
        /// Field path of the storage's name; `None` when the message carries none.
        name: Option<Vec<u32>>,
    },
    /// One partition of a storage (19.x).
    Partition {
        /// Field path of the storage's name.
        storage: Vec<u32>,
        /// Field path of the partition's id.
        partition: Vec<u32>,
    },
    /// Nothing: the router's own services.
    None,
}

/// One RPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    /// The gRPC path, `/gitaly.RefService/ListRefs`.
    pub path: String,
    /// Protobuf service with its package.
    pub service: String,
    /// Method name alone.
    pub name: String,
    /// The client may send several messages.
    pub client_streaming: bool,
    /// The server may send several messages.
    pub server_streaming: bool,
    /// What it does. Where 16.7 and 19.x differ the newer word counts, but see [`Registry::read`].
    pub operation: Operation,
    /// What it is aimed at.
    pub scope: Scope,
    /// Field path of the `google.protobuf.Timestamp` that becomes part of what is written. Nodes take their own clock for
    /// one that is missing, and would write different commits.
    pub timestamp: Option<Vec<u32>>,
    /// Known to Gitaly 16.7.
    pub in_16_7: bool,
    /// Known to Gitaly 19.x.
    pub in_19: bool,
}

impl Method {
    /// The RPC brings a repository into being: its target must not exist yet (wire reference, section k.4).
    pub fn creates(&self) -> bool {
        matches!(
            self.name.as_str(),
            "CreateRepository"
                | "CreateRepositoryFromBundle"
                | "CreateRepositoryFromSnapshot"
                | "CreateRepositoryFromURL"
                | "CreateFork"
                | "CreateObjectPool"
        )
    }

    /// The RPC writes a repository whether or not it exists yet (section k.4).
    pub fn upserts(&self) -> bool {
        matches!(self.name.as_str(), "ReplicateRepository" | "RestoreRepository")
    }

    /// Field path of a repository beside which the new one is put, so that its nodes have both.
    pub fn placed_beside(&self) -> Option<&'static [u32]> {
        (self.name == "CreateFork").then_some(&[2])
    }

    /// Nodes vote on the RPC (section g.1).
    pub fn votes(&self) -> bool {
        self.operation == Operation::Mutator
            && matches!(self.scope, Scope::Repository { .. })
            && !matches!(self.name.as_str(), "CreateObjectPool" | "DeleteObjectPool" | "RemoveRepository")
    }

    /// The RPC uploads before it changes anything, and its first vote separates the two: only what follows that has to
    /// be the only write to its repository.
    pub fn uploads_before_it_votes(&self) -> bool {
        matches!(self.name.as_str(), "PostReceivePack" | "SSHReceivePack")
    }

    /// What it answers, and asks, goes over a sidechannel (section e). That of pack-objects' hook never leaves its machine.
    pub fn has_sidechannel(&self) -> bool {
        self.name.ends_with("WithSidechannel") && self.service != "gitaly.HookService"
    }

    /// What a client asks before it pushes: of no use while no push can follow.
    pub fn precedes_a_push(&self) -> bool {
        self.name == "InfoRefsReceivePack"
    }

    /// The RPC reads from the primary whatever the policy, because replicas differ in what it measures (section k.4).
    pub fn primary_only(&self) -> bool {
        matches!(self.name.as_str(), "RepositorySize" | "GetObjectDirectorySize")
    }
}

/// All methods, by gRPC path.
#[derive(Debug, Clone)]
pub struct Registry {
    methods: HashMap<String, Method>,
}

/// A line of the table that cannot be read. The table is part of the program, so this is a defect of a build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("method table, line {line}: {problem}")]
pub struct TableError {
    line: usize,
    problem: String,
}

const TABLE: &str = include_str!("methods/methods.tsv");

impl Registry {
    /// Reads the table that is part of the program.
    ///
    /// `CommitLanguages` became a mutator in 19.x only because a node caches its result on disk; no ref or object
    /// changes. It is read from any replica here, as in 16.7.
    pub fn read() -> Result<Self, TableError> {
        let mut methods = HashMap::new();
        for (index, line) in TABLE.lines().enumerate().skip(1) {
            let mut method = parse_line(line).map_err(|problem| TableError { line: index + 1, problem })?;
            if method.path == "/gitaly.CommitService/CommitLanguages" {
                method.operation = Operation::Accessor;
            }
            methods.insert(method.path.clone(), method);
        }
        Ok(Self { methods })
    }

    /// The method of a gRPC path.
    pub fn get(&self, path: &str) -> Option<&Method> {
        self.methods.get(path)
    }

    /// Every method, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Method> {
        self.methods.values()
    }
}

fn parse_line(line: &str) -> Result<Method, String> {
    let columns: Vec<&str> = line.split('\t').collect();
    let [service, name, client, server, old, new, scope, target, additional, storage, partition, timestamp] =
        columns[..]
    else {
        return Err(format!("{} columns", columns.len()));
    };
    let operation = parse_operation(if new == "-" { old } else { new })?;
    let scope = match scope {
        "REPOSITORY" => Scope::Repository {
            target: parse_path(target)?.ok_or("no target repository")?,
            additional: parse_path(additional)?,
        },
        "STORAGE" => Scope::Storage { name: parse_path(storage)? },
        "PARTITION" => Scope::Partition {
            storage: parse_path(storage)?.ok_or("no storage")?,
            partition: parse_path(partition)?.ok_or("no partition")?,
        },
        "none" => Scope::None,
        other => return Err(format!("scope {other}")),
    };
    Ok(Method {
        path: format!("/{service}/{name}"),
        service: service.to_owned(),
        name: name.to_owned(),
        client_streaming: client == "true",
        server_streaming: server == "true",
        operation,
        scope,
        timestamp: parse_path(timestamp)?,
        in_16_7: old != "-",
        in_19: new != "-",
    })
}

fn parse_operation(text: &str) -> Result<Operation, String> {
    match text {
        "ACCESSOR" => Ok(Operation::Accessor),
        "MUTATOR" => Ok(Operation::Mutator),
        "MAINTENANCE" => Ok(Operation::Maintenance),
        "INTERCEPTED" => Ok(Operation::Intercepted),
        other => Err(format!("operation {other}")),
    }
}

fn parse_path(text: &str) -> Result<Option<Vec<u32>>, String> {
    if text == "-" {
        return Ok(None);
    }
    text.split('.')
        .map(|part| part.parse().map_err(|_| format!("field path {text}")))
        .collect::<Result<_, _>>()
        .map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(path: &str) -> Method {
        Registry::read().unwrap().get(path).unwrap().clone()
    }

    #[test]
    fn every_line_reads_and_the_counts_are_those_of_the_two_versions() {
        let registry = Registry::read().unwrap();
        let gitaly = || registry.iter().filter(|method| method.service.starts_with("gitaly."));
        assert_eq!(gitaly().filter(|method| method.in_16_7).count(), 153);
        assert_eq!(gitaly().filter(|method| method.in_19).count(), 168);
    }

    #[test]
    fn targets_stand_where_the_wire_reference_says() {
        let commit_files = method("/gitaly.OperationService/UserCommitFiles");
        assert_eq!(commit_files.scope, Scope::Repository { target: vec![1, 1], additional: None });
        assert!(commit_files.client_streaming);
        let pool = method("/gitaly.ObjectPoolService/CreateObjectPool");
        assert_eq!(pool.scope, Scope::Repository { target: vec![1, 1], additional: Some(vec![2]) });
        assert!(pool.creates());
        let remote = method("/gitaly.RemoteService/FindRemoteRepository");
        assert_eq!(remote.scope, Scope::Storage { name: Some(vec![2]) });
        assert_eq!(method("/gitaly.CommitService/CommitLanguages").operation, Operation::Accessor);
        assert_eq!(method("/gitaly.RepositoryService/OptimizeRepository").operation, Operation::Maintenance);
        assert_eq!(method("/gitaly.ServerService/ServerInfo").operation, Operation::Intercepted);
    }

    #[test]
    fn what_becomes_part_of_a_commit_stands_where_the_wire_reference_says() {
        assert_eq!(method("/gitaly.OperationService/UserCommitFiles").timestamp, Some(vec![1, 11]));
        assert_eq!(method("/gitaly.OperationService/UserSquash").timestamp, Some(vec![9]));
        assert_eq!(method("/gitaly.OperationService/UserFFBranch").timestamp, None);
        assert_eq!(Registry::read().unwrap().iter().filter(|method| method.timestamp.is_some()).count(), 12);
    }

    #[test]
    fn nodes_vote_on_what_they_change_alike() {
        let push = method("/gitaly.SmartHTTPService/PostReceivePack");
        assert!(push.votes() && push.uploads_before_it_votes());
        let write_ref = method("/gitaly.RepositoryService/WriteRef");
        assert!(write_ref.votes() && !write_ref.uploads_before_it_votes());
        assert!(!method("/gitaly.ObjectPoolService/CreateObjectPool").votes());
        assert!(!method("/gitaly.RefService/ListRefs").votes());
    }
}
