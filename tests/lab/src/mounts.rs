//! Mounts and loop devices below a directory, which must go before the directory may be removed: removing a
//! tree with something mounted in it would remove what is mounted.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::process;

/// Mounts can be stacked on one another; each round takes the topmost layer off.
const ROUNDS_MAX: usize = 16;

/// Everything that is mounted on `directory` or below it, deepest last mounted first.
pub fn below(directory: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let mut found: Vec<PathBuf> =
        table.lines().filter_map(mount_point).filter(|point| point.starts_with(directory)).collect();
    found.reverse();
    Ok(found)
}

/// The fifth field of a line of mountinfo, with its octal escapes undone.
fn mount_point(line: &str) -> Option<PathBuf> {
    let field = line.split(' ').nth(4)?.as_bytes();
    let mut path = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let digits = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let octal = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                path.push(byte);
                at += 4;
            }
            None => {
                path.push(field[at]);
                at += 1;
            }
        }
    }
    Some(std::ffi::OsString::from_vec(path).into())
}

/// Unmounts all of it; a busy mount is detached and goes with its last user.
pub fn unmount_below(directory: &Path) -> Result<()> {
    for _ in 0..ROUNDS_MAX {
        let mounts = below(directory)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for point in mounts {
            match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // Gone meanwhile, with the mount above it.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => return Err(error).with_context(|| format!("unmount {}", point.display())),
            }
        }
    }
    bail!("unmount what lies below {}: something keeps mounting there", directory.display())
}

/// Loop devices whose backing file lies below `directory`.
pub fn loop_devices_below(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").context("list block devices")? {
        let entry = entry.context("list block devices")?;
        // Of a removed file the kernel says "PATH (deleted)"; the prefix still tells.
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if Path::new(file.trim_end()).starts_with(directory) {
            found.push(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Ok(found)
}

/// Detaches those loop devices.
pub fn detach_loop_devices_below(directory: &Path) -> Result<()> {
    for device in loop_devices_below(directory)? {
        process::output_of(Command::new("losetup").args(["--detach", &device]))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read_back() {
        let line = r"36 35 98:0 / /mnt/a\040b\134c rw - ext3 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from(r"/mnt/a b\c")));
    }
}
