//! What waits to be sent: control before data, and what is part of much not piece by piece.
//!
//! A pack comes from git in small pieces. Each that is sent on its own wakes everybody on its way, and that costs more than
//! to move its bytes. A *patient* frame therefore waits until so much has come together, or until somebody says that it has
//! waited long enough, or something is there that does not wait: all that is here then leaves with it.

use std::collections::VecDeque;

use bytes::Bytes;

use super::frame::Header;

/// A frame that is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) header: Header,
    pub(crate) payload: Bytes,
}

impl Outgoing {
    fn bare(header: Header) -> Self {
        Self { header, payload: Bytes::new() }
    }
}

/// What waits to be sent.
#[derive(Debug)]
pub(super) struct Outbox {
    /// Leaves before all data.
    control: VecDeque<Header>,
    data: VecDeque<Outgoing>,
    /// Of the data.
    bytes: usize,
    /// So many bytes of data wait no longer.
    enough: usize,
    /// Some of the data does not wait for more.
    urgent: bool,
}

impl Outbox {
    pub(super) fn new(enough: usize) -> Self {
        Self { control: VecDeque::new(), data: VecDeque::new(), bytes: 0, enough, urgent: false }
    }

    /// What overtakes data, and does not wait.
    pub(super) fn push_control(&mut self, header: Header) {
        self.control.push_back(header);
    }

    /// Data that does not wait for more.
    pub(super) fn push(&mut self, frame: Outgoing) {
        self.urgent = true;
        self.push_patient(frame);
    }

    /// Data that can wait for more.
    pub(super) fn push_patient(&mut self, frame: Outgoing) {
        self.bytes += frame.payload.len();
        self.data.push_back(frame);
    }

    /// Behind all data, and without waiting.
    pub(super) fn push_last(&mut self, header: Header) {
        self.push(Outgoing::bare(header));
    }

    /// No more comes for now.
    pub(super) fn hurry(&mut self) {
        self.urgent = !self.data.is_empty();
    }

    /// There is data, and it waits for more.
    pub(super) fn gathers(&self) -> bool {
        !self.data.is_empty() && !self.urgent && self.bytes < self.enough
    }

    /// How much control waits.
    pub(super) fn control(&self) -> usize {
        self.control.len()
    }

    /// What leaves next, in this order: a batch of about so many bytes. `waited`: patience has come to its end.
    pub(super) fn take(&mut self, bytes: usize, frames: usize, waited: bool, batch: &mut VecDeque<Outgoing>) {
        if self.control.is_empty() && self.gathers() && !waited {
            return;
        }
        let mut taken = 0;
        while batch.len() < frames && taken < bytes {
            let frame = match self.control.pop_front() {
                Some(header) => Outgoing::bare(header),
                None => match self.data.pop_front() {
                    Some(frame) => frame,
                    None => break,
                },
            };
            taken += frame.payload.len();
            self.bytes -= frame.payload.len();
            batch.push_back(frame);
        }
        self.urgent &= !self.data.is_empty();
    }

    /// Forgets a stream's data.
    pub(super) fn forget(&mut self, stream: u32) {
        self.data.retain(|frame| frame.header.stream != stream);
        self.bytes = self.data.iter().map(|frame| frame.payload.len()).sum();
        self.urgent &= !self.data.is_empty();
    }
}
