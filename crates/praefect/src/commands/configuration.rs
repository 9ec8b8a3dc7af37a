//! What a file says, and whether it can be used.

use std::io::Read;

use serde_json::json;

use super::{Failure, Out};
use crate::{
    arguments::ListStorages,
    file::{
        File, faults,
        read::{ReadError, parse},
    },
};

/// Exit code of a file that cannot be used.
const INVALID: u8 = 2;
/// Largest file that is read.
const MAX_BYTES: u64 = 1024 * 1024;

/// `list-storages`.
pub(super) fn list_storages(file: &File, which: &ListStorages, out: Out<'_>) -> Result<(), Failure> {
    let wanted = which.virtual_storage.as_str();
    if !wanted.is_empty() && !file.virtual_storages.iter().any(|known| known.name == wanted) {
        return Ok(writeln!(out, "No virtual storages named {wanted}.")?);
    }
    let mut rows = vec![["VIRTUAL_STORAGE", "NODE", "ADDRESS"]];
    for known in file.virtual_storages.iter().filter(|known| wanted.is_empty() || known.name == wanted) {
        rows.extend(known.nodes.iter().map(|node| [known.name.as_str(), &node.storage, &node.address]));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (first, second, third) = (width(0), width(1), width(2));
    for (index, [storage, node, address]) in rows.iter().enumerate() {
        // Praefect's own heading has no tab at its end, but a blank.
        let end = if index == 0 { ' ' } else { '\t' };
        writeln!(out, "{storage:first$}\t{node:second$}\t{address:third$}{end}")?;
    }
    Ok(())
}

/// `configuration validate`.
pub(super) fn validate(input: impl Read, out: Out<'_>) -> Result<(), Failure> {
    let mut text = String::new();
    input.take(MAX_BYTES).read_to_string(&mut text)?;
    let errors = match parse(&text) {
        Ok(read) => faults::all(&read.file)
            .into_iter()
            .map(|fault| {
                let message = json!({ "message": fault.message });
                if fault.key.is_empty() {
                    message
                } else {
                    json!({ "key": fault.key, "message": fault.message })
                }
            })
            .collect::<Vec<_>>(),
        Err(ReadError::Toml { message, line, column }) => {
            vec![json!({ "message": format!("line {line} column {column}: toml: {message}") })]
        }
        Err(error) => return Err(Failure::Told(format!("processing input data: {error}"))),
    };
    if errors.is_empty() {
        return Ok(());
    }
    let shown = serde_json::to_string_pretty(&json!({ "errors": errors })).map_err(std::io::Error::other)?;
    writeln!(out, "{shown}")?;
    Err(Failure::Code(INVALID))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validation_is_json_with_an_exit_code() {
        let validated = |text: &str| {
            let mut out = Vec::new();
            let outcome = validate(text.as_bytes(), &mut out);
            (outcome.map_err(|failure| matches!(failure, Failure::Code(2))), String::from_utf8(out).unwrap())
        };
        let usable = "socket_path = '/s'\n[[virtual_storage]]\nname = 'a'\n[[virtual_storage.node]]\nstorage = 's'\naddress = 'unix:/a'";
        assert_eq!(validated(usable), (Ok(()), String::new()));
        let (outcome, told) = validated(&usable.replace("/s", ""));
        assert_eq!(outcome, Err(true));
        assert_eq!(
            told,
            "{\n  \"errors\": [\n    {\n      \"message\": \"none of \\\"socket_path\\\", \\\"listen_addr\\\" or \\\"tls_listen_addr\\\" is set\"\n    }\n  ]\n}\n"
        );
        let (outcome, told) = validated("a = ");
        assert_eq!(outcome, Err(true));
        assert!(told.contains("\"line 1 column "), "{told}");
    }

    #[test]
    fn storages_are_a_table_with_tabs() {
        let file = parse("[[virtual_storage]]\nname = 'default'\n[[virtual_storage.node]]\nstorage = 'g-1'\naddress = 'unix:/a'").unwrap().file;
        let listed = |name: &str| {
            let mut out = Vec::new();
            list_storages(&file, &ListStorages { virtual_storage: name.into() }, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(listed(""), "VIRTUAL_STORAGE\tNODE\tADDRESS \ndefault        \tg-1 \tunix:/a\t\n");
        assert_eq!(listed("default"), listed(""));
        assert_eq!(listed("x"), "No virtual storages named x.\n");
    }
}
