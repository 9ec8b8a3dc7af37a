//! One exchange on the wire: requests and answers are read and written as text, by the descriptors of `proto/`.

use bytes::Bytes;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, MessageDescriptor, MethodDescriptor,
    ReflectMessage as _, Value, text_format::FormatOptions,
};
use sha1::{Digest as _, Sha1};
use tabularium_common::methods::{Method, Operation, Registry, Scope};
use tonic::{Code, Request, Status, client::Grpc};

use super::{
    seat::Seat,
    table::{Answer, Row},
};
use crate::api::Raw;

/// A line of an answer that is longer is told by its size and digest.
const LONGEST_LINE: usize = 600;

/// The gRPC path of a row's RPC.
pub(super) fn path(row: &Row) -> String {
    let package = if row.method.contains('.') { "" } else { "gitaly." };
    format!("/{package}{}", row.method)
}

/// Which repository a request is aimed at.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    /// The one that the row names, or `a.git`.
    AsWritten,
    /// This one, or none.
    Instead(Option<&'a str>),
}

/// What messages look like.
pub(super) struct Wire {
    pool: DescriptorPool,
    registry: Registry,
}

impl Wire {
    pub(super) fn new() -> Self {
        let pool = DescriptorPool::decode(tabularium_proto::DESCRIPTORS).unwrap();
        Self { pool, registry: Registry::read().unwrap() }
    }

    fn registered(&self, row: &Row) -> &Method {
        let path = path(row);
        self.registry.iter().find(|method| method.path == path).unwrap_or_else(|| panic!("{path}"))
    }

    /// Gitaly 16 has the RPC.
    pub(super) fn in_gitaly_16(&self, row: &Row) -> bool {
        self.registered(row).in_16_7 && !row.method.contains('.')
    }

    /// The RPC is one that writes.
    pub(super) fn changes(&self, row: &Row) -> bool {
        self.registered(row).operation == Operation::Mutator
    }

    pub(super) fn aims_at_a_repository(&self, row: &Row) -> bool {
        matches!(self.registered(row).scope, Scope::Repository { .. })
    }

    fn described(&self, row: &Row) -> MethodDescriptor {
        let registered = self.registered(row);
        let service = self.pool.get_service_by_name(&registered.service).unwrap();
        service.methods().find(|method| method.name() == registered.name).unwrap()
    }

    /// The request's messages.
    fn request(&self, seat: &Seat, row: &Row, target: Target<'_>) -> Vec<DynamicMessage> {
        let kind = self.described(row).input();
        let mut messages: Vec<DynamicMessage> =
            row.request.iter().map(|text| read(&kind, &seat.fill_in(text), row)).collect();
        let (Scope::Repository { target: path, .. }, Some(first)) =
            (&self.registered(row).scope, messages.first_mut())
        else {
            return messages;
        };
        let repository = self.pool.get_message_by_name("gitaly.Repository").unwrap();
        match target {
            Target::AsWritten if row.request[0].contains("$unset") => {}
            Target::AsWritten => {
                let here = read(&repository, &seat.fill_in("$here"), row);
                with_field(first, path, &mut |message, field| {
                    if !message.has_field(field) {
                        message.set_field(field, Value::Message(here.clone()));
                    }
                });
            }
            Target::Instead(text) => {
                let value = text.map(|text| Value::Message(read(&repository, text, row)));
                with_field(first, path, &mut |message, field| match &value {
                    Some(value) => message.set_field(field, value.clone()),
                    None => message.clear_field(field),
                });
            }
        }
        messages
    }

    /// Sends the request to a storage that is as it was, and tells what became of it.
    pub(super) async fn exchange(&self, seat: &Seat, row: &Row, target: Target<'_>) -> Answer {
        let messages = self.request(seat, row, target).iter().map(DynamicMessage::encode_to_vec).collect();
        let mut answer = self.answer(seat, row, messages).await;
        if self.registered(row).operation != Operation::Accessor {
            let (before, after) = (&seat.beginning, seat.disk());
            answer.extend(before.difference(&after).map(|line| seat.by_words(&format!("- {line}"))));
            answer.extend(after.difference(before).map(|line| seat.by_words(&format!("+ {line}"))));
            if *before != after || answer[0] == "OK" {
                seat.reset();
            }
        }
        answer
    }

    /// Status, detail and messages, as text.
    async fn answer(&self, seat: &Seat, row: &Row, messages: Vec<Vec<u8>>) -> Answer {
        let kind = self.described(row).output();
        let mut lines = Vec::new();
        match call(seat, &path(row), messages).await {
            Ok(messages) => {
                lines.push("OK".to_owned());
                for message in put_together(&kind, messages) {
                    lines.push(shortened(&seat.by_words(&text(&message))));
                }
            }
            Err(status) => {
                let line = format!("{} {}", name(status.code()), status.message().replace('\n', "\\n"));
                lines.push(seat.by_words(line.trim_end()));
                let details = tonic_types::Status::decode(status.details()).unwrap().details;
                for detail in details {
                    let name = detail.type_url.trim_start_matches("type.googleapis.com/");
                    let kind = self.pool.get_message_by_name(name).unwrap();
                    let message = DynamicMessage::decode(kind, detail.value.as_slice()).unwrap();
                    let line = format!("detail [{name}] {}", text(&message));
                    lines.push(seat.by_words(line.trim_end()));
                }
            }
        }
        lines
    }
}

/// The messages of a stream, with lists and data that come in pieces put together: where they are cut is nobody's
/// business.
fn put_together(kind: &MessageDescriptor, messages: Vec<Bytes>) -> Vec<DynamicMessage> {
    let decode = |message: Bytes| DynamicMessage::decode(kind.clone(), message).unwrap();
    if !messages.is_empty() && kind.fields().all(|field| field.is_list()) {
        return vec![decode(messages.concat().into())];
    }
    let mut together: Vec<DynamicMessage> = Vec::new();
    for message in messages.into_iter().map(decode) {
        if let Some((field, more)) = data(&message)
            && let Some(earlier) = together.last_mut()
            && let Some((same, beginning)) = data(earlier)
            && field == same
        {
            earlier.set_field(&field, Value::Bytes([beginning, more].concat().into()));
        } else {
            together.push(message);
        }
    }
    together
}

/// The data of a message that has nothing else.
fn data(message: &DynamicMessage) -> Option<(FieldDescriptor, Bytes)> {
    let mut fields = message.fields();
    let (field, value) = fields.next()?;
    let data = value.as_bytes()?.clone();
    fields.next().is_none().then_some((field, data))
}

fn read(kind: &MessageDescriptor, text: &str, row: &Row) -> DynamicMessage {
    DynamicMessage::parse_text_format(kind.clone(), &text.replace("$unset", ""))
        .unwrap_or_else(|error| panic!("{}: {text}: {error}", row.name()))
}

fn text(message: &DynamicMessage) -> String {
    message.to_text_format_with_options(&FormatOptions::new().pretty(false))
}

fn shortened(line: &str) -> String {
    if line.len() <= LONGEST_LINE {
        return line.trim_end().to_owned();
    }
    format!("{} bytes, {}", line.len(), hex::encode(Sha1::digest(line)))
}

/// Does something to the field at a path of field numbers, unless its message is a header that is not there.
fn with_field(
    message: &mut DynamicMessage,
    path: &[u32],
    change: &mut dyn FnMut(&mut DynamicMessage, &FieldDescriptor),
) {
    let (&number, rest) = path.split_first().unwrap();
    let field = message.descriptor().get_field(number).unwrap();
    if rest.is_empty() {
        change(message, &field);
    } else if message.has_field(&field) || field.containing_oneof().is_none() {
        with_field(message.get_field_mut(&field).as_message_mut().unwrap(), rest, change);
    }
}

async fn call(seat: &Seat, path: &str, messages: Vec<Vec<u8>>) -> Result<Vec<Bytes>, Status> {
    let mut client = Grpc::new(seat.channel());
    client.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::iter(messages.into_iter().map(Bytes::from)));
    request.metadata_mut().insert("gitaly-servers", seat.servers().parse().unwrap());
    // Without it Gitaly 16 does not use the key that it has.
    request.metadata_mut().insert("gitaly-feature-gpg-signing", "true".parse().unwrap());
    let mut answers = client.streaming(request, path.parse().unwrap(), Raw).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = answers.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

/// A code as gRPC spells it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
