//! A fetch whose bytes go beside its call, over a sidechannel: they are neither packed into messages nor taken out of them.
//!
//! A router that does not know of that, or something on the way to it that does not, is asked in messages instead, and for a
//! while not tried again.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream};
use http::{HeaderMap, HeaderValue};
use tabularium_common::{
    grpc::Address,
    lifecycle::Tasks,
    multiplex::{
        self,
        sidechannel::{Client, METADATA, Sidechannels, generation},
    },
};
use tabularium_proto::gitaly::{
    PostUploadPackWithSidechannelRequest, smart_http_service_client::SmartHttpServiceClient,
};
use tonic::{Code, Request, Status, metadata::MetadataMap, transport::Channel};

use crate::{
    answer::{Chunk, Messages},
    freshness::Freshness,
    limits::SIDECHANNEL_REST,
    request_body::BodyFault,
    upload::{Chunks, Slot},
    upstream::{is_lost, never_dialled},
};

/// The multiplexed connection to one router.
pub(crate) struct Beside {
    channel: Channel,
    sidechannels: Sidechannels,
    rests_until: Mutex<Option<Instant>>,
}

impl Beside {
    /// Not dialled yet. `tasks` own the connection.
    pub(crate) fn new(address: &Address, tasks: &Tasks) -> Self {
        let sidechannels = Sidechannels::default();
        let channel = multiplex::channel(address, sidechannels.clone(), tasks);
        Self { channel, sidechannels, rests_until: Mutex::default() }
    }

    fn rests(&self) -> bool {
        let until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Begins the fetch. `None`: it has to go another way, and nothing was read of its body.
    pub(crate) async fn fetch(
        &self,
        message: &PostUploadPackWithSidechannelRequest,
        headers: HeaderMap,
        slot: Slot,
        freshness: &Freshness,
    ) -> Option<Result<Messages, Status>> {
        if self.rests() {
            return None;
        }
        let mut offer = self.sidechannels.offer()?;
        let mut request = Request::new(message.clone());
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        let asked = request.metadata_mut().as_mut();
        asked.insert(METADATA, offer.id().header());
        asked.insert(generation::ASK, HeaderValue::from_static("1"));
        let mut client = SmartHttpServiceClient::new(self.channel.clone());
        let learned = freshness.clone();
        let mut call: Call = Box::pin(async move {
            let answer = client.post_upload_pack_with_sidechannel(request).await?;
            learned.learn(answer.metadata().as_ref());
            Ok(())
        });
        let opened = tokio::select! {
            biased;
            opened = offer.opened() => opened,
            answer = &mut call => return match answer {
                Ok(()) => Some(Ok(stream::empty().boxed())),
                Err(status) if is_foreign(&status) => {
                    tracing::info!(error = status.message(), "no sidechannel there; fetching in messages");
                    let mut rests = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
                    *rests = Some(Instant::now() + SIDECHANNEL_REST);
                    None
                }
                Err(status) => Some(Err(status)),
            },
        };
        let side = match opened.accept().await {
            Ok(stream) => Arc::new(Client::new(stream)),
            Err(error) => return Some(Err(broken(&error))),
        };
        let upload: BoxFuture<'static, _> = Box::pin(upload(Arc::clone(&side), Chunks::new(slot)));
        let front = Some(Front { preface: generation::Front::default(), freshness: freshness.clone() });
        let flow = Flow { side: Some(side), upload: Some(upload), front, call, over: false };
        let flow = stream::unfold(flow, |mut flow| async move { flow.next().await.map(|item| (item, flow)) });
        Some(Ok(flow.boxed()))
    }
}

/// Whoever answered does not know sidechannels, or HTTP/2 did not get through to it.
fn is_foreign(status: &Status) -> bool {
    status.code() == Code::Unimplemented || is_lost(status) && !never_dialled(status)
}

fn broken(error: &std::io::Error) -> Status {
    Status::unavailable(format!("the sidechannel broke: {error}"))
}

type Call = BoxFuture<'static, Result<(), Status>>;

/// The body of the request, to its end.
async fn upload(side: Arc<Client>, mut chunks: Chunks) -> Result<(), BodyFault> {
    while let Some(chunk) = chunks.next().await {
        if side.write(chunk?).await.is_err() {
            // The router wants no more; how the call ends says whether that is right.
            return Ok(());
        }
    }
    let _ = side.finish().await;
    Ok(())
}

/// The beginning of what is fetched, where the router says how new the repository is.
struct Front {
    preface: generation::Front,
    freshness: Freshness,
}

impl Front {
    /// The rest of the next piece, once that is known.
    fn take(&mut self, piece: Bytes) -> Option<Bytes> {
        let read = self.preface.take(piece)?;
        if let Some(generation) = read.generation {
            self.freshness.note(generation);
        }
        Some(read.rest)
    }
}

/// A fetch under way. Dropped, it takes its stream and its call with it.
struct Flow {
    side: Option<Arc<Client>>,
    upload: Option<BoxFuture<'static, Result<(), BodyFault>>>,
    /// Until it has been read.
    front: Option<Front>,
    call: Call,
    over: bool,
}

impl Flow {
    fn past_the_front(&mut self, piece: Bytes) -> Option<Bytes> {
        let Some(front) = &mut self.front else { return Some(piece) };
        let rest = front.take(piece)?;
        self.front = None;
        (!rest.is_empty()).then_some(rest)
    }

    async fn next(&mut self) -> Option<Result<Chunk, Status>> {
        if self.over {
            return None;
        }
        let end = loop {
            let Some(side) = &self.side else { break (&mut self.call).await };
            let uploading = async {
                match &mut self.upload {
                    Some(upload) => upload.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                uploaded = uploading => {
                    self.upload = None;
                    if let Err(fault) = uploaded {
                        // Whoever reads the answer is told of the fault itself.
                        break Err(Status::cancelled(fault.to_string()));
                    }
                }
                piece = side.read() => match piece {
                    Ok(Some(piece)) => {
                        if let Some(piece) = self.past_the_front(piece) {
                            return Some(Ok(Chunk::Output(piece)));
                        }
                    }
                    Ok(None) => {
                        (self.side, self.upload) = (None, None);
                        let held = self.front.take().map(|front| front.preface.end()).unwrap_or_default();
                        if !held.is_empty() {
                            return Some(Ok(Chunk::Output(held)));
                        }
                    }
                    Err(error) => {
                        (self.side, self.upload) = (None, None);
                        // The router knows better why.
                        break (&mut self.call).await.and(Err(broken(&error)));
                    }
                },
            }
        };
        self.over = true;
        (self.side, self.upload) = (None, None);
        end.err().map(Err)
    }
}
