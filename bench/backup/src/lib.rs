//! The benchmarks of the scheduler.
//!
//! [`scale`] measures it over many databases, which are objects of the API server only; [`storage`] measures backups and
//! restores of real databases on a real Ceph. Each writes its page below docs/benchmarks/.

pub mod scale;
pub mod storage;
