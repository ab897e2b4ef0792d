//! What ranks leave for each other, and ask for: the coordinator keeps it in memory alone, so that it is said again after a break.

use incipit_proto::v1;

/// Puts, and gets that are not answered.
#[derive(Debug, Default)]
pub(crate) struct Rendezvous {
    pub(crate) puts: Vec<v1::RendezvousPut>,
    pub(crate) gets: Vec<v1::RendezvousGet>,
}

impl Rendezvous {
    /// Forgets what belongs to groups that are no more.
    pub(crate) fn forget_old(&mut self, assignments: &v1::EngineAssignments) {
        let known = |backbone: &str, epoch: u64| {
            assignments.engines.iter().any(|engine| engine.backbone == backbone && engine.epoch <= epoch)
        };
        self.puts.retain(|put| known(&put.backbone, put.epoch));
        self.gets.retain(|get| known(&get.backbone, get.epoch));
    }
}
