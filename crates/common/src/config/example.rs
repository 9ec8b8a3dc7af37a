//! What an example of a configuration file leaves out. For the tests of services, whose examples are to show operators every
//! key there is.

use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// A key that no configuration has.
const NO_KEY: &str = "no-such-key";

/// The example with all that is commented out in it: lines such as `# key = value` and `# [table]`.
pub fn uncommented(example: &str) -> String {
    let lines = example.lines().map(|line| match line.strip_prefix("# ") {
        Some(setting) if is_setting(setting) => setting,
        _ => line,
    });
    lines.flat_map(|line| [line, "\n"]).collect()
}

fn is_setting(text: &str) -> bool {
    let is_key = |key: &str| key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let is_table = text.starts_with('[') && text.ends_with(']');
    is_table || text.split_once(" = ").is_some_and(|(key, _)| is_key(key))
}

/// Keys that a configuration may have and `text` has not, dotted; and tables that take any key. An error when `text` is no
/// such configuration.
pub fn missing_keys<C: DeserializeOwned>(text: &str) -> Result<Vec<String>, toml::de::Error> {
    let root: Table = toml::from_str(text)?;
    C::deserialize(root.clone())?;
    let mut tables = Vec::new();
    list_tables(&root, &mut Vec::new(), &mut tables);
    let mut missing = Vec::new();
    for path in tables {
        let mut changed = root.clone();
        let Some(table) = table_at(&mut changed, &path) else { continue };
        table.insert(NO_KEY.to_owned(), Value::Boolean(true));
        let shown: Vec<String> = table.keys().cloned().collect();
        let dotted = |key: &str| path.iter().copied().chain([key]).collect::<Vec<_>>().join(".");
        match C::deserialize(changed) {
            Ok(_) => missing.push(dotted("*")),
            Err(error) => {
                let keys = allowed(error.message());
                missing.extend(keys.into_iter().filter(|key| !shown.contains(key)).map(|key| dotted(&key)));
            }
        }
    }
    Ok(missing)
}

/// The paths of all tables; of those in a list, of the first.
fn list_tables<'t>(table: &'t Table, path: &mut Vec<&'t str>, found: &mut Vec<Vec<&'t str>>) {
    found.push(path.clone());
    for (key, value) in table {
        if let Some(inner) = inner_table(value) {
            path.push(key);
            list_tables(inner, path, found);
            path.pop();
        }
    }
}

fn inner_table(value: &Value) -> Option<&Table> {
    value.as_table().or_else(|| value.as_array()?.first()?.as_table())
}

fn table_at<'t>(root: &'t mut Table, path: &[&str]) -> Option<&'t mut Table> {
    path.iter().try_fold(root, |table, key| match table.get_mut(*key)? {
        Value::Table(inner) => Some(inner),
        Value::Array(list) => list.first_mut()?.as_table_mut(),
        _ => None,
    })
}

/// The keys that the refusal of an unknown one names.
fn allowed(refusal: &str) -> Vec<String> {
    let named = refusal.split_once(", expected ").map(|(_, named)| named).unwrap_or_default();
    named.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Config {
        name: String,
        #[serde(default)]
        size: u32,
        #[serde(default, rename = "place")]
        places: Vec<Place>,
        #[serde(default)]
        limits: Limits,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Place {
        path: String,
        #[serde(default)]
        mode: u32,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Limits {
        most: u32,
    }

    #[test]
    fn every_key_that_is_not_shown_is_missed() {
        let missing = |text| missing_keys::<Config>(text).unwrap();
        assert_eq!(missing("name = \"a\""), ["size", "place", "limits"]);
        assert_eq!(missing("name = \"a\"\nsize = 1\nplace = []\nlimits = {}"), ["limits.*"]);
        let places = "name = \"a\"\nsize = 1\n[[place]]\npath = \"x\"\n[[place]]\npath = \"y\"\nmode = 1\n";
        assert_eq!(missing(places), ["limits", "place.mode"]);
        assert!(missing_keys::<Config>("nmae = 1").is_err());
    }

    #[test]
    fn settings_are_told_from_prose() {
        let example =
            "# A word = another.\n# [table] of this.\na = 1\n# b_2 = \"x\"\n# [[c]]\n# d = 2 # so\n";
        let expected = "# A word = another.\n# [table] of this.\na = 1\nb_2 = \"x\"\n[[c]]\nd = 2 # so\n";
        assert_eq!(uncommented(example), expected);
    }
}
