#!/usr/bin/env python3
"""Prompts that PEFT itself trained and saved, and the losses it gives with them: tests/goldens/peft/.

    two_halves/   num_transformer_submodules 2, PEFT's default for T5: prompt_embeddings [2P, D], of which the encoder reads the first P rows
    one_half/     num_transformer_submodules 1: prompt_embeddings [P, D]
    batch.json    token ids, and for each adapter the mean loss over all target tokens, each example's mean loss, and greedy tokens

The model is tests/goldens/v1_1_untied, in float32.
"""

import json
import pathlib
import shutil

import peft
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model

import check_peft_export as check
import versions

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens"
MODEL = OUT / "v1_1_untied"
ADAPTERS = {"two_halves": 2, "one_half": 1}
PROMPT_LENGTH, STEPS, SEED = 5, 10, 4


def train(name: str, submodules: int, examples: list[dict]) -> pathlib.Path:
    torch.manual_seed(SEED + submodules)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32)
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=PROMPT_LENGTH, num_transformer_submodules=submodules
    )
    model = get_peft_model(base, config).eval()  # eval: no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [list(p.shape) for p in trained] == [[PROMPT_LENGTH * submodules, base.config.d_model]]
    optimizer = torch.optim.AdamW(trained, lr=0.5)
    for _ in range(STEPS):
        model(**check.padded(examples)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = MODEL.name  # not a path of the machine that made it
    directory = OUT / "peft" / name
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    return directory


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(OUT / "peft", ignore_errors=True)
    golden = json.loads((MODEL / "meta.json").read_text())
    examples = [{"input": x, "target": y} for x, y in zip(golden["inputs"], golden["targets"], strict=True)]
    results = {}
    for name, submodules in ADAPTERS.items():
        directory = train(name, submodules, examples)
        results[name] = check.results(check.load(MODEL, directory, torch.float32), examples, max_new_tokens=6)
    meta = {"made_by": "scripts/goldens/peft_adapter.py", **versions.used(), "model": MODEL.name, "prompt_length": PROMPT_LENGTH}
    meta |= {"max_new_tokens": 6, "examples": examples, "results": results}
    (OUT / "peft" / "batch.json").write_text(versions.compact_json(meta))
    print(json.dumps(results, indent=1), peft.__version__)


if __name__ == "__main__":
    main()
