//! Charts as SVG: axes with round ticks, curves or bars, one marked best point, a dashed baseline with a band around it. Colours come from the page's style
//! sheet, by class, so that a chart follows the reader's light or dark scheme.

use std::fmt::Write as _;

use serde::Serialize;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 18.0;
const BOTTOM: f64 = 50.0;
/// More points than this cannot be told apart at the chart's width.
const MAX_POINTS: usize = 480;
/// A linear axis on which the largest number is this many times the smallest shows nothing of the small ones.
const LOG_RATIO: f64 = 10.0;

/// How a curve is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A line.
    Line,
    /// A thin pale line behind the others.
    Faint,
    /// A line with a dot at each point.
    Dots,
    /// Dots alone.
    Points,
    /// A bar from zero for each point; its x is a whole number.
    Bars,
}

/// One curve.
pub(crate) struct Series {
    pub(crate) name: String,
    /// The colour: `s0`, `s1`, ... of the style sheet.
    pub(crate) class: &'static str,
    pub(crate) mark: Mark,
    /// In order of x; points that are not finite are left out.
    pub(crate) points: Vec<(f64, f64)>,
    /// How far each point's like lie around it, either way; empty where that is not known.
    pub(crate) spread: Vec<f64>,
}

impl Series {
    pub(crate) fn new(name: String, class: &'static str, mark: Mark, points: Vec<(f64, f64)>) -> Self {
        Self { name, class, mark, points, spread: Vec::new() }
    }
}

/// A chart of several curves over the same steps.
#[derive(Default)]
pub(crate) struct Chart {
    /// Said to those who cannot see the chart.
    pub(crate) title: String,
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) series: Vec<Series>,
    /// The point to mark, with its words.
    pub(crate) best: Option<(f64, f64, String)>,
    /// A horizontal line to compare with, with its words.
    pub(crate) baseline: Option<(f64, String)>,
    /// A range of y to compare with, from its low to its high end.
    pub(crate) band: Option<(f64, f64)>,
    /// The names of x = 0, 1, ..., where x is no number.
    pub(crate) x_names: Vec<String>,
    /// y is a share: the axis runs within 0..=1 and is labelled in per cent.
    pub(crate) percent: bool,
}

/// What the page's script needs to answer a pointer: where the plot lies, and the points in plot coordinates with their texts.
#[derive(Serialize)]
pub(crate) struct Hover {
    /// What x is.
    x: String,
    left: f64,
    right: f64,
    width: f64,
    series: Vec<HoverSeries>,
}

#[derive(Serialize)]
struct HoverSeries {
    name: String,
    class: &'static str,
    points: Vec<(f64, f64, String, String)>,
}

/// From numbers to places along an axis.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let (value, low, high) =
            if self.log { (value.ln(), self.low.ln(), self.high.ln()) } else { (value, self.low, self.high) };
        self.from + (value - low) / (high - low) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log { log_ticks(self.low, self.high) } else { linear_ticks(self.low, self.high, 5) }
    }
}

/// What a chart looks like in a file of its own, which has no page around it. Few programs but browsers know variables of styles.
const STYLE: &str = "text{fill:#4a453e;font:13px sans-serif}.grid{stroke:#e6e0d6}.axis{stroke:#6b655c}.curve{fill:none;stroke-width:2}\
.faint{stroke-width:1;opacity:.6}.cross{display:none}";
/// The colours of the classes `s0`, `s1`, ..., as on a light page.
const COLOURS: [&str; 6] = ["#33526e", "#a32a1c", "#2f6f4e", "#a8741a", "#6d4a8c", "#1f7a8c"];
/// Height of a line of the legend.
const LEGEND_LINE: f64 = 20.0;

impl Chart {
    /// The chart as a file of its own, with a legend; nothing when there is no point to draw.
    pub(crate) fn to_file(&self) -> Option<String> {
        let (svg, _) = self.draw()?;
        let body = &svg[svg.find('>').map_or(0, |end| end + 1)..];
        let mut legend =
            format!(r#"<text x="{LEFT}" y="{}">{}</text>"#, HEIGHT + LEGEND_LINE, escaped(&self.title));
        for (i, series) in self.series.iter().enumerate() {
            let y = HEIGHT + LEGEND_LINE * (i as f64 + 2.0);
            let _ = write!(
                legend,
                r#"<circle class="dot {}" cx="{}" cy="{}" r="4"/><text x="{}" y="{y}">{}</text>"#,
                series.class,
                LEFT + 4.0,
                y - 4.5,
                LEFT + 16.0,
                escaped(&series.name)
            );
        }
        let height = HEIGHT + LEGEND_LINE * (self.series.len() as f64 + 2.0);
        let colours = COLOURS.iter().enumerate();
        let colours = colours
            .map(|(i, colour)| format!(".s{i}{{fill:{colour}}}.curve.s{i}{{stroke:{colour};fill:none}}"));
        let colours: String = colours.collect();
        let ground = r##"<rect width="100%" height="100%" fill="#fff"/>"##;
        Some(format!(
            "<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" role=\"img\" xmlns=\"http://www.w3.org/2000/svg\"><style>{STYLE}{colours}</style>{ground}{legend}{body}\n"
        ))
    }

    /// The chart, or nothing when there is no point to draw.
    pub(crate) fn draw(&self) -> Option<(String, Hover)> {
        let series: Vec<(&Series, Vec<(f64, f64)>)> = self
            .series
            .iter()
            .map(|s| (s, thinned(&s.points)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let all: Vec<(f64, f64)> = series.iter().flat_map(|(_, points)| points.iter().copied()).collect();
        if all.is_empty() {
            return None;
        }
        let (x, y) = (self.x_axis(&all), self.y_axis(&all));
        let mut svg = String::new();
        let _ = write!(
            svg,
            r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">"#,
            escaped(&self.title)
        );
        self.draw_axes(&mut svg, &x, &y);
        for (s, points) in &series {
            draw_series(&mut svg, s, points, &x, &y);
        }
        self.draw_band(&mut svg, &y);
        self.draw_baseline(&mut svg, &x, &y);
        self.draw_best(&mut svg, &x, &y);
        let _ = write!(
            svg,
            r#"<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{}"/><g class="spots"></g></svg>"#,
            HEIGHT - BOTTOM
        );
        let series = series.iter().map(|(s, points)| self.hover(s, points, &x, &y)).collect();
        let x = self.x_label.clone();
        Some((svg, Hover { x, left: LEFT, right: WIDTH - RIGHT, width: WIDTH, series }))
    }

    fn has_bars(&self) -> bool {
        self.series.iter().any(|s| s.mark == Mark::Bars)
    }

    /// From 0, and wide enough for whole bars.
    fn x_axis(&self, all: &[(f64, f64)]) -> Axis {
        let high = all.iter().fold(0.0f64, |high, p| high.max(p.0));
        let (low, high) = if !self.x_names.is_empty() {
            (-0.5, self.x_names.len() as f64 - 0.5)
        } else if self.has_bars() {
            (-0.5, high + 0.5)
        } else {
            (0.0, high.max(1.0))
        };
        Axis { low, high, from: LEFT, to: WIDTH - RIGHT, log: false }
    }

    fn y_axis(&self, all: &[(f64, f64)]) -> Axis {
        let compared = self.baseline.iter().map(|b| b.0).chain(self.band.iter().flat_map(|b| [b.0, b.1]));
        // A bar is as long as its number.
        let zero = self.has_bars().then_some(0.0);
        let spread = self.series.iter().flat_map(|s| {
            s.points.iter().zip(&s.spread).flat_map(|(point, spread)| [point.1 - spread, point.1 + spread])
        });
        let values =
            all.iter().map(|p| p.1).chain(compared).chain(zero).chain(spread.filter(|v| v.is_finite()));
        let (mut low, mut high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        let log = !self.percent && low > 0.0 && high / low > LOG_RATIO;
        if log {
            (low, high) = (low / 1.2, high * 1.2);
        } else {
            let margin = if high > low { (high - low) * 0.08 } else { high.abs().max(0.1) * 0.2 };
            // A curve that falls far is seen against zero.
            low = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low };
            let floor = if low >= 0.0 { 0.0 } else { f64::MIN };
            let ceiling = if self.percent && high <= 1.0 { 1.0 } else { f64::MAX };
            (low, high) = ((low - margin).max(floor), (high + margin).min(ceiling));
            if self.percent && high - low < 0.1 {
                (low, high) = ((low - 0.05).max(0.0), (high + 0.05).min(1.0));
            }
        }
        Axis { low, high, from: HEIGHT - BOTTOM, to: TOP, log }
    }

    fn draw_axes(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in y.ticks() {
            let at = y.place(tick);
            let label = if self.percent { percent_tick(tick) } else { plain(tick) };
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/><text class="tick" x="{}" y="{:.1}" text-anchor="end">{label}</text>"#,
                LEFT - 8.0,
                at + 4.5
            );
        }
        for (at, text) in self.x_ticks(x) {
            let _ = write!(
                svg,
                r#"<line class="axis" x1="{at:.1}" x2="{at:.1}" y1="{bottom}" y2="{}"/><text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{text}</text>"#,
                bottom + 4.0,
                bottom + 20.0
            );
        }
        let _ = write!(
            svg,
            r#"<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/><text class="label" x="{:.1}" y="{}" text-anchor="middle">{}</text><text class="label" transform="translate(14 {:.1}) rotate(-90)" text-anchor="middle">{}{}</text>"#,
            f64::midpoint(LEFT, right),
            HEIGHT - 8.0,
            escaped(&self.x_label),
            f64::midpoint(TOP, bottom),
            escaped(&self.y_label),
            if y.log { " (log scale)" } else { "" }
        );
    }

    /// Where x is marked, and with what words.
    fn x_ticks(&self, x: &Axis) -> Vec<(f64, String)> {
        if self.x_names.is_empty() {
            // Steps and rows are whole.
            let whole = x.ticks().into_iter().filter(|tick| tick.fract().abs() < 1e-9);
            return whole.map(|tick| (x.place(tick), thousands(tick))).collect();
        }
        let named = self.x_names.iter().enumerate();
        named.map(|(i, name)| (x.place(i as f64), escaped(name))).collect()
    }

    fn draw_band(&self, svg: &mut String, y: &Axis) {
        let Some((low, high)) = self.band else { return };
        let (top, bottom) = (y.place(high), y.place(low));
        let _ = write!(
            svg,
            r#"<rect class="band" x="{LEFT}" width="{}" y="{top:.1}" height="{:.1}"/>"#,
            WIDTH - RIGHT - LEFT,
            bottom - top
        );
    }

    fn draw_baseline(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let Some((value, words)) = &self.baseline else { return };
        let at = y.place(*value);
        // Its words stand to the right, unless those of the best point do.
        let near =
            |best: &(f64, f64, String)| x.place(best.0) > WIDTH / 2.0 && (y.place(best.1) - at).abs() < 40.0;
        let best_is_near = self.best.as_ref().is_some_and(near);
        let (anchor, text_at) =
            if best_is_near { ("start", LEFT + 6.0) } else { ("end", WIDTH - RIGHT - 6.0) };
        let _ = write!(
            svg,
            r#"<line class="baseline" x1="{LEFT}" x2="{}" y1="{at:.1}" y2="{at:.1}"/><text class="note halo" x="{text_at}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
            WIDTH - RIGHT,
            at - 6.0,
            escaped(words)
        );
    }

    fn draw_best(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let Some((step, value, words)) = &self.best else { return };
        let (cx, cy) = (x.place(*step), y.place(*value));
        let (anchor, dx) = if cx > WIDTH * 0.7 { ("end", -10.0) } else { ("start", 10.0) };
        // Above the point where there is room, else below it.
        let dy = if cy - TOP > 18.0 { -10.0 } else { 20.0 };
        let _ = write!(
            svg,
            r#"<circle class="best" cx="{cx:.1}" cy="{cy:.1}" r="6.5"/><text class="note best-note halo" x="{:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
            cx + dx,
            cy + dy,
            escaped(words)
        );
    }

    fn hover(&self, series: &Series, points: &[(f64, f64)], x: &Axis, y: &Axis) -> HoverSeries {
        let tenth = |v: f64| (v * 10.0).round() / 10.0;
        let text = |v: f64| if self.percent { format!("{:.1} %", 100.0 * v) } else { format!("{v:.4}") };
        let points = points
            .iter()
            .map(|&(px, py)| {
                let name = self.x_names.get(px as usize).cloned().unwrap_or_else(|| thousands(px));
                (tenth(x.place(px)), tenth(y.place(py)), name, text(py))
            })
            .collect();
        HoverSeries { name: series.name.clone(), class: series.class, points }
    }
}

fn draw_series(svg: &mut String, series: &Series, points: &[(f64, f64)], x: &Axis, y: &Axis) {
    if series.mark == Mark::Bars {
        return draw_bars(svg, series.class, points, (x, y));
    }
    let mut path = String::new();
    for (i, &(px, py)) in points.iter().enumerate() {
        let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { "M" } else { "L" }, x.place(px), y.place(py));
    }
    let faint = if series.mark == Mark::Faint { " faint" } else { "" };
    if series.mark != Mark::Points {
        let _ = write!(svg, r#"<path class="curve {}{faint}" d="{path}"/>"#, series.class);
    }
    for (&(px, py), spread) in points.iter().zip(&series.spread) {
        let (at, top, bottom) = (x.place(px), y.place(py + spread), y.place(py - spread));
        let _ = write!(
            svg,
            r#"<path class="curve faint {}" d="M{at:.1} {top:.1}L{at:.1} {bottom:.1}"/>"#,
            series.class
        );
    }
    if matches!(series.mark, Mark::Dots | Mark::Points) {
        let radius = if points.len() > 60 { 1.8 } else { 3.0 };
        for &(px, py) in points {
            let (cx, cy) = (x.place(px), y.place(py));
            let _ = write!(
                svg,
                r#"<circle class="dot {}" cx="{cx:.1}" cy="{cy:.1}" r="{radius}"/>"#,
                series.class
            );
        }
    }
}

fn draw_bars(svg: &mut String, class: &str, points: &[(f64, f64)], (x, y): (&Axis, &Axis)) {
    let width = 0.72 * (x.place(1.0) - x.place(0.0));
    let zero = y.place(0.0);
    for &(px, py) in points {
        let (left, top) = (x.place(px) - width / 2.0, y.place(py));
        let _ = write!(
            svg,
            r#"<rect class="bar {class}" x="{left:.2}" width="{width:.2}" y="{top:.1}" height="{:.1}"/>"#,
            zero - top
        );
    }
}

/// At most [`MAX_POINTS`] points, each the mean of its neighbours' values at the last one's step; what is not finite is left out.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    let group = finite.len().div_ceil(MAX_POINTS).max(1);
    let mean = |part: &[(f64, f64)]| part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64;
    finite.chunks(group).map(|part| (part[part.len() - 1].0, mean(part))).collect()
}

/// Each point's mean with its neighbours, as many before it as after it and about `span` in all: such a curve does not lag.
pub(crate) fn smoothed(points: &[(f64, f64)], span: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    // Sums of all values before each point, so that a window costs one subtraction.
    let mut before = vec![0.0];
    for (i, point) in finite.iter().enumerate() {
        before.push(before[i] + point.1);
    }
    let mean = |(i, point): (usize, &(f64, f64))| {
        let reach = (span / 2).min(i).min(finite.len() - 1 - i);
        (point.0, (before[i + reach + 1] - before[i - reach]) / (2 * reach + 1) as f64)
    };
    finite.iter().enumerate().map(mean).collect()
}

/// Round numbers within `low..=high`, about `count` of them.
fn linear_ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|m| m * magnitude).find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// 1, 2 and 5 times the powers of ten within `low..=high`; only the powers when that would be many.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let within = |v: &f64| (low..=high).contains(v);
    let fine = powers.clone().flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(p))).filter(within);
    if fine.clone().count() <= 9 {
        fine.collect()
    } else {
        powers.map(|p| 10f64.powi(p)).filter(within).collect()
    }
}

fn plain(value: f64) -> String {
    let large = [(1e9, "G"), (1e6, "M"), (1e3, "k")].into_iter().find(|(unit, _)| value.abs() >= 10.0 * unit);
    if let Some((unit, name)) = large {
        return format!("{}{name}", plain(value / unit));
    }
    let text =
        if value != 0.0 && value.abs() < 0.001 { format!("{value:.0e}") } else { format!("{value:.4}") };
    if text.contains('e') { text } else { text.trim_end_matches('0').trim_end_matches('.').to_owned() }
}

fn percent_tick(share: f64) -> String {
    format!("{} %", plain((share * 1000.0).round() / 10.0))
}

/// A whole number with its thousands apart (a fraction as it is).
fn thousands(value: f64) -> String {
    if value.fract().abs() > 1e-9 { plain(value) } else { crate::units::count(value.max(0.0) as u64) }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: Vec<(f64, f64)>) -> Chart {
        let series = vec![Series::new("loss".into(), "s0", Mark::Line, points)];
        Chart { title: "a < b".into(), series, ..Chart::default() }
    }

    #[test]
    fn ticks_are_round_and_lie_within_the_axis() {
        assert_eq!(linear_ticks(0.0, 1.0, 5), vec![0.0, 0.2, 0.4, 0.600_000_000_000_000_1, 0.8, 1.0]);
        assert_eq!(linear_ticks(3.0, 97.0, 5), vec![20.0, 40.0, 60.0, 80.0]);
        assert_eq!(log_ticks(0.03, 20.0), vec![0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]);
    }

    #[test]
    fn a_chart_without_finite_points_is_not_drawn() {
        assert!(line(vec![]).draw().is_none());
        assert!(line(vec![(1.0, f64::NAN)]).draw().is_none());
    }

    #[test]
    fn one_point_is_drawn_at_a_finite_place() {
        let (svg, _) = line(vec![(5.0, 0.7)]).draw().expect("a chart");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains("a &lt; b"));
    }

    #[test]
    fn bars_begin_at_zero_and_the_band_across_them_lies_within_the_chart() {
        let mut chart = line(vec![(0.0, 900.0), (1.0, 1000.0)]);
        chart.series[0].mark = Mark::Bars;
        chart.band = Some((1.0, 2000.0));
        let (svg, _) = chart.draw().expect("a chart");
        // The floor of the chart is its zero, however far apart the numbers are.
        assert!(!svg.contains("(log scale)"), "{svg}");
        let attribute = |rect: &str, name: &str| {
            let value = rect.split(&format!(" {name}=\"")).nth(1).and_then(|rest| rest.split('"').next());
            value.and_then(|v| v.parse::<f64>().ok()).expect("a number")
        };
        let rects: Vec<&str> = svg.split("<rect ").skip(1).collect();
        let heights: Vec<f64> = rects.iter().map(|rect| attribute(rect, "height")).collect();
        let [low, high, band] = heights[..] else { panic!("{svg}") };
        assert!((low / high - 0.9).abs() < 0.01, "{heights:?}");
        assert!((band / high - 1.999).abs() < 0.01, "{heights:?}");
        assert!(attribute(rects[2], "y") >= TOP, "{svg}");
        let bottom = attribute(rects[0], "y") + low;
        assert!((bottom - (HEIGHT - BOTTOM)).abs() < 0.2, "{bottom}");
    }

    #[test]
    fn long_curves_are_thinned_to_their_means() {
        let points: Vec<(f64, f64)> = (1..=30_000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= MAX_POINTS, "{}", thin.len());
        assert!(thin.iter().all(|p| (p.1 - 0.5).abs() < 0.02), "{thin:?}");
        assert_eq!(thin.last().expect("points").0, 30_000.0);
    }

    #[test]
    fn a_wide_range_of_losses_gets_a_log_axis() {
        let (svg, _) = line(vec![(1.0, 20.0), (2.0, 0.01)]).draw().expect("a chart");
        assert!(svg.contains("(log scale)"));
        let (svg, _) = line(vec![(1.0, 2.0), (2.0, 0.3)]).draw().expect("a chart");
        assert!(!svg.contains("(log scale)"));
    }

    #[test]
    fn smoothing_keeps_a_straight_line_where_it_is() {
        let line: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        let smooth = smoothed(&line, 10);
        assert!(smooth.iter().zip(&line).all(|(a, b)| (a.1 - b.1).abs() < 1e-9), "{smooth:?}");
        let zigzag: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert!(smoothed(&zigzag, 20)[15..35].iter().all(|p| (p.1 - 0.5).abs() < 0.05));
    }
}
