//! `docs/gitaly-api.md` is true: its table names every RPC once, and the node answers those it says it answers.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures::StreamExt as _;
use tabularium_common::methods::Registry;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::harness::TestNode;

const PAGE: &str = include_str!("../../../../docs/gitaly-api.md");

/// Passes messages on as they are.
#[derive(Default)]
pub(crate) struct Raw;

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

struct Line {
    status: &'static str,
    on_node: bool,
    note: &'static str,
}

/// The lines of the table by gRPC path.
fn table() -> BTreeMap<String, Line> {
    let mut lines = BTreeMap::new();
    let mut service = String::new();
    for line in PAGE.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            service = if name.contains('.') { name.to_owned() } else { format!("gitaly.{name}") };
        }
        let Some(cells) = line.strip_prefix("| `").and_then(|line| line.strip_suffix(" |")) else { continue };
        let cells: Vec<&str> = cells.split('|').map(str::trim).collect();
        let [method, status, on_node, note] = cells[..] else { panic!("{line}") };
        let path = format!("/{service}/{}", method.trim_end_matches('`'));
        let on_node = match on_node {
            "yes" => true,
            "no" => false,
            other => panic!("{path}: {other}"),
        };
        let earlier = lines.insert(path.clone(), Line { status, on_node, note });
        assert!(earlier.is_none(), "{path} is there twice");
    }
    lines
}

/// The methods that the node answers.
pub(crate) fn on_node() -> BTreeSet<String> {
    table().into_iter().filter(|(_, line)| line.on_node).map(|(path, _)| path).collect()
}

#[test]
fn every_method_has_its_line() {
    let table = table();
    let registry = Registry::read().unwrap();
    let methods: Vec<&str> = registry.iter().map(|method| method.path.as_str()).collect();
    for path in &methods {
        assert!(table.contains_key(*path), "{path} is missing");
    }
    assert_eq!(table.len(), methods.len());
    for (path, line) in &table {
        let fits = match line.status {
            "served" => line.on_node,
            "partly" => line.on_node && !line.note.is_empty(),
            "relayed only" => !line.on_node,
            "answered by the router" | "refused by the router" => true,
            other => panic!("{path}: {other}"),
        };
        assert!(fits, "{path}");
    }
}

/// One empty message, and the end of the request; the code of the answer.
async fn call(node: &TestNode, path: &str) -> Code {
    let mut client = Grpc::new(node.channel());
    client.ready().await.unwrap();
    let request = Request::new(tokio_stream::once(Bytes::new()));
    let answer = client.streaming(request, path.parse().unwrap(), Raw).await;
    let mut messages = match answer {
        Ok(answer) => answer.into_inner(),
        Err(status) => return status.code(),
    };
    while let Some(message) = messages.next().await {
        if let Err(status) = message {
            return status.code();
        }
    }
    Code::Ok
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_answers_what_the_page_says() {
    let node = TestNode::start().await;
    let mut wrong = Vec::new();
    for (path, line) in table() {
        let code = call(&node, &path).await;
        if (code != Code::Unimplemented) != line.on_node {
            wrong.push(format!("{path}: {code:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    node.stop().await;
}
