//! What was taken over, as a table.

use comfy_table::Cell;

use super::{coloured, counted, table};
use crate::views::takeover::{ImportView, TrackedView};

pub(crate) fn imported(view: &ImportView) -> String {
    let mut text = String::new();
    if !view.findings.is_empty() {
        let mut table = table(&["id", "repository", "left out", "what"]);
        for finding in &view.findings {
            table.add_row([
                Cell::new(finding.repository_id),
                Cell::new(format!("{}:{}", finding.virtual_storage, finding.relative_path)),
                coloured(if finding.left_out { "yes" } else { "no" }.to_owned(), !finding.left_out),
                Cell::new(&finding.what),
            ]);
        }
        text = format!("{table}\n");
    }
    let done = if view.dry_run { "would be taken over" } else { "taken over" };
    let behind = match view.replicas_behind {
        0 => String::new(),
        behind => format!(", {behind} of them behind or to be made,"),
    };
    let before = match view.known_before {
        0 => String::new(),
        before => format!("; {before} known before"),
    };
    format!(
        "{text}{} with {}{behind} {done}{before}; {} left out",
        counted(view.repositories, "repository", "repositories"),
        counted(view.replicas, "replica", "replicas"),
        view.left_out,
    )
}

pub(crate) fn tracked(view: &TrackedView) -> String {
    let mut text = String::new();
    if !view.left_out.is_empty() {
        let mut table = table(&["replica path", "storages", "why it is left out"]);
        for left_out in &view.left_out {
            table.add_row([
                Cell::new(&left_out.replica_path),
                Cell::new(left_out.storages.join(", ")),
                Cell::new(&left_out.what),
            ]);
        }
        text = format!("{table}\n");
    }
    let done = if view.dry_run { "would be tracked" } else { "tracked" };
    let left_out = view.left_out.len();
    format!("{text}{} {done}; {left_out} left out", counted(view.tracked, "repository", "repositories"))
}

#[cfg(test)]
mod tests {
    use tabularium_proto::coordinator::ImportFinding;

    use super::*;
    use crate::views::takeover::UntakenView;

    #[test]
    fn what_was_found_stands_before_the_sum() {
        let mut view =
            ImportView { repositories: 2, replicas: 6, replicas_behind: 1, ..ImportView::default() };
        assert_eq!(
            imported(&view),
            "2 repositories with 6 replicas, 1 of them behind or to be made, taken over; 0 left out"
        );
        (view.dry_run, view.known_before, view.replicas_behind, view.left_out) = (true, 5, 0, 1);
        let finding = ImportFinding { what: "why".into(), left_out: true, ..ImportFinding::default() };
        view.findings.push(finding.into());
        let text = imported(&view);
        assert!(
            text.contains("why") && text.ends_with("would be taken over; 5 known before; 1 left out"),
            "{text}"
        );
    }

    #[test]
    fn what_is_left_on_disk_is_named() {
        let untaken = UntakenView {
            replica_path: "a.git".into(),
            storages: vec!["s-1".into(), "s-2".into()],
            what: "why".into(),
        };
        let text = tracked(&TrackedView { dry_run: false, tracked: 1, left_out: vec![untaken] });
        assert!(text.contains("s-1, s-2") && text.ends_with("1 repository tracked; 1 left out"), "{text}");
    }
}
