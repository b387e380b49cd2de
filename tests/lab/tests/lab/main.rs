//! The lab's own tests: what later tests stand on.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

mod ceph;
mod control_plane;
mod down;
mod requirements;
mod side_by_side;
mod storage;

use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;

/// A lab for one destructive test, beside the shared one and named after it, so that two test runs of
/// different names do not meet. What a failed run left of it is taken down.
fn lab_beside(suffix: &str) -> Lab {
    let lab = Lab::named(&format!("{}-{suffix}", shared_name())).unwrap();
    down::down(&lab);
    lab
}
