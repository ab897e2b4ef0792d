//! The way to a coordinator: flags, calls, and what it had to say when it refused.

pub(crate) mod blobs;
pub(crate) mod follow;
pub(crate) mod labels;
pub(crate) mod logs;
pub(crate) mod names;
pub(crate) mod show;

use std::future::Future;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use incipit_proto::Problem;
use incipit_proto::client::{Client, ClientConfig};
use tonic::Code;

use crate::exit::{BadInput, Exit};

/// Where a coordinator is looked for when nobody says otherwise: where `incipit up` has one.
pub(crate) const DEFAULT_COORDINATOR: &str = "http://127.0.0.1:7420";

/// Entries that are asked for at once.
pub(crate) const PAGE: i32 = 500;

/// Where the coordinator is, and who asks.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectArgs {
    /// Where the coordinator is [default: INCIPIT_COORDINATOR, or http://127.0.0.1:7420]
    #[arg(long, global = true, value_name = "URL")]
    coordinator: Option<String>,
    /// File that holds the token to show [default: the token in INCIPIT_TOKEN, if there is one]
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Certificate of who signed the coordinator's, for https (PEM) [default: the file in INCIPIT_CA]
    #[arg(long, global = true, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Certificate to show to the coordinator (PEM)
    #[arg(long, global = true, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Private key of --cert (PEM)
    #[arg(long, global = true, value_name = "FILE")]
    key: Option<PathBuf>,
}

impl ConnectArgs {
    /// What the flags say, and where they say nothing, `variable`, the environment.
    fn config(&self, variable: impl Fn(&str) -> Option<String>) -> Result<ClientConfig> {
        let endpoint = self.coordinator.clone().or_else(|| variable("INCIPIT_COORDINATOR"));
        let mut config = ClientConfig::new(endpoint.unwrap_or_else(|| DEFAULT_COORDINATOR.to_owned()));
        config.token = match &self.token_file {
            Some(file) => {
                let token = std::fs::read_to_string(file)
                    .map_err(|error| BadInput(format!("--token-file {}: {error}", file.display())))?;
                Some(token.trim().to_owned())
            }
            None => variable("INCIPIT_TOKEN"),
        };
        config.ca = self.ca.clone().or_else(|| variable("INCIPIT_CA").map(PathBuf::from));
        config.identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return Err(BadInput("--cert needs --key: give its private key".into()).into()),
            (None, Some(_)) => return Err(BadInput("--key needs --cert: give its certificate".into()).into()),
        };
        Ok(config)
    }

    /// Connects.
    ///
    /// # Errors
    /// If the flags cannot be used, or nobody answers.
    pub(crate) async fn connect(&self) -> Result<Client> {
        Client::connect(&self.client_config()?).await.map_err(refusal)
    }

    /// What the flags and the environment say.
    ///
    /// # Errors
    /// If the flags cannot be used.
    pub(crate) fn client_config(&self) -> Result<ClientConfig> {
        self.config(|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }
}

/// Makes one call and waits for its answer; it is made again where that does no harm.
macro_rules! call {
    ($client:expr, $service:ident.$method:ident($request:expr)) => {
        $client
            .unary($request, async |request| $client.$service().$method(request).await)
            .await
            .map_err($crate::cluster::refusal)
    };
}

/// Reads all pages of a list, or as many as hold `$limit` entries.
macro_rules! list {
    ($client:expr, $service:ident.$method:ident($request:expr), $field:ident, $limit:expr) => {{
        let (mut request, limit): (_, usize) = ($request, $limit);
        let mut all = Vec::new();
        loop {
            request.page_size =
                i32::try_from(limit - all.len()).unwrap_or(i32::MAX).min($crate::cluster::PAGE);
            let page = $crate::cluster::call!($client, $service.$method(request.clone()))?;
            all.extend(page.$field);
            if page.next_page_token.is_empty() || all.len() >= limit {
                break;
            }
            request.page_token = page.next_page_token;
        }
        all.truncate(limit);
        all
    }};
}

pub(crate) use {call, list};

/// Does what waits for the network, on this thread.
///
/// # Errors
/// What `work` says.
pub(crate) fn block_on(work: impl Future<Output = Result<Exit>>) -> Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot wait for the network")?;
    let done = runtime.block_on(work);
    // What still reads a name or a file may not hold the program up.
    runtime.shutdown_background();
    done
}

/// A UUID for a request that may then be sent twice: the one that was given, or a new one.
///
/// # Errors
/// If what was given is none.
pub(crate) fn request_id(given: Option<&str>) -> Result<String> {
    let Some(text) = given else { return Ok(uuid::Uuid::new_v4().to_string()) };
    let id = text.parse::<uuid::Uuid>();
    let id =
        id.map_err(|_| BadInput(format!("--request-id {text} is no UUID: give one, as uuidgen makes them")))?;
    Ok(id.to_string())
}

/// What the coordinator refused, or why it could not be asked.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) Problem);

/// A problem as an error of this program.
pub(crate) fn refusal(problem: Problem) -> anyhow::Error {
    Refusal(problem).into()
}

impl Refusal {
    /// The exit code that it deserves: 2 where the request has to be another one, 1 where it may succeed another time.
    pub(crate) fn exit(&self) -> Exit {
        match self.0.code {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => Exit::Usage,
            _ => Exit::Failure,
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let problem = &self.0;
        // The question that the client asks is answered below.
        let message = problem.message.strip_suffix("; is it running, and is the endpoint right?");
        f.write_str(message.unwrap_or(&problem.message))?;
        for (field, what) in problem.fields.iter().filter(|(_, what)| !problem.message.contains(what)) {
            write!(f, "; {field}: {what}")?;
        }
        match &*problem.reason {
            "UNREACHABLE" => f.write_str(
                "; start one with `incipit up`, or say where it is with --coordinator or INCIPIT_COORDINATOR",
            ),
            "UNKNOWN" | "" => write!(f, " [{:?}]", problem.code),
            reason => write!(f, " [{reason}]"),
        }
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(change: impl FnOnce(&mut ConnectArgs)) -> ConnectArgs {
        let mut args = ConnectArgs { coordinator: None, token_file: None, ca: None, cert: None, key: None };
        change(&mut args);
        args
    }

    #[test]
    fn flags_go_before_the_environment_and_the_environment_before_the_default() {
        let none = |_: &str| None;
        let some = |name: &str| Some(format!("from {name}"));
        let config = args(|_| ()).config(none).unwrap();
        assert_eq!((&*config.endpoint, config.token, config.ca), (DEFAULT_COORDINATOR, None, None));
        let config = args(|_| ()).config(some).unwrap();
        assert_eq!(config.endpoint, "from INCIPIT_COORDINATOR");
        assert_eq!(config.token.as_deref(), Some("from INCIPIT_TOKEN"));
        let config = args(|args| args.coordinator = Some("http://h:1".into())).config(some).unwrap();
        assert_eq!(config.endpoint, "http://h:1");
    }

    #[test]
    fn a_certificate_needs_its_key() {
        let error = args(|args| args.cert = Some("c.pem".into())).config(|_| None).unwrap_err();
        assert!(error.to_string().contains("--key"), "{error}");
    }

    #[test]
    fn a_refusal_has_the_reason_and_the_fields_that_its_sentence_leaves_out() {
        let mut problem = Problem::field("job.priority", "is 0; give 1 to 100");
        assert_eq!(Refusal(problem.clone()).to_string(), "job.priority: is 0; give 1 to 100 [BAD_FIELD]");
        problem.fields.push(("job.backbone".into(), "is empty".into()));
        assert!(Refusal(problem).to_string().ends_with("; job.backbone: is empty [BAD_FIELD]"));
        let problem =
            Problem::new(Code::Unavailable, "UNREACHABLE", "cannot reach a coordinator at http://h:1");
        let refusal = Refusal(problem);
        assert!(refusal.to_string().contains("incipit up"), "{refusal}");
        assert_eq!(refusal.exit(), Exit::Failure);
    }

    #[test]
    fn a_request_id_is_a_uuid() {
        assert_ne!(request_id(None).unwrap(), request_id(None).unwrap());
        let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(request_id(Some(id)).unwrap(), id);
        assert!(request_id(Some("7")).unwrap_err().to_string().contains("--request-id 7"));
    }
}
