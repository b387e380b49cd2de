//! One backup, as a state machine: what to do next, and what to do when it fails or the process restarts.

mod record;

pub use record::{
    BackupStatus, Condition, Failure, FailureKind, ImageRecord, Order, Phase, SnapshotRecord, StepOutcome,
    StepRecord, Trigger,
};
