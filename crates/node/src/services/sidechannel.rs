//! `git upload-pack` whose input and output go over a sidechannel, beside the RPC that asked for it.

use std::{io, pin::pin, time::Duration};

use bytes::{Bytes, BytesMut};
use tabularium_common::{
    multiplex::{
        Backchannel,
        sidechannel::{self, OpenError, Server, SidechannelId},
    },
    pktline::MAX_PACKET_BYTES,
};
use tokio::{
    io::AsyncWriteExt as _,
    process::ChildStdin,
    time::{Instant, timeout_at},
};
use tonic::{Request, Status};

use crate::{
    error::GitError,
    git::{Exit, GitCommand, GitProcess, negotiation::Negotiation},
};

/// Bytes in front of what a band carries: the packet's length and the band's number.
const BAND_BYTES: usize = 5;
/// Largest piece that fits a packet.
const BAND_PAYLOAD_BYTES: usize = MAX_PACKET_BYTES - BAND_BYTES;
/// Largest piece that goes as it is: what a pipe holds.
const PIECE_BYTES: usize = 64 * 1024;
/// Git's standard output, and its standard error.
const BANDS: (u8, u8) = (1, 2);

/// Opens the sidechannel that a request offers.
pub(super) async fn open<T>(request: &Request<T>) -> Result<Server, OpenError> {
    let id = SidechannelId::offered(request.metadata().as_ref())?;
    let back = request.extensions().get::<Backchannel>();
    sidechannel::open(back, id).await.map(Server::new)
}

/// How what git says is told to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Voice {
    /// Standard output as it is.
    Plain,
    /// Standard output and standard error in packets that say which it is.
    Banded,
}

/// Why an exchange did not come to git's own end. The texts are Gitaly's.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The client has gone, or talks nonsense.
    #[error("running upload-pack: user canceled the request")]
    Client(#[source] io::Error),
    /// It took too long to say what it wants.
    #[error("running upload-pack: waiting for negotiation: context canceled")]
    Undecided,
    /// Git could not be run.
    #[error(transparent)]
    Git(#[from] GitError),
}

impl From<Broken> for Status {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Client(ref error) => {
                tracing::debug!(%error, "the client of a sidechannel has gone");
                Self::cancelled(broken.to_string())
            }
            Broken::Undecided => Self::deadline_exceeded(broken.to_string()),
            Broken::Git(error) => error.into(),
        }
    }
}

/// How git ended.
pub(super) struct Ended {
    pub(super) exit: Exit,
    pub(super) stderr: Vec<u8>,
    pub(super) negotiation: Negotiation,
}

/// Runs the command between the client's two directions, to git's end. Given up, it kills git. `patience`: how long the
/// client may take until it has said what it wants.
pub(super) async fn run(
    command: GitCommand,
    side: &Server,
    voice: Voice,
    patience: Option<Duration>,
) -> Result<Ended, Broken> {
    let mut process = command.spawn(true).await?;
    let stdin = process.take_stdin();
    let mut negotiation = Negotiation::default();
    {
        let mut listening = pin!(listen(side, stdin, &mut negotiation, patience));
        let mut speaking = pin!(speak(side, &mut process, voice));
        let mut heard_all = false;
        loop {
            tokio::select! {
                spoke = &mut speaking => {
                    spoke?;
                    break;
                }
                listened = &mut listening, if !heard_all => {
                    listened?;
                    heard_all = true;
                }
            }
        }
    }
    let (exit, stderr) = process.finish().await?;
    if voice == Voice::Banded {
        for piece in stderr.chunks(BAND_PAYLOAD_BYTES) {
            let mut packet = BytesMut::zeroed(BAND_BYTES);
            packet.extend_from_slice(piece);
            side.write(banded(packet, BANDS.1)).await.map_err(Broken::Client)?;
        }
    }
    Ok(Ended { exit, stderr, negotiation })
}

async fn listen(
    side: &Server,
    mut stdin: Option<ChildStdin>,
    negotiation: &mut Negotiation,
    patience: Option<Duration>,
) -> Result<(), Broken> {
    let until = patience.map(|patience| Instant::now() + patience);
    loop {
        let read = match until.filter(|_| !negotiation.is_done()) {
            None => side.read().await,
            Some(until) => timeout_at(until, side.read()).await.map_err(|_| Broken::Undecided)?,
        };
        let Some(piece) = read.map_err(Broken::Client)? else { return Ok(()) };
        negotiation.hear(&piece);
        if let Some(pipe) = &mut stdin
            && pipe.write_all(&piece).await.is_err()
        {
            // Git wants no more; how it ends says whether that is right. The client is heard out.
            stdin = None;
        }
    }
}

async fn speak(side: &Server, process: &mut GitProcess, voice: Voice) -> Result<(), Broken> {
    loop {
        let piece = match voice {
            Voice::Plain => process.read_behind(0, PIECE_BYTES).await?.map(BytesMut::freeze),
            Voice::Banded => {
                let packet = process.read_behind(BAND_BYTES, BAND_PAYLOAD_BYTES).await?;
                packet.map(|packet| banded(packet, BANDS.0))
            }
        };
        let Some(piece) = piece else { return Ok(()) };
        side.write(piece).await.map_err(Broken::Client)?;
    }
}

/// Fills in what stands in front of the payload.
fn banded(mut packet: BytesMut, band: u8) -> Bytes {
    let length = format!("{:04x}", packet.len());
    packet[..BAND_BYTES - 1].copy_from_slice(length.as_bytes());
    packet[BAND_BYTES - 1] = band;
    packet.freeze()
}
