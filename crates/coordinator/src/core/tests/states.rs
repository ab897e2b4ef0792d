//! The tables of states, and the page that shows them.

use std::{collections::BTreeSet, env, fmt::Write as _, fs, path::Path};

use incipit_proto::v1::{BackboneReason, BackboneState, JobReason, JobState};

use crate::core::{
    job::is_final,
    transitions::{BACKBONE_TRANSITIONS, BackboneCause, JOB_TRANSITIONS, JobCause},
};

fn job_cause(cause: JobCause) -> String {
    match cause {
        JobCause::Created => "it is accepted, and its backbone is ready",
        JobCause::CreatedEarly => "it is accepted, and its backbone is not ready",
        JobCause::BackboneReady => "its backbone becomes ready, and has no place for it yet",
        JobCause::BackboneNotReady => "its backbone is not ready any more, or has failed",
        JobCause::Admitted => "there is a place for it",
        JobCause::PauseRequested => "someone asks for a pause",
        JobCause::ResumeRequested => "someone asks to resume it, and its backbone is ready",
        JobCause::ResumedEarly => "someone asks to resume it, and its backbone is not ready",
        JobCause::CancelRequested => "someone asks to cancel it",
        JobCause::RankLost => "its backbone loses a rank, by no doing of a job",
        JobCause::EngineLost => "an engine of its backbone ends or hangs, maybe by its doing",
        JobCause::PauseDone => "a pause is wished, and it has left its backbone or was thrown off",
        JobCause::CancelDone => "a cancellation is wished, and it has left its backbone or was thrown off",
        JobCause::PauseTakenBack => "it has left for a pause that was taken back meanwhile",
        JobCause::Yielded => "it has left, saved, since its backbone is to move: a worker is being drained, or there is room for more replicas",
        JobCause::StepsDone => "all its steps are made",
        JobCause::PatienceExhausted => "nothing got better for as long as its patience allows",
        JobCause::Failed(_) => "it fails for this reason, and is not tried again",
        JobCause::Retried => "it fails for a reason that its retry policy covers",
        JobCause::WentBack => "files of the checkpoint that it was to go on from are damaged or gone, and there is one before it",
        JobCause::BackboneDeleted => "its backbone is deleted by force",
    }
    .to_owned()
}

fn backbone_cause(cause: BackboneCause) -> &'static str {
    match cause {
        BackboneCause::Created => "it is asked for",
        BackboneCause::Placed => "there are workers with room for all its ranks",
        BackboneCause::Loaded => "all its ranks have loaded",
        BackboneCause::Lost(BackboneReason::BadModel) => {
            "its model was loaded before, and cannot be loaded now"
        }
        BackboneCause::Lost(BackboneReason::MoreRoom) => {
            "there is room for more of its replicas, and its jobs have left"
        }
        BackboneCause::Lost(_) => "a rank is lost, or has to move, for this reason",
        BackboneCause::BadModel => "its model cannot be loaded the first time, or is not the same everywhere",
        BackboneCause::CrashLoop => "it was lost too often in a row, with no step between",
        BackboneCause::RetryRequested => "another try is asked for",
    }
}

fn page() -> String {
    let word = |name: &str, prefix: &str| format!("`{}`", name.trim_start_matches(prefix));
    let job = |state: JobState| word(state.as_str_name(), "JOB_STATE_");
    let backbone = |state: BackboneState| word(state.as_str_name(), "BACKBONE_STATE_");
    let mut page = "# States of jobs and backbones\n\nThe coordinator changes a state in no other way. A test compares this page with the tables in \
`crates/coordinator/src/core/transitions.rs`, and writes it with `INCIPIT_UPDATE=1`.\n\n## Jobs\n\n`SUCCEEDED`, `FAILED` and `CANCELLED` are final.\n\n\
| From | When | To | Reason |\n|---|---|---|---|\n"
        .to_owned();
    for (from, cause, to, reason) in JOB_TRANSITIONS {
        let from = from.map_or_else(String::new, job);
        let reason = word(reason.as_str_name(), "JOB_REASON_");
        writeln!(page, "| {from} | {} | {} | {reason} |", job_cause(*cause), job(*to)).unwrap();
    }
    page += "\n## Backbones\n\nA `DEGRADED` backbone stays so while it is placed and loaded again, under the next epoch. A `FAILED` one can only be deleted.\n\n\
| From | When | To | Reason |\n|---|---|---|---|\n";
    for (from, cause, to, reason) in BACKBONE_TRANSITIONS {
        let from = from.map_or_else(String::new, backbone);
        let reason = word(reason.as_str_name(), "BACKBONE_REASON_");
        writeln!(page, "| {from} | {} | {} | {reason} |", backbone_cause(*cause), backbone(*to)).unwrap();
    }
    page
}

#[test]
fn the_page_of_states_is_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cluster-states.md");
    if env::var_os("INCIPIT_UPDATE").is_some() {
        fs::write(&path, page()).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), page(), "run this test with INCIPIT_UPDATE=1");
}

#[test]
fn no_state_has_two_ways_by_one_cause_and_none_leads_out_of_a_final_one() {
    let mut seen = BTreeSet::new();
    for (from, cause, _, _) in JOB_TRANSITIONS {
        assert!(seen.insert(format!("{from:?} {cause:?}")));
        assert!(from.is_none_or(|from| !is_final(from)), "{from:?} is final");
    }
    seen.clear();
    for (from, cause, _, _) in BACKBONE_TRANSITIONS {
        assert!(seen.insert(format!("{from:?} {cause:?}")));
        let by_itself = *cause != BackboneCause::RetryRequested;
        assert!(!(by_itself && *from == Some(BackboneState::Failed)), "it comes back by {cause:?}");
    }
}

#[test]
fn every_reason_of_a_job_is_reached_or_is_an_attempts_alone() {
    let reached: Vec<JobReason> = JOB_TRANSITIONS.iter().map(|row| row.3).collect();
    for number in 1.. {
        let Ok(reason) = JobReason::try_from(number) else { break };
        assert!(reached.contains(&reason) || reason == JobReason::RankLost, "{reason:?}");
    }
}
