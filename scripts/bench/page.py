"""The Markdown page of a side-by-side run, from its figures."""

import pathlib

NOTES = "## Notes\n"
BARS = {  # run: (largest share of the peer's time, largest share of its memory)
    "C1": (0.40, 0.25),
    "C2": (0.70, 0.50),
    "C3": (0.45, 0.25),
}
WORK = {
    "C1": "T5-base, batch 32, ragged, bf16",
    "C2": "T5-base, batch 8 x 128, bf16",
    "C3": "C1 in f32",
}


def verdict(value: float, bar: float, at_most: bool = True) -> str:
    if (value <= bar) if at_most else (value >= bar):
        return "reached"
    return f"missed by {abs(value / bar - 1):.0%}"


def side_by_side(runs: dict) -> list[str]:
    lines = [
        "| id | work | PyTorch + PEFT | Incipit | time ratio | bar | | peak memory ratio | bar | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (time_bar, memory_bar) in BARS.items():
        run = runs.get(name, {})
        if "peer" not in run or "incipit" not in run:
            continue
        peer, ours = run["peer"], run["incipit"]
        time, memory = ours["median_s"] / peer["median_s"], ours["peak_rss_mb"] / peer["peak_rss_mb"]
        halves = " | ".join(f"{h['median_s']:.3f} s, {h['peak_rss_mb'] / 1024:.2f} GiB" for h in (peer, ours))
        lines.append(
            f"| {name} | {WORK[name]} ({run['input_tokens']:,} input tokens) | {halves} | **{time:.3f}** | {time_bar:.2f} | {verdict(time, time_bar)} "
            f"| **{memory:.3f}** | {memory_bar:.2f} | {verdict(memory, memory_bar)} |"
        )
    return lines if len(lines) > 2 else []


def matrix_share(figures: dict) -> list[str]:
    rate, run = figures.get("matrix_rate"), figures["runs"].get("C1", {})
    if not rate or not run:
        return []
    lines = [
        "| id | useful work of C1's step | rate | share of the best bf16 matrix rate | bar | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for half, label in (("peer", "PyTorch + PEFT"), ("incipit", "Incipit")):
        if half in run:
            reached = run["useful_tflop"] / run[half]["median_s"] * 1000
            share = reached / rate["bf16_gflop_s"]
            bar = f"0.60 | {verdict(share, 0.60, at_most=False)}" if half == "incipit" else " | "
            lines.append(f"| C4 | {run['useful_tflop']:.3f} TFLOP, {label} | {reached:.0f} GFLOP/s | **{share:.3f}** | {bar} |")
    best = f"Best matrix rate of PyTorch (oneDNN): {rate['bf16_gflop_s']:.0f} GFLOP/s in bf16, {rate['f32_gflop_s']:.0f} GFLOP/s in f32."
    return [*lines, "", best]


def many_jobs(runs: dict) -> list[str]:
    one, eight = (runs.get(f"C6 jobs={k}", {}).get("incipit") for k in (1, 8))
    if not one or not eight:
        return []
    ratio = eight["median_s"] / one["median_s"]
    return [
        "| id | 1 job of 32 examples | 8 jobs of 4 examples | ratio | bar | |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| C6 | {one['median_s']:.3f} s | {eight['median_s']:.3f} s | **{ratio:.3f}** | 1.05 | {verdict(ratio, 1.05)} |",
    ]


def growth(runs: dict, series: str) -> list[str]:
    """Time and memory of one series, each against its first run."""
    rows = {name: run for name, run in runs.items() if name.startswith(f"{series} ") and run}
    if not rows:
        return []
    halves = [h for h in ("incipit", "peer") if all(h in run for run in rows.values())]
    titles = {"incipit": "Incipit", "peer": "PyTorch + PEFT"}
    with_attention = all("attention_share" in run.get("incipit", {}) for run in rows.values())
    header = [series, "useful TFLOP"] + [f"{titles[h]}: {x}" for h in halves for x in ("time", "s a TFLOP", "peak memory")]
    header += ["attention's share"] if with_attention else []
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, run in rows.items():
        cells = [name.removeprefix(f"{series} "), f"{run['useful_tflop']:.3f}"]
        for half in halves:
            figures = run[half]
            per_tflop = figures["median_s"] / run["useful_tflop"]
            cells += [f"{figures['median_s']:.3f} s", f"{per_tflop:.3f}", f"{figures['peak_rss_mb'] / 1024:.2f} GiB"]
        cells += [f"{run['incipit']['attention_share']:.1%}"] if with_attention else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(path: pathlib.Path, figures: dict, date: str) -> None:
    runs = figures["runs"]
    parts = [
        f"# Side by side, {date}",
        "Random weights of T5 1.1's shapes, targets of 4 tokens, a prompt of 100 rows unless said otherwise, Adafactor, dropout 0. Each "
        "measurement is a process of its own and the two halves take turns. Times are medians of a step; memory is the highest resident set "
        "of the process. Made by `scripts/bench/side_by_side.py`; the figures themselves lie beside this file as JSON.",
        "\n".join(f"* {key}: {value}" for key, value in figures["machine"].items()),
    ]
    sections = {
        "PyTorch + PEFT and Incipit": side_by_side(runs),
        "Share of the machine's matrix rate": matrix_share(figures),
        "Many jobs on one backbone": many_jobs(runs),
        "Growth with tokens (examples x input length)": growth(runs, "tokens"),
        "Growth with the prompt's length (8 x 128)": growth(runs, "prompt"),
        "Growth with depth (layers of each stack, 8 x 128)": growth(runs, "depth"),
    }
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]
    kept = path.read_text().partition(NOTES)[2] if path.exists() else ""
    path.write_text("\n\n".join(parts) + f"\n\n{NOTES}{kept}")
