//! Tests that need nodes, with howdah installed on them from deploy/.

use std::sync::Mutex;

use anyhow::{Result, anyhow};
use howdah_lab::install;
use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;

mod attach;
mod backup;
mod copies;
mod drain;
mod installed;
mod storage;

/// Nodes of the cluster that the tests of this binary share: from one a database can move to the other. A third would take
/// processor time from both.
const NODES: u8 = 2;

/// The shared lab with its nodes, and howdah installed and serving.
fn lab() -> Result<Lab> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().map_err(|_| anyhow!("use the lab: another test failed to install howdah"))?;
    let lab = Lab::open_or_up(&shared_name(), NODES)?;
    if !*done {
        install::install(&lab)?;
        *done = true;
    }
    Ok(lab)
}
