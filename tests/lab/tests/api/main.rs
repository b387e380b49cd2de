//! Tests that need a real API server and no nodes.

mod certs;
mod deploy;
mod leader;
mod policy;
mod rbac;
mod webhook;
