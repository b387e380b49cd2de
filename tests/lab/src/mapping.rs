//! An RBD image as a file system on this machine, where no node is up: rbd-fuse, a loop device and ext4 stand for the
//! kernel's client. Watcher, exclusive lock and snapshots behave alike.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::lab::Lab;
use crate::process::{output_of, wait_until};
use crate::testing::Process;
use crate::{ceph, mounts};

/// rbd-fuse connects and opens the image in a second or two.
const OPEN_LIMIT: Duration = Duration::from_secs(60);
/// A file system that was just left is busy for a moment.
const CLOSE_LIMIT: Duration = Duration::from_secs(20);

/// The largest file system that is made: on an image of a TiB the rest stays empty, which takes no time.
const BLANK_BYTES_MAX: u64 = 1 << 30;

/// A mapped and mounted image; unmounted and unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    lab: Lab,
    directory: PathBuf,
    client: Process,
}

impl Mapping {
    /// Maps `image`, of the pool of the lab, and mounts it below the lab's directory under `name`; `blank`: with a new
    /// file system.
    pub fn open(lab: &Lab, image: &str, name: &str, blank: bool) -> Result<Self> {
        let directory = Self::directory(lab, name);
        // What a killed test left.
        mounts::detach_loop_devices_below(&directory)?;
        mounts::unmount_below(&directory)?;
        for part in ["rbd", "mounted"] {
            let part = directory.join(part);
            fs::create_dir_all(&part).with_context(|| format!("create {}", part.display()))?;
        }
        let mut fuse = lab.command("rbd-fuse");
        fuse.arg("-f").arg("-c").arg(ceph::config(lab)).args(["-p", ceph::POOL, "-r", image]);
        let client = lab.spawn_inside(&format!("mapping-{name}"), fuse.arg(directory.join("rbd")))?;
        let mut mapping = Self { lab: lab.clone(), directory, client };
        let file = mapping.directory.join("rbd").join(image);
        mapping.client.wait_ready(OPEN_LIMIT, || file.is_file())?;
        let device = output_of(Command::new("losetup").args(["--find", "--show"]).arg(&file))?;
        if blank {
            let length = fs::metadata(&file).with_context(|| format!("look at {}", file.display()))?.len();
            let mut mkfs = Command::new("mkfs.ext4");
            mkfs.args(["-q", "-E", "nodiscard"]).arg(device.trim());
            output_of(mkfs.arg(format!("{}k", length.min(BLANK_BYTES_MAX) / 1024)))?;
        }
        output_of(Command::new("mount").arg(device.trim()).arg(mapping.path()))?;
        Ok(mapping)
    }

    /// Where the file system of the mapping `name` is, also before it is mapped.
    pub fn place(lab: &Lab, name: &str) -> PathBuf {
        Self::directory(lab, name).join("mounted")
    }

    fn directory(lab: &Lab, name: &str) -> PathBuf {
        lab.path("mapped").join(name)
    }

    /// Where the file system is mounted.
    pub fn path(&self) -> PathBuf {
        self.directory.join("mounted")
    }

    /// Writes to the image what the file system holds back.
    pub fn sync(&self) -> Result<()> {
        output_of(Command::new("sync").arg("--file-system").arg(self.path())).map(drop)
    }

    /// Freezes the client, as a node that hangs: it keeps its lock and answers nobody.
    pub fn freeze(&self) -> Result<()> {
        self.client.signal(Signal::SIGSTOP)
    }

    /// Ends the client as a node's loss of power does: it keeps its lock, and nobody unmounts.
    pub fn lose(self) -> Result<()> {
        self.client.signal(Signal::SIGKILL)
    }

    /// Lets it run again.
    pub fn thaw(&self) -> Result<()> {
        self.client.signal(Signal::SIGCONT)
    }

    fn close(&mut self) -> Result<()> {
        self.thaw()?;
        // One whose client is dead cannot be left in order.
        if self.client.is_alive() {
            let mut left = None;
            let unmounted = wait_until(CLOSE_LIMIT, || {
                left = unmount(&self.path()).err();
                left.is_none()
            });
            if !unmounted {
                eprintln!("unmount {}: {left:?}; it is taken off by force", self.path().display());
            }
        }
        mounts::detach_loop_devices_below(&self.directory)?;
        mounts::unmount_below(&self.directory)?;
        // Without its mount it ends by itself and gives its lock back; a signal in the middle of that leaves the lock.
        self.client.wait_gone(CLOSE_LIMIT);
        Ok(())
    }
}

fn unmount(point: &Path) -> nix::Result<()> {
    match umount2(point, MntFlags::empty()) {
        Err(nix::errno::Errno::EINVAL) => Ok(()),
        other => other,
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            eprintln!("unmap {} of lab {}: {error:#}", self.directory.display(), self.lab.name());
        }
    }
}
