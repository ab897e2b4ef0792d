#!/usr/bin/env python3
"""20 steps of each optimizer: tests/goldens/optimizers.safetensors and optimizers.json.

T5X's Adafactor is written out here in NumPy float64, from the published algorithm; transformers' Adafactor, AdamW and SGD are the libraries' own,
run in float64. Gradients are float32 numbers.

    small.*  a prompt [7, 16], which T5X does not factor:  small.gradients [20, 7, 16], small.initial [7, 16],
             small.<optimizer> [20, 7, 16], the prompt after each step
    large.*  a prompt [150, 160], which it factors: the gradient of step t is float32(a_t A + b_t B), the products and the sum in float64, with
             A = large.gradient_a, B = large.gradient_b [150, 160] and (a_t, b_t) = large.weights [20, 2]; large.initial is float32(30 B);
             large.<optimizer> [150, 160], the prompt after the last step
"""

import json
import pathlib

import numpy as np
import safetensors.numpy
import torch
from transformers.optimization import Adafactor

import versions

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
STEPS, SEED = 20, 8
ADAFACTOR = {"lr": 0.3, "weight_decay": 1e-5, "decay": 0.8, "clip": 1.0, "epsilon": 1e-30, "min_dim_to_factor": 128}
TORCH = {
    "transformers_adafactor": (
        Adafactor,
        {"lr": 0.3, "weight_decay": 1e-5, "decay_rate": -0.8, "scale_parameter": False, "relative_step": False},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.0, "weight_decay": 1e-4}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4}),
}


class T5XAdafactor:
    """Adafactor as T5X runs it for a prompt: no first moment, no scaling by the parameter's size."""

    def __init__(self, shape: tuple[int, int], counter: int):
        self.counter = counter
        self.factored = min(shape) >= ADAFACTOR["min_dim_to_factor"]
        self.moment = np.zeros(shape)
        self.row_moment, self.column_moment = np.zeros(shape[0]), np.zeros(shape[1])

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        new = (self.counter + 1.0) ** -ADAFACTOR["decay"]
        square = gradient**2 + ADAFACTOR["epsilon"]
        if not self.factored:
            self.moment = (1 - new) * self.moment + new * square
            return gradient / np.sqrt(self.moment)
        self.row_moment = (1 - new) * self.row_moment + new * square.mean(axis=1)
        self.column_moment = (1 - new) * self.column_moment + new * square.mean(axis=0)
        estimate = np.outer(self.row_moment, self.column_moment) / self.row_moment.mean()
        return gradient / np.sqrt(estimate)

    def step(self, prompt: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        direction = self.direction(gradient.astype(np.float64))
        self.counter += 1
        direction /= max(1.0, np.sqrt(np.mean(direction**2)) / ADAFACTOR["clip"])
        return prompt - ADAFACTOR["lr"] * direction - ADAFACTOR["weight_decay"] * prompt


def run_t5x(initial: np.ndarray, gradients: list[np.ndarray], counter: int) -> np.ndarray:
    optimizer, prompt, prompts = T5XAdafactor(initial.shape, counter), initial.astype(np.float64), []
    for gradient in gradients:
        prompt = optimizer.step(prompt, gradient)
        prompts.append(prompt)
    return np.stack(prompts)


def run_torch(name: str, initial: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    kind, options = TORCH[name]
    prompt = torch.nn.Parameter(torch.tensor(initial, dtype=torch.float64))
    optimizer, prompts = kind([prompt], **options), []
    for gradient in gradients:
        prompt.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        prompts.append(prompt.detach().numpy().copy())
    return np.stack(prompts)


def run_all(initial: np.ndarray, gradients: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The prompts after each step, by optimizer."""
    results = {
        "adafactor_paper": run_t5x(initial, gradients, 0),
        "adafactor_released_code": run_t5x(initial, gradients, 1_100_000),
    }
    return results | {name: run_torch(name, initial, gradients) for name in TORCH}


def main() -> None:
    random = np.random.default_rng(SEED)
    small = {
        "initial": random.normal(0, 5, (7, 16)).astype(np.float32),
        # Each element has a scale of its own, and each step another: that is what tells factored from unfactored.
        "gradients": (random.normal(0, 1, (STEPS, 7, 16)) * random.lognormal(-6, 1.5, (7, 16))
                      * random.lognormal(0, 1, (STEPS, 1, 1))).astype(np.float32),
    }  # fmt: skip
    scale = random.lognormal(-6, 1, (150, 1)) * random.lognormal(0, 1, (1, 160))
    a, b = ((scale * random.normal(0, 1, (150, 160))).astype(np.float32) for _ in range(2))
    weights = random.normal(0, 1, (STEPS, 2)).astype(np.float32)
    large = {"gradient_a": a, "gradient_b": b, "weights": weights}
    mixed = [(np.float64(w[0]) * a.astype(np.float64) + np.float64(w[1]) * b.astype(np.float64)).astype(np.float32) for w in weights]

    tensors = {f"small.{k}": v for k, v in small.items()} | {f"large.{k}": v for k, v in large.items()}
    for name, prompts in run_all(small["initial"], list(small["gradients"])).items():
        tensors[f"small.{name}"] = prompts.astype(np.float32)
    results = run_all((30 * b.astype(np.float64)).astype(np.float32), mixed)
    for name in ["adafactor_paper", "adafactor_released_code", "transformers_adafactor"]:
        tensors[f"large.{name}"] = results[name][-1].astype(np.float32)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, OUT / "optimizers.safetensors")

    ours, theirs = tensors["small.adafactor_paper"][-1], tensors["small.transformers_adafactor"][-1]
    meta = {
        "made_by": "scripts/goldens/optimizers.py", "seed": SEED, **versions.used(), "numpy": np.__version__, "steps": STEPS,
        "adafactor": ADAFACTOR, "counters": {"adafactor_paper": 0, "adafactor_released_code": 1_100_000},
        "torch_optimizers": {name: options for name, (_, options) in TORCH.items()},
        "transformers_adafactor_moves_the_small_prompt_elsewhere_by": {
            "of_the_distance_moved": round(float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - small["initial"])), 4)},
    }  # fmt: skip
    (OUT / "optimizers.json").write_text(versions.compact_json(meta))
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
