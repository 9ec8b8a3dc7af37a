//! How OpenPGP divides bytes: packets, large numbers, subpackets (RFC 9580, sections 3.2, 4.2 and 5.2.3.7).

/// Packet types.
pub(super) mod packet_type {
    pub(in super::super) const SIGNATURE: u8 = 2;
    pub(in super::super) const SECRET_KEY: u8 = 5;
    pub(in super::super) const PUBLIC_KEY: u8 = 6;
    pub(in super::super) const SECRET_SUBKEY: u8 = 7;
    pub(in super::super) const USER_ID: u8 = 13;
    pub(in super::super) const PUBLIC_SUBKEY: u8 = 14;
}

/// Bytes that are read from the front.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    /// Big-endian, of at most four bytes.
    pub(super) fn number(&mut self, bytes: usize) -> Option<usize> {
        let taken = self.take(bytes)?;
        Some(taken.iter().fold(0, |number, byte| (number << 8) | usize::from(*byte)))
    }

    /// A time, in seconds since 1970.
    pub(super) fn time(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    /// A number of any length, big-endian and without leading zeros, behind the count of its bits.
    pub(super) fn multiprecision(&mut self) -> Option<&'a [u8]> {
        let bits = self.number(2)?;
        self.take(bits.div_ceil(8))
    }

    /// A length as it stands in new packets and before subpackets; `None` for one that comes in parts too.
    fn length(&mut self) -> Option<usize> {
        match self.byte()? {
            short @ 0..=191 => Some(usize::from(short)),
            first @ 192..=223 => Some(((usize::from(first) - 192) << 8) + usize::from(self.byte()?) + 192),
            255 => self.number(4),
            _ => None,
        }
    }

    /// A packet's type and body.
    pub(super) fn packet(&mut self) -> Option<(u8, &'a [u8])> {
        let first = self.byte()?;
        let (kind, length) = match first {
            0xc0.. => (first & 0x3f, self.length()?),
            // The old way, of a length that is known.
            0x80..=0xbf if first & 3 < 3 => ((first >> 2) & 0x0f, self.number(1 << (first & 3))?),
            _ => return None,
        };
        Some((kind, self.take(length)?))
    }

    /// A subpacket's type, without the mark of those that must be understood, and body.
    pub(super) fn subpacket(&mut self) -> Option<(u8, &'a [u8])> {
        let length = self.length()?;
        let (kind, body) = self.take(length)?.split_first()?;
        Some((kind & 0x7f, body))
    }
}

/// A packet with a header of the new kind.
pub(super) fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0xc0 | kind];
    match u16::try_from(body.len()) {
        Ok(length @ 0..=191) => packet.extend(&length.to_be_bytes()[1..]),
        Ok(length @ 192..=8383) => packet.extend((length - 192 + 0xc000).to_be_bytes()),
        _ => {
            packet.push(255);
            // What is written here comes from a file of at most some kilobytes.
            packet.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
    packet.extend(body);
    packet
}

/// A number with the count of its bits.
pub(super) fn multiprecision(number: &[u8]) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let number = number.get(zeros..).unwrap_or_default();
    let unused = number.first().map_or(0, |first| first.leading_zeros() as usize);
    // Two bytes count eight times as much as a key has.
    let bits = u16::try_from(number.len() * 8 - unused).unwrap_or(u16::MAX);
    [&bits.to_be_bytes(), number].concat()
}

/// A number with zeros before it; `None` if it is longer.
pub(super) fn padded(number: &[u8], length: usize) -> Option<Vec<u8>> {
    let zeros = length.checked_sub(number.len())?;
    Some([&vec![0; zeros], number].concat())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(kind in 0_u8..0x40, body in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let written = packet(kind, &body);
            let mut reader = Reader(&written);
            prop_assert_eq!(reader.packet(), Some((kind, body.as_slice())));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn numbers_keep_their_value(number in proptest::collection::vec(any::<u8>(), 0..64)) {
            let written = multiprecision(&number);
            let read = Reader(&written).multiprecision().unwrap();
            prop_assert_eq!(padded(read, number.len()), Some(number));
        }

        #[test]
        fn nothing_that_is_read_is_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Reader(&bytes);
            while reader.packet().is_some() {}
            let mut reader = Reader(&bytes);
            while reader.subpacket().is_some() {}
        }
    }

    #[test]
    fn headers_of_old_packets_are_read() {
        assert_eq!(Reader(b"\x95\x00\x02xy").packet(), Some((5, &b"xy"[..])));
        assert_eq!(Reader(b"\xb4\x01x").packet(), Some((13, &b"x"[..])));
        assert_eq!(Reader(b"\x97xy").packet(), None, "a length that nobody knows");
    }
}
