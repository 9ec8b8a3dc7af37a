//! The front of a push: what it asks for, before its objects come.

use bytes::{Bytes, BytesMut};
use tabularium_common::pktline::{self, Packet, PacketError};

use crate::git::revision::{check_reference, is_zero};

/// Longest front that is looked at. One command is a few hundred bytes; capabilities are a few hundred more.
const MAX_BYTES: usize = 16 * 1024;

/// One reference that is to be created or moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    /// In hex; the zero id when it is to be created.
    pub(super) old: String,
    /// In hex.
    pub(super) new: String,
    /// Full name.
    pub(super) reference: Vec<u8>,
    /// What comes of it is to be told.
    reports: bool,
    /// In packets that say what they are.
    sideband: bool,
}

impl Command {
    /// That a reference is to be moved, and nobody wants to hear of it.
    #[cfg(test)]
    pub(super) fn of(reference: &[u8], old: gix_hash::ObjectId, new: gix_hash::ObjectId) -> Self {
        let (old, new) = (old.to_string(), new.to_string());
        Self { old, new, reference: reference.to_vec(), reports: false, sideband: false }
    }

    /// What `git receive-pack` answers when all went well (gitprotocol-pack, "Report Status").
    pub(super) fn report(&self) -> Result<Bytes, PacketError> {
        let mut answer = BytesMut::new();
        if self.reports {
            let mut report = BytesMut::new();
            pktline::encode(b"unpack ok\n", &mut report)?;
            pktline::encode(&[b"ok ", self.reference.as_slice(), b"\n"].concat(), &mut report)?;
            report.extend_from_slice(pktline::FLUSH);
            if !self.sideband {
                return Ok(report.freeze());
            }
            pktline::encode(&[b"\x01", &report[..]].concat(), &mut answer)?;
        }
        if self.sideband {
            answer.extend_from_slice(pktline::FLUSH);
        }
        Ok(answer.freeze())
    }
}

/// What a front says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// Not all of it is there.
    Incomplete,
    /// This and nothing else is asked for; objects follow.
    Single(Command, Bytes),
    /// Something else.
    Other,
}

/// Reads the beginning of a push (gitprotocol-pack, "Reference Update Request").
pub(super) fn read(front: &Bytes) -> Opening {
    let mut rest = BytesMut::from(&front[..]);
    let line = match pktline::decode(&mut rest) {
        Ok(None) if front.len() < MAX_BYTES => return Opening::Incomplete,
        Ok(Some(Packet::Data(line))) => line,
        _ => return Opening::Other,
    };
    let Some(command) = command(&line) else { return Opening::Other };
    match pktline::decode(&mut rest) {
        Ok(None) if front.len() < MAX_BYTES => Opening::Incomplete,
        Ok(Some(Packet::Flush)) => Opening::Single(command, rest.freeze()),
        _ => Opening::Other,
    }
}

fn command(line: &[u8]) -> Option<Command> {
    let end = line.iter().position(|byte| *byte == 0)?;
    let (command, capabilities) = (line.get(..end)?, line.get(end + 1..)?);
    let has = |prefix: &[u8]| {
        capabilities
            .split(|byte| matches!(byte, b' ' | b'\n'))
            .any(|capability| capability.starts_with(prefix))
    };
    // Options would stand between the command and its objects.
    if has(b"push-options") {
        return None;
    }
    let (reports, sideband) = (has(b"report-status"), has(b"side-band-64k"));
    let mut parts = command.splitn(3, |byte| *byte == b' ');
    let (old, new) = (object_id(parts.next()?)?, object_id(parts.next()?)?);
    let reference = parts.next()?;
    let sound = old.len() == new.len() && !is_zero(&new) && check_reference(reference).is_ok();
    sound.then(|| Command { old, new, reference: reference.to_vec(), reports, sideband })
}

fn object_id(text: &[u8]) -> Option<String> {
    let lower = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let sound = matches!(text.len(), 40 | 64) && text.iter().all(lower);
    sound.then(|| String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "1111111111111111111111111111111111111111";
    const NEW: &str = "2222222222222222222222222222222222222222";
    const ZERO: &str = "0000000000000000000000000000000000000000";

    fn front(lines: &[&str]) -> Bytes {
        let mut buffer = BytesMut::new();
        for line in lines {
            pktline::encode(line.as_bytes(), &mut buffer).unwrap();
        }
        buffer.extend_from_slice(b"0000PACK....");
        buffer.freeze()
    }

    #[test]
    fn one_command_is_followed_however_it_is_cut() {
        for old in [OLD, ZERO] {
            let whole =
                front(&[&format!("{old} {NEW} refs/heads/a\0 report-status-v2 side-band-64k agent=git/2")]);
            let objects = whole.len() - "PACK....".len();
            for cut in 0..objects {
                assert_eq!(read(&whole.slice(..cut)), Opening::Incomplete, "{cut}");
            }
            let Opening::Single(command, objects) = read(&whole) else { panic!("is followed") };
            assert_eq!(
                (command.old.as_str(), command.new.as_str(), &objects[..]),
                (old, NEW, &b"PACK...."[..])
            );
            assert_eq!(command.reference, b"refs/heads/a");
            let report = "0030\x01000eunpack ok\n0014ok refs/heads/a\n0000";
            assert_eq!(command.report().unwrap(), format!("{report}0000").replace("0030", "002b"));
        }
    }

    #[test]
    fn everything_else_is_left_to_git() {
        let update = format!("{OLD} {NEW} refs/heads/a\0report-status");
        for lines in [
            vec![update.as_str(), &format!("{OLD} {NEW} refs/heads/b")],
            vec![&format!("{OLD} {ZERO} refs/heads/a\0report-status")],
            vec![&format!("{update} push-options")],
            vec![&format!("{OLD} {NEW} refs/heads/a")],
            vec![&format!("{OLD} {NEW} refs/heads/..\0x")],
            vec![&format!("{} {NEW} refs/heads/a\0x", &OLD[1..])],
            vec![&format!("shallow {OLD}"), &update],
            vec!["push-cert\0x"],
            vec![],
        ] {
            assert_eq!(read(&front(&lines)), Opening::Other, "{lines:?}");
        }
        assert_eq!(read(&Bytes::from_static(b"GET / HTTP/1.1")), Opening::Other);
        let endless = Bytes::from([b"fff0".as_slice(), &[b'a'; MAX_BYTES]].concat());
        assert_eq!(read(&endless), Opening::Other);
    }
}
