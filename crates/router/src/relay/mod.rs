//! The way of one RPC: token, deadline, one lookup of its path, then whatever that says.
//!
//! No message is decoded and nothing is spawned or boxed on the way of a read but its deadline's timer.

mod attempt;
mod beside;
mod client;
mod drive;
mod fan_out;
mod freshness;
mod maintain;
mod participants;
mod read;
mod request;
mod write;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tabularium_common::{auth::RequireToken, grpc::timeout_of, lifecycle::Tasks};
use tokio::time::Sleep;
use tonic::{Code, service::Routes as TypedServices};

use crate::{
    account::Account,
    answers,
    body::{Accounted, Deadline, Driven, Graceful, Reply},
    coordinator::Coordinators,
    feature_flags::FeatureFlags,
    metrics::Metrics,
    nodes::{Nodes, Storages},
    patience::Allowance,
    refusal::{Refusal, code_of},
    routes::{Routes, confirmation::Confirmations},
    suspicions::Suspicions,
    table::{Action, Entry, Table},
    turns::Turns,
    votes::Transactions,
    writes::Writes,
};
use attempt::Answer;
use client::Started;
pub(crate) use freshness::GENERATION;
use request::Call;
pub(crate) use request::{QUESTION, repository};

/// What all workers share.
pub(crate) struct Shared {
    /// What is done with each path.
    pub(crate) table: Table,
    /// What is said of feature flags that clients say nothing of.
    pub(crate) feature_flags: FeatureFlags,
    /// Who may call.
    pub(crate) require: RequireToken,
    /// What is counted.
    pub(crate) metrics: Arc<Metrics>,
    /// The storage nodes.
    pub(crate) nodes: Arc<Nodes>,
    /// Where repositories are.
    pub(crate) routes: Arc<Routes>,
    /// Where they can be read, also when no coordinator answers.
    pub(crate) confirmations: Confirmations,
    /// Writes under way.
    pub(crate) writes: Writes,
    /// Who is next at which ticket.
    pub(crate) turns: Turns,
    /// What nodes vote on.
    pub(crate) transactions: Transactions,
    /// Owns the tasks that drive writes.
    pub(crate) tasks: Tasks,
    /// Who is asked what no route says.
    pub(crate) coordinators: Coordinators,
    /// What coordinators were told of replicas.
    pub(crate) suspicions: Suspicions,
    /// When a second node is asked.
    pub(crate) hedging: Hedging,
    /// How long the beginning of an answer is held.
    pub(crate) hold_answers: Duration,
    /// Services that are answered here, message by message.
    pub(crate) typed: TypedServices,
    /// A coordinator's own services can be reached through here.
    pub(crate) passes_to_coordinator: bool,
}

/// When a second node is asked for the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hedging {
    /// Shortest silence of the first.
    pub(crate) after: Duration,
    /// How many reads of a hundred.
    pub(crate) percent: u32,
}

impl Hedging {
    fn enabled(self) -> bool {
        self.percent > 0
    }
}

/// One worker's relay.
pub(crate) struct Relay {
    pub(crate) shared: Arc<Shared>,
    worker: usize,
    spread: AtomicUsize,
    allowance: Allowance,
}

/// How an RPC that was not refused is answered.
enum Outcome {
    /// By a node, whose answer flows through.
    Node(Answer),
    /// By the task that drives a write.
    Written(Started),
    /// In full.
    Whole(Response<Reply>),
}

impl Relay {
    /// The relay of a worker.
    pub(crate) fn new(shared: Arc<Shared>, worker: usize) -> Self {
        // Workers start at different replicas.
        let allowance = Allowance::new(shared.hedging.percent);
        Self { shared, worker, spread: AtomicUsize::new(worker), allowance }
    }

    fn spread(&self) -> usize {
        self.spread.fetch_add(1, Ordering::Relaxed)
    }

    /// Serves one RPC. It never fails: what goes wrong is a status.
    pub(crate) async fn serve(&self, request: Request<Incoming>) -> Response<Reply> {
        let grpc = request.headers().get(header::CONTENT_TYPE);
        if request.method() != Method::POST
            || !grpc.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
        {
            return not_grpc();
        }
        let entry = self.shared.table.get(request.uri().path()).cloned();
        let mut account = Account::open(Arc::clone(&self.shared.metrics), entry.clone());
        let mut expiry = None;
        if let Err(refusal) = self.admit(request.headers(), &mut expiry) {
            account.correlate_by(request.headers());
            return finish(Err(refusal), None, account);
        }
        let work = self.route(request, entry, &mut account);
        let outcome = match &mut expiry {
            None => work.await,
            Some(expiry) => tokio::select! {
                biased;
                outcome = work => outcome,
                () = expiry.as_mut() => Err(Refusal::DeadlineExceeded),
            },
        };
        finish(outcome, expiry, account)
    }

    fn admit(&self, headers: &HeaderMap, expiry: &mut Option<Pin<Box<Sleep>>>) -> Result<(), Refusal> {
        self.shared.require.check(headers)?;
        *expiry = timeout_of(headers)?.map(|timeout| Box::pin(tokio::time::sleep(timeout)));
        Ok(())
    }

    async fn route(
        &self,
        request: Request<Incoming>,
        entry: Option<Arc<Entry>>,
        account: &mut Account,
    ) -> Result<Outcome, Refusal> {
        let Some(entry) = entry else {
            account.correlate_by(request.headers());
            let path = request.uri().path();
            let passed = self.shared.passes_to_coordinator && answers::passage::is_passed(path);
            return if passed || OTHER_TYPED.contains(&path) {
                Ok(Outcome::Whole(self.typed(request).await))
            } else {
                Err(Refusal::UnknownMethod(path.to_owned()))
            };
        };
        if matches!(entry.action, Action::Typed) {
            account.correlate_by(request.headers());
            return Ok(Outcome::Whole(self.typed(request).await));
        }
        let (parts, body) = request.into_parts();
        let call = Call::new(parts, &entry, &self.shared.feature_flags);
        account.correlate(call.correlation.clone());
        match &entry.action {
            Action::Read { target, reader } => {
                self.read(call, &entry, (target.as_slice(), *reader), body, account).await
            }
            Action::ReadStorage { within, name } => {
                self.read_storage(&call, within, *name, body, account).await
            }
            // Boxed, so that a read does not carry the size of a write.
            Action::Write { .. } => Box::pin(self.write(call, &entry, body, account)).await,
            Action::Maintain { target } => Box::pin(self.maintain(call, target, body, account)).await,
            Action::RepositoryExists => {
                Box::pin(answers::repository::exists(&self.shared, &call.correlation, body))
                    .await
                    .map(Outcome::Whole)
            }
            Action::RemoveRepository { target, must_exist } => {
                let removal =
                    answers::repository::remove(&self.shared, &call.correlation, body, target, *must_exist);
                Box::pin(removal).await.map(Outcome::Whole)
            }
            Action::Typed | Action::NotBuilt => Err(Refusal::NotBuilt(entry.method.path.clone())),
        }
    }

    async fn typed(&self, request: Request<Incoming>) -> Response<Reply> {
        let mut services = self.shared.typed.clone();
        let answer: Result<_, std::convert::Infallible> = tower::Service::call(&mut services, request).await;
        answer.unwrap_or_else(|never| match never {}).map(Reply::Typed)
    }

    /// The storages of a virtual storage that a client named.
    fn storages<'d>(
        directory: &'d crate::nodes::Directory,
        virtual_storage: &str,
    ) -> Result<&'d Storages, Refusal> {
        match directory.storages(virtual_storage) {
            Some(storages) => Ok(storages),
            None if directory.known() => Err(Refusal::StorageNotFound),
            None => Err(Refusal::NoTopology),
        }
    }
}

/// What is answered message by message without being Gitaly's. All else that the table does not have is a method that
/// nobody has heard of, whatever its service.
const OTHER_TYPED: [&str; 4] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

fn finish(
    outcome: Result<Outcome, Refusal>,
    expiry: Option<Pin<Box<Sleep>>>,
    mut account: Account,
) -> Response<Reply> {
    match outcome {
        Err(refusal) => {
            account.refusal = Some(refusal.to_string());
            account.close(refusal.code());
            refused(&refusal)
        }
        Ok(Outcome::Whole(response)) => {
            account.close(whole_code(&response));
            response
        }
        Ok(Outcome::Node(Answer { response, held, tether, storage })) => {
            let (mut parts, body) = response.into_parts();
            if let Some(generation) = account.generation() {
                parts.headers.insert(GENERATION, generation);
            }
            if let Some(code) = code_of(&parts.headers) {
                account.close(code);
                return Response::from_parts(parts, Reply::Whole { message: None, trailers: None });
            }
            // The answer may end earlier than the node meant it to.
            parts.headers.remove(header::CONTENT_LENGTH);
            let graceful = Graceful::new(body, tether, storage).behind(held);
            let body = Accounted::new(Deadline::new(graceful, expiry), account);
            Response::from_parts(parts, Reply::Relayed(body))
        }
        Ok(Outcome::Written(Started::Whole(mut parts))) => {
            if let Some(generation) = account.generation() {
                parts.headers.insert(GENERATION, generation);
            }
            account.close(code_of(&parts.headers).unwrap_or(Code::Unknown));
            Response::from_parts(parts, Reply::Whole { message: None, trailers: None })
        }
        Ok(Outcome::Written(Started::Stream(mut parts, frames))) => {
            parts.headers.remove(header::CONTENT_LENGTH);
            // Unless the write is recorded by now, its generation stands in the trailers alone.
            if let Some(generation) = account.generation() {
                parts.headers.insert(GENERATION, generation);
            }
            let body = Accounted::new(Deadline::new(Driven::new(frames), expiry), account);
            Response::from_parts(parts, Reply::Driven(body))
        }
    }
}

fn whole_code(response: &Response<Reply>) -> Code {
    let in_trailers = match response.body() {
        Reply::Whole { trailers: Some(trailers), .. } => code_of(trailers),
        _ => None,
    };
    code_of(response.headers()).or(in_trailers).unwrap_or(Code::Ok)
}

/// A status without a body.
fn refused(refusal: &Refusal) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole { message: None, trailers: None });
    *response.headers_mut() = refusal.trailers();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn not_grpc() -> Response<Reply> {
    let mut response = Response::new(Reply::Whole { message: None, trailers: None });
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

/// One message and OK.
pub(crate) fn answered(message: &impl prost::Message) -> Response<Reply> {
    let mut out = request::framed(message.encoded_len());
    // A vector grows; only a fixed buffer could be too small.
    let encoded = message.encode(&mut out).map_err(|error| error.to_string());
    let sealed = encoded.and_then(|()| request::seal(out).map_err(|refusal| refusal.to_string()));
    match sealed {
        Err(text) => refused(&Refusal::Status(tonic::Status::internal(text))),
        Ok(message) => ok(HeaderMap::new(), message),
    }
}

fn ok(mut headers: HeaderMap, message: Bytes) -> Response<Reply> {
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut response = Response::new(Reply::Whole { message: Some(message), trailers: Some(trailers) });
    *response.headers_mut() = headers;
    response
}
