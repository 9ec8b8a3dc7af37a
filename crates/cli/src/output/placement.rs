//! Tables of storages, and of all that is known of replicas.

use comfy_table::{Cell, Color};

use super::{coloured, counted, exactly, followed, since, table};
use crate::views::placement::{
    ReplicaDetailsView, RepositoryReplicasView, StorageDetailsView, UntrackedView,
};

pub(crate) fn storages(storages: &Vec<StorageDetailsView>) -> String {
    let mut table = table(&["storage", "address", "state", "replicas", "primaries", "moving"]);
    for storage in storages {
        let state = match (storage.healthy, storage.takes_replicas) {
            (true, false) if storage.state == "active" => "takes no replicas".to_owned(),
            (true, _) => storage.state.clone(),
            (false, _) => format!("{}, not healthy", storage.state),
        };
        let replicas = match storage.replicas_behind {
            0 => storage.replicas.to_string(),
            behind => format!("{}, {behind} behind", storage.replicas),
        };
        let moving: Vec<_> = [(storage.arriving, "arriving"), (storage.leaving, "leaving")]
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        table.add_row([
            Cell::new(&storage.name),
            Cell::new(&storage.address),
            coloured(state, storage.healthy),
            Cell::new(replicas),
            Cell::new(storage.primaries),
            Cell::new(moving.join(", ")),
        ]);
    }
    let mut text = table.to_string();
    for storage in storages.iter().filter(|storage| !storage.problem.is_empty()) {
        text.extend(["\n", &storage.name, ": ", &storage.problem]);
    }
    text
}

fn generation(replica: &ReplicaDetailsView) -> String {
    match replica.behind_by {
        None => "unknown".to_owned(),
        Some(0) => replica.generation.to_string(),
        Some(behind_by) => {
            format!("{}, behind by {} or fewer", replica.generation, counted(behind_by, "write", "writes"))
        }
    }
}

fn state(replica: &ReplicaDetailsView) -> Cell {
    let mut words = vec![if replica.up_to_date { "up to date" } else { "behind" }.to_owned()];
    if !replica.up_to_date && replica.behind_since.is_some() {
        words[0] = format!("behind since {}", since(replica.behind_since.as_ref()));
    }
    if !replica.healthy {
        words.push("storage not healthy".to_owned());
    }
    if !replica.damage.is_empty() {
        words.push("damaged".to_owned());
    }
    if !replica.assigned {
        words.push("leaving".to_owned());
    }
    let text = words.join(", ");
    let well = replica.healthy && (replica.damage.is_empty() || !replica.up_to_date);
    if well { followed(text, replica.up_to_date) } else { Cell::new(text).fg(Color::Red) }
}

pub(crate) fn replicas(repository: &RepositoryReplicasView) -> String {
    let factor = match repository.replication_factor {
        0 => "all storages".to_owned(),
        factor => factor.to_string(),
    };
    let available = if repository.unavailable {
        "no: no healthy storage has the newest generation and can read it"
    } else {
        "yes"
    };
    let mut table = table(&["storage", "generation", "state", "role", "compared", "objects whole"]);
    let last = |at: Option<&String>| at.map_or_else(|| "never".to_owned(), |at| since(Some(at)));
    for replica in &repository.replicas {
        table.add_row([
            Cell::new(&replica.storage),
            Cell::new(generation(replica)),
            state(replica),
            Cell::new(if replica.primary { "primary" } else { "" }),
            Cell::new(last(replica.verified_at.as_ref())),
            Cell::new(last(replica.checked_at.as_ref())),
        ]);
    }
    let mut text = format!(
        "{}  (id {}, generation {}, epoch {})\nkept at             {}\nwritten             {}\navailable           {}\n\
         replication factor  {}\nwrite quorum        {} ({})\n{}",
        repository.relative_path,
        repository.repository_id,
        repository.generation,
        repository.epoch,
        repository.replica_path,
        exactly(repository.written_at.as_ref()),
        available,
        factor,
        repository.write_quorum,
        repository.write_quorum_policy,
        table,
    );
    for replica in repository.replicas.iter().filter(|replica| !replica.damage.is_empty()) {
        text.extend(["\n", &replica.storage, ":\n", &replica.damage]);
    }
    text
}

pub(crate) fn losses(repositories: &Vec<RepositoryReplicasView>) -> String {
    if repositories.is_empty() {
        return "every replica is up to date, and none is known to be damaged".to_owned();
    }
    let mut table = table(&["repository", "storage", "generation", "state"]);
    for repository in repositories {
        let mut name = repository.relative_path.clone();
        if repository.unavailable {
            name.push_str("\nUNAVAILABLE");
        }
        for replica in &repository.replicas {
            let role = if replica.primary { " (primary)" } else { "" };
            let storage = format!("{}{role}", replica.storage);
            let named = coloured(std::mem::take(&mut name), !repository.unavailable);
            table.add_row([named, Cell::new(storage), Cell::new(generation(replica)), state(replica)]);
        }
    }
    let unavailable = repositories.iter().filter(|repository| repository.unavailable).count();
    let unavailable = i64::try_from(unavailable).unwrap_or(i64::MAX);
    let all = i64::try_from(repositories.len()).unwrap_or(i64::MAX);
    let is = if unavailable == 1 { "is" } else { "are" };
    format!(
        "{table}\n{} with a replica that is behind, damaged or cannot be read or reached; {unavailable} of them {is} unavailable",
        counted(all, "repository", "repositories")
    )
}

pub(crate) fn untracked(found: &Vec<UntrackedView>) -> String {
    if found.is_empty() {
        return "nothing is on a storage that is in no record".to_owned();
    }
    let mut table = table(&["storage", "replica path", "changed"]);
    for untracked in found {
        let changed = since(untracked.modified_at.as_ref());
        table.add_row([
            Cell::new(&untracked.storage),
            Cell::new(&untracked.replica_path),
            Cell::new(changed),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(storage: &str, generation: i64, newest: i64) -> ReplicaDetailsView {
        ReplicaDetailsView {
            storage: storage.into(),
            generation,
            behind_by: (generation >= 0).then_some(newest - generation),
            up_to_date: generation == newest,
            primary: storage == "node-1",
            healthy: true,
            assigned: true,
            valid_primary: generation == newest,
            behind_since: (generation < newest).then(|| "2020-01-01T00:00:00Z".to_owned()),
            verified_at: None,
            checked_at: None,
            damage: if storage == "node-2" { "missing blob 1".to_owned() } else { String::new() },
        }
    }

    fn repository(unavailable: bool) -> RepositoryReplicasView {
        RepositoryReplicasView {
            virtual_storage: "default".into(),
            relative_path: "a/b.git".into(),
            repository_id: 7,
            replica_path: "@cluster/repositories/6b/86/7".into(),
            primary: "node-1".into(),
            generation: 5,
            epoch: 2,
            replication_factor: 0,
            write_quorum_policy: "majority".into(),
            write_quorum: 2,
            unavailable,
            written_at: None,
            replicas: vec![replica("node-1", 5, 5), replica("node-2", 3, 5), replica("node-3", -1, 5)],
        }
    }

    #[test]
    fn what_is_behind_is_told_by_how_much_and_since_when() {
        let text = losses(&vec![repository(true)]);
        for said in
            ["UNAVAILABLE", "behind by 2 writes or fewer", "days ago", "unknown", "1 of them is unavailable"]
        {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert_eq!(text.matches("a/b.git").count(), 1, "{text}");
        assert!(losses(&Vec::new()).starts_with("every replica is up to date"));
    }

    #[test]
    fn one_repository_is_told_whole() {
        let text = replicas(&repository(false));
        for said in [
            "id 7",
            "all storages",
            "2 (majority)",
            "never",
            "available           yes",
            "node-2:\nmissing blob 1",
        ] {
            assert!(text.contains(said), "{said}: {text}");
        }
    }

    #[test]
    fn a_storage_that_is_drained_shows_what_moves() {
        let storage = StorageDetailsView {
            virtual_storage: "default".into(),
            name: "node-1".into(),
            address: "tcp://a:1".into(),
            state: "draining".into(),
            healthy: false,
            problem: "refused".into(),
            takes_replicas: false,
            replicas: 9,
            replicas_behind: 2,
            primaries: 1,
            arriving: 0,
            leaving: 4,
            filesystem_id: String::new(),
        };
        let text = storages(&vec![storage]);
        for said in ["draining, not healthy", "9, 2 behind", "4 leaving", "node-1: refused"] {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(!text.contains("arriving"), "{text}");
    }
}
