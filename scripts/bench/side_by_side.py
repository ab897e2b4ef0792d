#!/usr/bin/env python3
"""PyTorch + PEFT and Incipit in turn on this machine, and a Markdown page with the ratios.

    cargo build --release
    python side_by_side.py                       # everything: about an hour on two cores
    python side_by_side.py --only C1 --repeat 3  # one part: C1, C2, C3, C4, C6, tokens, prompt, depth
    python side_by_side.py --render              # the page again from the figures kept beside it

Each measurement is a process of its own; the two halves take turns; a figure is the median over the repeats of the processes' medians.
Figures are kept in docs/benchmarks/side-by-side-<date>.json, so that parts run alone add to the same page. What stands in the page after the
line `## Notes` is left alone. A machine that does something else at the time spoils the figures: the load before the run is noted.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import page
import workload

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
C1_LENGTHS = (
    "96,82,131,95,64,111,195,158,58,41,61,91,22,78,42,57,64,74,114,167,82,203,60,110,154,94,57,51,68,102,48,79"
)
BASE = {"shape": "base", "dtype": "bf16"}
PARTS = {  # part: its runs; "peer" says whether PyTorch runs it too
    "C1": {"C1": BASE | {"lengths": C1_LENGTHS, "peer": True}},
    "C2": {"C2": BASE | {"lengths": "8x128", "peer": True}},
    "C3": {"C3": {"shape": "base", "dtype": "f32", "lengths": C1_LENGTHS, "peer": True}},
    "C4": {},  # C1's useful work by the matrix rate that this part measures
    "C6": {f"C6 jobs={jobs}": BASE | {"lengths": C1_LENGTHS, "jobs": jobs} for jobs in (1, 8)},
    "tokens": {
        f"tokens {lengths}": BASE | {"lengths": lengths, "growth": True}
        for lengths in ("8x64", "8x128", "16x128", "32x128", "8x256", "8x512")
    },
    "prompt": {
        f"prompt {p}": BASE | {"lengths": "8x128", "prompt_length": p, "growth": True} for p in (1, 20, 100, 150)
    },
    "depth": {f"depth {n}": BASE | {"lengths": "8x128", "layers": n, "growth": True} for n in (3, 6, 12, 24)},
}  # fmt: skip


def command_options(run: dict, steps: int, directory: str) -> list[str]:
    """The flags that both halves share."""
    shape = run["shape"]
    if "layers" in run:  # a model directory of which only config.json is read
        config = workload.shape_config(shape) | {"num_layers": run["layers"], "num_decoder_layers": run["layers"]}
        shape = f"{directory}/{run['layers']}-layers"
        pathlib.Path(shape).mkdir(exist_ok=True)
        (pathlib.Path(shape) / "config.json").write_text(json.dumps(config))
    return [
        "--shape", shape, "--lengths", run["lengths"], "--target-length", "4", "--prompt-length", str(run.get("prompt_length", 100)),
        "--dtype", run["dtype"], "--steps", str(steps), "--json",
    ]  # fmt: skip


def measure(command: list[str], threads: int) -> dict:
    """Runs a half in a fresh process; its peak memory is what the kernel counted."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors.read()[-3000:]}")
        result = json.loads(out.read())
    return result | {"peak_rss_mb": usage.ru_maxrss / 1024}


def median_of(results: list[dict]) -> dict:
    keys = [k for k, v in results[0].items() if isinstance(v, (int, float))]
    return {k: statistics.median(r[k] for r in results) for k in keys} | {"medians_s": [r["median_s"] for r in results]}


def run_in_turn(name: str, run: dict, args: argparse.Namespace) -> dict:
    """Peer, ours, peer, ours, ...; and the useful work of a step, by one formula for both."""
    with tempfile.TemporaryDirectory() as directory:
        options = command_options(run, args.steps, directory)
        ours = [str(args.incipit), "bench", "step", *options, "--threads", str(args.threads)]
        ours += ["--jobs", str(run["jobs"])] if "jobs" in run else []
        peer = [sys.executable, str(HERE / "peer_step.py"), *options, "--threads", str(args.threads)]
        halves = {"peer": peer, "incipit": ours}
        if not (run.get("peer") or (run.get("growth") and args.growth_peer)) or args.half == "incipit":
            del halves["peer"]
        if args.half == "peer":
            del halves["incipit"]
        results = {half: [] for half in halves}
        for repeat in range(1 if run.get("growth") else args.repeat):
            for half, command in halves.items():
                results[half].append(measure(command, args.threads))
                median = results[half][-1]["median_s"]
                print(f"{name}, {half}, run {repeat + 1}: {median:.3f} s a step", file=sys.stderr, flush=True)
        config, lengths = workload.shape_config(options[1]), workload.parse_lengths(run["lengths"])
        tflop = workload.useful_tflop(config, lengths, run.get("prompt_length", 100), 4)
    return {half: median_of(values) for half, values in results.items()} | {"input_tokens": sum(lengths), "useful_tflop": tflop}


def matrix_rate(args: argparse.Namespace) -> dict:
    command = [sys.executable, str(HERE / "matrix_rate.py"), "--threads", str(args.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine(args: argparse.Namespace) -> dict:
    text = subprocess.run(["lscpu"], check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}).stdout
    cpu = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = cpu.get("Flags", "").split()
    memory = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    release = pathlib.Path("/etc/os-release").read_text().splitlines()
    system = dict(line.split("=", 1) for line in release if "=" in line)
    version = subprocess.run([str(args.incipit), "--version"], capture_output=True, text=True).stdout if args.incipit.exists() else ""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    rust = subprocess.run(["rustc", "--version"], capture_output=True, text=True, cwd=ROOT).stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "processor": cpu["Model name"].strip() + f" (family {cpu['CPU family'].strip()}, model {cpu['Model'].strip()})",
        "cores": f"{os.cpu_count()}; {args.threads} threads used by either half",
        "caches": ", ".join(f"{k.removesuffix(' cache')} {v.strip()}" for k, v in cpu.items() if k.endswith(" cache")),
        "instructions": ", ".join(f for f in flags if f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni")),
        "memory": f"{int(memory.split()[1]) / 2**20:.1f} GiB",
        "system": f"{system['PRETTY_NAME'].strip(chr(34))}, Linux {os.uname().release}",
        "peer": f"Python {sys.version.split()[0]}, {packages}",
        "incipit": f"{version.strip() or 'not built'}, commit {commit.stdout.strip() or 'none'}, {rust.strip()}",
        "load before the run": f"{os.getloadavg()[0]:.2f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--repeat", type=int, default=3, help="processes of each half; growth series take one")
    parser.add_argument("--steps", type=int, default=5, help="counted steps in a process, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--half", choices=["both", "peer", "incipit"], default="both")
    parser.add_argument("--growth-peer", action="store_true", help="run the growth series on PyTorch too")
    parser.add_argument("--incipit", type=pathlib.Path, default=ROOT / "target" / "release" / "incipit")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--render", action="store_true", help="only write the page again")
    args = parser.parse_args()
    if args.half != "peer" and not args.render and not args.incipit.exists():
        sys.exit(f"{args.incipit} does not exist: run `cargo build --release`, or name it by --incipit")
    figures_file = args.out / f"side-by-side-{args.date}.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {"runs": {}}
    if not args.render:
        figures["machine"] = machine(args)
        args.out.mkdir(parents=True, exist_ok=True)
    for part in [] if args.render else args.only:
        if part == "C4":
            figures["matrix_rate"] = matrix_rate(args)
        for name, run in PARTS[part].items():
            figures["runs"][name] = figures["runs"].get(name, {}) | run_in_turn(name, run, args)
            figures_file.write_text(json.dumps(figures, indent=1) + "\n")
        figures_file.write_text(json.dumps(figures, indent=1) + "\n")
    page_file = args.out / f"side-by-side-{args.date}.md"
    page.write(page_file, figures, args.date)
    print(page_file.read_text())


if __name__ == "__main__":
    main()
