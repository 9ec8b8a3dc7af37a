//! The coordinator's services for operators, as far as the router asks them. A page holds one repository.

use tabularium_proto::coordinator::{
    AcceptDataLossRequest, AcceptDataLossResponse, DataLossRequest, DataLossResponse, GetReplicasRequest,
    GetReplicasResponse, ListRepositoriesRequest, ListRepositoriesResponse, MarkUnverifiedRequest,
    MarkUnverifiedResponse, ReplicaDetails, RepositoryDetails, RepositoryReplicas, Route,
    SetReplicationFactorRequest, SetReplicationFactorResponse, get_replicas_request,
    operator_service_server::OperatorService, repair_service_server::RepairService,
};
use tonic::{Request, Response, Status};

use crate::coordinator::Coordinator;

fn placed(route: &Route) -> RepositoryReplicas {
    let replicas = route.replicas.iter().map(|replica| ReplicaDetails {
        storage: replica.storage.clone(),
        generation: replica.generation,
        up_to_date: replica.generation == route.generation,
        primary: replica.storage == route.primary,
        healthy: replica.storage != "node-3",
        assigned: true,
        verified_at: Some(prost_types::Timestamp { seconds: 77, nanos: 0 }),
        ..ReplicaDetails::default()
    });
    RepositoryReplicas {
        name: route.name.clone(),
        repository_id: route.repository_id,
        replica_path: route.replica_path.clone(),
        primary: route.primary.clone(),
        generation: route.generation,
        epoch: route.epoch,
        unavailable: route.replicas.iter().all(|replica| replica.generation != route.generation),
        replicas: replicas.collect(),
        ..RepositoryReplicas::default()
    }
}

impl Coordinator {
    fn find(&self, wanted: impl Fn(&Route) -> bool) -> Result<RepositoryReplicas, Status> {
        let state = self.state();
        let found = state.routes.values().find(|route| wanted(route)).map(placed);
        found.ok_or_else(|| Status::not_found("repository not found"))
    }

    fn of_name(
        &self,
        name: Option<&tabularium_proto::coordinator::RepositoryName>,
    ) -> Result<RepositoryReplicas, Status> {
        self.find(|route| route.name.as_ref() == name)
    }

    /// The place of a page in all that are wanted, by name, and the token of the next.
    fn page(&self, token: &str, wanted: impl Fn(&Route) -> bool) -> (Option<Route>, String) {
        let place: usize = if token.is_empty() { 0 } else { token.parse().unwrap() };
        let state = self.state();
        let mut routes: Vec<_> = state.routes.values().filter(|route| wanted(route)).cloned().collect();
        routes.sort_by_key(|route| route.repository_id);
        let next = if place + 1 < routes.len() { (place + 1).to_string() } else { String::new() };
        (routes.into_iter().nth(place), next)
    }

    fn heard(&self, what: String) {
        self.state().operators.push(what);
    }
}

#[tonic::async_trait]
impl RepairService for Coordinator {
    async fn get_replicas(
        &self,
        request: Request<GetReplicasRequest>,
    ) -> Result<Response<GetReplicasResponse>, Status> {
        let repository = match request.into_inner().repository.unwrap() {
            get_replicas_request::Repository::Name(name) => self.of_name(Some(&name))?,
            get_replicas_request::Repository::RepositoryId(id) => {
                self.find(|route| route.repository_id == id)?
            }
        };
        Ok(Response::new(GetReplicasResponse { repository: Some(repository) }))
    }

    async fn data_loss(
        &self,
        request: Request<DataLossRequest>,
    ) -> Result<Response<DataLossResponse>, Status> {
        let request = request.into_inner();
        let (route, next_page_token) = self.page(&request.page_token, |route| {
            let placed = placed(route);
            let behind = placed.replicas.iter().any(|replica| !replica.up_to_date);
            placed.unavailable || (behind && !request.only_unavailable)
        });
        let repositories = route.iter().map(placed).collect();
        Ok(Response::new(DataLossResponse { repositories, next_page_token }))
    }

    async fn accept_data_loss(
        &self,
        request: Request<AcceptDataLossRequest>,
    ) -> Result<Response<AcceptDataLossResponse>, Status> {
        let request = request.into_inner();
        let repository = self.of_name(request.name.as_ref())?;
        self.heard(format!("accept {} {}", repository.repository_id, request.authoritative_storage));
        Ok(Response::new(AcceptDataLossResponse { repository: Some(repository) }))
    }

    async fn mark_unverified(
        &self,
        request: Request<MarkUnverifiedRequest>,
    ) -> Result<Response<MarkUnverifiedResponse>, Status> {
        let request = request.into_inner();
        let replicas = match (request.name, request.storage) {
            (Some(name), None) => {
                let placed = self.of_name(Some(&name))?;
                self.heard(format!("mark {}", placed.repository_id));
                placed.replicas.len()
            }
            (None, Some(place)) if place.storage == "nowhere" => {
                return Err(Status::not_found("there is no storage `nowhere`"));
            }
            (None, Some(place)) => {
                self.heard(format!("mark {}/{}", place.virtual_storage, place.storage));
                9
            }
            other => panic!("{other:?}"),
        };
        Ok(Response::new(MarkUnverifiedResponse { replicas: i64::try_from(replicas).unwrap() }))
    }

    async fn set_replication_factor(
        &self,
        request: Request<SetReplicationFactorRequest>,
    ) -> Result<Response<SetReplicationFactorResponse>, Status> {
        let request = request.into_inner();
        let mut repository = self.of_name(request.name.as_ref())?;
        for replica in repository.replicas.iter_mut().skip(request.replication_factor as usize) {
            replica.assigned = false;
        }
        repository.replicas.reverse();
        Ok(Response::new(SetReplicationFactorResponse { repository: Some(repository) }))
    }
}

#[tonic::async_trait]
impl OperatorService for Coordinator {
    async fn list_repositories(
        &self,
        request: Request<ListRepositoriesRequest>,
    ) -> Result<Response<ListRepositoriesResponse>, Status> {
        let request = request.into_inner();
        if request.virtual_storage != "default" {
            return Err(Status::invalid_argument("virtual storage does not exist"));
        }
        let (route, next_page_token) = self.page(&request.page_token, |_| true);
        let repositories = route
            .into_iter()
            .map(|route| RepositoryDetails { route: Some(route), ..RepositoryDetails::default() });
        let repositories = repositories.collect();
        Ok(Response::new(ListRepositoriesResponse { repositories, next_page_token }))
    }
}
