//! Where the sources of this repository are, for what the lab builds and installs from them.

use std::path::{Path, PathBuf};

/// The repository's root. The lab is run from its sources, never installed elsewhere.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
