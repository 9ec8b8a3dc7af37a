//! `status`, `duties` and `dial-nodes`: what a coordinator knows.

use std::process::ExitCode;

use serde_json::json;
use tabularium_proto::coordinator::{
    DialNodesRequest, GetStatusRequest, ListDutiesRequest, RetryDutyRequest,
};

use super::{request, yes_or_no};
use crate::{
    failure::Failure,
    output,
    target::Target,
    views::{DutyView, NodeView, StatusView},
};

pub(crate) async fn status(target: &Target, json: bool) -> Result<ExitCode, Failure> {
    let view = fetch_status(target).await?;
    output::print(json, &view, output::status)?;
    Ok(yes_or_no(view.healthy))
}

pub(super) async fn fetch_status(target: &Target) -> Result<StatusView, Failure> {
    let (mut operator, whom) = target.operator().await?;
    let status = operator.get_status(request(GetStatusRequest {})).await;
    Ok(status.map_err(|status| Failure::of_status("status", &whom, &status))?.into_inner().into())
}

pub(crate) async fn duties(
    target: &Target,
    state: String,
    limit: u32,
    json: bool,
) -> Result<ExitCode, Failure> {
    let (mut operator, whom) = target.operator().await?;
    let answer = operator.list_duties(request(ListDutiesRequest { state, limit })).await;
    let answer = answer.map_err(|status| Failure::of_status("duties", &whom, &status))?;
    let duties: Vec<DutyView> = answer.into_inner().duties.into_iter().map(Into::into).collect();
    output::print(json, &duties, output::duties)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn retry(target: &Target, duty_id: String, json: bool) -> Result<ExitCode, Failure> {
    let (mut operator, whom) = target.operator().await?;
    let asked = operator.retry_duty(request(RetryDutyRequest { duty_id: duty_id.clone() })).await;
    asked.map_err(|status| Failure::of_status("retrying the duty", &whom, &status))?;
    output::print(json, &json!({ "duty_id": duty_id, "retried": true }), |_| {
        format!("duty {duty_id} is back at work")
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn dial_nodes(target: &Target, json: bool) -> Result<ExitCode, Failure> {
    let nodes = fetch_nodes(target).await?;
    output::print(json, &nodes, output::nodes)?;
    Ok(yes_or_no(nodes.iter().all(|node| node.ok)))
}

pub(super) async fn fetch_nodes(target: &Target) -> Result<Vec<NodeView>, Failure> {
    let (mut operator, whom) = target.operator().await?;
    let answer = operator.dial_nodes(request(DialNodesRequest {})).await;
    let answer = answer.map_err(|status| Failure::of_status("dialling the nodes", &whom, &status))?;
    Ok(answer.into_inner().nodes.into_iter().map(Into::into).collect())
}
