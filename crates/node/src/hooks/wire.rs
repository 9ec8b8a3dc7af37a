//! What git's hooks and the node say to each other. This file is part of both programs, and `tabularium-hook` has
//! nothing but the standard library.
//!
//! A hook connects and sends [`Frame::Hello`]: the token, its name and its first argument, separated by zero bytes. Those that
//! git writes to go on: `pre-receive` and `post-receive` with [`VARIABLES`] of their environment, one in each
//! [`Frame::Variable`], and all three with their standard input in [`Frame::Input`]s and [`Frame::End`]. The node answers,
//! as often as it likes,
//!
//! * [`Frame::Run`]: a program, a custom hook. The hook runs it with its own arguments and input and tells how it ended with
//!   [`Frame::Ran`];
//! * [`Frame::Say`]: what to say on standard output;
//!
//! and in the end [`Frame::Exit`]: an exit code and, behind it, what to say on standard error.

/// What the names of the variables that the node is told of begin with: where new objects are, and the options of the push.
pub(crate) const VARIABLES: [&str; 3] =
    ["GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_PUSH_OPTION_"];
/// Environment variable: the node's socket.
pub(crate) const SOCKET: &str = "TABULARIUM_HOOK_SOCKET";
/// Environment variable: which request git runs for.
pub(crate) const TOKEN: &str = "TABULARIUM_HOOK_TOKEN";
/// Longest payload of a frame.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 64 * 1024;
/// What precedes the payload: the kind of frame and the payload's length, big-endian.
pub(crate) const HEADER_BYTES: usize = 5;

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Hook to node: who asks.
    Hello,
    /// Hook to node: a piece of standard input.
    Input,
    /// Hook to node: the end of standard input.
    End,
    /// Hook to node: the exit code of what was run.
    Ran,
    /// Node to hook: run this.
    Run,
    /// Node to hook: end so.
    Exit,
    /// Hook to node: `NAME=value` of its environment.
    Variable,
    /// Node to hook: say this.
    Say,
}

const KINDS: [Frame; 8] = [
    Frame::Hello,
    Frame::Input,
    Frame::End,
    Frame::Ran,
    Frame::Run,
    Frame::Exit,
    Frame::Variable,
    Frame::Say,
];

/// A whole frame; what is too long is cut.
pub(crate) fn frame(kind: Frame, payload: &[u8]) -> Vec<u8> {
    let payload = payload.get(..MAX_PAYLOAD_BYTES).unwrap_or(payload);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Kind and length of the payload that follows, if both make sense.
pub(crate) fn parse_header(header: [u8; HEADER_BYTES]) -> Option<(Frame, usize)> {
    let [kind, length @ ..] = header;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let kind = KINDS.get(usize::from(kind)).copied()?;
    (length <= MAX_PAYLOAD_BYTES).then_some((kind, length))
}
