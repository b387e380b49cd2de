//! Pure decisions of howdah: policy, schedule, retention and the operations as state machines.
//!
//! No IO, no clock and no randomness in here: `now` is a parameter, and what is to be done is returned as data.

pub mod annotations;
pub mod audit;
pub mod backup;
pub mod bucket;
pub mod catalogue;
pub mod lineage;
pub mod lint;
pub mod names;
pub mod policy;
pub mod preflight;
pub mod restore;
pub mod retention;
pub mod schedule;
pub mod verify;
pub mod volume;
