//! Draws the seconds as a slide: goodput above, latency below, the fault shaded.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::{CoordTranslate, Shift};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use tower_memcached::FailureMode;

use crate::clients::Contender;
use crate::faults::Outage;
use crate::load::IN_FLIGHT;
use crate::options::Options;
use crate::report::Run;
use crate::tally::{GOOD_WITHIN, Second};

const SIZE: (u32, u32) = (1280, 720);
const TITLE_HEIGHT: u32 = 88;
const LEGEND_LINE: u32 = 26;
const LEGEND_COLUMNS: usize = 2;
const FONT: &str = "sans-serif";

const INK: RGBColor = RGBColor(45, 45, 45);
const FAINT: RGBColor = RGBColor(110, 110, 110);
const GRID: RGBColor = RGBColor(228, 228, 228);
const SHADE: RGBColor = RGBColor(246, 240, 222);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

impl Contender {
    /// Of Okabe and Ito's palette, which everybody can tell apart.
    fn colour(self) -> RGBColor {
        match self {
            Self::Naive => RGBColor(213, 94, 0),
            Self::Resilient(FailureMode::Redistribute) => RGBColor(0, 114, 178),
            Self::Resilient(FailureMode::Cancel) => RGBColor(0, 158, 115),
            Self::Resilient(FailureMode::Retry) => RGBColor(204, 121, 167),
        }
    }

    /// Drawn last, over what is often as good: that must show through.
    fn is_dashed(self) -> bool {
        self == Self::Resilient(FailureMode::Retry)
    }

    fn label(self) -> &'static str {
        match self {
            Self::Naive => "naive: 2.5 s time-outs, retry, no breaker",
            Self::Resilient(FailureMode::Redistribute) => {
                "redistribute: tower-memcached's defaults"
            }
            Self::Resilient(FailureMode::Cancel) => "cancel: otherwise the defaults",
            Self::Resilient(FailureMode::Retry) => "retry: otherwise the defaults",
        }
    }
}

/// A number of each second over time, a line for each client.
struct Panel<'a> {
    y: Range<f64>,
    value: fn(&Second) -> f64,
    tick: fn(&f64) -> String,
    y_title: &'a str,
    x_title: &'a str,
    /// A line across, and what it says.
    limit: Option<(f64, String)>,
    /// Said at the top of the fault.
    fault: Option<&'static str>,
}

pub(crate) fn draw(file: &Path, options: &Options, runs: &[Run]) -> Drawn {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE_HEIGHT);
    title(&head, options)?;
    let legend_height = LEGEND_LINE * runs.len().div_ceil(LEGEND_COLUMNS) as u32 + 8;
    let (names, body) = body.split_vertically(legend_height);
    legend(&names, runs)?;
    let (above, below) = body.split_vertically((SIZE.1 - TITLE_HEIGHT - legend_height) / 2 - 24);

    let limit_ms = GOOD_WITHIN.as_millis() as f64;
    let outage = options.timeline.outage.as_ref();
    Panel {
        y: 0.0..118.0,
        value: Second::goodput_percent,
        tick: |percent| format!("{percent:.0} %"),
        y_title: "goodput",
        x_title: "",
        limit: None,
        fault: outage.map(|outage| outage.fault.seen()),
    }
    .draw(&above, options, runs)?;
    // A logarithmic scale: of the power of ten.
    Panel {
        y: -1.0..5.0,
        value: |second| second.latencies.quantile_ms(0.99).max(0.1).log10(),
        tick: |power| match 10f64.powf(*power) {
            value if value < 1.0 => format!("{value:.1} ms"),
            value if value < 1_000.0 => format!("{value:.0} ms"),
            value => format!("{:.0} s", value / 1_000.0),
        },
        y_title: "99th percentile",
        x_title: "seconds since the start of the run",
        limit: Some((limit_ms.log10(), format!("good: within {limit_ms} ms"))),
        fault: None,
    }
    .draw(&below, options, runs)?;
    root.present()?;
    Ok(())
}

/// Rounded down, so that only all is 100 %.
fn percent(value: f64) -> String {
    match value {
        100.0 => "100 %".to_owned(),
        value => format!("{:.1} %", (value * 10.0).floor() / 10.0),
    }
}

fn title(area: &Area<'_>, options: &Options) -> Drawn {
    let title = match &options.timeline.outage {
        Some(Outage { fault, when }) => {
            let (does, seconds) = (fault.describe(), when.len());
            format!("One of three memcached nodes {does} for {seconds} s")
        }
        None => "A memcached cluster, watched".to_owned(),
    };
    let subtitle = format!(
        "{} requests/s, whether or not earlier ones were answered; at most {IN_FLIGHT} in flight. \
         Goodput: answered correctly within {} ms of being due.",
        options.rate,
        GOOD_WITHIN.as_millis(),
    );
    area.draw(&Text::new(title, (30, 18), text(32, INK)))?;
    area.draw(&Text::new(subtitle, (30, 58), text(18, FAINT)))?;
    Ok(())
}

/// Names the lines, and how good each client was in the fault.
fn legend(area: &Area<'_>, runs: &[Run]) -> Drawn {
    for (number, run) in runs.iter().enumerate() {
        let (row, column) = (number / LEGEND_COLUMNS, number % LEGEND_COLUMNS);
        let x = [116, 690][column];
        let y = (row as u32 * LEGEND_LINE + LEGEND_LINE / 2) as i32;
        line(area, run.contender, vec![(x, y), (x + 45, y)])?;
        let good = percent(run.summary.goodput_percent);
        let says = format!("{}: {good} good", run.contender.label());
        let style = anchored(18, INK, HPos::Left, VPos::Center);
        area.draw(&Text::new(says, (x + 57, y), style))?;
    }
    Ok(())
}

/// A client's line, on the panels and in the legend.
fn line<C>(
    area: &DrawingArea<SVGBackend<'_>, C>,
    contender: Contender,
    points: Vec<C::From>,
) -> Drawn
where
    C: CoordTranslate,
    C::From: Clone + 'static,
{
    let style = contender.colour().stroke_width(4);
    match contender.is_dashed() {
        true => area.draw(&DashedPathElement::new(points, 9, 8, style))?,
        false => area.draw(&PathElement::new(points, style))?,
    }
    Ok(())
}

fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

fn anchored(size: u32, colour: RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    text(size, colour).pos(Pos::new(horizontal, vertical))
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>, options: &Options, runs: &[Run]) -> Drawn {
        // Watching may have been ended early.
        let run = runs.iter().map(|run| run.tally.seconds().len()).max();
        let seconds = run.unwrap_or(0).max(1) as f64;
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
            .y_label_area_size(92)
            .build_cartesian_2d(0.0..seconds, self.y.clone())?;

        let outage = options.timeline.outage.as_ref();
        let fault = outage.map(|outage| f64::from(outage.when.start)..f64::from(outage.when.end));
        if let Some(fault) = &fault {
            let corners = [(fault.start, self.y.start), (fault.end, self.y.end)];
            chart.draw_series([Rectangle::new(corners, SHADE.filled())])?;
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

        if let Some((limit, says)) = &self.limit {
            let across = [(0.0, *limit), (seconds, *limit)];
            chart.draw_series(DashedLineSeries::new(across, 6, 5, FAINT.into()))?;
            let style = anchored(16, FAINT, HPos::Right, VPos::Bottom);
            let place = (seconds - 0.1, *limit + self.height(0.015));
            chart.draw_series([Text::new(says.clone(), place, style)])?;
        }
        for run in runs {
            let values = run.tally.seconds().iter().map(self.value).enumerate();
            let steps = values.flat_map(|(second, value)| {
                let from = second as f64;
                [(from, value), (from + 1.0, value)]
            });
            line(chart.plotting_area(), run.contender, steps.collect())?;
        }
        if let (Some(fault), Some(says)) = (&fault, self.fault) {
            let style = anchored(18, INK, HPos::Center, VPos::Top);
            let middle = (fault.start + fault.end) / 2.0;
            let place = (middle, self.y.end - self.height(0.02));
            chart.draw_series([Text::new(says, place, style)])?;
        }
        Ok(())
    }

    /// A part of the panel's height.
    fn height(&self, part: f64) -> f64 {
        (self.y.end - self.y.start) * part
    }
}
