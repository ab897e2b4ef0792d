#!/usr/bin/env python3
"""Accuracies of prompt tuning on real tasks, beside those of a plain PyTorch loop with the same recipe.

    python reference_tasks.py SHARED_FOLDER [--incipit target/release/incipit] [--tasks trec subj] [--seeds 0 1 2] [--out FILE.jsonl]
        [--reference FILE.jsonl ...]

The folder has the model (`models/t5-mini-lm` with `reference_results.json`) and the data (`data/trec`, `data/subj`). Each run takes some minutes:
20 rows, 1,000 steps of 32 examples, learning rate 0.3, bf16, inputs of up to 128 tokens, an evaluation every 250 steps. The prompt that is
best on `dev` is then measured on `test`. Runs that `--out` holds already are not made again. `--reference` adds runs of the PyTorch loop, as its own
`--out` has them, to those in `reference_results.json`. Prints a table in Markdown; needs nothing but Python.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATES = {"trec": "{question}", "subj": "{sentence}"}
PROMPT_LENGTH, STEPS, EVAL_EVERY = 20, 1000, 250
RECIPE = {
    "prompt-length": PROMPT_LENGTH,
    "steps": STEPS,
    "batch-size": 32,
    "lr": 0.3,
    "dtype": "bf16",
    "max-input-length": 128,
    "eval-every": EVAL_EVERY,
}


def incipit(program: pathlib.Path, *args: object) -> dict:
    ran = subprocess.run([program, *map(str, args), "--json", "--quiet"], check=True, stdout=subprocess.PIPE)
    return json.loads(ran.stdout)


def run(a: argparse.Namespace, task: str, seed: int) -> dict:
    model, data = a.shared / "models" / "t5-mini-lm", a.shared / "data" / task
    text = ["--inputs", TEMPLATES[task], "--targets", "{label}"]
    recipe = [part for flag, value in RECIPE.items() for part in (f"--{flag}", value)]
    threads = ["--threads", a.threads] if a.threads else []
    with tempfile.TemporaryDirectory() as out:
        files = ["--model", model, "--train", data / "train.jsonl", "--eval", data / "dev.jsonl", "--out", out]
        start = time.monotonic()
        incipit(a.incipit, "train", *files, *text, *recipe, "--seed", seed, *threads)
        seconds = time.monotonic() - start
        lines = [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").open(encoding="utf-8")]
        test = incipit(a.incipit, "eval", "--prompt", out, "--data", data / "test.jsonl", *text, "--max-input-length", 128, *threads)
    evals = [line for line in lines if line["event"] == "eval"]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    return {
        "task": task,
        "seed": seed,
        "dev": [line["metrics"]["accuracy"] for line in evals],
        "legal": evals[-1]["legal_share"],
        "test_of_best": test["metrics"]["accuracy"],
        "last_loss": sum(losses[-EVAL_EVERY:]) / len(losses[-EVAL_EVERY:]),
        "seconds": seconds,
    }


def reference_runs(shared: pathlib.Path, tasks: list[str], more: list[pathlib.Path]) -> list[dict]:
    """The reference's runs with as many rows, in the form of ours: those beside the model, and in `more` what
    `reference_prompt_tuning.py --out` wrote. Of two with one seed the longer one."""
    runs = json.loads((shared / "models" / "t5-mini-lm" / "reference_results.json").read_text(encoding="utf-8"))["runs"]
    runs += [json.loads(line) for path in more for line in path.open(encoding="utf-8")]
    found = {}
    for r in sorted(runs, key=lambda r: r["steps"]):
        if r["task"] in tasks and r["mode"] == "prompt" and r["prompt_length"] == PROMPT_LENGTH:
            found[r["task"], r["seed"]] = {
                "task": r["task"],
                "seed": r["seed"],
                "steps": r["steps"],
                "majority": r["majority_dev_acc"],
                "dev": [e["dev_acc"] for e in r["evals"]],
                "legal": r["dev_legal_last"],
                "test_of_best": r["test_acc_of_best"],
                "last_loss": r["evals"][-1]["train_loss"],
            }
    return [found[key] for key in sorted(found)]


def table(ours: list[dict], reference: list[dict]) -> str:
    rows = [
        "| task | program | seed | steps | dev accuracy at each evaluation | best on dev | that one on test | legal | last training loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    percent = lambda share: f"{100 * share:.1f}"
    mean = lambda values: sum(values) / len(values)
    for task in [t for t in TEMPLATES if any(r["task"] == t for r in ours)]:
        for program, runs in (("Incipit", ours), ("reference", reference)):
            runs = [r for r in runs if r["task"] == task]
            for r in runs:
                rows.append(
                    f"| {task} | {program} | {r['seed']} | {r.get('steps', STEPS):,} | {', '.join(map(percent, r['dev']))} | {percent(max(r['dev']))} "
                    f"| {percent(r['test_of_best'])} | {percent(r['legal'])} | {r['last_loss']:.3f} |"
                )
            if runs:
                best, test = (mean([max(r["dev"]) for r in runs]), mean([r["test_of_best"] for r in runs]))
                loss = mean([r["last_loss"] for r in runs])
                rows.append(f"| {task} | **{program}, mean** | | | | **{percent(best)}** | **{percent(test)}** | | {loss:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=pathlib.Path)
    parser.add_argument("--incipit", type=pathlib.Path, default=ROOT / "target" / "release" / "incipit")
    parser.add_argument("--tasks", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--reference", nargs="+", type=pathlib.Path, default=[], metavar="FILE.jsonl")
    a = parser.parse_args()
    made = []
    if a.out and a.out.exists():
        made = [json.loads(line) for line in a.out.open(encoding="utf-8")]
    for task in a.tasks:
        for seed in a.seeds:
            if any((r["task"], r["seed"]) == (task, seed) for r in made):
                continue
            made.append(run(a, task, seed))
            print(json.dumps(made[-1]), flush=True)
            if a.out:
                with a.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(made[-1]) + "\n")
    print(table(made, reference_runs(a.shared, a.tasks, a.reference)))


if __name__ == "__main__":
    main()
