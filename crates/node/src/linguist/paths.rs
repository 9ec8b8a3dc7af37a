//! Where code lies that others wrote, and where documentation does, by their paths alone.

use std::sync::LazyLock;

use regex::bytes::{RegexSet, RegexSetBuilder};

const VENDORED: &str = include_str!("data/vendored.txt");
const DOCUMENTATION: &str = include_str!("data/documentation.txt");

#[expect(clippy::expect_used, reason = "constants, which a test compiles")]
fn set(lines: &str) -> RegexSet {
    RegexSetBuilder::new(lines.lines()).multi_line(true).unicode(false).build().expect("a constant")
}

static IN_VENDORED: LazyLock<RegexSet> = LazyLock::new(|| set(VENDORED));
static IN_DOCUMENTATION: LazyLock<RegexSet> = LazyLock::new(|| set(DOCUMENTATION));

/// Whether the file came from elsewhere.
pub(crate) fn is_vendored(path: &[u8]) -> bool {
    IN_VENDORED.is_match(path)
}

/// Whether the file is documentation.
pub(crate) fn is_documentation(path: &[u8]) -> bool {
    IN_DOCUMENTATION.is_match(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_where() {
        for path in ["vendor/a.go", "web/node_modules/a/b.js", "jquery-3.1.0.min.js", "configure"] {
            assert!(is_vendored(path.as_bytes()), "{path}");
        }
        for path in ["docs/a.md", "README.md", "a/LICENSE", "examples/a.rs"] {
            assert!(is_documentation(path.as_bytes()), "{path}");
        }
        for path in ["src/main.rs", "a/main.c", "src/b.js"] {
            assert!(!is_vendored(path.as_bytes()) && !is_documentation(path.as_bytes()), "{path}");
        }
    }
}
