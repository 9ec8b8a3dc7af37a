//! Taking over from Praefect, as an operator asks for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use tabularium_common::ids::VirtualStorageName;
use tabularium_proto::coordinator::{
    self as wire, ImportFinding, ImportProgress, ImportSum, import_praefect_response::Message,
    import_service_server::ImportService,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{
    app::{Shared, database},
    db::{assignments, imports, outbox, praefect::Praefect, rebuild as db, repositories},
    error::WriteError,
    import::{self, Imported, Judged, Known},
    rebuild::Rebuilt,
};

/// Messages ahead of the caller.
const AHEAD: usize = 64;
/// Repositories read or written with one statement.
const BATCH: usize = 500;
/// How long one statement may take: indexes of a large database grow meanwhile.
const STATEMENT_PATIENCE: Duration = Duration::from_secs(60);
/// Copies owed with one statement.
const COPIES: u32 = 1000;

pub(crate) struct Imports(pub(crate) Arc<Shared>);

type Answers = mpsc::Sender<Result<wire::ImportPraefectResponse, Status>>;

fn answer(message: Message) -> wire::ImportPraefectResponse {
    wire::ImportPraefectResponse { message: Some(message) }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What was read, and judged.
#[derive(Default)]
struct Taken {
    imported: Vec<Imported>,
    findings: Vec<ImportFinding>,
    left_out: usize,
    last_id: i64,
}

impl Imports {
    /// What rows are judged by.
    async fn known(&self, praefect: &mut Praefect) -> Result<BTreeMap<VirtualStorageName, Known>, Status> {
        let shard_primaries = praefect.shard_primaries().await.map_err(unread)?;
        let topology = self.0.topology.get();
        let mut known: BTreeMap<VirtualStorageName, Known> = BTreeMap::new();
        for (virtual_storage, storage) in topology.storages() {
            known.entry(virtual_storage.clone()).or_default().storages.insert(storage.name.clone());
        }
        let configured = &self.0.config.virtual_storages;
        for (virtual_storage, known) in &mut known {
            let found = configured.iter().find(|configured| configured.name == *virtual_storage);
            known.default_factor = found.map_or(0, |configured| configured.default_replication_factor);
            known.shard_primary = shard_primaries
                .iter()
                .find(|(shard, _)| shard == virtual_storage.as_str())
                .map(|(_, storage)| storage.clone());
        }
        Ok(known)
    }

    /// Reads all of it. What is taken has to fit into memory, a few hundred bytes for each replica.
    async fn read(&self, praefect: &mut Praefect, answers: &Answers) -> Result<Taken, Status> {
        let known = self.known(praefect).await?;
        let repositories = praefect.count().await.map_err(unread)?;
        let mut taken = Taken { last_id: praefect.last_id().await.map_err(unread)?, ..Taken::default() };
        let (mut read, mut after) = (0, i64::MIN);
        loop {
            let rows = praefect.page(after, BATCH).await.map_err(unread)?;
            let Some(last) = rows.last() else { return Ok(taken) };
            after = last.repository_id;
            read += count(rows.len());
            for row in &rows {
                let Judged { imported, findings } = import::judge(row, &known);
                taken.left_out += usize::from(imported.is_none());
                taken.imported.extend(imported);
                taken.findings.extend(findings);
            }
            let progress = ImportProgress { read, repositories: repositories.max(read) };
            if answers.send(Ok(answer(Message::Progress(progress)))).await.is_err() {
                return Err(Status::cancelled("nobody listens any more"));
            }
        }
    }

    /// Takes out what is recorded here already: of the same id and name as what was read, and of another one.
    async fn set_apart_known(&self, taken: &mut Taken) -> Result<usize, Status> {
        let database = &self.0.db;
        let mut present = HashSet::new();
        for batch in taken.imported.chunks(BATCH) {
            let batch: Vec<Rebuilt> = batch.iter().map(|one| one.rebuilt.clone()).collect();
            present.extend(database.retrying(|| db::rebuild_list_present(database.pool(), &batch)).await?);
        }
        let all = std::mem::take(&mut taken.imported);
        let (there, new): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|one| present.contains(&one.rebuilt.id.0));
        taken.imported = new;
        let mut before = 0;
        for one in there {
            let Rebuilt { id, key, .. } = &one.rebuilt;
            let same = database
                .retrying(|| repositories::repository_find(database.pool(), *id))
                .await?
                .is_some_and(|found| found.key == *key);
            if same {
                before += 1;
                continue;
            }
            taken.left_out += 1;
            taken.findings.push(ImportFinding {
                repository_id: id.0,
                virtual_storage: key.virtual_storage.to_string(),
                relative_path: key.relative_path.to_string(),
                what: "another repository here has its id, its name or its path".to_owned(),
                left_out: true,
            });
        }
        Ok(before)
    }

    /// All or nothing. Answers the id above which new ones are given.
    async fn write(&self, taken: &Taken) -> Result<i64, Status> {
        let database = &self.0.db;
        let fill = || async {
            let mut transaction = database.begin().await?;
            db::rebuild_lock_in_txn(&mut transaction, STATEMENT_PATIENCE).await?;
            for batch in taken.imported.chunks(BATCH) {
                let rebuilt: Vec<Rebuilt> = batch.iter().map(|one| one.rebuilt.clone()).collect();
                let written = db::rebuild_insert_in_txn(&mut transaction, &rebuilt).await?;
                if written.len() < batch.len() {
                    return Ok(None);
                }
                let batch: Vec<&Imported> = batch.iter().collect();
                imports::import_complete_in_txn(&mut transaction, &batch).await?;
            }
            let last = db::rebuild_raise_ids_in_txn(&mut transaction, taken.last_id).await?;
            transaction.commit().await?;
            Ok(Some(last))
        };
        let last = database.retrying(fill).await?;
        let last = last.ok_or_else(|| {
            Status::aborted(
                "somebody made a repository meanwhile that has the id or the name of one of these",
            )
        })?;
        while database.retrying(|| outbox::duty_owe_behind(database.pool(), COPIES)).await? > 0 {}
        let touched: BTreeSet<_> =
            taken.imported.iter().map(|one| &one.rebuilt.key.virtual_storage).collect();
        for virtual_storage in touched {
            database.retrying(|| assignments::cursor_reset(database.pool(), virtual_storage)).await?;
        }
        self.0.repository_ids.forget();
        self.0.bell.notify_one();
        tracing::warn!(
            repositories = taken.imported.len(),
            last_id = last,
            "Praefect's records were taken over"
        );
        Ok(last)
    }

    async fn run(&self, request: &wire::ImportPraefectRequest, answers: &Answers) -> Result<(), Status> {
        let own = database(&self.0.config).map_err(|error| Status::internal(error.to_string()))?;
        let schema = if request.schema.is_empty() { "public" } else { request.schema.as_str() };
        let url = Some(request.database_url.as_str()).filter(|url| !url.is_empty());
        let mut praefect = Praefect::connect(&own, url, schema)
            .await
            .map_err(|error| Status::failed_precondition(format!("Praefect's database: {error}")))?;
        if !praefect.is_there().await.map_err(unread)? {
            let text = format!("schema `{schema}` of that database does not have Praefect's tables");
            return Err(Status::failed_precondition(text));
        }
        let at_work = praefect.at_work().await.map_err(unread)?;
        if !at_work.is_empty() && !request.dry_run {
            let text = format!("Praefect is at work there ({}): stop it first", at_work.join(", "));
            return Err(Status::failed_precondition(text));
        }
        let mut taken = self.read(&mut praefect, answers).await?;
        let known_before = self.set_apart_known(&mut taken).await?;
        let last_repository_id = if request.dry_run { taken.last_id } else { self.write(&taken).await? };
        let sum_of =
            |of: &dyn Fn(&Rebuilt) -> usize| count(taken.imported.iter().map(|one| of(&one.rebuilt)).sum());
        let sum = ImportSum {
            repositories: count(taken.imported.len()),
            replicas: sum_of(&|rebuilt| rebuilt.replicas.len()),
            replicas_behind: sum_of(&Rebuilt::behind),
            known_before: count(known_before),
            left_out: count(taken.left_out),
            last_repository_id,
        };
        for finding in taken.findings {
            if answers.send(Ok(answer(Message::Finding(finding)))).await.is_err() {
                return Ok(());
            }
        }
        // If it cannot be told, nobody listens any more.
        let _ = answers.send(Ok(answer(Message::Sum(sum)))).await;
        Ok(())
    }
}

fn unread(error: impl std::fmt::Display) -> Status {
    Status::failed_precondition(format!("Praefect's tables cannot be read: {error}"))
}

#[tonic::async_trait]
impl ImportService for Imports {
    async fn import_praefect(
        &self,
        request: Request<wire::ImportPraefectRequest>,
    ) -> Result<Response<BoxStream<wire::ImportPraefectResponse>>, Status> {
        let request = request.into_inner();
        let (answers, receiver) = mpsc::channel(AHEAD);
        let imports = Self(Arc::clone(&self.0));
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("import", async move {
            tokio::select! {
                done = imports.run(&request, &answers) => if let Err(status) = done {
                    // As with the sum.
                    let _ = answers.send(Err(status)).await;
                },
                () = stopping.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn forget_repository(
        &self,
        request: Request<wire::ForgetRepositoryRequest>,
    ) -> Result<Response<wire::ForgetRepositoryResponse>, Status> {
        let key = super::key(request.into_inner().name.as_ref())?;
        let db = &self.0.db;
        let gone = db.retrying(|| imports::repository_forget(db.pool(), &key)).await?;
        let (revoked, row) = gone.ok_or(WriteError::NotFound)?;
        tracing::warn!(repository = %key, "taken out of the records by an operator's word; its files stay");
        self.0.revoke_now(revoked, row).await?;
        Ok(Response::new(wire::ForgetRepositoryResponse {}))
    }
}
