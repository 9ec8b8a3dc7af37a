//! The fault proxy between a client and an echoing server.

use std::time::Duration;

use tabularium_common::lifecycle::Tasks;
use tabularium_testkit::{
    proxy::{Direction, Fault, FaultProxy},
    wait::wait_until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

async fn echo() -> (String, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let tasks = Tasks::new();
    let spawner = tasks.clone();
    tasks.spawn("echo", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawner.spawn("echo connection", async move {
                let (mut reader, mut writer) = stream.split();
                let _closed = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    (address, tasks)
}

async fn echoed(stream: &mut TcpStream, text: &[u8]) -> bool {
    stream.write_all(text).await.unwrap();
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await.is_ok() && answer == text
}

#[tokio::test]
async fn bytes_go_through_and_a_cut_ends_the_connection() {
    let (server, _tasks) = echo().await;
    let proxy = FaultProxy::start(server).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(echoed(&mut stream, b"hello").await);
    assert_eq!(proxy.relayed(), 10);
    proxy.cut();
    assert!(matches!(stream.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    let mut again = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(echoed(&mut again, b"again").await, "only what was open is cut");
}

#[tokio::test]
async fn a_black_hole_swallows_until_it_is_gone() {
    let (server, _tasks) = echo().await;
    let proxy = FaultProxy::start(server).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(echoed(&mut stream, b"before").await);
    proxy.set(Fault::BlackHole);
    stream.write_all(b"x").await.unwrap();
    let mut byte = [0; 1];
    assert!(timeout(Duration::from_millis(200), stream.read(&mut byte)).await.is_err());
    proxy.set(Fault::None);
    assert_eq!(stream.read(&mut byte).await.unwrap(), 1);
}

#[tokio::test]
async fn a_delay_delays_and_a_refusal_refuses() {
    let (server, _tasks) = echo().await;
    let proxy = FaultProxy::start(server).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.set(Fault::Delay(Duration::from_millis(60)));
    let started = Instant::now();
    assert!(echoed(&mut stream, b"slow").await);
    assert!(started.elapsed() >= Duration::from_millis(120));
    proxy.set(Fault::Refuse);
    let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(matches!(refused.read(&mut [0; 1]).await, Ok(0) | Err(_)));
}

#[tokio::test]
async fn one_direction_alone_can_be_swallowed() {
    let (server, _tasks) = echo().await;
    let proxy = FaultProxy::start(server).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(echoed(&mut stream, b"before").await);
    proxy.set_one_way(Direction::Down, Fault::BlackHole);
    stream.write_all(b"x").await.unwrap();
    // The request has arrived, the answer does not.
    wait_until("the request at the server", Duration::from_secs(5), || async {
        if proxy.relayed() == 13 { Ok(()) } else { Err(format!("{} bytes", proxy.relayed())) }
    })
    .await;
    assert!(timeout(Duration::from_millis(200), stream.read(&mut [0; 1])).await.is_err());
    proxy.set_one_way(Direction::Down, Fault::None);
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 1);
}

#[tokio::test]
async fn a_server_that_is_down_looks_down() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let proxy = FaultProxy::start(server.to_string()).await;
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    drop((listener, accepted, stream));
    let deadline = Duration::from_secs(5);
    wait_until("a refusal", deadline, || async {
        match TcpStream::connect(proxy.address()).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let _listener = TcpListener::bind(server).await.unwrap();
    wait_until("a connection", deadline, || async {
        TcpStream::connect(proxy.address()).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
