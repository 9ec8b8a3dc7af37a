//! FindLicense: under which license the default branch stands.
//!
//! Gitaly compares a file with all licenses that SPDX lists and takes the most similar one. Here the most used ones are
//! known, each by words that stand in no other; a license file with other words is told of as such.

use tabularium_proto::gitaly::{FindLicenseRequest, FindLicenseResponse};
use tonic::Status;

use crate::{
    git::{catfile::CatFile, objects::ItemKind},
    node::Node,
};

/// As much of a file as is looked at. Licenses are shorter.
const MAX_LICENSE_BYTES: usize = 256 * 1024;
/// So many files are looked at.
const MAX_FILES: usize = 32;

/// A license: how clients know it, and by which words it is known. Of `words` all stand in it, of `without` none.
struct License {
    short_name: &'static str,
    name: &'static str,
    url: &'static str,
    nickname: &'static str,
    words: &'static [&'static str],
    without: &'static [&'static str],
}

const fn license(
    short_name: &'static str,
    name: &'static str,
    url: &'static str,
    words: &'static [&'static str],
) -> License {
    License { short_name, name, url, nickname: "", words, without: &[] }
}

const BSD: &str =
    "redistribution and use in source and binary forms with or without modification are permitted";
const NO_ENDORSEMENT: &str = "neither the name of";

static LICENSES: [License; 15] = [
    license(
        "mit",
        "MIT License",
        "https://opensource.org/licenses/MIT",
        &[
            "to any person obtaining a copy of this software",
            "this permission notice shall be included in all copies",
        ],
    ),
    license(
        "apache-2.0",
        "Apache License 2.0",
        "https://www.apache.org/licenses/LICENSE-2.0",
        &["apache license version 2 0 january 2004"],
    ),
    License {
        nickname: "GNU AGPLv3",
        ..license(
            "agpl-3.0",
            "GNU Affero General Public License v3.0",
            "https://www.gnu.org/licenses/agpl.txt",
            &["gnu affero general public license version 3 19 november 2007"],
        )
    },
    License {
        nickname: "GNU LGPLv3",
        ..license(
            "lgpl-3.0",
            "GNU Lesser General Public License v3.0 only",
            "https://www.gnu.org/licenses/lgpl-3.0-standalone.html",
            &["gnu lesser general public license version 3 29 june 2007"],
        )
    },
    License {
        nickname: "GNU LGPLv2.1",
        ..license(
            "lgpl-2.1",
            "GNU Lesser General Public License v2.1 only",
            "https://www.gnu.org/licenses/old-licenses/lgpl-2.1-standalone.html",
            &["gnu lesser general public license version 2 1 february 1999"],
        )
    },
    license(
        "gpl-3.0+",
        "GNU General Public License v3.0 or later",
        "https://www.gnu.org/licenses/gpl-3.0-standalone.html",
        &["gnu general public license version 3 29 june 2007"],
    ),
    license(
        "gpl-2.0+",
        "GNU General Public License v2.0 or later",
        "https://www.gnu.org/licenses/old-licenses/gpl-2.0-standalone.html",
        &["gnu general public license version 2 june 1991"],
    ),
    license(
        "mpl-2.0",
        "Mozilla Public License 2.0",
        "https://www.mozilla.org/MPL/2.0/",
        &["mozilla public license version 2 0"],
    ),
    license(
        "bsd-3-clause",
        "BSD 3-Clause \"New\" or \"Revised\" License",
        "https://opensource.org/licenses/BSD-3-Clause",
        &[BSD, NO_ENDORSEMENT],
    ),
    License {
        without: &[NO_ENDORSEMENT],
        ..license(
            "bsd-2-clause",
            "BSD 2-Clause \"Simplified\" License",
            "https://opensource.org/licenses/BSD-2-Clause",
            &[BSD],
        )
    },
    license(
        "isc",
        "ISC License",
        "https://www.isc.org/licenses/",
        &[
            "distribute this software for any purpose with or without fee is hereby granted provided that the above",
        ],
    ),
    license(
        "unlicense",
        "The Unlicense",
        "https://unlicense.org/",
        &["free and unencumbered software released into the public domain"],
    ),
    license(
        "bsl-1.0",
        "Boost Software License 1.0",
        "http://www.boost.org/LICENSE_1_0.txt",
        &["boost software license version 1 0"],
    ),
    license(
        "cc0-1.0",
        "Creative Commons Zero v1.0 Universal",
        "https://creativecommons.org/publicdomain/zero/1.0/legalcode",
        &["cc0 1 0 universal"],
    ),
    license(
        "epl-2.0",
        "Eclipse Public License 2.0",
        "https://www.eclipse.org/legal/epl-2.0",
        &["eclipse public license v 2 0"],
    ),
];

/// Words in lower case with a space between them: how they are laid out and punctuated does not matter.
fn words_of(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text).to_lowercase();
    let words = text.split(|character: char| !character.is_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

fn identify(text: &[u8]) -> Option<&'static License> {
    let text = words_of(text);
    let stands = |words: &&str| text.contains(words);
    LICENSES.iter().find(|license| license.words.iter().all(stands) && !license.without.iter().any(stands))
}

/// Whether a file is called as licenses are: one of the words of its name says so.
fn is_license_file(name: &str) -> bool {
    name.to_lowercase().split(['-', '_', '.', ' ']).any(|word| {
        let gpl = word.trim_start_matches('l').strip_prefix("gpl");
        matches!(
            word,
            "license"
                | "licence"
                | "lisence"
                | "lisense"
                | "licenses"
                | "licences"
                | "unlicense"
                | "unlicence"
                | "legal"
                | "copying"
                | "copyright"
                | "copyleft"
                | "bsd"
                | "mit"
                | "apache"
        ) || gpl.is_some_and(|version| {
            version.chars().all(|character| character == 'v' || character.is_ascii_digit())
        })
    })
}

/// The project's own license, not one of something that it contains.
fn is_canonical(name: &str) -> bool {
    let name = name.to_lowercase();
    let stem = [".md", ".txt", ".html", ".rst"].iter().find_map(|extension| name.strip_suffix(extension));
    matches!(stem.unwrap_or(&name), "license" | "licence" | "unlicense" | "unlicence" | "copying")
}

pub(super) async fn find(node: &Node, request: &FindLicenseRequest) -> Result<FindLicenseResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let mut objects = CatFile::start(&node.git, &repository).await?;
    let items = objects.tree(b"HEAD^{tree}").await?.unwrap_or_default();
    let files = items.into_iter().filter(|item| ItemKind::of_mode(item.mode) == ItemKind::Blob);
    let named = files.filter_map(|item| Some((String::from_utf8(item.name).ok()?, item.id)));
    let mut candidates: Vec<(String, String)> =
        named.filter(|(name, _)| is_license_file(name)).take(MAX_FILES).collect();
    let first = candidates.first().map(|(name, _)| name.clone());
    candidates.sort_by_key(|(name, _)| !is_canonical(name));
    for (name, id) in candidates {
        let Some(text) = objects.beginning(id.as_bytes(), MAX_LICENSE_BYTES).await? else { continue };
        if let Some(license) = identify(&text) {
            objects.close().await?;
            return Ok(FindLicenseResponse {
                license_short_name: license.short_name.to_owned(),
                license_name: license.name.to_owned(),
                license_url: license.url.to_owned(),
                license_path: name,
                license_nickname: license.nickname.to_owned(),
            });
        }
    }
    objects.close().await?;
    Ok(first.map_or_else(FindLicenseResponse::default, |license_path| FindLicenseResponse {
        license_short_name: "other".to_owned(),
        license_name: "Other".to_owned(),
        license_path,
        license_nickname: "LICENSE".to_owned(),
        ..FindLicenseResponse::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_license_files() {
        for name in
            ["LICENSE", "Licence.md", "COPYING", "MIT.txt", "LICENSE-APACHE", "gplv3", "LGPL", "my license"]
        {
            assert!(is_license_file(name), "{name}");
        }
        for name in ["README.md", "limit", "smith.c", "licensed", "permit"] {
            assert!(!is_license_file(name), "{name}");
        }
        assert!(is_canonical("License.TXT") && is_canonical("copying") && !is_canonical("LICENSE-MIT"));
    }

    #[test]
    fn licenses_are_known_by_their_words() {
        for license in &LICENSES {
            let text = license.words.join(",\n  ").to_uppercase();
            assert_eq!(identify(text.as_bytes()).map(|found| found.short_name), Some(license.short_name));
        }
        assert!(identify(b"Do what you like.").is_none());
    }
}
