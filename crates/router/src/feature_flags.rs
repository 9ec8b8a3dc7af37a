//! Feature flags of Gitaly, for all nodes alike.
//!
//! GitLab names the flags that it has an opinion on; of the others every Gitaly takes its own version's default. While nodes
//! are of two versions that makes them do different things of the same write. Praefect therefore adds its own defaults, those
//! of the version that it was built from. A router is of no version of Gitaly, so what it adds is configured.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

/// How the metadata of a flag begins; behind it stands the name, with `-` for `_`.
const PREFIX: &str = "gitaly-feature-";

/// A name that no flag has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a feature flag: small letters, digits and `_`")]
pub struct FlagNameError(String);

/// What is said of flags that a client says nothing of.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(try_from = "BTreeMap<String, bool>")]
pub struct FeatureFlags(Vec<(HeaderName, HeaderValue)>);

impl TryFrom<BTreeMap<String, bool>> for FeatureFlags {
    type Error = FlagNameError;

    fn try_from(flags: BTreeMap<String, bool>) -> Result<Self, FlagNameError> {
        let key = |name: &str| {
            let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
            let sound = !name.is_empty() && name.bytes().all(known);
            let key = format!("{PREFIX}{}", name.replace('_', "-"));
            HeaderName::try_from(key).ok().filter(|_| sound).ok_or_else(|| FlagNameError(name.to_owned()))
        };
        let value = |on| HeaderValue::from_static(if on { "true" } else { "false" });
        flags.into_iter().map(|(name, on)| Ok((key(&name)?, value(on)))).collect::<Result<_, _>>().map(Self)
    }
}

impl FeatureFlags {
    /// Says what the client has left open.
    pub(crate) fn add_to(&self, headers: &mut HeaderMap) {
        for (key, value) in &self.0 {
            if !headers.contains_key(key) {
                headers.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_says_counts_and_what_it_leaves_open_is_said() {
        let given = [("new_way", true), ("old_way", false), ("third_1", true)];
        let flags: BTreeMap<_, _> = given.into_iter().map(|(name, on)| (name.to_owned(), on)).collect();
        let flags = FeatureFlags::try_from(flags).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("gitaly-feature-new-way", HeaderValue::from_static("false"));
        flags.add_to(&mut headers);
        let said = |name: &str| headers[name].to_str().unwrap();
        assert_eq!(said("gitaly-feature-new-way"), "false");
        assert_eq!(said("gitaly-feature-old-way"), "false");
        assert_eq!(said("gitaly-feature-third-1"), "true");
        for wrong in ["", "New_way", "new-way", "a b", "\u{e9}"] {
            let refused = FeatureFlags::try_from(BTreeMap::from([(wrong.to_owned(), true)])).unwrap_err();
            assert_eq!(refused, FlagNameError(wrong.to_owned()));
        }
    }
}
