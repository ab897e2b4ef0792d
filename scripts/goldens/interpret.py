#!/usr/bin/env python3
"""What NumPy and scikit-learn say of small prompts and a small vocabulary: tests/goldens/interpret.json.

The vocabulary `table` [40, 6] has rows of zeros (11 and 33), a row twice (5 and 20), and one that is twice as long (21); `prompt` [7, 6] has a row of zeros
(4), rows near to words, one that points away from a word, and one at random. Everything is computed in float64 from float32 numbers. Neighbours are
sorted by cosine rounded to nine digits, then by id, so that words in the same direction stay in the order of the vocabulary.
"""

import json
import pathlib
import platform

import numpy as np
import sklearn
from sklearn.metrics.pairwise import cosine_similarity

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "interpret.json"
SEED, WORDS, WIDTH, NEAREST = 7, 40, 6, 5
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


def norms(rows: np.ndarray) -> dict[str, float]:
    lengths = np.linalg.norm(rows, axis=1)
    return {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()} | {"mean": float(lengths.mean())}


def tightness(rows: np.ndarray) -> float | None:
    pairs = cosine_similarity(rows)[np.triu_indices(len(rows), 1)]
    return float(pairs.mean()) if len(pairs) else None


def neighbours(row: np.ndarray, table: np.ndarray, words: np.ndarray) -> dict:
    if not row.any():
        return {"norm": 0.0, "ids": [], "cosines": [], "tightness": None}
    cosines = cosine_similarity(row[None], table)[0]
    nearest = words[np.lexsort((words, -np.round(cosines[words], 9)))][:NEAREST]
    return {
        "norm": float(np.linalg.norm(row)),
        "ids": nearest.tolist(),
        "cosines": cosines[nearest].tolist(),
        "tightness": tightness(table[nearest]),
    }


def main() -> None:
    random = np.random.default_rng(SEED)
    table = random.normal(1.0, 3.0, (WORDS, WIDTH)).astype(np.float32)
    table[20], table[21], table[[11, 33]] = table[5], 2 * table[5], 0
    prompt = random.normal(0.0, 2.0, (7, WIDTH)).astype(np.float32)
    prompt[0], prompt[1], prompt[2], prompt[3], prompt[4] = table[5], 0.25 * table[8], table[8] + 0.5 * prompt[2], -table[5], 0
    other = random.normal(0.5, 1.0, (3, WIDTH)).astype(np.float32)
    wide, words = table.astype(np.float64), np.flatnonzero(table.any(axis=1))
    rows = prompt.astype(np.float64)
    prompts = [rows, other.astype(np.float64), wide[5:6]]
    golden = {
        "made_with": {"python": platform.python_version(), "numpy": np.__version__, "scikit-learn": sklearn.__version__},
        "width": WIDTH,
        "nearest": NEAREST,
        "table": table.ravel().tolist(),
        "prompt": prompt.ravel().tolist(),
        "other": other.ravel().tolist(),
        "rows": [neighbours(row, wide, words) for row in rows],
        "vocabulary": {"norms": norms(wide), "undirected": WORDS - len(words), "tightness": tightness(wide[words])},
        # Of `prompt`, `other`, and row 5 of the table alone.
        "of_rows": [[float(cosine_similarity(a[a.any(axis=1)], b[b.any(axis=1)]).mean()) for b in prompts] for a in prompts],
        "of_means": [[float(cosine_similarity(a.mean(0)[None], b.mean(0)[None])[0, 0]) for b in prompts] for a in prompts],
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    OUT.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
