//! Streams of pages. Of each stream one page is under way and one is being read, whatever the reader does; a reader that does not take
//! its page is cut off.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use incipit_proto::Problem;
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Status};

use super::{Context, stopping};

/// What a streaming method returns.
pub(super) type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Where a stream's pages go.
#[derive(Debug)]
pub(super) struct Sink<T> {
    sender: mpsc::Sender<T>,
    patience: Duration,
}

impl<T> Sink<T> {
    /// Sends a page; `next` says where to go on if it is not taken, under the name `key`.
    pub(super) async fn send(&self, page: T, key: &str, next: u64) -> Result<(), Problem> {
        match tokio::time::timeout(self.patience, self.sender.send(page)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Problem::new(Code::Cancelled, "GONE", "nobody listens any more")),
            Err(_) => {
                let what = format!(
                    "nothing was taken for {} s, and the stream is cut off; go on from {next}",
                    self.patience.as_secs()
                );
                Err(Problem::new(Code::ResourceExhausted, "WATCHER_TOO_SLOW", what).with(key, next))
            }
        }
    }
}

/// A stream of what `produce` sends, until it returns. It ends with the coordinator, and `produce` with whoever listens.
pub(super) fn stream<T, F>(context: &Context, produce: impl FnOnce(Sink<T>) -> F) -> Result<Out<T>, Problem>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Problem>> + Send + 'static,
{
    let permit = Arc::clone(&context.watchers).try_acquire_owned().map_err(|_| {
        let what = format!("{} streams are open, and no more are; close some", context.limits.watchers);
        Problem::new(Code::ResourceExhausted, "TOO_MANY_WATCHERS", what)
    })?;
    let (sender, receiver) = mpsc::channel(1);
    let (end, ended) = oneshot::channel();
    let patience = Duration::from_secs(context.limits.watcher_seconds);
    let gone = sender.clone();
    let producing = produce(Sink { sender, patience });
    let context = context.clone();
    tokio::spawn(async move {
        let result = tokio::select! {
            result = producing => result,
            () = context.stopped() => Err(stopping()),
            () = gone.closed() => Ok(()),
        };
        drop(gone); // The stream sees the end of the pages, and then how it ended.
        drop(permit);
        let _ = end.send(result);
    });
    let pages = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|page| (Ok(page), receiver))
    });
    let end = futures::stream::once(ended).filter_map(|end| async move {
        match end {
            Ok(Ok(())) => None,
            Ok(Err(problem)) => Some(Err(Status::from(problem))),
            Err(_) => {
                let broke = Problem::new(Code::Internal, "BROKE", "the stream broke off; go on where it was");
                Some(Err(broke.into()))
            }
        }
    });
    Ok(Box::pin(pages.chain(end)))
}
