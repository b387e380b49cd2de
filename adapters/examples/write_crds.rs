//! Writes the CustomResourceDefinitions into `deploy/base/crds/`, or into the folder given.

use std::path::PathBuf;

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/base/crds");
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| default.to_owned()));
    std::fs::create_dir_all(&folder).with_context(|| format!("make the folder {}", folder.display()))?;
    for (name, yaml) in howdah_adapters::records::crd_yaml()? {
        let path = folder.join(name);
        std::fs::write(&path, yaml).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
