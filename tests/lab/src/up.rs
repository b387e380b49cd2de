//! `howdah-lab up`: brings up whatever is missing, as far as possible at the same time. It can be killed at
//! any point and run again, or be followed by `down`.

use std::fs;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::control_plane::{self, Profile};
use crate::lab::Lab;
use crate::{ceph, netns, node, process, progress, requirements, storage};

/// Another `up` of the same lab may be building everything from nothing; we wait for it rather than fail.
const LOCK_LIMIT: Duration = Duration::from_secs(45 * 60);

/// What a lab shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Virtual-machine nodes, 0 to [`netns::NODES_MAX`].
    pub nodes: u8,
    /// Whether it has Ceph.
    pub ceph: bool,
    /// How fast the control plane notices a dead node; none: as the lab has it, else fast.
    pub profile: Option<Profile>,
}

/// What is fixed for the life of an instance.
#[derive(Debug, Serialize, Deserialize)]
struct Instance {
    profile: Profile,
}

/// Brings the lab up to at least what is wanted. What it has beyond that stays.
pub fn run(lab: &Lab, wanted: Wanted) -> Result<()> {
    requirements::check(lab)?;
    let _lock = lab.lock(LOCK_LIMIT)?;
    let begin = Instant::now();
    let profile = open_instance(lab, wanted.profile)?;
    netns::create(lab)?;
    let (control_plane_is_up, control_plane) = channel();
    together(vec![
        ("Kubernetes", Box::new(move || kubernetes_part(lab, wanted, profile, control_plane_is_up))),
        ("Ceph", Box::new(move || ceph_part(lab, wanted, &control_plane))),
    ])?;
    progress::say(format!("lab {} is up after {:.1} s", lab.name(), begin.elapsed().as_secs_f64()));
    Ok(())
}

type Part<'a> = (&'static str, Box<dyn FnOnce() -> Result<()> + Send + 'a>);

/// Does all parts at the same time, each to its end: what came up stays up for the next try, and every
/// failed part's error is told.
fn together(parts: Vec<Part<'_>>) -> Result<()> {
    let errors: Vec<String> = thread::scope(|scope| {
        let running: Vec<_> = parts.into_iter().map(|(what, part)| (what, scope.spawn(part))).collect();
        let ended = running.into_iter().map(|(what, part)| match part.join() {
            Ok(result) => result.with_context(|| format!("bring up {what}")),
            Err(_) => Err(anyhow!("bring up {what}: its thread panicked")),
        });
        ended.filter_map(Result::err).map(|error| format!("{error:#}")).collect()
    });
    if errors.is_empty() { Ok(()) } else { Err(anyhow!("{}", errors.join("\nand: "))) }
}

/// Ceph, and then what Rook would have put into the cluster, while the nodes boot.
fn ceph_part(lab: &Lab, wanted: Wanted, control_plane: &Receiver<()>) -> Result<()> {
    if !wanted.ceph {
        return Ok(());
    }
    progress::step("Ceph ready", || ceph::up(lab))?;
    match control_plane.recv() {
        Ok(()) => storage::up(lab),
        // It failed, which its own part tells.
        Err(_) => Ok(()),
    }
}

/// The control plane, and then the nodes; what they are made of is built meanwhile.
fn kubernetes_part(lab: &Lab, wanted: Wanted, profile: Profile, is_up: Sender<()>) -> Result<()> {
    thread::scope(|scope| {
        let parts = scope.spawn(|| (wanted.nodes > 0).then(node::parts::build).transpose());
        let binaries = control_plane::binaries()?;
        progress::step("control plane ready", || control_plane::up(lab, profile, &binaries))?;
        // Nobody listens in a lab without Ceph.
        let _ = is_up.send(());
        match parts.join().map_err(|_| anyhow!("build what nodes are made of: the thread panicked"))?? {
            Some(parts) => node::up(lab, wanted.nodes, &parts),
            None => Ok(()),
        }
    })
}

/// Creates the instance directory, or makes sure that the one there is of the profile asked for.
fn open_instance(lab: &Lab, asked: Option<Profile>) -> Result<Profile> {
    let file = lab.path("lab.json");
    if let Ok(text) = fs::read_to_string(&file) {
        let instance: Instance =
            serde_json::from_str(&text).with_context(|| format!("read {}", file.display()))?;
        if asked.is_some_and(|asked| asked != instance.profile) {
            bail!(
                "bring up lab {0} with another profile: it has profile {1:?}; take it down first: \
                 howdah-lab --name {0} down",
                lab.name(),
                instance.profile
            );
        }
        return Ok(instance.profile);
    }
    fs::create_dir_all(lab.dir()).with_context(|| format!("create {}", lab.dir().display()))?;
    let profile = asked.unwrap_or_default();
    let text = serde_json::to_vec(&Instance { profile }).context("write the instance's settings")?;
    process::write_atomically(&file, &text)?;
    Ok(profile)
}
