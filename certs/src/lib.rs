//! The webhook's certificates: its own authority, shared by all replicas, and a short-lived leaf for each.
//!
//! - [`authority`] makes and reads certificates; it does no IO and gets the time as a parameter.
//! - [`keeper`] keeps the Secret, the `caBundle` of the webhook configurations and the served leaf in step.
//! - [`serving`] hands the current leaf to rustls, so that a new one needs no restart.
//! - [`clients`] says whose client certificates let in, where they are demanded.
//! - [`fail_closed`] turns the webhook configurations to `failurePolicy: Fail` once all of that is seen to work.
//!
//! Order is what makes a rotation lossless: a new authority is published beside the old one, then trusted by every
//! webhook configuration, and only then serves. The key of a leaf never leaves the memory of its process.

pub mod authority;
pub mod clients;
pub mod fail_closed;
pub mod keeper;
pub mod serving;

pub use authority::Lifetimes;
pub use clients::ClientAuthority;
pub use fail_closed::{FailClosed, FailOpen};
pub use keeper::{Keeper, Metrics, Settings};
pub use serving::ServingCertificate;
