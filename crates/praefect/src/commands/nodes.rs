//! `dial-nodes`: asks every node for its health and for the storages that it serves.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
};
use tabularium_proto::gitaly::{ServerInfoRequest, server_service_client::ServerServiceClient};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    Failure, Out,
    client::{DIAL_TIMEOUT, reach},
};
use crate::{arguments::DialNodes, file::File};

/// What a node says that is well.
const SERVING: &str = "SERVING";

/// A node with what the file says of it.
struct Node<'a> {
    address: &'a str,
    token: SendToken,
    /// Its storages, each with the virtual storages that it belongs to.
    storages: BTreeMap<&'a str, Vec<&'a str>>,
}

fn nodes(file: &File) -> Vec<Node<'_>> {
    let mut found: Vec<Node<'_>> = Vec::new();
    for known in &file.virtual_storages {
        for node in &known.nodes {
            let index = found.iter().position(|other| other.address == node.address).unwrap_or_else(|| {
                let token = SendToken(node.token.get().cloned());
                found.push(Node { address: &node.address, token, storages: BTreeMap::new() });
                found.len() - 1
            });
            found[index].storages.entry(&node.storage).or_default().push(&known.name);
        }
    }
    found
}

/// `dial-nodes`.
pub(super) async fn dial(file: &File, how: &DialNodes, out: Out<'_>) -> Result<(), Failure> {
    let timeout = if how.timeout.is_zero() { DIAL_TIMEOUT } else { how.timeout.get() };
    ping_all(file, timeout, &mut |line| writeln!(out, "{line}")).await
}

/// Asks all nodes at once and tells each line as it comes.
pub(super) async fn ping_all(
    file: &File,
    timeout: Duration,
    tell: &mut (dyn FnMut(String) -> std::io::Result<()> + Send),
) -> Result<(), Failure> {
    let (lines, mut told) = tokio::sync::mpsc::channel(64);
    let mut pings: FuturesUnordered<_> = nodes(file)
        .into_iter()
        .map(|node| {
            let lines = lines.clone();
            async move {
                let mut log = Log { address: node.address, lines };
                let checked = tokio::time::timeout(timeout, check(&node, &mut log)).await;
                if checked.is_err() {
                    log.tell("ERROR: context deadline exceeded").await;
                }
                let healthy = checked.unwrap_or(false);
                (node.address, healthy)
            }
        })
        .collect();
    drop(lines);
    let mut unhealthy = Vec::new();
    let mut open = true;
    while open || !pings.is_empty() {
        tokio::select! {
            line = told.recv(), if open => match line {
                Some(line) => tell(line)?,
                None => open = false,
            },
            Some((address, healthy)) = pings.next() => {
                if !healthy {
                    unhealthy.push(address);
                }
            }
        }
    }
    if unhealthy.is_empty() {
        return Ok(());
    }
    unhealthy.sort_unstable();
    Err(Failure::Told(format!("the following nodes are not healthy: {}", unhealthy.join(", "))))
}

struct Log<'a> {
    address: &'a str,
    lines: tokio::sync::mpsc::Sender<String>,
}

impl Log<'_> {
    async fn tell(&mut self, text: impl std::fmt::Display) {
        // Whoever reads the lines reads all of them, unless the command is over.
        let _ = self.lines.send(format!("[{}]: {text}", self.address)).await;
    }
}

async fn check(node: &Node<'_>, log: &mut Log<'_>) -> bool {
    log.tell("dialing...").await;
    let address: Address = match node.address.parse() {
        Ok(address) => address,
        Err(error) => {
            log.tell(format!("ERROR: dialing failed: {error}")).await;
            return false;
        }
    };
    if let Err(error) = reach(&address, Duration::ZERO).await {
        log.tell(format!("ERROR: dialing failed: {error}")).await;
        return false;
    }
    log.tell("dialed successfully!").await;
    log.tell("checking health...").await;
    let channel = channel(&address);
    let mut health = HealthClient::with_interceptor(channel.clone(), node.token.clone());
    match health.check(HealthCheckRequest::default()).await {
        Err(status) => {
            log.tell(format!("ERROR: unable to request health check: {}", Failure::from(status))).await;
            return false;
        }
        Ok(answer) => {
            let name = answer.into_inner().status().as_str_name();
            if name != SERVING {
                log.tell(format!("ERROR: health check did not report serving, instead reported: {name}"))
                    .await;
                return false;
            }
        }
    }
    log.tell("SUCCESS: node is healthy!").await;
    log.tell("checking consistency...").await;
    let mut server = ServerServiceClient::with_interceptor(channel, node.token.clone());
    if !is_consistent(node, &mut server, log).await {
        log.tell("ERROR: consistency check failed").await;
        return false;
    }
    log.tell("SUCCESS: node configuration is consistent!").await;
    true
}

type Server = ServerServiceClient<
    tonic::service::interceptor::InterceptedService<tonic::transport::Channel, SendToken>,
>;

async fn is_consistent(node: &Node<'_>, server: &mut Server, log: &mut Log<'_>) -> bool {
    let statuses = match server.server_info(ServerInfoRequest {}).await {
        Ok(answer) => answer.into_inner().storage_statuses,
        Err(status) => {
            let told = Failure::from(status);
            log.tell(format!("ERROR: failed to receive state from the remote: {told}")).await;
            return false;
        }
    };
    if statuses.is_empty() {
        log.tell("ERROR: remote has no configured storages").await;
        return false;
    }
    let mut consistent = true;
    let mut seen = BTreeSet::new();
    let mut missing: BTreeSet<&str> = node.storages.keys().copied().collect();
    for status in &statuses {
        let name = status.storage_name.as_str();
        let Some(belongs_to) = node.storages.get(name) else { continue };
        if !seen.insert(name) {
            log.tell(format!("ERROR: remote has duplicated storage: {name:?}")).await;
            consistent = false;
        } else if status.readable && status.writeable {
            let of = belongs_to.join(" ");
            log.tell(format!(
                "SUCCESS: confirmed Gitaly storage {name:?} in virtual storages [{of}] is served"
            ))
            .await;
            missing.remove(name);
        } else {
            log.tell(format!("ERROR: storage {name:?} is not readable or writable")).await;
            consistent = false;
        }
    }
    for name in missing {
        log.tell(format!("ERROR: configured storage was not reported by remote: {name:?}")).await;
        consistent = false;
    }
    consistent
}
