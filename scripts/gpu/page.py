#!/usr/bin/env python3
"""The table and the Markdown page of a run of check.sh, from its figures.

    python page.py figures.json > gpu.md     the page again
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

# G1 is to reach this share of the measured matrix rate, G2 so many times the peer's examples a second.
G1_BAR, G2_BAR = 0.55, 2.0
SHOWN = 15


def ours(run: dict, ceilings: dict | None) -> str:
    words = [f"{run['median_s']:.4f} s a step", f"{run['examples'] / run['median_s']:.1f} examples/s", f"{run['launches']} launches"]
    if run.get("device_peak_mb") is not None:
        words.append(f"{run['device_peak_mb'] / 1024:.1f} GiB of the GPU")
    if ceilings:
        floor, limit = max((seconds, name) for name, seconds in floors(run, ceilings).items())
        words += [f"MFU {mfu(run, ceilings):.1%}", f"{run['median_s'] / floor:.2f} x the floor by {limit}"]
    return ", ".join(words)


def peer(both: dict) -> str:
    run = both["peer"]
    words = [f"{run['median_s']:.4f} s a step", f"{run['peak_gpu_mb'] / 1024:.1f} GiB of the GPU"]
    if "ours" in both:
        words.append(f"Incipit makes {run['median_s'] / both['ours']['median_s']:.2f} x its examples/s")
    return ", ".join(words + ["with gradient checkpointing, since it ran out of memory without"] * run["checkpointing"])


def jobs(found: dict) -> str:
    """What a job on a resident backbone takes, beside another one."""
    took = {
        "first step after submitting": "start_s", "pausing": "pause_s", "first step after resuming": "resume_s",
        "first step after the engine was killed": "recover_s", "a step": "step_s",
    }  # fmt: skip
    told = ", ".join(f"{name} {found[key]:.3f} s" for name, key in took.items())
    bytes_of = "the bytes of runs alone" if found["same_bytes"] else "NOT the bytes of runs alone"
    return f"{bytes_of}; {told}, a checkpoint {found['checkpoint_bytes'] / 1024:.0f} KiB"


def mfu(run: dict, ceilings: dict) -> float:
    return run["useful_tflop"] / run["median_s"] / ceilings["tflop_s"]


def floors(run: dict, ceilings: dict) -> dict[str, float]:
    """Seconds that a step takes at least, about: for its useful operations at the measured matrix rate, and to read all weights forward and
    backward, once each, as fast as a copy reads and writes. Of the embedding it reads less."""
    weights = run["parameters"] * (4 if run["dtype"] == "f32" else 2)
    return {"FLOPs": run["useful_tflop"] / ceilings["tflop_s"], "bytes": 2 * weights / 1e9 / ceilings["gb_s"]}


def product(kernel: str) -> tuple[int, int, int, str] | None:
    """Rows, contracted numbers, columns and type of a product, `product ROWS x CONTRACTED x COLUMNS TYPE`."""
    found = re.fullmatch(r"product (\d+) x (\d+) x (\d+) (\w+)", kernel)
    return (int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None


def rate(kernel: dict, ceilings: dict | None, pytorch: dict) -> list[str]:
    """Of a product its TFLOP/s and GB/s, what they are of the ceilings, and PyTorch's TFLOP/s for a product of its size."""
    found = product(kernel["name"])
    if not found:
        return ["", "", ""]
    rows, contracted, columns, dtype = found
    calls, size = kernel["launches"] / kernel["seconds"], 4 if dtype == "F32" else 2
    theirs = pytorch.get(f"{rows} {contracted} {columns}")
    tflop_s = 2 * rows * contracted * columns * calls / 1e12
    gb_s = size * (rows * contracted + contracted * columns + rows * columns) * calls / 1e9
    share = lambda value, name: f" ({value / ceilings[name]:.0%})" if ceilings else ""
    return [f"{tflop_s:.0f}{share(tflop_s, 'tflop_s')}", f"{theirs:.0f}" if theirs else "", f"{gb_s:.0f}{share(gb_s, 'gb_s')}"]


def verdict(value: float, bar: float) -> str:
    return "reached" if value >= bar else f"missed by {1 - value / bar:.0%}"


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{part:{widths[0]}}  {result:{widths[1]}}  {figure}".rstrip() for part, result, figure in [["part", "result", "figure"], *rows]]
    return "\n".join(["", *lines])


def cells(rows: list[list[str]]) -> list[str]:
    clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in clean]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def bars(figures: dict) -> list[str]:
    rows = [["work", "Incipit", "peer", "measure", "bar", ""]]
    for part, both in figures.items():
        if "ours" not in both:
            continue
        run, other = both["ours"], both.get("peer")
        first = [part, f"{run['median_s']:.4f} s", f"{other['median_s']:.4f} s" if other else "not measured"]
        if part.startswith("G1") and "ceilings" in figures:
            share = mfu(run, figures["ceilings"])
            rows.append([*first, f"**{share:.1%}** of the measured matrix rate", f"{G1_BAR:.0%}", verdict(share, G1_BAR)])
        elif part.startswith("G2") and other:
            ratio = other["median_s"] / run["median_s"]
            rows.append([*first, f"**{ratio:.2f}** x the peer's examples/s", f"{G2_BAR:.0f} x", verdict(ratio, G2_BAR)])
        else:
            rows.append([*first, "", "", ""])
    return cells(rows) if len(rows) > 1 else []


def kernels(run: dict, ceilings: dict | None, pytorch: dict) -> list[str]:
    found = run.get("kernels") or []
    total = sum(kernel["seconds"] for kernel in found)
    share = lambda seconds: f"{seconds / total:.1%}"
    groups = {"products": 0.0, "attention": 0.0, "all else": 0.0}
    for kernel in found:
        group = {"product": "products", "attention": "attention", "group": "attention", "absorbed": "attention"}.get(kernel["name"].replace("_", " ").split(" ")[0], "all else")
        groups[group] += kernel["seconds"]
    rows = [["kernel", "launches", "ms", "share", "TFLOP/s", "PyTorch's", "GB/s"]]
    rows += [[k["name"], k["launches"], f"{1e3 * k['seconds']:.3f}", share(k["seconds"]), *rate(k, ceilings, pytorch)] for k in found[:SHOWN]]
    if len(found) > SHOWN:
        rest = found[SHOWN:]
        seconds = sum(k["seconds"] for k in rest)
        rows.append([f"{len(rest)} more", sum(k["launches"] for k in rest), f"{1e3 * seconds:.3f}", share(seconds), "", "", ""])
    words = ", ".join(f"{name} {share(seconds)}" for name, seconds in groups.items())
    if not total:
        return []
    told = [f"In all {1e3 * total:.1f} ms of kernels of ours in a step of {1e3 * run['median_s']:.1f} ms: {words}."]
    if ceilings:
        least = ", ".join(f"{1e3 * seconds:.1f} ms by {name}" for name, seconds in floors(run, ceilings).items())
        told.append(f"The floors of the step: {least}.")
    return [*cells(rows), "", *told]


def markdown(found: dict) -> str:
    figures, machine = found["figures"], found["machine"]
    parts = [
        f"# On a GPU, {machine['date']}",
        "Random weights of T5 1.1's shapes in bf16, 32 examples, targets of 4 tokens, a prompt of 100 rows, Adafactor, dropout 0. G1: inputs of 512 "
        "tokens; G2: ragged ones, the lengths of C1 doubled. Medians of 5 steps after one that is not counted. The peer is PyTorch + "
        "transformers + PEFT, padded to the longest example, on the same GPU. Made by `scripts/gpu/check.sh`.",
        "\n".join(f"* {key}: {value}" for key, value in machine.items() if key != "date"),
    ]
    sections = {"All parts": cells([["part", "result", "figure"], *found["rows"]]), "G1 and G2": bars(figures)}
    for part, both in figures.items():
        if isinstance(both.get("ours"), dict):
            sections[f"Where a step's time goes: {part}"] = kernels(both["ours"], figures.get("ceilings"), figures.get("PyTorch's products", {}).get("tflop_s", {}))
    if "ceilings" in figures:
        measured = figures["ceilings"]
        parts.append(
            f"Measured ceilings: {measured['tflop_s']:.0f} TFLOP/s for a bf16 product of 8192 x 8192 x 8192 on random numbers, {measured['gb_s']:.0f} GB/s "
            "read and written by a copy on the device."
        )
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(json.loads(pathlib.Path(sys.argv[1]).read_text())), end="")
