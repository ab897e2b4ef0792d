#!/usr/bin/env python3
"""A small real SentencePiece model, and what transformers' T5 tokenizer makes of awkward strings with it.

    python tokenizer.py train     # tests/goldens/tokenizer/spiece.model
    python tokenizer.py encode    # tests/goldens/tokenizer/strings.json and meta.json, from the committed spiece.model

The model is trained as T5's was: unigram, nmt_nfkc normalization, <pad> 0, </s> 1, <unk> 2, no <s>, no byte fallback. Its text
is four licences that Debian ships in /usr/share/common-licenses (each may be copied verbatim) and sentences made here.
"""

import argparse
import collections
import io
import json
import pathlib
import random
import tempfile

import sentencepiece
import tokenizers
import transformers

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "goldens" / "tokenizer"
LICENCES = ["Apache-2.0", "CC0-1.0", "MPL-2.0", "GPL-3"]
VOCAB_SIZE = 1000
SEED = 20

WHO = "the baker,a small dog,our teacher,Anna,the old sailor,every child,my neighbour,nobody,the engine,a prompt".split(",")
DOES = "reads,paints,forgets,repairs,is looking for,would like,sold,has never seen,tunes,carries".split(",")
WHAT = "a red boat,the long letter,twelve apples,the map of Lisbon,an answer,some bread,the last train,7 keys".split(",")
WHEN = "today,in the morning,before 9:30,on Monday,without a word,as always,in 1998,twice a week".split(",")
OTHER_TONGUES = [
    "Der Bäcker öffnet früh, weil die Straße schon voller Leute ist.",
    "L'été dernier, nous avons mangé des crêpes près du château.",
    "El niño pequeño mañana comerá piñones en el jardín.",
    "Älä jätä vettä pöydälle, kissa kaataa sen yöllä.",
    "Собака спит под старым деревом у реки.",
    "Η γάτα κοιμάται δίπλα στο παράθυρο.",
    "小さな犬が川のそばで眠っている。",
    "今天早上我买了两个苹果和一本书。",
    "강아지가 창문 옆에서 자고 있어요.",
]


def corpus() -> list[str]:
    lines = []
    for name in LICENCES:
        lines += (pathlib.Path("/usr/share/common-licenses") / name).read_text(encoding="utf-8").splitlines()
    choose = random.Random(SEED).choice
    for _ in range(3000):
        sentence = f"{choose(WHO)} {choose(DOES)} {choose(WHAT)} {choose(WHEN)}"
        lines.append(sentence[0].upper() + sentence[1:] + choose([".", "!", "?", ", it is said."]))
    return [line for line in lines if line.strip()] + OTHER_TONGUES * 5


def train() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=VOCAB_SIZE, model_type="unigram",
        normalization_rule_name="nmt_nfkc", character_coverage=0.9995, byte_fallback=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=1,
    )  # fmt: skip
    (OUT / "spiece.model").write_bytes(model.getvalue())


CHOSEN = [
    "", " ", "  ", "\t", "\n", "\r\n", "a", " a", "a ", "  a  b   c  ", "one\ttwo\nthree\r\nfour", "\u00a0non\u00a0breaking\u00a0",
    "zero\u200bwidth\u200cjoin\u200der", "\ufeffbyte order mark", "soft\u00adhyphen", "line\u2028separator\u2029here",
    "ideographic\u3000space", "thin\u2009space and\u202fnarrow", "▁", "▁▁ lower one eighth ▁block▁", "_underscore_ __init__",
    "</s>", "<pad>", "<unk>", "<s>", "a</s>b", "a </s> b", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<extra_id_0> x <extra_id_1>",
    "text<extra_id_7>text", " <extra_id_3> ", "<extra_id_00>", "<EXTRA_ID_0>", "< /s >", "</s></s>", "<pad><pad>word", "<unk>unk",
    "ﬁne ﬂour oﬀice", "Ｆｕｌｌｗｉｄｔｈ １２３！", "ｶﾀｶﾅ", "½ ¼ ² ³ ₂ Ⅷ ⑦ ㈱ ㎏ ℃ №", "e\u0301 vs é", "n\u0303 A\u030a o\u0308\u0304", "ΑΪ ϊ ΐ",
    "İstanbul ıI", "ß ẞ ſ", "Ǆ ǅ ǆ", "…‥․", "“quotes” ‘single’ «guillemets» „low‟", "dash – em — bar ― minus − hyphen‐",
    "price: €5, £3, ¥200, ₹9, ₿1", "50 % off!!! ???", "3.1415926535 1,000,000 1e-30 0xDEADBEEF", "2026-11-22T00:43:39Z", "9:30-17:45",
    "https://example.org/a?b=c&d=%20#frag", "name@example.org", "C:\\dir\\file.txt", "/usr/share/common-licenses/GPL-3",
    "fn main() { println!(\"{}\", 1 << 3); }", "{\"inputs\": \"a\", \"targets\": null}", "<b>bold</b><br/>", "a&amp;b &lt;", "{{literal}} {field}",
    "supercalifragilisticexpialidocious", "Donaudampfschifffahrtsgesellschaft", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "!" * 40, "。" * 9,
    "ALL CAPS SENTENCE", "cAmElCaSe snake_case kebab-case", "don't can't it's o'clock y'all've", "a.b.c. e.g. i.e. U.S.A.", "#hash @at $cash ^caret ~tilde `tick`",
    "Собака спит.", "Η γάτα", "小さな犬", "今天早上", "강아지가", "각 (jamo)", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "ქართული ენა", "Հայերեն", "አማርኛ", "தமிழ்", "ខ្មែរ", "Tiếng Việt có dấu", "Čeština žluťoučký kůň", "Łódź gżegżółka", "Ísland það æð",
    "😀", "👩‍👩‍👧‍👦 family", "👍🏽 tone", "🇩🇪🇫🇷", "❤️ vs ❤", "©®™ ℠", "∑∫√∞≠≤≥ αβγ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𝒜", "𠜎𠜱𡃁", "\U0001F9FF\U0010FFFD",
    "\x00nul", "bell\x07 back\x08 esc\x1b del\x7f", "c1\x85next\x9f", "vertical\x0btab form\x0cfeed", "private \ue000 use", "noncharacter \ufffe \uffff",
    "replacement \ufffd", "\u0301leading mark", "Z\u0334\u0335\u0336\u0337algo", "rtl \u202eoverride\u202c", "variation\ufe0f\ufe0e", "tag\U000E0061s",
    "question: Who reads? context: The baker reads.", "sentence1: a b sentence2: c d", "True", "False", "not_entailment", "0", "-1", "1,5",
]  # fmt: skip


def awkward_strings() -> list[str]:
    """The chosen ones, pairs of them, words of the corpus cut and glued, and random runs of awkward letters."""
    rng = random.Random(SEED + 1)
    words = " ".join(corpus()).split()
    letters = "aeioustnrE ,.'-\t\u00a0\u200b\u3000éßøñſﬁΩжש中の한😀▁<>/_0123\u0301\u0000\u00ad"
    made = list(CHOSEN)
    made += [rng.choice(["", " ", "  ", "\n"]).join(rng.sample(CHOSEN, rng.randint(2, 4))) for _ in range(120)]
    made += [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(100)]
    made += ["".join(w[: rng.randint(1, 5)] for w in rng.choices(words, k=rng.randint(2, 12))) for _ in range(60)]
    made += ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(160)]
    return list(dict.fromkeys(made))


def encode() -> None:
    with tempfile.TemporaryDirectory() as tmp:  # a directory with spiece.model alone, as T5 1.1's repositories are
        (pathlib.Path(tmp) / "spiece.model").write_bytes((OUT / "spiece.model").read_bytes())
        tokenizer = transformers.T5Tokenizer.from_pretrained(tmp)
    assert tokenizer.backend_tokenizer.normalizer is not None, "the precompiled normalizer is missing"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(OUT / "spiece.model"))
    rows, differences = [], collections.Counter()
    for text in awkward_strings():
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1 and all(0 <= i < len(tokenizer) for i in ids), text
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rows.append({"text": text, "ids": ids, "decoded": decoded})
        same = pieces.encode(text) == ids[:-1]
        differences["same" if same else "special token in the text" if "<" in text else "other"] += 1
    write_strings(rows)
    meta = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "sentencepiece": sentencepiece.__version__,
        "vocab_size": pieces.vocab_size(),
        "vocab_size_with_extra_ids": len(tokenizer),
        "strings": len(rows),
        "against_sentencepiece_itself": dict(differences),
    }
    (OUT / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(json.dumps(meta, indent=2))


def write_strings(rows: list[dict]) -> None:
    """One line a string; all but ASCII is escaped, so that editors and diffs leave it alone."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    (OUT / "strings.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "encode"])
    {"train": train, "encode": encode}[parser.parse_args().command]()
