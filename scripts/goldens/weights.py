#!/usr/bin/env python3
"""Gradients to the weights of tiny models that t5.py made: tests/goldens/<name>/weights.safetensors.

    python weights.py

Of the mean loss over the batch of meta.json, without a prompt, computed in float64 and kept as float32:
    model/<name of the weight>     all weights trained
    adapter/<name>, and loss       with a bottleneck adapter behind every sub-layer: h + up(relu(down(h)))
    given/<name>                   the adapters' numbers
"""

import json
import pathlib

import safetensors.torch
import torch
from transformers import AutoModelForSeq2SeqLM

import t5

NAMES = ["v1_1_untied", "v1_0_tied"]
WIDTH = 5


def mean_loss(model, meta: dict) -> torch.Tensor:
    """Each example by itself, so that nothing is padded."""
    losses = []
    for x, y in zip(meta["inputs"], meta["targets"], strict=True):
        logits = model(input_ids=torch.tensor([x]), labels=torch.tensor([y])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(y), reduction="sum"))
    return torch.stack(losses).sum() / sum(map(len, meta["targets"]))


def model_gradients(model, meta: dict) -> dict[str, torch.Tensor]:
    model.requires_grad_(True).zero_grad()
    mean_loss(model, meta).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sub_layers(model):
    """The modules whose result is added to what went into the sub-layer, each with the sub-layer's name."""
    for stack in ["encoder", "decoder"]:
        for i, block in enumerate(getattr(model, stack).block):
            for j, layer in enumerate(block.layer):
                inner = next(getattr(layer, n) for n in ["SelfAttention", "EncDecAttention", "DenseReluDense"] if hasattr(layer, n))
                yield f"{stack}.block.{i}.layer.{j}.adapter", inner


def adapter_gradients(model, meta: dict) -> tuple[dict, dict, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    d, given = model.config.d_model, {}

    def draw(name: str, *shape: int) -> None:
        values = torch.randn(shape, generator=random) * 0.4
        given[name] = values.double().requires_grad_()

    def hook(name: str):
        def adapted(_module, _args, out):
            h = out[0] if isinstance(out, tuple) else out
            inner = torch.relu(h @ given[f"{name}.down.weight"].T + given[f"{name}.down.bias"])
            h = h + inner @ given[f"{name}.up.weight"].T + given[f"{name}.up.bias"]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return adapted

    handles = []
    for name, module in sub_layers(model):
        draw(f"{name}.down.weight", WIDTH, d)
        draw(f"{name}.down.bias", WIDTH)
        draw(f"{name}.up.weight", d, WIDTH)
        draw(f"{name}.up.bias", d)
        handles.append(module.register_forward_hook(hook(name)))
    model.requires_grad_(False)
    loss = mean_loss(model, meta)
    loss.backward()
    for handle in handles:
        handle.remove()
    return {k: v.detach() for k, v in given.items()}, {k: v.grad for k, v in given.items()}, loss.detach()


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        directory: pathlib.Path = t5.OUT / name
        meta = json.loads((directory / "meta.json").read_text())
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
        own_head = "lm_head.weight" in safetensors.torch.load_file(directory / "model.safetensors")
        assert own_head != torch.equal(model.lm_head.weight, model.shared.weight)
        tensors = {f"model/{k}": v for k, v in model_gradients(model, meta).items()}
        given, gradients, loss = adapter_gradients(model, meta)
        tensors |= {f"given/{k}": v for k, v in given.items()} | {f"adapter/{k}": v for k, v in gradients.items()}
        tensors["adapter/loss"] = loss[None]
        tensors = {k: v.float().contiguous() for k, v in tensors.items()}
        safetensors.torch.save_file(tensors, directory / "weights.safetensors")
        print(name, sum(v.numel() for v in tensors.values()) * 4, "bytes,", len(tensors), "tensors", float(loss))


if __name__ == "__main__":
    main()
