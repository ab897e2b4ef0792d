#!/usr/bin/env python3
"""What T5's own preprocessing, postprocessing and metrics make of records: crates/data/tests/goldens/tasks/.

    data/           small files in the benchmarks' own forms, written here by hand, with the odd cases that the published ones have
    examples.json   of each split of them, the inputs, targets, and what scoring needs
    fewglue.json    a 64-bit FNV-1a hash of each example's input and target of FewGLUE's records, which are not ours to copy
    metrics.json    predictions, legal and not, and their scores

Records are read by TFDS's own generators, so that its mending and dropping of records is in the goldens too. The name of the task at the front of an
input is taken off as prompt tuning does it. A target that T5 makes up for a record without a label is written as "".

    python3.11 -m venv .venv-t5 && .venv-t5/bin/pip install -r requirements.txt
    .venv-t5/bin/python make.py SHARED_FOLDER

The one argument is the folder that has data/fewglue.
"""

import functools
import gzip
import json
import os
import pathlib
import platform
import random
import re
import shutil
import sys
import types
from importlib.metadata import version

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf  # noqa: E402
from t5.data import glue_utils, postprocessors, preprocessors  # noqa: E402
from t5.evaluation import metrics  # noqa: E402
from tensorflow_datasets.datasets.squad import squad_dataset_builder  # noqa: E402
from tensorflow_datasets.text import glue, super_glue  # noqa: E402

import records  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parents[3] / "crates" / "data" / "tests" / "goldens" / "tasks"
PACKAGES = ["t5", "tensorflow", "tensorflow-datasets", "scikit-learn", "seqio-nightly"]
FOLDERS = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC", "record": "ReCoRD", "rte": "RTE", "wic": "WiC", "wsc": "WSC"}
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def run(preprocess, record: dict) -> list[dict]:
    """The examples that a preprocessor of data sets makes of one record."""
    return list(preprocess(tf.data.Dataset.from_tensors(record)).as_numpy_iterator())


def text(value) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def without_first_token(inputs: bytes) -> str:
    return text(tf.strings.regex_replace(inputs, r"^[^ ]* ", "", replace_global=False).numpy())


def encoded(config, record: dict) -> dict:
    """A record with its label as TFDS's features would store it."""
    label = record.get("label")
    classes = ["False", "True"] if config.name == "wsc.fixed" else config.label_classes
    return record | ({} if label is None else {"label": classes.index(label) if isinstance(label, str) else label})


# ---------------------------------------------------------------- SuperGLUE


def super_glue_records(name: str, path: pathlib.Path, split: str):
    config = super_glue.SuperGlue.builder_configs["wsc.fixed" if name == "wsc" else name]
    generate = super_glue.SuperGlue._generate_examples
    for _, record in generate(types.SimpleNamespace(builder_config=config), path, split):
        yield config, encoded(config, record)


def super_glue_examples(name: str, path: pathlib.Path, split: str, training: bool) -> list[dict]:
    examples, seen = [], set()
    for config, record in super_glue_records(name, path, split):
        unlabelled = record.get("label") == -1 or (name == "record" and not record["answers"])
        if name == "record":
            record["answers"] = tf.constant(record["answers"], tf.string)
            made = run(preprocessors.record, record)
        elif name == "wsc":
            if training and unlabelled:
                continue
            made = run(functools.partial(preprocessors.wsc_simple, correct_referent_only=training), record)
        else:
            made = run(glue_utils.get_glue_text_preprocessor(config), record)
        for example in made:
            key = (int(example["idx/passage"]), int(example["idx/query"])) if name == "record" else None
            if key in seen and not training:
                continue  # T5's metric scores only the first of them
            seen.add(key) if key else None
            examples.append(golden(name, example, unlabelled))
    return examples


def golden(name: str, example: dict, unlabelled: bool) -> dict:
    target = "" if unlabelled else text(example["targets"])
    made = {"inputs": without_first_token(example["inputs"]), "targets": target}
    if name == "record":
        made["answers"] = [text(answer) for answer in example["answers"]]
    if name == "wsc":
        made["holds"] = None if unlabelled else bool(example["label"])
        made["referent"] = text(example["targets"])
    if name == "multirc":
        made["group"] = int(example["idx/question"])
    return made


# ---------------------------------------------------------------- GLUE


def glue_examples(name: str, path, split: str, mrpc_files: dict | None = None) -> list[dict]:
    config = glue.Glue.builder_configs[name]
    builder = types.SimpleNamespace(builder_config=config)
    builder._generate_example_mrpc_files = functools.partial(glue.Glue._generate_example_mrpc_files, builder)
    examples = []
    for _, record in glue.Glue._generate_examples(builder, path, split, mrpc_files):
        record = encoded(config, record)
        for example in run(glue_utils.get_glue_text_preprocessor(config), record):
            examples.append(golden(name, example, record["label"] == -1))
    return examples


# ---------------------------------------------------------------- questions about a passage


def squad_examples(path: pathlib.Path) -> list[dict]:
    builder = types.SimpleNamespace(builder_config=types.SimpleNamespace(name="v1.1"))
    examples = []
    for _, record in squad_dataset_builder.Builder._generate_examples(builder, path):
        del record["title"], record["answers"]["answer_start"]
        for example in run(preprocessors.squad, record):
            examples.append(question_golden(example["inputs"], example["targets"], example["answers"]))
    return examples


def mrqa_examples(path: pathlib.Path) -> list[dict]:
    """As google-research/prompt-tuning turns them into a table and that into examples, but for every question of a passage, and without the doubled
    quotes that its table gets."""
    apart = lambda s: preprocessors._pad_punctuation(re.sub(r"\s+", " ", s))
    examples = []
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    for record in map(json.loads, lines[1:]):
        for asked in record["qas"]:
            inputs = preprocessors._string_join(["question:", apart(asked["question"]), "context:", apart(record["context"])])
            target = apart(asked["detected_answers"][0]["text"])
            answers = [apart(answer).numpy() for answer in asked["answers"]]
            examples.append(question_golden(inputs.numpy(), target.numpy(), answers))
    return examples


def question_golden(inputs: bytes, target: bytes, answers) -> dict:
    return {"inputs": text(inputs), "targets": text(target), "answers": [text(answer) for answer in answers]}


# ---------------------------------------------------------------- examples


def all_examples(data: pathlib.Path) -> list[dict]:
    made = []

    def add(task: str, split: str, examples: list[dict], use: str = "evaluation") -> None:
        assert examples, (task, split)
        made.append({"task": task, "split": split, "use": use, "examples": examples})

    for name, folder in FOLDERS.items():
        for split, file in SPLITS.items():
            path = data / folder / f"{file}.jsonl"
            add(name, split, super_glue_examples(name, path, split, training=split == "train"), "training" if split == "train" else "evaluation")
    for task, name, folder in [("sst2", "sst2", "SST-2"), ("qqp", "qqp", "QQP"), ("glue-rte", "rte", "RTE")]:
        for split in SPLITS:
            add(task, split, glue_examples(name, data / folder / f"{split}.tsv", split))
    for kind in ["matched", "mismatched"]:
        task = "mnli" if kind == "matched" else "mnli-mismatched"
        add(task, "train", glue_examples("mnli", data / "MNLI" / "train.tsv", "train"))
        for split in ["dev", "test"]:
            add(task, split, glue_examples(f"mnli_{kind}", data / "MNLI" / f"{split}_{kind}.tsv", split))
    msr = data / "MRPC"
    files = {"train": msr / "msr_paraphrase_train.txt", "dev_ids": msr / "dev_ids.tsv", "test": msr / "test.tsv"}
    for split in SPLITS:
        add("mrpc", split, glue_examples("mrpc", None, split, files))
    for split in ["train", "dev"]:
        add("squad", split, squad_examples(data / "SQuAD" / f"{split}-v1.1.json"))
    add("mrqa-bioasq", "dev", mrqa_examples(data / "MRQA" / "BioASQ.jsonl.gz"))
    for split in ["train", "dev"]:
        add("mrqa-hotpotqa", split, mrqa_examples(data / "MRQA" / split / "HotpotQA.jsonl.gz"))
    return made


def fnv(value: str) -> int:
    state = 0xCBF29CE484222325
    for byte in value.encode("utf-8"):
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state


def fewglue(folder: pathlib.Path) -> dict:
    hashes = {}
    for name, directory in FOLDERS.items():
        for training in [True, False]:
            examples = super_glue_examples(name, folder / directory / "train.jsonl", "train", training)
            key = f"{name} {'training' if training else 'evaluation'}"
            hashes[key] = [f"{fnv(e['inputs'] + chr(31) + e['targets']):016x}" for e in examples]
    return hashes


# ---------------------------------------------------------------- metrics


def classes_case(rng: random.Random, task: str, labels: list[str], metric_fns: dict, count: int, grouped: bool = False) -> dict:
    targets = [rng.choice(labels[:2] if len(labels) == 3 and count < 20 else labels) for _ in range(count)]
    illegal = ["", "maybe", labels[0].swapcase(), labels[-1] + labels[-1], "<extra_id_0>"]
    predictions = [rng.choice([t, t, rng.choice(labels), rng.choice(illegal)]) for t in targets]
    groups = sorted(rng.randrange(max(count // 3, 1)) for _ in range(count))
    if grouped:
        of = lambda label, group=None: postprocessors.multirc(label, {"idx/question": group}, is_target=group is not None)
        t, p = [of(a, g) for a, g in zip(targets, groups)], [of(a) for a in predictions]
    else:
        of = functools.partial(postprocessors.string_label_to_class_id, label_classes=labels)
        t, p = [of(a) for a in targets], [of(a) for a in predictions]
    case = {"task": task, "targets": targets, "predictions": predictions, "scores": scores(metric_fns, t, p)}
    return case | ({"groups": groups} if grouped else {})


def scores(metric_fns: dict, targets: list, predictions: list) -> dict:
    made = {}
    for name, (fn, key) in metric_fns.items():
        made[name] = float(fn(list(targets), list(predictions))[key]) / 100
    return made


def answers_case(rng: random.Random, task: str) -> dict:
    targets = [rng.sample(records.ANSWERS, rng.randrange(1, 4)) for _ in range(60)]
    mangle = [str.upper, lambda s: f"the {s}!", lambda s: s + " " + rng.choice(records.ANSWERS), lambda s: s, lambda s: rng.choice(records.ANSWERS)]
    predictions = [rng.choice(mangle)(rng.choice(t)) for t in targets]
    if task == "record":
        of = lambda i, t: postprocessors.record("", {"answers": t, "idx/passage": i, "idx/query": 0}, is_target=True)
        made = metrics.deduplicate_metric(metrics.squad)([of(i, t) for i, t in enumerate(targets)], [{"value": p} for p in predictions])
    else:
        made = metrics.squad([postprocessors.qa("", {"answers": t}, is_target=True) for t in targets], predictions)
    return {"task": task, "answers": targets, "predictions": predictions, "scores": {"exact-match": made["em"] / 100, "token-f1": made["f1"] / 100}}


def wsc_case() -> dict:
    rows = records.REFERENTS
    t = [int(holds) for _, _, holds in rows]
    p = [int(postprocessors.wsc_simple(prediction, {"targets_pretokenized": referent})) for prediction, referent, _ in rows]
    return {
        "task": "wsc",
        "predictions": [prediction for prediction, _, _ in rows],
        "targets": [referent for _, referent, _ in rows],
        "holds": [holds for _, _, holds in rows],
        "right": [a == b for a, b in zip(t, p)],
        "scores": {"containment": metrics.accuracy(t, p)["accuracy"] / 100},
    }


def all_metrics() -> list[dict]:
    rng = random.Random(11)
    accuracy = {"accuracy": (metrics.accuracy, "accuracy")}
    f1 = {"positive-f1": (metrics.f1_score_with_invalid, "f1")}
    multirc = {
        "positive-f1": (metrics.multirc_f1_over_all_answers, "f1"),
        "group-exact-match": (metrics.mean_group_metric(metrics.all_match), "exact_match"),
    }
    macro = {"macro-f1": (metrics.mean_multiclass_f1(num_classes=3), "mean_3class_f1")}
    labels = lambda module, name: (module.builder_configs[name]).label_classes
    cases = []
    for count in [1, 12, 57]:
        for name in ["boolq", "copa", "rte", "wic"]:
            cases.append(classes_case(rng, name, list(labels(super_glue.SuperGlue, name)), accuracy, count))
        cases.append(classes_case(rng, "cb", list(labels(super_glue.SuperGlue, "cb")), macro | accuracy, count))
        cases.append(classes_case(rng, "multirc", ["False", "True"], multirc, count, grouped=True))
        for name in ["mrpc", "qqp"]:
            cases.append(classes_case(rng, name, list(labels(glue.Glue, name)), f1 | accuracy, count))
        for task, name in [("sst2", "sst2"), ("glue-rte", "rte"), ("mnli", "mnli"), ("mnli-mismatched", "mnli_mismatched")]:
            cases.append(classes_case(rng, task, list(labels(glue.Glue, name)), accuracy, count))
    return cases + [answers_case(rng, task) for task in ["record", "squad", "mrqa-race"]] + [wsc_case()]


# ---------------------------------------------------------------- files


def write(name: str, value: dict) -> None:
    """JSON with one line for each item of the lists, so that a diff can be read."""
    made_with = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    dump = functools.partial(json.dumps, ensure_ascii=False)
    lines = [f'  "made_with": {dump(made_with)}']
    for key, items in value.items():
        lines.append(f"  {dump(key)}: [\n    " + ",\n    ".join(map(dump, items)) + "\n  ]")
    (OUT / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    records.write(OUT / "data")
    write("examples.json", {"splits": all_examples(OUT / "data")})
    hashes = fewglue(pathlib.Path(sys.argv[1]) / "data" / "fewglue")
    write("fewglue.json", {"splits": [{"split": key, "hashes": value} for key, value in hashes.items()]})
    write("metrics.json", {"cases": all_metrics()})


if __name__ == "__main__":
    main()
