//! Everything howdah does to the outside world, one external system per file, and no decisions.
//!
//! `core` decides; these modules read and write: [`kubernetes`] and [`leader`] the API server, [`ceph`] the `rbd` and
//! `ceph` commands, [`postgres`] the database, [`records`], [`protected_sets`] and [`reports`] our custom resources,
//! [`telemetry`] logs, metrics and health, [`shutdown`] the process itself. Every call has a time limit and an error that a
//! caller can branch on.

pub mod ceph;
pub mod kubernetes;
pub mod leader;
pub mod postgres;
pub mod protected_sets;
pub mod records;
pub mod reports;
pub mod shutdown;
pub mod telemetry;
