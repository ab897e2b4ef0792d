#!/usr/bin/env python3
"""The parts of check.sh: runs each, keeps its log, and ends with one table. Standard library alone.

What comes later is what is missed least if time runs out. INCIPIT_CHECK_PARTS picks parts by how their names begin: "NCCL, G1 xxl".
"""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import page
from ran import BEGAN, FOLDER, INCIPIT, OURS, OUT, ROOT, Ran, libraries

# C1's ragged lengths, doubled: the same lognormal, 406 tokens at most.
C1 = "96,82,131,95,64,111,195,158,58,41,61,91,22,78,42,57,64,74,114,167,82,203,60,110,154,94,57,51,68,102,48,79"
RAGGED = ",".join(str(2 * int(length)) for length in C1.split(","))
GIB = 2**30
# Of a shape: bytes that a GPU must have at least. It says a little less than its memory's name.
ROOM = {"xl": 14 * GIB, "xxl": 39 * GIB}
# What the losses of the CPU and of the GPU may differ by after an update: their ratio less 1. In bf16 the paths of a CPU are apart by 5e-4.
SAME_LOSS = {"f32": 1e-3, "bf16": 3e-3}
STEP = ["--prompt-length", "100", "--target-length", "4", "--steps", "5", "--json"]
# So two ranks can share a GPU: to NCCL, which allows a GPU one rank of a machine, they look like those of two machines.
SHARE_A_GPU = {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo", "NCCL_MAX_CTAS": "4", "NCCL_NVLS_ENABLE": "0"}
# Each launch waits, so that an error comes with the name of its kernel.
ONE_BY_ONE = {"CUDA_LAUNCH_BLOCKING": "1"}


class Check:
    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.figures: dict[str, dict] = {}
        self.facts: dict[str, str] = {}
        self.gpu = pathlib.Path("/dev/nvidia0").exists()
        self.memory = 0

    def tell(self, part: str, result: str, figure: str = "") -> None:
        self.rows.append([part, result, figure])
        print(f"{time.monotonic() - BEGAN:6.1f} s  {part}: {result} {figure}", file=sys.stderr, flush=True)

    def do(self, name: str, part: Callable[[str], None]) -> None:
        """A part, whose own mistakes cost no other part. What is known by then is kept, should the whole be broken off."""
        try:
            part(name)
        except Exception as error:  # noqa: BLE001
            self.tell(name, "FAILED", f"{type(error).__name__}: {error}")
        (OUT / "figures.json").write_text(json.dumps(self.found(), indent=1) + "\n")

    def page(self, part: str) -> None:
        (OUT / "gpu.md").write_text(page.markdown(self.found()))

    def found(self) -> dict:
        return {"machine": self.facts, "rows": self.rows, "figures": self.figures}

    def lacks(self, part: str, program: str) -> bool:
        """Tells that a part cannot run, if so."""
        built = (FOLDER / program).exists()
        if not self.gpu:
            self.tell(part, "skipped", "no GPU here")
        elif not built:
            self.tell(part, "FAILED", f"{FOLDER / program} is not there: was the folder carried here that build.sh made?")
        return not (self.gpu and built)

    def machine(self, part: str) -> None:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
        ran = Ran(part, query, 30)
        self.facts |= host()
        found = [line.split(", ") for line in ran.out.splitlines() if line.count(", ") == 2]
        if ran.code == 0 and found:
            self.gpu, self.memory = True, int(float(found[0][2]) * 2**20)
            version = re.search(r"CUDA Version: *([\d.]+)", Ran(part, ["nvidia-smi"], 30).out)
            self.facts |= {"GPU": f"{len(found)} x {found[0][0]}, {self.memory / GIB:.0f} GiB", "driver": found[0][1]}
            self.facts |= {"CUDA of the driver": version.group(1) if version else "not told"}
            names = ("GPU", "driver", "CUDA of the driver", "NCCL")
            self.tell(part, "ok", ", ".join(f"{name} {self.facts[name]}" for name in names))
        else:
            self.tell(part, "FAILED" if self.gpu else "skipped", f"nvidia-smi: {ran.why}" if self.gpu else "no GPU here")

    def doctor(self, part: str) -> None:
        if self.lacks(part, "incipit"):
            return
        ran = Ran(part, [INCIPIT, "doctor"], 60)
        good = ran.code == 0 and re.search(r"ok +.*(GPU|cuda)", ran.out)
        missing = re.search(r"missing +GPU.*", ran.out)
        self.tell(part, "ok" if good else "FAILED", "" if good else missing.group(0) if missing else ran.why)

    def tests(self, part: str, program: str, arguments: list[str], limit: int, settings: dict = OURS) -> Ran | None:
        """The tests of a program that these arguments pick, as one row; how they ran, unless all is well."""
        if self.lacks(part, program):
            return None
        command = [str(FOLDER / program), *arguments, "--nocapture", "--test-threads=1"]
        ran = Ran(part, command, limit, settings, cwd=ROOT / "tests")
        counts = re.search(r"(\d+) passed; (\d+) failed", ran.out)
        # With --nocapture what a test prints stands behind its name.
        skipped = re.search(r"skipped(?: on CUDA)?:.*", ran.out)
        if ran.code == 0 and skipped:
            self.tell(part, "FAILED", f"there is a GPU, but: {skipped.group(0)[:160]}")
        elif ran.code == 0 and counts and int(counts.group(1)):
            self.tell(part, "ok", f"{counts.group(1)} tests")
            return None
        else:
            failed = re.findall(r"^    (\S+)$", ran.out.rpartition("failures:")[2], re.M)
            why = f"{counts.group(0)}: {', '.join(failed)}" if counts and failed else "no test ran" if counts else ran.why
            self.tell(part, "FAILED", why)
        return ran

    def each_test(self, part: str, program: str, limit: int, last: str = "", only: str = "", settings: dict = OURS) -> list[str]:
        """Each test of a program as a row of its own, or those whose names begin so; the one that takes longest last. Those that failed."""
        if self.lacks(part, program):
            return []
        ran = Ran(part, [str(FOLDER / program), "--list"], 30)
        names = [name for name in re.findall(r"^(\S+): test$", ran.out, re.M) if name.startswith(only)]
        if not names:
            self.tell(part, "FAILED", ran.why)
        failed = []
        for name in sorted(names, key=lambda name: (name == last, name)):
            limited = 2 * limit if name == last else limit
            if self.tests(f"{part}: {name.replace('_', ' ')}", program, ["--exact", name], limited, settings):
                failed.append(name)
        return failed

    def kernels(self, part: str) -> None:
        """After a kernel's fault the device is lost to its process, and all tests behind it fail, too: then each runs alone."""
        program, of_gpu = "kernels-tests", "gpu::"
        # At first the driver translates the tensor library's kernels.
        ran = self.tests(part, program, [of_gpu], 150)
        if not ran or not (ran.lost_device() or ran.code == 124):
            return
        failed = self.each_test(part, program, 30, only=of_gpu, settings=OURS | ONE_BY_ONE)
        if failed and shutil.which("compute-sanitizer"):
            name = f"{part}: {failed[0].replace('_', ' ')}, compute-sanitizer"
            ran = Ran(name, ["compute-sanitizer", str(FOLDER / program), "--exact", failed[0], "--nocapture"], 60, cwd=ROOT / "tests")
            found = re.search(r"^=+ (?!COMPUTE-SANITIZER)(\S.*)", ran.out, re.M)
            self.tell(name, "FAILED", found.group(1)[:160] if found else ran.why)

    def widths(self, part: str) -> None:
        """The loss of a step behind an update, which moves it by a tenth: so gradients count too. At widths that a T5 has."""
        if self.lacks(part, "incipit"):
            return
        for dtype, bound in SAME_LOSS.items():
            losses = []
            for device in ("cpu", "cuda"):
                what = ["--shape", "small", "--lengths", "8x128", "--dtype", dtype, "--steps", "1", "--device", device, "--json"]
                ran = self.ours(f"{part}, {dtype}", ["bench", "step", *what], 60, device)
                if found := ran.json():
                    losses.append(found["loss"])
            if len(losses) == 2:
                error = abs(losses[1] / losses[0] - 1)
                figure = f"T5 1.1 small, loss {losses[0]:.6f} on the CPU and {losses[1]:.6f} here, apart by {error:.1e}"
                self.tell(f"{part}, {dtype}", "ok" if error < bound else "FAILED", figure)

    def ranks(self, part: str) -> None:
        """A step of two ranks over NCCL on one GPU, beside one rank's. The CPU's tests say the same of Gloo."""
        if self.lacks(part, "incipit"):
            return
        step = ["--shape", "small", "--lengths", "8x128", "--dtype", "f32", "--steps", "1", "--microbatch-tokens", "2048", "--json"]
        step = ["bench", "step", *step, "--device", "cuda:0"]
        alone = self.ours(part, step, 60, "one rank").json()
        for axis in ("--tp", "--dp") if alone else ():
            name = f"{part}, {axis} 2"
            ran = self.two(name, [*step, axis, "2", "--collective", "nccl"])
            if found := ran.json():
                error = abs(found["loss"] / alone["loss"] - 1)
                self.tell(name, "ok" if error < SAME_LOSS["f32"] else "FAILED", f"loss {found['loss']:.6f}, apart from one rank's by {error:.1e}")
            else:
                self.tell(name, "FAILED", ran.why)

    @staticmethod
    def two(name: str, arguments: list[str]) -> Ran:
        """Two processes that meet by files. That of rank 0, which tells what they have done together."""
        with tempfile.TemporaryDirectory() as store, concurrent.futures.ThreadPoolExecutor() as pool:

            def rank(number: int) -> Ran:
                place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "INCIPIT_STORE": f"file:{store}/ranks"}
                settings = OURS | SHARE_A_GPU | place | {"NCCL_HOSTID": f"rank-{number}"}
                return Ran(f"{name}, rank {number}", [INCIPIT, *arguments], 90, settings)

            return list(pool.map(rank, range(2)))[0]

    def ours(self, part: str, arguments: list[str], limit: int, device: str) -> Ran:
        """Our program. A row tells if it fails, and another one what launches that wait say, if its device fails."""
        command = [INCIPIT, *arguments]
        ran = Ran(part, command, limit)
        if ran.json() is None:
            self.tell(part, "FAILED", f"{device}: {ran.why}")
            if ran.lost_device():
                name = f"{part}, launch by launch"
                alone = Ran(name, command, limit, OURS | ONE_BY_ONE)
                self.tell(name, "FAILED", alone.why if alone.code else "does not fail")
        return ran

    @staticmethod
    def task() -> tuple[str, dict[str, pathlib.Path], list[str], str]:
        """The name of what is learned, its files by flag, flags that say how it is read, and the field of its answers."""
        carried = FOLDER / "carried"
        shared = carried if carried.is_dir() else pathlib.Path(os.environ.get("INCIPIT_SHARED") or ROOT.parent / "shared")
        trec, model = shared / "data" / "trec", shared / "models" / "t5-mini-lm"
        if trec.is_dir() and model.is_dir():
            files = {"--model": model, "--train": trec / "train.jsonl", "--eval": trec / "dev.jsonl"}
            return "trec", files, ["--inputs", "{question}", "--targets", "{label}", "--max-input-length", "128"], "label"
        demo = ROOT / "demo"
        files = {"--model": demo / "model", "--train": demo / "data/train.jsonl", "--eval": demo / "data/eval.jsonl"}
        return "the demo", files, ["--max-input-length", "96"], "targets"

    def train(self, part: str) -> None:
        if self.lacks(part, "incipit"):
            return
        what, files, flags, field = self.task()
        labels = collections.Counter(json.loads(line)[field] for line in files["--eval"].open(encoding="utf-8"))
        majority = max(labels.values()) / sum(labels.values())
        steps = ["--steps", "1000", "--eval-every", "250"] if what == "trec" else ["--steps", "300", "--eval-every", "50"]
        flags = [*flags, *steps, "--prompt-length", "20", "--batch-size", "32", "--lr", "0.3"]
        with tempfile.TemporaryDirectory() as out:
            ran = Ran(part, [INCIPIT, "train", "--device", "cuda", *words(files), "--out", f"{out}/run", *flags, "--json", "--quiet"], 120)
        result = ran.json()
        if result is None:
            self.tell(part, "FAILED", f"{what}: {ran.why}")
            return
        accuracy = result["metrics"]["accuracy"]
        self.figures[part] = {"task": what, "majority": majority} | result
        self.tell(part, "ok" if accuracy > majority else "FAILED", f"{what}: accuracy {accuracy:.1%}, majority {majority:.1%}")

    def jobs(self, part: str) -> None:
        """Jobs over gRPC on a resident backbone: what starting, pausing and losing the engine take, and that bytes stay what they are alone.
        Then on a backbone of two ranks over NCCL, which on one GPU take some ten milliseconds for each sum: a few steps."""
        if self.lacks(part, "incipit"):
            return
        what, files, flags, _ = self.task()
        lifecycle = [sys.executable, "-B", "scripts/bench/lifecycle.py", "--program", INCIPIT, "--device", "cuda", "--limit", "60"]
        of_two = ["--steps", "24", "--tp", "2", "--collective", "nccl"]
        for name, steps, settings in ((part, ["--steps", "2000"], OURS), (f"{part}, --tp 2", of_two, OURS | SHARE_A_GPU)):
            ran = Ran(name, [*lifecycle, *words(files), *flags, *steps], 120, settings)
            found = ran.json()
            if found is None:
                self.tell(name, "FAILED", f"{what}: {ran.why}")
                continue
            self.figures[name] = {"task": what} | found
            self.tell(name, "ok" if found["same_bytes"] else "FAILED", page.jobs(found))

    def ceilings(self, part: str) -> None:
        if not self.gpu or not importlib.util.find_spec("torch"):
            self.tell(part, "skipped", "PyTorch is not here" if self.gpu else "no GPU here")
            return
        ran = Ran(part, [sys.executable, "-c", CEILINGS], 120, settings=None)
        found = ran.json()
        if found:
            self.figures[part] = found
        self.tell(part, "ok" if found else "FAILED", f"{found['tflop_s']:.0f} TFLOP/s, {found['gb_s']:.0f} GB/s" if found else ran.why)

    def products(self, part: str) -> None:
        """PyTorch's rate of the products that take longest in G1's steps, to hold ours against."""
        if not self.gpu or not importlib.util.find_spec("torch"):
            self.tell(part, "skipped", "PyTorch is not here" if self.gpu else "no GPU here")
            return
        runs = [both["ours"] for name, both in self.figures.items() if name.startswith("G1") and "ours" in both]
        found = [page.product(kernel["name"]) for run in runs for kernel in (run.get("kernels") or [])[: page.SHOWN]]
        # A small one takes less time than to start it.
        sizes = [size for size in found if size and size[0] * size[1] * size[2] >= 2**34]
        if not sizes:
            self.tell(part, "skipped", "no step of G1 was made here")
            return
        ran = Ran(part, [sys.executable, "-c", PRODUCTS, json.dumps([size[:3] for size in sizes])], 60, settings=None)
        rates = ran.json()
        if rates:
            self.figures[part] = {"tflop_s": {" ".join(map(str, size[:3])): rate for size, rate in zip(sizes, rates)}}
        self.tell(part, "ok" if rates else "FAILED", f"{len(rates)} sizes, {max(rates):.0f} TFLOP/s at most" if rates else ran.why)

    def step(self, part: str, lengths: str, limit: int) -> None:
        name, shape = part.split(" ")
        if self.lacks(part, "incipit"):
            return
        if self.memory < ROOM[shape]:
            self.tell(part, "skipped", f"needs {ROOM[shape] / GIB:.0f} GiB of the GPU's memory")
            return
        what = ["--device", "cuda", "--shape", shape, "--lengths", lengths, *STEP]
        ran = self.ours(part, ["bench", "step", *what, *(["--profile"] if name == "G1" else [])], limit, "cuda")
        if ours := ran.json():
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
            ran = Ran(name, [sys.executable, "-B", "scripts/bench/peer_step.py", *what, *flags], limit, settings=None)
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


RATE = """
import json, statistics, sys, time, torch
def rate(f, work):
    times = []
    for _ in range(23):
        torch.cuda.synchronize(); start = time.perf_counter(); f(); torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return work / statistics.median(times[3:])
"""
CEILINGS = f"""{RATE}
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
x, y = (torch.randn(1 << 29, device="cuda") for _ in range(2))
print(json.dumps({{"tflop_s": rate(lambda: torch.mm(a, b), 2 * 8192**3) / 1e12, "gb_s": rate(lambda: y.copy_(x), 2 * x.numel() * 4) / 1e9}}))
"""
PRODUCTS = f"""{RATE}
def product(rows, contracted, columns):
    a, w = (torch.randn(n, contracted, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
    return rate(lambda: torch.mm(a, w.t()), 2 * rows * contracted * columns) / 1e12
print(json.dumps([product(*size) for size in json.loads(sys.argv[1])]))
"""


def words(files: dict[str, pathlib.Path]) -> list[str]:
    return [str(word) for pair in files.items() for word in pair]


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
    carried = FOLDER / "commit"
    commit = carried.read_text().strip() if carried.exists() else Ran("machine", ["git", "rev-parse", "--short", "HEAD"], 10).out.strip()
    version = Ran("machine", [INCIPIT, "--version"], 10).out.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "NCCL": nccl_version(),
        "host": f"{cpu.group(1) if cpu else 'unknown'}, {os.cpu_count()} cores, {host_memory() / GIB:.0f} GiB",
        "system": f"{release.group(1) if release else 'unknown'}, Linux {os.uname().release}",
        "Python": ", ".join([sys.version.split()[0], *packages]),
        "incipit": f"{version or 'does not start'}, commit {commit or 'not known here'}",
    }


def hold_driver() -> None:
    """While nobody has the driver open, each program would wait until it has made the GPU ready anew."""
    try:
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    except (OSError, AttributeError):
        pass


def parts(check: Check) -> dict[str, Callable[[str], None]]:
    # Of the checks over NCCL, one waits for a rank that never comes: it takes most of the time.
    long = "every_check_holds_between_processes_that_share_a_gpu"
    return {
        "machine": check.machine,
        "doctor": check.doctor,
        "kernels against the CPU": check.kernels,
        "model": lambda part: check.each_test(part, "model-tests", 60),
        "losses at real widths": check.widths,
        "ceilings": check.ceilings,
        "G1 xl": lambda part: check.step(part, "32x512", 90),
        "G2 xl": lambda part: check.step(part, RAGGED, 90),
        "G1 xxl": lambda part: check.step(part, "32x512", 150),
        "PyTorch's products": check.products,
        "training": check.train,
        "jobs on a backbone": check.jobs,
        "NCCL": lambda part: check.each_test(part, "nccl-tests", 120, last=long),
        "ranks over NCCL": check.ranks,
        "G2 xxl": lambda part: check.step(part, RAGGED, 120),
    }


def chosen(names: Iterable[str]) -> set[str]:
    """Those that INCIPIT_CHECK_PARTS asks for, and always the first: it says where this was."""
    wanted = [word.strip().lower() for word in os.environ.get("INCIPIT_CHECK_PARTS", "").split(",") if word.strip()]
    names = list(names)
    for word in wanted:
        if not any(name.lower().startswith(word) for name in names):
            sys.exit(f"check: no part begins with {word!r}; there are: {', '.join(names)}")
    return {name for name in names if not wanted or name == names[0] or name.lower().startswith(tuple(wanted))}


def main() -> int:
    check = Check()
    every = parts(check)
    wanted = chosen(every)
    (OUT / "check.log").write_text("")
    hold_driver()
    for name, part in every.items():
        if name in wanted:
            check.do(name, part)
    check.do("page", check.page)
    print(page.table(check.rows))
    return 1 if any(result == "FAILED" for _, result, _ in check.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
