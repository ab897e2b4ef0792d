#!/usr/bin/env python3
"""Prompts in other places than before the input, with tiny models that t5.py made: tests/goldens/<name>/placements.{safetensors,json}.

    python placements.py

For each case, over the examples of meta.json, computed in float64 and kept as float32; each example by itself, so that nothing is padded:
    <case>.prompt            [P, D], or [L P, D] with rows for each encoder layer, those of the first layer first
    <case>.logits            [sum of target lengths, V]
    <case>.loss_sum          [N]
    <case>.prompt_gradients  [N, ...]   of loss_sum
and in placements.json what greedy decoding writes. The cases:
    after           behind the embedded input, before </s> (inputs_embeds)
    decoder         before the decoder's start token (decoder_inputs_embeds)
    layers          before the input, and at each encoder layer but the first in the place of what the layer before gave (a hook)
    layers_after    the same, behind the input
"""

import json

import safetensors.torch
import torch
from transformers import AutoModelForSeq2SeqLM

import t5
import versions

NAMES = ["v1_1_untied", "v1_0_tied", "unequal_depths"]
LENGTHS = {"after": 5, "decoder": 4, "layers": 3, "layers_after": 2}


def placed(model, case: str, prompt: torch.Tensor, x: list) -> torch.Tensor:
    """The embedded input of the encoder with the prompt of the first layer."""
    text = model.shared(torch.tensor([x]))
    rows = prompt[: LENGTHS[case]][None]
    if case == "decoder":
        return text
    if case.endswith("after"):
        return torch.cat([text[:, :-1], rows, text[:, -1:]], dim=1)
    return torch.cat([rows, text], dim=1)


def encode(model, case: str, prompt: torch.Tensor, x: list):
    """The encoder's result; at every layer but the first, the prompt's places get that layer's rows."""
    length = LENGTHS[case]
    first = len(x) - 1 if case.endswith("after") else 0

    def hook(i: int):
        def put(_module, args, kwargs):
            h = args[0] if args else kwargs.pop("hidden_states")
            rows = prompt[i * length : (i + 1) * length][None]
            return (torch.cat([h[:, :first], rows, h[:, first + length :]], dim=1), *args[1:]), kwargs

        return put

    blocks = list(enumerate(model.encoder.block)) if case.startswith("layers") else []
    handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in blocks[1:]]
    try:
        return model.encoder(inputs_embeds=placed(model, case, prompt, x))
    finally:
        for handle in handles:
            handle.remove()


def logits(model, case: str, prompt: torch.Tensor, encoded, before: list) -> torch.Tensor:
    """Of each target token, where `before` is what the decoder reads but for the prompt."""
    read = model.shared(torch.tensor([before]))
    rows = prompt[None] if case == "decoder" else prompt[None, :0]
    out = model(encoder_outputs=encoded, decoder_inputs_embeds=torch.cat([rows, read], dim=1), use_cache=False)
    return out.logits[0, rows.shape[1] :]


def greedy(model, case: str, prompt: torch.Tensor, x: list, count: int) -> list[int]:
    encoded, tokens = encode(model, case, prompt, x), []
    while len(tokens) < count:
        best = logits(model, case, prompt, encoded, [0, *tokens])[-1].argmax().item()
        if best == 1:
            break
        tokens.append(best)
    return tokens


def run(model, case: str, prompt: torch.Tensor, meta: dict) -> tuple[dict, list]:
    prompt = prompt.double().requires_grad_()
    scores, losses, gradients = [], [], []
    for x, y in zip(meta["inputs"], meta["targets"], strict=True):
        of_example = logits(model, case, prompt, encode(model, case, prompt, x), [0, *y[:-1]])
        loss = torch.nn.functional.cross_entropy(of_example, torch.tensor(y), reduction="sum")
        gradients.append(torch.autograd.grad(loss, prompt)[0])
        scores.append(of_example.detach())
        losses.append(loss.detach())
    result = {"prompt": prompt.detach(), "logits": torch.cat(scores), "loss_sum": torch.stack(losses)}
    result["prompt_gradients"] = torch.stack(gradients)
    written = [greedy(model, case, prompt.detach(), x, meta["max_new_tokens"]) for x in meta["inputs"]]
    return {f"{case}.{key}": value.float().contiguous() for key, value in result.items()}, written


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        directory = t5.OUT / name
        meta = json.loads((directory / "meta.json").read_text())
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
        model.requires_grad_(False)
        random = torch.Generator().manual_seed(11)
        tensors, generated = {}, {}
        for case, length in LENGTHS.items():
            rows = length * (model.config.num_layers if case.startswith("layers") else 1)
            prompt = torch.randn(rows, model.config.d_model, generator=random) * 1.5
            found, generated[case] = run(model, case, prompt, meta)
            tensors |= found
        safetensors.torch.save_file(tensors, directory / "placements.safetensors")
        about = {"made_by": "scripts/goldens/placements.py", **versions.used(), "generated": generated}
        (directory / "placements.json").write_text(versions.compact_json(about))
        print(name, sum(v.numel() for v in tensors.values()) * 4, "bytes", generated)


if __name__ == "__main__":
    main()
