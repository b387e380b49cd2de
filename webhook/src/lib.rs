//! AdmissionReview in, response out.
//!
//! A review runs through [`connections`] and [`intake`] (limits), [`http`], [`review`] (the wire format), [`facts`] (what
//! the cluster knows), and `howdah_core::policy`, which decides. [`denials`] makes Events of what it refused; [`audit`]
//! looks at what was never reviewed, [`background`] lets one replica do it for all. [`lists`] keeps what the API server goes
//! by while no webhook serves. [`args`] wires the process together.

pub mod args;
pub mod audit;
pub mod background;
pub mod connections;
pub mod denials;
pub mod facts;
pub mod http;
pub mod intake;
pub mod lists;
pub mod metrics;
pub mod review;

/// Name of the component in Events, and of the Lease for the work that one replica does for all.
pub const NAME: &str = "howdah-webhook";
