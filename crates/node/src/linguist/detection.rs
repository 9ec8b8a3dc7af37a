//! The questions in their order: each either leaves one language, or fewer to choose from for the next.

use std::sync::LazyLock;

use regex::bytes::Regex;

use super::{
    base_name,
    catalogue::{self, Language, by_alias, items},
    contains, content, extension, lines, pattern,
};

/// Where git looks for the byte that makes a file binary.
const BINARY_WITHIN: usize = 8000;
/// An editor's line is looked for in so many lines at the beginning and as many at the end.
const MODELINE_SCOPE: usize = 5;
/// A script that hands itself to another interpreter does so in its first lines.
const EXEC_SCOPE: usize = 5;
/// The declaration that makes a file XML is in its first lines.
const XML_SCOPE: usize = 2;

static EMACS: LazyLock<Regex> = LazyLock::new(|| pattern(r"-\*-[ \t]*(.+?)[ \t]*-\*-"));
static EMACS_MODE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?i:mode)\s*:\s*([^\s;]+)"));
static VIM: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?:^|\s)(?:vi(?:m[<=>]?[0-9]+|m)?|ex)\s*:\s*(.*)$"));
static VIM_TYPE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?i:filetype|ft|syntax)\s*=(\w+)(?:\s|:|$)"));
static EXEC: LazyLock<Regex> = LazyLock::new(|| pattern(r"exec (\w+).+\$0.+\$@"));
static MANPAGE: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"\.(?:[1-9](?:[a-z_]+[a-z_0-9]*)?|0p|n|man|mdoc)(?:\.in)?\z"));

type Languages = Vec<&'static Language>;

/// The language of a file, by its path and the beginning of its content; `None` for binary files and unknown ones.
pub(crate) fn language(path: &[u8], content: &[u8]) -> Option<&'static Language> {
    let beginning = content.get(..BINARY_WITHIN).unwrap_or(content);
    if beginning.contains(&0) {
        return None;
    }
    if let Some(language) = of_modeline(content) {
        return Some(language);
    }
    let mut candidates = Languages::new();
    let questions: [&dyn Fn(&Languages) -> Languages; 6] = [
        &|_| catalogue::by_filename(base_name(path)).to_vec(),
        &|_| interpreter(content).map(|name| catalogue::by_interpreter(&name).to_vec()).unwrap_or_default(),
        &|_| of_extensions(path).to_vec(),
        &|candidates| if candidates.is_empty() { of_xml(content) } else { Vec::new() },
        &|_| of_manpage(path),
        &|_| content::languages(&extension(path), content).to_vec(),
    ];
    for question in questions {
        match question(&candidates) {
            none if none.is_empty() => {}
            one if one.len() == 1 => return one.first().copied(),
            several => candidates = several,
        }
    }
    most_likely(&extension(path), &candidates)
}

/// Where nothing tells them apart: one of the most used, then one whose first extension it is, then the first by name.
fn most_likely(extension: &[u8], candidates: &[&'static Language]) -> Option<&'static Language> {
    let rank = |language: &&&'static Language| {
        let first = items(language.extensions).next().map(str::as_bytes) == Some(extension);
        (!language.popular, !first, language.name)
    };
    candidates.iter().min_by_key(rank).copied()
}

/// What an editor is told in the first lines or the last ones.
fn of_modeline(content: &[u8]) -> Option<&'static Language> {
    let lines: Vec<&[u8]> = lines(content).collect();
    let scope: Vec<&[u8]> = if lines.len() < 2 * MODELINE_SCOPE {
        lines
    } else {
        let (head, tail) = (lines.iter().take(MODELINE_SCOPE), lines.iter().rev().take(MODELINE_SCOPE).rev());
        head.chain(tail).copied().collect()
    };
    let last = |modeline: &Regex| {
        let said = scope.iter().rev().find_map(|line| modeline.captures(line)?.get(1));
        said.map(|said| said.as_bytes().to_vec())
    };
    if let Some(said) = last(&EMACS) {
        let mode = EMACS_MODE.captures(&said).and_then(|found| found.get(1));
        if let Some(language) = by_alias(mode.map_or(said.as_slice(), |mode| mode.as_bytes())) {
            return Some(language);
        }
    }
    let said = last(&VIM)?;
    let mut types =
        VIM_TYPE.captures_iter(&said).filter_map(|found| found.get(1)).map(|name| name.as_bytes());
    let first = types.next()?;
    // Several that contradict each other say nothing.
    if types.all(|other| other == first) { by_alias(first) } else { None }
}

/// The program that the first line gives the file to.
fn interpreter(content: &[u8]) -> Option<Vec<u8>> {
    let line = lines(content).next()?.strip_prefix(b"#!")?;
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).peekable();
    let mut name = base_name(words.next()?).to_vec();
    if name == b"env" {
        let mut word = words.next()?;
        while words.peek().is_some() && (word.starts_with(b"-") || word.contains(&b'=')) {
            word = words.next()?;
        }
        name = base_name(word).to_vec();
    }
    if name == b"sh" {
        let handed_on = lines(content).take(EXEC_SCOPE).find_map(|line| EXEC.captures(line)?.get(1));
        if let Some(handed_on) = handed_on {
            name = handed_on.as_bytes().to_vec();
        }
    }
    if name.starts_with(b"python") {
        let dot = name.iter().position(|byte| *byte == b'.').unwrap_or(name.len());
        name.truncate(dot);
    }
    // It runs other languages, too, which it is told of.
    if name == b"osascript" && contains(line, "-l") {
        return None;
    }
    Some(name)
}

/// By the longest known extension.
fn of_extensions(path: &[u8]) -> &'static [&'static Language] {
    let name = base_name(path).to_ascii_lowercase();
    let dots = name.iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(at, _)| at);
    let mut found = dots.filter_map(|at| name.get(at..)).map(catalogue::by_extension);
    found.find(|languages| !languages.is_empty()).unwrap_or_default()
}

fn of_xml(content: &[u8]) -> Vec<&'static Language> {
    let declared = lines(content).take(XML_SCOPE).any(|line| contains(line, "<?xml version="));
    if declared { by_alias(b"XML").into_iter().collect() } else { Vec::new() }
}

fn of_manpage(path: &[u8]) -> Vec<&'static Language> {
    if !MANPAGE.is_match(&path.to_ascii_lowercase()) {
        return Vec::new();
    }
    ["Roff Manpage", "Roff"].into_iter().filter_map(|name| by_alias(name.as_bytes())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &str, content: &str) -> Option<&'static str> {
        language(path.as_bytes(), content.as_bytes()).map(|language| language.name)
    }

    #[test]
    fn by_what_can_be_told() {
        for (path, content, expected) in [
            ("src/main.rs", "fn main() {}\n", "Rust"),
            ("a/Makefile", "all:\n", "Makefile"),
            ("run", "#!/usr/bin/env -S python3.11 -u\n", "Python"),
            ("run", "#!/bin/sh\nexec ruby -x \"$0\" \"$@\"\n", "Ruby"),
            ("run", "#! /bin/bash\n", "Shell"),
            ("odd.txt", "// vim: set ft=ruby :\n", "Ruby"),
            ("odd.txt", ";; -*- mode: Lisp; tab-width: 4 -*-\n", "Common Lisp"),
            ("odd.txt", "# -*- coding: utf-8 -*-\n", "Text"),
            ("layout", "<?xml version=\"1.0\"?>\n<a/>\n", "XML"),
            ("a.ts", "const a: number = 1;\n", "TypeScript"),
            ("a.d.ts", "declare const a: number;\n", "TypeScript"),
            ("a.ts", "<?xml version=\"1.0\"?>\n<!DOCTYPE TS>\n<TS version=\"2\"></TS>\n", "XML"),
            ("a.html.erb", "<a/>", "HTML+ERB"),
            ("a.pl", "use strict;\nmy $a = 1;\n", "Perl"),
            ("git.1", ".TH GIT 1\n.SH NAME\n", "Roff Manpage"),
            ("A.JAVA", "class A {}\n", "Java"),
        ] {
            assert_eq!(name(path, content), Some(expected), "{path}");
        }
    }

    #[test]
    fn what_cannot_be_told() {
        assert_eq!(name("a.rs", "fn\0main"), None);
        assert_eq!(name("a.no-such-extension", "x"), None);
        assert_eq!(name("run", "#!\n"), None);
        assert_eq!(name("", ""), None);
    }

    #[test]
    fn nothing_tells_them_apart() {
        let languages = catalogue::by_extension(b".cs");
        assert!(languages.len() > 1);
        assert_eq!(most_likely(b".cs", languages).unwrap().name, "C#");
        assert!(most_likely(b".cs", &[]).is_none());
    }
}
