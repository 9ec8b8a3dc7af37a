use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    clients::noise,
    stage::{Stage, fetch_everything},
};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut child = std::process::Command::new("gzip")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let feed = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    feed.join().unwrap();
    output.stdout
}

const GZIPPED_FETCH: &str =
    "Content-Type: application/x-git-upload-pack-request\r\nContent-Encoding: x-gzip\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_small_body_that_unpacks_to_a_large_one_is_cut_off() {
    let stage = Stage::configured("max_negotiation_bytes = 1000000").await;
    stage.seed("g/p.git", 1, 0).await;
    // Haves that never end: git reads on and on.
    let have = format!("0032have {}\n", "1".repeat(40));
    let bomb = gzip(have.repeat(200_000).as_bytes());
    assert!(bomb.len() < 100_000);
    let answer = stage.http("POST", "/g/p/git-upload-pack", GZIPPED_FETCH, &bomb).await;
    assert!(answer.status == 413 && answer.text().contains("1000000 bytes"), "{answer:?}");
    stage.until("no git is left", |seen| seen.running == 0).await;

    let answer = stage.http("POST", "/g/p/git-upload-pack", GZIPPED_FETCH, b"not gzip at all").await;
    assert!(answer.status == 400 && answer.text().contains("gzip"), "{answer:?}");
    let cut = gzip(have.repeat(10).as_bytes());
    let answer = stage.http("POST", "/g/p/git-upload-pack", GZIPPED_FETCH, &cut[..cut.len() - 9]).await;
    assert!(answer.status == 400 && answer.text().contains("gzip"), "{answer:?}");
    stage.until("no git is left", |seen| seen.running == 0).await;
    assert!(!stage.fake.seen.lock().unwrap().inputs.contains(&"end".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_larger_than_allowed_is_refused() {
    let stage = Stage::configured("max_push_bytes = 500000").await;
    stage.seed("g/p.git", 1, 0).await;
    std::fs::write(stage.path("seed/big"), noise(2 << 20)).unwrap();
    stage.git(&["-C", "seed", "add", "."]).await;
    stage.git(&["-C", "seed", "commit", "-q", "-m", "big"]).await;
    let url = format!("{}/g/p.git", stage.url);
    for buffer in ["http.postBuffer=1024", "http.postBuffer=64m"] {
        let said = stage.try_git(&["-C", "seed", "-c", buffer, "push", &url, "HEAD:main"]).await;
        assert!(!said.ok && said.err.contains("RPC failed"), "{}", said.err);
    }
    stage.until("no git is left", |seen| seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_too_many_is_told_so() {
    let stage = Stage::configured("max_requests = 1").await;
    stage.empty("g/p.git").await;
    let mut first = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
    let head = "POST /g/p.git/git-receive-pack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
                Content-Type: application/x-git-receive-pack-request\r\n\r\n1\r\n0\r\n";
    first.write_all(head.as_bytes()).await.unwrap();
    stage.until("the first is running", |seen| seen.running == 1).await;
    let answer = stage.http("GET", "/g/p/info/refs?service=git-upload-pack", "", b"").await;
    assert!(answer.status == 503 && answer.head.contains("retry-after"), "{answer:?}");
    drop(first);
    stage.until("the first is gone", |seen| seen.running == 0).await;
    let answer = stage.http("GET", "/g/p/info/refs?service=git-upload-pack", "", b"").await;
    assert_eq!(answer.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_in_which_nothing_moves_is_broken_off() {
    let stage = Stage::configured("stall_timeout = \"1s\"").await;
    stage.empty("g/p.git").await;
    let head = "POST /g/p.git/git-receive-pack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
                Content-Type: application/x-git-receive-pack-request\r\n\r\n1\r\n0\r\n";
    let answer = stage.raw(head.as_bytes()).await;
    assert_eq!(answer.status, 408);
    stage.until("the call was cancelled", |seen| seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_are_bounded_and_answers_carry_the_callers_id() {
    let stage = Stage::new().await;
    stage.empty("g/p.git").await;
    let target = "/g/p/info/refs?service=git-upload-pack";
    let answer = stage.http("GET", target, &format!("X-Long: {}\r\n", "x".repeat(40_000)), b"").await;
    assert_eq!(answer.status, 431);
    for header in ["X-Request-Id", "X-Gitlab-Correlation-Id"] {
        let answer = stage.http("GET", target, &format!("{header}: abc-123\r\n"), b"").await;
        assert!(answer.status == 200 && answer.head.contains("x-request-id: abc-123"), "{}", answer.head);
        assert!(answer.head.contains("cache-control: no-cache"), "{}", answer.head);
        assert_eq!(stage.fake.last("InfoRefsUploadPack")["x-gitlab-correlation-id"], "abc-123");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_a_running_push_end() {
    let mut stage = Stage::new().await;
    stage.empty("g/p.git").await;
    let head = "POST /g/p.git/git-receive-pack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
                Content-Type: application/x-git-receive-pack-request\r\n\r\n1\r\n0\r\n";
    let mut stream = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stage.until("the push is running", |seen| seen.running == 1).await;
    let gateway = stage.gateway.take().unwrap();
    let finish = async {
        // From here on nobody else is let in.
        while tokio::net::TcpStream::connect(&stage.host).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        stream.write_all(b"3\r\n000\r\n0\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let (stopped, answer) = tokio::join!(gateway.stop(), finish);
    stopped.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_is_cut_off() {
    let stage = Stage::configured("stall_timeout = \"1s\"").await;
    let tip = stage.seed("g/p.git", 1, 48 << 20).await;
    let request = fetch_everything("g/p.git", &tip);
    let mut stream = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stage.until("git was stopped", |seen| seen.abandoned == 1 && seen.running == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_with_prior_knowledge_is_served() {
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::{
        client::legacy::Client,
        rt::{TokioExecutor, TokioTimer},
    };
    let stage = Stage::new().await;
    let tip = stage.seed("g/p.git", 1, 0).await;
    let client = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .build_http::<Empty<bytes::Bytes>>();
    let target = format!("{}/g/p.git/info/refs?service=git-upload-pack", stage.url);
    let answer = client.get(target.parse().unwrap()).await.unwrap();
    assert_eq!((answer.version(), answer.status().as_u16()), (http::Version::HTTP_2, 200));
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(body.starts_with(b"001e# service=git-upload-pack\n0000"));
    assert!(String::from_utf8_lossy(&body).contains(&tip));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_finish_their_headers_are_cut_off() {
    let stage = Stage::configured("header_timeout = \"1s\"").await;
    for start in ["", "P", "GET / HTTP/1.1\r\nX-Slow: "] {
        let mut stream = tokio::net::TcpStream::connect(&stage.host).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        // What it says, if anything, is up to the library; that it ends is ours.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(20), read).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_could_be_read_two_ways_are_refused() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let target = "/g/p.git/info/refs?service=git-upload-pack";
    assert_eq!(stage.http("GET", target, "", b"").await.status, 200);
    let answer = stage.http("GET", target, "Host: another\r\n", b"").await;
    assert!(answer.status == 400 && answer.text().contains("Host"), "{answer:?}");
    for framing in ["Content-Length: 5\r\n", "Content-Length: -1\r\n", "Transfer-Encoding: xchunked\r\n"] {
        let answer = stage.http("POST", "/g/p.git/git-upload-pack", framing, b"0000").await;
        assert_eq!(answer.status, 400, "{framing} {answer:?}");
    }
}
