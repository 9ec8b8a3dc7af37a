//! What nodes are told to keep beside their replicas, where no vote tells them: that a write was settled, and that a copy
//! is good. By their records replicas are told apart while the database cannot be asked (`docs/guarantees.md`).
//!
//! Of equal generations the record of a settlement is newer than what the nodes had noted of the write, and what the
//! database says of a copy is newer than either: the copy has all of the generation, whoever else has only parts.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tabularium_common::ids::{Generation, StorageName};
use tabularium_proto::{
    gitaly,
    node::{
        ReadRecordRequest, ReplicaRecord, WriteRecordRequest, replica_service_client::ReplicaServiceClient,
    },
};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::{
    app::Shared,
    db::{ended_writes::LOOK_AGAIN, repositories, writes::OpenWrite},
    error::WriteError,
    inspection::Inspection,
    repository::Repository,
    settlement::{self, Settlement},
};

/// How long a node may take to write a record.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often other holders are looked for when some of them cannot write theirs.
const SETTLEMENT_ROUNDS: u64 = 8;
/// Settlement of a record that the database vouches for.
const VOUCHED: u64 = u64::MAX;

fn record(repository: &Repository, generation: Generation) -> ReplicaRecord {
    ReplicaRecord {
        repository_id: repository.id.0,
        virtual_storage: repository.key.virtual_storage.to_string(),
        relative_path: repository.key.relative_path.to_string(),
        generation: generation.0,
        epoch: repository.epoch.0,
        complete: true,
        ..ReplicaRecord::default()
    }
}

fn place(repository: &Repository, storage: &StorageName) -> gitaly::Repository {
    gitaly::Repository {
        storage_name: storage.to_string(),
        relative_path: repository.replica_path.to_string(),
        ..gitaly::Repository::default()
    }
}

/// Has a node write a record, unless it has a newer one or keeps none.
async fn write(
    shared: &Shared,
    repository: &Repository,
    storage: &StorageName,
    record: ReplicaRecord,
    copy_attempt: i64,
) -> Result<(), Status> {
    let topology = shared.topology.get();
    let unknown = || Status::not_found("the storage has no address");
    let address = topology.address(&repository.key.virtual_storage, storage).ok_or_else(unknown)?;
    let request = WriteRecordRequest {
        repository: Some(place(repository, storage)),
        record: Some(record),
        copy_attempt,
    };
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(address));
    match timeout(PATIENCE, client.write_record(request)).await {
        // Something newer is there already, or the node keeps no records.
        Ok(Err(status)) if matches!(status.code(), Code::Unimplemented | Code::FailedPrecondition) => Ok(()),
        Ok(written) => written.map(drop),
        Err(_) => Err(Status::deadline_exceeded("the node did not answer in time")),
    }
}

/// What a node keeps beside a replica.
async fn read(
    shared: &Shared,
    repository: &Repository,
    storage: &StorageName,
) -> Result<Option<ReplicaRecord>, Status> {
    let topology = shared.topology.get();
    let unknown = || Status::not_found("the storage has no address");
    let address = topology.address(&repository.key.virtual_storage, storage).ok_or_else(unknown)?;
    let request = ReadRecordRequest { repository: Some(place(repository, storage)) };
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(address));
    match timeout(PATIENCE, client.read_record(request)).await {
        Ok(Err(status)) if status.code() == Code::Unimplemented => Ok(None),
        Ok(answer) => Ok(answer?.into_inner().record),
        Err(_) => Err(Status::deadline_exceeded("the node did not answer in time")),
    }
}

/// Has those that are to hold what a write in doubt is settled to write so, before it is settled. What a node that cannot
/// do so holds does not count.
pub(crate) async fn note_settlement(
    shared: &Shared,
    open: &OpenWrite,
    inspection: &mut Inspection,
) -> Result<(), WriteError> {
    let db = &shared.db;
    let found = db.retrying(|| repositories::repository_read(db.pool(), open.repository_id)).await?;
    let Some(repository) = found else { return Ok(()) };
    for round in 0..SETTLEMENT_ROUNDS {
        let settled = settlement::settle(&repository, &open.participants, &inspection.answers);
        let Settlement::Keep { holders } = settled else { return Ok(()) };
        if open.method == LOOK_AGAIN && repository.up_to_date().all(|storage| holders.contains(storage)) {
            // Nobody had written, and no generation follows.
            return Ok(());
        }
        let record = ReplicaRecord {
            write_id: open.id.to_string(),
            settlement: open.settling.unsigned_abs() + round,
            ..record(&repository, repository.generation.next())
        };
        let written =
            join_all(holders.iter().map(async |storage| {
                (storage, write(shared, &repository, storage, record.clone(), 0).await)
            }));
        let mut all = true;
        for (storage, written) in written.await {
            if let Err(status) = written {
                tracing::warn!(
                    repository_id = %repository.id,
                    %storage,
                    error = status.message(),
                    "a replica's record of a settled write is not written; the replica is made again"
                );
                inspection.answers.remove(storage);
                all = false;
            }
        }
        if all {
            return Ok(());
        }
    }
    // Nobody is left who could say what counts.
    inspection.answers.clear();
    Ok(())
}

/// Has the nodes write that a repository has another name. One that cannot be reached learns it with the next write.
pub(crate) async fn note_rename(shared: &Shared, repository: &Repository) {
    let noting = repository.replicas.iter().map(async |replica| {
        let known = read(shared, repository, &replica.storage).await?;
        let Some(known) = known.filter(|known| known.repository_id == repository.id.0) else {
            return Ok(());
        };
        let renamed = ReplicaRecord { relative_path: repository.key.relative_path.to_string(), ..known };
        write(shared, repository, &replica.storage, renamed, 0).await
    });
    for (replica, noted) in repository.replicas.iter().zip(join_all(noting).await) {
        if let Err(status) = noted {
            let (repository_id, storage) = (repository.id, &replica.storage);
            tracing::info!(%repository_id, %storage, error = status.message(), "a replica's record keeps the old name");
        }
    }
}

/// A replica of which the database knows that it has all of a generation.
pub(crate) struct Vouched {
    pub(crate) repository: Repository,
    pub(crate) target: StorageName,
    pub(crate) generation: Generation,
    /// The copy that made it; 0: none did.
    pub(crate) attempt: i64,
}

/// Has a node write that its replica holds a generation, in the background. Until it has, the replica does not count where
/// records do; its next write makes up for it.
pub(crate) fn note_vouched(shared: &Arc<Shared>, vouched: Vouched) {
    let noting = {
        let shared = Arc::clone(shared);
        async move {
            let (repository_id, storage) = (vouched.repository.id, vouched.target.clone());
            if let Err(status) = vouch(&shared, &vouched).await {
                tracing::info!(%repository_id, %storage, error = status.message(), "a replica's record is not written");
            }
        }
    };
    shared.tasks.spawn("replica-record", noting);
}

/// The same, and waits for it.
pub(crate) async fn vouch(shared: &Shared, vouched: &Vouched) -> Result<(), Status> {
    let Vouched { repository, target, generation, attempt } = vouched;
    let record = ReplicaRecord { settlement: VOUCHED, ..record(repository, *generation) };
    write(shared, repository, target, record, *attempt).await
}
