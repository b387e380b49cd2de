//! The report on backups and restores: a page with the figures, how each was obtained and on what, and a plot.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use howdah_bench_figures::{load_average, machine, mean, median, median_s};

use super::{CLIENTS, Plan, Restored, Results, Round, SCALE};

/// Writes `backup.md` and `backup.svg` into the folder of the plan.
///
/// # Errors
/// If a file cannot be written.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    fs::create_dir_all(&plan.report).context("make the folder of the report")?;
    let path = plan.report.join("backup.md");
    fs::write(&path, page(plan, results)).context("write the report")?;
    fs::write(plan.report.join("backup.svg"), plot(&results.restores, plan.sizes.len()))
        .context("write the plot")?;
    eprintln!("the report is {}", path.display());
    Ok(())
}

fn page(plan: &Plan, results: &Results) -> String {
    let (bare, howdah) = (median_s(&results.bare), median_s(&results.howdah));
    let (held, recorded) = (median_s(&results.held), median_s(&results.recorded));
    let tps = |rounds: &[Round]| median(&rounds.iter().map(|round| round.tps).collect::<Vec<_>>());
    let stall =
        |rounds: &[Round]| rounds.iter().map(|round| round.stall).max().unwrap_or_default().as_millis();
    let (alone, snapped, backed_up) = (tps(&results.alone), tps(&results.snapped), tps(&results.backed_up));
    let mut steps = String::new();
    for (phase, took) in &results.steps {
        let _ = writeln!(steps, "| {phase} | {took} |");
    }
    let mut rounds = String::new();
    let all = results.alone.iter().zip(&results.snapped).zip(&results.backed_up);
    for (i, ((alone, snapped), backed_up)) in all.enumerate() {
        let beside = |round: &Round| {
            format!("{:.0} | {} | {:.3}", round.tps, round.stall.as_millis(), round.tps / alone.tps)
        };
        let _ = writeln!(
            rounds,
            "| {} | {:.0} | {} | {} | {} |",
            i + 1,
            alone.tps,
            alone.stall.as_millis(),
            beside(snapped),
            beside(backed_up),
        );
    }
    let mut restores = String::new();
    for restored in &results.restores {
        let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
        let Restored { gib, written_mib, swap, rollback } = restored;
        let _ = writeln!(restores, "| {gib} | {written_mib} | {} | {} |", seconds(*swap), seconds(*rollback));
    }
    let swaps: Vec<f64> = results.restores.iter().map(|restored| restored.swap.as_secs_f64()).collect();
    let middle = median(&swaps);
    let furthest = swaps.iter().map(|swap| (swap / middle - 1.0).abs()).fold(0.0, f64::max);
    format!(
        "# What a backup and a restore cost\n\n\
         Written by `make bench-backup`, on {machine}; the load average was {load} at the end. Ceph (one OSD), the API server,\n\
         PostgreSQL, pgbench and the scheduler share the processors: read the ratios.\n\n\
         | | howdah | beside it | ratio | target |\n|---|---|---|---|---|\n\
         | a backup until it is recorded, beside `CHECKPOINT` and `rbd snap create` | {recorded:.2} s | {bare:.2} s | {until:.2} | <= 1.5x |\n\
         | the same with the deletion of an older one | {howdah:.2} s | {bare:.2} s | {wall:.2} | |\n\
         | of it in backup mode: checkpoint, snapshot, stop | {held:.2} s | {bare:.2} s | {mode:.2} | |\n\
         | transactions a second in {seconds} s with a backup, beside {seconds} s without | {backed_up:.0} | {alone:.0} | {kept} | >= 0.97 |\n\
         | the same with the bare commands, beside none | {snapped:.0} | {alone:.0} | {cut} | |\n\
         | the longest transaction | {stall_backed} ms | {stall_alone} ms | | named |\n\
         | swap: furthest from the median of all sizes | {furthest:.0} % | | | <= 20 % |\n\n\
         ![restores by the size of the image](backup.svg)\n\n\
         ## The steps of the last backup\n\n| phase | ms |\n|---|---|\n{steps}\n\
         ## Rounds of pgbench\n\n\
         | round | tps alone | longest, ms | with the bare commands | longest, ms | ratio | with a backup | longest, ms | ratio |\n\
         |---|---|---|---|---|---|---|---|---|\n{rounds}\n\
         ## Restores\n\n| image, GiB | overwritten since the backup, MiB | swap, s | rollback, s |\n|---|---|---|---|\n{restores}\n\
         ## How each figure was obtained\n\n\
         - **A backup**: {pairs} pairs, in turns, each after 200 transactions a client; the median of each. Of\n  howdah it is the time of the steps in its journal: preflight, backup mode, record and catalogue; and beside it the time\n  from its first attempt to its end, in which an older backup is deleted. The bare commands are run by `psql` and `rbd`.\n\
         - **pgbench**: scale {SCALE}, {CLIENTS} clients, one run, read in times of {seconds} s with neither, the bare commands and a\n  backup, which follow each other in all orders. The rate is the median; the ratio is the mean of those of the rounds, and after\n  it stands twice its standard error. The longest transaction is over all rounds.\n\
         - **Restores** are of stopped databases. The time is that of the steps between the proofs that nobody writes and the\n  start: what a restore adds to a stop and a start. Each image has a file system of at most 1 GiB with a small database, the rest was\n  never written: of that the object map knows, and so neither of the two looks at it. What is overwritten is a\n  file that the backup holds.\n",
        machine = machine(),
        load = load_average(),
        until = recorded / bare,
        wall = howdah / bare,
        mode = held / bare,
        kept = beside_alone(&results.backed_up, &results.alone),
        cut = beside_alone(&results.snapped, &results.alone),
        stall_backed = stall(&results.backed_up),
        stall_alone = stall(&results.alone),
        furthest = furthest * 100.0,
        pairs = plan.backups,
        seconds = plan.seconds,
    )
}

/// The mean of the ratios of neighbours, and twice its standard error.
fn beside_alone(rounds: &[Round], alone: &[Round]) -> String {
    let ratios: Vec<f64> = rounds.iter().zip(alone).map(|(round, alone)| round.tps / alone.tps).collect();
    let (mean, error) = mean(&ratios);
    format!("{mean:.3} ± {:.3}", 2.0 * error)
}

/// Seconds of a swap and a rollback: by the size of the image, and by what was overwritten since the backup.
fn plot(restores: &[Restored], sizes: usize) -> String {
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1040 340\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"1040\" height=\"340\" fill=\"white\"/>\n",
    );
    let most = restores.iter().map(|restored| restored.swap.max(restored.rollback)).max().unwrap_or_default();
    let (by_size, by_written) = restores.split_at(sizes.min(restores.len()));
    panel(&mut svg, 70.0, "Restore by the size of the image, s", most, by_size, |restored| {
        format!("{} GiB", restored.gib)
    });
    panel(
        &mut svg,
        570.0,
        "Restore by what was overwritten since the backup, s",
        most,
        by_written,
        |restored| format!("{} MiB", restored.written_mib),
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel(
    svg: &mut String,
    left: f64,
    title: &str,
    most: Duration,
    restores: &[Restored],
    label: impl Fn(&Restored) -> String,
) {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 240.0;
    const TOP: f64 = 50.0;
    type Time = fn(&Restored) -> Duration;
    let _ = writeln!(
        svg,
        "<text x=\"{left}\" y=\"30\" font-weight=\"bold\">{title}</text>\n\
         <rect x=\"{left}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#ccc\"/>"
    );
    let top = most.as_secs_f64().max(0.001);
    let x = |place: usize| left + WIDTH * (place as f64 + 0.5) / restores.len().max(1) as f64;
    let y = |time: Duration| TOP + HEIGHT * (1.0 - time.as_secs_f64() / top);
    let curves: [(&str, &str, Time); 2] =
        [("swap", "#0b6", |restored| restored.swap), ("rollback", "#888", |restored| restored.rollback)];
    for (i, (name, colour, time)) in curves.into_iter().enumerate() {
        let points = restores.iter().enumerate();
        let points: Vec<String> =
            points.map(|(place, restored)| format!("{:.1},{:.1}", x(place), y(time(restored)))).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n\
             <text x=\"{}\" y=\"{}\" fill=\"{colour}\">{name}</text>",
            points.join(" "),
            left + 15.0,
            75 + 18 * i
        );
    }
    for (place, restored) in restores.iter().enumerate() {
        let (x, label) = (x(place), label(restored));
        let _ = writeln!(svg, "<text x=\"{x:.0}\" y=\"308\" text-anchor=\"middle\">{label}</text>");
    }
    for part in [0.0, 0.5, 1.0] {
        let (x, y) = (left - 8.0, TOP + 4.0 + HEIGHT * (1.0 - part));
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y:.0}\" text-anchor=\"end\">{:.1}</text>", top * part);
    }
}
