//! `check`: everything that must be well, each by itself, so that one failure does not hide the next.

use std::process::ExitCode;

use futures::future::join_all;
use tabularium_proto::gitaly::{ServerInfoRequest, server_service_client::ServerServiceClient};

use super::{cluster, request, yes_or_no};
use crate::{
    failure::Failure,
    local::{http, record::ProcessRecord},
    output,
    target::Target,
    views::CheckView,
};

pub(crate) async fn run(target: &Target, json: bool) -> Result<ExitCode, Failure> {
    let mut checks = Vec::new();
    if let Some(site) = &target.site {
        checks.extend(join_all(site.processes.iter().map(process)).await);
    }
    checks.extend(coordinator(target).await);
    checks.extend(nodes(target).await);
    checks.extend(routers(target).await);
    checks.extend(join_all(target.gateways.iter().map(|url| gateway(url))).await);
    output::print(json, &checks, output::checks)?;
    Ok(yes_or_no(checks.iter().all(|check| check.ok)))
}

async fn process(process: &ProcessRecord) -> CheckView {
    let address = process.admin.clone().unwrap_or_default();
    let result = match http::get(&address, "/ready").await {
        Ok((200, _)) => Ok(format!("ready (pid {})", process.pid)),
        Ok((_, body)) => Err(body),
        Err(error) => Err(format!("{address}: {error}")),
    };
    CheckView::new(&process.name, result, &format!("its log: {}", process.log.display()))
}

async fn coordinator(target: &Target) -> Vec<CheckView> {
    let status = match cluster::fetch_status(target).await {
        Ok(status) => status,
        Err(failure) => {
            let hint = "start the coordinator, or name it with --coordinator";
            return vec![CheckView::new("coordinator", Err(failure.to_string()), hint)];
        }
    };
    let answered = format!("site {}, {} alive", status.site, status.coordinators.len());
    let bus = if status.message_bus_connected { Ok("connected".to_owned()) } else { Err("down".to_owned()) };
    let parked = match status.duties.parked {
        0 => Ok("none parked".to_owned()),
        parked => Err(format!("{parked} parked")),
    };
    let mirrors: i64 = status.sites.iter().map(|site| site.mirrors_failed).sum();
    let mirrors =
        if mirrors == 0 { Ok("none failed".to_owned()) } else { Err(format!("{mirrors} cannot be synced")) };
    vec![
        CheckView::new("coordinator and database", Ok(answered), ""),
        CheckView::new("message bus", bus, "is nats-server running, and does nats_url name it?"),
        CheckView::new(
            "duties",
            parked,
            "see why: tabularium duties list --state parked; then: duties retry ID",
        ),
        CheckView::new("mirrors", mirrors, "see why: tabularium repo show PATH, at the mirror site"),
    ]
}

async fn nodes(target: &Target) -> Vec<CheckView> {
    match cluster::fetch_nodes(target).await {
        Ok(nodes) => nodes
            .into_iter()
            .map(|node| {
                let detail = format!("{} git {}", node.address, node.git_version);
                let problem =
                    if node.problem.is_empty() { "does not serve this storage" } else { &node.problem };
                let result = if node.ok { Ok(detail) } else { Err(format!("{}: {problem}", node.address)) };
                let hint = "is the node running, with a [[storage]] of this name and the same token?";
                CheckView::new(format!("storage {}", node.storage), result, hint)
            })
            .collect(),
        Err(failure) => {
            vec![CheckView::new("storages", Err(failure.to_string()), "the coordinator has to answer first")]
        }
    }
}

async fn routers(target: &Target) -> Vec<CheckView> {
    if target.routers().is_empty() {
        let problem = Err("no router is known".to_owned());
        return vec![CheckView::new("router", problem, "name one with --router")];
    }
    join_all(target.routers().iter().map(async |address| {
        let mut router = ServerServiceClient::new(target.router_channel(address));
        let result = match router.server_info(request(ServerInfoRequest {})).await {
            Ok(answer) => Ok(match answer.into_inner().storage_statuses.len() {
                1 => "1 virtual storage".to_owned(),
                count => format!("{count} virtual storages"),
            }),
            Err(status) => Err(Failure::of_status("server info", "the router", &status).to_string()),
        };
        CheckView::new(
            format!("router {address}"),
            result,
            "is it running, and is the token file the router's?",
        )
    }))
    .await
}

fn without_path(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + "://".len());
    url[host..].find('/').map_or(url, |length| &url[..host + length])
}

/// Any HTTP answer will do: the gateway decides itself who may see what.
async fn gateway(url: &str) -> CheckView {
    let result = match http::get(without_path(url), "/").await {
        Ok(_) => Ok("answers".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    CheckView::new(format!("gateway {url}"), result, "is it running, and does --gateway name it?")
}
