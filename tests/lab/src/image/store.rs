//! A node's image store, filled on the host: a throw-away containerd imports the images at full speed, and its
//! folder becomes the file system of a disk that every node mounts and none of them changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::layers::isolated;
use super::{Image, archive};
use crate::cache::{self, Inputs};
use crate::process;

/// The cache's kind of entry.
const KIND: &str = "image-disks";
/// The disk's file in an entry.
const DISK: &str = "disk.ext4";
/// Size of the disk as a node sees it: images, and what containers write over them. The file is sparse.
const DISK_SIZE: &str = "12G";
const SCRIPT: &str = include_str!("store.sh");

/// The disk with `images`, made with the containerd and ctr of the folder `binaries`.
pub fn disk(images: &[Image], binaries: &Path) -> Result<PathBuf> {
    let mut inputs =
        Inputs::new(SCRIPT).text("size", DISK_SIZE).text("containerd", &binaries.to_string_lossy());
    for image in images {
        let layers: Vec<_> = image.layers.iter().filter_map(|layer| layer.file_name()).collect();
        inputs = inputs.text(&image.reference, &format!("{layers:?} {:?}", image.settings));
    }
    let entry = cache::entry(KIND, &inputs, "the nodes' image disk", |target| {
        let layout = target.join("archive");
        fs::create_dir(&layout).with_context(|| format!("create {}", layout.display()))?;
        archive::lay_out(images, &layout)?;
        let mut command = isolated(SCRIPT);
        command.arg(target).arg(binaries).arg(DISK_SIZE);
        process::output_of(&mut command).map(drop)
    })?;
    Ok(entry.join(DISK))
}
