//! Commands that take repositories in, and let them go.

use std::{
    collections::{BTreeMap, HashSet},
    io::BufRead as _,
    path::Path,
    time::Duration,
};

use serde::Deserialize;
use serde_json::json;
use tabularium_common::{auth::SendToken, grpc::channel};
use tabularium_proto::{
    coordinator::{
        ForgetRepositoryRequest, GetReplicasRequest, ListUntrackedRequest, RepositoryName,
        RepositoryReplicas, TrackRepositoryRequest, get_replicas_request::Repository as Wanted,
        import_service_client::ImportServiceClient, repair_service_client::RepairServiceClient,
    },
    gitaly::{
        RemoveRepositoryRequest, Repository, RepositoryExistsRequest,
        repository_service_client::RepositoryServiceClient,
    },
};
use tonic::Code;

use super::{
    Failure, Out,
    client::{DIAL_TIMEOUT, Signed, dial, reach},
    refused,
};
use crate::{
    arguments::{ListUntracked, RemoveRepository, TrackRepositories, TrackRepository},
    file::File,
};

const PREFIX: &str = "attempting to track repository in praefect database";
/// How long copies that somebody waits for may take.
const COPYING: Duration = Duration::from_secs(30 * 60);
/// How often it is looked how far they are.
const LOOK: Duration = Duration::from_millis(200);

type Repair = RepairServiceClient<Signed>;

/// A line of the file that `track-repositories` reads.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Tracked {
    relative_path: String,
    replica_path: String,
    virtual_storage: String,
    authoritative_storage: String,
}

impl Tracked {
    fn name(&self) -> RepositoryName {
        RepositoryName {
            virtual_storage: self.virtual_storage.clone(),
            relative_path: self.relative_path.clone(),
        }
    }

    /// Whether the authoritative storage's node has it.
    async fn exists(&self, file: &File, out: Out<'_>) -> Result<bool, Failure> {
        let known = file.virtual_storages.iter().find(|known| known.name == self.virtual_storage);
        let known = known
            .ok_or_else(|| Failure::Told(format!("virtual storage {:?} not found", self.virtual_storage)))?;
        let node = known.nodes.iter().find(|node| node.storage == self.authoritative_storage);
        let node =
            node.ok_or_else(|| Failure::Told(format!("node {:?} not found", self.authoritative_storage)))?;
        let address =
            node.address.parse().map_err(|error| Failure::Told(format!("{}: {error}", node.address)))?;
        let asked = async {
            reach(&address, DIAL_TIMEOUT).await.map_err(|error| error.to_string())?;
            let token = SendToken(node.token.get().cloned());
            let mut client = RepositoryServiceClient::with_interceptor(channel(&address), token);
            let repository = Repository {
                storage_name: node.storage.clone(),
                relative_path: self.replica_path.clone(),
                ..Repository::default()
            };
            let request = RepositoryExistsRequest { repository: Some(repository) };
            let answer =
                client.repository_exists(request).await.map_err(|status| status.message().to_owned())?;
            Ok::<_, String>(answer.into_inner().exists)
        };
        match asked.await {
            Ok(exists) => Ok(exists),
            Err(error) => {
                let (storage, path) = (&node.storage, &self.replica_path);
                writeln!(out, "checking if repository exists {storage:?}, {path:?}: {error}")?;
                Ok(false)
            }
        }
    }

    async fn track(
        &self,
        file: &File,
        repair: &mut Repair,
        immediately: bool,
        out: Out<'_>,
    ) -> Result<(), Failure> {
        let exists = self.exists(file, out).await.map_err(|failure| match failure {
            Failure::Told(text) => Failure::Told(format!("{PREFIX}: {text}")),
            other => other,
        })?;
        if !exists {
            return Err(Failure::Told(format!("{PREFIX}: authoritative repository does not exist")));
        }
        let request = TrackRepositoryRequest {
            name: Some(self.name()),
            replica_path: self.replica_path.clone(),
            authoritative_storage: self.authoritative_storage.clone(),
        };
        let placement = match repair.track_repository(request).await {
            Ok(answer) => answer.into_inner().repository.unwrap_or_default(),
            Err(status) if status.code() == Code::AlreadyExists => {
                writeln!(out, "repository is already tracked in praefect database")?;
                placement(repair, self.name())
                    .await?
                    .ok_or_else(|| Failure::Told(format!("{PREFIX}: {}", status.message())))?
            }
            Err(status) => return Err(refused(PREFIX)(status)),
        };
        writeln!(out, "Finished adding new repository to be tracked in praefect database.")?;
        let others =
            placement.replicas.iter().filter(|replica| replica.storage != self.authoritative_storage);
        for replica in others {
            let storage = &replica.storage;
            if immediately {
                self.copied(repair, storage).await?;
                writeln!(out, "Finished replicating repository to {storage:?}.")?;
            } else {
                writeln!(out, "Added replication job to replicate repository to {storage:?}.")?;
            }
        }
        Ok(())
    }

    /// Waits until a storage has it.
    async fn copied(&self, repair: &mut Repair, storage: &str) -> Result<(), Failure> {
        let waiting = async {
            loop {
                let found = placement(repair, self.name()).await?.unwrap_or_default();
                if found.replicas.iter().any(|replica| replica.storage == storage && replica.up_to_date) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(COPYING, waiting).await.unwrap_or_else(|_| {
            Err(Failure::Told(format!("{PREFIX}: processing replication event: not on {storage:?} in time")))
        })
    }
}

/// All that is known of a repository.
async fn placement(repair: &mut Repair, name: RepositoryName) -> Result<Option<RepositoryReplicas>, Failure> {
    let request = GetReplicasRequest { repository: Some(Wanted::Name(name)) };
    match repair.get_replicas(request).await {
        Ok(answer) => Ok(answer.into_inner().repository),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// `track-repository`.
pub(super) async fn track(file: &File, which: TrackRepository, out: Out<'_>) -> Result<(), Failure> {
    let tracked = Tracked {
        relative_path: which.repository.relative_path,
        replica_path: which.replica_path,
        virtual_storage: which.repository.virtual_storage,
        authoritative_storage: which.authoritative_storage,
    };
    let mut repair = RepairServiceClient::new(dial(file).await?);
    tracked.track(file, &mut repair, which.replicate_immediately, out).await
}

/// A line that cannot be used.
struct Bad {
    line: usize,
    tracked: Tracked,
    faults: Vec<String>,
}

/// `track-repositories`: nothing is done while any line is at fault.
pub(super) async fn track_several(
    file: &File,
    which: &TrackRepositories,
    out: Out<'_>,
) -> Result<(), Failure> {
    let path = which.input_path.as_path();
    let shown = path.display().to_string();
    let input = std::fs::File::open(path)
        .map_err(|error| Failure::Told(format!("open input: open {shown}: {error}")))?;
    writeln!(out, "Validating repository information in {shown:?}")?;
    let mut repair = RepairServiceClient::new(dial(file).await?);
    let (mut usable, mut bad, mut lines) = (Vec::new(), Vec::new(), BTreeMap::<String, Vec<usize>>::new());
    let mut count = 0;
    for (index, text) in std::io::BufReader::new(input).lines().enumerate() {
        let (line, text) = (index + 1, text?);
        count = line;
        let (tracked, mut faults) = parse(&text);
        if faults.is_empty() {
            let seen = lines.entry(tracked.relative_path.clone()).or_default();
            seen.push(line);
            if seen.len() > 1 {
                // Which lines these are is known at the end.
                faults.push(String::new());
            } else if placement(&mut repair, tracked.name()).await.is_ok_and(|found| found.is_some()) {
                faults.push("repository is already tracked by Praefect".to_owned());
            } else {
                match tracked.exists(file, out).await {
                    Ok(true) => {}
                    Ok(false) => faults.push("not a valid git repository".to_owned()),
                    Err(error @ Failure::Output(_)) => return Err(error),
                    Err(error) => faults.push(format!("checking repository on disk: {error}")),
                }
            }
        }
        if faults.is_empty() { usable.push(tracked) } else { bad.push(Bad { line, tracked, faults }) }
    }
    if !bad.is_empty() {
        show_bad(&bad, &lines, path, out)?;
        return Err(Failure::Told("invalid entries found, aborting".to_owned()));
    }
    if usable.is_empty() {
        return Err(Failure::Told(format!("no repository information found in {shown:?}")));
    }
    writeln!(out, "All repository details are correctly formatted")?;
    writeln!(out, "Tracking {count} repositories in Praefect DB...")?;
    for tracked in usable {
        tracked.track(file, &mut repair, which.replicate_immediately, out).await.map_err(|failure| {
            match failure {
                Failure::Output(_) => failure,
                other => Failure::Told(format!("tracking repository {:?}: {other}", tracked.relative_path)),
            }
        })?;
    }
    Ok(())
}

fn parse(text: &str) -> (Tracked, Vec<String>) {
    let tracked: Tracked = match serde_json::from_str(text) {
        Ok(tracked) => tracked,
        Err(error) => return (Tracked::default(), vec![error.to_string()]),
    };
    let required = [
        ("relative-path", &tracked.relative_path),
        ("replica-path", &tracked.replica_path),
        ("virtual-storage", &tracked.virtual_storage),
        ("authoritative-storage", &tracked.authoritative_storage),
    ];
    let missing = required.iter().filter(|(_, value)| value.is_empty());
    let faults = missing.map(|(name, _)| format!("{name:?} is a required parameter")).collect();
    (tracked, faults)
}

fn show_bad(
    bad: &[Bad],
    lines: &BTreeMap<String, Vec<usize>>,
    path: &Path,
    out: Out<'_>,
) -> std::io::Result<()> {
    writeln!(out, "Found {} invalid request(s) in {:?}:", bad.len(), path.display().to_string())?;
    for Bad { line, tracked, faults } in bad {
        let (relative, replica) = (&tracked.relative_path, &tracked.replica_path);
        writeln!(out, "  line {line}, relative_path: {relative:?}, replica_path: {replica:?}")?;
        for fault in faults {
            if fault.is_empty() {
                let at: Vec<_> = lines.get(relative).into_iter().flatten().map(ToString::to_string).collect();
                writeln!(out, "    duplicate entries for relative_path, line [{}]", at.join(" "))?;
            } else {
                writeln!(out, "    {fault}")?;
            }
        }
    }
    Ok(())
}

/// `list-untracked-repositories`.
pub(super) async fn list_untracked(file: &File, which: &ListUntracked, out: Out<'_>) -> Result<(), Failure> {
    let mut repair = RepairServiceClient::new(dial(file).await?);
    let mut header = true;
    for known in &file.virtual_storages {
        let request = ListUntrackedRequest {
            virtual_storage: known.name.clone(),
            older_than_seconds: u32::try_from(which.older_than.get().as_secs()).unwrap_or(u32::MAX),
        };
        let configured: HashSet<&str> = known.nodes.iter().map(|node| node.storage.as_str()).collect();
        let mut found = repair.list_untracked(request).await?.into_inner();
        while let Some(next) = found.message().await? {
            if !configured.contains(next.storage.as_str()) {
                continue;
            }
            if std::mem::take(&mut header) {
                writeln!(
                    out,
                    "The following repositories were found on disk, but missing from the tracking database:"
                )?;
            }
            let shown = json!({
                "relative_path": next.replica_path,
                "storage": next.storage,
                "virtual_storage": next.virtual_storage,
            });
            write!(out, "{shown}{}", which.delimiter)?;
        }
    }
    Ok(())
}

/// `remove-repository`.
pub(super) async fn remove(file: &File, which: RemoveRepository, out: Out<'_>) -> Result<(), Failure> {
    let channel = dial(file).await?;
    let (virtual_storage, path) = (which.repository.virtual_storage, which.repository.relative_path);
    let name = RepositoryName { virtual_storage: virtual_storage.clone(), relative_path: path.clone() };
    let mut repair = RepairServiceClient::new(channel.clone());
    let known = file.virtual_storages.iter().any(|known| known.name == virtual_storage);
    if !known || placement(&mut repair, name.clone()).await?.is_none() {
        return Err(Failure::Told("repository is not being tracked in Praefect".to_owned()));
    }
    writeln!(out, "Repository found in the database.")?;
    if !which.apply {
        writeln!(
            out,
            "Re-run the command with -apply to remove repositories from the database and disk or -apply and -db-only to remove from database only."
        )?;
        return Ok(());
    }
    if which.db_only {
        writeln!(out, "Attempting to remove {path} from the database...")?;
        let request = ForgetRepositoryRequest { name: Some(name) };
        let mut imports = ImportServiceClient::new(channel);
        imports.forget_repository(request).await.map_err(refused("remove repository from database"))?;
        writeln!(out, "Repository removal from database completed.")?;
        return Ok(());
    }
    writeln!(out, "Attempting to remove {path} from the database, and delete it from all gitaly nodes...")?;
    let repository =
        Repository { storage_name: virtual_storage, relative_path: path, ..Repository::default() };
    RepositoryServiceClient::new(channel)
        .remove_repository(RemoveRepositoryRequest { repository: Some(repository) })
        .await
        .map_err(refused("repository removal failed"))?;
    writeln!(out, "Repository removal completed.")?;
    writeln!(out, "Removing replication events...")?;
    // They end with their repository.
    writeln!(out, "Replication event removal completed.")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_judged_one_by_one() {
        let (tracked, faults) = parse(
            r#"{"relative_path":"a","replica_path":"b","virtual_storage":"c","authoritative_storage":"d"}"#,
        );
        assert!(faults.is_empty() && tracked.authoritative_storage == "d");
        assert_eq!(
            parse(r#"{"relative_path":"a","virtual_storage":"c"}"#).1,
            [
                r#""replica-path" is a required parameter"#,
                r#""authoritative-storage" is a required parameter"#
            ]
        );
        assert_eq!(parse("nonsense").1.len(), 1);
        let bad = |line, faults| Bad { line, tracked: tracked.clone(), faults };
        let all = [bad(2, vec![String::new()]), bad(3, vec!["not a valid git repository".to_owned()])];
        let lines = BTreeMap::from([("a".to_owned(), vec![1, 2])]);
        let mut out = Vec::new();
        show_bad(&all, &lines, Path::new("/in"), &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "Found 2 invalid request(s) in \"/in\":\n  line 2, relative_path: \"a\", replica_path: \"b\"\n    \
             duplicate entries for relative_path, line [1 2]\n  line 3, relative_path: \"a\", replica_path: \"b\"\n    \
             not a valid git repository\n"
        );
    }
}
