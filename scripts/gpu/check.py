#!/usr/bin/env python3
"""The parts of check.sh: runs each, keeps its log, and ends with one table. Standard library alone."""

import collections
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import page

FOLDER, OUT = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ROOT = pathlib.Path(__file__).resolve().parents[2]
INCIPIT = str(FOLDER / "incipit")
BEGAN = time.monotonic()
LIMIT = float(os.environ.get("INCIPIT_CHECK_SECONDS", 540))
# C1's ragged lengths, doubled: the same lognormal, 406 tokens at most.
C1 = "96,82,131,95,64,111,195,158,58,41,61,91,22,78,42,57,64,74,114,167,82,203,60,110,154,94,57,51,68,102,48,79"
RAGGED = ",".join(str(2 * int(length)) for length in C1.split(","))
GIB = 2**30
# Of a shape: bytes that host and GPU must have at least. A machine says a little less than its memory's name.
ROOM = {"xl": (14 * GIB, 14 * GIB), "xxl": (60 * GIB, 39 * GIB)}
STEP = ["--prompt-length", "100", "--target-length", "4", "--steps", "5", "--json"]


def libraries() -> str:
    """Where CUDA's libraries are: of an installed toolkit, and those that PyTorch brought. The stand-in for a driver must not be there."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [pathlib.Path(home) / "lib64" for home in homes if home]
    places += [lib for root in sys.path if root for lib in sorted(pathlib.Path(root).glob("nvidia/*/lib"))]
    given = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    found = [str(place) for place in places if place.is_dir()] + [place for place in given if place]
    return ":".join(place for place in found if "stand-in" not in place)


# For our programs alone: PyTorch finds its own.
OURS = os.environ | {"LD_LIBRARY_PATH": libraries(), "CARGO_MANIFEST_DIR": str(ROOT / "tests")}


class Ran:
    """A command that has ended, perhaps by its time limit. It is killed with all processes that it started."""

    def __init__(self, part: str, command: list[str], limit: float, ours: bool = True, cwd: pathlib.Path = ROOT) -> None:
        left = LIMIT - (time.monotonic() - BEGAN)
        self.out = self.err = self.why = ""
        self.code, limit, start = 125, min(limit, left), time.monotonic()
        if left < 5:
            self.why = "no time was left"
            return
        with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
            try:
                process = subprocess.Popen(
                    command, cwd=cwd, env=OURS if ours else None, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )  # fmt: skip
                try:
                    self.code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    self.code, self.why = 124, f"not done within {limit:.0f} s"
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            except OSError as error:
                self.code, self.why = 127, str(error)
            for file, name in ((out, "out"), (err, "err")):
                file.seek(0)
                setattr(self, name, file.read())
        lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"error|.*Error\b|.*error while loading", line)] or lines
        self.why = self.why or (f"code {self.code}: {told[-1][:160]}" if told and self.code else f"code {self.code}")
        with (OUT / "check.log").open("a") as log:
            words = " ".join(word if len(word) < 300 else "..." for word in command)
            log.write(f"\n===== {part}: {words}\n===== {time.monotonic() - start:.1f} s, code {self.code}\n{self.out}\n----- stderr\n{self.err}\n")

    def json(self) -> dict | None:
        """What it printed, if it ended well."""
        try:
            return json.loads(self.out) if self.code == 0 else None
        except ValueError:
            self.why = "what it printed is no JSON"
            return None


class Check:
    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.figures: dict[str, dict] = {}
        self.gpu = pathlib.Path("/dev/nvidia0").exists()
        self.memory = 0

    def tell(self, part: str, result: str, figure: str = "") -> None:
        self.rows.append([part, result, figure])
        print(f"{time.monotonic() - BEGAN:6.1f} s  {part}: {result} {figure}", file=sys.stderr, flush=True)

    def lacks(self, part: str, program: str) -> bool:
        """Tells that a part cannot run, if so."""
        why = "no GPU here" if not self.gpu else f"{FOLDER / program} is not built" if not (FOLDER / program).exists() else ""
        if why:
            self.tell(part, "skipped", why)
        return bool(why)

    def machine(self) -> dict:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
        ran = Ran("machine", query, 30)
        facts = host()
        found = [line.split(", ") for line in ran.out.splitlines() if line.count(", ") == 2]
        if ran.code == 0 and found:
            self.gpu, self.memory = True, int(float(found[0][2]) * 2**20)
            version = re.search(r"CUDA Version: *([\d.]+)", Ran("machine", ["nvidia-smi"], 30).out)
            facts |= {"GPU": f"{len(found)} x {found[0][0]}, {self.memory / GIB:.0f} GiB", "driver": found[0][1]}
            facts |= {"CUDA of the driver": version.group(1) if version else "not told"}
            self.tell("machine", "ok", f"{facts['GPU']}, driver {found[0][1]}, CUDA {facts['CUDA of the driver']}, NCCL {facts['NCCL']}")
        else:
            self.tell("machine", "FAILED" if self.gpu else "skipped", f"nvidia-smi: {ran.why}" if self.gpu else "no GPU here")
        if not self.lacks("doctor", "incipit"):
            ran = Ran("doctor", [INCIPIT, "doctor"], 60)
            good = ran.code == 0 and re.search(r"ok +.*(GPU|cuda)", ran.out)
            found = [line.strip() for line in ran.out.splitlines() if re.search("GPU|cuda", line)]
            self.tell("doctor", "ok" if good else "FAILED", "" if good else found[-1] if ran.code == 0 and found else ran.why)
        return facts

    def tests(self, part: str, program: str, arguments: list[str], limit: int) -> None:
        if self.lacks(part, program):
            return
        ran = Ran(part, [str(FOLDER / program), *arguments, "--nocapture", "--test-threads=1"], limit, cwd=ROOT / "tests")
        counts = re.search(r"(\d+) passed; (\d+) failed", ran.out)
        # With --nocapture what a test prints stands behind its name.
        skipped = re.search(r"skipped(?: on CUDA)?:.*", ran.out)
        if ran.code == 0 and skipped:
            self.tell(part, "skipped", skipped.group(0)[:160])
        elif ran.code == 0 and counts and int(counts.group(1)):
            self.tell(part, "ok", f"{counts.group(1)} tests")
        else:
            failed = re.findall(r"^    (\S+)$", ran.out.rpartition("failures:")[2], re.M)
            why = f"{counts.group(0)}: {', '.join(failed)}" if counts and failed else "no test ran" if counts else ran.why
            self.tell(part, "FAILED", why)

    def train(self) -> None:
        if self.lacks("training", "incipit"):
            return
        shared = pathlib.Path(os.environ.get("INCIPIT_SHARED") or ROOT.parent / "shared")
        trec, model = shared / "data" / "trec", shared / "models" / "t5-mini-lm"
        flags = ["--prompt-length", "20", "--batch-size", "32", "--lr", "0.3"]
        if trec.is_dir() and model.is_dir():
            what, data, evaluation, field = "trec", trec / "train.jsonl", trec / "dev.jsonl", "label"
            flags += ["--inputs", "{question}", "--targets", "{label}", "--steps", "1000", "--eval-every", "250", "--max-input-length", "128"]
        else:
            what, model, data, evaluation = "the demo", *(ROOT / "demo" / part for part in ("model", "data/train.jsonl", "data/eval.jsonl"))
            field = "targets"
            flags += ["--steps", "300", "--eval-every", "50", "--max-input-length", "96", "--max-target-length", "8"]
        labels = collections.Counter(json.loads(line)[field] for line in evaluation.open(encoding="utf-8"))
        majority = max(labels.values()) / sum(labels.values())
        with tempfile.TemporaryDirectory() as out:
            files = ["--model", model, "--train", data, "--eval", evaluation, "--out", pathlib.Path(out) / "run"]
            ran = Ran("training", [INCIPIT, "train", "--device", "cuda", *map(str, files), *flags, "--json", "--quiet"], 120)
        result = ran.json()
        if result is None:
            self.tell("training", "FAILED", f"{what}: {ran.why}")
            return
        accuracy = result["metrics"]["accuracy"]
        self.figures["training"] = {"task": what, "majority": majority} | result
        self.tell("training", "ok" if accuracy > majority else "FAILED", f"{what}: accuracy {accuracy:.1%}, majority {majority:.1%}")

    def ceilings(self) -> None:
        if not self.gpu or not importlib.util.find_spec("torch"):
            self.tell("ceilings", "skipped", "PyTorch is not here" if self.gpu else "no GPU here")
            return
        ran = Ran("ceilings", [sys.executable, "-c", CEILINGS], 60, ours=False)
        found = ran.json()
        if found:
            self.figures["ceilings"] = found
        self.tell("ceilings", "ok" if found else "FAILED", f"{found['tflop_s']:.0f} TFLOP/s, {found['gb_s']:.0f} GB/s" if found else ran.why)

    def step(self, name: str, shape: str, lengths: str, limit: int) -> None:
        part, room = f"{name} {shape}", ROOM[shape]
        if self.lacks(part, "incipit"):
            return
        if host_memory() < room[0] or self.memory < room[1]:
            self.tell(part, "skipped", f"needs {room[0] / GIB:.0f} GiB of main memory and {room[1] / GIB:.0f} of the GPU's")
            return
        what = ["--device", "cuda", "--shape", shape, "--lengths", lengths, *STEP]
        ran = Ran(part, [INCIPIT, "bench", "step", *what, *(["--profile"] if name == "G1" else [])], limit)
        ours = ran.json()
        if ours is None:
            self.tell(part, "FAILED", ran.why)
        else:
            self.figures[part] = {"ours": ours}
            self.tell(part, "ok", page.ours(ours, self.figures.get("ceilings")))
        self.peer(part, what, limit)

    def peer(self, part: str, what: list[str], limit: int) -> None:
        name = f"{part}, peer"
        missing = [name for name in ("torch", "transformers", "peft") if not importlib.util.find_spec(name)]
        if missing:
            self.tell(name, "skipped", f"not here: {', '.join(missing)}")
            return
        for flags in ([], ["--checkpointing"]):
            ran = Ran(name, [sys.executable, "-B", "scripts/bench/peer_step.py", *what, *flags], limit, ours=False)
            if theirs := ran.json():
                theirs["checkpointing"] = bool(flags)
                both = self.figures.setdefault(part, {})
                both["peer"] = theirs
                self.tell(name, "ok", page.peer(both))
                return
            if "OutOfMemory" not in ran.err:
                self.tell(name, "FAILED", ran.why)
                return
        self.tell(name, "skipped", "the peer runs out of memory, with checkpointing too")


CEILINGS = """
import json, statistics, time, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
x, y = (torch.randn(1 << 29, device="cuda") for _ in range(2))
def rate(f, work):
    times = []
    for _ in range(23):
        torch.cuda.synchronize(); start = time.perf_counter(); f(); torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return work / statistics.median(times[3:])
print(json.dumps({"tflop_s": rate(lambda: torch.mm(a, b), 2 * 8192**3) / 1e12, "gb_s": rate(lambda: y.copy_(x), 2 * x.numel() * 4) / 1e9}))
"""


def host_memory() -> int:
    total = re.search(r"MemTotal: +(\d+)", pathlib.Path("/proc/meminfo").read_text())
    return int(total.group(1)) * 1024 if total else 0


def nccl_version() -> str:
    """Of the library that our programs will load."""
    for place in libraries().split(":") + [""]:
        try:
            number = ctypes.c_int()
            ctypes.CDLL(os.path.join(place, "libnccl.so.2")).ncclGetVersion(ctypes.byref(number))
            return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"
        except OSError:
            continue
    return "not found"


def host() -> dict:
    """What is known of the machine without its GPU."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    release = re.search(r'PRETTY_NAME="?([^"\n]*)', pathlib.Path("/etc/os-release").read_text())
    packages = []
    for name in ("torch", "transformers", "peft"):
        try:
            packages.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = Ran("machine", ["git", "rev-parse", "--short", "HEAD"], 10).out.strip()
    version = Ran("machine", [INCIPIT, "--version"], 10).out.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "NCCL": nccl_version(),
        "host": f"{cpu.group(1) if cpu else 'unknown'}, {os.cpu_count()} cores, {host_memory() / GIB:.0f} GiB",
        "system": f"{release.group(1) if release else 'unknown'}, Linux {os.uname().release}",
        "Python": ", ".join([sys.version.split()[0], *packages]),
        "incipit": f"{version or 'does not start'}, commit {commit or 'not known here'}",
    }


def main() -> int:
    (OUT / "check.log").write_text("")
    check = Check()
    facts = check.machine()
    check.tests("kernels against the CPU", "kernels-tests", ["gpu::"], 90)
    check.tests("model against transformers and the CPU, isolation, same bits", "model-tests", [], 90)
    check.tests("NCCL, 2 ranks on one GPU", "nccl-tests", [], 120)
    check.train()
    check.ceilings()
    for name, shape, lengths, limit in [("G1", "xl", "32x512", 90), ("G2", "xl", RAGGED, 90), ("G1", "xxl", "32x512", 150), ("G2", "xxl", RAGGED, 120)]:
        check.step(name, shape, lengths, limit)
    found = {"machine": facts, "rows": check.rows, "figures": check.figures}
    (OUT / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "gpu.md").write_text(page.markdown(found))
    print(page.table(check.rows))
    return 1 if any(result == "FAILED" for _, result, _ in check.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
