"""Records for make.py, written by hand in the benchmarks' own forms. What is odd about each is what the published files have too."""

import gzip
import json
import pathlib

HIGHLIGHTS = (
    'The keeper fed Émile, a 東京 otter. "He eats a lot."\n@highlight\nÉmile is four\n@highlight\nHe likes crabs!\n@highlight\n'
    "So does Anna"
)


def entity(passage: str, word: str) -> dict:
    start = passage.index(word)
    return {"start": start, "end": start + len(word) - 1}


def record_passage(idx: int, answers: list[list[str]] | None) -> dict:
    words = ["Émile", "東京", "Anna", "crabs", "Émile"]
    queries = ["@placeholder is an otter.", "It is from @placeholder."]
    qas = [{"query": query, "idx": 10 * idx + i} for i, query in enumerate(queries)]
    for qa, texts in zip(qas, answers or []):
        qa["answers"] = [entity(HIGHLIGHTS, word) | {"text": word} for word in texts]
    return {
        "source": "by hand",
        "passage": {"text": HIGHLIGHTS, "entities": [entity(HIGHLIGHTS, word) for word in words]},
        "qas": qas,
        "idx": idx,
    }


def multirc_passage(idx: int, labelled: bool) -> dict:
    answers = [["two", "<b>three</b>", "none<br>at all"], ["the cat"]]
    questions, answer_idx = [], 100 * idx
    for number, texts in enumerate(answers):
        listed = []
        for place, answer in enumerate(texts):
            listed.append({"text": answer, "idx": answer_idx} | ({"label": place % 2} if labelled else {}))
            answer_idx += 1
        questions.append({"question": f"How many cats  sat there, {number}?", "answers": listed, "idx": 10 * idx + number})
    paragraph = "<b>Sent 1: </b>Three cats sat.<br><b>Sent 2: </b>One left.<br>"
    return {"idx": idx, "version": 1.1, "passage": {"text": paragraph, "questions": questions}}


def wsc(idx: int, text: str, noun: tuple[str, int], pronoun: tuple[str, int], label: bool | None) -> dict:
    target = {"span1_text": noun[0], "span1_index": noun[1], "span2_text": pronoun[0], "span2_index": pronoun[1]}
    return {"text": text, "target": target, "idx": idx} | ({} if label is None else {"label": label})


ANN = "Ann's dog chased the cat because it was cross."
WSC_RECORDS = [
    (ANN, ("Ann's dog", 0), ("it", 6), True),
    (ANN, ("The cat", 3), ("it", 6), False),  # the case of the text is other
    ("Tom gave his X to Bill ; he was  glad .", ("Tom.", 0), ("he", 7), True),  # an X of its own, a full stop too many
    ("He says that Mark told Pete he was late", ("Pete", 5), ("he", 6), True),
    ("Nobody liked the big red bus after we painted it", ("the big red\nbus", 2), ("it", 9), True),  # the pronoun is last
    (
        "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out quite loud. "
        '"Good for him," he said. ',
        ("John", 15), ("him", 22), False,
    ),
    (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic pebble in an iron safe . Some day they "
        "might want to use it , but really for now, what more could they wish for?",
        ("the magic pebble", 16), ("it", 28), True,
    ),
]  # fmt: skip


def super_glue() -> dict[str, dict[str, list[dict]]]:
    boolq = {"question": "is the café's “menu” long", "passage": "Café -- It isn't: 3 dishes.\tAnd tea. "}
    cb = {"premise": "B: I don't think so.  A: Uh-huh.", "hypothesis": "it is so"}
    copa = {"premise": "The cup broke.", "choice1": "It fell.", "choice2": "It was red.", "question": "cause"}
    rte = {"premise": "Zürich is in \"Switzerland\".", "hypothesis": "Zürich is Swiss: yes."}
    wic = {"word": "bank", "sentence1": "The bank  closed.", "sentence2": "They sat on the bank.", "start1": 4, "end1": 8, "start2": 16, "end2": 20}
    kinds = {
        "BoolQ": (boolq, [True, False]),
        "CB": (cb, ["contradiction", "entailment", "neutral"]),
        "COPA": (copa, [1, 0]),
        "RTE": (rte, ["not_entailment", "entailment"]),
        "WiC": (wic, [True, False]),
    }
    files = {}
    for folder, (record, labels) in kinds.items():
        labelled = [record | {"label": label, "idx": idx} for idx, label in enumerate(labels)]
        files[folder] = {"train": labelled, "val": labelled[:1], "test": [record | {"idx": 7}]}
    both = [["Émile", "Émile"], ["東京", "Anna"]]
    files["ReCoRD"] = {
        "train": [record_passage(0, both), record_passage(1, both[::-1])],
        "val": [record_passage(2, both)],
        "test": [record_passage(3, None)],
    }
    files["MultiRC"] = {"train": [multirc_passage(0, True)], "val": [multirc_passage(1, True), multirc_passage(2, True)], "test": [multirc_passage(3, False)]}
    schemas = [wsc(idx, *row) for idx, row in enumerate(WSC_RECORDS)]
    files["WSC"] = {"train": schemas, "val": schemas, "test": [wsc(9, *WSC_RECORDS[0][:3], None)]}
    return files


GLUE = {
    "SST-2/train.tsv": ["sentence\tlabel", "hide new secretions from the parental units \t0", 'a "fine film \t1', "l' été , naïf -- \t1"],
    "SST-2/dev.tsv": ["sentence\tlabel", "it 's a charming journey . \t1"],
    "SST-2/test.tsv": ["index\tsentence", "0\tuneasy mishmash", '1\t"open'],
    # the second row ends in its first question, the third has no label
    "QQP/train.tsv": [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        '0\t1\t2\tWhat is "5 inch?\tWhat\'s 5"?\t0',
        "1\t3\t4\tIs this cut",
        "2\t5\t6\tHow?\tWhy?\t",
        "3\t7\t8\tWho is Émile?\tWho's  \"Émile\"?\t1",
    ],
    "QQP/dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "9\t1\t2\tA?\tB?\t1"],
    "QQP/test.tsv": ["id\tquestion1\tquestion2", '0\t"Would the\tIs it "so"?'],
    "RTE/train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tNo \"WMD's\" found.\tWMD found.\tnot_entailment", "1\tA man is.\tA man.\tentailment"],
    "RTE/dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tDana died.\tDana lives.\tnot_entailment"],
    "RTE/test.tsv": ["index\tsentence1\tsentence2", "0\tOne.\tTwo."],
    "MNLI/train.tsv": [
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains .\tIt 's \"wet\tneutral\tneutral",
        "1\t1\t1e\ttelephone\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tyeah i know\tI know.\tentailment\tentailment",
    ],
    "MRPC/msr_paraphrase_train.txt": [
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tAmrozi called "the witness" his brother.\tHe called him "the witness.',
        "0\t2108705\t2108831\tYucaipa owned it.\tYucaipa sold it for $1.8bn.",
        "1\t1330381\t1330521\tThey had published it.\tIt was published — on June 10.",
    ],
    "MRPC/dev_ids.tsv": ["2108705\t2108831", "1\t2"],
    "MRPC/test.tsv": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", '0\t1089874\t1089925\tPCCW\'s "chief.\tCurrent chief.'],
}
for kind in ["matched", "mismatched"]:
    parts = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
    row = f"0\t63735\t63735n\tslate\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tThe new rights are nice ({kind}).\tRights  are nice."
    GLUE[f"MNLI/dev_{kind}.tsv"] = [parts + "\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label", row + "\tneutral\tentailment\tneutral\tneutral\tneutral\tneutral"]
    GLUE[f"MNLI/test_{kind}.tsv"] = [parts, row]


CONTEXT = "The U.S.A.'s “old”\nflag (1777) —  by O'Neill_Jr. — cost $1,000.50;\tnaïve 東京、Tokyo\u00a0people\u2009agreed!"


def squad() -> dict[str, dict]:
    def answers(*texts):
        return [{"text": text, "answer_start": CONTEXT.index(text)} for text in texts]

    questions = [
        {"id": "a", "question": "Whose flag,  exactly?", "answers": answers("The U.S.A.'s", "U.S.A.", "U.S.A.", "The U.S.A.'s “old”")},
        {"id": "b", "question": " What's the cost?\n", "answers": answers("$1,000.50")},
        {"id": "c", "question": "Who?", "answers": answers("東京、Tokyo", "O'Neill_Jr.")},
    ]
    paragraphs = [{"context": CONTEXT, "qas": questions[:2]}, {"context": " " + CONTEXT, "qas": questions[2:]}]
    whole = {"data": [{"title": "Flag", "paragraphs": paragraphs[:1]}, {"title": "Two", "paragraphs": paragraphs[1:]}], "version": "1.1"}
    return {"train": whole, "dev": {"data": whole["data"][1:], "version": "1.1"}}


def mrqa(name: str) -> list[dict]:
    def question(qid, asked, detected, answers):
        spans = [{"text": text, "char_spans": [[0, 1]], "token_spans": [[0, 1]]} for text in detected]
        return {"qid": qid, "question": asked, "question_tokens": [], "detected_answers": spans, "answers": answers}

    return [
        {"header": {"dataset": name, "split": "dev"}},
        {
            "id": "", "context": CONTEXT, "context_tokens": [],
            "qas": [
                question("q1", "Whose\n flag?", ["U.S.A."], ["The U.S.A.", "U.S.A.", "US"]),
                question("q2", "“Who”\u2003agreed?", ["Tokyo\u00a0people", "people"], ["Tokyo people", "東京"]),
            ],
        },
        {"id": "", "context": "[TLE] A title [PAR] TP53 is a gene.", "context_tokens": [], "qas": [question("q3", "Which gene?", ["TP53"], ["P53 / TP53"])]},
    ]  # fmt: skip


# What predictions of answers are made of; some have no token after normalisation.
ANSWERS = [
    "The Norman conquest", "norman Conquest!", "in 1066", "1066", "U.S.A.", "U . S . A . ", "Émile  Zola", "émile zola", "a cat, an owl and the dog", "cat owl dog",
    "well-known fact", "cat cat cat dog", "the", "A", "...", "東京 都", "$1,000", "1000", "O'Neill", "state_of_the_art", "a–b",
]  # fmt: skip

# Predictions, referents, and whether the referent is right.
REFERENTS = [
    ("Bob", "Bob", True), ("Bob", "Bob", False), ("bob", "The Bob", True), ("fuzzy bunny", "the bunny", True), ("bunny", "fuzzy bunny", False),
    ("Bob", "Bob's hat", True), ("Bob", "Bob's hat", False), ("Bob's hat", "bob's hat", True), ("", "Bob", True), ("", "Bob", False), ("the", "Bob", False),
    ("his", "his", True), ("big dog", "small dog", True), ("big dog", "small dog", False), (" The  cat ", "cat", True), ("a  cat", "cat ball", False),
    ("cat.", "cat", True), ("Émile", "émile", True), ("dog cat", "cat dog dog", True), ("those men", "Men", False), ("\tcat\n", "cat", True), ("’s", "'s", True),
    ("hat", "Bob's hat", True), ("hat", "Bob's hat", False), ("Bob's big hat", "hat", True), ("big", "the very big hat", False),
]  # fmt: skip


def write(folder: pathlib.Path) -> None:
    def put(name: str, content: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def lines(records: list[dict]) -> str:
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    for task, splits in super_glue().items():
        for split, records in splits.items():
            put(f"{task}/{split}.jsonl", lines(records))
    for name, rows in GLUE.items():
        put(name, "\n".join(rows) + "\n")
    for split, whole in squad().items():
        put(f"SQuAD/{split}-v1.1.json", json.dumps(whole, ensure_ascii=False))
    for name in ["BioASQ", "train/HotpotQA", "dev/HotpotQA"]:
        path = folder / "MRQA" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines(mrqa(path.name.split(".")[0])).encode("utf-8"), mtime=0))
