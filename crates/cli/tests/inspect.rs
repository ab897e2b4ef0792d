//! Looking into models and prompts.

mod common;

use common::{assert_needs_nothing_else, demo, incipit, path, refused, text, train};
use incipit_tune::prompt::Prompt;

#[test]
fn inspect_names_the_words_that_rows_began_as() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "run", &["--steps", "1", "--prompt-init", "vocab", "--lr", "0.0001"]).ok();
    let (run, model) = (path(dir.path(), "run"), demo("model"));
    let seen = incipit(&["inspect", "prompt", &run, "--model", &model, "--json"]).ok().json();
    let rows = seen["per_row"].as_array().expect("rows");
    assert_eq!(rows.len(), 4);
    for row in rows {
        let nearest = row["nearest"].as_array().expect("neighbours");
        assert_eq!(nearest.len(), 5);
        assert!(nearest[0]["cosine"].as_f64().expect("a number") > 0.99, "{row}");
    }
    let random = seen["clusters"]["random"]["nearest"].as_f64().expect("a number");
    assert!(random < seen["clusters"]["prompt"]["nearest"].as_f64().expect("a number"), "{seen}");
    // The model of the run, where none is named.
    let page = path(dir.path(), "look.html");
    let table = incipit(&["inspect", "prompt", &run, "--html", &page]).ok().stdout;
    let piece = rows[0]["nearest"][0]["piece"].as_str().expect("a piece");
    assert!(table.contains(piece), "{table}");
    let page = text(page);
    assert!(page.contains(piece) && page.contains("class=\"bar s0\"") && page.contains("class=\"band\""));
    assert_needs_nothing_else(&page);
}

#[test]
fn inspect_finds_labels_in_the_rows_that_began_as_them() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "run", &["--steps", "1", "--lr", "0.0001"]).ok();
    let (run, npy, model) = (path(dir.path(), "run"), path(dir.path(), "p.npy"), demo("model"));
    let seen = incipit(&["inspect", "prompt", &run, "--json"]).ok().json();
    let labels = seen["labels"].as_array().expect("the labels of the training data");
    assert_eq!(labels.len(), 6, "{seen}");
    for (row, label) in labels.iter().enumerate() {
        // The prompt has four rows.
        let own = if row < 4 { (row.into(), true.into()) } else { Default::default() };
        assert_eq!((&label["own_row"], &label["in_own_row"]), (&own.0, &own.1), "{label}");
    }
    // Of a prompt alone it is not known what began where.
    std::fs::copy(dir.path().join("run/prompt.npy"), &npy).expect("a prompt");
    std::fs::remove_dir_all(dir.path().join("run")).expect("a run");
    let given = labels[0]["label"].as_str().expect("a label");
    let args = ["inspect", "prompt", &npy, "--model", &model, "--json", "--labels", given];
    let alone = incipit(&args).ok().json();
    assert_eq!(alone["labels"][0]["rows"], labels[0]["rows"]);
    assert!(alone["labels"][0]["own_row"].is_null(), "{alone}");
    let bare = incipit(&["inspect", "prompt", &npy, "--json"]).ok().json();
    assert!(bare.get("vocabulary").is_none() && bare["per_row"][0]["norm"].as_f64().expect("a norm") > 0.0);
    refused(&incipit(&["inspect", "prompt", &npy, "--labels", given]), &["--model is missing"]);
    refused(
        &incipit(&["inspect", "prompt", &npy, "--model", &model, "--task", "squad"]),
        &["--task squad", "no labels"],
    );
}

#[test]
fn inspect_tells_the_norms_of_every_layer_and_the_words_of_the_first() {
    let dir = tempfile::tempdir().expect("a directory");
    let more = ["--steps", "1", "--lr", "0.0001", "--prompt-layers", "all", "--prompt-init", "vocab"];
    train(dir.path(), "run", &more).ok();
    let (run, page) = (path(dir.path(), "run"), path(dir.path(), "look.html"));
    let ran = incipit(&["inspect", "prompt", &run, "--json", "--html", &page]).ok();
    let seen = ran.json();
    assert!(ran.stderr.contains("words are told of the first layer's rows"), "{}", ran.stderr);
    // The demo's model has three layers.
    assert_eq!((&seen["layers"], &seen["rows"]), (&3.into(), &4.into()));
    let rows = |of: &serde_json::Value| of["per_row"].as_array().expect("rows").clone();
    assert!(rows(&seen).iter().all(|row| row["nearest"][0]["cosine"].as_f64().expect("a number") > 0.99));
    let later = seen["later_layers"].as_array().expect("layers");
    assert_eq!(later.iter().map(|layer| layer["layer"].clone()).collect::<Vec<_>>(), [1, 2]);
    for layer in later {
        assert_eq!(rows(layer).len(), 4);
        assert!(rows(layer).iter().all(|row| row["norm"].is_number() && row.get("nearest").is_none()));
        assert!(layer["norms"]["median"].is_number(), "{layer}");
    }
    assert!(text(page).contains("those of the first of 3 layers"));
    let table = incipit(&["inspect", "prompt", &run]).ok().stdout;
    assert!(table.contains("3 layers of 4 rows") && table.contains("layer   row"), "{table}");
    refused(&incipit(&["inspect", "similarity", &run, &run]), &["rows for each of 3 layers"]);
}

#[test]
fn inspect_compares_prompts_of_one_model_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, width: usize, values: Vec<f32>| {
        let to = dir.path().join(name);
        let prompt = Prompt::new(values.len() / width, width, values).expect("a prompt");
        incipit_tune::npy::write(&to, &prompt).expect("a file");
        to.display().to_string()
    };
    let a = write("a.npy", 2, vec![1.0, 0.0, 0.0, 1.0]);
    let b = write("b.npy", 2, vec![3.0, 0.0]);
    let other = write("other.npy", 3, vec![1.0; 3]);
    let page = path(dir.path(), "alike.html");
    let seen = incipit(&["inspect", "similarity", &a, &b, "--json", "--html", &page]).ok().json();
    assert_eq!(seen["of_rows"], serde_json::json!([[0.5, 0.5], [0.5, 1.0]]));
    assert!((seen["of_means"][0][1].as_f64().expect("a cosine") - 0.5f64.sqrt()).abs() < 1e-7, "{seen}");
    let page = text(page);
    assert!(page.contains("style=\"--share:50\">0.500") && page.contains("b.npy"), "{page}");
    assert_needs_nothing_else(&page);
    refused(&incipit(&["inspect", "similarity", &a, &other]), &["a.npy have 2", "other.npy have 3"]);
    refused(&incipit(&["inspect", "similarity", &a]), &["PATH"]);
    refused(&incipit(&["inspect", "prompt", &a, "--model", &demo("model")]), &["a.npy", "2 columns"]);
}
