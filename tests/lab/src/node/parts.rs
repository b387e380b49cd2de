//! What every node's VM starts from: kernel, root disk and image disk. All are built once and kept in
//! the cache; a VM's writes to the disks go to a file of its own that ends with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::cache::{self, Inputs};
use crate::control_plane;
use crate::image::layers::{isolated, lower_option};
use crate::image::set;
use crate::image::store;
use crate::lab::Lab;
use crate::{process, storage};

/// The cache's kind of entry.
const KIND: &str = "node-parts";
/// Packs root disk and kernel.
const SCRIPT: &str = include_str!("parts.sh");
/// Size of the root disk as the node sees it: the tree, logs, and what pods write. The file is sparse.
const ROOT_SIZE: &str = "8G";

/// Files a node's VM starts from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// Folder of Debian's user-mode kernel and the C library it runs with.
    pub kernel: PathBuf,
    /// The root tree, as an ext4 file system.
    pub root_disk: PathBuf,
    /// containerd's store with all images, as an ext4 file system.
    pub image_disk: PathBuf,
}

impl Parts {
    /// Writes down in the lab what its nodes start from, so that a node boots again from the same.
    pub fn remember(&self, lab: &Lab) -> Result<()> {
        let folder = lab.path("nodes");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let text = serde_json::to_vec_pretty(self).context("write what nodes start from")?;
        process::write_atomically(&folder.join("parts.json"), &text)
    }

    /// What the lab's nodes start from.
    pub fn remembered(lab: &Lab) -> Result<Self> {
        let file = lab.path("nodes/parts.json");
        let text = fs::read(&file).with_context(|| {
            format!(
                "read {}: bring up nodes first: howdah-lab --name {} up --nodes 3",
                file.display(),
                lab.name()
            )
        })?;
        serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))
    }
}

/// Builds the parts, or finds them in the cache. The long compilations run beside the root tree and the images, most
/// of whose time is waiting for downloads.
pub fn build() -> Result<Parts> {
    let (root, containerd, images) = thread::scope(|scope| {
        let product = scope.spawn(set::product);
        let root = scope.spawn(|| {
            let (containerd, kubernetes) = (set::containerd_binaries()?, control_plane::binaries()?);
            root(&kubernetes, &containerd, &storage::driver_binary()?)
        });
        let own = set::containerd_binaries().and_then(|binaries| Ok((set::own(&binaries)?, binaries)));
        let joined = |_| anyhow!("build what nodes are made of: a thread panicked");
        let root = root.join().map_err(joined)?;
        let product = product.join().map_err(joined)?;
        let (mut images, containerd) = own?;
        images.extend(product?);
        anyhow::Ok((root?, containerd, images))
    })?;
    let image_disk = store::disk(&images, &containerd)?;
    Ok(Parts { kernel: root.join("kernel"), root_disk: root.join("root.ext4"), image_disk })
}

fn root(kubernetes: &Path, containerd: &Path, storage: &Path) -> Result<PathBuf> {
    let image = set::node_root(kubernetes, containerd, storage)?;
    let names: Vec<_> = image.layers.iter().filter_map(|layer| layer.file_name()).collect();
    let inputs = Inputs::new(SCRIPT).text("size", ROOT_SIZE).text("layers", &format!("{names:?}"));
    cache::entry(KIND, &inputs, "the nodes' root disk", |target| pack(target, &image.layers))
}

fn pack(target: &Path, layers: &[PathBuf]) -> Result<()> {
    let mut command: Command = isolated(SCRIPT);
    command.arg(target).arg(lower_option(target, layers)?).arg(ROOT_SIZE);
    process::output_of(&mut command).map(drop)
}
