#!/usr/bin/env python3
"""What ranks say to each other in a training step: calls, messages, bytes, and the time that links of given speed would take.

    python cost_model.py                                   # the tables of docs/cost-model.md
    python cost_model.py --update                          # the same, into the page, between its <!-- table --> marks
    python cost_model.py --measured local.json gloo.json   # JSON of `incipit bench collective`: the model beside the machine

The tensor axis, for Le encoder and Ld decoder layers of width D, a microbatch of T encoder and Td target rows, and r = 1 with recomputation,
else 0 (crates/model/tests/messages.rs holds the same formulas against a run):

    all-reduces  (4 + r) Le + 2  of [T, D]
                 (6 + 2r) Ld - 1 of [Td, D]
                 for every 256 target rows or fewer, t of them: a maximum of t, sums of 2t and of [t, D]
    numbers      ((4 + r) Le + 2) T D + (6 + 2r) Ld Td D + 3 Td

The data axis, for K jobs of N examples with prompts [P, D]: a maximum of 2 K N and a sum of K P D numbers of 8 bytes (crates/tune/src/engine/sum.rs).
"""

import argparse
import collections
import json
import math
import pathlib
import statistics

import workload
from side_by_side import C1_LENGTHS

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "cost-model.md"
HEAD_ROWS = 256  # crates/model/src/t5.rs
INLINE = 1024  # crates/collective/src/wire.rs: bytes that travel within a frame,
FRAME = 96 + INLINE  # and the length of every frame
MICROBATCH_TOKENS = 2048  # crates/tune/src/microbatch.rs: the most of the automatic budget
PROMPT, TARGET = 100, 4  # rows of a prompt; tokens of a target
F32, BF16, I64 = 4, 2, 8

MATRIX_RATE = 0.55 * 989e12  # of an H100 SXM: published peak of dense bf16, and the share of it that is assumed
MEMORY_RATE = 3.35e12  # published peak of its memory
BATCHES = {"full": [512] * 32, "small": [64] * 2}

Call = collections.namedtuple("Call", "times numbers width")
Traffic = collections.namedtuple("Traffic", "calls exchanges messages bytes")  # messages and bytes are those that one rank sends
# Bytes a second one way; seconds of an exchange between two ranks; seconds for each further message that a rank sends in it.
Link = collections.namedtuple("Link", "name rate latency further")
LINKS = [
    Link("NVLink 4", 370e9, 5e-6, 0.5e-6),
    Link("InfiniBand NDR", 0.8 * 50e9, 8e-6, 0.5e-6),
    Link("Ethernet 100 Gb/s", 0.8 * 12.5e9, 30e-6, 5e-6),
    Link("Ethernet 10 Gb/s", 0.8 * 1.25e9, 50e-6, 5e-6),
]


def share(lengths: list[int], index: int, count: int) -> list[int]:
    """The examples of one replica, as crates/tune/src/microbatch.rs deals them: the longest first, each to the emptiest."""
    tokens, shares = [0] * count, [[] for _ in range(count)]
    for length in sorted(lengths, reverse=True):
        fewest = tokens.index(min(tokens))
        tokens[fewest] += PROMPT + length + TARGET
        shares[fewest].append(length)
    return shares[index]


def cut(costs: list[int], budget: int) -> list[list[int]]:
    """Examples into microbatches, as crates/tune/src/microbatch.rs does it."""
    even = math.ceil(sum(costs) / max(1, math.ceil(sum(costs) / budget)))
    runs, run, before = [], [], 0
    for cost in costs:
        if run and (sum(run) + cost > budget or before >= even * (len(runs) + 1)):
            runs.append(run)
            run = []
        run.append(cost)
        before += cost
    return [*runs, run] if run else runs


def tensor_axis(config: dict, lengths: list[int], recompute: bool = False, width: int = F32) -> list[Call]:
    """The calls of a rank that shares the model, for these examples of one replica. The softmax's numbers stay f32."""
    d, r = config["d_model"], int(recompute)
    depth, decoder_depth = config["num_layers"], config.get("num_decoder_layers") or config["num_layers"]
    calls = []
    for run in cut([PROMPT + length + TARGET for length in lengths], MICROBATCH_TOKENS):
        targets = TARGET * len(run)
        calls.append(Call((4 + r) * depth + 2, (sum(run) - targets) * d, width))
        calls.append(Call((6 + 2 * r) * decoder_depth - 1, targets * d, width))
        for first in range(0, targets, HEAD_ROWS):
            t = min(HEAD_ROWS, targets - first)
            calls += [Call(1, t, F32), Call(1, 2 * t, F32), Call(1, t * d, width)]
    return calls


def data_axis(config: dict, examples: int, jobs: int = 1) -> list[Call]:
    """The calls of a rank for `jobs` jobs of `examples` examples each; and, of all ranks, whether anybody wants to stop."""
    return [Call(1, 2 * examples * jobs, I64), Call(1, jobs * PROMPT * config["d_model"], I64), Call(1, 1, I64)]


def traffic(calls: list[Call], ranks: int) -> Traffic:
    """What a rank sends: a small all-reduce is one exchange of frames, a large one adds an exchange of parts and one of sums."""
    if ranks == 1:
        return Traffic(0, 0, 0, 0)
    others, exchanges, sent = ranks - 1, 0, 0
    for times, numbers, width in calls:
        exchanges += times
        sent += times * others * FRAME
        if numbers * width > INLINE:
            exchanges += 2 * times
            sent += 2 * times * others * math.ceil(numbers / ranks) * width
    return Traffic(sum(c.times for c in calls), exchanges, exchanges * others, sent)


def seconds(sent: Traffic, ranks: int, link: Link) -> float:
    """The exchanges one after the other, and the bytes by the link's rate."""
    return sent.exchanges * (link.latency + max(0, ranks - 2) * link.further) + sent.bytes / link.rate


def compute_seconds(config: dict, lengths: list[int], tp: int) -> float:
    """Useful work by the matrix rate; at least what reading the weights takes, once forward and once backward a microbatch."""
    work = 1e12 * workload.useful_tflop(config, lengths, PROMPT, TARGET)
    microbatches = len(cut([PROMPT + length + TARGET for length in lengths], MICROBATCH_TOKENS))
    # One encoder token and one decoder token pass every weight once, but for the embedding's.
    weights = 1e12 / 4 * workload.useful_tflop(config, [1], 0, 1)
    return max(work / MATRIX_RATE, microbatches * 2 * BF16 * weights / MEMORY_RATE) / tp


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def time(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1e3 * s:.3g} ms" if s >= 1e-3 else f"{1e6 * s:.3g} µs"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) + " |" for row in lines)


def of_step(spent: float, computed: float) -> str:
    part = spent / (spent + computed)
    return f"{time(spent)}, {f'{part:.0%}' if part >= 0.01 else f'{part:.1%}'}"


def tensor_counts(config: dict) -> str:
    rows = []
    for name, lengths in BATCHES.items():
        for tp in (1, 2, 4, 8):
            plain, again, narrow = (
                traffic(tensor_axis(config, lengths, recompute, width), tp)
                for recompute, width in ((False, F32), (True, F32), (False, BF16))
            )
            rows.append([name, str(tp), plain.calls, plain.messages, size(plain.bytes), again.calls, size(again.bytes), size(narrow.bytes)])
    header = ["batch", "tp", "all-reduces", "messages", "bytes", "all-reduces, recomputing", "bytes, recomputing", "bytes if bf16"]
    return table(header, rows)


def tensor_times(config: dict) -> str:
    rows = []
    for name, lengths in BATCHES.items():
        for tp in (1, 2, 4, 8):
            computed = compute_seconds(config, lengths, tp)
            spent = [seconds(traffic(tensor_axis(config, lengths), tp), tp, link) for link in LINKS]
            narrow = seconds(traffic(tensor_axis(config, lengths, width=BF16), tp), tp, LINKS[0])
            faster = [compute_seconds(config, lengths, 1) / (computed + s) for s in (spent[0], narrow)]
            cells = [of_step(s, computed) if tp > 1 else "-" for s in spent]
            rows.append([name, str(tp), time(computed), *cells, f"{faster[0]:.1f}", f"{faster[1]:.1f}"])
    header = ["batch", "tp", "compute", *(link.name for link in LINKS), "speedup, NVLink", "if bf16"]
    return table(header, rows)


def data_times(config: dict) -> str:
    lengths, rows = BATCHES["full"], []
    for dp in (1, 2, 4, 8, 16, 32, 64):
        own = share(lengths, 0, dp)
        computed = compute_seconds(config, own, 1)
        sent, eight = (traffic(data_axis(config, len(lengths), jobs), dp) for jobs in (1, 8))
        spent = [seconds(sent, dp, link) for link in LINKS]
        cells = [of_step(s, computed) if dp > 1 else "-" for s in spent]
        faster = [compute_seconds(config, lengths, 1) / (computed + s) for s in (spent[1], spent[3])]
        rows.append(
            [str(dp), str(len(own)), sent.messages, size(sent.bytes), size(eight.bytes), time(computed), *cells[1:], *(f"{f:.1f}" for f in faster)]
        )
    header = ["dp", "examples", "messages", "bytes", "bytes, 8 jobs", "compute", *(link.name for link in LINKS[1:])]
    return table([*header, "speedup, InfiniBand", "speedup, 10 Gb/s"], rows)


def links() -> str:
    rows = [[link.name, f"{link.rate / 1e9:g} GB/s", time(link.latency), time(link.further)] for link in LINKS]
    return table(["link", "rate", "an exchange of two ranks", "each further message"], rows)


def fitted(report: dict) -> Link:
    """A link with the barrier's time for an exchange, and the median rate of all-reduces of 1 MB and more after taking that off."""
    rows, ranks = report["operations"], report["ranks"]
    exchange = next(row["latency_us"] for row in rows if row["operation"] == "barrier") / 1e6
    rates = []
    for row in rows:
        if row["operation"] == "all_reduce" and row["bytes"] >= 1e6:
            sent = traffic([Call(1, row["bytes"] // F32, F32)], ranks)
            left = row["latency_us"] / 1e6 - sent.exchanges * exchange
            rates += [sent.bytes / left] if left > 0 else []
    if not rates:
        raise SystemExit("no all-reduce of 1 MB or more in the report: measure with --sizes 1KB..64MB")
    return Link(report["collective"], statistics.median(rates), exchange, 0.0)


def beside(report: dict, step: float | None) -> str:
    """What the model says of this machine: of each size that was measured, and of a step of C1."""
    link, ranks = fitted(report), report["ranks"]
    rows = []
    for row in report["operations"]:
        if row["operation"] == "all_reduce":
            said = seconds(traffic([Call(1, row["bytes"] // F32, F32)], ranks), ranks, link)
            measured = row["latency_us"] / 1e6
            rows.append([f"{row['bytes'] // 1024:,} KiB", time(measured), time(said), f"{said / measured:.2f}"])
    parts = [
        f"{link.name}, {ranks} ranks: an exchange takes {time(link.latency)} (the barrier, measured); "
        f"a rank sends {link.rate / 1e9:.3g} GB/s (fitted).",
        table(["all-reduce of f32", "measured", "computed", "computed / measured"], rows),
    ]
    base, lengths = workload.shape_config("base"), workload.parse_lengths(C1_LENGTHS)
    tokens = [sum(PROMPT + length + TARGET for length in share(lengths, i, ranks)) for i in range(ranks)]
    axes = {
        f"dp {ranks}": data_axis(base, len(lengths)),
        f"tp {ranks}": tensor_axis(base, lengths),
        f"tp {ranks}, recomputing": tensor_axis(base, lengths, recompute=True),
    }
    if any(base[key] % ranks for key in ("num_heads", "d_ff", "vocab_size")):
        axes = {name: calls for name, calls in axes.items() if name.startswith("dp")}
    rows = []
    for name, calls in axes.items():
        sent = traffic(calls, ranks)
        spent = seconds(sent, ranks, link)
        rows.append([name, sent.calls, sent.messages, size(sent.bytes), time(spent), f"{spent / step:.2%}" if step else "-"])
    parts.append(table(["C1, a step", "all-reduces", "messages", "bytes", "computed", "of the step"], rows))
    late = max(tokens) / statistics.mean(tokens) - 1
    parts.append(f"At dp {ranks} the fullest replica of C1 has {late:.1%} more tokens than the mean (computed): the others wait for it.")
    return "\n\n".join(parts)


def update(page: pathlib.Path, tables: dict[str, str]) -> None:
    text = page.read_text()
    for name, lines in tables.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(mark)
        if not found or end not in rest:
            raise SystemExit(f"{page} has no place for the table {name}: put `<!-- {name} -->` and `<!-- end -->` where it belongs")
        text = before + mark + lines + "\n" + rest[rest.index(end) :]
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="xxl", help="a preset of workload.py, or a model directory")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/cost-model.md")
    parser.add_argument("--measured", nargs="+", type=pathlib.Path, default=[], metavar="JSON", help="reports of `incipit bench collective --json`")
    parser.add_argument("--step", type=float, metavar="SECONDS", help="a measured step of C1 on as many ranks, to take shares of")
    args = parser.parse_args()
    if args.measured:
        print("\n\n".join(beside(json.loads(path.read_text()), args.step) for path in args.measured))
        return
    config = workload.shape_config(args.shape)
    tables = {
        "tensor counts": tensor_counts(config),
        "links": links(),
        "tensor times": tensor_times(config),
        "data times": data_times(config),
    }
    if args.update:
        update(PAGE, tables)
    else:
        print("\n\n".join(f"{name}, {args.shape}\n\n{lines}" for name, lines in tables.items()))


if __name__ == "__main__":
    main()
