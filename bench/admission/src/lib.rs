//! The admission benchmark.
//!
//! [`plan`] says what is measured in which order, [`server`] starts the two servers, of which [`floor`] is one, [`load`] sends the reviews of
//! [`body`] and takes the times, [`report`] writes docs/benchmarks/admission.md and its plot.

pub mod body;
pub mod floor;
pub mod load;
pub mod plan;
pub mod report;
pub mod server;
