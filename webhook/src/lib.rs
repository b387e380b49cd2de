//! AdmissionReview in, response out.
//!
//! A review runs through [`connections`] and [`intake`] (limits), [`http`], [`review`] (the wire format), [`facts`] (what
//! the cluster knows), and `howdah_core::policy`, which decides. [`lists`] keeps what the API server goes by while no
//! webhook serves. [`args`] wires the process together.

pub mod args;
pub mod connections;
pub mod facts;
pub mod http;
pub mod intake;
pub mod lists;
pub mod metrics;
pub mod review;
