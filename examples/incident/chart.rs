//! Draws the seconds as a slide: goodput above, latency below, the fault shaded.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::clients::Contender;
use crate::load::IN_FLIGHT;
use crate::options::{Fault, Options};
use crate::report::Run;
use crate::tally::{GOOD_WITHIN, Second, Summary};

const SIZE: (u32, u32) = (1280, 720);
const TITLE_HEIGHT: u32 = 88;
const FONT: &str = "sans-serif";

const INK: RGBColor = RGBColor(45, 45, 45);
const FAINT: RGBColor = RGBColor(110, 110, 110);
const GRID: RGBColor = RGBColor(228, 228, 228);
const SHADE: RGBColor = RGBColor(246, 240, 222);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

impl Contender {
    /// Vermilion and blue of Okabe and Ito's palette, which everybody can tell apart.
    fn colour(self) -> RGBColor {
        match self {
            Self::Naive => RGBColor(213, 94, 0),
            Self::Resilient => RGBColor(0, 114, 178),
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Naive => "2.5 s time-outs, retry, no breaker",
            Self::Resilient => "tower-memcached's defaults",
        }
    }
}

/// A number of each second over time, a line for each client.
struct Panel<'a> {
    y: Range<f64>,
    value: fn(&Second) -> f64,
    label: fn(&Summary) -> String,
    tick: fn(&f64) -> String,
    y_title: &'a str,
    x_title: &'a str,
    /// A line across, and what it says.
    limit: Option<(f64, String)>,
    /// Said at the top of the fault.
    fault: Option<String>,
}

pub(crate) fn draw(file: &Path, options: &Options, runs: &[Run]) -> Drawn {
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE_HEIGHT);
    title(&head, options)?;
    let (above, below) = body.split_vertically((SIZE.1 - TITLE_HEIGHT) / 2 - 24);

    let limit_ms = GOOD_WITHIN.as_millis() as f64;
    Panel {
        y: 0.0..118.0,
        value: Second::goodput_percent,
        label: |summary| format!(": {} good", percent(summary.goodput_percent)),
        tick: |percent| format!("{percent:.0} %"),
        y_title: "goodput",
        x_title: "",
        limit: None,
        fault: options.fault().map(|fault| fault_label(fault).to_owned()),
    }
    .draw(&above, options, runs)?;
    // A logarithmic scale: of the power of ten.
    Panel {
        y: -1.0..5.0,
        value: |second| second.quantile_ms(0.99).max(0.1).log10(),
        label: |_| String::new(),
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

fn fault_label(fault: Fault) -> &'static str {
    match fault {
        Fault::Stop => "the node accepts connections, and answers nothing",
        Fault::Kill => "the node is dead",
    }
}

/// Rounded down, so that only all is 100 %.
fn percent(value: f64) -> String {
    match value {
        100.0 => "100 %".to_owned(),
        value => format!("{:.1} %", (value * 10.0).floor() / 10.0),
    }
}

fn title(area: &Area<'_>, options: &Options) -> Drawn {
    let title = match (&options.timeline.fault, options.fault()) {
        (Some(when), Some(fault)) => {
            let what = match fault {
                Fault::Stop => "stops answering",
                Fault::Kill => "is killed, and restarted",
            };
            let seconds = when.end - when.start;
            match fault {
                Fault::Stop => format!("One of three memcached nodes {what} for {seconds} s"),
                Fault::Kill => format!("One of three memcached nodes {what} after {seconds} s"),
            }
        }
        _ => "A memcached cluster, watched".to_owned(),
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

fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

fn anchored(size: u32, colour: RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    text(size, colour).pos(Pos::new(horizontal, vertical))
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>, options: &Options, runs: &[Run]) -> Drawn {
        let timeline = &options.timeline;
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

        let fault = timeline.fault.clone();
        let fault = fault.map(|fault| f64::from(fault.start)..f64::from(fault.end));
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
            chart.draw_series(LineSeries::new(
                steps,
                run.contender.colour().stroke_width(4),
            ))?;
        }

        // The labels are inside the fault, where the lines are apart.
        let labelled = fault.unwrap_or(0.0..seconds);
        let middle = (labelled.start + labelled.end) / 2.0;
        if let Some(says) = &self.fault {
            let style = anchored(18, INK, HPos::Center, VPos::Top);
            let place = (middle, self.y.end - self.height(0.02));
            chart.draw_series([Text::new(says.clone(), place, style)])?;
        }
        let mut taken = Vec::new();
        for run in runs {
            let says = format!("{}{}", run.contender.label(), (self.label)(&run.summary));
            // Half of a sans-serif's width, in seconds.
            let half = says.len() as f64 * 5.0 * seconds / f64::from(SIZE.0 - 150);
            let (y, vertical) = self.label_place(run, middle - half..middle + half, &mut taken);
            let style = anchored(19, run.contender.colour(), HPos::Center, vertical);
            chart.draw_series([Text::new(says, (middle, y), style)])?;
        }
        Ok(())
    }

    /// A part of the panel's height.
    fn height(&self, part: f64) -> f64 {
        (self.y.end - self.y.start) * part
    }

    /// Beside the line as it is there: below a high one, above a low one; further off where
    /// another label is.
    fn label_place(&self, run: &Run, beside: Range<f64>, taken: &mut Vec<f64>) -> (f64, VPos) {
        let beside = beside.start.floor()..beside.end.ceil();
        let seconds = run.tally.seconds().iter().enumerate();
        let values = seconds
            .filter(|(number, _)| beside.contains(&(*number as f64)))
            .map(|(_, second)| (self.value)(second));
        let (low, high) = values.fold((self.y.end, self.y.start), |(low, high), value| {
            (value.min(low), value.max(high))
        });
        let is_high = (low + high) / 2.0 > (self.y.start + self.y.end) / 2.0;
        let (mut y, vertical, away) = match is_high {
            true => (low - self.height(0.03), VPos::Top, -0.12),
            false => (high + self.height(0.03), VPos::Bottom, 0.12),
        };
        if taken
            .iter()
            .any(|other| (other - y).abs() < self.height(0.1))
        {
            y += self.height(away);
        }
        taken.push(y);
        (y, vertical)
    }
}
