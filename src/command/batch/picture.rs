//! The report of a job as a picture.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{Lengths, Report};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const INK: RGBColor = RGBColor(38, 50, 56);
const GREY: RGBColor = RGBColor(120, 130, 138);
const FAINT: RGBColor = RGBColor(226, 231, 234);
const RATE: RGBColor = RGBColor(21, 101, 192);
const LENGTH: RGBColor = RGBColor(0, 121, 107);
const ERROR: RGBColor = RGBColor(198, 40, 40);
/// Bars of the lengths, about.
const BARS: u64 = 40;
/// Codes that are drawn; the rest is one more bar.
const CODES: usize = 8;

/// Draws the rate over time, the lengths of the captions, and the errors by code.
///
/// # Errors
/// The file cannot be written.
pub fn draw(file: &Path, report: &Report) -> anyhow::Result<()> {
    let root = SVGBackend::new(file, (960, 600)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, rest) = root.split_vertically(44);
    let title = format!(
        "{} images, {} captioned, {} failed, {:.1} images/s",
        report.rows, report.captioned, report.failed, report.images_per_second
    );
    head.draw(&Text::new(title, (20, 16), font(20, INK)))?;
    let (above, below) = rest.split_vertically(270);
    rate(&above, report)?;
    let (left, right) = below.split_horizontally(480);
    lengths(&left, &report.tokens)?;
    errors(&right, &report.errors)?;
    root.present()?;
    Ok(())
}

fn font(size: u32, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour)
}

fn rate(area: &Area<'_>, report: &Report) -> anyhow::Result<()> {
    let most = report.rate.iter().map(|point| point.images_per_second).fold(0.0, f64::max).max(1e-3) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption("images a second, over seconds of work", font(15, INK))
        .margin(10)
        .margin_right(20)
        .x_label_area_size(30)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..report.seconds.max(1e-3), 0.0..most)?;
    let short = |value: &f64| ((value * 1e3).round() / 1e3).to_string();
    mesh(chart.configure_mesh().x_labels(10).y_labels(6).x_label_formatter(&short).y_label_formatter(&short)).draw()?;
    let mut before = 0.0;
    let stretches = report.rate.iter().map(|point| {
        let from = std::mem::replace(&mut before, point.second);
        Rectangle::new([(from, 0.0), (point.second, point.images_per_second)], RATE.mix(0.18).filled())
    });
    chart.draw_series(stretches.collect::<Vec<_>>())?;
    let mut steps = Vec::with_capacity(report.rate.len() * 2);
    let mut before = 0.0;
    for point in &report.rate {
        steps.extend([(before, point.images_per_second), (point.second, point.images_per_second)]);
        before = point.second;
    }
    chart.draw_series(LineSeries::new(steps, RATE.stroke_width(2)))?;
    let mean = report.images_per_second;
    chart.draw_series(LineSeries::new([(0.0, mean), (report.seconds, mean)], GREY.stroke_width(1)))?;
    Ok(())
}

fn lengths(area: &Area<'_>, lengths: &Lengths) -> anyhow::Result<()> {
    let step = (lengths.most - lengths.least + 1).div_ceil(BARS).max(1);
    let mut bars: BTreeMap<u64, u64> = BTreeMap::new();
    for (length, count) in &lengths.histogram {
        *bars.entry(length / step * step).or_default() += count;
    }
    let caption = match bars.len() {
        0 => "tokens of a caption: no captions".to_owned(),
        _ => format!("tokens of a caption: half have {} or fewer, 9 of 10 {} or fewer", lengths.p50, lengths.p90),
    };
    let from = bars.keys().next().map_or(0.0, |least| *least as f64) - 0.5;
    let to = bars.keys().next_back().map_or(1.0, |most| (*most + step) as f64) - 0.5;
    let most = bars.values().max().map_or(1.0, |most| *most as f64) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(caption, font(15, INK))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(52)
        .build_cartesian_2d(from..to, 0.0..most)?;
    let whole = |value: &f64| format!("{value:.0}");
    mesh(chart.configure_mesh().x_labels(8).y_labels(6).x_label_formatter(&whole).y_label_formatter(&whole)).draw()?;
    let gap = step as f64 * 0.1;
    chart.draw_series(bars.into_iter().map(|(length, count)| {
        let (left, right) = (length as f64 - 0.5 + gap, (length + step) as f64 - 0.5 - gap);
        Rectangle::new([(left, 0.0), (right, count as f64)], LENGTH.mix(0.75).filled())
    }))?;
    Ok(())
}

type Mesh<'a, 'b, DB> = MeshStyle<'a, 'b, RangedCoordf64, RangedCoordf64, DB>;

fn mesh<'m, 'a, 'b, DB: DrawingBackend>(style: &'m mut Mesh<'a, 'b, DB>) -> &'m mut Mesh<'a, 'b, DB> {
    style
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(GREY)
        .label_style(font(12, GREY))
        .disable_x_mesh()
}

/// Bars that lie, each with its code before it and its count behind it.
fn errors(area: &Area<'_>, errors: &BTreeMap<String, u64>) -> anyhow::Result<()> {
    let mut bars: Vec<(&str, u64)> = errors.iter().map(|(code, count)| (code.as_str(), *count)).collect();
    bars.sort_by_key(|(code, count)| (std::cmp::Reverse(*count), *code));
    let rest: u64 = bars.iter().skip(CODES).map(|(_, count)| count).sum();
    bars.truncate(CODES);
    if rest > 0 {
        bars.push(("others", rest));
    }
    let (width, _) = area.dim_in_pixel();
    let title = if bars.is_empty() { "errors by code: none" } else { "errors by code" };
    let middle = font(15, INK).pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(title, (width as i32 / 2, 12), middle))?;
    let most = bars.iter().map(|(_, count)| *count).max().unwrap_or(1);
    let (left, right) = (150, width as i32 - 80);
    for (at, (code, count)) in bars.into_iter().enumerate() {
        let top = 44 + at as i32 * 26;
        let length = (f64::from(right - left) * count as f64 / most as f64).max(2.0) as i32;
        let name = font(13, INK).pos(Pos::new(HPos::Right, VPos::Center));
        area.draw(&Text::new(code.to_owned(), (left - 8, top + 9), name))?;
        area.draw(&Rectangle::new([(left, top), (left + length, top + 18)], ERROR.mix(0.75).filled()))?;
        let number = font(13, GREY).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(count.to_string(), (left + length + 6, top + 9), number))?;
    }
    Ok(())
}
