//! A drill against a model of the world, killed after every prefix of its effects.

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::*;

/// What a drill makes, and what it is allowed to leave: nothing.
#[derive(Debug, Clone, Default)]
struct World {
    clone: bool,
    pod: bool,
    looks: u32,
    catalogued: bool,
    announced: u32,
    /// What the pod says at its end.
    report: Option<Report>,
    /// Effects that fail before they succeed, by the order they come in.
    failures: Vec<bool>,
}

impl World {
    fn fails(&mut self) -> bool {
        !self.failures.is_empty() && self.failures.remove(0)
    }

    fn perform(&mut self, effect: Effect, now: &mut Timestamp) -> Option<Event> {
        let problem = || Event::Failed(Problem::new(FailureKind::Transient, "it did not answer", "wait"));
        match effect {
            Effect::Announce => {
                self.announced += 1;
                return None;
            }
            Effect::Wait { until } => {
                *now = (*now).max(until);
                return Some(Event::RetryDue);
            }
            _ if self.fails() => return Some(problem()),
            _ => {}
        }
        Some(match effect {
            Effect::Preflight => Event::PreflightPassed,
            Effect::Clone => {
                assert!(!self.pod, "a clone is made anew under a running pod");
                self.clone = true;
                Event::Cloned
            }
            Effect::Start => {
                assert!(self.clone, "a pod without its clone");
                self.pod = true;
                Event::Started
            }
            Effect::Look if !self.pod => problem(),
            Effect::Look if self.looks < 2 => {
                self.looks += 1;
                Event::Runs { pending: (self.looks == 1).then(|| "image".to_owned()) }
            }
            Effect::Look => match &self.report {
                Some(report) => Event::Ended(Ended::Reported(report.clone())),
                None => Event::Ended(Ended::Silent { seen: "OOMKilled".to_owned() }),
            },
            Effect::Remove => {
                (self.pod, self.clone) = (false, false);
                Event::Removed
            }
            Effect::Record => {
                self.catalogued = true;
                Event::Recorded
            }
            Effect::Wait { .. } | Effect::Announce => return None,
        })
    }
}

/// Most events of one drill with all its retries.
const EVENTS_MAX: usize = 200;

/// Runs until the end, with the process killed before (`false`) or after (`true`) the effects whose numbers are given.
fn run(world: &mut World, kills: &[(usize, bool)]) -> VerifyStatus {
    let mut now: Timestamp = "2026-11-22T04:00:00Z".parse().unwrap();
    let mut status = VerifyStatus::default();
    let mut event = Event::Resumed;
    for number in 0..EVENTS_MAX {
        now += SignedDuration::from_secs(1);
        let (next_status, effects) = next(&status, event, now).unwrap();
        status = next_status;
        assert!(effects.len() <= 1, "{effects:?}");
        let Some(effect) = effects.first() else { return status };
        let killed = kills.iter().find(|(at, _)| *at == number);
        let answer = match killed {
            Some((_, false)) => None,
            _ => world.perform(*effect, &mut now),
        };
        event = match (killed, answer) {
            (None, Some(answer)) => answer,
            (None, None) => return status,
            (Some(_), _) => Event::Resumed,
        };
    }
    panic!("it never ends: {status:?}");
}

fn good() -> Report {
    Report { rows: Some(7), ..Report::default() }
}

#[test]
fn killed_anywhere_it_ends_the_same_and_leaves_nothing() {
    let damaged = Report { damage: Some("invalid page".to_owned()), ..good() };
    for (report, end) in [(good(), Phase::Verified), (damaged, Phase::Damaged)] {
        for number in 0..12 {
            for after in [false, true] {
                let mut world = World { report: Some(report.clone()), ..World::default() };
                let status = run(&mut world, &[(number, after)]);
                assert_eq!(status.phase, end, "killed at {number}, {after}: {status:?}");
                assert!(!world.pod && !world.clone, "killed at {number}, {after}: something is left");
                assert!(world.catalogued);
                assert_eq!(status.report.as_ref(), Some(&report));
            }
        }
    }
}

#[test]
fn a_pod_that_says_nothing_condemns_nothing() {
    let mut world = World::default();
    let status = run(&mut world, &[]);
    assert_eq!((status.phase, status.attempt), (Phase::Inconclusive, ATTEMPTS_MAX));
    assert!(status.failure.unwrap().reason.contains("OOMKilled"));
    assert!(!world.pod && !world.clone && !world.catalogued);
}

#[test]
fn a_pod_that_never_begins_is_given_up_with_what_it_waits_for() {
    let since: Timestamp = "2026-11-22T04:00:00Z".parse().unwrap();
    let status = VerifyStatus { phase: Phase::Running, phase_since: Some(since), ..VerifyStatus::default() };
    let waits = || Event::Runs { pending: Some("ErrImagePull: no such image".to_owned()) };
    let (soon, effects) = next(&status, waits(), since + SignedDuration::from_mins(1)).unwrap();
    assert!(matches!(effects[..], [Effect::Wait { .. }]) && soon.failure.is_none());
    let late = since + PENDING_LIMIT + SignedDuration::from_secs(1);
    let (late, effects) = next(&status, waits(), late).unwrap();
    assert_eq!(effects, [Effect::Remove]);
    assert!(late.failure.unwrap().reason.contains("ErrImagePull"));
}

#[test]
fn a_permanent_refusal_ends_it_at_once() {
    let status = VerifyStatus { phase: Phase::Preflight, attempt: 1, ..VerifyStatus::default() };
    let now = "2026-11-22T04:00:00Z".parse().unwrap();
    let refused =
        Event::Failed(Problem::new(FailureKind::Permanent, "the volume is encrypted", "annotate never"));
    let (status, effects) = next(&status, refused, now).unwrap();
    assert_eq!((status.phase, effects), (Phase::Inconclusive, vec![Effect::Announce]));
}

proptest! {
    #[test]
    fn whatever_fails_and_whenever_it_is_killed_it_ends_and_never_condemns_without_proof(
        failures in prop::collection::vec(any::<bool>(), 0..30),
        kills in prop::collection::vec((0_usize..60, any::<bool>()), 0..6),
        says in any::<bool>(),
    ) {
        let mut world = World { failures, report: says.then(good), ..World::default() };
        let status = run(&mut world, &kills);
        prop_assert!(status.phase.is_terminal());
        prop_assert_ne!(status.phase, Phase::Damaged);
        prop_assert_eq!(status.phase == Phase::Verified, status.report.is_some());
        let left = world.pod || world.clone;
        prop_assert!(!left || status.left_behind.is_some(), "left without a word: {:?}", status);
    }
}
