//! A node's virtual machine: a user-mode Linux, which is a kernel that runs as a process of the host and runs its own processes
//! on the host's processor, at its speed; recorded under the node's name. With emulated machines the tests of the cluster level
//! took some three times as long, and hardware's help (KVM) is not to be had everywhere.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::parts::Parts;
use super::{Node, seed};
use crate::lab::Lab;
use crate::netns::BRIDGE;
use crate::process::{Daemon, Network};
use crate::{files, process};

/// Memory of a node, MiB: kubelet, containerd and kube-proxy take 400, the rest is for pods and page cache.
const MEMORY_MIB: u32 = 1536;
/// The file that its kernel keeps it in, and what else that keeps there, MiB.
const SHARED_MEMORY_MIB: u32 = MEMORY_MIB + 128;
/// Where a user-mode kernel would look for a place for that file before it takes /dev/shm.
const OTHER_PLACES: [&str; 3] = ["TMPDIR", "TMP", "TEMP"];
/// A node that panics is a dead node: the process ends. Its console is the process's output.
const KERNEL_ARGUMENTS: [&str; 7] =
    ["root=/dev/ubda", "rw", "con=null", "con0=null,fd:1", "console=tty0", "quiet", "panic=-1"];
/// Becomes the kernel, in a mount namespace of its own: it was built against a C library newer than the machine's, and keeps its
/// memory in /dev/shm, where a machine may have little room. Of the machine's files it keeps what it was given: who is root in
/// the node can mount, by `..` in the options of `hostfs`, whatever its kernel sees. $1: the new root; $2: that room, MiB; $3:
/// the kernel's folder; then what it keeps, up to `--`.
const BECOME_KERNEL: &str = r#"
set -e
root=$1 room=$2 kernel=$3
shift 3
mount -t tmpfs -o mode=0755 root "$root"
keep() {
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${2%/*}"; : >"$root$2"; fi
    mount --bind "$1" "$root$2"
}
keep "$kernel/lib" /lib/x86_64-linux-gnu
keep "$kernel/linux" /linux
ln -s lib/x86_64-linux-gnu "$root/lib64"
for device in null zero random urandom net/tun; do keep "/dev/$device" "/dev/$device"; done
while [ "$1" != -- ]; do keep "$1" "$1"; shift; done
shift
mkdir -p "$root/dev/shm" "$root/proc" "$root/tmp"
mount -t tmpfs -o "size=${room}M" memory "$root/dev/shm"
mount -t proc proc "$root/proc"
exec chroot "$root" /linux "$@"
"#;

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
    // Kernel and processes of a node take turns at each of their system calls. On one processor that costs 13 us, across two,
    // where a sleeping one has to be woken each time, 50.
    let mut vm = Command::new("taskset");
    vm.args(["--cpu-list", &processor(node)?.to_string()]);
    vm.args(["setarch", "--addr-no-randomize", "unshare", "--mount", "sh", "-c", BECOME_KERNEL, "sh"]);
    let (root, logs) = (folder.join("root"), lab.path("logs"));
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    vm.arg(&root).arg(SHARED_MEMORY_MIB.to_string()).arg(&parts.kernel);
    vm.args([&folder, &logs, &parts.root_disk, &parts.image_disk]).arg("--");
    for place in OTHER_PLACES {
        vm.env_remove(place);
    }
    vm.arg(format!("mem={MEMORY_MIB}M"));
    for (index, disk) in [&parts.root_disk, &parts.image_disk].into_iter().enumerate() {
        // The disks are everybody's. What this VM writes goes to files of its own, and a new one begins without.
        let changes = folder.join(format!("disk-{index}.changes"));
        files::remove_file(&changes)?;
        vm.arg(format!("ubd{index}={},{}", changes.display(), disk.display()));
    }
    vm.arg(format!("ubd2r={}", seed.display()));
    // Locally administered; the last octet is the node's.
    let mac = format!("52:54:00:77:00:{:02x}", 10 + node.index());
    vm.arg(format!("vec0:transport=tap,ifname={},mac={mac},depth=64,gro=1", node.tap()));
    vm.arg(format!("hostfs={}", logs.display()));
    vm.arg(format!("uml_dir={}/", folder.display())).arg("umid=vm");
    vm.args(KERNEL_ARGUMENTS);
    Ok(vm)
}

/// The processor that the VM of `node` stays on: nodes take turns in those that we may use.
fn processor(node: Node) -> Result<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask which processors this process may use")?;
    let allowed: Vec<usize> =
        (0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false)).collect();
    let turn = usize::from(node.index()).checked_rem(allowed.len()).context("find a processor")?;
    allowed.get(turn).copied().context("find a processor")
}
