//! Container images without a container engine and without a registry: the final stage of a Dockerfile is
//! followed layer by layer, and the result is what a node's containerd would have pulled.

mod archive;
pub mod dockerfile;
pub mod layers;
pub mod set;
pub mod store;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use dockerfile::Settings;

/// A folder that stands for part of another stage of a Dockerfile, whose output something else (cargo, go)
/// has already built.
#[derive(Clone, Debug)]
pub struct BuiltStage {
    /// The stage's name, as in `COPY --from=NAME`.
    pub name: String,
    /// The path in that stage, `/src/target/release` for instance.
    pub path: String,
    /// The folder here that has what stands there.
    pub folder: PathBuf,
}

/// Where COPY finds its files.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The build context.
    pub context: PathBuf,
    /// What stands for other stages.
    pub stages: Vec<BuiltStage>,
}

/// A built image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Full reference, `docker.io/library/postgres:15` for instance.
    pub reference: String,
    /// Its layers in the cache, lowest first.
    pub layers: Vec<PathBuf>,
    /// What its containers start with.
    pub settings: Settings,
}

/// Builds the final stage of `dockerfile` as `reference`. Each layer is taken from the cache if it was built
/// before from the same parent, instruction and files.
pub fn build(dockerfile: &Path, reference: &str, sources: &Sources) -> Result<Image> {
    let text = fs::read_to_string(dockerfile).with_context(|| format!("read {}", dockerfile.display()))?;
    let stage = dockerfile::parse(dockerfile, &text)?;
    let layers = layers::build(&stage, sources).with_context(|| format!("build image {reference}"))?;
    Ok(Image { reference: reference.to_owned(), layers, settings: stage.settings })
}
