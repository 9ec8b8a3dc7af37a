//! How much of a difference a client wants to see, and what has been spent of it.

use std::collections::HashMap;

/// No client may ask for more than this.
const MAX_FILES: i64 = 5000;
const MAX_LINES: i64 = 250_000;
const MAX_BYTES: i64 = 5000 * 5120;
const SAFE_MAX_FILES: i64 = 500;
const SAFE_MAX_LINES: i64 = 25_000;
const SAFE_MAX_BYTES: i64 = 500 * 5120;
const MAX_PATCH_BYTES: i64 = 512_000;

/// Files, lines and bytes. Hunk headers are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) files: i64,
    pub(crate) lines: i64,
    pub(crate) bytes: i64,
}

impl Amount {
    fn at_most(self, bound: Self) -> Self {
        Self {
            files: self.files.min(bound.files),
            lines: self.lines.min(bound.lines),
            bytes: self.bytes.min(bound.bytes),
        }
    }
}

/// Where patches are cut off, and where the listing ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Enforced {
    /// For all files together; `None` if only single patches are limited.
    pub(crate) total: Option<Amount>,
    /// For one patch.
    pub(crate) patch_bytes: i64,
    /// For one patch, by the extension of the file, its dot included, or its whole name if it has none.
    pub(crate) patch_bytes_by_extension: HashMap<String, i32>,
}

/// What a client asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Behind this much, patches are left out.
    pub(crate) collapse_behind: Option<Amount>,
    /// Behind this much, the listing ends.
    pub(crate) enforced: Option<Enforced>,
    /// It does not end: files follow without their patches.
    pub(crate) collect_all_paths: bool,
}

impl Limits {
    /// The same within what any client may ask for.
    pub(crate) fn bounded(mut self) -> Self {
        let safe = Amount { files: SAFE_MAX_FILES, lines: SAFE_MAX_LINES, bytes: SAFE_MAX_BYTES };
        self.collapse_behind = self.collapse_behind.map(|amount| amount.at_most(safe));
        if let Some(enforced) = &mut self.enforced {
            let most = Amount { files: MAX_FILES, lines: MAX_LINES, bytes: MAX_BYTES };
            enforced.total = enforced.total.map(|total| total.at_most(most));
            enforced.patch_bytes = enforced.patch_bytes.min(MAX_PATCH_BYTES);
        }
        self
    }

    /// So many files can be told of; more need not be remembered.
    pub(crate) fn files(&self) -> Option<usize> {
        if self.collect_all_paths {
            return None;
        }
        let total = self.enforced.as_ref()?.total?;
        // The one behind the last tells of the overflow.
        usize::try_from(total.files.max(0)).ok().map(|files| files + 1)
    }

    /// The size from which on the patch of this file is too large.
    pub(crate) fn patch_bytes(&self, path: &[u8]) -> Option<i64> {
        let enforced = self.enforced.as_ref()?;
        let own = enforced.patch_bytes_by_extension.get(&extension(path));
        Some(own.map_or(enforced.patch_bytes, |bytes| i64::from(*bytes)))
    }
}

fn extension(path: &[u8]) -> String {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let dot = name.iter().rposition(|byte| *byte == b'.').unwrap_or_default();
    String::from_utf8_lossy(name.get(dot..).unwrap_or_default()).into_owned()
}

/// What becomes of a patch that has been read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// It is left out, and can be asked for.
    pub(crate) collapsed: bool,
    /// It is left out.
    pub(crate) too_large: bool,
    /// All limits together are reached.
    pub(crate) overflow: bool,
}

/// What has been spent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Spent(Amount);

impl Spent {
    /// Another file is told of.
    pub(crate) fn file(&mut self) {
        self.0.files += 1;
    }

    /// Its patch of `size` bytes has been read: `lines` of content with `bytes`.
    pub(crate) fn patch(
        &mut self,
        limits: &Limits,
        path: &[u8],
        lines: i64,
        bytes: i64,
        size: i64,
    ) -> Verdict {
        let mut verdict = Verdict::default();
        self.0.lines += lines;
        self.0.bytes += bytes;
        let mut left = size;
        if let Some(safe) = limits.collapse_behind
            && lines > 0
            && (self.0.files > safe.files || self.0.lines > safe.lines || self.0.bytes > safe.bytes)
        {
            verdict.collapsed = true;
            self.give_back(lines, left);
            left = 0;
        }
        if limits.patch_bytes(path).is_some_and(|most| left >= most) {
            verdict.too_large = true;
            self.give_back(lines, left);
        }
        if let Some(total) = limits.enforced.as_ref().and_then(|enforced| enforced.total) {
            verdict.overflow =
                self.0.lines >= total.lines || self.0.bytes >= total.bytes || self.0.files > total.files;
        }
        verdict
    }

    /// What is left out costs nothing. (That hunk headers are given back without having been taken, and lines twice if a
    /// collapsed patch has no room at all, is how clients know it.)
    fn give_back(&mut self, lines: i64, size: i64) {
        self.0.lines -= lines;
        self.0.bytes -= size;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amount(files: i64, lines: i64, bytes: i64) -> Amount {
        Amount { files, lines, bytes }
    }

    #[test]
    fn nobody_gets_more_than_all() {
        let huge = amount(i64::MAX, i64::MAX, i64::MAX);
        let limits = Limits {
            collapse_behind: Some(huge),
            enforced: Some(Enforced { total: Some(huge), patch_bytes: i64::MAX, ..Enforced::default() }),
            collect_all_paths: false,
        };
        let bounded = limits.bounded();
        assert_eq!(bounded.collapse_behind, Some(amount(500, 25_000, 2_560_000)));
        let enforced = bounded.enforced.as_ref().unwrap();
        assert_eq!(
            (enforced.total, enforced.patch_bytes),
            (Some(amount(5000, 250_000, 25_600_000)), 512_000)
        );
        assert_eq!(bounded.files(), Some(5001));
        assert_eq!(Limits::default().bounded(), Limits::default());
    }

    #[test]
    fn a_patch_that_is_left_out_makes_room() {
        let limits = Limits {
            enforced: Some(Enforced {
                total: Some(amount(10, 10, 1000)),
                patch_bytes: 100,
                patch_bytes_by_extension: [(".txt".to_owned(), 5), ("Makefile".to_owned(), 7)].into(),
            }),
            collapse_behind: Some(amount(10, 6, 1000)),
            collect_all_paths: false,
        };
        assert_eq!(limits.patch_bytes(b"a.b/c.txt"), Some(5));
        assert_eq!(limits.patch_bytes(b"a.b/Makefile"), Some(7));
        assert_eq!(limits.patch_bytes(b"a.txt/other"), Some(100));
        let mut spent = Spent::default();
        spent.file();
        let too_large = Verdict { too_large: true, ..Verdict::default() };
        assert_eq!(spent.patch(&limits, b"a", 5, 100, 100), too_large);
        assert_eq!(spent.patch(&limits, b"a", 6, 50, 60), Verdict::default());
        let collapsed = Verdict { collapsed: true, ..Verdict::default() };
        assert_eq!(spent.patch(&limits, b"a", 1, 5, 5), collapsed);
        // Nothing but a rename is not collapsed.
        assert_eq!(spent.patch(&limits, b"a", 0, 0, 0), Verdict::default());
        let mut spent = Spent::default();
        let all = Limits { collapse_behind: None, ..limits };
        assert_eq!(spent.patch(&all, b"a", 9, 50, 60), Verdict::default());
        assert!(spent.patch(&all, b"a", 1, 5, 5).overflow);
    }

    proptest! {
        #[test]
        fn without_limits_nothing_is_left_out(patches in prop::collection::vec((0..100_i64, 0..10_000_i64), 0..50)) {
            let mut spent = Spent::default();
            for (lines, bytes) in patches {
                spent.file();
                prop_assert_eq!(spent.patch(&Limits::default(), b"f", lines, bytes, bytes), Verdict::default());
            }
        }

        #[test]
        fn more_files_than_allowed_overflow(files in 1..40_i64) {
            let limits = Limits {
                enforced: Some(Enforced { total: Some(amount(20, 1000, 100_000)), patch_bytes: 1000, ..Enforced::default() }),
                ..Limits::default()
            };
            let mut spent = Spent::default();
            for number in 1..=files {
                spent.file();
                prop_assert_eq!(spent.patch(&limits, b"f", 1, 10, 12).overflow, number > 20);
            }
        }
    }
}
