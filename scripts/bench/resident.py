"""C6 on a resident backbone: 8 jobs with 4 examples a step each, against 1 job with the same 32.

    ../make-random-checkpoint --shape base --dtype bf16 /tmp/t5-base
    python resident.py --model /tmp/t5-base

Needs a built program and nothing from PyPI. The two take turns on one backbone of one `incipit up`; a figure is the median over the
repeats of the median time from one step to the next. Run it on a machine that does nothing else.
"""

import argparse
import datetime
import json
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTHS = [
    96, 82, 131, 95, 64, 111, 195, 158, 58, 41, 61, 91, 22, 78, 42, 57, 64, 74, 114, 167, 82, 203, 60, 110, 154, 94, 57, 51, 68, 102, 48, 79,
]  # fmt: skip


class Cluster:
    """One `incipit up` with one backbone."""

    def __init__(self, program: str, model: str, directory: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.program, self.url = program, f"http://{address}"
        command = [program, "up", "--data", str(directory / "up"), "--listen", address, "--model", model, "--slots", "1", "-q"]
        self.process = subprocess.Popen(command)
        while not self.ready():
            if self.process.poll() is not None:
                raise SystemExit("incipit up has ended")
            time.sleep(0.5)

    def ask(self, *arguments: str) -> list[dict]:
        """What a command prints as JSON, a document a line or one over all lines."""
        command = [self.program, *arguments, "--coordinator", self.url, "--json"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        decoder, place, found = json.JSONDecoder(), 0, []
        while place < len(text):
            document, place = decoder.raw_decode(text, place)
            found.append(document)
            place += len(text[place:]) - len(text[place:].lstrip())
        return found

    def ready(self) -> bool:
        try:
            return "READY" in json.dumps(self.ask("backbone", "list"))
        except subprocess.CalledProcessError:
            return False

    def train(self, names: list[str], files: list[pathlib.Path], steps: int) -> float:
        """Seconds from one step of the first job to its next, in the median, while all of them train."""
        for name, file in zip(names, files):
            batch = len(file.read_text().splitlines())
            self.ask(
                "job", "submit", "--train", str(file), "--name", name, "--steps", str(steps), "--batch-size", str(batch),
                "--shuffle", "false", "--checkpoint-every", str(10 * steps), "--prompt-length", "100", "--max-target-length", "4",
            )  # fmt: skip
        times = [self.times(name) for name in names]
        first = max(series[0] for series in times)  # From here on all of them train, until the first has ended.
        last = min(series[-1] for series in times)
        gaps = [b - a for series in times[:1] for a, b in zip(series, series[1:]) if a >= first and b <= last]
        return statistics.median(gaps)

    def times(self, name: str) -> list[float]:
        """When each step of a job was measured."""
        found = []
        for document in self.ask("job", "watch", name):
            point = document.get("point", {})
            if "training" in point:
                moment, _, fraction = point["time"].removesuffix("+00:00").partition(".")
                whole = datetime.datetime.fromisoformat(moment).replace(tzinfo=datetime.timezone.utc)
                found.append(whole.timestamp() + float(f"0.{fraction or 0}"))
        return found


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
        cluster = Cluster(options.program, options.model, directory)
        try:
            one, eight = [], []
            for repeat in range(options.repeat):
                one.append(cluster.train([f"one-{repeat}"], [whole], options.steps))
                eight.append(cluster.train([f"part-{repeat}-{i}" for i in range(8)], parts, options.steps))
                print(f"1 job: {one[-1]:.3f} s a step; 8 jobs: {eight[-1]:.3f} s", flush=True)
        finally:
            cluster.process.terminate()
            cluster.process.wait()
    ratio = statistics.median(eight) / statistics.median(one)
    print(f"1 job {statistics.median(one):.3f} s, 8 jobs {statistics.median(eight):.3f} s: {ratio:.3f} x (C6: at most 1.05)")


if __name__ == "__main__":
    main()
