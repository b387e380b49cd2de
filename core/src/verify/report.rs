//! What the drill's script says at its end, and what an end without a word means.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest report: what Kubernetes keeps of a termination message.
pub const REPORT_MAX: usize = 4096;
/// Longest text of one line in it.
const TEXT_MAX: usize = 400;

/// What PostgreSQL said of the backup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// `server_version` of the PostgreSQL that was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres_version: Option<String>,
    /// From its start until recovery was over, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_ms: Option<u64>,
    /// The system identifier it found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
    /// Databases that were looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub databases: Option<u64>,
    /// Rows in all ordinary tables: every page was read for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<u64>,
    /// Whether the data has checksums, which reading every page then proves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksums: Option<bool>,
    /// What the query of `howdah.dev/verify-query` answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// What is wrong with the backup; absent when every check passed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damage: Option<String>,
}

/// How the drill's pod ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The script came to an end and said what it found.
    Reported(Report),
    /// It did not: killed, evicted, out of memory.
    Silent {
        /// What was seen.
        seen: String,
    },
}

/// What is made of the end of the pod's container, and of what else the backup's record knows.
///
/// `expected` is the system identifier that the backup was taken of, `answer` what the user's query has to say.
#[must_use]
pub fn read(
    exit_code: i32,
    reason: &str,
    message: &str,
    expected: Option<&str>,
    answer: Option<&str>,
) -> Ended {
    let mut report: Report = match serde_json::from_str(message.trim()) {
        Ok(report) if exit_code == 0 => report,
        _ => {
            let last = message.trim().lines().next_back().unwrap_or_default();
            return Ended::Silent {
                seen: format!("the drill's container ended with {exit_code} ({reason}): {}", cut(last)),
            };
        }
    };
    if report.damage.is_none()
        && let Some(damage) = mismatch(&report, expected, answer)
    {
        report.damage = Some(damage);
    }
    report.damage = report.damage.as_deref().map(cut);
    report.answer = report.answer.as_deref().map(cut);
    Ended::Reported(report)
}

fn mismatch(report: &Report, expected: Option<&str>, answer: Option<&str>) -> Option<String> {
    let found = report.system_identifier.as_deref();
    if let (Some(wanted), Some(found)) = (expected, found)
        && wanted != found
    {
        return Some(format!(
            "the system identifier is {found}, wanted {wanted}: it is another cluster's data"
        ));
    }
    let (wanted, found) = (answer?, report.answer.as_deref().unwrap_or_default());
    (wanted != found).then(|| format!("howdah.dev/verify-query answered {found:?}, wanted {wanted:?}"))
}

fn cut(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"postgresVersion":"15.14","recoveryMs":812,"systemIdentifier":"7","databases":2,"rows":1000,"checksums":true,"answer":"42"}"#;

    fn damage(ended: Ended) -> Option<String> {
        match ended {
            Ended::Reported(report) => report.damage,
            Ended::Silent { seen } => panic!("{seen}"),
        }
    }

    #[test]
    fn a_good_report_is_good() {
        assert_eq!(damage(read(0, "Completed", GOOD, Some("7"), Some("42"))), None);
        assert_eq!(damage(read(0, "Completed", GOOD, None, None)), None);
    }

    #[test]
    fn what_does_not_fit_the_record_is_damage() {
        let other = damage(read(0, "Completed", GOOD, Some("8"), None)).unwrap();
        assert!(other.contains("is 7, wanted 8"), "{other}");
        let answer = damage(read(0, "Completed", GOOD, None, Some("43"))).unwrap();
        assert!(answer.contains(r#"answered "42", wanted "43""#), "{answer}");
        let said = r#"{"damage":"PANIC: could not locate a valid checkpoint record"}"#;
        assert_eq!(
            damage(read(0, "Completed", said, None, None)).unwrap(),
            "PANIC: could not locate a valid checkpoint record"
        );
    }

    #[test]
    fn an_end_without_a_report_says_nothing_of_the_backup() {
        for (code, reason, message) in [
            (137, "OOMKilled", ""),
            (1, "Error", "sh: not found"),
            (0, "Completed", "{"),
            (137, "Error", GOOD),
        ] {
            let Ended::Silent { seen } = read(code, reason, message, None, None) else {
                panic!("{code} {message} is no report")
            };
            assert!(seen.contains(reason), "{seen}");
        }
    }
}
