use proptest::prelude::*;

use super::*;
use crate::git::diff::limits::{Amount, Enforced};

fn side(mode: i32, id: &str) -> Side {
    Side { mode, id: id.to_owned() }
}

fn change(status: Status, old_path: Option<&str>, path: &str) -> Change {
    Change {
        old: vec![(side(0o100_644, "aa"), status)],
        new: side(0o100_644, "bb"),
        old_path: old_path.map(|path| path.as_bytes().to_vec()),
        path: path.as_bytes().to_vec(),
    }
}

fn parser(limits: Limits, changes: Vec<Change>) -> Parser {
    let mut parser = Parser::new(limits, "00".to_owned());
    for change in changes {
        parser.list(change).unwrap();
    }
    parser
}

fn parse(mut parser: Parser, text: &str) -> Result<Vec<FileDiff>, Malformed> {
    let mut found = Vec::new();
    for line in text.split_inclusive('\n') {
        parser.piece(line.as_bytes(), true)?;
        found.extend(parser.next());
    }
    parser.finish();
    found.extend(std::iter::from_fn(|| parser.next()));
    Ok(found)
}

fn section(path: &str, lines: &str) -> String {
    format!(
        "diff --git a/{path} b/{path}\nindex aa..bb 100644\n--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n{lines}"
    )
}

fn modified(path: &str) -> Change {
    change(Status::Modified, None, path)
}

fn paths(found: &[FileDiff]) -> Vec<&str> {
    found.iter().map(|diff| std::str::from_utf8(&diff.to_path).unwrap()).collect()
}

#[test]
fn headers_are_left_out_and_lines_counted() {
    let text = section("a", "-x\n+y\n+--- z\n context\n\\ No newline at end of file\n");
    let found = parse(parser(Limits::default(), vec![modified("a")]), &text).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].patch, b"@@ -1 +1 @@\n-x\n+y\n+--- z\n context\n\\ No newline at end of file\n");
    assert_eq!((found[0].lines_added, found[0].lines_removed, found[0].binary), (2, 1, false));
    assert_eq!(found[0].patch_size, found[0].patch.len());
}

#[test]
fn files_without_a_patch_come_in_their_place() {
    let changes =
        vec![modified("a"), modified("b c"), change(Status::Renamed, Some("d"), "e"), modified("f")];
    let text = "diff --git a/b c b/b c\nold mode 100644\nnew mode 100755\ndiff --git a/d b/e\nsimilarity index 100%\n\
                rename from d\nrename to e\n";
    let found = parse(parser(Limits::default(), changes.clone()), text).unwrap();
    assert_eq!(paths(&found), ["a", "b c", "e", "f"]);
    assert_eq!(found[2].from_path, b"d");
    assert!(found.iter().all(|diff| diff.patch.is_empty()));
    let found = parse(parser(Limits::default(), changes), "").unwrap();
    assert_eq!(paths(&found), ["a", "b c", "e", "f"]);
}

#[test]
fn paths_are_quoted_as_git_quotes_them() {
    assert_eq!(quoted(b"a/", "\u{fc}\"\\\t\n\x01x y".as_bytes()), br#""a/\303\274\"\\\t\n\001x y""#);
    assert_eq!(quoted(b"b/", b"plain file"), b"b/plain file");
    let changes = vec![change(Status::Renamed, Some("\u{fc}\"q"), "z")];
    let text = "diff --git \"a/\\303\\274\\\"q\" b/z\nBinary files differ\n";
    let found = parse(parser(Limits::default(), changes), text).unwrap();
    assert!(found[0].binary);
    assert_eq!(found[0].patch, b"Binary files differ\n");
}

#[test]
fn a_change_of_type_is_an_end_and_a_beginning() {
    let text = [section("l", "-x\n"), section("l", "+y\n")].concat();
    let found =
        parse(parser(Limits::default(), vec![change(Status::TypeChanged, None, "l")]), &text).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].to.clone(), found[1].from.clone()), (side(0, "00"), side(0, "00")));
    assert_eq!((found[0].from.id.as_str(), found[1].to.id.as_str()), ("aa", "bb"));
    assert_eq!((found[0].lines_removed, found[1].lines_added), (1, 1));
}

#[test]
fn words_have_lines_of_their_own() {
    let text = section("a", " same\n-old\n+new\n~\n");
    let found = parse(parser(Limits::default(), vec![modified("a")]), &text).unwrap();
    assert!(found[0].patch.ends_with(b"+new\n~\n"));
}

fn enforced(files: i64, lines: i64, bytes: i64, patch_bytes: i64) -> Limits {
    let total = Some(Amount { files, lines, bytes });
    Limits { enforced: Some(Enforced { total, patch_bytes, ..Enforced::default() }), ..Limits::default() }
}

#[test]
fn the_listing_ends_where_the_limits_do() {
    let changes = || ["a", "b", "c", "d"].map(modified).to_vec();
    let text: String = ["a", "b", "c", "d"].map(|path| section(path, "+x\n")).concat();
    let found = parse(parser(enforced(2, 100, 1000, 100), changes()), &text).unwrap();
    assert_eq!(paths(&found), ["a", "b", ""]);
    assert!(found[2].overflow && found[2].from.id.is_empty() && !found[1].overflow);
    let all = Limits { collect_all_paths: true, ..enforced(2, 100, 1000, 100) };
    let found = parse(parser(all, changes()), &text).unwrap();
    assert_eq!(paths(&found), ["a", "b", "c", "d"]);
    let patches: Vec<bool> = found.iter().map(|diff| diff.patch.is_empty()).collect();
    assert_eq!(patches, [false, false, true, true]);
    assert_eq!(found.iter().map(|diff| diff.overflow).collect::<Vec<_>>(), [false, false, true, true]);
    // Files without a patch do not hide that there are too many.
    let found = parse(parser(enforced(1, 100, 1000, 100), changes()), &section("d", "+x\n")).unwrap();
    assert_eq!(paths(&found), ["a", "b", ""]);
    let found = parse(parser(enforced(1, 100, 1000, 100), changes()), "").unwrap();
    assert!(found[2].overflow);
}

#[test]
fn large_patches_are_left_out_and_not_held() {
    let text = section("a", "+0123456789\n");
    let found = parse(parser(enforced(5, 100, 1000, 20), vec![modified("a")]), &text).unwrap();
    assert!(found[0].too_large && found[0].patch.is_empty());
    assert_eq!(found[0].patch_size, 24);
    assert_eq!(found[0].lines_added, 1);
    let collapse = Amount { files: 0, lines: 10, bytes: 100 };
    let limits = Limits { collapse_behind: Some(collapse), ..Limits::default() };
    let found = parse(parser(limits, vec![modified("a")]), &text).unwrap();
    assert!(found[0].collapsed && found[0].patch.is_empty() && !found[0].too_large);
}

#[test]
fn what_is_no_patch_is_refused() {
    assert!(parse(parser(Limits::default(), vec![modified("a")]), "+x\n").is_err());
    assert!(parse(parser(Limits::default(), vec![modified("a")]), &section("b", "")).is_err());
    let mut combined = modified("a");
    combined.old.push((side(0, "cc"), Status::Modified));
    assert!(Parser::new(Limits::default(), String::new()).list(combined).is_err());
}

proptest! {
    /// However the lines come in pieces, the patch is the same.
    #[test]
    fn pieces_make_lines(text in "[-+ ][a-z@-]{0,30}\n", size in 10..20_usize) {
        let whole = section("a", &text);
        let mut parser = parser(Limits::default(), vec![modified("a")]);
        for line in whole.split_inclusive('\n') {
            let size = if line.starts_with("diff") { line.len() } else { size };
            for (number, piece) in line.as_bytes().chunks(size).enumerate() {
                parser.piece(piece, number == 0).unwrap();
            }
        }
        parser.finish();
        let found = parser.next().unwrap();
        prop_assert!(found.patch.ends_with(text.as_bytes()));
        prop_assert!(found.lines_added + found.lines_removed <= 1);
    }
}
