//! Tests that need a real API server and no nodes.

mod deploy;
mod leader;
mod rbac;
