//! Databases on several volumes: the WAL and a tablespace on images of their own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use howdah_core::backup::{BackupStatus, ImageRecord, SnapshotRecord};
use serde_json::{Value, json};

use super::{Database, Place, Restored, Server, Stage, VOLUME, name_of, stateful_set};
use crate::ceph::POOL;
use crate::lab::Lab;
use crate::mapping::Mapping;
use crate::postgres::{Binaries, DEBIAN_MAJOR};

/// The volume of the pod that the WAL lies on.
const WAL: &str = "wal";
/// Folder of each file system that PostgreSQL owns: the root has `lost+found`.
const FOLDER: &str = "pg";

/// A table on each volume, the index of the one on the other's: a row of the first is in both, whenever a snapshot is taken.
const TABLES: [&str; 4] = [
    "CREATE TABLE ledger (n int PRIMARY KEY USING INDEX TABLESPACE far)",
    "CREATE TABLE twin (n int PRIMARY KEY) TABLESPACE far",
    "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS \
     'BEGIN INSERT INTO twin VALUES (NEW.n); RETURN NEW; END'",
    "CREATE TRIGGER twice AFTER INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION twice()",
];
/// Rows of one table that the other lacks: by the tables themselves, then by their indexes. Two zeros are one state.
const APART: &str = "SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off; \
    SELECT count(*) FROM ledger FULL JOIN twin USING (n) WHERE ledger.n IS NULL OR twin.n IS NULL; \
    RESET ALL; SET enable_seqscan = off; SET enable_bitmapscan = off; \
    SELECT (SELECT count(*) FROM ledger WHERE n > 0) - (SELECT count(*) FROM twin WHERE n > 0)";

/// A further volume of a database.
#[derive(Clone, Debug)]
pub struct Part {
    /// The name of the pod's volume.
    pub volume: String,
    /// The image as POOL/NAME.
    pub image: String,
}

impl Stage {
    /// A protected StatefulSet with a running database whose WAL lies on the volume `wal`, and a tablespace on the volume
    /// `space`. Its table `ledger` has to be whole in a way that [`Server::assert_one_state`] judges.
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
        let database = self.database_of_objects(DEBIAN_MAJOR, name, &objects, place, &further);
        let folder = root_of(&self.lab, database.server.place(), "space").join(FOLDER);
        database.sql(&format!("CREATE TABLESPACE far LOCATION '{}'", folder.display()));
        TABLES.iter().for_each(|statement| drop(database.sql(statement)));
        database
    }
}

impl Database<'_> {
    /// Every image as POOL/NAME, the one with the data directory first.
    pub fn images(&self) -> Vec<String> {
        let parts = self.parts.iter().map(|part| part.image.clone());
        std::iter::once(self.image.clone()).chain(parts).collect()
    }
}

impl Server {
    /// Panics if the volumes of a database in parts are of different instants.
    pub fn assert_one_state(&self) {
        assert_eq!(self.sql(APART), "0\n0", "the volumes are of different instants");
    }
}

impl Restored {
    /// On clones of all snapshots of a backup, by the names that its images have now.
    pub fn of(lab: &Lab, status: &BackupStatus) -> Self {
        let names = lab.rbd(&["ls", POOL]).unwrap();
        let snapshot = |image: &ImageRecord, snapshot: &Option<SnapshotRecord>| {
            // A restore adds to the name and takes away from it.
            let stem = image.name.split(".howdah").next().unwrap();
            let mut like = names.lines().filter(|name| name.starts_with(stem));
            let name = like.find(|name| id_of(lab, name) == image.id);
            let name = name.unwrap_or_else(|| panic!("{image:?} is gone"));
            format!("{POOL}/{name}@{}", snapshot.as_ref().unwrap().name)
        };
        let parts: Vec<Part> = status
            .parts
            .iter()
            .map(|part| Part { volume: part.volume.clone(), image: snapshot(&part.image, &part.snapshot) })
            .collect();
        let data = snapshot(status.image.as_ref().unwrap(), &status.snapshot);
        Self::start_parts(lab, DEBIAN_MAJOR, &data, &parts)
    }
}

/// The id of an image of the pool; nothing for one that just went.
fn id_of(lab: &Lab, name: &str) -> String {
    let info = lab.rbd(&["info", "--format", "json", &format!("{POOL}/{name}")]).unwrap_or_default();
    let info: Value = serde_json::from_str(&info).unwrap_or_default();
    info["id"].as_str().unwrap_or_default().to_owned()
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
