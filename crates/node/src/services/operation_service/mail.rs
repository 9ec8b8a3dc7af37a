//! What `git mailinfo` says of a mail, and the commit message that is made of it.

/// Who sent what, and when.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mail {
    pub(super) name: Vec<u8>,
    pub(super) email: Vec<u8>,
    /// Without `[PATCH]`. Several lines if there are several subjects.
    pub(super) subject: Vec<u8>,
    /// As the mail has it; empty if it has none.
    pub(super) date: String,
}

impl Mail {
    /// From what git prints.
    pub(super) fn parse(printed: &[u8]) -> Self {
        let mut mail = Self::default();
        for line in printed.split(|byte| *byte == b'\n') {
            let at = line.windows(2).position(|pair| pair == b": ").unwrap_or(line.len());
            let value = line.get(at + 2..).unwrap_or_default();
            match line.get(..at).unwrap_or_default() {
                b"Author" => mail.name = value.to_vec(),
                b"Email" => mail.email = value.to_vec(),
                b"Subject" if mail.subject.is_empty() => mail.subject = value.to_vec(),
                b"Subject" => mail.subject = [&mail.subject, value].join(&b'\n'),
                b"Date" => mail.date = String::from_utf8_lossy(value).into_owned(),
                _ => {}
            }
        }
        mail
    }

    /// Some mailboxes begin with a note of the program that keeps them.
    pub(super) fn is_made_by_the_mail_system(&self) -> bool {
        self.name == b"Mail System Internal Data"
    }
}

/// The message of the commit: no blanks at the ends of lines, no more than one empty line in a row, none at either end.
pub(super) fn message(subject: &[u8], body: &[u8]) -> Vec<u8> {
    let whole = [subject, b"\n\n", body].concat();
    let mut message = Vec::with_capacity(whole.len());
    let mut gap = false;
    for line in whole.split(|byte| *byte == b'\n').map(trim_end) {
        if line.is_empty() {
            gap = true;
            continue;
        }
        if gap && !message.is_empty() {
            message.push(b'\n');
        }
        gap = false;
        message.extend_from_slice(line);
        message.push(b'\n');
    }
    message
}

/// Without what git calls spaces.
fn trim_end(line: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r');
    let end = line.iter().rposition(|byte| !blank(byte)).map_or(0, |last| last + 1);
    line.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mailinfo_prints() {
        let printed = b"Author: A: B\nEmail: a@x\nSubject: one\nSubject: two\nDate: Tue, 14 Nov 2023\n\n";
        let mail = Mail {
            name: b"A: B".to_vec(),
            email: b"a@x".to_vec(),
            subject: b"one\ntwo".to_vec(),
            date: "Tue, 14 Nov 2023".into(),
        };
        assert_eq!(Mail::parse(printed), mail);
        assert_eq!(Mail::parse(b""), Mail::default());
    }

    #[test]
    fn messages_are_tidied() {
        assert_eq!(message(b"subject ", b"\n\n a \t\n\n\n\nb\r\n\n"), b"subject\n\n a\n\nb\n");
        assert_eq!(message(b"subject", b""), b"subject\n");
        assert_eq!(message(b"", b"\n"), b"");
    }
}
