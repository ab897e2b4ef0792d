#!/usr/bin/env python3
"""Makes the bundled demo: a very small T5 v1.1, and the data of a task that it was never trained on.

    OMP_NUM_THREADS=1 python make_demo.py                # everything, 6 to 12 minutes on one thread
    OMP_NUM_THREADS=1 python make_demo.py --only data    # only data/*.jsonl (seconds)

Provenance: all text comes from the word lists and templates in demo_text.py, which were written for this
demo; the weights start from random numbers and are trained here on that text alone. Nothing is downloaded.

Made with: Python 3.11, torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3,
safetensors 0.8.0, numpy 2.4.6, protobuf 7.36.2. The data come out the same everywhere; the weights' last bits
depend on the CPU (bfloat16 autocast) and the torch build.

What pretraining sees (README.md says more): questions before letters and notices, answered in other words
than the demo's labels (half of the examples), beginnings with their continuation as target (a quarter), and
span corruption as in T5 (a quarter). No letter ever has a label as its target, and no question is answered
by one.
"""

import argparse
import collections
import io
import json
import math
import pathlib
import random
import re
import string
import time

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5ForConditionalGeneration

import demo_text as text

SEED = 20210418
PIECES, EXTRA_IDS, VOCABULARY = 900, 100, 1024  # 24 rows are unused, as in published T5
TRAIN_LETTERS, EVAL_LETTERS = 1600, 300
STEPS, BATCH, PEAK_LR, WARMUP = 3000, 32, 1.5e-3, 200
PAD, EOS = 0, 1
WORDS = text.NAMES + text.TOWNS + text.ITEMS + text.COLOURS + text.SORTS + text.DAYS
WORDS += re.findall(r"\b[a-z]+\b", " ".join(line for lines in text.EVENTS.values() for line in lines))
FIRST_SENTINEL = PIECES + EXTRA_IDS - 1  # the id of <extra_id_0>; the others count down
EMBEDDING_RMS = 4.0  # what saving brings the embedding near to, by a power of two
CONFIG = dict(
    vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=320, num_heads=4, num_layers=3, num_decoder_layers=3,
    feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=32,
    relative_attention_max_distance=128, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    tie_word_embeddings=False,
)


# ---- data of the demo task ------------------------------------------------------------------------------


def write_data(out: pathlib.Path):
    """Letters without their wishes as inputs and the desk's name as target; no letter is in both files."""
    out.mkdir(parents=True, exist_ok=True)
    seen = set()
    splits = [("train", text.TRAIN_PHRASINGS, TRAIN_LETTERS), ("eval", text.EVAL_PHRASINGS, EVAL_LETTERS)]
    for split, phrasings, count in splits:
        rng, rows = random.Random(f"{SEED} {split}"), []
        while len(rows) < count:
            letter = text.make_letter(rng, phrasings)
            if any(label in letter.text() for label in text.LABELS.values()):
                raise SystemExit(f"a letter names a label: {letter.text()}")
            if letter.text() not in seen:
                seen.add(letter.text())
                rows.append({"inputs": letter.text(), "targets": text.LABELS[letter.reason]})
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- tokenizer ------------------------------------------------------------------------------------------


def corpus(count: int):
    """Lines for the tokenizer: letters, notices and every question."""
    rng = random.Random(f"{SEED} tokenizer")
    for _ in range(count):
        yield text.make_letter(rng, text.ALL_PHRASINGS).text(with_wish=True)
        yield text.make_notice(rng)[0]
        question = rng.choice(list(text.QUESTIONS.values()))
        answers = sum(text.FEELINGS.values(), list(text.KINDS))
        yield f"{rng.choice(question)} {rng.choice(answers)}"


def pieces_of(lines, model) -> list:
    """(piece, score), best first: the corpus' whole words, then the trained pieces as parts of other words.

    SentencePiece alone would cut half of the words: it starts from strings that stand in two distinct words.
    """
    counts = collections.Counter("\u2581" + w for line in lines for w in re.findall(r"[A-Za-z]+", line))
    total = sum(counts.values())
    scored = {word: math.log(n / total) for word, n in counts.items()}
    parts = [(p.piece, p.score - 6.0) for p in model.pieces if p.type == p.NORMAL and p.piece not in scored]
    parts.sort(key=lambda part: (len(part[0]) > 1, -part[1]))  # every single character has to stay
    kept = list(scored.items()) + parts[: PIECES - 3 - len(scored)]
    return sorted(kept, key=lambda part: (-part[1], part[0]))


def make_tokenizer(out: pathlib.Path) -> Tokenizer:
    """spiece.model (the pieces) and tokenizer.json (pieces and 100 sentinels), with equal ids."""
    lines, written = list(corpus(6000)), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=600, model_type="unigram",
        pad_id=PAD, eos_id=EOS, unk_id=2, bos_id=-1, num_threads=1, character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + ".,:;!?'\"()-", minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    pieces = pieces_of(lines, model)
    del model.pieces[3:]
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=model.SentencePiece.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    (out / "spiece.model").write_bytes(model.SerializeToString())
    return fast_tokenizer(model, out)


def fast_tokenizer(model, out: pathlib.Path) -> Tokenizer:
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(EXTRA_IDS))]
    vocab = [(p.piece, p.score if p.type == p.NORMAL else 0.0) for p in model.pieces]
    tokenizer = Tokenizer(models.Unigram(vocab + [(s, 0.0) for s in sentinels], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
        normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " "),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    special = ["<pad>", "</s>", "<unk>"] + sentinels
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    return tokenizer


# ---- pretraining examples -------------------------------------------------------------------------------


def example(rng: random.Random, tokenizer: Tokenizer):
    """One (encoder ids, target ids), both ending with </s>."""
    letter, kind = text.make_letter(rng, text.ALL_PHRASINGS), rng.random()
    notice, facts = text.make_notice(rng)
    about_letter = rng.random() < 0.85
    if kind < 0.5:
        return question(rng, tokenizer, letter, None if about_letter else (notice, facts))
    if kind < 0.75:
        return continuation(rng, tokenizer, letter, notice, about_letter)
    body = letter.text(with_wish=True) if about_letter else notice
    return corrupt(rng, encode(tokenizer, f"{noise(rng)} {body}")[:-1])


def encode(tokenizer, line):
    return tokenizer.encode(line).ids


def question(rng, tokenizer, letter, notice):
    """A question, then a letter (or a notice and its facts, where it has any), and the answer."""
    body, facts = notice if notice and notice[1] else (None, letter.facts)
    body = body or letter.text(with_wish=rng.random() < 0.5)
    key = rng.choice(sorted(facts))
    in_intro, in_purchase = key in ("name", "town"), key in ("item", "day", "adj")
    if not notice and (in_intro or in_purchase) and rng.random() < 0.5:
        body = letter.sentences[in_purchase]  # only the sentence that has the answer: learned faster
    asked = f"{noise(rng)} {rng.choice(text.QUESTIONS[key])} {noise(rng)} {body}"
    return encode(tokenizer, asked), encode(tokenizer, facts[key])


def noise(rng):
    """Now and then some words that mean nothing: the model must read on past what it does not know."""
    return " ".join(rng.choices(WORDS, k=rng.choice([0, 0, 0, rng.randint(1, 12)])))


def continuation(rng, tokenizer, letter, notice, about_letter):
    """A beginning, and what follows: the wish, the next sentence, or the next words."""
    if about_letter and rng.random() < 0.5:
        return encode(tokenizer, f"{noise(rng)} {letter.text()}"), encode(tokenizer, letter.wish)
    if about_letter and rng.random() < 0.5:
        sentences = letter.sentences + [letter.wish]
        cut = rng.randrange(1, len(sentences))
        return encode(tokenizer, " ".join(sentences[:cut])), encode(tokenizer, sentences[cut])
    words = (letter.text(with_wish=True) if about_letter else notice).split()
    cut = rng.randrange(2, len(words) - 1)
    return encode(tokenizer, " ".join(words[:cut])), encode(tokenizer, " ".join(words[cut : cut + 10]))


def corrupt(rng, ids):
    """T5's span corruption: spans of 1 to 4 tokens (about 15 %) become sentinels; the target is the spans."""
    source, target, i, sentinel = [], [], 0, FIRST_SENTINEL
    while i < len(ids):
        if rng.random() < 0.07 and (not source or source[-1] < PIECES):
            length = rng.randint(1, 4)
            source.append(sentinel)
            target += [sentinel] + ids[i : i + length]
            sentinel, i = sentinel - 1, i + length
        else:
            source.append(ids[i])
            i += 1
    return source + [EOS], target + [sentinel, EOS]


def batches(tokenizer):
    """Endless batches of like lengths, so that little is padding."""
    rng = random.Random(f"{SEED} pretraining")
    while True:
        pool = sorted((example(rng, tokenizer) for _ in range(BATCH * 16)), key=lambda e: len(e[0]))
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            yield pad([e[0] for e in group], PAD), pad([e[1] for e in group], -100)


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# ---- model ----------------------------------------------------------------------------------------------


def make_model() -> T5ForConditionalGeneration:
    """A fresh T5 v1.1. transformers 5 ties every fresh T5's head; a parameter of its own unties it."""
    torch.manual_seed(SEED)
    model = T5ForConditionalGeneration(T5Config(**CONFIG))
    model.config.tie_word_embeddings = False
    model.config.scale_decoder_outputs = False
    head = torch.randn(VOCABULARY, CONFIG["d_model"]) * CONFIG["d_model"] ** -0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    torch.nn.init.normal_(model.shared.weight)
    assert model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
    return model


def mean_over_examples(logits, y):
    """Cross-entropy with the same weight for each example: else answers, being short, count too little."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none", ignore_index=-100)
    return (losses.sum(1) / (y != -100).sum(1)).mean()


def pretrain(model, tokenizer, steps, log):
    groups = [
        dict(params=[p for n, p in model.named_parameters() if "shared" in n or "relative" in n], scale=5.0),
        dict(params=[p for n, p in model.named_parameters() if n.endswith("q.weight")], scale=0.2),
    ]
    chosen = {id(p) for group in groups for p in group["params"]}
    groups.append(dict(params=[p for p in model.parameters() if id(p) not in chosen], scale=1.0))
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    start, losses = time.time(), []
    for step, (x, y) in zip(range(1, steps + 1), batches(tokenizer)):
        progress = max(0, step - WARMUP) / max(1, steps - WARMUP)
        rate = PEAK_LR * min(step / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x, attention_mask=(x != PAD).long(), labels=y).logits
        loss = mean_over_examples(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            log(f"step {step}  loss {np.mean(losses[-100:]):.3f}  {time.time() - start:.0f} s")


@torch.no_grad()
def skills(model, tokenizer, count=200):
    """Exact match of greedy answers to each kind of question on fresh letters."""
    rng, report = random.Random(f"{SEED} skills"), {}
    for key in text.make_letter(rng, text.ALL_PHRASINGS).facts:
        letters = [text.make_letter(rng, text.ALL_PHRASINGS) for _ in range(count)]
        x = pad([encode(tokenizer, f"{rng.choice(text.QUESTIONS[key])} {l.text()}") for l in letters], PAD)
        out = model.generate(input_ids=x, attention_mask=(x != PAD).long(), max_new_tokens=8, do_sample=False)
        answers = [tokenizer.decode(o) for o in out.tolist()]
        report[key] = sum(a == l.facts[key] for a, l in zip(answers, letters)) / count
    return report


@torch.no_grad()
def save(model, directory: pathlib.Path):
    """config.json and model.safetensors (bfloat16), as Hugging Face has T5 v1.1.

    The embedding and every output matrix of the residual branches are multiplied by one power of two: for
    RMSNorm (but for its epsilon) that is the same function. It sets how far learning rate 0.3 carries a
    prompt in one step. Published T5 v1.1 checkpoints have an RMS of about 10; here it is about 4, as if
    the rate were about twice that, since a demo has 300 steps and not 30,000.
    """
    rms = model.shared.weight[: PIECES].square().mean().sqrt().item()
    factor = 2.0 ** round(math.log2(EMBEDDING_RMS / rms))
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("embed_tokens.weight"):
            continue  # the same tensor as shared.weight
        in_residual = name == "shared.weight" or name.endswith((".o.weight", ".wo.weight"))
        tensors[name] = (value * factor if in_residual else value).to(torch.bfloat16).contiguous().clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    extra = dict(architectures=["T5ForConditionalGeneration"], model_type="t5", is_encoder_decoder=True,
                 is_gated_act=True, dense_act_fn="gelu_new", layer_norm_epsilon=1e-6, torch_dtype="bfloat16")
    config = json.dumps({**CONFIG, **extra}, indent=2, sort_keys=True)
    (directory / "config.json").write_text(config + "\n")
    return rms * factor


@torch.no_grad()
def verify(model, directory: pathlib.Path, tokenizer):
    """What was saved, read by transformers, is what was trained: an untied head and nearly the same loss."""
    again = T5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    x, y = next(batches(tokenizer))
    losses = [m(input_ids=x, attention_mask=(x != PAD).long(), labels=y).loss.item() for m in (model, again)]
    if torch.equal(again.lm_head.weight, again.shared.weight) or abs(losses[0] - losses[1]) > 0.02:
        raise SystemExit(f"the saved model is not the trained one: losses {losses}")
    return losses


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--out", type=pathlib.Path, default=here)
    parser.add_argument("--only", choices=["data"])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    write_data(args.out / "data")
    if args.only:
        return
    directory = args.out / "model"
    directory.mkdir(exist_ok=True)
    tokenizer, model = make_tokenizer(directory), make_model()
    pretrain(model, tokenizer, args.steps, lambda line: print(line, flush=True))
    print("embedding RMS", save(model, directory))
    print("losses before and after saving", verify(model, directory, tokenizer))
    print("exact match of answers", skills(model, tokenizer))


if __name__ == "__main__":
    main()
