//! Images as a docker-archive: the form in which `docker save` writes them and every runtime reads them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::Image;
use super::layers::CHANGES;
use crate::cache::{self, Inputs};
use crate::process;

/// The cache's kind of entry: `layer.tar` and its `digest`.
const KIND: &str = "layer-tars";
/// A fixed creation time, so that the same content gives the same image id.
const CREATED: &str = "1970-01-01T00:00:00Z";
/// Marks a folder that hides what the layers below have in it.
const OPAQUE: &str = "trusted.overlay.opaque";

/// A layer as a tar archive with OCI's white-outs, and its digest.
struct Packed {
    tar: PathBuf,
    digest: String,
}

/// Lays out `images` as one docker-archive in the folder `target`. Layers are links into the cache: pack the
/// folder with `tar --dereference`.
pub fn lay_out(images: &[Image], target: &Path) -> Result<()> {
    let mut manifest = Vec::new();
    for image in images {
        let mut layers = Vec::new();
        let mut digests = Vec::new();
        for layer in &image.layers {
            let packed = pack(layer)?;
            let name = format!("{}.tar", packed.digest);
            let link = target.join(&name);
            // Images share layers.
            if !link.exists() {
                symlink(&packed.tar, &link).with_context(|| format!("link {}", link.display()))?;
            }
            layers.push(name);
            digests.push(format!("sha256:{}", packed.digest));
        }
        let config = serde_json::to_vec(&config(image, &digests)).context("write the image's settings")?;
        let file = target.join("config.json");
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let name = format!("{}.json", sha256(&file)?);
        fs::rename(&file, target.join(&name)).with_context(|| format!("name {name}"))?;
        manifest.push(json!({ "Config": name, "RepoTags": [image.reference], "Layers": layers }));
    }
    let file = target.join("manifest.json");
    let text = serde_json::to_vec(&manifest).context("write the archive's manifest")?;
    fs::write(&file, text).with_context(|| format!("write {}", file.display()))
}

fn config(image: &Image, digests: &[String]) -> Value {
    let settings = &image.settings;
    let set = |names: &[String]| -> Map<String, Value> {
        names.iter().map(|name| (name.clone(), json!({}))).collect()
    };
    let mut config = json!({
        "Env": settings.environment,
        "User": settings.user,
        "WorkingDir": settings.directory,
        "Entrypoint": settings.entrypoint,
        "Cmd": settings.command,
        "ExposedPorts": set(&settings.ports),
        "Volumes": set(&settings.volumes),
        "Labels": settings.labels,
    });
    if let Some(signal) = &settings.stop_signal {
        config["StopSignal"] = json!(signal);
    }
    json!({
        "architecture": "amd64",
        "os": "linux",
        "created": CREATED,
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": digests },
    })
}

fn pack(layer: &Path) -> Result<Packed> {
    let name = layer.file_name().context("name the layer")?.to_string_lossy().into_owned();
    let inputs = Inputs::new("layer tar 1").text("layer", &name);
    let entry = cache::entry(KIND, &inputs, &format!("archive of image layer {name}"), |target| {
        let tar = target.join("layer.tar");
        write_tar(&layer.join(CHANGES), &tar, target)?;
        let digest = sha256(&tar)?;
        fs::write(target.join("digest"), digest).context("write the layer's digest")
    })?;
    let digest = fs::read_to_string(entry.join("digest")).context("read the layer's digest")?;
    Ok(Packed { tar: entry.join("layer.tar"), digest })
}

/// Overlay says "deleted" with a character device 0:0 and "opaque" with an attribute; OCI says both with
/// files whose names begin with `.wh.`.
fn write_tar(changes: &Path, tar: &Path, scratch: &Path) -> Result<()> {
    let mut found = Whiteouts::default();
    found.collect(changes, Path::new(""))?;
    let (excluded, markers) = (scratch.join("excluded"), scratch.join("markers"));
    let list: String = found.devices.iter().map(|path| format!("./{}\n", path.display())).collect();
    fs::write(&excluded, list).with_context(|| format!("write {}", excluded.display()))?;
    let mut names = String::new();
    for marker in found.markers() {
        let path = markers.join(&marker);
        let parent = path.parent().context("find a marker's folder")?;
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        fs::write(&path, "").with_context(|| format!("write {}", path.display()))?;
        names.push_str(&format!("./{}\n", marker.display()));
    }
    let mut command = Command::new("tar");
    command.args(["--create", "--sort=name", "--numeric-owner", "--anchored", "--no-wildcards"]);
    command
        .arg("--exclude-from")
        .arg(&excluded)
        .arg("--file")
        .arg(tar)
        .arg("--directory")
        .arg(changes)
        .arg(".");
    process::output_of(&mut command)?;
    if !names.is_empty() {
        let list = scratch.join("names");
        fs::write(&list, names).with_context(|| format!("write {}", list.display()))?;
        let mut command = Command::new("tar");
        command.args(["--append", "--owner=0", "--group=0", "--numeric-owner"]);
        command.arg("--file").arg(tar).arg("--directory").arg(&markers).arg("--files-from").arg(&list);
        process::output_of(&mut command)?;
        fs::remove_file(&list).and_then(|()| fs::remove_dir_all(&markers)).context("remove the markers")?;
    }
    fs::remove_file(&excluded).with_context(|| format!("remove {}", excluded.display()))
}

#[derive(Debug, Default)]
struct Whiteouts {
    /// What is deleted.
    devices: Vec<PathBuf>,
    /// Folders that start anew.
    opaque: Vec<PathBuf>,
}

impl Whiteouts {
    fn collect(&mut self, root: &Path, relative: &Path) -> Result<()> {
        let folder = root.join(relative);
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry.with_context(|| format!("list {}", folder.display()))?;
            let path = relative.join(entry.file_name());
            let metadata = entry.metadata().with_context(|| format!("look at {}", path.display()))?;
            if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
                self.devices.push(path);
            } else if metadata.is_dir() {
                let mark = xattr::get(entry.path(), OPAQUE)
                    .with_context(|| format!("read attributes of {}", entry.path().display()))?;
                if mark.as_deref() == Some(b"y") {
                    self.opaque.push(path.clone());
                }
                self.collect(root, &path)?;
            }
        }
        Ok(())
    }

    fn markers(&self) -> Vec<PathBuf> {
        let deleted = self.devices.iter().map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.with_file_name(format!(".wh.{name}"))
        });
        deleted.chain(self.opaque.iter().map(|path| path.join(".wh..wh..opq"))).collect()
    }
}

fn sha256(file: &Path) -> Result<String> {
    let line = process::output_of(Command::new("sha256sum").arg("--").arg(file))?;
    let digest = line.split_whitespace().next().context("read what sha256sum says")?;
    Ok(digest.trim_start_matches('\\').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::{Mode, SFlag, mknod};

    #[test]
    fn what_a_layer_deleted_is_said_in_the_archives_words() {
        let here = tempfile::tempdir().unwrap();
        let changes = here.path().join("changes");
        fs::create_dir_all(changes.join("etc/new")).unwrap();
        fs::write(changes.join("etc/kept*"), "x").unwrap();
        mknod(&changes.join("etc/gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
        xattr::set(changes.join("etc/new"), OPAQUE, b"y").unwrap();
        let tar = here.path().join("layer.tar");
        write_tar(&changes, &tar, here.path()).unwrap();
        let listed = process::output_of(Command::new("tar").arg("-tf").arg(&tar)).unwrap();
        let mut names: Vec<&str> = listed.lines().collect();
        names.sort_unstable();
        let wanted =
            ["./", "./etc/", "./etc/.wh.gone", "./etc/kept*", "./etc/new/", "./etc/new/.wh..wh..opq"];
        assert_eq!(names, wanted);
        let left: Vec<_> = fs::read_dir(here.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "only the tree and the archive are left: {left:?}");
    }
}
