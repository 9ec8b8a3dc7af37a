//! How a write comes to its end: what is told to the coordinator, and what to the client.

use std::{sync::Arc, time::Instant};

use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, response::Parts};
use tabularium_common::faults::{CrashPoint, SafetyStep, crash_point, is_off};
use tabularium_proto::coordinator::Route;
use tonic::{Code, Status};

use super::Drive;
use crate::{
    limits::SECONDARY_DRAIN,
    refusal::Refusal,
    relay::write::{Failed, Held},
    routing::{Ending, Presumed, presumed},
    turns::Turn,
    votes::transaction::{Conclusion, Event, PRIMARY},
    writes::Settlement,
};

/// How the primary's part ended.
pub(super) enum End {
    Trailers(HeaderMap, Code),
    Whole(Parts, Code),
    /// Without a word of its own. `again`: another primary may do better.
    Broken {
        refusal: Refusal,
        again: bool,
    },
}

impl End {
    /// The node's own status.
    pub(super) fn code(&self) -> Option<Code> {
        match self {
            Self::Trailers(_, code) | Self::Whole(_, code) => Some(*code),
            Self::Broken { .. } => None,
        }
    }

    fn status(&self) -> Option<Status> {
        match self {
            Self::Trailers(headers, _) => Status::from_header_map(headers),
            Self::Whole(parts, _) => Status::from_header_map(&parts.headers),
            Self::Broken { .. } => None,
        }
    }
}

/// Something that is being told to the coordinator.
pub(super) struct Settling {
    told: BoxFuture<'static, Result<(), Refusal>>,
    /// Votes wait for it.
    record: bool,
    turn: Turn,
    /// Of what is to be recorded: where it was written, and who has it.
    written: Option<(Arc<Route>, Vec<String>)>,
}

/// What came of the ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing is recorded: no ticket was taken, or it was given back unused.
    Nothing,
    /// It is recorded.
    Recorded,
    /// Others find out.
    InDoubt,
}

impl Drive<'_> {
    pub(super) fn unvoted(&self) -> Settlement {
        if self.ears.is_some() {
            tracing::warn!(
                method = self.story.call.path(),
                storage = %self.nodes[PRIMARY].storage,
                "the nodes did not vote on a write; only the primary is known to have it"
            );
            self.story.shared.metrics.unvoted_writes.inc();
        }
        Settlement::Commit { storages: self.names(&[PRIMARY]), unvoted: true }
    }

    /// Tells the coordinator what became of the write once that is known.
    pub(super) fn conclude(&mut self) {
        if self.settling.is_some() || self.taking.is_some() || self.comparing.is_some() {
            return;
        }
        if self.held.is_none() {
            let is_open = self.outcome == Outcome::Nothing && self.ears.is_some();
            if is_open && !self.ticket_is_late && self.went_ahead() {
                self.ticket_is_late = true;
                self.start_taking(None);
            }
            return;
        }
        let settlement = if self.ears.is_none() {
            let Some(end) = &self.end else { return };
            let unsent = matches!(end, End::Broken { refusal: Refusal::Unreachable(_), .. });
            match presumed(self.story.kind, end.code().map_or(Ending::Lost, Ending::Status)) {
                Presumed::Written => self.unvoted(),
                Presumed::NotWritten => Settlement::NotApplied,
                Presumed::Unknown if unsent => Settlement::NotApplied,
                Presumed::Unknown => Settlement::InDoubt,
            }
        } else {
            match self.transaction.conclusion() {
                None => return,
                Some(Conclusion::Commit(holders)) => {
                    crash_point(CrashPoint::RouterBeforeRecord);
                    Settlement::Commit { storages: self.names(&holders), unvoted: false }
                }
                Some(Conclusion::Unvoted) => self.unvoted(),
                Some(Conclusion::Compare(voters)) => return self.start_comparing(&voters),
                Some(Conclusion::NotApplied) => Settlement::NotApplied,
                Some(Conclusion::InDoubt) => Settlement::InDoubt,
            }
        };
        self.settle(settlement, false);
    }

    /// A push that has ended without a ticket, and may have changed something all the same: its primary came through without
    /// a vote, or a node ended it that never asked whether it may begin. The ticket is taken late, so that what the nodes
    /// hold is found out while nobody else writes.
    fn went_ahead(&self) -> bool {
        let came_through = self.end.as_ref().and_then(End::code) == Some(Code::Ok);
        // A secondary may end after the client has heard that the push was refused.
        let has_ended = self.end.is_some() || self.answered.is_some();
        (came_through && self.transaction.is_untouched())
            || (has_ended && self.transaction.is_unasked() && self.story.upload.can_name_a_change())
    }

    pub(super) fn settle(&mut self, settlement: Settlement, record: bool) {
        let Some(Held { mut write, turn }) = self.held.take() else { return };
        self.outcome = match &settlement {
            Settlement::Commit { .. } => {
                for voter in self.transaction.on_time() {
                    self.nodes[voter].punctuality.on_time();
                }
                Outcome::Recorded
            }
            Settlement::NotApplied => Outcome::Nothing,
            Settlement::InDoubt => Outcome::InDoubt,
        };
        for node in self.nodes.iter().filter(|node| !node.healthy()) {
            write.unreachable(node.storage.to_string());
        }
        let written = match &settlement {
            Settlement::Commit { storages, .. } => Some((Arc::clone(write.route()), storages.clone())),
            Settlement::NotApplied | Settlement::InDoubt => None,
        };
        self.settling = Some(Settling { told: write.settle(settlement).boxed(), record, turn, written });
    }

    pub(super) fn on_settled(&mut self, told: Result<(), Refusal>) {
        let Some(Settling { record, turn, written, .. }) = self.settling.take() else { return };
        drop(turn);
        if let Some((route, storages)) = written.filter(|_| told.is_ok()) {
            self.story.notes.recorded(route.generation + 1);
            self.story.shared.routes.advance(&route, &storages);
        }
        if self.outcome == Outcome::Recorded && told.is_ok() {
            crash_point(CrashPoint::RouterAfterRecord);
        }
        if record {
            self.handle(if told.is_ok() { Event::Recorded } else { Event::NotRecorded });
        }
        self.unrecorded = told.err();
    }

    /// Nothing that the client has to wait for is under way.
    pub(super) fn is_ready_to_answer(&self) -> bool {
        self.answered.is_none()
            && self.end.is_some()
            && self.outbox.is_none()
            && (self.is_settled() || is_off(SafetyStep::RouterRecordBeforeAnswer))
    }

    pub(super) fn is_settled(&self) -> bool {
        self.held.is_none() && self.settling.is_none() && self.taking.is_none()
    }

    pub(super) async fn answer_client(&mut self) -> Result<(), Failed> {
        self.answered = Some(Instant::now());
        let Some(end) = self.end.take() else { return Ok(()) };
        let nothing_happened = self.outcome == Outcome::Nothing && !self.transaction.may_be_applied();
        if nothing_happened && self.may_begin_again() && self.ears.is_some() {
            let avoid = Some(self.nodes[PRIMARY].storage.to_string());
            let status = end.status().filter(|status| status.code() == Code::Unavailable);
            if let Some(status) = status {
                return Err(Failed { refusal: Refusal::Status(status), again: true, untouched: true, avoid });
            }
        }
        let client = &mut self.story.client;
        match (end, self.unrecorded.take()) {
            (End::Trailers(_, Code::Ok) | End::Whole(_, Code::Ok), Some(refusal)) => {
                client.refuse(refusal).await;
            }
            // The node's word alone is no record. One that was stopped says OK as well, and with it that it refused.
            (End::Trailers(_, Code::Ok) | End::Whole(_, Code::Ok), None)
                if self.outcome == Outcome::InDoubt && !self.transaction.primary_was_stopped() =>
            {
                client.refuse(Refusal::InDoubt).await;
            }
            (End::Trailers(trailers, _), _) => client.end(trailers).await,
            (End::Whole(parts, _), _) => client.whole(parts),
            (End::Broken { refusal, again }, _) => {
                // Of a primary that is well it was the other participants' fault.
                let avoid = (!self.nodes[PRIMARY].healthy()).then(|| self.nodes[PRIMARY].storage.to_string());
                let again = again && nothing_happened;
                return Err(Failed { refusal, again, untouched: nothing_happened, avoid });
            }
        }
        Ok(())
    }

    pub(super) fn is_done(&self) -> bool {
        let Some(answered) = self.answered else {
            // Nobody is left to answer.
            return self.orphaned.is_some() && self.end.is_some() && self.is_settled();
        };
        self.is_settled() && (self.secondaries.is_empty() || answered.elapsed() > SECONDARY_DRAIN)
    }
}

pub(super) async fn settled(settling: &mut Option<Settling>) -> Result<(), Refusal> {
    match settling {
        Some(settling) => (&mut settling.told).await,
        None => std::future::pending().await,
    }
}
