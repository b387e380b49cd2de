//! The report on many databases: a page with the figures, how each was obtained and on what, and a plot.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use howdah_bench_figures::{load_average, machine, quantile};

use super::watched::WAKE_SECONDS;
use super::{Idle, Plan, Results};

/// The backups of the target: a hundred of each of ten thousand databases.
const TARGET: f64 = 1_000_000.0;
/// What a backup takes in the scheduler's cache: an entry of 64 bytes and a name of its own.
const BACKUP_BYTES: f64 = 104.0;

/// Writes `scale.md` and `scale.svg` into the folder of the plan.
///
/// # Errors
/// If it cannot be written.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    fs::create_dir_all(&plan.report).context("make the folder of the report")?;
    let path = plan.report.join("scale.md");
    fs::write(&path, page(plan, results)).context("write the report")?;
    fs::write(plan.report.join("scale.svg"), plot(&results.lateness)).context("write the plot")?;
    eprintln!("the report is {}", path.display());
    Ok(())
}

fn page(plan: &Plan, results: &Results) -> String {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let mut rows = String::new();
    for idle in &results.idle {
        let _ = writeln!(
            rows,
            "| {} | {} | {:.1} s | {:.1} | {:.1} | {:.2} ms | {} in {} ticks |",
            idle.databases,
            idle.backups,
            idle.start_to_first_tick.as_secs_f64(),
            mib(idle.memory_kib),
            mib(idle.peak_kib),
            idle.tick.as_secs_f64() * 1000.0,
            idle.requests,
            idle.ticks,
        );
    }
    let late = |part: f64| quantile(&results.lateness, part).as_secs_f64();
    format!(
        "# The scheduler over many databases\n\n\
         Written by `make bench-scale`, on {machine}; the load average was {load} at the end. The API server,\n\
         etcd and the benchmark share the processors with the scheduler.\n\n\
         ## Idle\n\n\
         | databases | backups | start to first tick | memory, MiB | at the peak | a tick | requests for StatefulSets and records |\n\
         |---|---|---|---|---|---|---|\n{rows}\n\
         Requests in a tick are the same whatever the number of idle databases; watches are not counted. {memory}\n\n\
         ## All due in one slot\n\n\
         {databases} databases with the same daily slot, which the jitter spreads over five minutes. From the alarm of the tick\n\
         (every {WAKE_SECONDS} s) until its backup was recorded: p50 {p50:.2} s, p99 {p99:.2} s, longest {most:.2} s (target: p99 <= 1 s).\n\
         Each takes its slot by creating a record; a part of them has somebody to run it at a time, and the others wait in the\n\
         index of records. The memory peaked at {peak:.1} MiB (target: <= 200 MiB).\n\n\
         ![how many were recorded how long after the alarm](scale.svg)\n\n\
         ## How each figure was obtained\n\n\
         - The StatefulSets (two containers, no replicas) and the backups (phase Taken, a journal of six steps) are objects of a\n  real API server. There are no pods and no volumes, so that every backup that begins ends in its preflight.\n\
         - The scheduler is the released one, with the settings that are installed. Memory is `VmRSS` and `VmHWM` of /proc.\n\
         - Ticks are timed by the scheduler's own metric `howdah_scheduler_tick_duration_seconds`, requests counted by the API\n  server's `apiserver_request_total`, over a minute.\n\
         - The lateness is read from the times in the scheduler's log.\n",
        machine = machine(),
        load = load_average(),
        memory = projection(&results.idle),
        databases = plan.databases,
        p50 = late(0.5),
        p99 = late(0.99),
        most = late(1.0),
        peak = mib(results.peak_kib),
    )
}

/// The part of the databases that was recorded within a time after the alarm, and the target.
fn plot(lateness: &[Duration]) -> String {
    const LEFT: f64 = 60.0;
    const TOP: f64 = 50.0;
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 240.0;
    /// Points of the curve: as many as the plot has room for.
    const POINTS: u32 = 200;
    /// What the target's line says: 99 % within a second.
    const TARGET_PART: f64 = 0.99;
    let longest = quantile(lateness, 1.0).as_secs_f64().max(1.0) * 1.05;
    let x = |seconds: f64| LEFT + WIDTH * seconds / longest;
    let y = |part: f64| TOP + HEIGHT * (1.0 - part);
    let points: Vec<String> = (0..=POINTS)
        .map(|point| {
            let part = f64::from(point) / f64::from(POINTS);
            format!("{:.1},{:.1}", x(quantile(lateness, part).as_secs_f64()), y(part))
        })
        .collect();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 660 340\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"660\" height=\"340\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"30\" font-weight=\"bold\">Part of the databases recorded, by seconds after the alarm</text>\n\
         <rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#ccc\"/>\n\
         <path d=\"M{LEFT} {part:.1} H{second:.1} V{bottom}\" fill=\"none\" stroke=\"#b00\" stroke-dasharray=\"4\"/>\n\
         <text x=\"{beside:.1}\" y=\"{under:.1}\" text-anchor=\"end\" fill=\"#b00\">target: p99 at most 1 s</text>\n\
         <polyline points=\"{points}\" fill=\"none\" stroke=\"#0b6\" stroke-width=\"2\"/>\n",
        part = y(TARGET_PART),
        second = x(1.0),
        bottom = TOP + HEIGHT,
        beside = x(1.0) - 8.0,
        under = TOP + HEIGHT - 10.0,
        points = points.join(" "),
    );
    for part in [0.0, 0.5, 1.0] {
        let (x, y) = (LEFT - 8.0, y(part) + 4.0);
        let _ =
            writeln!(svg, "<text x=\"{x}\" y=\"{y:.0}\" text-anchor=\"end\">{:.0} %</text>", part * 100.0);
    }
    let mut second = 0.0;
    while second <= longest {
        let _ =
            writeln!(svg, "<text x=\"{:.0}\" y=\"308\" text-anchor=\"middle\">{second:.2}</text>", x(second));
        second += 0.25;
    }
    svg.push_str("</svg>\n");
    svg
}

/// What the memory comes to at the target's size.
fn projection(idle: &[Idle]) -> String {
    let Some(deep) = idle.last() else { return String::new() };
    let seen = deep.memory_kib as f64 / 1024.0;
    let left = TARGET - f64::from(deep.backups);
    let more = left * BACKUP_BYTES / f64::from(1 << 20);
    format!(
        "\nThe target is {TARGET:.0} backups, which this machine's API server cannot hold. Of a backup the scheduler keeps 64 bytes\n\
         (a test holds it to that) and its name, together some {BACKUP_BYTES:.0}: with {left:.0} more it would come to {total:.0} MiB\n\
         (target: <= 200 MiB). That is calculated: what was seen grows by less, because the memory of reading the lists is used again.",
        total = seen + more,
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::plot;

    #[test]
    fn the_curve_runs_from_none_at_the_left_to_all_at_the_longest() {
        let lateness: Vec<Duration> = (0..=2000).map(Duration::from_millis).collect();
        let svg = plot(&lateness);
        let curve = svg.split("points=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
        let points: Vec<&str> = curve.split(' ').collect();
        assert_eq!((points.first(), points.last()), (Some(&"60.0,290.0"), Some(&"593.3,50.0")));
        // A second is the middle of what was seen, and the target asks for 99 % by then.
        assert!(svg.contains("M60 52.4 H326.7 V290") && curve.contains("326.7,170.0"), "{svg}");
    }
}
