//! Where a StatefulSet keeps its database: which of its containers run PostgreSQL, where their data lies, and on what.
//!
//! Nothing in the API says so; it is read from `PGDATA`, from the command line, and from what well-known images do when
//! neither says. What cannot be known is left out: a rule judges only what stands here.

use std::collections::BTreeMap;

use serde_json::Value;

use super::json;
use crate::preflight::{DATA_FOLDERS, DATA_VARIABLES, DEFAULT_DATA_DIRECTORY, WAL_VARIABLES};

/// Parts of the names of images that serve PostgreSQL or look after it, and are not it.
const NOT_A_SERVER: [&str; 9] =
    ["exporter", "pgbouncer", "pgpool", "pgbackrest", "pgadmin", "pgwatch", "backup", "wal-g", "postgrest"];
/// The first version of the official image that keeps its data in a folder of its version.
const VERSIONED_FOLDERS_SINCE: u32 = 18;
/// Where images that are not known keep their data, if they are PostgreSQL: as the official one, as those of Fedora and Red
/// Hat, as Bitnami's, as Patroni's and as Crunchy's.
const USUAL_FOLDERS: [&str; 5] = [
    DEFAULT_DATA_DIRECTORY,
    "/var/lib/pgsql/data",
    "/bitnami/postgresql/data",
    "/home/postgres/pgdata",
    "/pgdata",
];
/// What a well-known image does when nothing says where its data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// One folder.
    At(&'static str),
    /// As the official image: one folder, which is a volume of the image, and since version 18 one per version.
    Official(Option<u32>),
    /// An image that is not known. Where something is mounted at a place that only PostgreSQL uses, it is that.
    Unknown,
}

/// A folder of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place<'a> {
    /// The field that says where it is.
    pub field: String,
    /// Its path in the container.
    pub path: String,
    /// Whether the manifest names it, and not only the image.
    pub named: bool,
    /// Whether only an init container uses it.
    pub init: bool,
    /// What it lies on.
    pub ground: Ground<'a>,
    /// Whether the image declares a volume of its own between the mount and the folder: containerd puts an empty one
    /// there for each container, so that the data goes with it.
    pub shadowed: bool,
}

/// What a folder lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ground<'a> {
    /// A claim that is made from a template or named by the pod: the volume of this name.
    Claim(&'a str),
    /// A volume that does not outlive the pod, or that is no claim: its name, and what it is.
    Volume(&'a str, &'a str),
    /// The container's own file system, which goes with the container.
    Container,
}

/// Every folder of the database that is known, in the order of the containers.
pub(super) fn places(object: &Value) -> Vec<Place<'_>> {
    let mut places = Vec::new();
    let Some(pod) = json::at(object, &["spec", "template", "spec"]) else { return places };
    let grounds = grounds(object, pod);
    for list in ["containers", "initContainers"] {
        for container in json::list(pod, &[list]) {
            let name = json::string(container, &["name"]).unwrap_or("?");
            let sidecar = json::string(container, &["restartPolicy"]) == Some("Always");
            let server = Server {
                container,
                path: format!("spec.template.spec.{list}[{name}]"),
                init: list == "initContainers" && !sidecar,
                family: family(json::string(container, &["image"]).unwrap_or_default()),
                mounts: mounts(container),
                grounds: &grounds,
            };
            server.places(&mut places);
        }
    }
    places
}

/// The volume that the database lies on; `None` when no claim is known to hold it.
#[must_use]
pub fn data_volume(object: &Value) -> Option<&str> {
    places(object).into_iter().filter(|place| !place.init).find_map(|place| match place.ground {
        Ground::Claim(volume) => Some(volume),
        Ground::Volume(..) | Ground::Container => None,
    })
}

/// What each volume of the pod is, by name. A claim template replaces a volume of its name.
fn grounds<'a>(object: &'a Value, pod: &'a Value) -> BTreeMap<&'a str, Ground<'a>> {
    let mut grounds = BTreeMap::new();
    for volume in json::list(pod, &["volumes"]) {
        let Some(name) = json::string(volume, &["name"]) else { continue };
        let kinds = volume
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| *key != "name" && !value.is_null());
        let kind = kinds.map(|(key, _)| key.as_str()).next().unwrap_or("emptyDir");
        let ground =
            if kind == "persistentVolumeClaim" { Ground::Claim(name) } else { Ground::Volume(name, kind) };
        grounds.insert(name, ground);
    }
    for template in json::list(object, &["spec", "volumeClaimTemplates"]) {
        if let Some(name) = json::string(template, &["metadata", "name"]) {
            grounds.insert(name, Ground::Claim(name));
        }
    }
    grounds
}

/// Path and volume of every mount of a container.
fn mounts(container: &Value) -> Vec<(&str, &str)> {
    let mounts = json::list(container, &["volumeMounts"]).iter();
    mounts
        .filter_map(|mount| Some((json::string(mount, &["mountPath"])?, json::string(mount, &["name"])?)))
        .collect()
}

/// A container that may be a PostgreSQL.
struct Server<'a, 'b> {
    container: &'a Value,
    path: String,
    init: bool,
    family: Option<Family>,
    mounts: Vec<(&'a str, &'a str)>,
    grounds: &'b BTreeMap<&'a str, Ground<'a>>,
}

impl<'a> Server<'a, '_> {
    fn places(&self, places: &mut Vec<Place<'a>>) {
        let Some(data) = self.data() else { return };
        let (root, named) = (data.path.trim_end_matches('/').to_owned(), data.named);
        let init = self.init;
        places.push(data);
        for variable in WAL_VARIABLES {
            if let Some(path) = self.variable(variable) {
                places.push(self.place(format!("{}.env[{variable}]", self.path), path, true));
            }
        }
        for (path, _) in &self.mounts {
            let below = path.strip_prefix(root.as_str()).and_then(|rest| rest.strip_prefix('/'));
            let part = below.and_then(|below| below.split('/').next()).unwrap_or_default();
            if DATA_FOLDERS.contains(&part) {
                let field = format!("{}.volumeMounts[{path}]", self.path);
                places.push(Place { named, init, ..self.place(field, (*path).to_owned(), named) });
            }
        }
    }

    /// The folder of the data; `None` when this is no PostgreSQL, or nothing tells where its data is.
    fn data(&self) -> Option<Place<'a>> {
        if let Some(path) = self.data_on_the_command_line() {
            return Some(self.place(format!("{}.args", self.path), path, true));
        }
        for variable in DATA_VARIABLES {
            if self.environment().any(|(name, _)| name == variable) {
                let path = self.variable(variable)?;
                return Some(self.place(format!("{}.env[{variable}]", self.path), path, true));
            }
        }
        // A map of variables may hold PGDATA: then only a mount at the place where the image looks tells anything.
        let sure = json::list(self.container, &["envFrom"]).is_empty()
            && !self.init
            && self.family != Some(Family::Unknown);
        let field = format!("{}.volumeMounts", self.path);
        let candidates: Vec<Place<'a>> = default_folders(self.family)
            .into_iter()
            .map(|path| self.place(field.clone(), path, false))
            .collect();
        let mounted = candidates.iter().find(|place| place.ground != Ground::Container);
        // With a command of its own it may be anything, a dump for example.
        let runs_the_image = json::list(self.container, &["command"]).is_empty();
        mounted.or_else(|| candidates.first().filter(|_| sure && runs_the_image)).cloned()
    }

    fn place(&self, field: String, path: String, named: bool) -> Place<'a> {
        let above = self.mounts.iter().filter(|(mount, _)| {
            path.strip_prefix(mount.trim_end_matches('/'))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        let nearest = above.max_by_key(|(mount, _)| mount.trim_end_matches('/').len());
        let ground =
            nearest.and_then(|(_, volume)| self.grounds.get(volume).cloned()).unwrap_or(Ground::Container);
        let shadowed = nearest.is_some_and(|(mount, _)| is_shadowed(self.family, &path, mount));
        Place { field, path, named, init: self.init, ground, shadowed }
    }

    /// Name and value of the variables; `None` for a value that comes from elsewhere.
    fn environment(&self) -> impl Iterator<Item = (&'a str, Option<&'a str>)> {
        json::list(self.container, &["env"]).iter().filter_map(|variable| {
            let value = json::string(variable, &["value"]);
            Some((json::string(variable, &["name"])?, value))
        })
    }

    /// The value of a variable with the variables in it put in; `None` when that cannot be told.
    fn variable(&self, wanted: &str) -> Option<String> {
        let (_, value) = self.environment().find(|(name, _)| *name == wanted)?;
        self.expanded(value?)
    }

    /// The text with each `$(NAME)` replaced, as the kubelet does; `None` when one is unknown.
    fn expanded(&self, text: &str) -> Option<String> {
        let mut expanded = text.to_owned();
        for (name, value) in self.environment() {
            if let Some(value) = value {
                expanded = expanded.replace(&format!("$({name})"), value);
            }
        }
        (expanded.starts_with('/') && !expanded.contains("$")).then_some(expanded)
    }

    /// The folder that `-D`, `--pgdata` or `-c data_directory=` names.
    fn data_on_the_command_line(&self) -> Option<String> {
        let words: Vec<&str> = ["command", "args"]
            .iter()
            .flat_map(|list| json::list(self.container, &[list]))
            .filter_map(Value::as_str)
            .flat_map(str::split_whitespace)
            .map(|word| word.trim_matches(['"', '\'']))
            .collect();
        // Of other programs -D may mean something else.
        if !words.iter().any(|word| word.rsplit('/').next() == Some("postgres"))
            && !json::list(self.container, &["command"]).is_empty()
        {
            return None;
        }
        let next = words.iter().skip(1).map(Some).chain([None]);
        let found = words.iter().zip(next).find_map(|(word, next)| match *word {
            "-D" | "--pgdata" => next.copied(),
            word => ["--pgdata=", "data_directory=", "--data_directory=", "-D"]
                .iter()
                .find_map(|option| word.strip_prefix(option))
                .filter(|path| path.starts_with('/')),
        })?;
        self.expanded(found)
    }
}

/// The family of an image; `None` for one that is no server.
fn family(image: &str) -> Option<Family> {
    let image = image.to_ascii_lowercase();
    let (name, tag) = name_and_tag(&image);
    if NOT_A_SERVER.iter().any(|part| name.contains(part)) {
        return None;
    }
    match name.rsplit('/').next().unwrap_or_default() {
        "postgres" | "postgis" | "pgvector" => Some(Family::Official(major_version(tag, true))),
        // The tag begins with the version of TimescaleDB.
        "timescaledb" => Some(Family::Official(major_version(tag, false))),
        "timescaledb-ha" => Some(Family::At("/home/postgres/pgdata/data")),
        "postgresql" | "postgresql-repmgr" if name.contains("bitnami") => {
            Some(Family::At("/bitnami/postgresql/data"))
        }
        spilo if spilo.starts_with("spilo") => Some(Family::At("/home/postgres/pgdata/pgroot/data")),
        _ => Some(Family::Unknown),
    }
}

/// Where an image of the family may keep its data when nothing says so, likeliest first.
fn default_folders(family: Option<Family>) -> Vec<String> {
    let plain = DEFAULT_DATA_DIRECTORY.to_owned();
    let of_version = |major: u32| format!("/var/lib/postgresql/{major}/docker");
    match family {
        None => Vec::new(),
        Some(Family::At(path)) => vec![path.to_owned()],
        Some(Family::Unknown) => USUAL_FOLDERS.map(str::to_owned).into(),
        Some(Family::Official(Some(major))) if major >= VERSIONED_FOLDERS_SINCE => vec![of_version(major)],
        Some(Family::Official(Some(_))) => vec![plain],
        Some(Family::Official(None)) => vec![plain, of_version(VERSIONED_FOLDERS_SINCE)],
    }
}

/// Whether the folder lies in the volume that the official image declares up to version 17, below a mount further up.
fn is_shadowed(family: Option<Family>, path: &str, mount: &str) -> bool {
    let Some(Family::Official(Some(major))) = family else { return false };
    let within = |path: &str| {
        path.strip_prefix(DEFAULT_DATA_DIRECTORY).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    major < VERSIONED_FOLDERS_SINCE && within(path) && !within(mount.trim_end_matches('/'))
}

/// The name of an image without registry port, tag and digest, and its tag.
fn name_and_tag(image: &str) -> (&str, &str) {
    let image = image.split('@').next().unwrap_or_default();
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (image, ""),
    }
}

/// The major version of PostgreSQL in a tag: after `pg`, or at its beginning where it may stand there.
fn major_version(tag: &str, leading: bool) -> Option<u32> {
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().ok()
    };
    let after_pg = tag.split('-').find_map(|part| part.strip_prefix("pg").and_then(number));
    after_pg.or_else(|| number(tag).filter(|_| leading))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(containers: Value, volumes: Value) -> Value {
        json!({"spec": {
            "template": {"spec": {"containers": containers, "volumes": volumes}},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}}],
        }})
    }

    /// Path and volume of the data of one container.
    fn data(container: Value) -> Option<(String, String)> {
        let object = of(json!([container]), json!([{"name": "scratch", "emptyDir": {}}]));
        places(&object).first().map(|place| {
            let ground = match place.ground {
                Ground::Claim(name) => name.to_owned(),
                Ground::Volume(name, kind) => format!("{kind} {name}"),
                Ground::Container => "-".to_owned(),
            };
            (place.path.clone(), ground)
        })
    }

    fn at(path: &str, ground: &str) -> Option<(String, String)> {
        Some((path.to_owned(), ground.to_owned()))
    }

    fn mount(name: &str, path: &str) -> Value {
        json!([{"name": name, "mountPath": path}])
    }

    #[test]
    fn the_images_own_folder_counts_where_nothing_is_said() {
        for (image, path, folder) in [
            ("postgres:15", "/var/lib/postgresql/data", "/var/lib/postgresql/data"),
            (
                "docker.io/library/postgres:18.1-alpine",
                "/var/lib/postgresql",
                "/var/lib/postgresql/18/docker",
            ),
            ("postgres", "/var/lib/postgresql/data/", "/var/lib/postgresql/data"),
            ("postgis/postgis:16-3.4", "/var/lib/postgresql/data", "/var/lib/postgresql/data"),
            (
                "registry.example.com:5000/mirror/postgres:17.6",
                "/var/lib/postgresql",
                "/var/lib/postgresql/data",
            ),
            ("timescale/timescaledb:2.17.2-pg16", "/var/lib/postgresql/data", "/var/lib/postgresql/data"),
            ("timescale/timescaledb-ha:pg16", "/home/postgres/pgdata", "/home/postgres/pgdata/data"),
            (
                "localhost:5000/bitnami/postgresql:16.2.0@sha256:aa",
                "/bitnami/postgresql",
                "/bitnami/postgresql/data",
            ),
        ] {
            let container = json!({"image": image, "volumeMounts": mount("data", path)});
            assert_eq!(data(container), at(folder, "data"), "{image}");
        }
        let wrong =
            json!({"image": "postgres:18", "volumeMounts": mount("data", "/var/lib/postgresql/data")});
        assert_eq!(data(wrong), at("/var/lib/postgresql/18/docker", "-"));
    }

    #[test]
    fn the_volume_of_an_old_official_image_lies_over_a_mount_further_up() {
        let shadowed = |image: &str, path: &str, env: Value| {
            let container = json!({"image": image, "volumeMounts": mount("data", path), "env": env});
            places(&of(json!([container]), json!([])))[0].shadowed
        };
        let pgdata = |path: &str| json!([{"name": "PGDATA", "value": path}]);
        assert!(shadowed("postgres:17.6", "/var/lib/postgresql", json!([])));
        assert!(shadowed("postgres:15", "/var/lib", pgdata("/var/lib/postgresql/data/pgdata")));
        assert!(!shadowed("postgres:17.6", "/var/lib/postgresql/data/", json!([])));
        assert!(!shadowed("postgres:17.6", "/var/lib/postgresql", pgdata("/var/lib/postgresql/17/main")));
        assert!(!shadowed("postgres:18", "/var/lib/postgresql", json!([])));
        assert!(!shadowed("postgres", "/var/lib/postgresql", json!([])), "its version is not known");
    }

    #[test]
    fn what_is_said_counts_before_what_the_image_does() {
        let with = |extra: Value| {
            let mut container = json!({"image": "postgres:15", "volumeMounts": mount("data", "/pg")});
            json_patch::merge(&mut container, &extra);
            data(container)
        };
        assert_eq!(with(json!({"env": [{"name": "PGDATA", "value": "/pg/15"}]})), at("/pg/15", "data"));
        let env = json!([{"name": "ROOT", "value": "/pg"}, {"name": "PGDATA", "value": "$(ROOT)/data"}]);
        assert_eq!(with(json!({"env": env})), at("/pg/data", "data"));
        assert_eq!(with(json!({"args": ["-c", "data_directory=/pg/x"]})), at("/pg/x", "data"));
        assert_eq!(with(json!({"command": ["/usr/bin/postgres", "-D", "/pg/y"]})), at("/pg/y", "data"));
        assert_eq!(with(json!({"args": ["--pgdata=/elsewhere"]})), at("/elsewhere", "-"));
    }

    #[test]
    fn what_cannot_be_told_is_left_out() {
        for container in [
            json!({"image": "postgres:15", "env": [{"name": "PGDATA", "valueFrom": {}}]}),
            json!({"image": "postgres:15", "env": [{"name": "PGDATA", "value": "$(ROOT)/data"}]}),
            json!({"image": "postgres:15", "envFrom": [{"configMapRef": {"name": "pg"}}]}),
            json!({"image": "registry.example.com/team/database:7", "volumeMounts": mount("data", "/data")}),
            json!({"image": "prometheuscommunity/postgres-exporter:v0.15.0"}),
            json!({"image": "postgres:15", "command": ["sh", "-c", "while sleep 1d; do pg_dump -D x > /backup/$(date); done"],
                   "volumeMounts": mount("scratch", "/backup")}),
        ] {
            assert_eq!(data(container.clone()), None, "{container}");
        }
        let mapped = json!({"image": "postgres:15", "envFrom": [{}], "volumeMounts": mount("data", "/var/lib/postgresql/data")});
        assert_eq!(data(mapped), at("/var/lib/postgresql/data", "data"));
    }

    #[test]
    fn the_nearest_mount_counts_and_other_volumes_are_named() {
        let mounts = json!([{"name": "data", "mountPath": "/var/lib/postgresql"},
                            {"name": "scratch", "mountPath": "/var/lib/postgresql/data"}]);
        let container = json!({"image": "postgres:15", "volumeMounts": mounts});
        assert_eq!(data(container), at("/var/lib/postgresql/data", "emptyDir scratch"));
        let sibling =
            json!({"image": "postgres:15", "volumeMounts": mount("scratch", "/var/lib/postgresql/data2")});
        assert_eq!(data(sibling), at("/var/lib/postgresql/data", "-"));
    }

    #[test]
    fn the_parts_of_a_database_are_places_of_their_own() {
        let container = json!({
            "name": "pg", "image": "postgres:15",
            "env": [{"name": "POSTGRES_INITDB_WALDIR", "value": "/wal/pg"}],
            "volumeMounts": [
                {"name": "data", "mountPath": "/var/lib/postgresql/data"},
                {"name": "scratch", "mountPath": "/var/lib/postgresql/data/pg_stat_tmp"},
                {"name": "scratch", "mountPath": "/var/lib/postgresql/data/pg_wal"},
                {"name": "wal", "mountPath": "/wal"},
            ],
        });
        let volumes = json!([{"name": "scratch", "emptyDir": {}}, {"name": "wal", "persistentVolumeClaim": {"claimName": "w"}}]);
        let object = of(json!([container]), volumes);
        let found: Vec<(String, Ground<'_>)> =
            places(&object).into_iter().map(|place| (place.field, place.ground)).collect();
        let container = "spec.template.spec.containers[pg]";
        assert_eq!(
            found,
            [
                (format!("{container}.volumeMounts"), Ground::Claim("data")),
                (format!("{container}.env[POSTGRES_INITDB_WALDIR]"), Ground::Claim("wal")),
                (
                    format!("{container}.volumeMounts[/var/lib/postgresql/data/pg_wal]"),
                    Ground::Volume("scratch", "emptyDir")
                ),
            ]
        );
    }
}
