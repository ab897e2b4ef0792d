#!/usr/bin/env python3
"""Tiny T5 models and what transformers computes with them: tests/goldens/<name>/{config.json,model.safetensors,io.safetensors,meta.json}.

    python t5.py              # all of them
    python t5.py v1_1_untied  # some of them

Every configuration is drawn again, seed after seed, until its outputs can tell a right implementation from a wrong one: greedy decoding
stops early for some examples and not for others, examples differ, beam search finds something else, and no choice hangs on a rounding.

io.safetensors, for each case (p7, p3: a prompt of so many rows before every example; none: no prompt), N examples end to end:
    <case>.prompt            [P, D]
    <case>.encoder_output    [sum of P + input length, D]     (p7 in float32 only: files are to stay small)
    <case>.logits            [sum of target lengths, V]
    <case>.loss_sum          [N]        summed token cross-entropy of an example
    <case>.loss_mean         [1]        mean over the batch's target tokens
    <case>.prompt_gradients  [N, P, D]  of loss_sum
    <case>.prompt_gradient   [P, D]     of loss_mean
computed in float64 and kept as float32; and the same under bf16.<case>.* as PyTorch computes them in bfloat16 (losses from float32 logits).
"""

import argparse
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config

import versions

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
INPUT_LENGTHS = [12, 3, 45, 27, 8]
TARGET_LENGTHS = [3, 1, 6, 2, 4]
PROMPTS = {"p7": 7, "p3": 3, "none": 0}
MAX_NEW_TOKENS = 8
MAX_BF16_ERROR = 0.06  # of PyTorch's gradients; a model that is worse conditioned would measure luck
BEAMS = {"beam4": {"num_beams": 4, "length_penalty": 1.0}, "beam3_long": {"num_beams": 3, "length_penalty": 2.0}}
PUBLISHED = {  # as the config.json of published repositories have it
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "use_cache": True, "vocab_size": 100, "d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 40,
    "num_layers": 2, "num_decoder_layers": 2,
}  # fmt: skip


@dataclasses.dataclass
class Golden:
    """One tiny model: what its config.json says, which head its file has, and which version of transformers wrote the config."""

    about: str
    config: dict
    own_head: bool
    written_by_transformers_5: bool = False
    leftovers: bool = False


MT5 = {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu", "d_model": 28}
GOLDENS = {
    "v1_1_untied": Golden(
        "T5 1.1 as published: gated-gelu, a head of its own, logits not scaled",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_max_distance": 128},
        own_head=True,
    ),
    "v1_0_tied": Golden(
        "T5 1.0 as published: relu, tied head, scaled logits; no max_distance and no num_decoder_layers in the config, and the tensors "
        "that old files carry twice or for nothing",
        {"feed_forward_proj": "relu", "num_decoder_layers": None, "d_ff": 72},
        own_head=False, leftovers=True,
    ),
    "wide_heads": Golden(
        "d_kv * num_heads = 48 is not d_model = 20; transformers 5 wrote tie_word_embeddings true, the head is its own all the same",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_model": 20, "d_kv": 16, "num_heads": 3, "vocab_size": 101},
        own_head=True, written_by_transformers_5=True,
    ),
    "unequal_depths": Golden(
        "three encoder layers, one decoder layer; tied and scaled as transformers 5 writes it",
        {"feed_forward_proj": "gated-gelu", "num_layers": 3, "num_decoder_layers": 1},
        own_head=False, written_by_transformers_5=True,
    ),
    "mt5": Golden("mT5 as published", MT5 | {"tie_word_embeddings": False, "num_heads": 4}, own_head=True),
    "mt5_saved_by_transformers_5": Golden(
        "mT5 never scales its logits, although transformers 5 writes tie_word_embeddings true and no scale_decoder_outputs",
        MT5 | {"num_heads": 2}, own_head=True, written_by_transformers_5=True,
    ),
    "silu": Golden(
        "UL2's feed-forward: gated silu", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "d_model": 16}, own_head=True
    ),
    "few_buckets": Golden(
        "8 buckets up to a distance of 12, so that inputs reach the last bucket; plain gelu_new; a large epsilon",
        {"feed_forward_proj": "gelu_new", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
         "layer_norm_epsilon": 0.01, "tie_word_embeddings": False},
        own_head=True,
    ),
    "shared_head_unscaled": Golden(
        "no head in the file, yet tie_word_embeddings is false: the shared embedding, not scaled",
        {"feed_forward_proj": "gated-relu", "tie_word_embeddings": False, "d_model": 16, "d_kv": 4}, own_head=False,
    ),
    "own_head_scaled": Golden(
        "a head in the file, yet tie_word_embeddings is true: its own head, scaled; plain silu",
        {"feed_forward_proj": "silu", "tie_word_embeddings": True, "d_model": 16, "d_kv": 12}, own_head=True,
    ),
}  # fmt: skip


def write_config(golden: Golden, directory: pathlib.Path) -> None:
    config = {k: v for k, v in (PUBLISHED | golden.config).items() if v is not None}
    if golden.written_by_transformers_5:
        kind = MT5Config if config["model_type"] == "mt5" else T5Config
        kind(**{k: v for k, v in config.items() if k != "model_type"}).save_pretrained(directory)
    else:
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def random_weights(golden: Golden, directory: pathlib.Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights under which attention looks somewhere, the bias of distance matters and the logits differ."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForSeq2SeqLM.from_config(config).state_dict().items() if "embed_tokens" not in k}
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        normal = torch.randn(shape, generator=random)
        if name == "shared.weight":
            weights[name] = 2.0 * normal
        elif name == "lm_head.weight":
            weights[name] = normal * (3.0 if golden.config.get("tie_word_embeddings") else 3.0 * shape[1] ** -0.5)
        elif "layer_norm" in name:
            weights[name] = 1.0 + 0.3 * normal
        elif "relative_attention_bias" in name:
            weights[name] = 1.2 * normal
        elif name.endswith(".q.weight"):
            weights[name] = normal * (config.d_kv * shape[1]) ** -0.5 * 1.5
        elif name.endswith((".o.weight", ".wo.weight")) and not golden.own_head:
            weights[name] = 3.0 * normal * shape[1] ** -0.5  # else a tied head repeats the last token for ever
        else:
            weights[name] = normal * shape[1] ** -0.5
    if not golden.own_head:
        del weights["lm_head.weight"]
        if not config.to_dict().get("scale_decoder_outputs", True):
            weights["shared.weight"] *= 0.4
    weights["lm_head.weight" if golden.own_head else "shared.weight"][config.eos_token_id] *= 1.6  # </s> wins now and then
    if golden.leftovers:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
        weights["decoder.embed_tokens.weight"] = weights["shared.weight"].clone()
        bias = weights["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(bias.shape, generator=random)
    return weights


def load(golden: Golden, directory: pathlib.Path, dtype: torch.dtype, attention: str):
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval().requires_grad_(False)
    head, shared = model.lm_head.weight, model.shared.weight
    assert torch.equal(head, shared) != golden.own_head, "transformers has tied a head that the file has, or untied one that it has not"
    config = model.config
    scaled = golden.config.get("model_type") != "mt5" and golden.config.get("tie_word_embeddings") is not False
    assert getattr(config, "scale_decoder_outputs", False) == scaled, "not the scaling that this configuration is meant to have"
    return model


def draw_batch(vocab_size: int, d_model: int, seed: int) -> tuple[list, list, dict[str, torch.Tensor]]:
    random = np.random.default_rng([seed, 1])
    inputs = [random.integers(2, vocab_size, n - 1).tolist() + [1] for n in INPUT_LENGTHS]
    targets = [random.integers(2, vocab_size, n - 1).tolist() + [1] for n in TARGET_LENGTHS]
    prompts = {k: torch.tensor(random.normal(0, 1.5, (p, d_model)), dtype=torch.float32) for k, p in PROMPTS.items()}
    return inputs, targets, prompts


def with_prompt(model, prompt: torch.Tensor, inputs: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt rows, then the embedded input, then padding; and the mask."""
    longest = max(map(len, inputs))
    ids = torch.tensor([x + [0] * (longest - len(x)) for x in inputs])
    mask = torch.tensor([[1] * (len(prompt) + len(x)) + [0] * (longest - len(x)) for x in inputs])
    rows = prompt.to(model.dtype).expand(len(inputs), -1, -1)
    return torch.cat([rows, model.shared(ids)], dim=1), mask


def run_examples(model, prompt: torch.Tensor, inputs: list, targets: list) -> dict[str, torch.Tensor]:
    """Each example by itself, so that nothing is padded; losses from logits of at least float32."""
    prompt = prompt.to(torch.float64 if model.dtype == torch.float64 else torch.float32).requires_grad_()
    encoded, logits, losses, gradients = [], [], [], []
    for x, y in zip(inputs, targets, strict=True):
        embedded, mask = with_prompt(model, prompt, [x])
        out = model(inputs_embeds=embedded, attention_mask=mask, labels=torch.tensor([y]))
        scores = out.logits[0].to(prompt.dtype)
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor(y), reduction="sum")
        gradients.append(torch.autograd.grad(loss, prompt)[0] if len(prompt) else torch.zeros_like(prompt))
        encoded.append(out.encoder_last_hidden_state[0].detach())
        logits.append(scores.detach())
        losses.append(loss.detach())
    num_tokens = sum(map(len, targets))
    result = {
        "encoder_output": torch.cat(encoded),
        "logits": torch.cat(logits),
        "loss_sum": torch.stack(losses),
        "loss_mean": torch.stack(losses).sum()[None] / num_tokens,
        "prompt_gradients": torch.stack(gradients),
        "prompt_gradient": torch.stack(gradients).sum(0) / num_tokens,
    }
    return result if len(prompt) else {k: v for k, v in result.items() if "gradient" not in k}


def check_padded(model, prompt: torch.Tensor, inputs: list, targets: list, result: dict) -> None:
    """The padded batch, as transformers' own loss averages it, must agree with the examples one by one."""
    prompt = prompt.double().requires_grad_()
    embedded, mask = with_prompt(model, prompt, inputs)
    longest = max(map(len, targets))
    labels = torch.tensor([y + [-100] * (longest - len(y)) for y in targets])
    loss = model(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
    gradient = torch.autograd.grad(loss, prompt)[0] if len(prompt) else None
    assert torch.allclose(loss, result["loss_mean"][0], rtol=1e-6), (loss, result["loss_mean"])
    if gradient is not None:
        assert torch.allclose(gradient, result["prompt_gradient"], rtol=1e-4, atol=1e-7)


def generate(model, prompt: torch.Tensor, inputs: list, **options) -> tuple[list[list[int]], list[float] | None]:
    """Tokens after the start token and before </s>, and beam search's scores."""
    embedded, mask = with_prompt(model, prompt, inputs)
    settings = transformers.GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        early_stopping=False, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    out = model.generate(inputs_embeds=embedded, attention_mask=mask, generation_config=settings)
    rows = [row[1:] for row in out.sequences.tolist()]
    tokens = [row[: row.index(1)] if 1 in row else row for row in rows]
    assert all(len(row) == MAX_NEW_TOKENS for row, t in zip(rows, tokens, strict=True) if 1 not in row)
    scores = out.get("sequences_scores")
    return tokens, None if scores is None else [round(s, 7) for s in scores.tolist()]


def generated(model, prompt: torch.Tensor, inputs: list) -> dict:
    result = {"greedy": generate(model, prompt, inputs)[0]}
    for name, options in BEAMS.items():
        tokens, scores = generate(model, prompt, inputs, **options)
        result[name] = {**options, "tokens": tokens, "scores": scores}
    return result


def tokens_of(outputs: dict) -> list:
    return [outputs["greedy"]] + [outputs[name]["tokens"] for name in BEAMS]


def telling(model, prompts: dict, inputs: list, outputs: dict[str, dict]) -> bool:
    """Whether a wrong implementation would show, and a right one cannot fail by a rounding."""
    greedy, beam = outputs["p7"]["greedy"], outputs["p7"]["beam4"]["tokens"]
    stops = [len(tokens) < MAX_NEW_TOKENS for tokens in greedy]
    if not any(stops) or all(stops) or len({tuple(t) for t in greedy}) < 4 or beam == greedy:
        return False
    if not any(len(tokens) < MAX_NEW_TOKENS for tokens in beam):
        return False
    random = torch.Generator().manual_seed(0)
    for case, prompt in prompts.items():
        for _ in range(2):  # far more than float32's roundings
            shaken = prompt + 1e-3 * torch.randn(prompt.shape, generator=random)
            if tokens_of(generated(model, shaken, inputs)) != tokens_of(outputs[case]):
                return False
    return True


def make(name: str, directory: pathlib.Path, seed: int) -> bool:
    golden = GOLDENS[name]
    write_config(golden, directory)
    weights = random_weights(golden, directory, seed)
    safetensors.torch.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    exact = load(golden, directory, torch.float64, "eager")
    inputs, targets, prompts = draw_batch(exact.config.vocab_size, exact.config.d_model, seed)
    outputs = {case: generated(exact, prompt, inputs) for case, prompt in prompts.items()}
    if not telling(exact, prompts, inputs, outputs):
        return False
    bf16 = load(golden, directory, torch.bfloat16, "sdpa")
    tensors, bf16_loss = {}, {}
    for case, prompt in prompts.items():
        result = run_examples(exact, prompt, inputs, targets)
        check_padded(exact, prompt, inputs, targets, result)
        low = run_examples(bf16, prompt, inputs, targets)
        if "prompt_gradients" in low and relative(low["prompt_gradients"], result["prompt_gradients"]) > MAX_BF16_ERROR:
            return False
        tensors[f"{case}.prompt"] = prompt
        tensors |= {f"{case}.{k}": v.float() for k, v in result.items() if case == "p7" or k != "encoder_output"}
        tensors |= {f"bf16.{case}.{k}": v.float() for k, v in low.items() if k != "encoder_output"}
        bf16_loss[case] = relative(low["loss_sum"], result["loss_sum"])
    tensors = {k: v.contiguous() for k, v in tensors.items() if v.numel()}
    safetensors.torch.save_file(tensors, directory / "io.safetensors")
    meta = {
        "about": golden.about, "made_by": "scripts/goldens/t5.py", "seed": seed, **versions.used(), "max_new_tokens": MAX_NEW_TOKENS,
        "bf16_relative_error_of_loss_sum": bf16_loss, "inputs": inputs, "targets": targets, "generated": outputs,
    }  # fmt: skip
    (directory / "meta.json").write_text(versions.compact_json(meta))
    return True


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(f"{(a - b).norm() / b.norm():.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(GOLDENS)}; default: all")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in parser.parse_args().names or GOLDENS:
        directory = OUT / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        seed = next(seed for seed in range(1, 400) if make(name, directory, seed))
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{name}: seed {seed}, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
