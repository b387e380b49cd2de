//! The images that the lab's nodes have: nothing can be pulled, so a pod can run these and no others.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{BuiltStage, Image, Sources, build};
use crate::cache::Inputs;
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

/// What the release binaries are made of, from the root of the repository: these, and `Cargo.toml` and `src` in each of the
/// folders.
const RELEASE_FILES: [&str; 3] = ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml"];
const RELEASE_FOLDERS: [&str; 5] = ["core", "adapters", "certs", "webhook", "scheduler"];
/// And what a user may tell the compiler.
const FLAGS: &str = "RUSTFLAGS";

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

/// Builds howdah's binaries as the Dockerfiles' build stage does, or finds them in the cache: a clone that differs in its
/// tests alone has the same. Gives the folder they are in.
fn release(root: &Path) -> Result<PathBuf> {
    let mut inputs = Inputs::new("cargo build --release --locked --package PACKAGE, two of them");
    for file in RELEASE_FILES {
        inputs = inputs.file(&root.join(file))?;
    }
    for folder in RELEASE_FOLDERS {
        inputs = inputs
            .text("folder", folder)
            .file(&root.join(folder).join("Cargo.toml"))?
            .tree(&root.join(folder).join("src"))?;
    }
    inputs = inputs.text(FLAGS, &std::env::var(FLAGS).unwrap_or_default());
    cache::entry("release", &inputs, "howdah's release binaries", |folder| {
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
        process::output_of(&mut cargo)?;
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |path| root.join(path));
        for (_, _, package) in PRODUCT {
            let binary = target.join("release").join(package);
            was_read(&fs::read_to_string(binary.with_extension("d")).context("read what cargo read")?, root)?;
            fs::copy(&binary, folder.join(package)).with_context(|| format!("copy {}", binary.display()))?;
        }
        Ok(())
    })
}

/// Fails when the build read a file of this repository that is not among its inputs: with another content of it the cache
/// would give an old binary. `dependencies` is what cargo writes beside a binary: its path, a colon, and what it depends on.
fn was_read(dependencies: &str, root: &Path) -> Result<()> {
    let read = dependencies.split_whitespace().skip(1);
    let ours = read.filter_map(|path| Path::new(path).strip_prefix(root).ok());
    let is_input = |path: &Path| {
        RELEASE_FILES.iter().any(|file| path == Path::new(file))
            || RELEASE_FOLDERS.iter().any(|folder| path.starts_with(Path::new(folder).join("src")))
    };
    for path in ours {
        ensure!(
            is_input(path),
            "the release build read {}, which is not among its inputs: add it to RELEASE_FILES or RELEASE_FOLDERS",
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_input_of_the_release_build_is_named() {
        let root = Path::new("/src");
        let read = |path: &str| was_read(&format!("/target/release/x: /src/core/src/lib.rs {path}"), root);
        read("/src/scheduler/src/verify/drill.sh /home/of/a/crate.rs").unwrap();
        for path in ["/src/deploy/base/floor.yaml", "/src/core/fixtures/a.json"] {
            assert!(read(path).unwrap_err().to_string().contains(path.trim_start_matches("/src/")));
        }
    }
}
