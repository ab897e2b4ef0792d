//! A curve in the terminal, of braille dots: two by four in a cell.

/// Columns that the axis's numbers take, with a space behind.
const AXIS: usize = 8;
/// Dots of a cell, from the top down, of its left and its right column.
const DOTS: [[u32; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// The curve through `points` (x ascending), `columns` wide and `rows` and one line for x high; nothing where there are fewer than two.
pub(super) fn plot(points: &[(f64, f64)], columns: usize, rows: usize) -> Option<String> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let (first, last) = (points.first()?.0, points.last()?.0);
    let cells = columns.checked_sub(AXIS).filter(|cells| *cells > 0 && first < last)?;
    let means = means(&points, (first, last), 2 * cells);
    let known = || means.iter().flatten().copied();
    let (low, high) = (known().fold(f64::MAX, f64::min), known().fold(f64::MIN, f64::max));
    let mut grid = vec![vec![0u32; cells]; rows];
    let mut before = None;
    for (column, mean) in means.iter().enumerate() {
        let Some(mean) = mean else { continue };
        let share = if high > low { (mean - low) / (high - low) } else { 0.5 };
        let dot = ((1.0 - share) * (4 * rows - 1) as f64).round() as usize;
        // Steep parts are filled, so that the curve has no gaps.
        let from =
            before.map_or(
                dot,
                |before: usize| if before < dot { before + 1 } else { before.saturating_sub(1).max(dot) },
            );
        for filled in from.min(dot)..=from.max(dot) {
            grid[filled / 4][column / 2] |= DOTS[column % 2][filled % 4];
        }
        before = Some(dot);
    }
    let label = |row: usize| match row {
        0 => number(high),
        row if row + 1 == rows => number(low),
        _ => String::new(),
    };
    let braille = |bits: &u32| char::from_u32(0x2800 + bits).unwrap_or(' ');
    let line = |(row, cells): (usize, &Vec<u32>)| {
        let text = format!(
            "{:>width$} {}",
            label(row),
            cells.iter().map(braille).collect::<String>(),
            width = AXIS - 1
        );
        text.trim_end_matches(['\u{2800}', ' ']).to_owned()
    };
    let mut lines: Vec<String> = grid.iter().enumerate().map(line).collect();
    let (left, right) = (format!("step {first:.0}"), format!("{last:.0}"));
    let gap = cells.saturating_sub(left.chars().count());
    lines.push(format!("{:AXIS$}{left}{right:>gap$}", ""));
    Some(lines.join("\n"))
}

/// The mean of y in each of so many equal parts of the range of x.
fn means(points: &[(f64, f64)], (first, last): (f64, f64), parts: usize) -> Vec<Option<f64>> {
    let mut sums = vec![(0.0, 0u32); parts];
    for (x, y) in points {
        let part = ((x - first) / (last - first) * (parts - 1) as f64).round() as usize;
        let (sum, count) = &mut sums[part.min(parts - 1)];
        (*sum, *count) = (*sum + y, *count + 1);
    }
    sums.into_iter().map(|(sum, count)| (count > 0).then(|| sum / f64::from(count))).collect()
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 || (v < 0.001 && v > 0.0) => format!("{value:.1e}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_curve_goes_from_the_upper_left_to_the_lower_right() {
        let points: Vec<(f64, f64)> = (0..100).map(|x| (f64::from(x), 2.0 - f64::from(x) / 100.0)).collect();
        let text = plot(&points, 20, 4).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("  1.990 ⠑⠢"), "{text}");
        assert!(lines[3].starts_with("  1.020 ") && lines[4] == "        step 0    99", "{text}");
        assert!(lines[0].chars().count() < lines[3].chars().count(), "{text}");
        assert!(lines.iter().all(|line| line.chars().count() <= 20), "{text}");
    }

    #[test]
    fn what_has_no_extent_is_not_drawn() {
        assert_eq!(plot(&[], 40, 4), None);
        assert_eq!(plot(&[(1.0, 1.0)], 40, 4), None);
        assert_eq!(plot(&[(1.0, f64::NAN), (2.0, 1.0)], 40, 4), None);
        assert!(plot(&[(1.0, 1.0), (2.0, 1.0)], 40, 4).is_some(), "a level curve is one");
    }

    #[test]
    fn steep_parts_have_no_gaps() {
        let text = plot(&[(0.0, 0.0), (1.0, 100.0)], 9, 4).unwrap();
        let dots: u32 = text
            .chars()
            .filter(|c| ('\u{2801}'..='\u{28ff}').contains(c))
            .map(|c| (c as u32 - 0x2800).count_ones())
            .sum();
        assert_eq!(dots, 16, "{text}");
    }
}
