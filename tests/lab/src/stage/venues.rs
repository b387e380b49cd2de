//! The labs that stages stand in: one that tests share, and further ones, so that tests that need a scheduler to themselves
//! do not wait for each other. A lab without nodes is up in 12 s.

use std::sync::{Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::Duration;

use crate::process::wait_some;
use crate::testing::{Process, shared_name};

/// How many labs there are, beside each other; one where it is not set.
const VARIABLE: &str = "HOWDAH_LABS";
/// Each takes 1.5 GiB and a tenth of a processor.
const VENUES_MAX: usize = 4;
/// Longer than all tests together may take: a lab that never comes free is a failure.
const TURN_LIMIT: Duration = Duration::from_secs(3600);

/// A lab, and who is in it.
pub struct Venue {
    /// The lab's name.
    pub name: String,
    /// Whether the parts of deploy/ that the scheduler needs were applied in this run.
    pub installed: OnceLock<()>,
    /// A scheduler acts on the whole cluster: the tests that share one, or one test that has its own.
    turn: RwLock<()>,
    /// The shared scheduler. It outlives the tests of this process, and is ended by the next one's first or by `down`.
    pub scheduler: Mutex<Option<Process>>,
}

/// Held while the test runs.
#[expect(dead_code, reason = "what counts is that it is held")]
pub enum Turn {
    /// With others.
    Shared(RwLockReadGuard<'static, ()>),
    /// With nobody.
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Venue {
    /// The first lab, in which others are, too.
    pub fn shared() -> (&'static Self, Turn) {
        let venue = &all()[0];
        (venue, Turn::Shared(venue.turn.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// The last lab that nobody is in; waits for one.
    pub fn alone() -> (&'static Self, Turn) {
        let free = || {
            all().iter().rev().find_map(|venue| match venue.turn.try_write() {
                Ok(turn) => Some((venue, Turn::Alone(turn))),
                Err(TryLockError::Poisoned(turn)) => Some((venue, Turn::Alone(turn.into_inner()))),
                Err(TryLockError::WouldBlock) => None,
            })
        };
        wait_some(TURN_LIMIT, free).unwrap()
    }
}

fn all() -> &'static [Venue] {
    static ALL: OnceLock<Vec<Venue>> = OnceLock::new();
    ALL.get_or_init(|| {
        let count = std::env::var(VARIABLE).map_or(1, |text| text.parse().unwrap());
        assert!((1..=VENUES_MAX).contains(&count), "{VARIABLE} is {count}, wanted 1 to {VENUES_MAX}");
        let first = shared_name();
        let name = |number: usize| if number == 1 { first.clone() } else { format!("{first}-{number}") };
        let venue = |number| Venue {
            name: name(number),
            installed: OnceLock::new(),
            turn: RwLock::new(()),
            scheduler: Mutex::new(None),
        };
        (1..=count).map(venue).collect()
    })
}
