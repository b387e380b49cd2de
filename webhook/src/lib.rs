//! AdmissionReview in, response out.
//!
//! A review runs through [`http`] (limits), [`review`] (the wire format), [`facts`] (what the cluster knows), and
//! `howdah_core::policy`, which decides. [`args`] wires the process together.

pub mod args;
pub mod facts;
pub mod http;
pub mod metrics;
pub mod review;
