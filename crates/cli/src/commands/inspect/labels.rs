//! Which labels to look for in a prompt.

use std::path::Path;

use anyhow::Result;
use incipit_data::tasks::Task;
use incipit_data::{LabelMap, LoadOptions, load_text};
use incipit_tune::init::PromptInit;
use incipit_tune::interpret::Labels;
use incipit_tune::spec::PartialSpec;
use incipit_tune::task::classes;

use super::PromptArgs;
use crate::commands::backbone::task_format;
use crate::exit::bad_input;
use crate::progress::warn;

/// Those that the flags give, else those of the run that made the prompt; none where neither has any.
///
/// # Errors
/// If no benchmark has the name that is given, or it has no labels.
pub(super) fn labels(args: &PromptArgs, run: &PartialSpec) -> Result<Option<Labels>> {
    // Which row began as which label is known of the run's own labels alone.
    let given = |texts| Ok(Some(Labels { texts, began_as_labels: false }));
    if let Some(list) = &args.labels {
        return given(parsed(list));
    }
    if let Some(name) = &args.task {
        let texts = init_words(Task::named(name)?);
        if texts.is_empty() {
            return bad_input(format!(
                "--task {name} has free text as its targets and no labels: leave it out"
            ));
        }
        return given(texts);
    }
    let began_as_labels =
        run.prompt_init.as_ref().is_some_and(|init| *init == PromptInit::ClassLabel.to_string());
    Ok(of_run(run)?.filter(|texts| !texts.is_empty()).map(|texts| Labels { texts, began_as_labels }))
}

fn of_run(run: &PartialSpec) -> Result<Option<Vec<String>>> {
    if let Some(name) = &run.task {
        return Ok(Some(init_words(Task::named(name)?)));
    }
    if let Some(map) = &run.labels {
        return Ok(Some(parsed(map)));
    }
    let Some(train) = &run.train else { return Ok(None) };
    match of_data(run, train) {
        Ok(found) => Ok(found),
        Err(error) => {
            warn(&format!("the labels of the run are not known ({error}); give them with --labels"));
            Ok(None)
        }
    }
}

/// The classes of the training data.
fn of_data(run: &PartialSpec, train: &Path) -> Result<Option<Vec<String>>> {
    let options = LoadOptions { skip_bad_records: run.skip_bad_records.unwrap_or_default() };
    Ok(classes(&load_text(train, &task_format(run)?, options)?.examples))
}

fn init_words(task: &Task) -> Vec<String> {
    task.init_words.iter().map(|&word| word.to_owned()).collect()
}

/// The texts of a label map, or of a list.
fn parsed(list: &str) -> Vec<String> {
    match list.parse::<LabelMap>() {
        Ok(map) => map.texts().map(str::to_owned).collect(),
        Err(_) => list.split(',').map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_labels_may_be_the_map_that_training_takes() {
        assert_eq!(parsed("True, False"), ["True", "False"]);
        assert_eq!(parsed("0=False,1=True"), ["False", "True"]);
    }
}
