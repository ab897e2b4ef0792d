#!/usr/bin/env python3
"""What PEFT makes of an adapter that Incipit wrote: its loss and its greedy outputs, as JSON.

    python check_peft_export.py --model DIR --adapter out/adapter --data F.jsonl

A line of the data has "input" and "target" as token ids (each ending with </s>), or "inputs" and "targets" as text, which the model
directory's tokenizer turns into ids. "loss" is the mean over all target tokens, as `incipit eval` reports it.
"""

import argparse
import json
import pathlib

import torch
import transformers
from peft import PeftModel


def load(model: pathlib.Path, adapter: pathlib.Path, dtype: torch.dtype) -> PeftModel:
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model, dtype=dtype)
    return PeftModel.from_pretrained(base, adapter).eval()


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    inputs, targets = [e["input"] for e in examples], [e["target"] for e in examples]
    width, height = max(map(len, inputs)), max(map(len, targets))
    return {
        "input_ids": torch.tensor([x + [0] * (width - len(x)) for x in inputs]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in inputs]),
        "labels": torch.tensor([y + [-100] * (height - len(y)) for y in targets]),
    }


@torch.no_grad()
def results(model: PeftModel, examples: list[dict], max_new_tokens: int) -> dict:
    batch = padded(examples)
    losses = [model(**padded([example])).loss.item() for example in examples]
    generated = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
    )
    rows = [row[1:] for row in generated.tolist()]
    return {
        "loss": model(**batch).loss.item(),
        "losses": losses,
        "greedy": [row[: row.index(1)] if 1 in row else row for row in rows],
    }


def read(path: pathlib.Path, model: pathlib.Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if all("input" in record and "target" in record for record in records):
        return records
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [{"input": tokenizer(r["inputs"]).input_ids, "target": tokenizer(r["targets"]).input_ids} for r in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--adapter", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    examples = read(args.data, args.model)
    model = load(args.model, args.adapter, getattr(torch, args.dtype))
    print(json.dumps(results(model, examples, args.max_new_tokens)))


if __name__ == "__main__":
    main()
