//! A frame's header: version, type, flags, stream and length, all big-endian.

/// Length of a header.
pub(crate) const HEADER_BYTES: usize = 12;
/// The one version there is.
const VERSION: u8 = 0;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// So many bytes of a stream follow.
    Data,
    /// The sender will take so many more bytes of the stream.
    WindowUpdate,
    /// The length is a number that is to be sent back.
    Ping,
    /// The sender takes no more streams; the length says why.
    GoAway,
}

/// Opens a stream, or asks for a ping's answer.
pub(crate) const SYN: u16 = 1;
/// Acknowledges either.
pub(crate) const ACK: u16 = 2;
/// The sender will say no more on the stream.
pub(crate) const FIN: u16 = 4;
/// The stream is no more.
pub(crate) const RST: u16 = 8;

/// Why somebody goes away: all is well.
pub(crate) const NORMAL: u32 = 0;
/// Why somebody goes away: the other broke the protocol.
pub(crate) const PROTOCOL_ERROR: u32 = 1;

/// A frame without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) flags: u16,
    /// 0 for what concerns the session.
    pub(crate) stream: u32,
    /// Bytes that follow, or what else the kind makes of it.
    pub(crate) length: u32,
}

/// What no peer that keeps to the protocol sends. It ends the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    /// Not yamux, most likely.
    #[error("version {0}")]
    Version(u8),
    /// Likewise.
    #[error("frame type {0}")]
    Kind(u8),
    /// A stream is opened that is there already.
    #[error("stream {0} was opened twice")]
    Twice(u32),
    /// A stream is opened whose number is ours to give, or none.
    #[error("stream {0} is not the peer's to open")]
    Foreign(u32),
    /// More bytes than were allowed.
    #[error("{0} bytes too many on stream {1}")]
    Window(u32, u32),
    /// It says that we broke the protocol, or that it is broken itself.
    #[error("the peer gave up with code {0}")]
    GaveUp(u32),
}

impl Header {
    /// As it is sent.
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = VERSION;
        bytes[1] = match self.kind {
            Kind::Data => 0,
            Kind::WindowUpdate => 1,
            Kind::Ping => 2,
            Kind::GoAway => 3,
        };
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Flags that nobody knows are ignored.
    pub(crate) fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, Violation> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes;
        if version != VERSION {
            return Err(Violation::Version(version));
        }
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::WindowUpdate,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            other => return Err(Violation::Kind(other)),
        };
        Ok(Self {
            kind,
            flags: u16::from_be_bytes([f0, f1]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// The flag is set.
    pub(crate) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}
