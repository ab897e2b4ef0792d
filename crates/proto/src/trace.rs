//! Which trace a call belongs to: W3C's `traceparent` in its metadata. Where nobody collects spans, nothing is written and nothing read.

use opentelemetry::global::get_text_map_propagator;
use opentelemetry::propagation::{Extractor, Injector};
use tonic::metadata::{AsciiMetadataKey, MetadataMap};

/// Names the span that makes a call in the call's metadata, if there is one.
pub(crate) fn name_caller(metadata: &mut MetadataMap) {
    get_text_map_propagator(|propagator| propagator.inject(&mut Call(metadata)));
}

/// Does `work`: spans that begin in it continue the trace that the `headers` of a call name, if they name one.
pub fn continued<T>(headers: &http::HeaderMap, work: impl FnOnce() -> T) -> T {
    let caller = get_text_map_propagator(|propagator| propagator.extract(&Headers(headers)));
    let _current = caller.attach();
    work()
}

struct Call<'a>(&'a mut MetadataMap);

impl Injector for Call<'_> {
    fn set(&mut self, key: &str, value: String) {
        // What cannot be a header is left out: the call goes before its trace.
        if let (Ok(key), Ok(value)) = (key.parse::<AsciiMetadataKey>(), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
