//! What clients call a server that they reach otherwise than by its address: through a socket file, or as the other end of a
//! connection that they have accepted.
//!
//! HTTP/2 requests name an authority, and there is none here. gRPC's C core, and with it Ruby's and Python's clients, sends the
//! percent-encoded path of the file, others the path itself, and Gitaly votes at `multiplexed/<address>`. None of them is an
//! authority, and the HTTP/2 library refuses requests with them before anybody could say that it does not matter. So the name is
//! made one on the way in: each byte that cannot stand in it is replaced by one that can, which changes no length, and so nothing of
//! what is around it.
//!
//! [`Rewriter`] follows frames and header blocks (RFC 9113, RFC 7541) without keeping or decoding any: a value is recognised by the
//! name before it, or by the name's place in the static table. C sends plain values, Go sends them in Huffman's code, in which
//! the slash, the percent sign, the space and the at sign each have a neighbour that can stand there and differs in the last bits.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How every HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Bytes of a priority.
const PRIORITY_BYTES: usize = 5;
const NAME: &[u8] = b":authority";
/// The name's place in the static table.
const NAME_INDEX: u8 = 1;

/// A stream whose requests are given authorities that can be read.
#[derive(Debug)]
pub struct Renamed<S> {
    stream: S,
    rewriter: Rewriter,
}

impl<S> Renamed<S> {
    /// Of an accepted connection.
    pub fn accepted(stream: S) -> Self {
        Self { stream, rewriter: Rewriter::new() }
    }

    /// Of a dialled one, from which no requests come.
    pub fn dialled(stream: S) -> Self {
        Self { stream, rewriter: Rewriter { at: At::Elsewhere } }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Renamed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let Some(read) = buf.filled_mut().get_mut(before..) {
            self.rewriter.pass(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Renamed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Rewrites authorities in the bytes of a connection as they pass, however they are cut.
#[derive(Debug)]
struct Rewriter {
    at: At,
}

/// Where in a connection the next byte is.
#[derive(Debug)]
enum At {
    /// In the preface; so many bytes of it have passed.
    Preface(usize),
    /// In the head of a frame.
    Head { head: [u8; FRAME_HEAD], have: usize, block: Block },
    /// In a frame that matters to nobody here.
    Skipped { left: usize, block: Block },
    /// At the length of a frame's padding.
    Padding { left: usize, priority: bool, block: Block },
    /// Before a header block.
    Priority { skip: usize, left: usize, padding: usize, block: Block },
    /// In a header block.
    Fields { left: usize, padding: usize, block: Block },
    /// In something that is not HTTP/2.
    Elsewhere,
}

/// Where in a header block the next byte is. A block may go on in the next frame.
#[derive(Debug, Clone, Copy)]
enum Block {
    /// Before a field.
    Field,
    /// In a number that goes on.
    Number(After),
    /// At the length of a name.
    NameLength,
    /// In it, when it is a long one.
    LongLength { of: Text, length: usize, shift: u32 },
    /// In a name; so many of its bytes have passed.
    Name { left: usize, passed: usize, same: bool },
    /// At the length of a value.
    ValueLength { authority: bool },
    /// In a value.
    Value { left: usize, form: Form },
}

/// How a value is written, and whether it is an authority.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// It is none.
    Other,
    /// Plain.
    Plain,
    /// In Huffman's code; so many bits of a symbol have passed, and these.
    Coded { bits: u8, symbol: u16 },
}

/// What stands behind a number.
#[derive(Debug, Clone, Copy)]
enum After {
    Field,
    Value,
}

/// What has a length.
#[derive(Debug, Clone, Copy)]
enum Text {
    Name { plain: bool },
    Value { form: Form },
}

impl Text {
    fn of(self, length: usize) -> Block {
        match self {
            Self::Name { .. } if length == 0 => Block::ValueLength { authority: false },
            Self::Name { plain } => {
                Block::Name { left: length, passed: 0, same: plain && length == NAME.len() }
            }
            Self::Value { .. } if length == 0 => Block::Field,
            Self::Value { form } => Block::Value { left: length, form },
        }
    }
}

impl Block {
    /// Passes one byte, which came behind another one.
    fn pass(self, before: Option<&mut u8>, byte: &mut u8) -> Self {
        match self {
            Self::Field => Self::begin(*byte),
            Self::Number(after) if *byte & 0x80 != 0 => Self::Number(after),
            Self::Number(After::Field) => Self::Field,
            Self::Number(After::Value) => Self::ValueLength { authority: false },
            Self::NameLength => Self::length(*byte, Text::Name { plain: *byte & 0x80 == 0 }),
            Self::ValueLength { authority } => {
                let form = match (authority, *byte & 0x80) {
                    (false, _) => Form::Other,
                    (true, 0) => Form::Plain,
                    (true, _) => Form::Coded { bits: 0, symbol: 0 },
                };
                Self::length(*byte, Text::Value { form })
            }
            Self::LongLength { of, length, shift } => {
                let more = usize::from(*byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX);
                let length = length.saturating_add(more);
                if *byte & 0x80 == 0 {
                    of.of(length)
                } else {
                    Self::LongLength { of, length, shift: shift + 7 }
                }
            }
            Self::Name { left, passed, same } => {
                let same = same && NAME.get(passed) == Some(byte);
                if left == 1 {
                    Self::ValueLength { authority: same }
                } else {
                    Self::Name { left: left - 1, passed: passed + 1, same }
                }
            }
            Self::Value { left, form } => {
                let form = form.pass(before, byte);
                if left == 1 { Self::Field } else { Self::Value { left: left - 1, form } }
            }
        }
    }

    /// The first byte of a field says how it is written, and where its name is if that is known already.
    fn begin(byte: u8) -> Self {
        let (index, most) = match byte {
            0x80.. => return if byte & 0x7f == 0x7f { Self::Number(After::Field) } else { Self::Field },
            0x40.. => (byte & 0x3f, 0x3f),
            0x20.. => return if byte & 0x1f == 0x1f { Self::Number(After::Field) } else { Self::Field },
            _ => (byte & 0x0f, 0x0f),
        };
        match index {
            0 => Self::NameLength,
            index if index == most => Self::Number(After::Value),
            index => Self::ValueLength { authority: index == NAME_INDEX },
        }
    }

    fn length(byte: u8, of: Text) -> Self {
        match usize::from(byte & 0x7f) {
            0x7f => Self::LongLength { of, length: 0x7f, shift: 0 },
            length => of.of(length),
        }
    }
}

impl Form {
    /// Passes one byte of a value, which came behind another one.
    fn pass(self, before: Option<&mut u8>, byte: &mut u8) -> Self {
        match self {
            Self::Other => self,
            Self::Plain => {
                if !can_stand_in_authority(*byte) {
                    *byte = b'-';
                }
                self
            }
            Self::Coded { bits, symbol } => Self::pass_coded(bits, symbol, before, byte),
        }
    }

    fn pass_coded(mut bits: u8, mut symbol: u16, mut before: Option<&mut u8>, byte: &mut u8) -> Self {
        for mask in (0..8).rev().map(|place| 1_u8 << place) {
            bits += 1;
            symbol = symbol << 1 | u16::from(*byte & mask != 0);
            match (bits, symbol) {
                // A space or a percent sign becomes a hyphen or a dot; a slash becomes a three.
                (5, 0b0_1010) | (6, 0b01_1000) => {
                    *byte |= mask;
                    symbol |= 1;
                }
                // An at sign, behind which nothing need follow, becomes a dollar sign, which is two bits away.
                (13, 0x1ffa) => {
                    let bit_before =
                        if mask == 0x80 { before.take().map(|before| (before, 1)) } else { None };
                    match bit_before {
                        Some((before, mask)) => *before &= !mask,
                        None if mask < 0x80 => *byte &= !(mask << 1),
                        // It is gone already.
                        None => return Self::Other,
                    }
                    *byte |= mask;
                }
                _ => {}
            }
            match (bits, symbol) {
                (5, ..0x0a)
                | (6, 0x14..=0x2d)
                | (7, 0x5c..=0x7b)
                | (8, 0xf8..=0xfd)
                | (10, 0x3f8..=0x3fc)
                | (11, 0x7fa..=0x7fc)
                | (12, 0xffa..=0xffb)
                | (13, 0x1ff8..=0x1ffd) => (bits, symbol) = (0, 0),
                // No symbol that an authority could have is as long as that; what follows is nobody's business.
                (13, _) => return Self::Other,
                _ => {}
            }
        }
        Self::Coded { bits, symbol }
    }
}

fn can_stand_in_authority(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'~' | b':' | b'[' | b']')
}

impl At {
    fn frame(block: Block) -> Self {
        Self::Head { head: [0; FRAME_HEAD], have: 0, block }
    }

    /// Behind the head of a frame.
    fn behind(head: [u8; FRAME_HEAD], block: Block) -> Self {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let (kind, flags) = (head[3], head[4]);
        match kind {
            _ if length == 0 => Self::frame(if kind == HEADERS { Block::Field } else { block }),
            HEADERS => {
                // A block begins.
                let block = Block::Field;
                let priority = flags & PRIORITY != 0;
                if flags & PADDED != 0 {
                    Self::Padding { left: length, priority, block }
                } else {
                    Self::before_fields(priority, length, 0, block)
                }
            }
            CONTINUATION => Self::fields(length, 0, block),
            _ => Self::Skipped { left: length, block },
        }
    }

    fn before_fields(priority: bool, left: usize, padding: usize, block: Block) -> Self {
        if priority && left >= PRIORITY_BYTES {
            Self::Priority { skip: PRIORITY_BYTES, left, padding, block }
        } else {
            Self::fields(left, padding, block)
        }
    }

    /// `left`, of which `padding` is none of the block.
    fn fields(left: usize, padding: usize, block: Block) -> Self {
        match left.checked_sub(padding) {
            _ if left == 0 => Self::frame(block),
            None | Some(0) => Self::Skipped { left, block },
            Some(_) => Self::Fields { left, padding, block },
        }
    }
}

impl Rewriter {
    const fn new() -> Self {
        Self { at: At::Preface(0) }
    }

    /// Passes some bytes.
    fn pass(&mut self, bytes: &mut [u8]) {
        let mut place = 0;
        while place < bytes.len() {
            let (before, rest) = bytes.split_at_mut(place);
            let left_over = rest.len();
            let Some(byte) = rest.first_mut() else { return };
            let mut passed = 1;
            self.at = match std::mem::replace(&mut self.at, At::Elsewhere) {
                At::Elsewhere => return,
                At::Preface(have) if PREFACE.get(have) != Some(byte) => At::Elsewhere,
                At::Preface(have) if have + 1 < PREFACE.len() => At::Preface(have + 1),
                At::Preface(_) => At::frame(Block::Field),
                At::Head { mut head, have, block } => {
                    head[have] = *byte;
                    if have + 1 < FRAME_HEAD {
                        At::Head { head, have: have + 1, block }
                    } else {
                        At::behind(head, block)
                    }
                }
                At::Skipped { left, block } => {
                    passed = left.min(left_over);
                    if left == passed { At::frame(block) } else { At::Skipped { left: left - passed, block } }
                }
                At::Padding { left, priority, block } => {
                    At::before_fields(priority, left - 1, usize::from(*byte), block)
                }
                At::Priority { skip, left, padding, block } if skip > 1 => {
                    At::Priority { skip: skip - 1, left: left - 1, padding, block }
                }
                At::Priority { left, padding, block, .. } => At::fields(left - 1, padding, block),
                At::Fields { left, padding, block } => {
                    At::fields(left - 1, padding, block.pass(before.last_mut(), byte))
                }
            };
            place += passed;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [PREFACE, &frames.concat()].concat()
    }

    fn passed(mut bytes: Vec<u8>) -> Vec<u8> {
        Rewriter::new().pass(&mut bytes);
        bytes
    }

    fn check(before: &[u8], after: &[u8]) {
        let before = connection(&[frame(4, 0, &[0; 6]), before.to_vec(), frame(0, 1, b":authority")]);
        let after = connection(&[frame(4, 0, &[0; 6]), after.to_vec(), frame(0, 1, b":authority")]);
        assert_eq!(passed(before), after);
    }

    /// As gRPC's C core sends it.
    const BLOCK: &[u8] = b"@\x05:path\x06/a.B/C@\n:authority\x0etmp%2Fr%2F.sok\x83\x86";
    const REWRITTEN: &[u8] = b"@\x05:path\x06/a.B/C@\n:authority\x0etmp-2Fr-2F.sok\x83\x86";

    #[test]
    fn a_path_becomes_a_name() {
        check(&frame(1, 4, BLOCK), &frame(1, 4, REWRITTEN));
        // With a priority and padding, in which anything may stand.
        let around = |block: &[u8]| [&[3, 0, 0, 0, 0, 9], block, b"@\n%"].concat();
        check(&frame(1, 0x2c, &around(BLOCK)), &frame(1, 0x2c, &around(REWRITTEN)));
        // Over several frames.
        for cut in 1..BLOCK.len() {
            let two = |block: &[u8]| [frame(1, 0, &block[..cut]), frame(9, 4, &block[cut..])].concat();
            check(&two(BLOCK), &two(REWRITTEN));
        }
        // With the name's number, and as a field that is not to be remembered.
        check(&frame(1, 4, b"\x41\x04/a/b"), &frame(1, 4, b"\x41\x04-a-b"));
        check(
            &frame(1, 4, b"\x01\x04/a/b\x10\n:authority\x02%%"),
            &frame(1, 4, b"\x01\x04-a-b\x10\n:authority\x02--"),
        );
    }

    #[test]
    fn nothing_else_is_touched() {
        for same in [
            &b"@\n:authorit_\x02%%"[..],
            b"@\x0b:authority2\x02%%",
            b"@\n:authority\x11localhost:2305---",
            // In Huffman's code: RFC 7541, C.4.1.
            b"\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff",
            // Behind an index that goes on, and in a long value.
            b"\xff\xff\x01\x3f\x81\x01\x7f\x90\x01\x02%%\x44\x7f\x02",
        ] {
            check(&frame(1, 4, same), &frame(1, 4, same));
        }
        let long =
            [b"\x40\x7f\x01".to_vec(), vec![b'%'; 128], b"\x01%\x41\x7f\x01".to_vec(), vec![b'/'; 128]]
                .concat();
        let mut after = long.clone();
        after[136..].fill(b'-');
        check(&frame(1, 4, &long), &frame(1, 4, &after));
        let other = [b"backchannel".as_slice(), &frame(1, 4, BLOCK)].concat();
        assert_eq!(passed(other.clone()), other);
    }

    /// In Huffman's code, as far as it is needed here.
    fn coded(text: &str) -> Vec<u8> {
        let mut bits = String::new();
        for letter in text.chars() {
            bits += match letter {
                '1' => "00001",
                'e' => "00101",
                'i' => "00110",
                't' => "01001",
                ' ' => "010100",
                '%' => "010101",
                '-' => "010110",
                '.' => "010111",
                '/' => "011000",
                '3' => "011001",
                'd' => "100100",
                'l' => "101000",
                'm' => "101001",
                'p' => "101011",
                'u' => "101101",
                ':' => "1011100",
                'x' => "1111001",
                '@' => "1111111111010",
                '$' => "1111111111001",
                '[' => "1111111111011",
                ']' => "1111111111100",
                '<' => "111111111111100",
                other => panic!("{other}"),
            };
        }
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        let bytes: Vec<u8> = bits
            .as_bytes()
            .chunks(8)
            .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap())
            .collect();
        [&[0x41, 0x80 | u8::try_from(bytes.len()).unwrap()][..], &bytes].concat()
    }

    #[test]
    fn a_value_in_huffmans_code_is_rewritten_bit_by_bit() {
        for (sent, read) in [
            ("multiplexed/1.1.1.1:11", "multiplexed31.1.1.1:11"),
            ("multiplexed%1:1", "multiplexed.1:1"),
            ("/ti/%1/x t", "3ti3.13x-t"),
            ("multiplexed:1", "multiplexed:1"),
            ("multiplexed/@", "multiplexed3$"),
            ("t@/", "t$3"),
            ("1t@e", "1t$e"),
            ("[/]", "[3]"),
            // What stands behind a symbol that no authority has is left alone.
            ("t</", "t</"),
        ] {
            check(&frame(1, 4, &coded(sent)), &frame(1, 4, &coded(read)));
        }
        let whole = connection(&[frame(1, 4, &coded("multiplexed/1/e%1"))]);
        for cut in 0..whole.len() {
            let mut pieces = whole.clone();
            let mut rewriter = Rewriter::new();
            let (front, back) = pieces.split_at_mut(cut);
            rewriter.pass(front);
            rewriter.pass(back);
            assert_eq!(pieces, passed(whole.clone()));
        }
    }

    proptest! {
        #[test]
        fn however_it_is_cut_it_is_the_same(cuts in proptest::collection::vec(1..40_usize, 1..40)) {
            let frames = [frame(4, 0, &[0; 12]), frame(1, 0, &BLOCK[..20]), frame(9, 4, &BLOCK[20..]), frame(1, 4, BLOCK)];
            let whole = connection(&frames);
            let mut pieces = whole.clone();
            let mut rewriter = Rewriter::new();
            let mut rest = &mut pieces[..];
            for cut in cuts {
                let (piece, behind) = rest.split_at_mut(cut.min(rest.len()));
                rewriter.pass(piece);
                rest = behind;
            }
            rewriter.pass(rest);
            prop_assert_eq!(pieces, passed(whole));
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let length = bytes.len();
            prop_assert_eq!(passed([PREFACE, &bytes].concat()).len(), PREFACE.len() + length);
        }
    }
}
