//! The languages, from `data/languages.tsv`: name, number, kind, color, whether it is one of the most used, and then, each
//! a list with commas, aliases, extensions, file names and interpreters.

use std::{collections::HashMap, sync::LazyLock};

use sha2::{Digest as _, Sha256};

const TABLE: &str = include_str!("data/languages.tsv");

/// What a language is for. Programming and markup languages are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Data, configuration.
    Data,
    /// Markup.
    Markup,
    /// Programs.
    Programming,
    /// Text for people.
    Prose,
}

/// One language.
#[derive(Debug)]
pub(crate) struct Language {
    /// As people write it.
    pub(crate) name: &'static str,
    /// The number it has everywhere.
    pub(crate) id: i64,
    /// What it is for.
    pub(crate) kind: Kind,
    /// Its color, or its group's; empty if nobody gave it one.
    color: &'static str,
    /// One of the most used.
    pub(super) popular: bool,
    aliases: &'static str,
    pub(super) extensions: &'static str,
    filenames: &'static str,
    interpreters: &'static str,
}

impl Language {
    /// `#rrggbb`. One that has none gets one from its name, so that it is the same everywhere.
    pub(crate) fn color(&self) -> String {
        if !self.color.is_empty() {
            return self.color.to_owned();
        }
        let digest = Sha256::digest(self.name.as_bytes());
        format!("#{}", hex::encode(digest.get(..3).unwrap_or_default()))
    }

    fn parse(line: &'static str) -> Option<Self> {
        let mut cells = line.split('\t');
        let language = Self {
            name: cells.next()?,
            id: cells.next()?.parse().ok()?,
            kind: match cells.next()? {
                "data" => Kind::Data,
                "markup" => Kind::Markup,
                "programming" => Kind::Programming,
                "prose" => Kind::Prose,
                _ => return None,
            },
            color: cells.next()?,
            popular: cells.next()? == "popular",
            aliases: cells.next()?,
            extensions: cells.next()?,
            filenames: cells.next()?,
            interpreters: cells.next()?,
        };
        cells.next().is_none().then_some(language)
    }
}

type Index = HashMap<Vec<u8>, Vec<&'static Language>>;

/// The items of a list.
pub(super) fn items(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.split(',').filter(|item| !item.is_empty())
}

static LANGUAGES: LazyLock<Vec<Language>> =
    LazyLock::new(|| TABLE.lines().filter_map(Language::parse).collect());

fn index(keys: impl Fn(&'static Language) -> Vec<Vec<u8>>) -> Index {
    let mut index = Index::new();
    for language in LANGUAGES.iter() {
        for key in keys(language) {
            let named = index.entry(key).or_default();
            if !named.iter().any(|other| other.id == language.id) {
                named.push(language);
            }
        }
    }
    index
}

fn alias_key(alias: &[u8]) -> Vec<u8> {
    let first = alias.split(|byte| *byte == b',').next().unwrap_or_default();
    first.to_ascii_lowercase().into_iter().map(|byte| if byte == b' ' { b'_' } else { byte }).collect()
}

static BY_ALIAS: LazyLock<Index> = LazyLock::new(|| {
    index(|language| {
        let aliases = items(language.aliases).chain([language.name]);
        aliases.map(|alias| alias_key(alias.as_bytes())).collect()
    })
});
static BY_EXTENSION: LazyLock<Index> = LazyLock::new(|| {
    index(|language| items(language.extensions).map(|item| item.to_ascii_lowercase().into_bytes()).collect())
});
static BY_FILENAME: LazyLock<Index> =
    LazyLock::new(|| index(|language| items(language.filenames).map(Into::into).collect()));
static BY_INTERPRETER: LazyLock<Index> =
    LazyLock::new(|| index(|language| items(language.interpreters).map(Into::into).collect()));

fn of(index: &'static Index, key: &[u8]) -> &'static [&'static Language] {
    index.get(key).map(Vec::as_slice).unwrap_or_default()
}

/// The language that goes by this name, written in any way. A language's own name goes before another one's alias.
pub(crate) fn by_alias(alias: &[u8]) -> Option<&'static Language> {
    let key = alias_key(alias);
    let found = of(&BY_ALIAS, &key);
    let own = found.iter().find(|language| alias_key(language.name.as_bytes()) == key);
    own.or_else(|| found.first()).copied()
}

/// Those with files of this extension, which is in lower case.
pub(super) fn by_extension(extension: &[u8]) -> &'static [&'static Language] {
    of(&BY_EXTENSION, extension)
}

/// Those with files of this name.
pub(super) fn by_filename(name: &[u8]) -> &'static [&'static Language] {
    of(&BY_FILENAME, name)
}

/// Those that this program runs.
pub(super) fn by_interpreter(name: &[u8]) -> &'static [&'static Language] {
    of(&BY_INTERPRETER, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_language() {
        assert_eq!(LANGUAGES.len(), TABLE.lines().count());
        assert!(LANGUAGES.len() > 700);
        let mut ids: Vec<_> = LANGUAGES.iter().map(|language| language.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), LANGUAGES.len());
    }

    #[test]
    fn names_in_any_way() {
        assert_eq!(by_alias(b"rust").unwrap().name, "Rust");
        assert_eq!(by_alias(b"Vim Script").unwrap().name, by_alias(b"vim_script").unwrap().name);
        assert_eq!(by_alias(b"js").unwrap().name, "JavaScript");
        assert!(by_alias(b"no such").is_none());
    }

    #[test]
    fn every_language_has_a_color() {
        assert_eq!(by_alias(b"Rust").unwrap().color(), "#dea584");
        let without = LANGUAGES.iter().find(|language| language.color.is_empty()).unwrap();
        assert_eq!(without.color().len(), 7);
        assert_eq!(without.color(), without.color());
        // A group's color is its members'.
        assert_eq!(by_alias(b"JSON with Comments").unwrap().color(), by_alias(b"JSON").unwrap().color());
    }
}
