//! `tabularium-hook`: what git runs as `pre-receive`, `update`, `reference-transaction` and `post-receive` when somebody has a
//! say in a push or a fetch: other replicas, GitLab, custom hooks. It asks the node, over the node's private socket, and does
//! as it is told.
//!
//! It runs several times in every push, so it is small and needs nothing but the standard library. Not for people.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{self, Read as _, Write as _},
    os::unix::{ffi::OsStrExt as _, net::UnixStream},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

#[path = "../hooks/wire.rs"]
mod wire;

use wire::Frame;

const REFERENCE_TRANSACTION: &str = "reference-transaction";
/// The states of a reference transaction that are voted on. Git has others, and newer versions have more.
const VOTED_ON: [&str; 2] = ["prepared", "committed"];
/// Git tells these, on standard input, what is to change or has changed.
const TOLD_CHANGES: [&str; 2] = ["pre-receive", "post-receive"];
/// The exit code of a hook that was killed or could not ask.
const FAILED: u8 = 1;

#[expect(clippy::print_stderr, reason = "git shows it to whoever pushes")]
fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("hook: {error}");
            ExitCode::from(FAILED)
        }
    }
}

fn run() -> io::Result<u8> {
    let mut arguments = env::args_os();
    let program = arguments.next().unwrap_or_default();
    let arguments: Vec<OsString> = arguments.collect();
    let hook = Path::new(&program).file_name().unwrap_or_default();
    let first = arguments.first().map(OsString::as_os_str).unwrap_or_default();
    let transaction = hook == REFERENCE_TRANSACTION;
    if transaction && !VOTED_ON.iter().any(|state| first == *state) {
        return Ok(0);
    }
    let (Some(socket), Some(token)) = (env::var_os(wire::SOCKET), env::var_os(wire::TOKEN)) else {
        // A git that a custom hook has started inherits our place from git, but not the token: it is no part of the
        // transaction.
        return Ok(0);
    };
    let mut node = UnixStream::connect(socket)?;
    let hello = [token.as_bytes(), hook.as_bytes(), first.as_bytes()].join(&0);
    node.write_all(&wire::frame(Frame::Hello, &hello))?;
    let mut input = None;
    if transaction {
        send_input(&mut node, |_| {})?;
    } else if TOLD_CHANGES.iter().any(|told| hook == *told) {
        send_variables(&mut node)?;
        let mut kept = Vec::new();
        send_input(&mut node, |piece| kept.extend_from_slice(piece))?;
        input = Some(kept);
    }
    loop {
        let (kind, payload) = read_frame(&mut node)?;
        match kind {
            Frame::Exit => return end(&payload),
            Frame::Say => say(&payload)?,
            Frame::Run => {
                let code = run_custom_hook(OsStr::from_bytes(&payload), &arguments, input.as_deref());
                node.write_all(&wire::frame(Frame::Ran, &[code]))?;
            }
            Frame::Hello | Frame::Input | Frame::End | Frame::Ran | Frame::Variable => {
                return Err(senseless());
            }
        }
    }
}

fn say(text: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text)?;
    // What a custom hook says comes after it.
    stdout.flush()
}

fn senseless() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the node's answer makes no sense")
}

fn send_variables(node: &mut UnixStream) -> io::Result<()> {
    for (name, value) in env::vars_os() {
        if wire::VARIABLES.iter().any(|known| name.as_bytes().starts_with(known.as_bytes())) {
            let variable = [name.as_bytes(), value.as_bytes()].join(&b'=');
            if variable.len() > wire::MAX_PAYLOAD_BYTES {
                return Err(io::Error::other(format!("{} is too long", name.display())));
            }
            node.write_all(&wire::frame(Frame::Variable, &variable))?;
        }
    }
    Ok(())
}

fn send_input(node: &mut UnixStream, mut keep: impl FnMut(&[u8])) -> io::Result<()> {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; wire::MAX_PAYLOAD_BYTES];
    loop {
        let length = stdin.read(&mut buffer)?;
        let piece = buffer.get(..length).unwrap_or_default();
        if piece.is_empty() {
            return node.write_all(&wire::frame(Frame::End, &[]));
        }
        node.write_all(&wire::frame(Frame::Input, piece))?;
        keep(piece);
    }
}

/// How it ended. What it says goes where we would say it.
#[expect(clippy::print_stderr, reason = "git shows it to whoever pushes")]
fn run_custom_hook(program: &OsStr, arguments: &[OsString], input: Option<&[u8]>) -> u8 {
    let ran = || {
        let mut command = Command::new(program);
        command.args(arguments).env_remove(wire::SOCKET).env_remove(wire::TOKEN);
        // Git says `.`, which is of no use to a hook that goes elsewhere.
        command.env("GIT_DIR", env::current_dir()?);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn()?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            // A hook need not read what it is told.
            let _ = stdin.write_all(input);
        }
        child.wait()
    };
    match ran() {
        Ok(status) => status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED),
        Err(error) => {
            eprintln!("hook {}: {error}", program.display());
            FAILED
        }
    }
}

fn read_frame(node: &mut UnixStream) -> io::Result<(Frame, Vec<u8>)> {
    let mut header = [0; wire::HEADER_BYTES];
    node.read_exact(&mut header).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the node is gone"),
        _ => error,
    })?;
    let (kind, length) = wire::parse_header(header).ok_or_else(senseless)?;
    let mut payload = vec![0; length];
    node.read_exact(&mut payload)?;
    Ok((kind, payload))
}

fn end(payload: &[u8]) -> io::Result<u8> {
    let (code, text) = payload.split_first().ok_or_else(senseless)?;
    if !text.is_empty() {
        let mut stderr = io::stderr().lock();
        stderr.write_all(text)?;
        stderr.write_all(b"\n")?;
    }
    Ok(*code)
}
