//! Backbones that make do with fewer replicas than they are to have.

use std::collections::BTreeMap;

use incipit_proto::{
    names::WorkerName,
    v1::{BackboneReason, BackboneState},
};

use super::{
    Core,
    backbone::{Backbone, RankPlacement, Shortage},
    backbones::{Charge, Loss},
    placement::{Candidate, place},
    time::Time,
};

/// Doublings of the time from one look for room to the next, at most, where replicas were to come and did not.
const MOST_DOUBLINGS: u32 = 6;

impl Shortage {
    /// There is a place for so many, where there were so many `before`.
    pub(super) fn placed(&mut self, before: u32, dp: u32) {
        self.since = None;
        self.grown_from = if self.look_at.is_some() && dp > before { before } else { 0 };
    }
}

impl Core {
    /// Numbers of replicas for which a place is looked for, the most welcome first.
    pub(super) fn sizes(&self, backbone: &Backbone) -> Vec<u32> {
        let (spec, now) = (&backbone.spec, backbone.dp());
        let Shortage { since, look_at, .. } = backbone.shortage;
        let enough: Vec<u32> = spec.enough().collect();
        // Workers that were there when the coordinator ended have the same time to come back.
        let waited = |since: Time| self.now.since(since.max(self.restored)) >= self.config.shrink_after_ms;
        if since.is_some_and(waited) {
            return enough;
        }
        match look_at.filter(|_| enough.contains(&now)) {
            Some(time) if self.now < time => vec![now],
            Some(_) => enough.into_iter().filter(|dp| *dp >= now).collect(),
            None => vec![spec.dp],
        }
    }

    /// Has the jobs leave backbones that have made do with fewer replicas for a while, where there is room for more.
    pub(super) fn begin_growing(&mut self) {
        let looks = |backbone: &Backbone| {
            let Shortage { look_at, growing, .. } = backbone.shortage;
            backbone.state == BackboneState::Ready && !growing && look_at.is_some_and(|time| time <= self.now)
        };
        let backbones = self.rows.backbones.values();
        let growing = backbones.filter(|backbone| looks(backbone) && self.has_room_for_more(backbone));
        for mut backbone in growing.cloned().collect::<Vec<_>>() {
            backbone.shortage.growing = true;
            self.put_backbone(backbone);
        }
    }

    /// Places a backbone anew whose jobs have left it for more replicas; if there is no room for these any more, they come back.
    pub(super) fn grow(&mut self, mut backbone: Backbone) {
        if self.has_room_for_more(&backbone) {
            let message = "there is room for more of its replicas";
            let loss = Loss { reason: BackboneReason::MoreRoom, message, charge: Charge::Nothing };
            self.lose_ranks(&backbone.name, |_| false, &loss);
            return;
        }
        backbone.shortage.growing = false;
        backbone.shortage.look_at = Some(self.now.after(self.config.grow_after_ms));
        self.put_backbone(backbone);
    }

    /// A backbone is placed anew. Whether it was because replicas that were to come have not: it has those again that it had before, and
    /// looks for others later than the last time.
    pub(super) fn shrink_back(&self, backbone: &mut Backbone) -> bool {
        let Shortage { grown_from, failures, .. } = backbone.shortage;
        if grown_from == 0 {
            (backbone.shortage.since, backbone.shortage.growing) = (None, false);
            return false;
        }
        backbone.ranks.truncate((grown_from * backbone.spec.tp) as usize);
        backbone.shortage = Shortage { failures: failures + 1, ..Shortage::default() };
        backbone.shortage.look_at = Some(self.next_look(&backbone.shortage));
        true
    }

    /// A backbone is ready: says how many replicas it has, if that is not all, and when it looks for more.
    pub(super) fn take_stock(&self, backbone: &mut Backbone) {
        let (dp, asked) = (backbone.dp(), backbone.spec.dp);
        let failures = if backbone.shortage.grown_from > 0 { 0 } else { backbone.shortage.failures };
        backbone.shortage = Shortage::default();
        backbone.message.clear();
        if dp < asked {
            backbone.shortage.failures = failures;
            backbone.shortage.look_at = Some(self.next_look(&backbone.shortage));
            let last = if failures > 0 { &*backbone.last_loss } else { "" };
            let why = if last.is_empty() { String::new() } else { format!(" (the last time: {last})") };
            backbone.message =
                format!("{dp} of {asked} replicas, and more as soon as workers have room for them{why}");
        }
    }

    fn next_look(&self, shortage: &Shortage) -> Time {
        self.now.after(self.config.grow_after_ms << shortage.failures.min(MOST_DOUBLINGS))
    }

    fn has_room_for_more(&self, backbone: &Backbone) -> bool {
        let now = backbone.dp();
        now < backbone.spec.dp && {
            let candidates = self.candidates(&backbone.name);
            let mut more = backbone.spec.enough().filter(|dp| *dp > now);
            more.any(|dp| place_replicas(backbone, dp, &candidates).is_ok())
        }
    }
}

/// Workers for so many replicas. One that lost no rank keeps its number and its workers, or takes the number of one that did, if it would
/// have to go.
///
/// # Errors
/// As [`place`].
pub(super) fn place_replicas(
    backbone: &Backbone,
    dp: u32,
    candidates: &[Candidate],
) -> Result<Vec<WorkerName>, String> {
    let replicas: Vec<&[RankPlacement]> = backbone.ranks.chunks(backbone.spec.tp as usize).collect();
    let is_whole = |replica: &&&[RankPlacement]| replica.iter().all(|rank| !rank.lost);
    let (stay, go) = replicas.split_at(replicas.len().min(dp as usize));
    let mut spare = go.iter().filter(is_whole);
    let mut homes = BTreeMap::new();
    for (replica, number) in stay.iter().zip(0..) {
        let home = if is_whole(&replica) { replica } else { spare.next().unwrap_or(replica) };
        let ranks = number * backbone.spec.tp..;
        homes.extend(ranks.zip(home.iter().map(|rank| rank.worker.clone())));
    }
    place(&backbone.spec.with_dp(dp), &homes, candidates)
}
