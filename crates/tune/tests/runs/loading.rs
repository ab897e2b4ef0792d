//! Whoever waits for a model is told how far it is loaded.

use std::{path::Path, sync::Arc};

use incipit_collective::Options;
use incipit_tune::{
    backbone::Loading,
    control::Control,
    spec::{PartialSpec, Precision},
    train::{Event, Observer, train},
};

use crate::support::resolve;

/// What was told: before anything was loaded, and when all was.
#[derive(Default)]
struct Told {
    loading: Option<Arc<Loading>>,
    before: Option<(u64, u64)>,
    after: Option<(u64, u64)>,
}

impl Observer for Told {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Loading(loading) => {
                self.before = loading.bytes();
                self.loading = Some(loading.clone());
            }
            Event::Loaded(_) => self.after = self.loading.as_ref().and_then(|loading| loading.bytes()),
            _ => {}
        }
    }
}

#[test]
fn whoever_watches_a_run_is_told_how_much_of_its_ranks_part_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let part = |dtype, tp| {
        let flags = PartialSpec {
            model: Some(demo.join("model").display().to_string()),
            dtype: Some(dtype),
            train: Some(demo.join("data/train.jsonl")),
            out: Some(dir.path().join(format!("{dtype}-{tp}"))),
            tp: Some(tp),
            steps: Some(1),
            ..PartialSpec::default()
        };
        let mut told = Told::default();
        train(&resolve(flags), &Options::default(), &Control::new(), &mut told).unwrap();
        assert_eq!(told.before, None, "nothing is known before it begins");
        let (loaded, all) = told.after.expect("it was told");
        assert_eq!(loaded, all);
        all
    };
    let (whole, half) = (part(Precision::Bf16, 1), part(Precision::Bf16, 2));
    assert!(half < whole && 2 * half >= whole, "{half} of {whole}");
    assert_eq!(part(Precision::F32, 1), whole, "bytes are those of the files");
}
