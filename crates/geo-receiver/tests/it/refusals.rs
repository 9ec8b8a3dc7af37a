//! Requests that are refused, and in which words.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::{Answer, World, update};

fn check(answer: &Answer, status: u16, says: &str) {
    assert_eq!(answer.status, status, "{}", answer.text);
    let body: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    let message = body["message"].as_str().unwrap();
    assert!(message.starts_with(&status.to_string()) && message.contains(says), "{message}");
}

#[tokio::test]
async fn a_caller_without_a_sites_token_is_refused() {
    let world = World::ready().await;
    for token in ["", "rome", "rome-secret2", "wrong"] {
        let answer = world.post(&[("x-gitlab-token", token)], &update("a/b")).await;
        assert_eq!(
            (answer.status, answer.text.as_str()),
            (401, r#"{"message":"401 Unauthorized"}"#),
            "{token:?}"
        );
    }
    let answer = world.post(&[("x-gitlab-token", "wrong")], "not read at all").await;
    assert_eq!(answer.status, 401);
    assert!(world.events().await.is_empty());
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_refused_without_repeating_it() {
    let world = World::ready().await;
    let answer = world.post(&[], "{\"event_name\": hunter2").await;
    assert!(!answer.text.contains("hunter2"));
    check(&answer, 400, "syntax error at line 1");
    check(&world.post(&[], "[]").await, 400, "field of another type");
    check(&world.post(&[], "{}").await, 400, "names no event");
    check(&world.post(&[], "").await, 400, "ends too early");
    check(&world.post(&[("content-type", "text/plain")], &update("a/b")).await, 415, "application/json");
    check(&world.post(&[("content-type", "")], &update("a/b")).await, 415, "application/json");
    let charset = [("content-type", "Application/JSON; charset=utf-8")];
    assert_eq!(world.post(&charset, &update("a/b")).await.status, 201);
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_refused() {
    let world = World::ready().await;
    check(&world.post(&[], &" ".repeat(5000)).await, 413, "4096");
    // One that does not say how long it is.
    let mut stream = TcpStream::connect(world.host()).await.unwrap();
    let head = "POST /api/v4/geo/receive_events HTTP/1.1\r\nhost: x\r\nx-gitlab-token: rome-secret\r\n\
                content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(format!("1388\r\n{}\r\n0\r\n\r\n", " ".repeat(5000)).as_bytes()).await.unwrap();
    let mut answer = [0_u8; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_path_that_cannot_be_is_refused() {
    let world = World::ready().await;
    for path in ["../../etc/passwd", "/etc/passwd", "a/../b", "a/", "", "a\\u0000b"] {
        let body = update("PATH").replace("PATH", path);
        check(&world.post(&[], &body).await, 422, "project.path_with_namespace");
    }
    check(&world.post(&[], &update(&"x".repeat(2000))).await, 422, "longer than");
    check(&world.post(&[], r#"{"event_name":"push"}"#).await, 422, "absent");
    assert!(world.events().await.is_empty());
}

#[tokio::test]
async fn other_places_and_methods_are_not_found() {
    let world = World::ready().await;
    let mut stream = TcpStream::connect(world.host()).await.unwrap();
    stream.write_all(b"GET /api/v4/geo/receive_events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = [0_u8; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 405");
}

#[tokio::test]
async fn more_requests_than_fit_are_sent_away() {
    let world = World::ready().await;
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(world.host()).await.unwrap();
        let head = "POST /api/v4/geo/receive_events HTTP/1.1\r\nhost: x\r\nx-gitlab-token: rome-secret\r\n\
                    content-type: application/json\r\ncontent-length: 100\r\n\r\n{";
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    crate::support::until("both are being read", || async {
        world.admin("/metrics").await.text.contains("tabularium_geo_receiver_in_flight 2")
    })
    .await;
    let answer = world.post(&[], &update("a/b")).await;
    assert_eq!(answer.headers["retry-after"], "1");
    check(&answer, 503, "");
    drop(slow);
    crate::support::until("there is room again", || async {
        world.post(&[], &update("a/b")).await.status == 201
    })
    .await;
}
