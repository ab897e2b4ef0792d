//! What each method needs: one table, total over the services (a test compares it with the descriptors).

use serde::{Deserialize, Serialize};

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look.
    Read,
    /// Look, upload data, and run jobs.
    Submit,
    /// Be a worker.
    Worker,
    /// Everything.
    Admin,
}

impl Scope {
    /// Its name in the file of tokens.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Submit => "submit",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }

    /// Whether whoever has this scope may do what `needed` is for.
    #[must_use]
    pub fn includes(self, needed: Self) -> bool {
        self == needed || self == Self::Admin || (self == Self::Submit && needed == Self::Read)
    }
}

/// What a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// One of these scopes.
    pub scopes: &'static [Scope],
    /// Whether it changes something, and so has a line in the audit log.
    pub changes: bool,
    /// Whether it lasts, and so does not count as a call under way.
    pub lasts: bool,
}

const fn read(scopes: &'static [Scope]) -> Method {
    Method { scopes, changes: false, lasts: false }
}

const fn write(scopes: &'static [Scope]) -> Method {
    Method { scopes, changes: true, lasts: false }
}

const fn lasting(scopes: &'static [Scope], changes: bool) -> Method {
    Method { scopes, changes, lasts: true }
}

const READ: &[Scope] = &[Scope::Read];
const SUBMIT: &[Scope] = &[Scope::Submit];
const ADMIN: &[Scope] = &[Scope::Admin];
const WORKER: &[Scope] = &[Scope::Worker];
const READ_OR_WORKER: &[Scope] = &[Scope::Read, Scope::Worker];
const SUBMIT_OR_WORKER: &[Scope] = &[Scope::Submit, Scope::Worker];

/// Methods by their paths.
pub const METHODS: &[(&str, Method)] = &[
    ("/incipit.v1.AgentService/Attach", lasting(WORKER, true)),
    ("/incipit.v1.BackboneService/CreateBackbone", write(ADMIN)),
    ("/incipit.v1.BackboneService/GetBackbone", read(READ)),
    ("/incipit.v1.BackboneService/ListBackbones", read(READ)),
    ("/incipit.v1.BackboneService/UpdateBackbone", write(ADMIN)),
    ("/incipit.v1.BackboneService/RetryBackbone", write(ADMIN)),
    ("/incipit.v1.BackboneService/DeleteBackbone", write(ADMIN)),
    ("/incipit.v1.BlobService/FindBlobs", read(READ_OR_WORKER)),
    ("/incipit.v1.BlobService/WriteBlob", lasting(SUBMIT_OR_WORKER, true)),
    ("/incipit.v1.BlobService/ReadBlob", lasting(READ_OR_WORKER, false)),
    ("/incipit.v1.CheckpointService/GetCheckpoint", read(READ)),
    ("/incipit.v1.CheckpointService/ListCheckpoints", read(READ)),
    ("/incipit.v1.CheckpointService/DeleteCheckpoint", write(SUBMIT)),
    ("/incipit.v1.CheckpointService/PinCheckpoint", write(SUBMIT)),
    ("/incipit.v1.CheckpointService/VerifyCheckpoint", read(READ)),
    ("/incipit.v1.CheckpointService/CollectGarbage", write(ADMIN)),
    ("/incipit.v1.EventService/WatchEvents", lasting(READ, false)),
    ("/incipit.v1.EventService/GetServerInfo", read(READ_OR_WORKER)),
    ("/incipit.v1.JobService/CreateJob", write(SUBMIT)),
    ("/incipit.v1.JobService/GetJob", read(READ)),
    ("/incipit.v1.JobService/ListJobs", read(READ)),
    ("/incipit.v1.JobService/UpdateJob", write(SUBMIT)),
    ("/incipit.v1.JobService/DeleteJob", write(SUBMIT)),
    ("/incipit.v1.JobService/PauseJob", write(SUBMIT)),
    ("/incipit.v1.JobService/ResumeJob", write(SUBMIT)),
    ("/incipit.v1.JobService/CancelJob", write(SUBMIT)),
    ("/incipit.v1.JobService/StreamMetrics", lasting(READ, false)),
    ("/incipit.v1.JobService/StreamLogs", lasting(READ, false)),
    ("/incipit.v1.PromptService/PromotePrompt", write(SUBMIT)),
    ("/incipit.v1.PromptService/GetPromptVersion", read(READ)),
    ("/incipit.v1.PromptService/ListPromptVersions", read(READ)),
    ("/incipit.v1.PromptService/DeletePromptVersion", write(ADMIN)),
    ("/incipit.v1.WorkerService/GetWorker", read(READ)),
    ("/incipit.v1.WorkerService/ListWorkers", read(READ)),
    ("/incipit.v1.WorkerService/DrainWorker", write(ADMIN)),
];

/// What the method at `path` needs. Methods that are not ours (reflection) need [`Scope::Read`]; health needs nothing.
#[must_use]
pub fn method(path: &str) -> Option<Method> {
    if path.starts_with("/grpc.health.v1.Health/") {
        return None;
    }
    let known = METHODS.iter().find(|(known, _)| *known == path);
    Some(known.map_or(Method { scopes: READ, changes: false, lasts: true }, |(_, method)| *method))
}

#[cfg(test)]
mod tests {
    use super::*;
    use incipit_proto::v1::DESCRIPTORS;
    use prost::Message as _;
    use std::collections::BTreeSet;

    #[test]
    fn the_table_has_every_method_of_every_service_and_no_other() {
        let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let mut described = BTreeSet::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let lasts = method.client_streaming() || method.server_streaming();
                    assert_eq!(super::method(&path).map(|method| method.lasts), Some(lasts), "{path}");
                    described.insert(path);
                }
            }
        }
        let table: BTreeSet<String> = METHODS.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(table, described);
        assert_eq!(table.len(), METHODS.len(), "a method is in the table twice");
    }

    #[test]
    fn what_does_not_read_is_in_the_audit_log() {
        for (path, method) in METHODS {
            let verb = path.rsplit('/').next().unwrap();
            let reads = ["Get", "List", "Find", "Read", "Watch", "Stream", "Verify"];
            assert_eq!(method.changes, !reads.iter().any(|read| verb.starts_with(read)), "{path}");
        }
    }

    #[test]
    fn an_admin_may_everything_and_a_reader_nothing_else() {
        for scope in [Scope::Read, Scope::Submit, Scope::Worker, Scope::Admin] {
            assert!(Scope::Admin.includes(scope));
            assert_eq!(Scope::Read.includes(scope), scope == Scope::Read);
        }
        assert!(Scope::Submit.includes(Scope::Read) && !Scope::Worker.includes(Scope::Read));
    }
}
