"""C6 on a resident backbone: 8 jobs with 4 examples a step each, against 1 job with the same 32.

    ../make-random-checkpoint --shape base --dtype bf16 /tmp/t5-base
    python resident.py --model /tmp/t5-base

Needs a built program and nothing from PyPI. The two take turns on one backbone of one `incipit up`; a figure is the median over the
repeats of the median time from one step to the next. Run it on a machine that does nothing else.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

from local_cluster import LocalCluster

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTHS = [
    96, 82, 131, 95, 64, 111, 195, 158, 58, 41, 61, 91, 22, 78, 42, 57, 64, 74, 114, 167, 82, 203, 60, 110, 154, 94, 57, 51, 68, 102, 48, 79,
]  # fmt: skip


def train(cluster: LocalCluster, names: list[str], files: list[pathlib.Path], steps: int) -> float:
    """Seconds from one step of the first job to its next, in the median, while all of them train."""
    for name, file in zip(names, files):
        batch = len(file.read_text().splitlines())
        cluster.ask(
            "job", "submit", "--train", str(file), "--name", name, "--steps", str(steps), "--batch-size", str(batch),
            "--shuffle", "false", "--checkpoint-every", str(10 * steps), "--prompt-length", "100", "--max-target-length", "4",
        )  # fmt: skip
    times = [cluster.times(name) for name in names]
    first = max(series[0] for series in times)  # From here on all of them train, until the first has ended.
    last = min(series[-1] for series in times)
    gaps = [b - a for series in times[:1] for a, b in zip(series, series[1:]) if a >= first and b <= last]
    return statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with a tokenizer")
    parser.add_argument("--program", default=str(ROOT / "target/release/incipit"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made)
        records = [json.dumps({"inputs": "the " * (length - 1), "targets": "the the the"}) + "\n" for length in LENGTHS]
        whole, parts = directory / "all.jsonl", [directory / f"part-{i}.jsonl" for i in range(8)]
        whole.write_text("".join(records))
        for i, part in enumerate(parts):
            part.write_text("".join(records[4 * i : 4 * i + 4]))
        with LocalCluster(options.program, options.model, directory, []) as cluster:
            one, eight = [], []
            for repeat in range(options.repeat):
                one.append(train(cluster, [f"one-{repeat}"], [whole], options.steps))
                eight.append(train(cluster, [f"part-{repeat}-{i}" for i in range(8)], parts, options.steps))
                print(f"1 job: {one[-1]:.3f} s a step; 8 jobs: {eight[-1]:.3f} s", flush=True)
    ratio = statistics.median(eight) / statistics.median(one)
    print(f"1 job {statistics.median(one):.3f} s, 8 jobs {statistics.median(eight):.3f} s: {ratio:.3f} x (C6: at most 1.05)")


if __name__ == "__main__":
    main()
