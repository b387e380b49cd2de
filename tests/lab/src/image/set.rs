//! The images that the lab's nodes have: nothing can be pulled, so a pod can run these and no others.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{BuiltStage, Image, Sources, build};
use crate::{cache, process};

/// The lab's own images: reference, and Dockerfile in tests/lab/images.
const OWN: [(&str, &str); 3] = [
    ("registry.k8s.io/pause:3.10", "pause.Dockerfile"),
    ("docker.io/library/postgres:15", "postgres.Dockerfile"),
    ("quay.io/ceph/ceph:v16", "toolbox.Dockerfile"),
];
/// howdah's images: reference, Dockerfile in deploy/docker, and the package whose release binary is inside.
const PRODUCT: [(&str, &str, &str); 2] = [
    ("docker.io/howdah/webhook:0.1.0", "webhook.Dockerfile", "howdah-webhook"),
    ("docker.io/howdah/scheduler:0.1.0", "scheduler.Dockerfile", "howdah-scheduler"),
];

/// Builds containerd, its shim, ctr, the CNI plug-ins and pause; gives their folder.
pub fn containerd_binaries() -> Result<PathBuf> {
    cache::go_binaries(&cache::GoModule {
        name: "containerd",
        // These need C libraries, and no node of the lab has such file systems.
        tags: &["no_btrfs", "no_devmapper", "no_zfs"],
        linker_flags: &[],
        packages: &["tool", "./pause"],
    })
}

/// Builds the lab's own images, or finds their layers in the cache.
pub fn own(containerd: &Path) -> Result<Vec<Image>> {
    let sources = own_sources(&[("containerd", containerd)]);
    OWN.iter().map(|(reference, file)| build(&sources.context.join(file), reference, &sources)).collect()
}

/// Builds howdah's images from this clone.
pub fn product() -> Result<Vec<Image>> {
    let root = repository()?;
    let sources = Sources {
        context: root.clone(),
        stages: vec![BuiltStage {
            name: "build".into(),
            path: "/src/target/release".into(),
            folder: release(&root)?,
        }],
    };
    let folder = root.join("deploy/docker");
    PRODUCT.iter().map(|(reference, file, _)| build(&folder.join(file), reference, &sources)).collect()
}

/// The node's root tree, which is built as an image too.
pub fn node_root(kubernetes: &Path, containerd: &Path, storage: &Path) -> Result<Image> {
    let sources =
        own_sources(&[("kubernetes", kubernetes), ("containerd", containerd), ("storage", storage)]);
    build(&sources.context.join("node.Dockerfile"), "node", &sources)
}

/// Where the lab's Dockerfiles find their files: tests/lab/images, and each folder of Go binaries as the /bin
/// of a stage.
fn own_sources(binaries: &[(&str, &Path)]) -> Sources {
    let stages = binaries.iter().map(|(name, folder)| BuiltStage {
        name: (*name).into(),
        path: "/bin".into(),
        folder: (*folder).to_owned(),
    });
    Sources { context: Path::new(env!("CARGO_MANIFEST_DIR")).join("images"), stages: stages.collect() }
}

fn repository() -> Result<PathBuf> {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.ancestors().nth(2).map(Path::to_owned).context("find the repository's root")
}

/// Builds howdah's binaries as the Dockerfiles' build stage does; gives the folder they are in.
fn release(root: &Path) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["build", "--release", "--locked"]);
    for (_, _, package) in PRODUCT {
        cargo.args(["--package", package]);
    }
    // What cargo tells a test that it runs must not change what is built here; what a user tells cargo must.
    const OF_THE_USER: [&str; 3] = ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_TERM_COLOR"];
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO")) {
        if !OF_THE_USER.contains(&name.as_str()) {
            cargo.env_remove(name);
        }
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path));
    crate::progress::slow("building howdah's release binaries", || process::output_of(&mut cargo))?;
    Ok(target.join("release"))
}
