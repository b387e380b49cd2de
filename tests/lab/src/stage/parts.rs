//! Databases on several volumes: the WAL and a tablespace on images of their own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Database, Place, Stage, VOLUME, name_of, stateful_set};
use crate::lab::Lab;
use crate::mapping::Mapping;
use crate::postgres::{Binaries, DEBIAN_MAJOR};

/// The volume of the pod that the WAL lies on.
const WAL: &str = "wal";
/// Folder of each file system that PostgreSQL owns: the root has `lost+found`.
const FOLDER: &str = "pg";

/// A further volume of a database.
#[derive(Clone, Debug)]
pub struct Part {
    /// The name of the pod's volume.
    pub volume: String,
    /// The image as POOL/NAME.
    pub image: String,
}

impl Stage {
    /// A protected StatefulSet with a running database whose WAL lies on the volume `wal`, and which has the volume `space`
    /// for a tablespace.
    pub fn database_in_parts(&self, name: &str, annotations: &Value) -> Database<'_> {
        let place = Place::next(&self.lab);
        let further = ["space", WAL];
        let root = place.root(&self.lab);
        let mut objects =
            stateful_set(name, DEBIAN_MAJOR, VOLUME, annotations, &place, root.to_str().unwrap());
        let spec = &mut objects["items"][1]["spec"];
        let mut template = spec["volumeClaimTemplates"][0].clone();
        for volume in further {
            template["metadata"]["name"] = json!(volume);
            spec["volumeClaimTemplates"].as_array_mut().unwrap().push(template.clone());
            let container = &mut spec["template"]["spec"]["containers"][0];
            let root = root_of(&self.lab, &place, volume);
            let mount = json!({"name": volume, "mountPath": root});
            container["volumeMounts"].as_array_mut().unwrap().push(mount);
            if volume == WAL {
                let waldir = json!({"name": "POSTGRES_INITDB_WALDIR", "value": root.join(FOLDER)});
                container["env"].as_array_mut().unwrap().push(waldir);
            }
        }
        self.database_of_objects(DEBIAN_MAJOR, name, &objects, place, &further)
    }
}

impl Database<'_> {
    /// The folder for a tablespace on a further volume.
    pub fn folder(&self, volume: &str) -> PathBuf {
        root_of(&self.stage.lab, self.server.place(), volume).join(FOLDER)
    }
}

fn mapped_as(place: &Place, volume: &str) -> String {
    format!("{}-{volume}", place.name)
}

fn root_of(lab: &Lab, place: &Place, volume: &str) -> PathBuf {
    Mapping::place(lab, &mapped_as(place, volume))
}

/// Maps the images of the parts.
pub(super) fn map(lab: &Lab, place: &Place, parts: &[Part], blank: bool) -> Vec<Mapping> {
    let open = |part: &Part| Mapping::open(lab, name_of(&part.image), &mapped_as(place, &part.volume), blank);
    parts.iter().map(|part| open(part).unwrap()).collect()
}

/// Makes the folders of a new database, and moves its WAL to where it belongs, as `initdb --waldir` does.
pub(super) fn furnish(lab: &Lab, place: &Place, binaries: &Binaries, parts: &[Part]) {
    for part in parts {
        let folder = root_of(lab, place, &part.volume).join(FOLDER);
        fs::create_dir(&folder).unwrap();
        if part.volume == WAL {
            let wal = place.root(lab).join("data/pg_wal");
            for entry in fs::read_dir(&wal).unwrap() {
                let entry = entry.unwrap();
                let moved = folder.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    fs::create_dir(&moved).unwrap();
                } else {
                    fs::copy(entry.path(), &moved).unwrap();
                }
                binaries.give(&moved).unwrap();
            }
            fs::remove_dir_all(&wal).unwrap();
            symlink(&folder, &wal).unwrap();
        }
        binaries.give(&folder).unwrap();
    }
}

/// Lets the links of a data directory lead to where the parts are mounted now: in a pod they are mounted where they were.
pub(super) fn link(lab: &Lab, place: &Place, parts: &[Part]) {
    let data = place.root(lab).join("data");
    for part in parts {
        let folder = root_of(lab, place, &part.volume).join(FOLDER);
        if part.volume == WAL {
            relink(&data.join("pg_wal"), &folder);
            continue;
        }
        for entry in fs::read_dir(data.join("pg_tblspc")).unwrap() {
            relink(&entry.unwrap().path(), &folder);
        }
    }
}

fn relink(link: &Path, to: &Path) {
    if fs::read_link(link).unwrap() != to {
        fs::remove_file(link).unwrap();
        symlink(to, link).unwrap();
    }
}
