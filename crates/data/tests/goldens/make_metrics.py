#!/usr/bin/env python3
"""Writes metrics.json beside this file: predictions, targets and the scores that the crate must give them.

Made with Python 3.11, scikit-learn 1.9.1, numpy 2.4.6. macro_f1, accuracy and confusion are scikit-learn's. token_f1 and
exact_match follow the definition of SQuAD's evaluation script, version 2.0: lower case; drop string.punctuation; drop
the words a, an, the; split at white space; F1 over the multisets of tokens; where one side has none, 1 if both have
none and else 0.

    pip install scikit-learn==1.9.1 && python make_metrics.py
"""
import json
import pathlib
import random
import re
import string
from collections import Counter

import sklearn
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

assert sklearn.__version__ == "1.9.1", sklearn.__version__


def tokens(answer):
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def token_f1(prediction, target):
    p, t = tokens(prediction), tokens(target)
    if not p or not t:
        return float(p == t)
    same = sum((Counter(p) & Counter(t)).values())
    return 0.0 if same == 0 else 2 * (same / len(p)) * (same / len(t)) / (same / len(p) + same / len(t))


def classification(seed, classes, count, illegal):
    rng = random.Random(seed)
    targets = [rng.choice(classes) for _ in range(count)]
    outputs = lambda t: rng.choice([t, t, rng.choice(classes)] + illegal)
    predictions = [outputs(t) for t in targets]
    seen = sorted(set(targets))
    folded = [p if p in seen else "~" for p in predictions]
    confusion = confusion_matrix(targets, folded, labels=seen + ["~"])[:-1]
    return {
        "predictions": predictions,
        "targets": targets,
        "accuracy": accuracy_score(targets, predictions),
        "macro_f1": f1_score(targets, predictions, labels=seen, average="macro", zero_division=0),
        "labels": seen,
        "confusion": confusion.tolist(),
    }


ANSWERS = [
    ("The Norman conquest", "Norman Conquest!"), ("a cat, an owl and the dog", "cat owl and dog"),
    ("in 1066", "1066"),
    ("", ""), ("the", "a"), ("", "answer"), ("answer", ""), ("Paris", "London"), ("U.S.A.", "USA"), ("a–b", "–b"),
    ("well-known fact", "well known fact"), ("Émile  Zola", "émile zola"), ("cat cat cat dog", "cat dog dog"),
    ("theatre", "the atre"),
    ("state_of_the_art", "state of the art"), ("it’s a 'test'", "it’s test"), ("東京 the 都", "東京 都"),
    ("tab\tand\nnewline", "tab and newline"),
    ("A", "B"), ("...", "!!!"), ("the the cat", "cat"), ("anthem", "an them"), ("$1,000", "1000"), ("x\u00a0y", "x y"),
]

cases = [
    classification(0, ["False", "True"], 40, ["maybe", ""]),
    classification(1, ["contradiction", "entailment", "neutral"], 60, ["entail"]),
    classification(2, ["a", "b", "c", "d", "e", "f"], 9, ["z", "zz"]),
    classification(3, ["only"], 5, ["other"]),
]
answers = [
    {"prediction": p, "target": t, "token_f1": token_f1(p, t), "exact_match": tokens(p) == tokens(t)}
    for p, t in ANSWERS
]
out = pathlib.Path(__file__).with_name("metrics.json")
text = json.dumps({"classification": cases, "answers": answers}, ensure_ascii=False)
out.write_text(text + "\n", encoding="utf-8")
