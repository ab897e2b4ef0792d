//! Changes of labels, as a request for an update names them.

use std::collections::BTreeMap;

use clap::Args;

use super::names;

/// Flags that change labels.
#[derive(Args)]
pub(crate) struct LabelArgs {
    /// Set a label; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = names::label)]
    label: Vec<(String, String)>,
    /// Take a label away; may be given several times
    #[arg(long, value_name = "KEY")]
    remove_label: Vec<String>,
}

impl LabelArgs {
    /// The labels to set. To `paths` go those of all that change: a label that is named there and not set is taken away.
    pub(crate) fn changes(&self, paths: &mut Vec<String>) -> BTreeMap<String, String> {
        let set = self.label.iter().map(|(key, _)| key);
        paths.extend(set.chain(&self.remove_label).map(|key| format!("labels.{key}")));
        self.label.iter().cloned().collect()
    }
}
