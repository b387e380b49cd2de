//! A running scheduler, looked at from outside: its memory, its metrics, its log, and what it asks of the API server.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use howdah_lab::lab::Lab;
use howdah_lab::testing::Process;
use jiff::Timestamp;
use serde_json::Value;

/// How long the first lists may take.
const START_LIMIT: Duration = Duration::from_secs(600);
/// Where the scheduler answers, inside the lab's network namespace.
const DIAGNOSTICS: &str = "127.0.0.1:18099";
/// Seconds between two ticks: what is installed.
pub const WAKE_SECONDS: u32 = 2;

/// A running scheduler.
pub struct Scheduler {
    lab: Lab,
    process: Process,
    /// From the start of the process until it had made its first look at all schedules.
    pub start_to_first_tick: Duration,
}

impl Scheduler {
    /// Starts the one that lies beside this program, and waits for its first tick.
    ///
    /// # Errors
    /// If it does not come to that.
    pub fn start(lab: &Lab) -> Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(own.with_file_name("howdah-scheduler"));
        command.arg("--kubeconfig").arg(lab.inside_kubeconfig());
        command.args([
            "--listen",
            DIAGNOSTICS,
            "--identity",
            "bench",
            "--wake-seconds",
            &WAKE_SECONDS.to_string(),
        ]);
        command.env_remove("POD_NAMESPACE").env_remove("POD_NAME");
        let start = Instant::now();
        let process = lab.spawn_inside("bench-scheduler", &command)?;
        let mut scheduler = Self { lab: lab.clone(), process, start_to_first_tick: Duration::ZERO };
        let mut ticked = None;
        let lab = lab.clone();
        scheduler.process.wait_ready(START_LIMIT, || {
            let ticks = metrics(&lab)
                .ok()
                .and_then(|all| value(&all, "howdah_scheduler_tick_duration_seconds_count"));
            if ticks.is_some_and(|ticks| ticks >= 1.0) {
                ticked.get_or_insert(start.elapsed());
            }
            ticked.is_some()
        })?;
        scheduler.start_to_first_tick = ticked.unwrap_or_default();
        Ok(scheduler)
    }

    /// Resident memory in KiB: now, or at the peak.
    ///
    /// # Errors
    /// If it has ended.
    pub fn memory_kib(&self, peak: bool) -> Result<u64> {
        let pid = self.process.pid().context("find the scheduler: it has ended")?;
        let status =
            fs::read_to_string(format!("/proc/{pid}/status")).context("read the scheduler's memory")?;
        let key = if peak { "VmHWM:" } else { "VmRSS:" };
        let line =
            status.lines().find_map(|line| line.strip_prefix(key)).context("find the scheduler's memory")?;
        line.trim().trim_end_matches(" kB").parse().context("read the scheduler's memory")
    }

    /// Number and total time of its ticks so far.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn ticks(&self) -> Result<(f64, f64)> {
        let all = metrics(&self.lab)?;
        let read = |name: &str| value(&all, name).with_context(|| format!("find {name}"));
        let name = "howdah_scheduler_tick_duration_seconds";
        Ok((read(&format!("{name}_count"))?, read(&format!("{name}_sum"))?))
    }

    /// For every slot that was found due: how long after the alarm of that tick.
    ///
    /// # Errors
    /// If its log cannot be read.
    pub fn lateness(&self) -> Result<Vec<Duration>> {
        let log = self.process.output()?;
        let due = log.lines().filter(|line| line.contains("slot is due"));
        let late = due.map(|line| {
            let line: Value = serde_json::from_str(line).context("read a line of the scheduler's log")?;
            let at: Timestamp =
                line["timestamp"].as_str().unwrap_or_default().parse().context("read a time")?;
            let since_alarm = at.as_microsecond() % (i64::from(WAKE_SECONDS) * 1_000_000);
            anyhow::Ok(Duration::from_micros(since_alarm.unsigned_abs()))
        });
        late.collect()
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it does not end.
    pub fn stop(self) -> Result<()> {
        self.process.stop()
    }
}

fn metrics(lab: &Lab) -> Result<String> {
    let mut curl = lab.command("curl");
    lab.output_inside(curl.args(["-sf", "--max-time", "5", &format!("http://{DIAGNOSTICS}/metrics")]))
}

fn value(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Requests for StatefulSets and howdah's records that the API server has answered, by verb and resource. Watches count
/// when they end.
///
/// # Errors
/// If it does not say.
pub fn requests(lab: &Lab) -> Result<BTreeMap<String, u64>> {
    let text = lab.kubectl_ok(&["get", "--raw", "/metrics"])?;
    let mut found = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("apiserver_request_total{")) {
        let Some((labels, count)) = line.rsplit_once("} ") else { continue };
        let label = |name: &str| {
            let from = labels.split(',').find_map(|label| label.strip_prefix(name)?.strip_prefix("=\""));
            from.map(|value| value.trim_end_matches('"')).unwrap_or_default()
        };
        // The status of a StatefulSet is its controller's, who writes it for a while after ten thousand were made.
        let of_set = label("resource") == "statefulsets" && label("subresource") != "status";
        if label("group") == "howdah.dev" || of_set {
            let count: f64 = count.parse().context("read a count of requests")?;
            *found.entry(format!("{} {}", label("verb"), label("resource"))).or_default() += count as u64;
        }
    }
    ensure!(!found.is_empty(), "count requests: the API server's metrics name none");
    Ok(found)
}

/// How many more requests there are in `after`, LIST, GET and writes together; a watch that is renewed is none.
#[must_use]
pub fn more(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> u64 {
    let asked = after.iter().filter(|(what, _)| !what.starts_with("WATCH"));
    asked.map(|(what, count)| count - before.get(what).copied().unwrap_or_default()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_without_watches() {
        let count =
            |list, watch| BTreeMap::from([("LIST a".to_owned(), list), ("WATCH a".to_owned(), watch)]);
        assert_eq!(more(&count(3, 1), &count(5, 9)), 2);
        assert_eq!(more(&BTreeMap::new(), &count(5, 9)), 5);
    }

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "ticks_total 4\nticks_sum 0.5\nticks_count 7\n";
        assert_eq!(value(text, "ticks_count"), Some(7.0));
        assert_eq!(value(text, "ticks"), None);
    }
}
