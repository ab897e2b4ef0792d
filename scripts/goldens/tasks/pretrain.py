#!/usr/bin/env python3
"""What T5's own preprocessors make of segments of text: crates/data/tests/goldens/pretrain.json.

    lengths   of input lengths, noise densities and mean span lengths, the tokens of a segment and of its target
    noise     of segment lengths, how many tokens and spans of noise T5's masks have
    examples  tokens, masks, and the inputs and targets that span corruption makes of them
    prefixes  tokens, and the same for the prefix objective, without its mask's random number: every split there is
    ranges    of segment lengths, the shortest and longest prefix that T5's mask chose in many draws

Needs the packages of requirements.txt. Random bits are TensorFlow's, so that tests compare what is done with a mask, and how much of it is noise, and
not which mask is drawn.

    .venv-t5/bin/python pretrain.py
"""

import json
import os
import pathlib
import platform
import random
from importlib.metadata import version

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf  # noqa: E402
from t5.data import preprocessors  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parents[3] / "crates" / "data" / "tests" / "goldens" / "pretrain.json"
PACKAGES = ["t5", "tensorflow", "seqio-nightly"]
SETTINGS = [(0.15, 3.0), (0.15, 1.0), (0.15, 8.0), (0.1, 2.0), (0.25, 5.0), (0.3, 3.3), (0.5, 3.0), (0.5, 2.0), (0.7, 4.0)]
INPUTS = [32, 64, 77, 100, 114, 128, 200, 255, 256, 257, 384, 511, 512, 513, 568, 1000, 1024, 2048]
SEGMENTS = list(range(2, 41)) + [63, 64, 65, 95, 100, 141, 255, 256, 400, 511, 512, 567, 568, 569, 1137, 2275]


class Vocabulary:
    """100 sentinels at the end of 1,000 ids."""

    vocab_size = 1000


def seeds(number: int) -> tf.Tensor:
    return tf.constant([[number, 1], [number, 2]], tf.int32)


def spans(mask: list[bool]) -> int:
    return sum(now and not before for before, now in zip([False] + mask, mask))


def mask_of(length: int, density: float, mean: float, seed: int) -> list[bool]:
    mask = preprocessors.random_spans_noise_mask(length, density, seeds(seed), mean_noise_span_length=mean)
    return mask.numpy().tolist()


def lengths() -> list[dict]:
    """Those for which T5's masks keep what its helper promises: the helper counts in doubles and masks in floats, and short ones have a span at least."""
    made = []
    for density, mean in SETTINGS:
        for inputs in INPUTS:
            tokens, targets = preprocessors.random_spans_helper(inputs, density, mean, 1, 1)
            mask = mask_of(tokens, density, mean, 0)
            if sum(mask) + spans(mask) + 1 == targets and tokens - sum(mask) + spans(mask) + 1 <= inputs:
                made.append({"inputs": inputs, "density": density, "mean": mean, "tokens": tokens, "targets": targets})
    return made


def noise() -> list[dict]:
    made = []
    for density, mean in SETTINGS:
        masks = [mask_of(length, density, mean, length) for length in SEGMENTS]
        made.append({"density": density, "mean": mean, "lengths": SEGMENTS, "noise": list(map(sum, masks)), "spans": list(map(spans, masks))})
    return made


def example(tokens: list[int], mask: list[bool], inputs_fn, targets_fn) -> dict:
    made = {"tokens": tokens, "mask": "".join("01"[hidden] for hidden in mask)}
    for key, fn in [("inputs", inputs_fn), ("targets", targets_fn)]:
        made[key] = fn(tf.constant(tokens, tf.int32), tf.constant(mask), Vocabulary, None).numpy().tolist()
    return made


def examples() -> list[dict]:
    rng = random.Random(7)
    made = []
    for number in range(30):
        length = rng.choice([2, 3, 7, 20, 64, 130])
        tokens = [rng.randrange(3, 900) for _ in range(length)]
        mask = mask_of(length, *rng.choice(SETTINGS[:4]), seed=number)
        if number % 3 == 0:  # any mask at all, also one that begins with noise or ends without
            mask = [rng.random() < 0.4 for _ in tokens]
        made.append(example(tokens, mask, preprocessors.noise_span_to_unique_sentinel, preprocessors.nonnoise_span_to_unique_sentinel))
    return made


def prefixes() -> list[dict]:
    tokens = [12, 1, 15, 3, 9]
    masks = [[i < prefix for i in range(5)] for prefix in range(1, 5)]
    return [example(tokens, mask, preprocessors.drop_nonnoise_tokens, preprocessors.drop_noise_tokens) for mask in masks]


def ranges() -> list[dict]:
    made = []
    for length in [2, 3, 5, 8]:
        drawn = [int(tf.reduce_sum(tf.cast(preprocessors.random_prefix_noise_mask(length, 0.5, seeds(n)), tf.int32))) for n in range(200)]
        made.append({"length": length, "shortest": min(drawn), "longest": max(drawn)})
    return made


def main() -> None:
    made = {"made_with": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}}
    lists = {"lengths": lengths(), "noise": noise(), "examples": examples(), "prefixes": prefixes(), "ranges": ranges()}
    lines = [f'  "made_with": {json.dumps(made["made_with"])}']
    for key, items in lists.items():
        lines.append(f'  "{key}": [\n    ' + ",\n    ".join(map(json.dumps, items)) + "\n  ]")
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
