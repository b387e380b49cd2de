//! Removing what may be gone already: every clean-up of the lab can run twice.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Context, Result};

/// Removes a file, unless it is not there.
pub fn remove_file(path: &Path) -> Result<()> {
    unless_gone(fs::remove_file(path)).with_context(|| format!("remove {}", path.display()))
}

/// Removes a folder and all below it, unless it is not there.
pub fn remove_tree(path: &Path) -> Result<()> {
    unless_gone(fs::remove_dir_all(path)).with_context(|| format!("remove {}", path.display()))
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
