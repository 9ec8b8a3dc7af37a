//! Whom a command asks: what the command line names, else the local cluster of the state directory.

use std::{path::Path, time::Duration};

use secrecy::SecretString;
use tabularium_common::{
    auth::SendToken,
    config::SecretFile,
    grpc::{Address, channel},
    tls::{self, TlsConfig},
};
use tabularium_proto::{
    coordinator::{
        import_service_client::ImportServiceClient, operator_service_client::OperatorServiceClient,
        rebuild_service_client::RebuildServiceClient, repair_service_client::RepairServiceClient,
        storage_service_client::StorageServiceClient,
    },
    gitaly::repository_service_client::RepositoryServiceClient,
};
use tonic::{service::interceptor::InterceptedService, transport::Channel};

use crate::{
    arguments::Global,
    failure::Failure,
    local::{
        record::{ClusterRecord, SiteRecord},
        service::Kind,
    },
};

/// How long any call of this program may take.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// A channel that signs its calls.
pub(crate) type Signed = InterceptedService<Channel, SendToken>;

/// Addresses and secrets, resolved.
pub(crate) struct Target {
    coordinators: Vec<Address>,
    coordinator_token: Option<SecretString>,
    routers: Vec<Address>,
    router_token: Option<SecretString>,
    /// Base URLs.
    pub(crate) gateways: Vec<String>,
    /// The site of the local cluster, when there is one.
    pub(crate) site: Option<SiteRecord>,
    state: String,
}

impl Target {
    /// From the command line and, for what it does not say, `cluster.json`.
    pub(crate) fn resolve(global: &Global) -> Result<Self, Failure> {
        let record = ClusterRecord::read(&global.state_dir).map_err(|error| {
            Failure::Internal(format!("cannot read cluster.json in {}: {error}", global.state_dir.display()))
        })?;
        trust(global, record.as_ref())?;
        let site = match &record {
            Some(record) => Some(record.site(&global.site).cloned().ok_or_else(|| {
                let names: Vec<_> = record.sites.iter().map(|site| site.name.as_str()).collect();
                Failure::Usage(format!("no site `{}`; the cluster has: {}", global.site, names.join(", ")))
            })?),
            None => None,
        };
        Self::from_parts(global, site)
    }

    pub(crate) fn from_parts(global: &Global, site: Option<SiteRecord>) -> Result<Self, Failure> {
        let (coordinators, coordinator_token) = choose(
            &global.coordinator,
            global.coordinator_token_file.as_deref(),
            site.as_ref().map(|site| (site.grpc(Kind::Coordinator), site.coordinator_token_file.as_path())),
        )?;
        let (routers, router_token) = choose(
            &global.router,
            global.router_token_file.as_deref(),
            site.as_ref().map(|site| (site.grpc(Kind::Router), site.router_token_file.as_path())),
        )?;
        let gateways = match &global.gateway {
            Some(url) => vec![url.trim_end_matches('/').to_owned()],
            None => site.as_ref().map(|site| site.urls(Kind::Gateway)).unwrap_or_default(),
        };
        let state = global.state_dir.display().to_string();
        Ok(Self { coordinators, coordinator_token, routers, router_token, gateways, site, state })
    }

    /// The coordinator that answers first, with its address.
    pub(crate) async fn operator(&self) -> Result<(OperatorServiceClient<Signed>, String), Failure> {
        let (signed, whom) = self.coordinator().await?;
        Ok((OperatorServiceClient::new(signed), whom))
    }

    /// As [`Self::operator`], for storages.
    pub(crate) async fn storages(&self) -> Result<(StorageServiceClient<Signed>, String), Failure> {
        let (signed, whom) = self.coordinator().await?;
        Ok((StorageServiceClient::new(signed), whom))
    }

    /// As [`Self::operator`], for replicas.
    pub(crate) async fn repair(&self) -> Result<(RepairServiceClient<Signed>, String), Failure> {
        let (signed, whom) = self.coordinator().await?;
        Ok((RepairServiceClient::new(signed), whom))
    }

    /// As [`Self::operator`], for what Praefect has recorded.
    pub(crate) async fn imports(&self) -> Result<(ImportServiceClient<Signed>, String), Failure> {
        let (signed, whom) = self.coordinator().await?;
        Ok((ImportServiceClient::new(signed), whom))
    }

    /// As [`Self::operator`], for a lost database.
    pub(crate) async fn rebuild(&self) -> Result<(RebuildServiceClient<Signed>, String), Failure> {
        let (signed, whom) = self.coordinator().await?;
        Ok((RebuildServiceClient::new(signed), whom))
    }

    async fn coordinator(&self) -> Result<(Signed, String), Failure> {
        let address = self.first_that_listens("coordinator", &self.coordinators).await?;
        let signed = InterceptedService::new(channel(address), SendToken(self.coordinator_token.clone()));
        Ok((signed, format!("coordinator {address}")))
    }

    /// The router that answers first, with its address.
    pub(crate) async fn repositories(&self) -> Result<(RepositoryServiceClient<Signed>, String), Failure> {
        let address = self.first_that_listens("router", &self.routers).await?;
        Ok((RepositoryServiceClient::new(self.router_channel(address)), format!("router {address}")))
    }

    pub(crate) fn routers(&self) -> &[Address] {
        &self.routers
    }

    pub(crate) fn router_channel(&self, address: &Address) -> Signed {
        InterceptedService::new(channel(address), SendToken(self.router_token.clone()))
    }

    async fn first_that_listens<'a>(
        &self,
        what: &str,
        addresses: &'a [Address],
    ) -> Result<&'a Address, Failure> {
        let mut tried = Vec::new();
        for address in addresses {
            match address.connect().await {
                Ok(_) => return Ok(address),
                Err(error) => tried.push(format!("{address} ({error})")),
            }
        }
        Err(Failure::Unreachable(if tried.is_empty() {
            format!(
                "no {what} is known: name one with --{what}, or start a cluster with `tabularium up` (none runs in {})",
                self.state
            )
        } else {
            format!("no {what} answers at {}; is the cluster running?", tried.join(", "))
        }))
    }
}

/// Whom this process believes at `tls://` addresses: what the command line names, else what the local cluster needs.
fn trust(global: &Global, record: Option<&ClusterRecord>) -> Result<(), Failure> {
    let given = TlsConfig {
        certificate_path: global.tls_certificate.clone(),
        key_path: global.tls_key.clone(),
        client_ca_path: None,
        ca_path: global.tls_ca.clone(),
    };
    let cluster = record.and_then(|record| record.tls.as_ref());
    match cluster {
        Some(files) if given == TlsConfig::NONE => tls::install(&files.config()),
        _ => tls::install(&given),
    }
    let faults: Vec<_> = given.faults([]).iter().map(ToString::to_string).collect();
    if faults.is_empty() { Ok(()) } else { Err(Failure::Usage(faults.join("; "))) }
}

type Chosen = (Vec<Address>, Option<SecretString>);

/// Addresses given on the command line come with the secret given there; the cluster's own come with the cluster's.
fn choose(
    given: &[Address],
    token_file: Option<&Path>,
    local: Option<(Vec<String>, &Path)>,
) -> Result<Chosen, Failure> {
    let (addresses, file) = match local {
        Some((addresses, file)) if given.is_empty() => {
            let addresses = addresses.iter().map(|address| address.parse());
            let addresses = addresses.collect::<Result<_, _>>();
            let addresses = addresses.map_err(|error| Failure::Internal(format!("cluster.json: {error}")))?;
            (addresses, Some(token_file.unwrap_or(file)))
        }
        _ => (given.to_vec(), token_file),
    };
    let token = file.map(|file| SecretFile(file.to_owned()).read()).transpose();
    Ok((addresses, token.map_err(|error| Failure::Usage(error.to_string()))?))
}
