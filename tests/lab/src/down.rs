//! `howdah-lab down`: leaves no process, mount, loop device, network namespace or file of the lab, whatever
//! state it is in.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::lab::Lab;
use crate::{cache, files, mounts, netns, process};

/// An `up` that still runs must be ended by the one who runs it; we only wait out its last moments.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// A process may start another while we look, so we look until there is none; each round ends all we saw.
const ROUNDS_MAX: usize = 20;

/// Takes the lab down. Succeeds, too, when there is none.
pub fn run(lab: &Lab) -> Result<()> {
    let lock = lab.lock(LOCK_LIMIT)?;
    end_processes(lab)?;
    release_storage(lab)?;
    netns::delete(lab)?;
    remove_directory(lab)?;
    cache::sweep_abandoned()?;
    lock.remove()
}

fn end_processes(lab: &Lab) -> Result<()> {
    for _ in 0..ROUNDS_MAX {
        let processes = process::all_of(lab)?;
        if processes.is_empty() {
            return Ok(());
        }
        // Before the processes: a mount served by one of them (rbd-fuse) would hang its users once it is
        // dead. After detaching, what is still busy goes with the processes that hold it.
        release_storage(lab)?;
        // All at once and without mercy: nothing of what they would save is kept.
        process::kill_all(&processes)?;
    }
    bail!("end the processes of lab {}: new ones keep appearing", lab.name())
}

/// Loop devices and mounts stand on one another (a file system on a loop device on a file in a mount).
fn release_storage(lab: &Lab) -> Result<()> {
    mounts::detach_loop_devices_below(lab.dir())?;
    mounts::unmount_below(lab.dir())?;
    mounts::detach_loop_devices_below(lab.dir())
}

fn remove_directory(lab: &Lab) -> Result<()> {
    let mounted = mounts::below(lab.dir())?;
    if !mounted.is_empty() {
        bail!("remove {}: {} is still mounted", lab.dir().display(), mounted[0].display());
    }
    files::remove_tree(lab.dir())
}
