#!/usr/bin/env python3
"""One prompt-tuning step as users of PyTorch, transformers and PEFT run it; the counterpart of `incipit bench step`.

    python peer_step.py --shape base --lengths 8x128 --dtype bf16 --steps 5 --json

get_peft_model(T5ForConditionalGeneration, PromptTuningConfig(...)), transformers' Adafactor, the batch padded to its longest example, random
weights of the real shapes (the head is not tied), dropout 0. Prints the median and the least time of a step after one that is not counted,
and the highest resident memory of this process from its start to its end; with --device cuda, the highest memory of the GPU besides.
"""

import argparse
import json
import resource
import statistics
import time

import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration
from transformers.optimization import Adafactor

import workload

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def random_model(config: dict, dtype: torch.dtype, device: str) -> T5ForConditionalGeneration:
    """Random weights, made in place in the wanted type: no f32 copy counts against the peak."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**{k: v for k, v in config.items() if k != "model_type"})).to(dtype)
        model.lm_head = torch.nn.Linear(config["d_model"], config["vocab_size"], bias=False, dtype=dtype)
    model = model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=1.0 if "shared" in name else 0.5 * parameter.shape[-1] ** -0.5)
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    return model


def padded_batch(lengths: list[int], target_length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (len(lengths), max(lengths)), generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.randint(3, vocab_size, (len(lengths), target_length), generator=random)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def measure(args: argparse.Namespace, config: dict, lengths: list[int]) -> list[float]:
    """Seconds of each counted step."""
    prompt = PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=args.prompt_length)
    model = get_peft_model(random_model(config, DTYPES[args.dtype], args.device), prompt).train().to(args.device)
    optimizer = Adafactor(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.3, weight_decay=1e-5, scale_parameter=False, relative_step=False,
    )  # fmt: skip
    if args.checkpointing:
        model.base_model.gradient_checkpointing_enable()
    batch = {k: v.to(args.device) for k, v in padded_batch(lengths, args.target_length, config["vocab_size"]).items()}
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert torch.isfinite(loss), "the loss is not finite"
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base", help="small, base, large, xl, xxl or a directory with a config.json")
    parser.add_argument("--lengths", default="8x128", help="96,82,131 or 8x128")
    parser.add_argument("--target-length", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, where they do not fit")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    config, lengths = workload.shape_config(args.shape), workload.parse_lengths(args.lengths)
    seconds = measure(args, config, lengths)
    result = {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # MiB
        "tokens": sum(lengths) + (args.prompt_length + args.target_length) * len(lengths),
        "useful_tflop": workload.useful_tflop(config, lengths, args.prompt_length, args.target_length),
    }
    if args.device != "cpu":
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(result) if args.json else "\n".join(f"{k:14}{v:.4g}" for k, v in result.items()))


if __name__ == "__main__":
    main()
