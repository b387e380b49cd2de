//! The report on backups and restores: a page with the figures, how each was obtained and on what, and a plot.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use howdah_bench_figures::{load_average, machine, median, median_s};

use super::{CLIENTS, Plan, Restored, Results, Round, SCALE};

/// Writes `backup.md` and `backup.svg` into the folder of the plan.
///
/// # Errors
/// If a file cannot be written.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    fs::create_dir_all(&plan.report).context("make the folder of the report")?;
    let path = plan.report.join("backup.md");
    fs::write(&path, page(plan, results)).context("write the report")?;
    fs::write(plan.report.join("backup.svg"), plot(&results.restores)).context("write the plot")?;
    eprintln!("the report is {}", path.display());
    Ok(())
}

fn page(plan: &Plan, results: &Results) -> String {
    let (bare, howdah) = (median_s(&results.bare), median_s(&results.howdah));
    let held = median_s(&results.held);
    let tps = |rounds: &[Round]| median(&rounds.iter().map(|round| round.tps).collect::<Vec<_>>());
    let stall =
        |rounds: &[Round]| rounds.iter().map(|round| round.stall).max().unwrap_or_default().as_millis();
    let (alone, backed_up) = (tps(&results.alone), tps(&results.backed_up));
    let mut steps = String::new();
    for (phase, took) in &results.steps {
        let _ = writeln!(steps, "| {phase} | {took} |");
    }
    let mut rounds = String::new();
    for (i, (alone, backed_up)) in results.alone.iter().zip(&results.backed_up).enumerate() {
        let _ = writeln!(
            rounds,
            "| {} | {:.0} | {} | {:.0} | {} | {:.3} |",
            i + 1,
            alone.tps,
            alone.stall.as_millis(),
            backed_up.tps,
            backed_up.stall.as_millis(),
            backed_up.tps / alone.tps
        );
    }
    let mut restores = String::new();
    for restored in &results.restores {
        let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
        let rollback = restored.rollback.map_or_else(|| "not tried".to_owned(), seconds);
        let _ = writeln!(restores, "| {} | {} | {rollback} |", restored.gib, seconds(restored.swap));
    }
    let swaps: Vec<f64> = results.restores.iter().map(|restored| restored.swap.as_secs_f64()).collect();
    let middle = median(&swaps);
    let furthest = swaps.iter().map(|swap| (swap / middle - 1.0).abs()).fold(0.0, f64::max);
    format!(
        "# What a backup and a restore cost\n\n\
         Written by `make bench-backup`, on {machine}; the load average was {load} at the end. Ceph (one OSD), the API server,\n\
         PostgreSQL, pgbench and the scheduler share the processors: read the ratios.\n\n\
         | | howdah | beside it | ratio | target |\n|---|---|---|---|---|\n\
         | a backup, beside `CHECKPOINT` and `rbd snap create` | {howdah:.2} s | {bare:.2} s | {wall:.2} | <= 1.5x |\n\
         | of it in backup mode: checkpoint, snapshot, stop | {held:.2} s | {bare:.2} s | {mode:.2} | |\n\
         | transactions a second with a backup every 10 s, beside none | {backed_up:.0} | {alone:.0} | {kept:.3} | >= 0.97 |\n\
         | the longest transaction | {stall_backed} ms | {stall_alone} ms | | named |\n\
         | swap: furthest from the median of all sizes | {furthest:.0} % | | | <= 20 % |\n\n\
         ![restores by the size of the image](backup.svg)\n\n\
         ## The steps of the last backup\n\n| phase | ms |\n|---|---|\n{steps}\n\
         ## Rounds of pgbench\n\n\
         | round | tps alone | longest, ms | tps with backups | longest, ms | ratio |\n|---|---|---|---|---|---|\n{rounds}\n\
         ## Restores\n\n| image, GiB | swap, s | rollback, s |\n|---|---|---|\n{restores}\n\
         ## How each figure was obtained\n\n\
         - **A backup**: {pairs} pairs, in turns, each after 200 transactions a client; the median of each. The time of howdah's\n  is that of its record, from its first attempt to its end, with preflight, record, catalogue and the pruning of the backup\n  before. The bare commands are run by `psql` and `rbd`.\n\
         - **pgbench**: scale {SCALE}, {CLIENTS} clients, {seconds} s a round, rounds with and without backups in turns; medians. The longest\n  transaction is over all rounds.\n\
         - **Restores** are of stopped databases. The time is that of the steps between the proofs that nobody writes and the\n  start: what a restore adds to a stop and a start. Each image has a file system of at most 1 GiB with a small database, the rest was\n  never written.\n",
        machine = machine(),
        load = load_average(),
        wall = howdah / bare,
        mode = held / bare,
        kept = backed_up / alone,
        stall_backed = stall(&results.backed_up),
        stall_alone = stall(&results.alone),
        furthest = furthest * 100.0,
        pairs = plan.backups,
        seconds = plan.seconds,
    )
}

/// Seconds by size: a swap and a rollback of each image, both axes by powers.
fn plot(restores: &[Restored]) -> String {
    const WIDTH: f64 = 520.0;
    const HEIGHT: f64 = 240.0;
    const LEFT: f64 = 70.0;
    const TOP: f64 = 50.0;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 340\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"640\" height=\"340\" fill=\"white\"/>\n",
    );
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"30\" font-weight=\"bold\">Restore by the size of the image, s</text>"
    );
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#ccc\"/>"
    );
    let sizes: Vec<f64> = restores.iter().map(|restored| f64::from(restored.gib).log2()).collect();
    let (first, last) =
        (sizes.first().copied().unwrap_or_default(), sizes.last().copied().unwrap_or_default());
    let x = |gib: u32| LEFT + WIDTH * (f64::from(gib).log2() - first) / (last - first).max(1.0);
    // From a tenth of a second to the power of ten above the longest.
    let times = restores.iter().flat_map(|restored| [Some(restored.swap), restored.rollback]).flatten();
    let decades = (times.map(|time| time.as_secs_f64().log10()).fold(0.0, f64::max).ceil() + 1.0).max(1.0);
    let y = |time: f64| TOP + HEIGHT * (1.0 - (time.log10() + 1.0).clamp(0.0, decades) / decades);
    let curves = [
        (
            "swap",
            "#0b6",
            restores.iter().map(|restored| (restored.gib, Some(restored.swap))).collect::<Vec<_>>(),
        ),
        ("rollback", "#888", restores.iter().map(|restored| (restored.gib, restored.rollback)).collect()),
    ];
    for (i, (name, colour, times)) in curves.iter().enumerate() {
        let points: Vec<String> = times
            .iter()
            .filter_map(|(gib, time)| Some(format!("{:.1},{:.1}", x(*gib), y((*time)?.as_secs_f64()))))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <text x=\"85\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            points.join(" "),
            75 + 18 * i
        );
    }
    for restored in restores {
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"308\" text-anchor=\"middle\">{} GiB</text>",
            x(restored.gib),
            restored.gib
        );
    }
    for power in 0..=decades as i32 {
        let time = 10_f64.powi(power - 1);
        let _ = writeln!(svg, "<text x=\"62\" y=\"{:.0}\" text-anchor=\"end\">{time}</text>", y(time) + 4.0);
    }
    svg.push_str("</svg>\n");
    svg
}
