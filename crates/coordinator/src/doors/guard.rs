//! The layer that every call passes first.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use incipit_proto::{
    Problem,
    client::{PROTOCOL, PROTOCOL_KEY, WORKER_KEY},
    names::WorkerName,
    trace,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{
    Code, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo},
};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field};

use super::{
    Actor, Rate, Scope, Subject,
    audit::{self, Audit},
    methods::{self, Method},
    tokens::Tokens,
};

/// Decides who comes in.
#[derive(Debug)]
pub struct Guard {
    tokens: Option<Tokens>,
    rate: Option<Rate>,
    calls: Arc<Semaphore>,
    limit: usize,
    audit: Audit,
}

impl Guard {
    /// Without `tokens` whoever comes may do everything. `calls` that are no streams are under way at once, at most.
    #[must_use]
    pub fn new(tokens: Option<Tokens>, rate: Option<Rate>, calls: usize, audit: Audit) -> Self {
        Self { tokens, rate, calls: Arc::new(Semaphore::new(calls)), limit: calls, audit }
    }

    fn admit<B>(
        &self,
        request: &http::Request<B>,
        method: Method,
    ) -> (Actor, Result<Option<OwnedSemaphorePermit>, Status>) {
        let nobody = || Actor { name: "anonymous".to_owned(), scopes: Vec::new() };
        if let Err(problem) = protocol(request) {
            return (nobody(), Err(problem.into()));
        }
        let actor = match self.identify(request) {
            Ok(actor) => actor,
            Err(problem) => return (nobody(), Err(problem.into())),
        };
        let admitted = self.check(&actor, &caller(&actor, request), request.uri().path(), method);
        (actor, admitted)
    }

    fn identify<B>(&self, request: &http::Request<B>) -> Result<Actor, Problem> {
        let Some(tokens) = &self.tokens else {
            return Ok(Actor { name: "anonymous".to_owned(), scopes: vec![Scope::Admin] });
        };
        if let Some(header) = request.headers().get(http::header::AUTHORIZATION) {
            let token = header.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
            let what = "the authorization is none; give `Bearer TOKEN`";
            let token = token.ok_or_else(|| Problem::new(Code::Unauthenticated, "BAD_TOKEN", what))?;
            return tokens.check(token);
        }
        let tls = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        if tls.and_then(TlsConnectInfo::peer_certs).is_some_and(|certificates| !certificates.is_empty()) {
            // The handshake has checked that it is signed by the cluster's own authority.
            return Ok(Actor { name: "certificate".to_owned(), scopes: vec![Scope::Worker] });
        }
        let what = "this coordinator wants to know who asks; give a token (INCIPIT_TOKEN), or a worker's certificate";
        Err(Problem::new(Code::Unauthenticated, "NO_TOKEN", what))
    }

    fn check(
        &self,
        actor: &Actor,
        caller: &str,
        path: &str,
        method: Method,
    ) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if !method.scopes.iter().any(|scope| actor.may(*scope)) {
            let needed = method.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(" or ");
            let what = format!("{} may not call {path}, which needs the scope {needed}", actor.name);
            let problem = Problem::new(Code::PermissionDenied, "SCOPE", what);
            return Err(problem.with("actor", &actor.name).with("method", path).with("scope", needed).into());
        }
        if let Some(rate) = &self.rate
            && let Err(wait) = rate.take(caller, Instant::now())
        {
            let what = format!("{caller} calls too often; try again in {} ms", wait.as_millis());
            return Err(Problem::later("RATE_LIMIT", what, wait).into());
        }
        if method.lasts {
            return Ok(None);
        }
        Arc::clone(&self.calls).try_acquire_owned().map(Some).map_err(|_| {
            let what = format!("{} calls are under way, and no more are taken; try again", self.limit);
            Problem::later("OVERLOADED", what, Duration::from_millis(500)).into()
        })
    }

    /// Notes how a call has ended: in its span, and if it changes something in the audit log.
    fn ended(&self, call: &Call, code: Code) {
        let (resource, outcome) = (call.subject.get(), format!("{code:?}"));
        call.span.record("code", &*outcome);
        if !resource.is_empty() {
            call.span.record("resource", &*resource);
        }
        if is_fault(code) {
            call.span.record("otel.status_code", "ERROR");
        }
        if call.method.changes {
            let method = call.path.strip_prefix("/incipit.v1.").unwrap_or(&call.path);
            let (time, actor) = (audit::now(), &*call.actor.name);
            self.audit.write(&audit::Line { time, actor, method, resource: &resource, outcome });
        }
    }
}

/// A call under way.
struct Call {
    path: String,
    method: Method,
    actor: Actor,
    subject: Subject,
    span: Span,
}

impl Call {
    /// A call whose span continues the caller's trace.
    fn new(headers: &http::HeaderMap, path: String, method: Method, actor: Actor) -> Self {
        let begin = || {
            tracing::info_span!(
                "request",
                otel.name = path.trim_start_matches('/'),
                otel.kind = "server",
                otel.status_code = field::Empty,
                rpc.system = "grpc",
                actor = actor.name,
                resource = field::Empty,
                code = field::Empty,
            )
        };
        let span = trace::continued(headers, begin);
        Self { path, method, actor, subject: Subject::default(), span }
    }
}

/// Whether the coordinator is to blame, and not who called.
fn is_fault(code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    [DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown].contains(&code)
}

fn protocol<B>(request: &http::Request<B>) -> Result<(), Problem> {
    let Some(value) = request.headers().get(PROTOCOL_KEY) else { return Ok(()) };
    let spoken = value.to_str().unwrap_or("?");
    if spoken.parse::<u32>().is_ok_and(|spoken| spoken == PROTOCOL) {
        return Ok(());
    }
    let what = format!(
        "you speak protocol {spoken}, and this coordinator ({}) speaks {PROTOCOL}; use programs of one version",
        env!("CARGO_PKG_VERSION")
    );
    Err(Problem::state("PROTOCOL", what).with("protocol_min", PROTOCOL).with("protocol_max", PROTOCOL))
}

/// Whose calls are counted together: an actor's, and of workers, which often share a certificate or a token, each one's own. A worker says
/// itself which one it is; whoever may be one is trusted with that.
fn caller<B>(actor: &Actor, request: &http::Request<B>) -> String {
    let worker = request.headers().get(WORKER_KEY).and_then(|value| value.to_str().ok());
    let worker = worker.filter(|_| actor.may(Scope::Worker));
    match worker.and_then(|worker| WorkerName::parse("worker", worker).ok()) {
        Some(worker) => format!("{worker} ({})", actor.name),
        None => actor.name.clone(),
    }
}

/// Puts a [`Guard`] before services.
#[derive(Clone, Debug)]
pub struct GuardLayer(pub Arc<Guard>);

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded { guard: Arc::clone(&self.0), inner }
    }
}

/// A service behind a [`Guard`].
#[derive(Clone, Debug)]
pub struct Guarded<S> {
    guard: Arc<Guard>,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Guarded<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let Some(method) = methods::method(&path) else { return Box::pin(self.inner.call(request)) };
        let (actor, admitted) = self.guard.admit(&request, method);
        let guard = Arc::clone(&self.guard);
        let call = Call::new(request.headers(), path, method, actor);
        let permit = match admitted {
            Ok(permit) => permit,
            Err(status) => {
                guard.ended(&call, status.code());
                let response = status.into_http();
                return Box::pin(async move { Ok(response) });
            }
        };
        request.extensions_mut().insert(call.actor.clone());
        request.extensions_mut().insert(call.subject.clone());
        let answer = self.inner.call(request);
        let span = call.span.clone();
        let answered = async move {
            let response = answer.await;
            drop(permit);
            guard.ended(&call, response.as_ref().map_or(Code::Internal, code));
            response
        };
        Box::pin(answered.instrument(span))
    }
}

/// The outcome of a call: an error is in the headers, as there is no message before it.
fn code<R>(response: &http::Response<R>) -> Code {
    Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code())
}
