//! Tables of what was found of replicas' objects, and of what was kept of corrupt ones.

use comfy_table::Cell;

use super::{coloured, since, table};
use crate::views::corruption::{CheckedView, KeptListView};

pub(crate) fn checked(checked: &CheckedView) -> String {
    let mut table = table(&["storage", "objects", "what git says"]);
    for replica in &checked.replicas {
        let state = coloured(&replica.state, replica.state == "whole");
        table.add_row([Cell::new(&replica.storage), state, Cell::new(&replica.findings)]);
    }
    let damaged = checked.replicas.iter().any(|replica| replica.state == "damaged");
    let outcome = match (damaged, checked.made_again.as_slice()) {
        (false, _) => "nothing is damaged".to_owned(),
        (true, []) => {
            "nothing was taken out: no other replica is known to be whole, or the repository has changed \
                       meanwhile"
                .to_owned()
        }
        (true, storages) => format!("out of reads and made again: {}", storages.join(", ")),
    };
    format!("{table}\n{outcome}")
}

pub(crate) fn kept(listed: &KeptListView) -> String {
    let mut text = if listed.kept.is_empty() {
        "nothing is kept".to_owned()
    } else {
        let mut table = table(&["storage", "id", "repository", "kept", "MiB", "why", "where"]);
        for kept in &listed.kept {
            let name = if kept.relative_path.is_empty() { &kept.replica_path } else { &kept.relative_path };
            table.add_row([
                Cell::new(&kept.storage),
                Cell::new(&kept.id),
                Cell::new(name),
                Cell::new(since(kept.kept_at.as_ref())),
                Cell::new(kept.bytes.div_ceil(1024 * 1024)),
                Cell::new(kept.reason.lines().next().unwrap_or_default()),
                Cell::new(&kept.path),
            ]);
        }
        table.to_string()
    };
    for unread in &listed.unread {
        text.extend(["\n", &unread.storage, ": ", &unread.problem]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::corruption::{KeptView, ReplicaCheckView, UnreadView};

    #[test]
    fn what_is_damaged_is_told_with_what_becomes_of_it() {
        let replica = |storage: &str, state: &str, findings: &str| ReplicaCheckView {
            storage: storage.into(),
            state: state.into(),
            findings: findings.into(),
        };
        let mut found = CheckedView {
            replicas: vec![replica("node-1", "whole", ""), replica("node-2", "damaged", "missing blob 1")],
            made_again: vec!["node-2".into()],
        };
        let text = checked(&found);
        assert!(text.contains("missing blob 1") && text.ends_with("made again: node-2"), "{text}");
        found.made_again.clear();
        assert!(checked(&found).contains("nothing was taken out"));
        found.replicas.pop();
        assert!(checked(&found).ends_with("nothing is damaged"));
    }

    #[test]
    fn what_is_kept_is_named_and_so_is_whom_nobody_reached() {
        let one = KeptView {
            storage: "node-1".into(),
            id: "7-1".into(),
            replica_path: "@cluster/7".into(),
            repository_id: 0,
            relative_path: String::new(),
            reason: "missing blob 1\nmissing blob 2".into(),
            found_at: None,
            kept_at: Some("2020-01-01T00:00:00Z".into()),
            path: "/disk/x".into(),
            bytes: 1,
        };
        let unread = vec![UnreadView { storage: "node-2".into(), problem: "refused".into() }];
        let text = kept(&KeptListView { kept: vec![one], unread });
        for said in ["7-1", "@cluster/7", "days ago", "missing blob 1", "/disk/x", "node-2: refused"] {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(!text.contains("blob 2"), "{text}");
        assert_eq!(kept(&KeptListView { kept: Vec::new(), unread: Vec::new() }), "nothing is kept");
    }
}
