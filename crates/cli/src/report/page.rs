//! What all pages have in common: their frame, their main figures, their charts.

use anyhow::{Context, Result};
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment};
use serde::Serialize;

use super::chart::{Chart, Hover, Mark, Series};

/// The frame, the charts in it, and the pages.
const TEMPLATES: [(&str, &str); 6] = [
    ("frame", include_str!("frame.html")),
    ("charts", include_str!("charts.html")),
    ("report", include_str!("report.html")),
    ("prompt", include_str!("prompt.html")),
    ("similarity", include_str!("similarity.html")),
    ("paper", include_str!("paper.html")),
];

/// The upper part of every page.
#[derive(Serialize)]
pub(crate) struct Head {
    /// What kind of page it is, in a few words.
    pub(crate) kind: &'static str,
    pub(crate) title: String,
    pub(crate) version: &'static str,
    pub(crate) lede: String,
    /// What a reader should not overlook.
    pub(crate) notices: Vec<String>,
    pub(crate) figures: Vec<Figure>,
}

impl Head {
    pub(crate) fn new(kind: &'static str, title: String, lede: String) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        Self { kind, title, version, lede, notices: Vec::new(), figures: Vec::new() }
    }
}

/// A number that stands out.
#[derive(Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: String,
    pub(crate) note: String,
}

/// A name and a value.
#[derive(Serialize)]
pub(crate) struct Fact {
    pub(crate) name: String,
    pub(crate) value: String,
    /// Whether the value is a path or the like.
    pub(crate) code: bool,
}

impl Fact {
    pub(crate) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into(), code: false }
    }

    pub(crate) fn code(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { code: true, ..Self::new(name, value) }
    }
}

/// Charts, and what the page's script needs to answer a pointer over them.
#[derive(Serialize)]
pub(crate) struct Charts {
    drawn: Vec<Drawn>,
    hover: String,
}

#[derive(Serialize)]
struct Drawn {
    title: String,
    svg: String,
    legend: Vec<Legend>,
}

#[derive(Serialize)]
struct Legend {
    name: String,
    class: &'static str,
    faint: bool,
}

impl Charts {
    /// Draws those that have a point to draw.
    ///
    /// # Errors
    /// If a number cannot be written as JSON.
    pub(crate) fn draw(charts: impl IntoIterator<Item = Chart>) -> Result<Self> {
        let charts = charts.into_iter();
        let (drawn, hover): (Vec<Drawn>, Vec<Hover>) = charts
            .filter_map(|chart| chart.draw().map(|(svg, hover)| (with_legend(&chart, svg), hover)))
            .unzip();
        // Within <script>, `<` could end the element.
        Ok(Self { drawn, hover: serde_json::to_string(&hover)?.replace('<', "\\u003c") })
    }
}

fn with_legend(chart: &Chart, svg: String) -> Drawn {
    let entry = |s: &Series| Legend { name: s.name.clone(), class: s.class, faint: s.mark == Mark::Faint };
    Drawn { title: chart.title.clone(), svg, legend: chart.series.iter().map(entry).collect() }
}

/// The page that a template makes of these values.
///
/// # Errors
/// If the template cannot be used.
pub(crate) fn render(template: &str, values: &impl Serialize) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    for (name, source) in TEMPLATES {
        environment.add_template(name, source).with_context(|| format!("the template {name}"))?;
    }
    let page = environment.get_template(template)?.render(Value::from(Serde(values)));
    page.with_context(|| format!("the template {template}"))
}
