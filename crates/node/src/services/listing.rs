//! Response streams of messages that a task makes one after the other, and the pages clients cut them into.

use tabularium_common::lifecycle::Tasks;
use tabularium_proto::gitaly::PaginationParameter;
use tokio::sync::mpsc;
use tonic::{Response, Status};

use super::streams::ResponseStream;

/// References and branches in one message (wire reference, section 0.2).
pub(crate) const ITEMS_PER_MESSAGE: usize = 20;
/// Lists of objects are sent when they have grown to this many bytes.
pub(crate) const FLUSH_BYTES: usize = 1024 * 1024;
/// Messages that a task may be ahead of its client by.
const QUEUE: usize = 4;

/// Where a task puts its messages.
pub(crate) struct Messages<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Messages<T> {
    /// Waits for room and sends.
    pub(crate) async fn send(&self, message: T) -> Result<(), Status> {
        self.0.send(Ok(message)).await.map_err(|_| Status::cancelled("the client has gone"))
    }
}

/// The stream of what `work` sends. Its failure ends the stream; when the client goes, `work` is dropped, and with it
/// every process it runs.
pub(crate) fn stream<T, Work>(
    tasks: &Tasks,
    name: &'static str,
    work: impl FnOnce(Messages<T>) -> Work,
) -> Response<ResponseStream<T>>
where
    T: Send + 'static,
    Work: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let work = work(Messages(sender.clone()));
    tasks.spawn(name, async move {
        let result = tokio::select! {
            result = work => result,
            () = sender.closed() => return,
        };
        if let Err(status) = result {
            // Nobody is left to tell when this fails.
            let _ = sender.send(Err(status)).await;
        }
    });
    Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)))
}

/// Collects items until they are worth a message.
#[derive(Debug)]
pub(crate) struct Batch<T> {
    items: Vec<T>,
    bytes: usize,
}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Self { items: Vec::new(), bytes: 0 }
    }
}

impl<T: prost::Message> Batch<T> {
    /// Those before this item, if they fill a message.
    pub(crate) fn push(&mut self, item: T) -> Option<Vec<T>> {
        let size = item.encoded_len();
        let full = !self.items.is_empty() && self.bytes + size >= FLUSH_BYTES;
        let filled = full.then(|| self.take());
        self.bytes += size;
        self.items.push(item);
        filled
    }

    /// What has been collected.
    pub(crate) fn take(&mut self) -> Vec<T> {
        self.bytes = 0;
        std::mem::take(&mut self.items)
    }

    /// What is left at the end, if it is anything.
    pub(crate) fn rest(mut self) -> Option<Vec<T>> {
        Some(self.take()).filter(|items| !items.is_empty())
    }
}

/// What becomes of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Before the page.
    Skip,
    /// On the page.
    Take,
    /// Behind the page: there is more.
    Stop,
}

/// One page of a listing: what follows the item named by the token, so many of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    after: Option<Vec<u8>>,
    left: Option<usize>,
}

impl Page {
    /// Everything.
    pub(crate) fn whole() -> Self {
        Self { after: None, left: None }
    }

    /// As asked for. In listings of references a limit of 0 means none, a negative one all.
    pub(crate) fn of_references(parameters: Option<&PaginationParameter>) -> Self {
        parameters.map_or_else(Self::whole, |parameters| {
            Self::new(parameters.page_token.as_bytes(), usize::try_from(parameters.limit).ok())
        })
    }

    /// Where a limit that is not positive means all.
    pub(crate) fn of_commits(parameters: Option<&PaginationParameter>) -> Self {
        parameters.map_or_else(Self::whole, |parameters| {
            let limit = usize::try_from(parameters.limit).ok().filter(|limit| *limit > 0);
            Self::new(parameters.page_token.as_bytes(), limit)
        })
    }

    /// So many items (all, if `None`) behind the one called `after`.
    pub(crate) fn new(after: &[u8], limit: Option<usize>) -> Self {
        Self { after: (!after.is_empty()).then(|| after.to_vec()), left: limit }
    }

    /// Nothing was asked for.
    pub(crate) fn is_empty(&self) -> bool {
        self.left == Some(0)
    }

    /// Whether the next item belongs to the page.
    pub(crate) fn admit(&mut self, name: &[u8]) -> Verdict {
        if let Some(after) = &self.after {
            if after == name {
                self.after = None;
            }
            return Verdict::Skip;
        }
        match &mut self.left {
            None => Verdict::Take,
            Some(0) => Verdict::Stop,
            Some(left) => {
                *left -= 1;
                Verdict::Take
            }
        }
    }

    /// The item named by the token never came.
    pub(crate) fn token_missing(&self) -> bool {
        self.after.is_some()
    }
}

/// The answer to a token that names nothing.
pub(crate) fn unknown_page_token() -> Status {
    Status::invalid_argument("could not find page token")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn run(mut page: Page) -> (Vec<&'static str>, bool, bool) {
        let mut taken = Vec::new();
        let mut stopped = false;
        for name in ["a", "b", "c"] {
            match page.admit(name.as_bytes()) {
                Verdict::Skip => {}
                Verdict::Take => taken.push(name),
                Verdict::Stop => {
                    stopped = true;
                    break;
                }
            }
        }
        (taken, stopped, page.token_missing())
    }

    #[test]
    fn pages() {
        assert_eq!(run(Page::whole()), (vec!["a", "b", "c"], false, false));
        assert_eq!(run(Page::new(b"", Some(2))), (vec!["a", "b"], true, false));
        assert_eq!(run(Page::new(b"a", Some(2))), (vec!["b", "c"], false, false));
        assert_eq!(run(Page::new(b"c", None)), (vec![], false, false));
        assert_eq!(run(Page::new(b"x", None)), (vec![], false, true));
        let parameters = |limit| PaginationParameter { page_token: String::new(), limit };
        assert!(Page::of_references(Some(&parameters(0))).is_empty());
        assert_eq!(Page::of_references(Some(&parameters(-1))), Page::whole());
        assert_eq!(Page::of_commits(Some(&parameters(0))), Page::whole());
    }

    #[test]
    fn batches() {
        let mut batch = Batch::default();
        let item = |bytes: usize| Bytes::from(vec![0; bytes]);
        assert_eq!(batch.push(item(2 * FLUSH_BYTES)), None, "a large one goes alone");
        assert_eq!(batch.push(item(1)).map(|items| items.len()), Some(1));
        assert_eq!(batch.push(item(10)), None);
        assert_eq!(batch.push(item(FLUSH_BYTES - 10)).map(|items| items.len()), Some(2));
        assert_eq!(batch.rest().map(|items| items.len()), Some(1));
        assert_eq!(Batch::<Bytes>::default().rest(), None);
    }

    #[tokio::test]
    async fn a_client_that_goes_ends_the_work() {
        let tasks = Tasks::new();
        let (held, released) = tokio::sync::oneshot::channel::<()>();
        let response = stream::<u32, _>(&tasks, "test", |messages| async move {
            let _held = held;
            messages.send(1).await?;
            std::future::pending::<()>().await;
            Ok(())
        });
        drop(response);
        assert!(released.await.is_err(), "the work was dropped");
    }
}
