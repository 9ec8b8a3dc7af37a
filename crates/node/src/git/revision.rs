//! What clients may hand to git as a revision or a reference name (wire reference, section h.5). Everything that
//! reaches a git command line or its stdin passes through here first.

use tokio::io::AsyncReadExt as _;

use crate::{error::GitError, storage::RepositoryPath};

/// Why a revision was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RevisionError {
    /// Nothing given.
    #[error("empty revision")]
    Empty,
    /// Git would take it for an option.
    #[error("revision can't start with '-'")]
    LeadingDash,
    /// Ends the text for C programs.
    #[error("revision can't contain NUL")]
    Nul,
    /// Separates arguments in git's line protocols.
    #[error("revision can't contain whitespace")]
    Whitespace,
    /// Leads from the revision into its tree.
    #[error("revision can't contain ':'")]
    Colon,
    /// Not allowed in any reference.
    #[error("revision can't contain '\\'")]
    Backslash,
}

/// A plain revision: a name, an id, and the suffixes such as `^{tree}` or `~3`.
pub(crate) fn check(revision: &[u8]) -> Result<(), RevisionError> {
    if revision.is_empty() {
        return Err(RevisionError::Empty);
    }
    if revision.starts_with(b"-") {
        return Err(RevisionError::LeadingDash);
    }
    for byte in revision {
        match byte {
            0 => return Err(RevisionError::Nul),
            b' ' | b'\t' | b'\n' | b'\r' => return Err(RevisionError::Whitespace),
            b':' => return Err(RevisionError::Colon),
            b'\\' => return Err(RevisionError::Backslash),
            _ => {}
        }
    }
    Ok(())
}

/// A plain revision, or none.
pub(crate) fn check_or_empty(revision: &[u8]) -> Result<(), RevisionError> {
    if revision.is_empty() { Ok(()) } else { check(revision) }
}

/// `revision:path` or a plain revision; only the part before the colon is held to the rules, and nothing may hold a NUL.
pub(crate) fn check_path_scoped(revision: &[u8]) -> Result<(), RevisionError> {
    if revision.contains(&0) && !revision.starts_with(b"-") {
        return Err(RevisionError::Nul);
    }
    match revision.iter().position(|byte| *byte == b':') {
        Some(at) => check(revision.get(..at).unwrap_or_default()),
        None => check(revision),
    }
}

/// A plain revision, or one of the options that stand for many.
pub(crate) fn check_pseudo(revision: &[u8]) -> Result<(), RevisionError> {
    pseudo(revision).unwrap_or_else(|| check(revision))
}

/// The same, or `revision:path`.
pub(crate) fn check_pseudo_or_path_scoped(revision: &[u8]) -> Result<(), RevisionError> {
    pseudo(revision).unwrap_or_else(|| check_path_scoped(revision))
}

/// Whether an option that stands for revisions is a good one; `None` if it is no such option.
fn pseudo(revision: &[u8]) -> Option<Result<(), RevisionError>> {
    const WHOLE: [&[u8]; 5] = [b"--all", b"--not", b"--branches", b"--tags", b"--alternate-refs"];
    const PREFIXES: [&[u8]; 3] = [b"--branches=", b"--tags=", b"--glob="];
    if WHOLE.contains(&revision) {
        return Some(Ok(()));
    }
    let pattern = PREFIXES.iter().find_map(|prefix| revision.strip_prefix(*prefix))?;
    Some(if pattern.contains(&0) {
        Err(RevisionError::Nul)
    } else if pattern.contains(&b'\n') {
        Err(RevisionError::Whitespace)
    } else {
        Ok(())
    })
}

/// Git would take it for an option.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("positional arg {0:?} cannot start with dash '-': invalid argument")]
pub(crate) struct ArgumentError(String);

/// Something that git itself is to make sense of, as long as it is no option.
pub(crate) fn check_argument(argument: &[u8]) -> Result<(), ArgumentError> {
    if argument.starts_with(b"-") {
        return Err(ArgumentError(String::from_utf8_lossy(argument).into_owned()));
    }
    Ok(())
}

/// A full reference name that git would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReferenceError {
    /// Nothing that is named so can be deleted or created at will.
    #[error("HEAD reference not allowed")]
    Head,
    /// Not below `refs/`.
    #[error("reference is not fully qualified")]
    NotFull,
    /// Nothing below `refs/`.
    #[error("refs/ is not a valid reference")]
    Top,
    /// A directory.
    #[error("reference must not end with slash")]
    EndsWithSlash,
    /// Git takes care of file systems that forget the dot.
    #[error("reference must not end with dot")]
    EndsWithDot,
    /// Leads into the reflog.
    #[error("reference must not contain @{{")]
    Reflog,
    /// A range.
    #[error("reference must not contain double dots")]
    DoubleDots,
    /// Separates arguments in git's line protocols.
    #[error("reference must not contain space characters")]
    Space,
    /// Has a meaning in revisions or patterns.
    #[error("reference must not contain special characters")]
    Special,
    /// Cannot be seen.
    #[error("reference must not contain control characters")]
    Control,
    /// Two slashes in a row.
    #[error("empty component is not allowed")]
    EmptyComponent,
    /// A hidden file.
    #[error("component must not start with dot")]
    HiddenComponent,
    /// Git's own, beside a reference that is being written.
    #[error("component must not end with .lock")]
    LockComponent,
}

/// A full reference name under `refs/`.
pub(crate) fn check_reference(name: &[u8]) -> Result<(), ReferenceError> {
    if name == b"HEAD" {
        return Err(ReferenceError::Head);
    }
    let rest = name.strip_prefix(b"refs/").ok_or(ReferenceError::NotFull)?;
    let has = |pair: &[u8]| rest.windows(2).any(|window| window == pair);
    let sound = |wrong: bool, error: ReferenceError| if wrong { Err(error) } else { Ok(()) };
    sound(rest.is_empty(), ReferenceError::Top)?;
    sound(rest.ends_with(b"/"), ReferenceError::EndsWithSlash)?;
    sound(rest.ends_with(b"."), ReferenceError::EndsWithDot)?;
    sound(has(b"@{"), ReferenceError::Reflog)?;
    sound(has(b".."), ReferenceError::DoubleDots)?;
    for byte in rest {
        match byte {
            b' ' | b'\t' | b'\n' => return Err(ReferenceError::Space),
            b':' | b'?' | b'[' | b'\\' | b'^' | b'~' | b'*' | 0x7f => return Err(ReferenceError::Special),
            0..0x20 => return Err(ReferenceError::Control),
            _ => {}
        }
    }
    for component in rest.split(|byte| *byte == b'/') {
        sound(component.is_empty(), ReferenceError::EmptyComponent)?;
        sound(component.starts_with(b"."), ReferenceError::HiddenComponent)?;
        sound(component.ends_with(b".lock"), ReferenceError::LockComponent)?;
    }
    Ok(())
}

/// The full name of a branch; a full name is taken as it is.
pub(crate) fn branch_reference(branch: &[u8]) -> Vec<u8> {
    prefixed(b"refs/heads/", branch)
}

fn prefixed(prefix: &[u8], name: &[u8]) -> Vec<u8> {
    if name.starts_with(prefix) { name.to_vec() } else { [prefix, name].concat() }
}

/// The full name of a tag.
pub(crate) fn tag_reference(tag: &[u8]) -> Vec<u8> {
    [b"refs/tags/", tag].concat()
}

/// Which hash a repository uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectHash {
    /// 20 bytes.
    Sha1,
    /// 32 bytes.
    Sha256,
}

/// A text that is not an object id of the repository's hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ObjectIdError {
    /// Too short or too long.
    #[error("invalid object ID: {text:?}, expected length {expected}, got {}", .text.len())]
    Length {
        /// What was given.
        text: String,
        /// Length of an id.
        expected: usize,
    },
    /// Not hexadecimal, or not in lower case.
    #[error("invalid object ID: {text:?}, invalid character {character:?}")]
    Character {
        /// What was given.
        text: String,
        /// The first that does not belong there.
        character: char,
    },
}

/// Largest configuration file that is looked at.
const MAX_CONFIG_BYTES: u64 = 1024 * 1024;

impl ObjectHash {
    /// The hash of a repository, from its configuration.
    pub(crate) async fn of(repository: &RepositoryPath) -> Result<Self, GitError> {
        let read = async {
            let file = tokio::fs::File::open(repository.path.join("config")).await?;
            let mut config = Vec::new();
            file.take(MAX_CONFIG_BYTES).read_to_end(&mut config).await?;
            Ok::<_, std::io::Error>(config)
        };
        match read.await {
            Ok(config) => Ok(Self::of_config(&config)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::Sha1),
            Err(source) => Err(GitError::Io { subcommand: "config", source }),
        }
    }

    /// `extensions.objectFormat`; the section is not looked at, because no other has such a key.
    fn of_config(config: &[u8]) -> Self {
        let sha256 = config.split(|byte| *byte == b'\n').any(|line| {
            let mut words = line.splitn(2, |byte| *byte == b'=').map(<[u8]>::trim_ascii);
            words.next().is_some_and(|key| key.eq_ignore_ascii_case(b"objectformat"))
                && words.next().is_some_and(|value| value.eq_ignore_ascii_case(b"sha256"))
        });
        if sha256 { Self::Sha256 } else { Self::Sha1 }
    }

    /// As git calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }

    /// Bytes of an id.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// The id that stands for "no object".
    pub(crate) fn zero(self) -> String {
        "0".repeat(2 * self.bytes())
    }

    /// A full id in hex; lower case, as git prints them.
    pub(crate) fn parse(self, text: &[u8]) -> Result<String, ObjectIdError> {
        let (length, expected) = (text.len(), 2 * self.bytes());
        let text = String::from_utf8_lossy(text).into_owned();
        if length != expected {
            return Err(ObjectIdError::Length { text, expected });
        }
        match text.chars().find(|character| !matches!(character, '0'..='9' | 'a'..='f')) {
            Some(character) => Err(ObjectIdError::Character { text, character }),
            None => Ok(text),
        }
    }

    /// The id of a tree without entries. Git knows it without having it.
    pub(crate) fn empty_tree(self) -> &'static str {
        match self {
            Self::Sha1 => "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
            Self::Sha256 => "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
        }
    }

    /// The id of a file without content.
    pub(crate) fn empty_blob(self) -> &'static str {
        match self {
            Self::Sha1 => "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
            Self::Sha256 => "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
        }
    }
}

/// Whether this is the id that stands for "no object".
pub(crate) fn is_zero(id: &str) -> bool {
    id.bytes().all(|byte| byte == b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions() {
        for good in ["main", "HEAD^{tree}", "refs/heads/a-b~3", "a..b", "^x", "v1^{}"] {
            assert_eq!(check(good.as_bytes()), Ok(()), "{good}");
        }
        for (bad, error) in [
            ("", RevisionError::Empty),
            ("-x", RevisionError::LeadingDash),
            ("a\0", RevisionError::Nul),
            ("a b", RevisionError::Whitespace),
            ("a\nb", RevisionError::Whitespace),
            ("a:b", RevisionError::Colon),
            ("a\\b", RevisionError::Backslash),
            ("--all", RevisionError::LeadingDash),
        ] {
            assert_eq!(check(bad.as_bytes()), Err(error), "{bad:?}");
        }
        assert_eq!(check_or_empty(b""), Ok(()));
        assert_eq!(check_path_scoped(b"main:a b\\c"), Ok(()));
        assert_eq!(check_path_scoped(b"-x:a"), Err(RevisionError::LeadingDash));
        assert_eq!(check_path_scoped(b":a"), Err(RevisionError::Empty));
        assert_eq!(check_path_scoped(b"main:a\0"), Err(RevisionError::Nul));
        assert_eq!(check_pseudo_or_path_scoped(b"main:a b"), Ok(()));
        assert_eq!(check_pseudo_or_path_scoped(b"--tags=v1:*"), Ok(()));
        assert_eq!(check_pseudo_or_path_scoped(b"--output=x"), Err(RevisionError::LeadingDash));
        for good in ["--all", "--not", "--branches=a*", "--glob=refs/x y", "--tags", "main"] {
            assert_eq!(check_pseudo(good.as_bytes()), Ok(()), "{good}");
        }
        assert_eq!(check_argument(b"a b:c\\"), Ok(()));
        assert_eq!(
            check_argument(b"--output=x").unwrap_err().to_string(),
            "positional arg \"--output=x\" cannot start with dash '-': invalid argument"
        );
        assert_eq!(check_pseudo(b"--output=/etc/passwd"), Err(RevisionError::LeadingDash));
        assert_eq!(check_pseudo(b"--glob=a\nb"), Err(RevisionError::Whitespace));
    }

    #[test]
    fn reference_names() {
        for good in
            ["refs/heads/main", "refs/x", "refs/heads/a/b-c", "refs/heads/a@b", "refs/heads/gr\u{fc}n"]
        {
            assert_eq!(check_reference(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in [
            "HEAD",
            "refs/",
            "refs",
            "heads/x",
            "refs/heads/",
            "refs/heads/a.",
            "refs/heads//a",
            "refs/heads/.a",
            "refs/heads/a.lock",
            "refs/heads/a.lock/b",
            "refs/heads/a..b",
            "refs/heads/a@{1}",
            "refs/heads/a b",
            "refs/heads/a:b",
            "refs/heads/a?",
            "refs/heads/a*",
            "refs/heads/a[",
            "refs/heads/a\\",
            "refs/heads/a^",
            "refs/heads/a~",
            "refs/heads/a\x7f",
            "refs/heads/a\n",
        ] {
            assert!(check_reference(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(branch_reference(b"x"), b"refs/heads/x");
        assert_eq!(branch_reference(b"refs/heads/x"), b"refs/heads/x");
    }

    #[test]
    fn object_ids() {
        let id = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
        assert_eq!(ObjectHash::Sha1.parse(id.as_bytes()).unwrap(), id);
        assert!(ObjectHash::Sha256.parse(id.as_bytes()).is_err());
        assert!(ObjectHash::Sha1.parse(id.to_uppercase().as_bytes()).is_err());
        assert_eq!(
            ObjectHash::Sha1.parse(b"HEAD").unwrap_err().to_string(),
            "invalid object ID: \"HEAD\", expected length 40, got 4"
        );
        let odd = format!("{}g", &id[1..]);
        assert_eq!(
            ObjectHash::Sha1.parse(odd.as_bytes()).unwrap_err().to_string(),
            format!("invalid object ID: \"{odd}\", invalid character 'g'")
        );
        assert!(is_zero(&ObjectHash::Sha256.zero()));
        let config = b"[core]\n\tbare = true\n[extensions]\n\tObjectFormat = sha256\n";
        assert_eq!(ObjectHash::of_config(config), ObjectHash::Sha256);
        assert_eq!(ObjectHash::of_config(b"[core]\n\tbare = true\n"), ObjectHash::Sha1);
    }
}
