//! The names and numbers of the domain. A value of one of these types has been checked; what comes from outside is
//! parsed into them at the edge and nowhere else.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest storage, virtual storage or site name, in bytes. Names become NATS subject tokens and directory names.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest relative path, in bytes. Well below `PATH_MAX`, so that storage root and lock suffix still fit.
pub const MAX_RELATIVE_PATH_BYTES: usize = 1024;

/// Why a text is not a valid name or path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// Nothing was given.
    #[error("must not be empty")]
    Empty,
    /// More bytes than the limit.
    #[error("is longer than {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
    /// A character that is not allowed.
    #[error("contains {found:?}; allowed are letters, digits, '-' and '_'")]
    Character {
        /// The first offender.
        found: char,
    },
    /// A relative path with `..`, an absolute path, or one that names the storage itself (wire reference, section h.2).
    #[error("relative path escapes root directory")]
    Escapes,
    /// A path with a NUL byte or a control character.
    #[error("contains a control character")]
    Control,
}

fn check_name(text: &str) -> Result<(), ParseIdError> {
    if text.is_empty() {
        return Err(ParseIdError::Empty);
    }
    if text.len() > MAX_NAME_BYTES {
        return Err(ParseIdError::TooLong { limit: MAX_NAME_BYTES });
    }
    match text.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))) {
        Some(found) => Err(ParseIdError::Character { found }),
        None => Ok(()),
    }
}

/// Normalises a path below a storage: no leading or doubled separators, no `.`; `..` is refused.
fn check_path(text: &str) -> Result<String, ParseIdError> {
    if text.is_empty() {
        return Err(ParseIdError::Empty);
    }
    if text.len() > MAX_RELATIVE_PATH_BYTES {
        return Err(ParseIdError::TooLong { limit: MAX_RELATIVE_PATH_BYTES });
    }
    if text.chars().any(char::is_control) {
        return Err(ParseIdError::Control);
    }
    if text.starts_with('/') || text.split('/').any(|part| part == "..") {
        return Err(ParseIdError::Escapes);
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() {
        return Err(ParseIdError::Escapes);
    }
    Ok(parts.join("/"))
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $parse:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The checked text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                #[allow(clippy::redundant_closure_call, reason = "the macro takes the check as an expression")]
                ($parse)(text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id!(
    /// A storage: one node's disk. Gitaly's physical storage name.
    StorageName,
    |text: &str| check_name(text).map(|()| text.to_owned())
);
text_id!(
    /// A virtual storage: what clients of the router call a storage.
    VirtualStorageName,
    |text: &str| check_name(text).map(|()| text.to_owned())
);
text_id!(
    /// A site: one whole cluster.
    SiteName,
    |text: &str| check_name(text).map(|()| text.to_owned())
);
text_id!(
    /// The path by which clients name a repository inside a virtual storage, normally ending in `.git`.
    RelativePath,
    check_path
);
text_id!(
    /// The path at which every replica of a repository is kept below its storage. Looked up, never derived by a reader.
    ReplicaPath,
    check_path
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id!(
    /// A repository's immutable number, unique in its cluster.
    RepositoryId
);
number_id!(
    /// How many writes a repository, or one replica of it, has seen. Rises by one with every recorded write.
    Generation
);
number_id!(
    /// How often a repository's primary has moved. A write begun under an older epoch is refused.
    Epoch
);

impl Generation {
    /// The generation of a replica about which nothing is known (wire reference, section b.10).
    pub const UNKNOWN: Self = Self(-1);

    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl ReplicaPath {
    /// Where a new repository is kept: `@cluster/repositories/<x>/<y>/<id>`, the first two bytes of the SHA-256 of the
    /// decimal id in hexadecimal (wire reference, section k.2).
    pub fn for_repository(id: RepositoryId) -> Self {
        Self(cluster_path("repositories", id))
    }

    /// Where a new object pool is kept: `@cluster/pools/<x>/<y>/<id>` (section k.2).
    pub fn for_object_pool(id: RepositoryId) -> Self {
        Self(cluster_path("pools", id))
    }
}

fn cluster_path(kind: &str, id: RepositoryId) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(id.to_string().as_bytes());
    format!("@cluster/{kind}/{:02x}/{:02x}/{id}", digest[0], digest[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leaves_the_storage_is_refused() {
        for text in ["../x", "a/../../x", "/etc", "a/..", ".", "./"] {
            assert_eq!(text.parse::<RelativePath>(), Err(ParseIdError::Escapes), "{text}");
        }
        assert_eq!("".parse::<RelativePath>(), Err(ParseIdError::Empty));
        assert_eq!("a\0b".parse::<RelativePath>(), Err(ParseIdError::Control));
        assert_eq!("a//b/./c.git".parse::<RelativePath>().unwrap().as_str(), "a/b/c.git");
    }

    #[test]
    fn names_are_single_subject_tokens() {
        assert!("gitaly-1".parse::<StorageName>().is_ok());
        assert_eq!("a.b".parse::<StorageName>(), Err(ParseIdError::Character { found: '.' }));
        assert_eq!("a>".parse::<SiteName>(), Err(ParseIdError::Character { found: '>' }));
    }

    /// Vector from the wire reference, appendix 3.
    #[test]
    fn replica_paths_are_those_of_praefect() {
        assert_eq!(ReplicaPath::for_repository(RepositoryId(1)).as_str(), "@cluster/repositories/6b/86/1");
        assert_eq!(ReplicaPath::for_object_pool(RepositoryId(1)).as_str(), "@cluster/pools/6b/86/1");
    }
}
