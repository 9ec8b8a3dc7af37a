//! Making a lost database anew, as an operator asks for it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use tabularium_common::ids::VirtualStorageName;
use tabularium_proto::{
    coordinator::{
        self as wire, RebuildFinding, RebuildFindingKind as Kind, RebuildSum, rebuild_response::Message,
        rebuild_service_server::RebuildService,
    },
    node::{ListRecordsRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{
    app::Shared,
    db::{assignments, outbox, rebuild as db},
    rebuild::{self, Found, Merged, Rebuilt},
    topology::KnownStorage,
};

/// Messages ahead of the caller.
const AHEAD: usize = 64;
/// Repositories written with one statement.
const BATCH: usize = 500;
/// How long one statement may take: indexes of a large database grow meanwhile.
const STATEMENT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a node may be silent while it walks its storage.
const SILENCE: Duration = Duration::from_secs(60);
/// Copies owed with one statement.
const COPIES: u32 = 1000;

pub(crate) struct Rebuilds(pub(crate) Arc<Shared>);

type Answers = mpsc::Sender<Result<wire::RebuildResponse, Status>>;

/// Every repository of one storage, with its record.
async fn read_storage(
    shared: &Shared,
    virtual_storage: &VirtualStorageName,
    known: &KnownStorage,
) -> Result<Vec<Found>, Status> {
    let silent = |_| Status::deadline_exceeded("the node says nothing");
    let request = ListRecordsRequest { storage_name: known.name.to_string() };
    let mut node = ReplicaServiceClient::new(shared.inspector.channel(&known.address));
    let mut listed = timeout(SILENCE, node.list_records(request)).await.map_err(silent)??.into_inner();
    let mut found = Vec::new();
    while let Some(next) = timeout(SILENCE, listed.message()).await.map_err(silent)?? {
        found.push(Found {
            virtual_storage: virtual_storage.clone(),
            storage: known.name.clone(),
            replica_path: next.replica_path,
            record: next.record,
        });
    }
    Ok(found)
}

/// All storages at once. The sum of what they hold has to fit into memory, a few hundred bytes for each replica.
async fn read_all(shared: &Shared, without_unreachable: bool) -> Result<(Merged, i64), Status> {
    let topology = shared.topology.get();
    let asked = topology.storages().map(|(virtual_storage, known)| async move {
        (virtual_storage, known, read_storage(shared, virtual_storage, known).await)
    });
    let (mut found, mut unreadable, mut read) = (Vec::new(), Vec::new(), 0);
    let mut storages: BTreeMap<VirtualStorageName, usize> = BTreeMap::new();
    for (virtual_storage, known, listed) in join_all(asked).await {
        *storages.entry(virtual_storage.clone()).or_default() += 1;
        match listed {
            Ok(listed) => {
                read += 1;
                found.extend(listed);
            }
            Err(status) if without_unreachable => unreadable.push(RebuildFinding {
                kind: Kind::Unreadable.into(),
                virtual_storage: virtual_storage.to_string(),
                storage: known.name.to_string(),
                what: status.message().to_owned(),
                ..RebuildFinding::default()
            }),
            Err(status) => {
                let text = format!(
                    "storage `{}` cannot be read ({}), and may have what no other has",
                    known.name,
                    status.message()
                );
                return Err(Status::failed_precondition(text));
            }
        }
    }
    let mut merged = rebuild::merge(found, &storages);
    merged.findings.splice(0..0, unreadable);
    Ok((merged, read))
}

fn not_empty() -> Status {
    Status::failed_precondition("the database has repositories already: it was not lost")
}

impl Rebuilds {
    async fn run(&self, request: &wire::RebuildRequest, answers: &Answers) -> Result<(), Status> {
        let database = &self.0.db;
        let empty = database.retrying(|| db::rebuild_is_empty(database.pool())).await?;
        if !empty && !request.add_missing {
            return Err(not_empty());
        }
        let (merged, storages) = read_all(&self.0, request.without_unreachable).await?;
        let Merged { mut repositories, mut findings, last_id } = merged;
        if !empty {
            self.leave_out_present(&mut repositories, &mut findings).await?;
        }
        let written = if request.dry_run {
            last_id
        } else {
            self.write(&repositories, last_id, request.add_missing).await?
        };
        for finding in findings {
            let message = Some(Message::Finding(finding));
            if answers.send(Ok(wire::RebuildResponse { message })).await.is_err() {
                return Ok(());
            }
        }
        let count = |of: &dyn Fn(&Rebuilt) -> usize| {
            i64::try_from(repositories.iter().map(of).sum::<usize>()).unwrap_or(i64::MAX)
        };
        let sum = RebuildSum {
            repositories: count(&|_| 1),
            replicas: count(&|rebuilt| rebuilt.replicas.len()),
            replicas_behind: count(&Rebuilt::behind),
            storages,
            last_repository_id: written,
        };
        // If it cannot be told, nobody listens any more.
        let _ = answers.send(Ok(wire::RebuildResponse { message: Some(Message::Sum(sum)) })).await;
        Ok(())
    }

    async fn leave_out_present(
        &self,
        repositories: &mut Vec<Rebuilt>,
        findings: &mut Vec<RebuildFinding>,
    ) -> Result<(), Status> {
        let database = &self.0.db;
        let mut present = std::collections::HashSet::new();
        for batch in repositories.chunks(BATCH) {
            present.extend(database.retrying(|| db::rebuild_list_present(database.pool(), batch)).await?);
        }
        let (left_out, kept) =
            std::mem::take(repositories).into_iter().partition(|rebuilt| present.contains(&rebuilt.id.0));
        *repositories = kept;
        let left_out: Vec<Rebuilt> = left_out;
        findings.extend(left_out.into_iter().map(|rebuilt| RebuildFinding {
            kind: Kind::Present.into(),
            virtual_storage: rebuilt.key.virtual_storage.to_string(),
            relative_path: rebuilt.key.relative_path.to_string(),
            repository_id: rebuilt.id.0,
            storage: String::new(),
            replica_path: rebuilt.replica_path.to_string(),
            what: "the database has it, or its name".to_owned(),
        }));
        Ok(())
    }

    /// All or nothing. Answers the id above which new ones are given.
    async fn write(&self, repositories: &[Rebuilt], last_id: i64, add_missing: bool) -> Result<i64, Status> {
        let database = &self.0.db;
        let fill = || async {
            let mut transaction = database.begin().await?;
            db::rebuild_lock_in_txn(&mut transaction, STATEMENT_PATIENCE).await?;
            if !add_missing && !db::rebuild_is_empty(&mut *transaction).await? {
                return Ok(None);
            }
            for batch in repositories.chunks(BATCH) {
                let written = db::rebuild_insert_in_txn(&mut transaction, batch).await?;
                if written.len() < batch.len() {
                    // Somebody made one of that name meanwhile.
                    return Ok(None);
                }
            }
            let last = db::rebuild_raise_ids_in_txn(&mut transaction, last_id).await?;
            transaction.commit().await?;
            Ok(Some(last))
        };
        let last = database.retrying(fill).await?.ok_or_else(not_empty)?;
        while database.retrying(|| outbox::duty_owe_behind(database.pool(), COPIES)).await? > 0 {}
        for virtual_storage in repositories
            .iter()
            .map(|rebuilt| &rebuilt.key.virtual_storage)
            .collect::<std::collections::BTreeSet<_>>()
        {
            // Replicas that no disk has are made as well.
            database.retrying(|| assignments::cursor_reset(database.pool(), virtual_storage)).await?;
        }
        self.0.repository_ids.forget();
        self.0.bell.notify_one();
        tracing::warn!(
            repositories = repositories.len(),
            last_id = last,
            "the database was made anew from the nodes"
        );
        Ok(last)
    }
}

#[tonic::async_trait]
impl RebuildService for Rebuilds {
    async fn rebuild(
        &self,
        request: Request<wire::RebuildRequest>,
    ) -> Result<Response<BoxStream<wire::RebuildResponse>>, Status> {
        let request = request.into_inner();
        let (answers, receiver) = mpsc::channel(AHEAD);
        let rebuilds = Self(Arc::clone(&self.0));
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("rebuild", async move {
            tokio::select! {
                done = rebuilds.run(&request, &answers) => if let Err(status) = done {
                    let _ = answers.send(Err(status)).await;
                },
                () = stopping.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
