use std::collections::BTreeMap;

use incipit_proto::v1::{self, DataSource, TrainingSpec, TrainingTask, data_source::Source};
use tonic::Code;

use super::*;
use crate::core::input::{AgentMessage, Relabel, Request};

fn roots() -> Roots {
    Roots { data: vec!["/data".into()], models: vec!["/models".into()], hub: false }
}

fn data(source: Source) -> Option<DataSource> {
    Some(DataSource { source: Some(source), file_name: "train.jsonl".to_owned() })
}

fn good() -> v1::CreateJobRequest {
    let train = data(Source::Digest("0a".repeat(32)));
    let spec = TrainingSpec { train: train.clone(), eval: train, ..TrainingSpec::default() };
    let job = v1::Job { backbone: "backbones/b".to_owned(), spec: Some(spec), ..v1::Job::default() };
    v1::CreateJobRequest { job: Some(job), ..v1::CreateJobRequest::default() }
}

/// The fields that are wrong once a good request is changed.
fn wrong(change: impl FnOnce(&mut v1::Job, &mut TrainingSpec)) -> Vec<String> {
    let mut request = good();
    let mut job = request.job.take().unwrap();
    let mut spec = job.spec.take().unwrap();
    change(&mut job, &mut spec);
    job.spec = Some(spec);
    request.job = Some(job);
    match create_job(&request, "made-up", &roots()) {
        Ok(_) => Vec::new(),
        Err(problem) => {
            assert_eq!(problem.code, Code::InvalidArgument);
            problem.fields.into_iter().map(|(field, _)| field).collect()
        }
    }
}

#[test]
fn a_job_without_a_name_gets_one_and_what_is_left_out_has_defaults() {
    let asked = create_job(&good(), "made-up", &roots()).unwrap();
    let Request::CreateJob { job, validate_only: false } = asked.request else { panic!() };
    assert_eq!((job.name.as_str(), job.priority, asked.key), ("jobs/made-up", 10, None));
    assert_eq!(digests_of(&job.spec).count(), 2);
}

#[test]
fn the_made_up_name_does_not_tell_a_request_from_itself() {
    let mut request = good();
    request.request_id = "8C3B4E8A-0000-4000-8000-000000000001".to_owned();
    let (first, again) =
        (create_job(&request, "x", &roots()).unwrap(), create_job(&request, "y", &roots()).unwrap());
    assert_eq!(first.key, again.key);
    request.job.as_mut().unwrap().priority = 11;
    let other = create_job(&request, "x", &roots()).unwrap();
    assert_eq!(first.key.as_ref().unwrap().id, other.key.as_ref().unwrap().id);
    assert_ne!(first.key.unwrap().hash, other.key.unwrap().hash);
    request.request_id = "1".to_owned();
    assert_eq!(create_job(&request, "x", &roots()).unwrap_err().fields[0].0, "request_id");
}

#[test]
fn numbers_out_of_their_ranges_are_refused_by_their_fields() {
    for (field, change) in [
        ("batch_size", (|spec| spec.batch_size = Some(0)) as fn(&mut TrainingSpec)),
        ("batch_size", |spec| spec.batch_size = Some(65_537)),
        ("steps", |spec| spec.steps = Some(0)),
        ("steps", |spec| spec.steps = Some(1_000_000_001)),
        ("prompt_length", |spec| spec.prompt_length = Some(10_001)),
        ("lr", |spec| spec.lr = Some(0.0)),
        ("lr", |spec| spec.lr = Some(f64::NAN)),
        ("lr", |spec| spec.lr = Some(f64::INFINITY)),
        ("dropout", |spec| spec.dropout = Some(1.0)),
        ("dropout", |spec| spec.dropout = Some(f64::NAN)),
        ("weight_decay", |spec| spec.weight_decay = Some(f64::NAN)),
        ("z_loss", |spec| spec.z_loss = Some(-1.0)),
        ("keep", |spec| spec.keep = Some(0)),
        ("optimizer", |spec| spec.optimizer = 99),
        ("recipe", |spec| spec.recipe = -1),
        ("schedule", |spec| spec.schedule = 7),
        ("loss", |spec| spec.loss = 7),
        ("prompt_placement", |spec| spec.prompt_placement = 4),
        ("prompt_layers", |spec| spec.prompt_layers = -1),
        ("predict", |spec| spec.predict = 3),
        ("method", |spec| spec.method = 7),
        ("prefix_part", |spec| spec.prefix_part = 9),
        ("adapter_width", |spec| spec.adapter_width = Some(0)),
        ("instruction", |spec| spec.instruction = Some("x".repeat(16 * 1024 + 1))),
        ("task", |spec| spec.task = Some(String::new())),
        ("labels", |spec| (spec.task, spec.labels) = (Some("cb".to_owned()), Some("0=no".to_owned()))),
        ("metrics", |spec| spec.metrics = vec![0]),
        ("metrics", |spec| spec.metrics = vec![1, 1]),
        ("inputs", |spec| spec.inputs = Some("x".repeat(16 * 1024 + 1))),
        ("labels", |spec| spec.labels = Some(String::new())),
        ("prompt_init", |spec| spec.prompt_init = Some("uniform:1,0".to_owned())),
        ("prompt_init", |spec| spec.prompt_init = Some("text: ".to_owned())),
        ("train", |spec| spec.train = None),
        ("train.digest", |spec| spec.train = data(Source::Digest("AB".repeat(32)))),
        ("train.path", |spec| spec.train = data(Source::Path("/data/../etc/passwd".to_owned()))),
        ("train.path", |spec| spec.train = data(Source::Path("/database/x".to_owned()))),
        ("train.path", |spec| spec.train = data(Source::Path("data/x".to_owned()))),
        ("train.path", |spec| spec.train = data(Source::Path("/data//x".to_owned()))),
        ("train.file_name", |spec| spec.train.as_mut().unwrap().file_name = "../x".to_owned()),
        ("train.file_name", |spec| spec.train.as_mut().unwrap().file_name = String::new()),
    ] {
        assert_eq!(wrong(|_, spec| change(spec)), [format!("job.spec.{field}")]);
    }
    assert_eq!(wrong(|_, spec| spec.train = data(Source::Path("/data/x".to_owned()))), [""; 0]);
    for init in ["class-label", "vocab", "uniform", "uniform:-0.5, 0.5", "text:Is it so?"] {
        assert_eq!(wrong(|_, spec| spec.prompt_init = Some(init.to_owned())), [""; 0]);
    }
}

#[test]
fn a_prompt_to_start_as_is_a_blob_that_the_specification_asks_for() {
    let with = |init: &str, initial: Option<DataSource>| {
        wrong(move |_, spec| (spec.prompt_init, spec.initial) = (Some(init.to_owned()), initial))
    };
    let blob = data(Source::Digest("ab".repeat(32)));
    let none: [&str; 0] = [];
    assert_eq!(with("file:prompt.safetensors", blob.clone()), none);
    assert_eq!(with("file:prompt.safetensors", None), ["job.spec.initial"]);
    assert_eq!(with("vocab", blob.clone()), ["job.spec.initial"]);
    assert_eq!(
        with("file:prompt.safetensors", data(Source::Path("/data/p.npy".to_owned()))),
        ["job.spec.initial"]
    );
    assert_eq!(with("file:p.npy", data(Source::Digest("ab".to_owned()))), ["job.spec.initial.digest"]);
    let mut spec = TrainingSpec { initial: blob, ..TrainingSpec::default() };
    assert_eq!(digests_of(&spec).collect::<Vec<_>>(), ["ab".repeat(32)], "it stays as long as the job");
    spec.initial = None;
    assert_eq!(digests_of(&spec).count(), 0);
}

/// A good request, as one of two tasks.
fn two_tasks(spec: &mut TrainingSpec) {
    let own = TrainingSpec { train: spec.train.take(), eval: spec.eval.take(), ..TrainingSpec::default() };
    spec.tasks =
        ["a", "b"].map(|name| TrainingTask { name: name.to_owned(), spec: Some(own.clone()) }).into();
    spec.shared_length = Some(3);
}

#[test]
fn tasks_that_share_rows_have_names_and_examples_and_nothing_that_is_for_all() {
    let change = |change: fn(&mut TrainingSpec)| {
        wrong(move |_, spec| {
            two_tasks(spec);
            change(spec);
        })
    };
    fn own(spec: &mut TrainingSpec) -> &mut TrainingSpec {
        spec.tasks[1].spec.as_mut().unwrap()
    }
    assert_eq!(change(|_| ()), [""; 0]);
    assert_eq!(change(|spec| spec.eval_every = Some(10)), [""; 0], "some task is evaluated");
    for (field, made) in [
        ("tasks", change(|spec| drop(spec.tasks.pop()))),
        ("tasks", change(|spec| (spec.tasks, spec.train) = (Vec::new(), own(spec).train.clone()))),
        ("shared_length", change(|spec| spec.shared_length = None)),
        ("shared_length", change(|spec| spec.shared_length = Some(0))),
        ("patience", change(|spec| spec.patience = Some(3))),
        ("tasks[1].name", change(|spec| spec.tasks[1].name = "a".to_owned())),
        ("tasks[0].name", change(|spec| spec.tasks[0].name = "../a".to_owned())),
        ("tasks[1].spec.train", change(|spec| own(spec).train = None)),
        ("tasks[1].spec.train.digest", change(|spec| own(spec).train = data(Source::Digest("x".to_owned())))),
        ("tasks[1].spec.batch_size", change(|spec| own(spec).batch_size = Some(0))),
        ("tasks[1].spec.steps", change(|spec| own(spec).steps = Some(3))),
        ("tasks[1].spec.lr", change(|spec| own(spec).lr = Some(0.1))),
        ("tasks[1].spec.metrics", change(|spec| (own(spec).eval, own(spec).metrics) = (None, vec![1]))),
        ("tasks[1].spec.tasks", change(|spec| own(spec).tasks = vec![TrainingTask::default()])),
    ] {
        assert_eq!(made, [format!("job.spec.{field}")]);
    }
    let mut spec = good().job.unwrap().spec.unwrap();
    two_tasks(&mut spec);
    assert_eq!(digests_of(&spec).count(), 4, "all stay as long as the job");
}

#[test]
fn what_needs_data_to_evaluate_on_is_refused_without_them() {
    let fields = wrong(|_, spec| {
        spec.eval = None;
        (spec.patience, spec.eval_every, spec.metrics) = (Some(3), Some(100), vec![1]);
    });
    assert_eq!(fields, ["job.spec.eval_every", "job.spec.patience", "job.spec.metrics"]);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let fields = wrong(|job, spec| {
        job.backbone = "b".to_owned();
        job.priority = 101;
        job.labels = BTreeMap::from([(String::new(), "x".to_owned())]);
        job.retry_policy = Some(v1::RetryPolicy { max_retries: 11, reasons: vec![5] });
        spec.lr = Some(-1.0);
    });
    let expected = [
        "job.backbone",
        "job.spec.lr",
        "job.priority",
        "job.labels",
        "job.retry_policy.max_retries",
        "job.retry_policy.reasons",
    ];
    assert_eq!(fields, expected);
}

#[test]
fn an_update_changes_the_fields_that_its_mask_names_and_no_others() {
    let labels = BTreeMap::from([("a.b".to_owned(), "1".to_owned())]);
    let job =
        v1::Job { name: "jobs/j".to_owned(), priority: 7, labels: labels.clone(), ..v1::Job::default() };
    let asked = |job: &v1::Job, paths: &[&str]| {
        let mask = pbjson_types::FieldMask { paths: paths.iter().map(|&path| path.to_owned()).collect() };
        update_job(&v1::UpdateJobRequest {
            job: Some(job.clone()),
            update_mask: Some(mask),
            ..Default::default()
        })
    };
    let patch = |paths: &[&str]| match asked(&job, paths).unwrap().request {
        Request::UpdateJob { patch, .. } => *patch,
        other => panic!("{other:?}"),
    };
    let one = patch(&["priority"]);
    assert_eq!((one.priority, one.retry_policy, one.labels), (Some(7), None, Relabel::default()));
    let some = patch(&["labels.a.b", "labels.gone"]).labels;
    let changed = BTreeMap::from([("a.b".to_owned(), Some("1".to_owned())), ("gone".to_owned(), None)]);
    assert_eq!((some.whole, some.changed), (None, changed));
    let all = patch(&["*"]);
    assert_eq!((all.priority, all.retry_policy.is_some(), all.labels.whole), (Some(7), true, Some(labels)));
    for paths in [&[][..], &["spec"], &["labels."], &["priority", "state"]] {
        assert_eq!(asked(&job, paths).unwrap_err().fields[0].0, "update_mask", "{paths:?}");
    }
    let wrong = v1::Job { name: "j".to_owned(), etag: "x".to_owned(), priority: 101, ..job.clone() };
    let fields: Vec<_> =
        asked(&wrong, &["priority"]).unwrap_err().fields.into_iter().map(|field| field.0).collect();
    assert_eq!(fields, ["job.name", "job.etag", "job.priority"]);
    // What the mask does not name is not looked at.
    assert!(asked(&v1::Job { priority: 101, ..job.clone() }, &["labels"]).is_ok());
}

#[test]
fn a_model_is_a_path_under_a_root_or_one_of_the_hub_where_that_is_allowed() {
    let refused = |model: &str, roots: &Roots| {
        let backbone = v1::Backbone { model: model.to_owned(), ..v1::Backbone::default() };
        let backbone_id = "b".to_owned();
        let request =
            v1::CreateBackboneRequest { backbone_id, backbone: Some(backbone), ..Default::default() };
        create_backbone(&request, roots).is_err()
    };
    let with_hub = Roots { hub: true, ..roots() };
    assert!(
        !refused("/models/t5", &roots()) && refused("/models/../t5", &roots()) && refused("/t5", &roots())
    );
    assert!(refused("google/t5-small", &roots()) && !refused("google/t5-small", &with_hub));
    assert!(!refused("google/t5-small@refs/pr/3", &with_hub));
    for model in ["", "t5", "../t5", "a/b/c", "a/..", "https://x/y", "a/b@", "a/b@../c", "a/b@c@d"] {
        assert!(refused(model, &with_hub), "{model}");
    }
}

#[test]
fn a_backbone_has_defaults_and_knows_its_words() {
    let backbone = v1::Backbone { model: "/models/t5".to_owned(), ..v1::Backbone::default() };
    let mut request = v1::CreateBackboneRequest {
        backbone_id: "b".to_owned(),
        backbone: Some(backbone),
        ..Default::default()
    };
    let Request::CreateBackbone { backbone, .. } = create_backbone(&request, &roots()).unwrap().request
    else {
        panic!()
    };
    let spec = backbone.spec;
    assert_eq!(
        (spec.dtype.as_str(), spec.device.as_str(), spec.collective.as_str()),
        ("bf16", "cpu", "local")
    );
    assert_eq!((spec.tp, spec.dp, spec.max_running_jobs), (1, 1, 32));
    let wanted = request.backbone.as_mut().unwrap();
    (wanted.dtype, wanted.collective, wanted.tp) = ("f16".to_owned(), "nccl".to_owned(), 65);
    let fields = create_backbone(&request, &roots()).unwrap_err().fields;
    let fields: Vec<_> = fields.iter().map(|(field, _)| &**field).collect();
    assert_eq!(fields, ["backbone.dtype", "backbone.tp", "backbone.collective"]);
}

#[test]
fn fewer_replicas_are_enough_only_where_they_are_processes_and_there_are_more() {
    let problem = |collective: &str, dp, min_dp| {
        let (model, collective) = ("/models/t5".to_owned(), collective.to_owned());
        let backbone = v1::Backbone { model, collective, dp, min_dp, ..v1::Backbone::default() };
        let backbone_id = "b".to_owned();
        let request =
            v1::CreateBackboneRequest { backbone_id, backbone: Some(backbone), ..Default::default() };
        create_backbone(&request, &roots()).err()
    };
    assert!(problem("gloo", 3, 1).is_none() && problem("gloo", 3, 3).is_none());
    for (collective, dp, min_dp) in [("gloo", 3, 4), ("local", 3, 1)] {
        assert_eq!(problem(collective, dp, min_dp).unwrap().fields[0].0, "backbone.min_dp");
    }
}

#[test]
fn names_of_checkpoints_and_versions_are_parsed_and_nothing_else_is() {
    assert_eq!(checkpoint_ref("name", "jobs/j/checkpoints/00000500", "").unwrap().step, StepRef::At(500));
    assert_eq!(checkpoint_ref("name", "jobs/j/checkpoints/best", "").unwrap().step, StepRef::Best);
    for name in [
        "jobs/j",
        "jobs/j/checkpoints/",
        "jobs/j/checkpoints/+5",
        "jobs/J/checkpoints/5",
        "jobs/j/checkpoints/5/6",
    ] {
        assert_eq!(checkpoint_ref("name", name, "").unwrap_err().fields[0].0, "name", "{name}");
    }
    assert_eq!(version_ref("name", "prompts/p/versions/3").unwrap().1, Some(3));
    assert_eq!(version_ref("name", "prompts/p/versions/latest").unwrap().1, None);
    assert!(version_ref("name", "prompts/p/versions/-1").is_err());
}

#[test]
fn an_agent_of_another_cluster_protocol_or_role_is_refused() {
    let good = v1::Hello {
        protocol_min: 1,
        protocol_max: 9,
        worker: "workers/w".to_owned(),
        incarnation: "i".to_owned(),
        ..v1::Hello::default()
    };
    assert_eq!(hello(good.clone(), "c").unwrap().protocol, incipit_proto::client::PROTOCOL);
    let other = v1::Hello { cluster_id: "d".to_owned(), ..good.clone() };
    assert_eq!(hello(other, "c").unwrap_err().reason, "OTHER_CLUSTER");
    let newer = v1::Hello { protocol_min: incipit_proto::client::PROTOCOL + 1, ..good.clone() };
    assert_eq!(hello(newer, "c").unwrap_err().reason, "PROTOCOL");
    let worker = v1::Hello { role: v1::WorkerRole::Worker.into(), ..good.clone() };
    assert!(hello(worker, "c").is_ok());
    let problem = hello(v1::Hello { role: 7, ..good }, "c").unwrap_err();
    assert!(problem.reason == "ROLE" && problem.message.contains("the role 7"), "{problem}");
}

#[test]
fn a_report_without_a_number_or_with_a_path_for_a_name_ends_the_stream() {
    let saved = |name: &str| v1::CheckpointSaved {
        files: vec![v1::CheckpointFile { name: name.to_owned(), digest: "0".repeat(64), size: 1 }],
        ..v1::CheckpointSaved::default()
    };
    let message = |sequence, name: &str| v1::AttachRequest {
        sequence,
        message: Some(v1::attach_request::Message::Job(v1::JobReport {
            backbone: "backbones/b".to_owned(),
            job: "jobs/j".to_owned(),
            report: Some(v1::job_report::Report::Saved(saved(name))),
            ..v1::JobReport::default()
        })),
    };
    assert!(matches!(agent_message(message(1, "a")), Ok(AgentMessage::Report { sequence: 1, .. })));
    assert!(agent_message(message(0, "a")).is_err());
    assert!(matches!(agent_message(message(1, "task/a")), Ok(AgentMessage::Report { sequence: 1, .. })));
    for path in ["a/../b", "../a", "a/", "/a", "a/b/c", ".a/b"] {
        assert!(agent_message(message(1, path)).is_err(), "{path}");
    }
    assert!(agent_message(v1::AttachRequest::default()).is_err());
}
