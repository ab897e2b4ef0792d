//! What requests have in common.

use incipit_proto::Problem;
use tonic::{Code, Request};

use super::Context;
use crate::{
    core::effects::Reply,
    doors::{about, actor},
    wire::Asked,
};

/// Has the core handle a request about `name`, as whoever made it.
pub(super) async fn ask<T: Sync>(
    context: &Context,
    request: &Request<T>,
    name: &str,
    asked: Asked,
) -> Result<Reply, Problem> {
    about(request, name);
    context.handle.ask(asked.by(actor(request))).await
}

/// An answer of another kind than the request's: a mistake in the program.
pub(super) fn unexpected(reply: &Reply) -> Problem {
    Problem::new(
        Code::Internal,
        "UNEXPECTED_REPLY",
        format!("the core answered with something else: {reply:?}"),
    )
}
