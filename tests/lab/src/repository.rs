//! Where the sources of this repository are, for what the lab builds and installs from them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize as _;
use serde_json::Value;

/// The repository's root. The lab is run from its sources, never installed elsewhere.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The YAML documents of one of its files.
///
/// # Errors
/// If the file cannot be read, or is no YAML.
pub fn documents(file: &str) -> Result<Vec<Value>> {
    let path = root().join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    documents.collect::<Result<_, _>>().with_context(|| format!("read {} as YAML", path.display()))
}
