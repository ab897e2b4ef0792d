"""What it takes to start, pause and resume a job on a resident backbone, and to lose the engine; and that its bytes stay what they are alone.

    python lifecycle.py --model DIR --train train.jsonl --eval dev.jsonl --inputs "{question}" --targets "{label}" --device cuda

Needs a built program and nothing from PyPI. Two jobs train beside each other through one `incipit up`; the first is paused and resumed,
and then an engine is killed. The prompt of each must be, to the byte, that of `incipit train` with the same settings. Several ranks over
Gloo or NCCL (`--tp 2 --collective gloo`) have a worker each, and jobs are then compared with others that train alone. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from local_cluster import LocalCluster, seconds

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEDS = {"first": 0, "second": 1}


def settings(options: argparse.Namespace, seed: int) -> list[str]:
    flags = {
        "--train": options.train, "--eval": options.eval, "--inputs": options.inputs, "--targets": options.targets, "--seed": seed,
        "--steps": options.steps, "--eval-every": options.steps // 2, "--checkpoint-every": options.steps // 4,
        "--prompt-length": options.prompt_length, "--max-input-length": options.max_input_length,
    }  # fmt: skip
    return [str(word) for pair in flags.items() for word in pair]


def prompt(cluster: LocalCluster, job: str, directory: pathlib.Path) -> bytes:
    """That of a job's last checkpoint, which is kept in a directory of its name."""
    cluster.ask("checkpoint", "download", f"{job}/last", "--out", str(directory / job))
    return (directory / job / "prompt.safetensors").read_bytes()


def alone(options: argparse.Namespace, cluster: LocalCluster, seed: int, directory: pathlib.Path) -> bytes:
    """The prompt that training ends with where nothing disturbs it: `incipit train`, or where there are several ranks another job."""
    name = f"alone-{seed}"
    if options.tp * options.dp > 1:
        cluster.ask("job", "submit", "--name", name, *settings(options, seed))
        cluster.ask("job", "watch", name)
        return prompt(cluster, name, directory)
    out = directory / name
    command = [options.program, "train", "--model", options.model, "--device", options.device, "--out", str(out), "--quiet"]
    subprocess.run([*command, *settings(options, seed)], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    return (out / "last" / "prompt.safetensors").read_bytes()


def step_of(cluster: LocalCluster, job: str) -> int:
    """The step that is behind a job that trains. One that has ended was too short for what was to be done to it."""
    found = cluster.job(job)
    if found["state"] not in ("JOB_STATE_QUEUED", "JOB_STATE_RUNNING"):
        raise RuntimeError(f"{job} is {found['state']}: {found.get('message')}; with more --steps it trains for longer")
    return int(found.get("progress", {}).get("step", 0))


def pause(cluster: LocalCluster, job: str) -> float:
    """Seconds from the request to where the job is saved and away from the backbone."""
    asked = time.time()
    cluster.ask("job", "pause", job)
    cluster.wait_for(f"pause of {job}", lambda: cluster.job(job)["state"] == "JOB_STATE_PAUSED", 60)
    return seconds(cluster.job(job)["attempts"][-1]["endTime"]) - asked


def lose_engine(cluster: LocalCluster) -> float:
    """Kills the last rank's engine. When that was."""
    rank = cluster.backbone()["ranks"][-1]
    killed = time.time()
    os.kill(int(rank["pid"]), signal.SIGKILL)
    return killed


def after(times: list[float], moment: float) -> float:
    """Seconds from a moment to the first step behind it."""
    return min(time for time in times if time > moment) - moment


def measure(options: argparse.Namespace, directory: pathlib.Path) -> dict:
    flags = ["--device", options.device.partition(":")[0], "--tp", str(options.tp), "--dp", str(options.dp)]
    ranks = options.tp * options.dp
    if ranks > 1:
        flags += ["--collective", options.collective]
    with LocalCluster(options.program, options.model, directory, flags, options.limit, ranks) as cluster:
        for name, seed in SEEDS.items():
            cluster.ask("job", "submit", "--name", name, *settings(options, seed))
        cluster.wait_for("step", lambda: step_of(cluster, "first") > options.steps // 8, options.limit)
        pause_s = pause(cluster, "first")
        resumed = time.time()
        cluster.ask("job", "resume", "first")
        cluster.wait_for("step", lambda: step_of(cluster, "first") > options.steps // 2, options.limit)
        killed = lose_engine(cluster)
        # A watch ends as its job does.
        times = {name: cluster.times(name) for name in SEEDS}
        jobs = {name: cluster.job(name) for name in SEEDS}
        ended = {name: prompt(cluster, name, directory) for name in SEEDS}
        same = [ended[name] == alone(options, cluster, seed, directory) for name, seed in SEEDS.items()]
    created = seconds(jobs["second"]["createTime"])
    return {
        "same_bytes": all(same),
        "ranks": ranks,
        "epochs": int(jobs["first"]["attempts"][-1]["epoch"]),
        "load_s": cluster.seconds_to_ready,
        "step_s": statistics.median(b - a for a, b in zip(times["second"], times["second"][1:])),
        "start_s": after(times["second"], created),
        "pause_s": pause_s,
        "resume_s": after(times["first"], resumed),
        "recover_s": after(times["first"], killed),
        "checkpoint_bytes": sum(file.stat().st_size for file in (directory / "first").iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "target/release/incipit"))
    parser.add_argument("--model", required=True, help="a model directory with a tokenizer")
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--inputs", default="{inputs}")
    parser.add_argument("--targets", default="{targets}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--collective", default="gloo", choices=["gloo", "nccl"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--max-input-length", type=int, default=128)
    parser.add_argument("--limit", type=float, default=600, help="seconds that loading, or a part of training, may take")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure(options, pathlib.Path(directory))))


if __name__ == "__main__":
    main()
