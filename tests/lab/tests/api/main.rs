//! Tests that need a real API server and no nodes.

mod audit;
mod certs;
mod cli;
mod deploy;
mod fail_closed;
mod floor;
mod hostile;
mod leader;
mod lifecycle;
mod policy;
mod rbac;
mod records;
mod rotation;
mod scene;
mod webhook;
