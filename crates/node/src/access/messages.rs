//! What GitLab has to say after a push (that a merge request can be opened, that a project has moved, a banner), laid out
//! as GitLab's users know it.

use serde::Deserialize;

/// Columns of a terminal that are left beside git's `remote: `.
const WIDTH: usize = 72;
/// Columns that text of an alert may take.
const TEXT_WIDTH: usize = WIDTH - 4;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Message {
    #[serde(default)]
    message: String,
    #[serde(default, rename = "type")]
    kind: String,
}

/// A kind of message that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("error writing messages to stream: invalid message type: {0}")]
pub(crate) struct UnknownKind(String);

/// The text of all messages up to one that is not known, and that.
pub(crate) fn lay_out(messages: &[Message]) -> (String, Option<UnknownKind>) {
    let mut text = String::new();
    for message in messages {
        text.push('\n');
        match message.kind.as_str() {
            "basic" => text.push_str(&message.message),
            "alert" => push_alert(&mut text, &message.message),
            unknown => return (text, Some(UnknownKind(unknown.to_owned()))),
        }
        text.push_str("\n\n");
    }
    (text, None)
}

/// Between two rules, wrapped and centred. Widths are counted in bytes, as in Gitaly.
fn push_alert(text: &mut String, message: &str) {
    let rule = "=".repeat(WIDTH);
    text.push_str(&rule);
    text.push_str("\n\n");
    let mut line = String::new();
    for word in message.split_whitespace() {
        // The space that is still behind the last word counts, and so does the one that would come behind this one.
        if line.len() + 1 + word.len() > TEXT_WIDTH {
            push_centred(text, &line);
            text.push('\n');
            line.clear();
        }
        line.push_str(word);
        line.push(' ');
    }
    push_centred(text, &line);
    text.push_str("\n\n");
    text.push_str(&rule);
}

fn push_centred(text: &mut String, line: &str) {
    let line = line.trim();
    text.push_str(&" ".repeat(WIDTH.saturating_sub(line.len()) / 2));
    text.push_str(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: &str, message: &str) -> Message {
        Message { kind: kind.to_owned(), message: message.to_owned() }
    }

    #[test]
    fn a_basic_message_stands_as_it_is_and_apart() {
        let messages = [message("basic", "To create a merge request:\n  http://x"), message("basic", "b")];
        assert_eq!(
            lay_out(&messages),
            ("\nTo create a merge request:\n  http://x\n\n\nb\n\n".to_owned(), None)
        );
        assert_eq!(lay_out(&[]), (String::new(), None));
    }

    #[test]
    fn an_alert_stands_in_the_middle_between_rules() {
        let rule = "=".repeat(72);
        let (text, unknown) = lay_out(&[message("alert", "  a   b ")]);
        assert_eq!(unknown, None);
        assert_eq!(text, format!("\n{rule}\n\n{}a b\n\n{rule}\n\n", " ".repeat(34)));
    }

    #[test]
    fn long_alerts_are_wrapped() {
        let words = vec!["lorem"; 30].join(" ");
        let (text, _) = lay_out(&[message("alert", &words)]);
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("lorem")).collect();
        // Eleven words and their spaces fit into 68 columns.
        assert_eq!(lines.iter().map(|line| line.matches("lorem").count()).collect::<Vec<_>>(), [11, 11, 8]);
        assert_eq!(lines[0].len() - lines[0].trim_start().len(), (72 - 65) / 2);
        let unbreakable = "x".repeat(100);
        let (text, _) = lay_out(&[message("alert", &unbreakable)]);
        assert!(text.contains(&format!("\n{unbreakable}\n")), "{text}");
    }

    #[test]
    fn what_came_before_an_unknown_kind_is_printed() {
        let (text, unknown) = lay_out(&[message("basic", "a"), message("poem", "b"), message("basic", "c")]);
        assert_eq!(text, "\na\n\n\n");
        let said = unknown.unwrap().to_string();
        assert_eq!(said, "error writing messages to stream: invalid message type: poem");
    }
}
