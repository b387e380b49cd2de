//! The report: a page with the figures, how each was obtained and on what, and a plot.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use howdah_bench_figures::{load_average, machine, median, median_s, quantile};

use crate::body::BODY_BYTES;
use crate::load::CONNECTIONS;
use crate::plan::{Measured, Plan, RATE, Results};

/// The percentiles that are shown.
const PERCENTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

/// Writes `admission.md` and `admission.svg` into the folder of the plan.
///
/// # Errors
/// If a file cannot be written.
pub fn write(plan: &Plan, results: &Results) -> Result<()> {
    fs::create_dir_all(&plan.report).context("make the folder of the report")?;
    fs::write(plan.report.join("admission.md"), page(plan, results)).context("write the report")?;
    fs::write(plan.report.join("admission.svg"), plot(results)).context("write the plot")?;
    eprintln!("the report is {}", plan.report.join("admission.md").display());
    Ok(())
}

fn page(plan: &Plan, results: &Results) -> String {
    let (howdah, floor) = (&results.howdah, &results.floor);
    let ratio = |ours: f64, theirs: f64| format!("{:.2}", ours / theirs);
    let mut rows = String::new();
    let mut row = |what: &str, ours: String, theirs: String, ratio: String, target: &str| {
        let _ = writeln!(rows, "| {what} | {ours} | {theirs} | {ratio} | {target} |");
    };
    for (name, part) in PERCENTILES {
        let (ours, theirs) = (latency_us(howdah, part), latency_us(floor, part));
        let target = if name == "p99" { "<= 1.3x" } else { "" };
        let text = |us: f64| format!("{:.2} ms", us / 1000.0);
        row(&format!("latency at {RATE}/s, {name}"), text(ours), text(theirs), ratio(ours, theirs), target);
    }
    let (ours, theirs) = (median(&howdah.throughputs), median(&floor.throughputs));
    row(
        "throughput at saturation",
        format!("{ours:.0}/s"),
        format!("{theirs:.0}/s"),
        ratio(ours, theirs),
        ">= 0.8x",
    );
    let (ours, theirs) = (median_us(&howdah.costs), median_us(&floor.costs));
    row(
        "processor time of the server per review",
        format!("{ours:.0} us"),
        format!("{theirs:.0} us"),
        ratio(ours, theirs),
        "",
    );
    let mib = |kib: u64| kib as f64 / 1024.0;
    let (ours, theirs) = (mib(howdah.memory_peak_kib), mib(floor.memory_peak_kib));
    row(
        "resident memory, peak under this load",
        format!("{ours:.1} MiB"),
        format!("{theirs:.1} MiB"),
        ratio(ours, theirs),
        "<= 32 MiB",
    );
    let (begin, end) = growth(&results.memory);
    row(
        &format!("resident memory after {} reviews more", plan.long),
        format!("{:.1} MiB (after a tenth: {:.1})", mib(end), mib(begin)),
        String::new(),
        String::new(),
        "<= 32 MiB, no growth",
    );
    let (ours, theirs) = (median_us(&howdah.starts), median_us(&floor.starts));
    let text = |us: f64| format!("{:.0} ms", us / 1000.0);
    row("start to ready", text(ours), text(theirs), String::new(), "<= 500 ms");

    let mut rounds = String::new();
    for i in 0..howdah.latencies.len() {
        let p99 = |measured: &Measured| quantile(&measured.latencies[i], 0.99).as_secs_f64() * 1000.0;
        let _ = writeln!(
            rounds,
            "| {} | {:.2} | {:.2} | {:.0} | {:.0} |",
            i + 1,
            p99(howdah),
            p99(floor),
            howdah.throughputs[i],
            floor.throughputs[i]
        );
    }
    format!(
        "# Admission: howdah's webhook beside the floor of its stack\n\n\
         Written by `make bench-admission`. Both servers ran in the same run on the same machine; read the ratios, the absolute\n\
         figures are of this machine: {machine}. The machine's load average was {load} at the end.\n\n\
         | | howdah | floor | ratio | target |\n|---|---|---|---|---|\n{rows}\n\
         ![latency and memory](admission.svg)\n\n\
         ## How each figure was obtained\n\n\
         - **The servers.** howdah is the released webhook as it is installed, with its rules, limits, metrics and logs (level\n  info), beside a real API server. The floor (`bench/admission/src/floor.rs`) is kube-rs' example of an admission\n  server: axum, axum-server and rustls, the typed `AdmissionReview<DynamicObject>`, json-patch, and nothing else. Both are\n  built in this workspace by the same release profile, offer TLS 1.2 and 1.3 and HTTP/1.1, and serve an ECDSA certificate\n  on P-256. The allocator is part of what is compared: howdah's is mimalloc, the floor's that of the C library.\n\
         - **The reviews.** Bodies of {BODY_BYTES} bytes: the creation of a PostgreSQL StatefulSet, alternately as the user wrote it\n  (`/mutate`, howdah answers with a patch of its defaults, the floor with a label) and with the defaults (`/validate`, all\n  rules pass). Every answer has to allow; one that does not ends the benchmark.\n\
         - **The client** has {CONNECTIONS} kept TLS connections, a thread each, and shares the processors with the server. Nothing leaves\n  the machine.\n\
         - **Latency**: {paced} reviews a round, due at {RATE} a second whatever the answers do; the time runs from when a review was\n  due, so a stall counts against all that it holds up. Each percentile is the median over {count} rounds; the rounds of\n  the two servers alternate. Where other programs want the processors, too, waiting for one is most of the\n  latency of both, and the ratio goes towards 1: the processor time per review is what they change least.\n\
         - **Throughput**: {flood} reviews a round, each connection sending the next as soon as it has an answer; the median over the\n  rounds. The client's own work is in it for both; the processor time per review (from /proc) is the server's alone.\n\
         - **Memory**: `VmHWM` of /proc after all rounds; then {long} reviews at saturation ({seconds:.0} s), with `VmRSS` every 500 ms.\n  \"After a tenth\" is the median of the second tenth of that run, the other figure that of its last tenth.\n\
         - **Start to ready**: from the start of the process until /readyz answers 200 (howdah: authority read, trusted by the API\n  server, caches filled) or the port accepts (floor); the median of {starts} starts, asked every 2 ms.\n\n\
         ## Rounds\n\n\
         | round | howdah p99, ms | floor p99, ms | howdah reviews/s | floor reviews/s |\n|---|---|---|---|---|\n{rounds}",
        machine = machine(),
        load = load_average(),
        paced = plan.paced,
        count = plan.rounds,
        flood = plan.flood,
        long = plan.long,
        seconds = results.long.as_secs_f64(),
        starts = plan.starts,
    )
}

/// The median over the rounds of one percentile, in microseconds.
fn latency_us(measured: &Measured, part: f64) -> f64 {
    let rounds: Vec<Duration> = measured.latencies.iter().map(|round| quantile(round, part)).collect();
    median_us(&rounds)
}

fn median_us(times: &[Duration]) -> f64 {
    median_s(times) * 1e6
}

/// The memory in the second and in the last tenth of the long run, in KiB.
fn growth(memory: &[(usize, u64)]) -> (u64, u64) {
    let tenth = (memory.len() / 10).max(1);
    let middle = |part: &[(usize, u64)]| {
        let mut kib: Vec<u64> = part.iter().map(|(_, kib)| *kib).collect();
        kib.sort_unstable();
        kib.get(kib.len() / 2).copied().unwrap_or_default()
    };
    let begin = tenth.min(memory.len().saturating_sub(1));
    (
        middle(&memory[begin..(begin + tenth).min(memory.len())]),
        middle(&memory[memory.len() - tenth.min(memory.len())..]),
    )
}

/// Two panels: the distribution of the latencies, and the memory over the long run.
fn plot(results: &Results) -> String {
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 240.0;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1040 340\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"1040\" height=\"340\" fill=\"white\"/>\n",
    );
    // Latencies: from the median to the thousandth, each step halving what is left above.
    let parts: Vec<f64> = (1..=10).map(|i| 1.0 - 0.5f64.powi(i)).collect();
    let curves = [(&results.howdah, "#0b6", "howdah"), (&results.floor, "#888", "floor")];
    let top_us =
        curves.iter().map(|(measured, ..)| latency_us(measured, parts[parts.len() - 1])).fold(1.0, f64::max);
    let frame = |svg: &mut String, x: f64, title: &str| {
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"30\" font-weight=\"bold\">{title}</text>");
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"50\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#ccc\"/>"
        );
    };
    frame(&mut svg, 70.0, &format!("Latency at {RATE} reviews a second, ms"));
    for (i, (measured, colour, name)) in curves.iter().enumerate() {
        let points: Vec<String> = parts
            .iter()
            .enumerate()
            .map(|(step, part)| {
                let x = 70.0 + WIDTH * step as f64 / (parts.len() - 1) as f64;
                format!("{x:.1},{:.1}", 50.0 + HEIGHT * (1.0 - latency_us(measured, *part) / top_us))
            })
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.join(" ")
        );
        let _ = writeln!(svg, "<text x=\"85\" y=\"{}\" fill=\"{colour}\">{name}</text>", 75 + 18 * i);
    }
    for (x, label) in [(0.0, "p50"), (5.64 / 9.0, "p99"), (8.97 / 9.0, "p99.9")] {
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"308\" text-anchor=\"middle\">{label}</text>",
            70.0 + WIDTH * x
        );
    }
    for part in [0.0, 0.5, 1.0] {
        let y = 54.0 + HEIGHT * (1.0 - part);
        let _ = writeln!(
            svg,
            "<text x=\"62\" y=\"{y:.0}\" text-anchor=\"end\">{:.2}</text>",
            top_us * part / 1000.0
        );
    }
    let most = results.memory.iter().map(|(_, kib)| *kib).max().unwrap_or(1).max(32 * 1024) as f64;
    let reviews = results.memory.last().map_or(1, |(reviews, _)| (*reviews).max(1)) as f64;
    frame(&mut svg, 570.0, "Resident memory of howdah in the long run, MiB");
    let y = |kib: f64| 50.0 + HEIGHT * (1.0 - kib / most);
    let points: Vec<String> = results
        .memory
        .iter()
        .map(|(at, kib)| format!("{:.1},{:.1}", 570.0 + WIDTH * *at as f64 / reviews, y(*kib as f64)))
        .collect();
    let limit = y(32.0 * 1024.0);
    let _ = writeln!(
        svg,
        "<line x1=\"570\" x2=\"990\" y1=\"{limit:.1}\" y2=\"{limit:.1}\" stroke=\"#c33\" stroke-dasharray=\"4\"/>"
    );
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#0b6\" stroke-width=\"2\"/>",
        points.join(" ")
    );
    for mib in [0, 16, 32] {
        let _ = writeln!(
            svg,
            "<text x=\"562\" y=\"{:.0}\" text-anchor=\"end\">{mib}</text>",
            y(f64::from(mib) * 1024.0) + 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"570\" y=\"308\">0</text><text x=\"990\" y=\"308\" text-anchor=\"end\">{reviews:.0} reviews</text>"
    );
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_compares_the_second_tenth_with_the_last() {
        let memory: Vec<(usize, u64)> = (0..100).map(|i| (i, i as u64)).collect();
        assert_eq!(growth(&memory), (15, 95));
        assert_eq!(growth(&[(1, 7)]), (7, 7));
    }
}
