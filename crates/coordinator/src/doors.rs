//! Who may come in, and what for: certificates, tokens, scopes, limits, and the audit log.

pub mod audit;
mod guard;
pub mod methods;
mod rate;
pub mod tls;
pub mod tokens;

pub use guard::{Guard, GuardLayer};
pub use methods::Scope;
pub use rate::Rate;

use std::sync::{Arc, Mutex, PoisonError};

/// Who makes a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// Name of the token, or `certificate`, or `anonymous`.
    pub name: String,
    /// What the caller may do.
    pub scopes: Vec<Scope>,
}

impl Actor {
    /// Whether the caller may make calls that need `scope`.
    #[must_use]
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|has| has.includes(scope))
    }
}

/// Where a service says which resource a call is about, for the audit log.
#[derive(Clone, Debug, Default)]
pub struct Subject(Arc<Mutex<String>>);

impl Subject {
    /// Says it.
    pub fn set(&self, name: &str) {
        name.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What was said; empty if nothing was.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Who made this call: put into every request by the [`Guard`].
pub fn actor<T>(request: &tonic::Request<T>) -> String {
    request.extensions().get::<Actor>().map_or_else(|| "anonymous".to_owned(), |actor| actor.name.clone())
}

/// Tells the audit log which resource a call is about.
pub fn about<T>(request: &tonic::Request<T>, name: &str) {
    if let Some(subject) = request.extensions().get::<Subject>() {
        subject.set(name);
    }
}
