#!/usr/bin/env python3
"""Prefixes in PEFT's form, and what PEFT computes with them: tests/goldens/peft_prefix/.

    <model>/        an adapter of random keys and values for that model of tests/goldens, as PEFT saves it
    projected/      one that PEFT made by an MLP (prefix_projection), for v1_1_untied
    four_layers/    one for `model4/`, a model with four decoder layers: there the order of PEFT's slots shows
    batch.json      token ids, and for each adapter the losses, the greedy tokens and the first example's logits

In float32. num_transformer_submodules is 2, PEFT's default for T5. With 1, PEFT's cache goes to the attention to the encoder as well, where a
target's own keys are then found too: this program asserts that the logits of a token depend on the tokens behind it, so that nobody takes
that for a method.
"""

import json
import pathlib
import shutil

import safetensors.torch
import torch
import transformers
from peft import PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import check_peft_export as check
import versions

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
OUT = GOLDENS / "peft_prefix"
# Adapter: its model, and the width of the MLP.
ADAPTERS = {
    "v1_1_untied": (GOLDENS / "v1_1_untied", None),
    "wide_heads": (GOLDENS / "wide_heads", None),
    "unequal_depths": (GOLDENS / "unequal_depths", None),
    "projected": (GOLDENS / "v1_1_untied", 7),
    "four_layers": (OUT / "model4", None),
}
LENGTH, MAX_NEW_TOKENS = 5, 6


def make_model(directory: pathlib.Path) -> None:
    """Four decoder layers, and few enough buckets that the prefix's positions fall into several."""
    torch.manual_seed(11)
    config = T5Config(
        vocab_size=100, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=4, num_heads=2, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, feed_forward_proj="relu",
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    directory.mkdir(parents=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if "embed_tokens" not in k and k != "lm_head.weight"}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(config.to_json_string())


def load(model: pathlib.Path) -> transformers.PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def adapted(model: pathlib.Path, width: int | None, submodules: int, seed: int):
    base = load(model)
    c = base.config
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=LENGTH,
        num_transformer_submodules=submodules,
        num_layers=c.num_decoder_layers,
        num_attention_heads=c.num_heads,
        token_dim=c.num_heads * c.d_kv,
        prefix_projection=width is not None,
        encoder_hidden_size=width,
    )
    model_with = get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model_with.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model_with.peft_config["default"].base_model_name_or_path = model.name  # not a path of the machine that made it
    return model_with


@torch.no_grad()
def looks_ahead(submodules: int, input_ids: list[int]) -> bool:
    """Whether the logits of the first place differ with the first target, which is an input of the second place only."""
    model = adapted(GOLDENS / "v1_1_untied", None, submodules, 3)
    one, other = (model(input_ids=torch.tensor([input_ids]), labels=torch.tensor([y])).logits[0, 0] for y in ([55, 8, 1], [56, 8, 1]))
    return (one - other).abs().max().item() > 1e-3


@torch.no_grad()
def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    make_model(OUT / "model4")
    golden = json.loads((GOLDENS / "v1_1_untied" / "meta.json").read_text())
    examples = [{"input": x, "target": y} for x, y in zip(golden["inputs"], golden["targets"], strict=True)]
    assert [looks_ahead(n, examples[0]["input"]) for n in (1, 2)] == [True, False], "PEFT computes something else now"
    results = {}
    for seed, (name, (model, width)) in enumerate(ADAPTERS.items()):
        directory = OUT / name
        adapted(model, width, 2, seed).save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink()
        reloaded = check.load(model, directory, torch.float32)
        results[name] = {"model": str(model.relative_to(GOLDENS))} | check.results(reloaded, examples, MAX_NEW_TOKENS)
        results[name]["logits"] = reloaded(**check.padded(examples[:1])).logits[0].flatten().tolist()
        plain = [load(model)(**check.padded([example])).loss.item() for example in examples]
        assert max(abs(x - y) for x, y in zip(plain, results[name]["losses"], strict=True)) > 0.05, "the prefix does nothing"
    meta = {"made_by": "scripts/goldens/peft_prefix.py", **versions.used(), "prefix_length": LENGTH}
    meta |= {"max_new_tokens": MAX_NEW_TOKENS, "examples": examples, "results": results}
    (OUT / "batch.json").write_text(versions.compact_json(meta))
    print({name: result["loss"] for name, result in results.items()})


if __name__ == "__main__":
    main()
