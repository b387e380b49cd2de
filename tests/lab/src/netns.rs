//! The lab's network namespace: the bridge that Ceph, the control plane and the nodes share. Nothing in it
//! has a route to the outside.

use std::fs;
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, statfs};

use crate::files;
use crate::lab::Lab;

/// The bridge all of the lab hangs on.
pub const BRIDGE: &str = "hd0";
/// The lab's own address on the bridge: control plane and Ceph.
pub const BRIDGE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Most nodes of one lab: enough for a majority to outlive a dead one.
pub const NODES_MAX: u8 = 3;
/// Pod and Service ranges are routed via the nodes; these are the pod ranges' first two octets.
const POD_NETWORK: (u8, u8) = (10, 78);
/// File system type of a namespace file (linux/magic.h, NSFS_MAGIC).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// The address of node number `index` (from 1) on the bridge.
pub fn node_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + index)
}

/// The range from which node number `index` (from 1) gives addresses to its pods.
pub fn pod_range(index: u8) -> String {
    format!("{}.{}.{index}.0/24", POD_NETWORK.0, POD_NETWORK.1)
}

/// Where `ip netns` keeps the namespace of `lab`.
pub fn path(lab: &Lab) -> PathBuf {
    Path::new("/run/netns").join(lab.netns())
}

/// Whether the namespace of `lab` exists.
pub fn exists(lab: &Lab) -> bool {
    statfs(&path(lab)).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Creates the namespace, its bridge and its routes, or completes what an interrupted run left.
pub fn create(lab: &Lab) -> Result<()> {
    let netns = lab.netns();
    if !exists(lab) {
        // `ip netns add` creates the file before it mounts the namespace on it, and may die between.
        delete(lab)?;
        ip(&["netns", "add", &netns], "")?;
    }
    let has_bridge = Command::new("ip")
        .args(["-n", &netns, "link", "show", BRIDGE])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("run ip")?
        .success();
    if !has_bridge {
        ip(&["-n", &netns, "link", "add", BRIDGE, "type", "bridge"], "")?;
    }
    let mut batch = format!(
        "link set lo up\n\
         link set {BRIDGE} type bridge forward_delay 0 mcast_snooping 0\n\
         addr replace {BRIDGE_ADDRESS}/24 dev {BRIDGE}\n\
         link set {BRIDGE} up\n"
    );
    for index in 1..=NODES_MAX {
        batch.push_str(&format!("route replace {} via {}\n", pod_range(index), node_address(index)));
    }
    ip(&["-n", &netns, "-batch", "-"], &batch)?;
    within(lab, || fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?.context("turn on IPv4 forwarding")
}

/// Deletes the namespace; its links, taps and addresses go with it once no process is left inside.
pub fn delete(lab: &Lab) -> Result<()> {
    let path = path(lab);
    match umount2(&path, MntFlags::MNT_DETACH) {
        // Not there, or a plain file that an interrupted `ip netns add` left.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(error) => return Err(error).with_context(|| format!("unmount {}", path.display())),
    }
    files::remove_file(&path)
}

/// Moves the whole calling process into the lab's namespace. Only for a process with one thread.
pub fn enter(lab: &Lab) -> Result<()> {
    let path = path(lab);
    let file =
        File::open(&path).with_context(|| format!("open {}: is lab {} up?", path.display(), lab.name()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter network namespace {}", lab.netns()))
}

/// Runs `work` on a thread of its own in the lab's namespace. Sockets it opens and processes it starts
/// belong to that namespace for ever; the calling thread stays where it is.
pub fn within<T: Send>(lab: &Lab, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(|| enter(lab).map(|()| work()))
            .join()
            .map_err(|_| anyhow!("finish the work inside {}: its thread panicked", lab.netns()))?
    })
}

fn ip(args: &[&str], stdin: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run ip")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(stdin.as_bytes()).context("hand ip its batch")?;
    }
    let output = child.wait_with_output().context("wait for ip")?;
    if !output.status.success() {
        bail!("run ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
