//! How far this machine's clock is from that of a time server: one question of RFC 4330, for `ClockSynced`.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::net::{UdpSocket, lookup_host};

/// Where time servers listen.
const PORT: u16 = 123;
/// An answer without anything beside it.
const PACKET: usize = 48;
/// Version 4, from a client.
const ASK: u8 = 0b0010_0011;
/// What the last three bits of an answer's first byte say.
const FROM_SERVER: u8 = 4;
/// Seconds between the beginning of 1900, from which the protocol counts, and that of 1970.
const BEFORE_UNIX: u64 = 2_208_988_800;
const NANOS: i128 = 1_000_000_000;

/// Why the server's time is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClockError {
    #[error("asking {host}: {source}")]
    Io { host: String, source: io::Error },
    #[error("{host} did not answer with a time")]
    Malformed { host: String },
}

/// How far the two clocks are apart, as `host` (port 123 unless it names one) sees it.
pub(crate) async fn drift(host: &str) -> Result<Duration, ClockError> {
    let failed = |source| ClockError::Io { host: host.to_owned(), source };
    let addresses = if host.parse::<SocketAddr>().is_ok() || has_port(host) {
        lookup_host(host).await.map_err(failed)?.collect::<Vec<_>>()
    } else {
        lookup_host((host, PORT)).await.map_err(failed)?.collect()
    };
    let server = addresses.first().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await.map_err(failed)?;
    socket.connect(server).await.map_err(failed)?;
    let sent = now();
    let mut question = [0; PACKET];
    question[0] = ASK;
    question[40..].copy_from_slice(&sent.to_be_bytes());
    socket.send(&question).await.map_err(failed)?;
    let mut answer = [0; PACKET];
    let length = socket.recv(&mut answer).await.map_err(failed)?;
    let offset = (length == PACKET).then(|| offset(&answer, sent, now())).flatten();
    offset.ok_or_else(|| ClockError::Malformed { host: host.to_owned() })
}

/// `name:123` has one, `::1` has none.
fn has_port(host: &str) -> bool {
    host.split_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Seconds since 1900, the lower half being their fraction. It begins anew in 2036; only differences are used.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let fraction = (u64::from(since.subsec_nanos()) << 32) / 1_000_000_000;
    ((since.as_secs().wrapping_add(BEFORE_UNIX)) << 32) | fraction
}

/// The difference of the clocks in an answer to what was sent at `sent` and came at `come`; `None`: it is no answer to that.
fn offset(answer: &[u8; PACKET], sent: u64, come: u64) -> Option<Duration> {
    let stamp = |place: usize| {
        let bytes = answer.get(place..place + 8)?;
        bytes.try_into().map(u64::from_be_bytes).ok()
    };
    let (asked, received, replied) = (stamp(24)?, stamp(32)?, stamp(40)?);
    if answer[0] & 0b111 != FROM_SERVER || asked != sent || replied == 0 {
        return None;
    }
    // Two differences of the same sign, whatever century the numbers are of.
    let there = i128::from(received.wrapping_sub(sent).cast_signed());
    let back = i128::from(replied.wrapping_sub(come).cast_signed());
    let nanos = ((there + back).abs() / 2 * NANOS) >> 32;
    u64::try_from(nanos).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(asked: u64, received: u64, replied: u64) -> [u8; PACKET] {
        let mut packet = [0; PACKET];
        packet[0] = 0b0010_0100;
        packet[24..32].copy_from_slice(&asked.to_be_bytes());
        packet[32..40].copy_from_slice(&received.to_be_bytes());
        packet[40..].copy_from_slice(&replied.to_be_bytes());
        packet
    }

    #[test]
    fn the_way_there_and_back_cancels_out() {
        let second = 1_u64 << 32;
        let sent = 7 * second;
        // A server three seconds ahead, each way a quarter of a second long.
        let packet = answer(sent, sent + 3 * second + second / 4, sent + 3 * second + second / 2);
        let drift = offset(&packet, sent, sent + 3 * second / 4).unwrap();
        assert_eq!(drift, Duration::from_secs(3));
        // One that is behind, over the turn of the numbers.
        let sent = second;
        let packet = answer(sent, sent.wrapping_sub(2 * second), sent.wrapping_sub(2 * second));
        assert_eq!(offset(&packet, sent, sent).unwrap(), Duration::from_secs(2));
    }

    #[test]
    fn what_answers_something_else_is_no_answer() {
        let packet = answer(5, 6, 7);
        assert!(offset(&packet, 4, 8).is_none());
        let mut from_a_client = packet;
        from_a_client[0] = ASK;
        assert!(offset(&from_a_client, 5, 8).is_none());
    }

    #[tokio::test]
    async fn a_server_is_asked_over_udp() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let host = server.local_addr().unwrap().to_string();
        let serve = async {
            let mut question = [0; PACKET];
            let (_, from) = server.recv_from(&mut question).await.unwrap();
            let asked = u64::from_be_bytes(question[40..].try_into().unwrap());
            let at = now() + (60 << 32);
            server.send_to(&answer(asked, at, at), from).await.unwrap();
        };
        let (drift, ()) = tokio::join!(drift(&host), serve);
        let drift = drift.unwrap();
        assert!(drift > Duration::from_secs(59) && drift < Duration::from_secs(61), "{drift:?}");
    }
}
