//! `howdah-lab status`: what of a lab runs, for a human.

use std::fmt::Write;

use anyhow::Result;

use crate::lab::Lab;
use crate::{netns, process};

/// A table of the lab's processes and where to reach it.
pub fn describe(lab: &Lab) -> Result<String> {
    let mut text = String::new();
    if !lab.exists() {
        writeln!(text, "lab {} is down; bring it up: howdah-lab --name {0} up", lab.name())?;
        return Ok(text);
    }
    let namespace = if netns::exists(lab) { "present" } else { "missing" };
    writeln!(text, "lab         {}", lab.name())?;
    writeln!(text, "directory   {}", lab.dir().display())?;
    writeln!(text, "namespace   {} ({namespace})", lab.netns())?;
    writeln!(text, "kubeconfig  {}\n", lab.kubeconfig().display())?;
    writeln!(text, "{:<26} {:>8}  {:<8} LOG", "PROCESS", "PID", "STATE")?;
    for (name, identity) in process::records(lab)? {
        let state = if identity.is_alive() { "running" } else { "dead" };
        writeln!(text, "{name:<26} {:>8}  {state:<8} logs/{name}.log", identity.pid)?;
    }
    Ok(text)
}
