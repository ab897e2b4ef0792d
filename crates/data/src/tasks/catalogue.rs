//! The list of tasks.

use super::labelled::Fields;
use super::{Family, Form, Selection, Task, mrpc};
use crate::metrics::Metric;

const TRUTH: &[&str] = &["False", "True"];
const TWO_WAY: &[&str] = &["entailment", "not_entailment"];
const JSONL: [&[&str]; 3] = [&["train.jsonl"], &["val.jsonl", "dev.jsonl"], &["test.jsonl"]];
const ACCURACY: &[Metric] = &[Metric::Accuracy];
const ANSWERS: &[Metric] = &[Metric::ExactMatch, Metric::TokenF1];
const PARAPHRASE: &[Metric] = &[Metric::PositiveF1, Metric::Accuracy];

/// A field that the input and all files call the same.
macro_rules! same {
    ($($name:literal),+) => { &[$(($name, &[$name])),+] };
}

const fn fields(texts: &'static [(&'static str, &'static [&'static str])]) -> Form {
    Form::Labelled(Fields { texts, label: &["label"] })
}

/// A SuperGLUE task without its labels, for those that have the same of all else.
const fn super_glue(name: &'static str, folder: &'static str, title: &'static str, form: Form) -> Task {
    Task {
        name,
        title,
        family: Family::SuperGlue,
        folder,
        labels: &[],
        metrics: ACCURACY,
        selection: Selection::Mean,
        init_words: &[],
        files: JSONL,
        form,
    }
}

const fn with_labels(task: Task, labels: &'static [&'static str]) -> Task {
    Task { labels, init_words: labels, ..task }
}

/// A GLUE task with one development file.
const fn glue(name: &'static str, folder: &'static str, title: &'static str, form: Form) -> Task {
    Task {
        family: Family::Glue,
        files: [&["train.tsv"], &["dev.tsv"], &["test.tsv"]],
        ..super_glue(name, folder, title, form)
    }
}

const fn labelled(name: &'static str, title: &'static str, form: Form) -> Task {
    Task { family: Family::Labelled, ..super_glue(name, name, title, form) }
}

const MNLI: Task = with_labels(
    glue(
        "mnli",
        "MNLI",
        "does the premise entail the hypothesis (development and test sets of matched genres)",
        Form::Labelled(Fields {
            texts: &[("hypothesis", &["sentence2"]), ("premise", &["sentence1"])],
            label: &["gold_label"],
        }),
    ),
    &["entailment", "neutral", "contradiction"],
);

/// A data set of MRQA; its files come in folders of their own names, or as plain JSON lines.
macro_rules! mrqa {
    (in_domain $name:literal, $file:literal) => {
        Task {
            files: [
                &[concat!("train/", $file, ".jsonl.gz"), concat!("train/", $file, ".jsonl")],
                &[concat!("dev/", $file, ".jsonl.gz"), concat!("dev/", $file, ".jsonl")],
                &[],
            ],
            ..mrqa!(out_of_domain $name, $file)
        }
    };
    (out_of_domain $name:literal, $file:literal) => {
        Task {
            family: Family::Mrqa,
            metrics: ANSWERS,
            selection: Selection::One(Metric::TokenF1),
            files: [
                &[],
                &[
                    concat!($file, ".jsonl.gz"),
                    concat!($file, ".jsonl"),
                    concat!("dev/", $file, ".jsonl.gz"),
                    concat!("dev/", $file, ".jsonl"),
                ],
                &[],
            ],
            ..super_glue($name, "MRQA", concat!("questions about a passage (", $file, ")"), Form::Mrqa)
        }
    };
}

pub(super) static TASKS: [Task; 29] = [
    with_labels(
        super_glue(
            "boolq",
            "BoolQ",
            "does the passage say yes to the question",
            fields(same!["passage", "question"]),
        ),
        TRUTH,
    ),
    Task {
        metrics: &[Metric::MacroF1, Metric::Accuracy],
        ..with_labels(
            super_glue(
                "cb",
                "CB",
                "does the premise entail the hypothesis, contradict it or neither",
                fields(same!["hypothesis", "premise"]),
            ),
            &["entailment", "contradiction", "neutral"],
        )
    },
    with_labels(
        super_glue(
            "copa",
            "COPA",
            "which choice is the cause or the effect of the premise",
            fields(same!["choice1", "choice2", "premise", "question"]),
        ),
        &["choice1", "choice2"],
    ),
    Task {
        metrics: &[Metric::PositiveF1, Metric::GroupExactMatch],
        ..with_labels(
            super_glue("multirc", "MultiRC", "is the answer to the question right", Form::MultiRc),
            TRUTH,
        )
    },
    Task {
        metrics: ANSWERS,
        init_words: &["commonsense", "reasoning", "reading", "comprehension"],
        ..super_glue("record", "ReCoRD", "which entity fills the gap in the query", Form::ReCoRd)
    },
    with_labels(
        super_glue(
            "rte",
            "RTE",
            "does the premise entail the hypothesis",
            fields(same!["hypothesis", "premise"]),
        ),
        TWO_WAY,
    ),
    with_labels(
        super_glue(
            "wic",
            "WiC",
            "does the word mean the same in both sentences",
            fields(same!["sentence1", "sentence2", "word"]),
        ),
        TRUTH,
    ),
    Task {
        metrics: &[Metric::Containment],
        init_words: &["commonsense", "pronoun", "resolution"],
        ..super_glue("wsc", "WSC", "whom or what does the pronoun mean", Form::Wsc)
    },
    Task {
        files: [&["train.tsv", "train.jsonl"], &["dev.tsv", "dev.jsonl"], &["test.tsv", "test.jsonl"]],
        ..with_labels(
            glue("sst2", "SST-2", "is the sentence of a film review good or bad", fields(same!["sentence"])),
            &["negative", "positive"],
        )
    },
    Task {
        metrics: PARAPHRASE,
        files: [
            &["train.tsv", mrpc::BOTH, "train.jsonl"],
            &["dev.tsv", mrpc::BOTH, "dev.jsonl"],
            &["test.tsv", "msr_paraphrase_test.txt", "test.jsonl"],
        ],
        ..with_labels(
            glue(
                "mrpc",
                "MRPC",
                "do the sentences say the same",
                Form::Labelled(Fields {
                    texts: &[
                        ("sentence1", &["sentence1", "#1 String"]),
                        ("sentence2", &["sentence2", "#2 String"]),
                    ],
                    label: &["label", "Quality"],
                }),
            ),
            &["not_equivalent", "equivalent"],
        )
    },
    Task {
        metrics: PARAPHRASE,
        ..with_labels(
            glue(
                "qqp",
                "QQP",
                "do the questions ask the same",
                Form::Labelled(Fields { texts: same!["question1", "question2"], label: &["is_duplicate"] }),
            ),
            &["not_duplicate", "duplicate"],
        )
    },
    with_labels(
        glue("glue-rte", "RTE", "does sentence 1 entail sentence 2", fields(same!["sentence1", "sentence2"])),
        TWO_WAY,
    ),
    Task { files: [&["train.tsv"], &["dev_matched.tsv"], &["test_matched.tsv"]], ..MNLI },
    Task {
        name: "mnli-mismatched",
        title: "does the premise entail the hypothesis (development and test sets of other genres)",
        files: [&["train.tsv"], &["dev_mismatched.tsv"], &["test_mismatched.tsv"]],
        ..MNLI
    },
    Task {
        family: Family::Squad,
        metrics: ANSWERS,
        selection: Selection::One(Metric::TokenF1),
        files: [&["train-v1.1.json"], &["dev-v1.1.json"], &[]],
        ..super_glue("squad", "SQuAD", "which words of the passage answer the question", Form::Squad)
    },
    mrqa!(in_domain "mrqa-squad", "SQuAD"),
    mrqa!(in_domain "mrqa-newsqa", "NewsQA"),
    mrqa!(in_domain "mrqa-triviaqa", "TriviaQA-web"),
    mrqa!(in_domain "mrqa-searchqa", "SearchQA"),
    mrqa!(in_domain "mrqa-hotpotqa", "HotpotQA"),
    mrqa!(in_domain "mrqa-naturalquestions", "NaturalQuestionsShort"),
    mrqa!(out_of_domain "mrqa-bioasq", "BioASQ"),
    mrqa!(out_of_domain "mrqa-drop", "DROP"),
    mrqa!(out_of_domain "mrqa-duorc", "DuoRC.ParaphraseRC"),
    mrqa!(out_of_domain "mrqa-race", "RACE"),
    mrqa!(out_of_domain "mrqa-relationextraction", "RelationExtraction"),
    mrqa!(out_of_domain "mrqa-textbookqa", "TextbookQA"),
    with_labels(
        labelled("trec", "what does the question ask for", fields(same!["question"])),
        &["abbreviation", "description", "entity", "human", "location", "number"],
    ),
    with_labels(
        labelled("subj", "does the sentence tell a plot or an opinion", fields(same!["sentence"])),
        &["objective", "subjective"],
    ),
];
