//! A node's virtual machine: one QEMU process, recorded under the node's name.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::parts::Parts;
use super::{Node, seed};
use crate::lab::Lab;
use crate::netns::BRIDGE;
use crate::process::{self, Daemon, Network};

/// What an emulator can do without hardware, less what costs more than it gives when it is emulated: a kernel that is told
/// of fast string moves copies byte by byte, five levels of page tables are walked at each miss, and each access to user
/// memory is bracketed by two instructions that end a block of translated code.
const CPU: &str = "max,-erms,-la57,-smap,-pku";
/// Nodes share the machine's processors anyway. A kernel with one of its own patches its locks away, and the emulator need not
/// keep two in step: a database, its backup and its drill take a sixth less.
const PROCESSORS: &str = "1";
/// A node that panics is a dead node: with panic=-1 it resets, and -no-reboot makes that its end. Translated code is found by
/// its virtual address: a program that is loaded at a random one is translated again by each process (a fork and exec takes
/// 23 ms, and 4 ms without).
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on norandmaps";
/// Memory of a node, MiB: kubelet, containerd and kube-proxy take 400, the rest is for pods and page cache.
const MEMORY_MIB: u32 = 1536;
/// QEMU's cache of translated code, MiB. Its default, a gigabyte, would fill with code that ran once.
const TRANSLATION_MIB: u32 = 256;
/// What runs on a node and logs to the host, each through a virtio port of its name.
const LOGS: [&str; 4] = ["containerd", "csi-node", "kubelet", "kube-proxy"];

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// Its process is stopped.
    Frozen,
    /// It has no process.
    Dead,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Frozen => "frozen",
            Self::Dead => "dead",
        })
    }
}

/// What the VM of `node` does now.
pub fn state(lab: &Lab, node: Node) -> State {
    let Some(daemon) = process::running(lab, &node.name()) else { return State::Dead };
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.identity().pid)).unwrap_or_default();
    match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
        Some('T' | 't') => State::Frozen,
        Some(_) => State::Running,
        None => State::Dead,
    }
}

/// Boots `node` unless it runs.
pub fn ensure(lab: &Lab, node: Node, parts: &Parts) -> Result<Daemon> {
    process::ensure(lab, &node.name(), Network::Lab, || {
        let folder = folder(lab, node);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        plug_in(lab, node)?;
        command(lab, node, parts)
    })
}

/// Where the files of `node` are.
pub fn folder(lab: &Lab, node: Node) -> PathBuf {
    lab.path("nodes").join(node.name())
}

/// Makes the node's tap and plugs it into the lab's bridge, link up.
pub fn plug_in(lab: &Lab, node: Node) -> Result<()> {
    let (netns, tap) = (lab.netns(), node.tap());
    let ip = |args: &[&str]| process::output_of(Command::new("ip").args(["-n", &netns]).args(args));
    if ip(&["link", "show", &tap]).is_err() {
        ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
    }
    ip(&["link", "set", &tap, "master", BRIDGE, "up"]).map(drop)
}

fn command(lab: &Lab, node: Node, parts: &Parts) -> Result<Command> {
    let folder = folder(lab, node);
    let seed = seed::write(lab, node)?;
    let log = |what: &str| lab.path("logs").join(format!("{}.{what}.log", node.name()));
    let mut qemu = Command::new("qemu-system-x86_64");
    // The disks' changes go to files without a name here, which end with the process.
    qemu.env("TMPDIR", &folder);
    qemu.args(["-name", &node.name()]);
    // Emulation, always: a /dev/kvm that exists may still hang the guest in its boot loader.
    qemu.args(["-machine", "q35", "-cpu", CPU, "-smp", PROCESSORS, "-m", &MEMORY_MIB.to_string()]);
    qemu.args(["-accel", &format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}")]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs);
    qemu.args(["-append", KERNEL_ARGUMENTS]);
    qemu.arg("-serial").arg(format!("file:{}", log("console").display()));
    for (disk, options) in [
        (&parts.root_disk, "snapshot=on,cache=unsafe"),
        (&parts.image_disk, "snapshot=on,cache=unsafe"),
        (&seed, "readonly=on"),
    ] {
        qemu.arg("-drive").arg(format!("file={},format=raw,if=virtio,{options}", disk.display()));
    }
    qemu.arg("-netdev").arg(format!("tap,id=net,ifname={},script=no,downscript=no", node.tap()));
    // Locally administered; the last octet is the node's. No boot ROM: nothing boots from the network.
    let mac = format!("52:54:00:77:00:{:02x}", 10 + node.index());
    qemu.arg("-device").arg(format!("virtio-net-pci,netdev=net,mac={mac},romfile="));
    qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    for name in LOGS {
        qemu.arg("-chardev").arg(format!("file,id={name},path={},append=on", log(name).display()));
        qemu.arg("-device").arg(format!("virtserialport,chardev={name},name={name}"));
    }
    qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", folder.join("qmp.sock").display()));
    Ok(qemu)
}
