//! Tests that need a real Ceph or a real PostgreSQL, and no nodes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

mod apart;
mod catalog;
mod ceph;
mod drills;
mod faults;
mod gate;
mod images;
mod into;
mod killer;
mod kinds;
mod lineage;
mod linger;
mod postgres;
mod prune;
mod restore;
mod scheduler;
mod server;
mod versions;
