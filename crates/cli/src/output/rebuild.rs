//! What a rebuild of the database found, as a table.

use comfy_table::Cell;

use super::{coloured, counted, table};
use crate::views::rebuild::RebuildView;

pub(crate) fn rebuilt(view: &RebuildView) -> String {
    let mut text = String::new();
    if !view.findings.is_empty() {
        let mut table = table(&["finding", "repository", "storage", "replica path", "what"]);
        for finding in &view.findings {
            table.add_row([
                coloured(finding.kind.to_owned(), finding.kind == "behind"),
                Cell::new(&finding.relative_path),
                Cell::new(&finding.storage),
                Cell::new(&finding.replica_path),
                Cell::new(&finding.what),
            ]);
        }
        text = format!("{table}\n");
    }
    let done = if view.dry_run { "would be written" } else { "written" };
    let behind = match view.replicas_behind {
        0 => String::new(),
        behind => format!(", {behind} of them behind"),
    };
    format!(
        "{text}{} with {}{behind} {done}, from {}",
        counted(view.repositories, "repository", "repositories"),
        counted(view.replicas, "replica", "replicas"),
        counted(view.storages, "storage", "storages"),
    )
}

#[cfg(test)]
mod tests {
    use tabularium_proto::coordinator::{RebuildFinding, RebuildFindingKind, RebuildSum};

    use super::*;

    #[test]
    fn what_was_found_stands_before_the_sum() {
        let mut view = RebuildView { dry_run: true, ..RebuildView::default() };
        view.sum(&RebuildSum {
            repositories: 1,
            replicas: 3,
            replicas_behind: 1,
            storages: 3,
            last_repository_id: 7,
        });
        let plain = rebuilt(&view);
        assert_eq!(plain, "1 repository with 3 replicas, 1 of them behind would be written, from 3 storages");
        let finding = RebuildFinding {
            kind: RebuildFindingKind::NameTaken.into(),
            relative_path: "a/b.git".into(),
            what: "a later repository has its name".into(),
            ..RebuildFinding::default()
        };
        view.findings.push(finding.into());
        let text = rebuilt(&view);
        for said in ["name taken", "a/b.git", "a later repository has its name", plain.as_str()] {
            assert!(text.contains(said), "{said}: {text}");
        }
    }
}
