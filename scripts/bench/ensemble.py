"""Five prompts trained together, against one prompt with five times the batch.

    ../make-random-checkpoint --shape base --dtype bf16 /tmp/t5-base
    python ensemble.py --model /tmp/t5-base
    python ensemble.py --model DIR --train train.jsonl --inputs "{question}" --targets "{label}" --batch-size 8

Needs a built program and nothing from PyPI. Without --train the inputs have the lengths of C1. Both runs read five batches of examples in
the file's order: the one prompt all of them in a step, each of the five one batch a step. In five steps both send the same tokens
through the backbone. A figure is the median over such rounds of five steps of their mean time, passes and updates, as metrics.jsonl has
it, the first round left out; the two take turns. Run it on a machine that does nothing else.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MEMBERS = 5
LENGTHS = [
    96, 82, 131, 95, 64, 111, 195, 158, 58, 41, 61, 91, 22, 78, 42, 57, 64, 74, 114, 167, 82, 203, 60, 110, 154, 94, 57, 51, 68, 102, 48, 79,
]  # fmt: skip


def data(options: argparse.Namespace, directory: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The file of five batches, and the examples of one."""
    if options.train:
        lines, batch = options.train.read_text().splitlines(keepends=True), options.batch_size
    else:
        lines = [json.dumps({"inputs": "the " * (length - 1), "targets": "the the the"}) + "\n" for length in LENGTHS]
        lines, batch = lines * MEMBERS, len(lines)
    if len(lines) < MEMBERS * batch:
        raise SystemExit(f"{options.train} has {len(lines)} examples, and {MEMBERS * batch} are needed: pass a smaller --batch-size")
    file = directory / "train.jsonl"
    file.write_text("".join(lines[: MEMBERS * batch]))
    return file, batch


def seconds(metrics: pathlib.Path) -> float:
    """A step's time: the median over the rounds of five steps."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = [step["seconds"] for step in steps if step["event"] == "step"]
    rounds = [times[i : i + MEMBERS] for i in range(MEMBERS, len(times), MEMBERS)]
    return statistics.median(statistics.mean(times) for times in rounds)


def tokens(metrics: list[pathlib.Path]) -> int:
    """Of a round."""
    steps = [json.loads(line) for file in metrics for line in file.read_text().splitlines()]
    return sum(step["tokens"] for step in steps if step["event"] == "step" and step["step"] <= MEMBERS)


def train(options: argparse.Namespace, command: list[str], file: pathlib.Path, batch: int, out: pathlib.Path) -> None:
    steps = MEMBERS * (options.rounds + 1)
    templates = ["--inputs", options.inputs, "--targets", options.targets] if options.train else []
    subprocess.run(
        [
            options.program, *command, "--model", options.model, "--train", str(file), "--out", str(out), "--batch-size", str(batch),
            "--steps", str(steps), "--checkpoint-every", str(steps), "--shuffle", "false", "-q", "--json",
            "--prompt-length", "100", "--prompt-init", "vocab", "--max-target-length", "4", *templates,
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory with a tokenizer")
    parser.add_argument("--train", type=pathlib.Path, help="JSON lines")
    parser.add_argument("--inputs", default="{inputs}", help="template of the input text, with --train")
    parser.add_argument("--targets", default="{targets}", help="template of the target text, with --train")
    parser.add_argument("--batch-size", type=int, default=32, help="a member's, with --train")
    parser.add_argument("--program", default=str(ROOT / "target/release/incipit"))
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of five steps in a run")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    one, five = [], []
    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made)
        file, batch = data(options, directory)
        for repeat in range(options.repeat):
            alone, together = directory / f"one-{repeat}", directory / f"five-{repeat}"
            train(options, ["train"], file, MEMBERS * batch, alone)
            train(options, ["ensemble", "train", "--members", str(MEMBERS)], file, batch, together)
            members = [together / f"member-{i}" / "metrics.jsonl" for i in range(MEMBERS)]
            sent = tokens([alone / "metrics.jsonl"]), tokens(members)
            if sent[0] != sent[1]:
                raise SystemExit(f"the two did not send the same tokens: {sent[0]} and {sent[1]}")
            one.append(seconds(alone / "metrics.jsonl"))
            five.append(seconds(members[0]))
            print(f"1 prompt, batch {MEMBERS * batch}: {one[-1]:.3f} s a step; {MEMBERS} prompts, batch {batch}: {five[-1]:.3f} s", flush=True)
    ratio = statistics.median(five) / statistics.median(one)
    print(f"1 prompt {statistics.median(one):.3f} s, {MEMBERS} prompts {statistics.median(five):.3f} s: {ratio:.3f} x (at most 1.1)")


if __name__ == "__main__":
    main()
