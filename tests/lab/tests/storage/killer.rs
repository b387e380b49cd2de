//! A scheduler that is killed in the phases of restores.

use std::thread;
use std::time::{Duration, Instant};

use howdah_core::restore::Phase;
use howdah_lab::stage::{RESTORE_LIMIT, Stage};
use howdah_lab::testing::Process;
use nix::sys::signal::Signal;

use crate::linger::Linger;

/// Between two looks at the phase of a restore, which lingers in it for seconds.
const STEP: Duration = Duration::from_millis(100);
/// The phases of a swap that end in an effect.
pub const SWAP_PHASES: [Phase; 10] = [
    Phase::Gating,
    Phase::Stopping,
    Phase::Proving,
    Phase::Preparing,
    Phase::SettingAside,
    Phase::Placing,
    Phase::Bookkeeping,
    Phase::Starting,
    Phase::Answering,
    Phase::Opening,
];

/// A scheduler that is killed in the phases of restores, and started again as a container is: under the same name, so that it
/// leads at once.
pub struct Killer<'a> {
    stage: &'a Stage,
    linger: Linger<'a>,
    scheduler: Process,
    /// Each listens on a port of its own: the last one's may be in use for a moment.
    port: u16,
}

impl<'a> Killer<'a> {
    pub fn new(stage: &'a Stage) -> Self {
        let port = 18081;
        let scheduler = stage.scheduler("scheduler-killed", port);
        Self { stage, linger: Linger::of_restores(stage), scheduler, port }
    }

    /// Orders restores by `order` and kills the scheduler in each of these phases that one of them comes to; all have to be
    /// come to.
    pub fn kill_in(&mut self, phases: &[Phase], restores: &[String], order: impl FnOnce()) {
        let mut pending = phases.to_vec();
        self.linger.only_in(pending.iter().map(|phase| phase.as_str()));
        order();
        let mut last = Instant::now();
        while !pending.is_empty() {
            assert!(last.elapsed() < RESTORE_LIMIT, "no restore came to {pending:?}");
            let now = self.stage.restore_phases(restores);
            assert_eq!(now.len(), restores.len(), "a record is missing");
            if now.iter().any(|phase| pending.contains(phase)) {
                self.scheduler.signal(Signal::SIGKILL).unwrap();
                assert!(self.scheduler.wait_gone(RESTORE_LIMIT));
                let killed = self.stage.restore_phases(restores);
                let late: Vec<_> = now.iter().zip(&killed).filter(|(seen, end)| seen != end).collect();
                assert!(!late.iter().any(|(seen, _)| pending.contains(seen)), "it ended its phase: {late:?}");
                pending.retain(|phase| !now.contains(phase));
                self.linger.only_in(pending.iter().map(|phase| phase.as_str()));
                self.port += 1;
                self.scheduler = self.stage.launch_scheduler("scheduler-killed", self.port);
                last = Instant::now();
                continue;
            }
            let over = now.iter().all(|phase| phase.is_terminal());
            assert!(
                !over,
                "over before seen in {pending:?}: {:#?}",
                restores.iter().map(|name| self.stage.restore(name))
            );
            thread::sleep(STEP);
        }
    }

    pub fn end(self) {
        self.scheduler.stop().unwrap();
    }
}
