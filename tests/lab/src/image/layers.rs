//! The layers of an image's tree: each instruction that changes it runs over the layers below in an overlay
//! mount, and what it changed is kept in the cache under the hash of all that led to it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Sources;
use super::dockerfile::{Action, Base, Place, Stage};
use crate::cache::{self, Inputs};
use crate::process;

/// The cache's kind of entry. An entry has the folder [`CHANGES`].
const KIND: &str = "layers";
/// What the layer changed: an overlay's upper folder, with its white-outs.
pub const CHANGES: &str = "changes";
/// Makes Debian's base tree.
const BASE_SCRIPT: &str = include_str!("base.sh");
/// Runs one instruction over the layers below.
const LAYER_SCRIPT: &str = include_str!("layer.sh");
/// Variables that a build sees from outside, as with a container engine, so that it can work behind a proxy.
const PROXY_VARIABLES: [&str; 3] = ["http_proxy", "https_proxy", "no_proxy"];

/// Builds the layers of a stage, or finds them in the cache; lowest first.
pub fn build(stage: &Stage, sources: &Sources) -> Result<Vec<PathBuf>> {
    let mut layers = match stage.base {
        Base::Debian => vec![debian()?],
        Base::Scratch => Vec::new(),
    };
    for (place, action) in &stage.actions {
        layers.push(layer(&layers, place, action, sources).with_context(|| place.to_string())?);
    }
    Ok(layers)
}

/// The tree that `debian:bookworm-slim` has: Debian's minimal base without documentation.
fn debian() -> Result<PathBuf> {
    let inputs = Inputs::new(BASE_SCRIPT);
    cache::entry(KIND, &inputs, "Debian's base system", |target| {
        let mut command = isolated(BASE_SCRIPT);
        process::output_of(command.arg(target)).map(drop)
    })
}

fn layer(below: &[PathBuf], place: &Place, action: &Action, sources: &Sources) -> Result<PathBuf> {
    let parent = below.last().and_then(|layer| layer.file_name()).unwrap_or_default().to_string_lossy();
    let mut inputs = Inputs::new(LAYER_SCRIPT).text("parent", &parent).text("action", &format!("{action:?}"));
    let mut files = Vec::new();
    if let Action::Copy { stage, sources: paths, .. } = action {
        for path in paths {
            let file = sources.find(stage.as_deref(), path)?;
            inputs = inputs.text(path, &digest(&file)?);
            files.push(file);
        }
    }
    cache::entry(KIND, &inputs, &format!("image layer {place}"), |target| {
        match action {
            Action::Run { command, environment, directory, user } => {
                let mut process = over(target, below)?;
                process.args(["run", user, "--", "/usr/bin/env", "-i", "-C", directory, "HOME=/root"]);
                process.args(environment);
                for name in PROXY_VARIABLES {
                    process.args(std::env::var(name).ok().map(|value| format!("{name}={value}")));
                }
                process::output_of(process.args(command))
            }
            Action::Copy { target: path, mode, .. } => {
                let staged = target.join("staged");
                stage_files(&staged, &files, path, mode.as_deref())?;
                let mut process = over(target, below)?;
                process::output_of(process.arg("copy").arg(&staged))
            }
            Action::Directory(path) => {
                let staged = target.join("staged");
                let folder = staged.join(path.trim_start_matches('/'));
                fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
                let mut process = over(target, below)?;
                process::output_of(process.arg("copy").arg(&staged))
            }
        }?;
        for leftover in ["staged", "merged", "work", "empty"] {
            let path = target.join(leftover);
            if path.exists() {
                fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(())
    })
}

/// A shell script in mount and process namespaces of its own: whatever it mounts and starts ends with it.
pub fn isolated(script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
    command.args(["sh", "-euc", script, "howdah-lab"]);
    command
}

/// [`LAYER_SCRIPT`] for the layer being built in `target`, over the layers `below`.
fn over(target: &Path, below: &[PathBuf]) -> Result<Command> {
    let changes = target.join(CHANGES);
    fs::create_dir(&changes).with_context(|| format!("create {}", changes.display()))?;
    let mut command = isolated(LAYER_SCRIPT);
    command.arg(target).arg(lower_option(target, below)?);
    Ok(command)
}

/// What an overlay mount takes as `lowerdir`: the layers, highest first.
pub fn lower_option(target: &Path, layers: &[PathBuf]) -> Result<String> {
    // The option list of a mount is one page; this leaves room for the other options.
    const LENGTH_MAX: usize = 3500;
    let mut folders: Vec<String> =
        layers.iter().rev().map(|layer| layer.join(CHANGES).to_string_lossy().into_owned()).collect();
    if folders.is_empty() {
        let empty = target.join("empty");
        fs::create_dir_all(&empty).with_context(|| format!("create {}", empty.display()))?;
        folders.push(empty.to_string_lossy().into_owned());
    }
    let option = folders.join(":");
    if option.len() > LENGTH_MAX || folders.iter().any(|folder| folder.contains([':', ','])) {
        bail!(
            "mount {} layers: their paths are too long together, or hold ':' or ','; set HOWDAH_CACHE to a \
             shorter, plainer path, or join RUN lines",
            folders.len()
        );
    }
    Ok(option)
}

/// Lays the files of a COPY out under `staged` as they shall lie in the image.
fn stage_files(staged: &Path, files: &[PathBuf], target: &str, mode: Option<&str>) -> Result<()> {
    let place = staged.join(target.trim_start_matches('/'));
    for file in files {
        // A folder's content is copied, never the folder itself: as in a container engine.
        let whole =
            if file.is_dir() || target.ends_with('/') { &place } else { place.parent().unwrap_or(staged) };
        fs::create_dir_all(whole).with_context(|| format!("create {}", whole.display()))?;
        let mut copy = Command::new("cp");
        copy.args(["--recursive", "--preserve=mode,timestamps,links", "--no-target-directory"]);
        let (from, to) = match file.file_name() {
            Some(name) if !file.is_dir() && target.ends_with('/') => (file.clone(), place.join(name)),
            _ => (file.clone(), place.clone()),
        };
        process::output_of(copy.arg(from).arg(to))?;
    }
    if let Some(mode) = mode {
        let bits = u32::from_str_radix(mode, 8).context("read --chmod")?;
        set_modes(&place, bits)?;
    }
    Ok(())
}

fn set_modes(path: &Path, bits: u32) -> Result<()> {
    let kind = fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?.file_type();
    if kind.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
            set_modes(&entry.with_context(|| format!("list {}", path.display()))?.path(), bits)?;
        }
    } else if kind.is_file() {
        let permissions = fs::Permissions::from_mode(bits);
        fs::set_permissions(path, permissions).with_context(|| format!("set mode of {}", path.display()))?;
    }
    Ok(())
}

impl Sources {
    /// The file or folder here that a COPY's source names.
    fn find(&self, stage: Option<&str>, path: &str) -> Result<PathBuf> {
        let place = match stage {
            None => self.context.join(path.trim_start_matches('/')),
            Some(name) => self
                .stages
                .iter()
                .filter(|stage| stage.name == name)
                .find_map(|stage| {
                    let rest = path.strip_prefix(stage.path.trim_end_matches('/'))?;
                    (rest.is_empty() || rest.starts_with('/'))
                        .then(|| stage.folder.join(rest.trim_start_matches('/')))
                })
                .with_context(|| format!("find {path} of stage {name}: the lab has nothing built for it"))?,
        };
        if !place.exists() {
            bail!("find {path}: {} is not there", place.display());
        }
        Ok(place)
    }
}

/// Content, names and modes of a file or of all below a folder. A cache entry (KIND/HASH) is known by its name,
/// so its hundred megabytes need not be read again; other files, cargo's target folder in the cache among them,
/// go through sha256sum, which is fast where our own debug build is not.
fn digest(path: &Path) -> Result<String> {
    let real = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
    if let Ok(root) = cache::root().and_then(|root| Ok(root.canonicalize()?))
        && let Ok(within) = real.strip_prefix(root)
        && within.iter().nth(1).is_some_and(|entry| cache::is_entry_name(&entry.to_string_lossy()))
    {
        return Ok(within.to_string_lossy().into_owned());
    }
    let mut command = Command::new("sh");
    let script = "if [ -d \"$1\" ]; then cd \"$1\"; set -- . .; else cd \"${1%/*}\"; set -- . \"${1##*/}\"; fi; \
                  find \"$2\" -printf '%P %m %y %l\\n' | LC_ALL=C sort; \
                  find \"$2\" -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum";
    process::output_of(command.args(["-euc", script, "sh"]).arg(&real))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::BuiltStage;

    #[test]
    fn a_copy_is_laid_out_as_an_engine_would() {
        let here = tempfile::tempdir().unwrap();
        let root = here.path();
        fs::create_dir_all(root.join("context/folder/sub")).unwrap();
        fs::write(root.join("context/a"), "a").unwrap();
        fs::write(root.join("context/folder/sub/b"), "b").unwrap();
        let file = root.join("context/a");
        let folder = root.join("context/folder");
        let staged = root.join("staged");
        stage_files(&staged, std::slice::from_ref(&file), "/bin/x", Some("0751")).unwrap();
        stage_files(&staged, std::slice::from_ref(&file), "/etc/", None).unwrap();
        stage_files(&staged, &[folder], "/opt/tree", None).unwrap();
        for path in ["bin/x", "etc/a", "opt/tree/sub/b"] {
            assert!(staged.join(path).is_file(), "{path}");
        }
        let mode = staged.join("bin/x").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o751);
    }

    #[test]
    fn a_stage_is_found_by_whole_path_elements() {
        let here = tempfile::tempdir().unwrap();
        fs::write(here.path().join("x"), "").unwrap();
        let sources = Sources {
            context: here.path().to_owned(),
            stages: vec![BuiltStage {
                name: "build".into(),
                path: "/src/target".into(),
                folder: here.path().to_owned(),
            }],
        };
        assert_eq!(sources.find(Some("build"), "/src/target/x").unwrap(), here.path().join("x"));
        assert_eq!(sources.find(None, "x").unwrap(), here.path().join("x"));
        for (stage, path, problem) in [
            (Some("build"), "/src/targetx", "nothing built"),
            (Some("other"), "/src/target/x", "stage other"),
            (Some("build"), "/src/target/y", "is not there"),
            (None, "y", "is not there"),
        ] {
            let error = sources.find(stage, path).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_digest_sees_content_names_and_modes() {
        let here = tempfile::tempdir().unwrap();
        let file = here.path().join("x");
        fs::write(&file, "1").unwrap();
        let first = (digest(&file).unwrap(), digest(here.path()).unwrap());
        assert_eq!(first, (digest(&file).unwrap(), digest(here.path()).unwrap()));
        fs::write(&file, "2").unwrap();
        let second = (digest(&file).unwrap(), digest(here.path()).unwrap());
        assert!(first.0 != second.0 && first.1 != second.1);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_ne!(second.0, digest(&file).unwrap());
    }
}
