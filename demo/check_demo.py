#!/usr/bin/env python3
"""Tunes a prompt on the demo in plain PyTorch and prints how the accuracy climbs: the figures in README.md.

    OMP_NUM_THREADS=1 python check_demo.py --seeds 0 1 2 --steps 300 --eval-every 50

Only the prompt is learned; the recipe is the one of Lester et al. (2021): Adafactor as T5X has it (no
factoring, no parameter scaling, decay 0.8, clipping 1.0, weight decay 1e-5 that the rate does not scale),
lr 0.3. `--init`: `class-label` (row i = mean embedding of label i, the rest as `vocab`), `vocab`, `uniform`, or
`text:...` (its tokens' embeddings, repeated).
Needs torch, transformers, tokenizers, numpy (versions in make_demo.py).
"""

import argparse
import collections
import json
import pathlib
import time

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import T5ForConditionalGeneration

HERE = pathlib.Path(__file__).resolve().parent


def load(tokenizer, path):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    encode = lambda line: tokenizer.encode(line).ids
    return [(encode(r["inputs"]), encode(r["targets"]), r["targets"]) for r in rows]


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def with_prompt(model, prompt, rows):
    """Encoder input [prompt; embedded tokens] and its mask."""
    mask = pad([[1] * len(row) for row in rows], 0)
    embedded = model.shared(pad(rows, 0))
    if prompt is None:
        return embedded, mask
    ones = torch.ones(len(rows), len(prompt), dtype=torch.long)
    return torch.cat([prompt.expand(len(rows), -1, -1), embedded], 1), torch.cat([ones, mask], 1)


def initial_prompt(model, tokenizer, labels, length, init, seed):
    rng, embedding = np.random.default_rng([seed, 1 << 20]), model.shared.weight.detach()
    if init == "uniform":
        return torch.from_numpy(rng.uniform(-0.5, 0.5, (length, embedding.shape[1])).astype(np.float32))
    rows = []
    if init.startswith("text:"):
        ids = tokenizer.encode(init[5:], add_special_tokens=False).ids
        return embedding[[ids[i % len(ids)] for i in range(length)]].clone()
    if init == "class-label":
        pieces = [tokenizer.encode(label, add_special_tokens=False).ids for label in sorted(labels)[:length]]
        rows = [embedding[ids].mean(0) for ids in pieces]
    frequent = 3 + rng.permutation(min(5000, tokenizer.get_vocab_size() - 103))
    return torch.stack(rows + [embedding[int(i)] for i in frequent[: length - len(rows)]]).clone()


class Adafactor:
    def __init__(self, prompt, lr):
        self.prompt, self.lr, self.v, self.t = prompt, lr, torch.zeros_like(prompt), 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        decay, g = 1.0 - self.t**-0.8, self.prompt.grad
        self.v.mul_(decay).add_((1.0 - decay) * (g * g + 1e-30))
        update = g * self.v.rsqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        self.prompt.sub_(self.lr * update + 1e-5 * self.prompt)
        self.prompt.grad = None


@torch.no_grad()
def evaluate(model, prompt, tokenizer, examples, labels):
    """Accuracy (exact match of the greedy output), the share of legal outputs, and the outputs."""
    outputs = []
    for i in range(0, len(examples), 100):
        rows = [e[0] for e in examples[i : i + 100]]
        embedded, mask = with_prompt(model, prompt, rows)
        encoded = model.encoder(inputs_embeds=embedded, attention_mask=mask)
        out = torch.zeros(len(rows), 1, dtype=torch.long)
        for _ in range(8):
            again = model(
                encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=out, use_cache=False
            )
            out = torch.cat([out, again.logits[:, -1].argmax(-1, keepdim=True)], 1)
        outputs += [tokenizer.decode(o[: o.index(1)] if 1 in o else o) for o in out[:, 1:].tolist()]
    right = sum(o == e[2] for o, e in zip(outputs, examples))
    return right / len(examples), sum(o in labels for o in outputs) / len(examples), outputs


def tune(model, tokenizer, train, dev, args, seed):
    labels = {e[2] for e in train}
    prompt = initial_prompt(model, tokenizer, labels, args.prompt_length, args.init, seed).requires_grad_()
    optimizer, start, losses = Adafactor(prompt, args.lr), time.time(), []

    def report(step):
        accuracy, legal, _ = evaluate(model, prompt, tokenizer, dev, labels)
        loss = np.mean(losses[-args.eval_every :]) if losses else np.nan
        line = f"seed {seed} step {step:4d} loss {loss:.3f} accuracy {accuracy:.3f} legal {legal:.3f}"
        print(line, f"{time.time() - start:.0f} s", flush=True)

    report(0)
    per_epoch = len(train) // args.batch_size
    for step in range(args.steps):
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        part = [train[i] for i in order[k * args.batch_size : (k + 1) * args.batch_size]]
        embedded, mask = with_prompt(model, prompt, [e[0] for e in part])
        loss = model(inputs_embeds=embedded, attention_mask=mask, labels=pad([e[1] for e in part], -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % args.eval_every == 0:
            report(step + 1)
    return prompt.detach()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=pathlib.Path, default=HERE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompt-length", type=int, default=20)
    parser.add_argument("--init", default="class-label", help="class-label, vocab, uniform, text:...")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.3)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.demo / "model" / "tokenizer.json"))
    model = T5ForConditionalGeneration.from_pretrained(args.demo / "model", dtype=torch.float32)
    model.eval().requires_grad_(False)
    train, dev = (load(tokenizer, args.demo / "data" / f"{s}.jsonl") for s in ("train", "eval"))
    counts = collections.Counter(e[2] for e in dev)
    accuracy, legal, outputs = evaluate(model, None, tokenizer, dev, set(counts))
    print(f"majority {max(counts.values()) / len(dev):.3f}")
    print(f"untuned, no prompt: accuracy {accuracy:.3f} legal {legal:.3f}", outputs[:4])
    longest = [max(len(e[k]) for e in train + dev) for k in (0, 1)]
    print("longest input and target, in tokens:", *longest)
    for seed in args.seeds:
        tune(model, tokenizer, train, dev, args, seed)


if __name__ == "__main__":
    main()
