//! What the reports of all benchmarks share: medians and percentiles, and on what they were obtained.

use std::fs;
use std::time::Duration;

/// The value below which this part of `sorted` lies; zero of nothing.
#[must_use]
pub fn quantile(sorted: &[Duration], part: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or_default()
}

/// The middle one of these figures, of an even number the larger of the two; zero of nothing.
#[must_use]
pub fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

/// The mean of these figures and its standard error; zero of fewer than two.
#[must_use]
pub fn mean(figures: &[f64]) -> (f64, f64) {
    let number = figures.len() as f64;
    let mean = figures.iter().sum::<f64>() / number.max(1.0);
    let squares: f64 = figures.iter().map(|figure| (figure - mean).powi(2)).sum();
    (mean, (squares / (number - 1.0).max(1.0) / number.max(1.0)).sqrt())
}

/// The middle one of these times, in seconds.
#[must_use]
pub fn median_s(times: &[Duration]) -> f64 {
    let times: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    median(&times)
}

/// Processor, number of cores and kernel of this machine.
#[must_use]
pub fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let model = model.trim_start_matches([' ', '\t', ':']);
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} processors {model}, Linux {}", kernel.trim())
}

/// The machine's load average over the last minute.
#[must_use]
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_what_their_names_say() {
        let times: Vec<Duration> = (0..=1000).map(Duration::from_micros).collect();
        assert_eq!(quantile(&times, 0.5), Duration::from_micros(500));
        assert_eq!(quantile(&times, 0.999), Duration::from_micros(999));
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
        let times: Vec<Duration> = [9, 1, 5].map(Duration::from_secs).to_vec();
        assert!((median_s(&times) - 5.0).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
        let (middle, error) = mean(&[1.0, 2.0, 3.0]);
        assert!((middle - 2.0).abs() < 1e-9 && (error - (1.0_f64 / 3.0).sqrt()).abs() < 1e-9);
        assert!(mean(&[]).0.abs() < 1e-9 && mean(&[4.0]).1.abs() < 1e-9);
    }
}
