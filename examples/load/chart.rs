//! Draws a scenario: what was offered and what came of it above, latency below.

use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::options::Options;
use crate::report::thousands;
use crate::scenarios::Run;
use crate::tally::{Latencies, Second};

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
const SHED: RGBColor = RGBColor(230, 159, 0);
const FAILED: RGBColor = RGBColor(213, 94, 0);
const REFUSED: RGBColor = RGBColor(204, 121, 167);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// What is drawn of each second, how, and what it is called.
struct Line {
    /// `None` if there was nothing of the kind.
    value: fn(&Second) -> Option<f64>,
    colour: RGBColor,
    says: &'static str,
}

const LOADS: [Line; 5] = [
    Line {
        value: |second| Some(second.offered as f64),
        colour: OFFERED,
        says: "offered",
    },
    Line {
        value: |second| some(second.refused),
        colour: REFUSED,
        says: "refused by the service",
    },
    Line {
        value: |second| some(second.shed.count()),
        colour: SHED,
        says: "shed by the client",
    },
    Line {
        value: |second| some(second.failures() + second.misses),
        colour: FAILED,
        says: "failed",
    },
    Line {
        value: |second| Some(second.good as f64),
        colour: GOOD,
        says: "good",
    },
];

/// On a logarithmic scale: of the power of ten.
const LATENCIES: [Line; 3] = [
    Line {
        value: |second| p99(&second.shed),
        colour: SHED,
        says: "",
    },
    Line {
        value: |second| p99(&second.failed),
        colour: FAILED,
        says: "",
    },
    Line {
        value: |second| p99(&second.answered),
        colour: GOOD,
        says: "",
    },
];

fn some(count: u64) -> Option<f64> {
    (count > 0).then_some(count as f64)
}

fn p99(latencies: &Latencies) -> Option<f64> {
    let known = latencies.count() > 0;
    known.then(|| power(latencies.quantile(0.99)))
}

const LEAST_POWER: f64 = -1.0;

/// Of milliseconds.
fn power(duration: Duration) -> f64 {
    let milliseconds = duration.as_secs_f64() * 1_000.0;
    milliseconds.log10().max(LEAST_POWER)
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
        y: LEAST_POWER..power(options.deadline * 3),
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
        let (x, y) = (116 + number * 225, 104);
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
            .y_labels(6)
            .x_label_formatter(&|second| format!("{second:.0}"))
            .y_label_formatter(&self.tick)
            .label_style(text(17, INK))
            .axis_desc_style(text(18, INK))
            .x_desc(self.x_title)
            .y_desc(self.y_title)
            .draw()?;
        let seconds: Vec<&Second> = run.seconds().collect();
        for line in self.lines {
            // A path for each stretch in which there was something.
            let values: Vec<_> = seconds.iter().map(|second| (line.value)(second)).collect();
            let numbered: Vec<_> = values.into_iter().enumerate().collect();
            for stretch in numbered.chunk_by(|one, next| one.1.is_some() == next.1.is_some()) {
                let steps = stretch.iter().filter_map(|&(second, value)| {
                    let from = second as f64;
                    value.map(|value| [(from, value), (from + 1.0, value)])
                });
                let steps: Vec<_> = steps.flatten().collect();
                let path = PathElement::new(steps, line.colour.stroke_width(3));
                chart.draw_series([path])?;
            }
        }
        Ok(())
    }
}
