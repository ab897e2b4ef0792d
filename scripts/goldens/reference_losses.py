#!/usr/bin/env python3
"""The first 100 training losses of a plain PyTorch loop, on a real model and real data: tests/goldens/reference_losses/.

    prompt.npy    the prompt it starts with, [20, 256] float32
    losses.json   the loss of each step in float32 and in float64, and the places in trec's training file of the examples that it
                  saw, in their order

The loop is `reference_prompt_tuning.py` of the shared folder, seed 0; its functions are called, not copied. The folder also has the model
(`models/t5-mini-lm`) and the data (`data/trec`). Each step's update depends on the signs of small gradients, so that rounding grows: by step 100
the loop in float32 is 1.8e-3 from itself in float64, which is why both are kept.

    python reference_losses.py SHARED_FOLDER
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

import versions

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "reference_losses"
TASK, PROMPT_LENGTH, BATCH, STEPS, MAX_INPUT, SEED = "trec", 20, 32, 100, 128, 0


def reference(shared: pathlib.Path):
    spec = importlib.util.spec_from_file_location("reference", shared / "models" / "reference_prompt_tuning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(shared: pathlib.Path, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The first prompt, the order of the examples, and the losses."""
    loop, model_dir = reference(shared), shared / "models" / "t5-mini-lm"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.T5ForConditionalGeneration.from_pretrained(model_dir, dtype=dtype).eval()
    model.requires_grad_(False)
    inputs, targets, labels = loop.load(shared / "data", TASK, "train", tokenizer, MAX_INPUT)
    start = loop.init_prompt(model.shared.weight.detach(), tokenizer, set(labels), PROMPT_LENGTH, SEED)
    prompt = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = loop.Adafactor(prompt)
    order = np.random.default_rng([SEED, 0]).permutation(len(inputs))[: STEPS * BATCH]
    losses = []
    for part in order.reshape(STEPS, BATCH):
        x, y = ([tokens[i] for i in part] for tokens in (inputs, targets))
        embedded, mask = loop.encoder_inputs(model, prompt, x)
        loss = model(inputs_embeds=embedded.to(dtype), attention_mask=mask, labels=loop.pad(y, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return start.numpy(), order, losses


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shared = pathlib.Path(sys.argv[1])
    prompt, order, losses = train(shared, torch.float32)
    exact = train(shared, torch.float64)[2]
    OUT.mkdir(parents=True, exist_ok=True)
    np.save(OUT / "prompt.npy", prompt)
    golden = {
        "versions": versions.used(),
        "task": TASK,
        "prompt_length": PROMPT_LENGTH,
        "batch": BATCH,
        "steps": STEPS,
        "max_input": MAX_INPUT,
        "losses": losses,
        "losses_float64": exact,
        "order": order.tolist(),
    }
    (OUT / "losses.json").write_text(versions.compact_json(golden))
    apart = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    print(f"{STEPS} losses from {losses[0]:.6f} to {losses[-1]:.6f}; float32 and float64 differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
