#!/usr/bin/env python3
"""The machine's best matrix rate: square products by PyTorch (oneDNN), the best of many, as JSON in GFLOP/s."""

import argparse
import json
import time

import torch


def best_rate(dtype: torch.dtype, size: int, seconds: float) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, best, end = torch.empty(size, size, dtype=dtype), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each size and type")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = {
        name: {size: round(best_rate(dtype, size, args.seconds), 1) for size in (1024, 2048, 4096)}
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
    }
    print(json.dumps({f"{name}_gflop_s": max(by_size.values()) for name, by_size in rates.items()} | {"by_size": rates}))


if __name__ == "__main__":
    main()
