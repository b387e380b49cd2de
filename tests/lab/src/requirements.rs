//! What the lab needs of the machine. What is missing is named together with the command that cures it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::lab::Lab;

/// Debian packages, one a line, with the reason after `#`.
const PACKAGES: &str = include_str!("../packages.txt");
/// Device nodes the lab opens, and how to get them.
const DEVICES: [(&str, &str); 3] = [
    ("/dev/net/tun", "modprobe tun"),
    ("/dev/loop-control", "modprobe loop"),
    ("/dev/fuse", "modprobe fuse"),
];

/// A lab with three nodes and some databases writes about this much.
const FREE_BYTES_MIN: u64 = 6 << 30;

/// Fails with everything that is missing, not only the first of it.
pub fn check(lab: &Lab) -> Result<()> {
    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push(
            "root's rights (the lab makes network namespaces, mounts and loop devices): run it with sudo"
                .to_owned(),
        );
    }
    let packages = missing_packages(&wanted_packages(), &installed_packages()?);
    if !packages.is_empty() {
        let list = packages.join(" ");
        missing.push(format!("Debian packages {list}: run `make setup`, or `apt-get install -y {list}`"));
    }
    for (device, cure) in DEVICES {
        if !Path::new(device).exists() {
            missing.push(format!("{device}: run `{cure}`"));
        }
    }
    if let Some(path) = free_place_missing(lab, FREE_BYTES_MIN) {
        missing.push(format!(
            "{} GiB of free disk space at {}: free some, or set HOWDAH_LAB_DIR to a larger place",
            FREE_BYTES_MIN >> 30,
            path.display()
        ));
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("prepare this machine for the lab; it lacks\n  - {}", missing.join("\n  - "))
}

/// The first existing folder above the lab's, if less than `bytes` are free there.
fn free_place_missing(lab: &Lab, bytes: u64) -> Option<&Path> {
    let place = lab.dir().ancestors().find(|path| path.is_dir())?;
    let found = nix::sys::statvfs::statvfs(place).ok()?;
    let free = found.blocks_available().saturating_mul(found.fragment_size());
    (free < bytes).then_some(place)
}

fn wanted_packages() -> Vec<&'static str> {
    PACKAGES
        .lines()
        .filter_map(|line| line.split('#').next())
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect()
}

fn installed_packages() -> Result<BTreeSet<String>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Abbrev}${Package}\n"])
        .output()
        .context("run dpkg-query: the lab runs on Debian 12 and its kin")?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    // "ii " is wanted and installed; a removed package stays listed as "rc ".
    Ok(listed.lines().filter_map(|line| line.strip_prefix("ii ")).map(str::to_owned).collect())
}

fn missing_packages<'a>(wanted: &[&'a str], installed: &BTreeSet<String>) -> Vec<&'a str> {
    wanted.iter().copied().filter(|package| !installed.contains(*package)).collect()
}
