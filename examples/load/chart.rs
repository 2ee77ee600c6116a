//! Draws a scenario: what was offered and what came of it above, latency below.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::options::Options;
use crate::report::thousands;
use crate::scenarios::Run;
use crate::tally::Second;

const SIZE: (u32, u32) = (1280, 720);
const HEAD: u32 = 124;
const FONT: &str = "sans-serif";

const INK: RGBColor = RGBColor(45, 45, 45);
const FAINT: RGBColor = RGBColor(110, 110, 110);
const GRID: RGBColor = RGBColor(228, 228, 228);
const SHADE: RGBColor = RGBColor(246, 240, 222);

// Of Okabe and Ito's palette, which everybody can tell apart.
const OFFERED: RGBColor = RGBColor(150, 150, 150);
const GOOD: RGBColor = RGBColor(0, 114, 178);
const SHED: RGBColor = RGBColor(213, 94, 0);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// What is drawn of each second, how, and what it is called.
struct Line {
    value: fn(&Second) -> f64,
    colour: RGBColor,
    says: &'static str,
}

const LOADS: [Line; 3] = [
    Line {
        value: |second| second.offered as f64,
        colour: OFFERED,
        says: "offered",
    },
    Line {
        value: |second| second.shed.count() as f64,
        colour: SHED,
        says: "shed",
    },
    Line {
        value: |second| second.good as f64,
        colour: GOOD,
        says: "good",
    },
];

/// On a logarithmic scale: of the power of ten.
const LATENCIES: [Line; 2] = [
    Line {
        value: |second| power(second.shed.quantile(0.99).as_secs_f64()),
        colour: SHED,
        says: "",
    },
    Line {
        value: |second| power(second.answered.quantile(0.99).as_secs_f64()),
        colour: GOOD,
        says: "",
    },
];

const LEAST_POWER: f64 = -1.0;

/// Of milliseconds.
fn power(seconds: f64) -> f64 {
    (seconds * 1_000.0).log10().max(LEAST_POWER)
}

pub(crate) fn draw(file: &Path, options: &Options, run: &Run) -> Drawn {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(HEAD);
    title(&head, options, run)?;
    let (above, below) = body.split_vertically((SIZE.1 - HEAD) / 2 - 24);
    let most = run.seconds().map(|second| second.offered).max();
    Panel {
        y: 0.0..most.unwrap_or(0).max(1) as f64 * 1.15,
        lines: &LOADS,
        tick: |count| thousands(*count as u64),
        y_title: "requests a second",
        x_title: "",
    }
    .draw(&above, run)?;
    Panel {
        y: LEAST_POWER..power(options.deadline.as_secs_f64() * 3.0),
        lines: &LATENCIES,
        tick: |power| match 10f64.powf(*power) {
            value if value < 1.0 => format!("{value:.1} ms"),
            value => format!("{value:.0} ms"),
        },
        y_title: "99th percentile",
        x_title: "seconds",
    }
    .draw(&below, run)?;
    root.present()?;
    Ok(())
}

fn title(area: &Area<'_>, options: &Options, run: &Run) -> Drawn {
    let subtitle = format!(
        "Open loop; latency from when a request was due. Good: answered correctly within {} ms.",
        options.deadline.as_millis(),
    );
    area.draw(&Text::new(run.scenario.title(), (30, 18), text(30, INK)))?;
    area.draw(&Text::new(subtitle, (30, 58), text(18, FAINT)))?;
    for (line, number) in LOADS.iter().zip(0..) {
        let (x, y) = (116 + number * 150, 104);
        let style = line.colour.stroke_width(4);
        area.draw(&PathElement::new(vec![(x, y), (x + 45, y)], style))?;
        let style = anchored(18, INK, HPos::Left, VPos::Center);
        area.draw(&Text::new(line.says, (x + 57, y), style))?;
    }
    Ok(())
}

fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

fn anchored(size: u32, colour: RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    text(size, colour).pos(Pos::new(horizontal, vertical))
}

struct Panel<'a> {
    y: Range<f64>,
    lines: &'a [Line],
    tick: fn(&f64) -> String,
    y_title: &'a str,
    x_title: &'a str,
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>, run: &Run) -> Drawn {
        let seconds = run.seconds().count().max(1) as f64;
        // The time is written once, below the lower panel.
        let (x_size, x_labels) = match self.x_title {
            "" => (10, 0),
            _ => (56, 12),
        };
        let mut chart = ChartBuilder::on(area)
            .margin_left(24)
            .margin_right(30)
            .margin_bottom(8)
            .x_label_area_size(x_size)
            .y_label_area_size(112)
            .build_cartesian_2d(0.0..seconds, self.y.clone())?;
        // What is more than the knee, or than is normal.
        let mut from = 0.0;
        for step in &run.steps {
            let to = from + step.seconds.len() as f64;
            if let "2x knee" | "burst" = step.name {
                let corners = [(from, self.y.start), (to, self.y.end)];
                chart.draw_series([Rectangle::new(corners, SHADE.filled())])?;
                if self.x_title.is_empty() {
                    let style = anchored(18, INK, HPos::Center, VPos::Top);
                    let place = ((from + to) / 2.0, self.y.end * 0.98);
                    chart.draw_series([Text::new(step.name, place, style)])?;
                }
            }
            from = to;
        }
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(FAINT)
            .x_labels(x_labels)
            .y_labels(7)
            .x_label_formatter(&|second| format!("{second:.0}"))
            .y_label_formatter(&self.tick)
            .label_style(text(17, INK))
            .axis_desc_style(text(18, INK))
            .x_desc(self.x_title)
            .y_desc(self.y_title)
            .draw()?;
        for line in self.lines {
            let values = run.seconds().map(line.value).enumerate();
            let steps = values.flat_map(|(second, value)| {
                let from = second as f64;
                [(from, value), (from + 1.0, value)]
            });
            let path = PathElement::new(steps.collect::<Vec<_>>(), line.colour.stroke_width(3));
            chart.draw_series([path])?;
        }
        Ok(())
    }
}
