#!/usr/bin/env python3
"""Makes a small corpus of plain English, for small models that are pretrained with `incipit pretrain`.

The text comes from packages of Debian (bookworm), which `apt-get download` fetches: WordNet's glosses, the GNU Collaborative
International Dictionary of English, the Free On-line Dictionary of Computing, fortunes, An Anarchist FAQ; and from the training
splits of labelled sets, without their labels. A document is a line. OUT/train.txt and OUT/held-out.txt (one document in 200) are
written; texts of the labelled sets' other splits are left out of both.

    scripts/results/corpus.py --data DIR --out OUT [--packages DIR]

DIR holds `<set>/{train,dev,test}.jsonl`, as docs/results/README.md tells. Python's own library is all that is needed.
"""

import argparse
import gzip
import html
import json
import pathlib
import random
import re
import subprocess

PACKAGES = ["dict-gcide", "dict-foldoc", "fortunes", "anarchism", "wordnet-base"]
SETS = {"trec": ["question"], "sst2": ["sentence"], "subj": ["sentence"]}
# Sentences of the labelled sets are few beside the rest, and are what the models are asked about later.
SET_REPEATS = 8


def fetch(folder):
    """Downloads and unpacks the packages that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        root = folder / package
        if root.exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive, root], check=True)


def dictionary(path):
    """Definitions of a dictd file, one a document: paragraphs that are indented."""
    text = gzip.open(path).read().decode("utf-8", "replace")
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.startswith(" "):
            paragraph = paragraph.partition("\n")[2]
        paragraph = re.sub(r"\[[^\]]*\]|[{}]", "", paragraph)
        yield re.sub(r"^\s*\d+\.\s*", "", paragraph)


def glosses(folder):
    for path in sorted(folder.glob("data.*")):
        for line in path.read_text("utf-8", "replace").splitlines():
            if " | " in line:
                yield line.partition(" | ")[2].replace(";", ",")


def fortunes(folder):
    for path in sorted(folder.iterdir()):
        if path.suffix == "" and path.is_file():
            yield from path.read_text("utf-8", "replace").split("\n%\n")


def pages(folder):
    for path in sorted(folder.rglob("*.html")):
        for block in re.findall(r"<p>(.*?)</p>", path.read_text("utf-8", "replace"), re.S):
            yield html.unescape(re.sub(r"<[^>]+>", "", block))


def sentences(data):
    for name, fields in SETS.items():
        for line in (data / name / "train.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            yield " ".join(record[field] for field in fields)


def held(data):
    """Texts that no model may have seen."""
    texts = set()
    for name, fields in SETS.items():
        for split in ["dev", "test"]:
            for line in (data / name / f"{split}.jsonl").read_text("utf-8").splitlines():
                texts.update(json.loads(line)[field].strip().lower() for field in fields)
    return texts


def clean(text):
    return re.sub(r"\s+", " ", text).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--packages", type=pathlib.Path, default=pathlib.Path("packages"))
    args = parser.parse_args()
    fetch(args.packages)
    share = {package: args.packages / package / "usr/share" for package in PACKAGES}
    documents = [
        *dictionary(share["dict-gcide"] / "dictd/gcide.dict.dz"),
        *dictionary(share["dict-foldoc"] / "dictd/foldoc.dict.dz"),
        *glosses(share["wordnet-base"] / "wordnet"),
        *fortunes(share["fortunes"] / "games/fortunes"),
        *pages(share["anarchism"] / "doc/anarchism/html"),
    ]
    documents = [clean(text) for text in documents]
    unseen = held(args.data)
    own = [text for text in (clean(text) for text in sentences(args.data)) if text.lower() not in unseen]
    documents = [text for text in documents if len(text) > 30 and text.lower() not in unseen] + own * SET_REPEATS
    random.Random(0).shuffle(documents)
    args.out.mkdir(parents=True, exist_ok=True)
    # A document of the labelled sets is there several times, so that its text must not be in the other part.
    evaluation = set(documents[::200])
    for name, part in [
        ("held-out", sorted(evaluation)),
        ("train", [text for text in documents if text not in evaluation]),
    ]:
        path = args.out / f"{name}.txt"
        path.write_text("".join(text + "\n" for text in part), "utf-8")
        print(f"{path}: {len(part)} documents, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
