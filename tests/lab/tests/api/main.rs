//! Tests that need a real API server and no nodes.

mod cli;
mod deploy;
mod leader;
mod rbac;
mod records;
