//! What a client says to `git upload-pack` and `git upload-archive`, listened to as it passes by.

use bytes::BytesMut;
use tabularium_common::pktline::{self, Packet};
use tabularium_proto::gitaly::PackfileNegotiationStatistics;

/// Counts what a client wants and has (gitprotocol-pack, gitprotocol-v2), as Gitaly counts it.
#[derive(Debug, Default)]
pub(crate) struct Negotiation {
    statistics: PackfileNegotiationStatistics,
    pending: BytesMut,
    flushes: u64,
    done: bool,
    /// It cannot be understood any more.
    lost: bool,
}

impl Negotiation {
    /// Takes the next piece of what the client says.
    pub(crate) fn hear(&mut self, piece: &[u8]) {
        if self.done || self.lost {
            return;
        }
        self.pending.extend_from_slice(piece);
        loop {
            match pktline::decode(&mut self.pending) {
                Ok(Some(packet)) => self.take(&packet),
                Ok(None) => return,
                Err(_) => self.lost = true,
            }
            if self.done || self.lost {
                self.pending = BytesMut::new();
                return;
            }
        }
    }

    fn take(&mut self, packet: &Packet) {
        let data = match packet {
            Packet::Data(data) => {
                String::from_utf8_lossy(data.strip_suffix(b"\n").unwrap_or(data)).into_owned()
            }
            Packet::Flush => {
                self.flushes += 1;
                String::new()
            }
            Packet::Delimiter | Packet::ResponseEnd => String::new(),
        };
        let statistics = &mut self.statistics;
        statistics.payload_size += i64::try_from(data.len()).unwrap_or(0);
        let mut words = data.split(' ');
        let (first, second) = (words.next().unwrap_or_default(), words.next());
        match (first, second) {
            ("done", _) => {
                self.done = true;
                return;
            }
            ("want", Some(_)) => {
                statistics.wants += 1;
                let capabilities: Vec<_> = words.map(str::to_owned).collect();
                if !capabilities.is_empty() {
                    statistics.caps = capabilities;
                }
            }
            ("have", Some(_)) => statistics.haves += 1,
            ("shallow", Some(_)) => statistics.shallows += 1,
            ("deepen" | "deepen-since" | "deepen-not", Some(_)) => statistics.deepen.clone_from(&data),
            ("filter", Some(filter)) => filter.clone_into(&mut statistics.filter),
            _ => {}
        }
        statistics.packets += 1;
    }

    /// The client has nothing more to ask for.
    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    /// It has ended a list of what it wants, or of options.
    pub(crate) fn has_flushed(&self) -> bool {
        self.flushes > 0
    }

    /// It wants a history of limited depth. Rounds of such a negotiation end early, with an exit code that is no failure.
    pub(crate) fn is_shallow(&self) -> bool {
        !self.statistics.deepen.is_empty()
    }

    /// What was counted.
    pub(crate) fn into_statistics(self) -> PackfileNegotiationStatistics {
        self.statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str, cut: usize) -> Negotiation {
        let mut negotiation = Negotiation::default();
        text.as_bytes().chunks(cut).for_each(|piece| negotiation.hear(piece));
        negotiation
    }

    fn packets(lines: &[&str]) -> String {
        let packet = |line: &&str| match *line {
            "0000" | "0001" => (*line).to_owned(),
            line => format!("{:04x}{line}\n", line.len() + 5),
        };
        lines.iter().map(packet).collect()
    }

    #[test]
    fn what_a_client_wants_is_counted_however_it_is_cut() {
        let text = packets(&[
            "want aa ofs-delta agent=x",
            "want bb",
            "shallow cc",
            "deepen 3",
            "filter blob:none",
            "0000",
            "have dd",
            "have ee",
            "done",
            "want after",
        ]);
        for cut in 1..text.len() {
            let negotiation = heard(&text, cut);
            assert!(negotiation.is_done() && negotiation.has_flushed() && negotiation.is_shallow());
            let expected = PackfileNegotiationStatistics {
                payload_size: 84,
                packets: 8,
                caps: vec!["ofs-delta".to_owned(), "agent=x".to_owned()],
                wants: 2,
                haves: 2,
                shallows: 1,
                deepen: "deepen 3".to_owned(),
                filter: "blob:none".to_owned(),
            };
            assert_eq!(negotiation.into_statistics(), expected, "{cut}");
        }
    }

    #[test]
    fn a_listing_of_references_is_no_negotiation_and_garbage_is_not_kept() {
        let listing = heard(&packets(&["command=ls-refs", "0001", "peel", "0000"]), 7);
        assert!(!listing.is_done() && !listing.is_shallow() && listing.has_flushed());
        let garbage = heard(&"x".repeat(100_000), 1000);
        assert!(garbage.pending.is_empty());
    }
}
