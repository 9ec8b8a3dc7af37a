//! Extensions that several languages share, told apart by what stands in the file: `data/heuristics.tsv`.
//!
//! A line is a rule: extensions, the language, and the conditions that must all hold, each a pattern behind a `+` if
//! it must be found, behind a `-` if it must not. The first rule of an extension that holds decides.

use std::{
    collections::HashMap,
    sync::{LazyLock, OnceLock},
};

use regex::bytes::Regex;

use super::{
    catalogue::{Language, by_alias, items},
    pattern,
};

const TABLE: &str = include_str!("data/heuristics.tsv");

struct Condition {
    wanted: bool,
    text: &'static str,
    /// Few of the patterns are needed in a process's life.
    compiled: OnceLock<Regex>,
}

impl Condition {
    fn parse(cell: &'static str) -> Option<Self> {
        let wanted = match cell.as_bytes().first()? {
            b'+' => true,
            b'-' => false,
            _ => return None,
        };
        Some(Self { wanted, text: cell.get(1..)?, compiled: OnceLock::new() })
    }

    fn holds(&self, content: &[u8]) -> bool {
        self.compiled.get_or_init(|| pattern(self.text)).is_match(content) == self.wanted
    }
}

struct Rule {
    extensions: &'static str,
    languages: Vec<&'static Language>,
    conditions: Vec<Condition>,
}

impl Rule {
    fn parse(line: &'static str) -> Option<Self> {
        let mut cells = line.split('\t');
        let extensions = cells.next()?;
        let languages = items(cells.next()?).map(|name| by_alias(name.as_bytes())).collect::<Option<_>>()?;
        let conditions = cells.map(Condition::parse).collect::<Option<_>>()?;
        Some(Self { extensions, languages, conditions })
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| TABLE.lines().filter_map(Rule::parse).collect());
static BY_EXTENSION: LazyLock<HashMap<&'static [u8], Vec<&'static Rule>>> = LazyLock::new(|| {
    let mut index = HashMap::<_, Vec<_>>::new();
    for rule in RULES.iter() {
        for extension in items(rule.extensions) {
            index.entry(extension.as_bytes()).or_default().push(rule);
        }
    }
    index
});

/// What the first rule that holds says of files with this extension.
pub(super) fn languages(extension: &[u8], content: &[u8]) -> &'static [&'static Language] {
    let rules = BY_EXTENSION.get(extension).map(Vec::as_slice).unwrap_or_default();
    let holds = |rule: &&&Rule| rule.conditions.iter().all(|condition| condition.holds(content));
    rules.iter().find(holds).map(|rule| rule.languages.as_slice()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_rule_of_known_languages_and_good_patterns() {
        let read = TABLE.lines().filter(|line| Rule::parse(line).is_none()).collect::<Vec<_>>();
        assert_eq!(read, [""; 0]);
        assert_eq!(RULES.len(), TABLE.lines().count());
        for condition in RULES.iter().flat_map(|rule| &rule.conditions) {
            let built =
                regex::bytes::RegexBuilder::new(condition.text).multi_line(true).unicode(false).build();
            assert!(built.is_ok(), "{}", built.unwrap_err());
        }
    }

    #[test]
    fn headers_of_three_languages() {
        let name = |content: &str| languages(b".h", content.as_bytes()).first().map(|language| language.name);
        assert_eq!(name("#include <vector>\nclass A {\npublic:\n};\n"), Some("C++"));
        assert_eq!(name("@interface A : NSObject\n@end\n"), Some("Objective-C"));
        assert_eq!(name("int a(void);\n"), Some("C"));
    }
}
