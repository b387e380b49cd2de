//! The benchmarks of the scheduler.
//!
//! [`scale`] says what is measured in which order over many databases, [`crowd`] makes those databases, [`watched`] runs
//! the scheduler and looks at it from outside, [`report`] writes docs/benchmarks/.

pub mod crowd;
pub mod report;
pub mod scale;
pub mod watched;
