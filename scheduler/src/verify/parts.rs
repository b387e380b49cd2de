//! The parts of a restore drill: a volume on each clone, its claim, and a pod that starts PostgreSQL there.

use howdah_core::annotations::VerifyQuery;
use howdah_core::names;
use howdah_core::verify::RUN_LIMIT;
use howdah_core::volume::RbdVolume;
use k8s_openapi::api::core::v1::{
    Container, PersistentVolume, PersistentVolumeClaim, Pod, PodSpec, SecretReference,
};
use serde_json::{Value, json};

/// What the pod runs.
const SCRIPT: &str = include_str!("drill.sh");
/// The role that is tried when the container names none.
const SUPERUSER: &str = "postgres";
/// The variable that the official image reads its superuser's name from.
const SUPERUSER_ENV: &str = "POSTGRES_USER";

/// A volume that the database lies on.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The volume.
    pub volume: RbdVolume,
    /// `spec.csi.fsType`.
    pub fs_type: Option<String>,
    /// Where nodes find the key to map it.
    pub stage_secret: Option<SecretReference>,
    /// The names of its pod's volumes that it is mounted by.
    pub mounted_as: Vec<String>,
}

/// What is known of the database that the backup is of.
#[derive(Debug)]
pub struct Original {
    /// The volumes that the backup is of, the one with the data directory first.
    pub disks: Vec<Disk>,
    /// The specification of its pod.
    pub pod: PodSpec,
    /// The container of PostgreSQL.
    pub container: Container,
    /// What is asked of the data.
    pub query: VerifyQuery,
    /// Where in the WAL recovery must not end before, if that is known.
    pub reaches: Option<String>,
}

/// The name of everything a drill makes.
#[must_use]
pub fn name_of(uid: &str) -> String {
    format!("{}{uid}", names::DRILL_PREFIX)
}

/// The name of what a drill makes of the `n`th volume; the one with the data directory comes first.
#[must_use]
pub fn disk_name(uid: &str, n: usize) -> String {
    if n == 0 { name_of(uid) } else { format!("{}-{n}", name_of(uid)) }
}

/// Whether the drill of the record with this uid makes something of this name.
#[must_use]
pub fn is_of(uid: &str, name: &str) -> bool {
    let own = name_of(uid);
    name == own || name.strip_prefix(&own).is_some_and(|rest| rest.starts_with('-'))
}

/// A volume that a drill mounts.
#[derive(Debug)]
pub struct Made {
    /// A volume made by hand, whose handle is the name of the image (ceph-csi, docs/static-pvc.md).
    pub volume: PersistentVolume,
    /// Its claim.
    pub claim: PersistentVolumeClaim,
}

/// The objects.
#[derive(Debug)]
pub struct Parts {
    /// The volumes, the one with the data directory first.
    pub volumes: Vec<Made>,
    /// The pod.
    pub pod: Pod,
}

impl Parts {
    /// Of the drill of the record with this uid; `sizes` are the clones', in bytes, the one of the data directory first.
    ///
    /// # Errors
    /// If the original's specification does not fit into a pod, which the API server has judged before.
    pub fn new(uid: &str, original: &Original, sizes: &[u64]) -> Result<Self, serde_json::Error> {
        let name = name_of(uid);
        let volumes = original
            .disks
            .iter()
            .zip(sizes)
            .enumerate()
            .map(|(n, (disk, size))| Made::new(uid, &disk_name(uid, n), disk, *size))
            .collect::<Result<_, _>>()?;
        let metadata =
            json!({"name": name, "namespace": names::VERIFY_NAMESPACE, "labels": {names::DRILL_LABEL: uid}});
        let pod = json!({"metadata": metadata, "spec": pod_spec(uid, original)});
        Ok(Self { volumes, pod: serde_json::from_value(pod)? })
    }
}

impl Made {
    fn new(uid: &str, name: &str, disk: &Disk, size: u64) -> Result<Self, serde_json::Error> {
        let metadata =
            json!({"name": name, "namespace": names::VERIFY_NAMESPACE, "labels": {names::DRILL_LABEL: uid}});
        let capacity = json!({"storage": size.to_string()});
        let volume = json!({
            "metadata": {"name": name, "labels": {names::DRILL_LABEL: uid}},
            "spec": {
                "accessModes": ["ReadWriteOnce"], "capacity": capacity, "storageClassName": "",
                // The image is removed by howdah, which knows whether it may be.
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": names::VERIFY_NAMESPACE, "name": name},
                "csi": {
                    "driver": disk.volume.driver, "volumeHandle": name,
                    "fsType": disk.fs_type, "nodeStageSecretRef": disk.stage_secret,
                    "volumeAttributes": {
                        "clusterID": disk.volume.cluster_id, "pool": disk.volume.pool, "staticVolume": "true",
                        "imageFeatures": "layering", "mapOptions": disk.volume.map_options,
                    },
                },
            },
        });
        let claim = json!({
            "metadata": metadata,
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": name,
                     "resources": {"requests": capacity}},
        });
        Ok(Self { volume: serde_json::from_value(volume)?, claim: serde_json::from_value(claim)? })
    }
}

fn pod_spec(uid: &str, original: &Original) -> Value {
    let Original { container, pod, query, reaches, .. } = original;
    let volume = |n: usize| format!("disk-{n}");
    let all = || container.volume_mounts.iter().flatten();
    let mounts: Vec<Value> = original
        .disks
        .iter()
        .enumerate()
        .flat_map(|(n, disk)| {
            all().filter(|mount| disk.mounted_as.contains(&mount.name)).map(move |mount| (n, mount))
        })
        .map(
            |(n, mount)| json!({"name": volume(n), "mountPath": mount.mount_path, "subPath": mount.sub_path}),
        )
        .collect();
    let volumes: Vec<Value> = original
        .disks
        .iter()
        .enumerate()
        .map(|(n, _)| json!({"name": volume(n), "persistentVolumeClaim": {"claimName": disk_name(uid, n)}}))
        .collect();
    // Only values that are written down: a Secret of the database's namespace is not here.
    let plain = |wanted: &str| {
        let found = container.env.iter().flatten().rfind(|variable| variable.name == wanted);
        found.and_then(|variable| variable.value.clone())
    };
    let mut env = vec![
        json!({"name": "HOWDAH_DRILL", "value": SCRIPT}),
        json!({"name": "HOWDAH_ROLE", "value": plain(SUPERUSER_ENV).unwrap_or_else(|| SUPERUSER.to_owned())}),
    ];
    let mount =
        all().find(|mount| original.disks.first().is_some_and(|data| data.mounted_as.contains(&mount.name)));
    env.extend(mount.map(|mount| json!({"name": "HOWDAH_MOUNT", "value": mount.mount_path})));
    env.extend(plain("PGDATA").map(|path| json!({"name": "PGDATA", "value": path})));
    let asked =
        [("HOWDAH_QUERY", &query.query), ("HOWDAH_DATABASE", &query.database), ("HOWDAH_REACHES", reaches)];
    env.extend(
        asked.into_iter().filter_map(|(name, value)| Some(json!({"name": name, "value": value.as_ref()?}))),
    );
    let of_pod = pod.security_context.as_ref();
    let of_container = container.security_context.as_ref();
    json!({
        "restartPolicy": "Never",
        "activeDeadlineSeconds": RUN_LIMIT.as_secs(),
        "terminationGracePeriodSeconds": 5,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "nodeSelector": pod.node_selector,
        "tolerations": pod.tolerations,
        "securityContext": {
            "runAsUser": of_pod.and_then(|context| context.run_as_user),
            "runAsGroup": of_pod.and_then(|context| context.run_as_group),
            "fsGroup": of_pod.and_then(|context| context.fs_group),
            "fsGroupChangePolicy": of_pod.and_then(|context| context.fs_group_change_policy.clone()),
            "supplementalGroups": of_pod.and_then(|context| context.supplemental_groups.clone()),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{
            "name": "postgres",
            "image": container.image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", "exec sh -c \"$HOWDAH_DRILL\""],
            "env": env,
            "volumeMounts": mounts,
            "terminationMessagePolicy": "File",
            "resources": {
                "requests": {"cpu": "100m", "memory": "256Mi"},
                "limits": {"memory": "1Gi"},
            },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "runAsUser": of_container.and_then(|context| context.run_as_user),
                "runAsGroup": of_container.and_then(|context| context.run_as_group),
            },
        }],
        "volumes": volumes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn original() -> Original {
        let pod: PodSpec = serde_json::from_value(json!({
            "securityContext": {"fsGroup": 999},
            "serviceAccountName": "db",
            "containers": [{
                "name": "db", "image": "docker.io/library/postgres:15",
                "env": [{"name": "PGDATA", "value": "/data/pgdata"},
                        {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "db", "key": "p"}}}],
                "volumeMounts": [{"name": "disk", "mountPath": "/data"}, {"name": "shm", "mountPath": "/dev/shm"}],
            }],
        }))
        .unwrap();
        Original {
            disks: vec![disk("csi-vol-1", "disk")],
            container: pod.containers[0].clone(),
            pod,
            query: VerifyQuery::default(),
            reaches: None,
        }
    }

    fn disk(image: &str, mounted_as: &str) -> Disk {
        Disk {
            volume: RbdVolume {
                volume: "pvc-1".to_owned(),
                driver: "rook-ceph.rbd.csi.ceph.com".to_owned(),
                cluster_id: "rook-ceph".to_owned(),
                pool: "replicapool".to_owned(),
                rados_namespace: String::new(),
                image: image.to_owned(),
                map_options: "krbd:noshare".to_owned(),
                encrypted: false,
                static_volume: false,
                journal: None,
            },
            fs_type: Some("ext4".to_owned()),
            stage_secret: None,
            mounted_as: vec![mounted_as.to_owned()],
        }
    }

    #[test]
    fn the_pod_has_the_image_and_the_data_and_nothing_else_of_the_database() {
        let parts = Parts::new("u-1", &original(), &[1 << 30]).unwrap();
        let spec = parts.pod.spec.unwrap();
        assert_eq!(parts.pod.metadata.name.as_deref(), Some("howdah-verify-u-1"));
        assert_eq!(spec.automount_service_account_token, Some(false));
        assert_eq!((spec.service_account_name, spec.restart_policy.as_deref()), (None, Some("Never")));
        let container = &spec.containers[0];
        assert_eq!(container.image.as_deref(), Some("docker.io/library/postgres:15"));
        let mounts = container.volume_mounts.as_ref().unwrap();
        assert_eq!((mounts.len(), mounts[0].mount_path.as_str()), (1, "/data"));
        let names: Vec<&str> =
            container.env.iter().flatten().map(|variable| variable.name.as_str()).collect();
        assert_eq!(names, ["HOWDAH_DRILL", "HOWDAH_ROLE", "HOWDAH_MOUNT", "PGDATA"]);
        assert_eq!(spec.security_context.unwrap().fs_group, Some(999));
    }

    #[test]
    fn the_volume_is_the_clone_and_stays_when_its_claim_goes() {
        let parts = Parts::new("u-1", &original(), &[1 << 30]).unwrap();
        let volume = parts.volumes[0].volume.spec.clone().unwrap();
        let csi = volume.csi.unwrap();
        assert_eq!(csi.volume_handle, "howdah-verify-u-1");
        assert_eq!(csi.volume_attributes.unwrap()["staticVolume"], "true");
        assert_eq!(volume.persistent_volume_reclaim_policy.as_deref(), Some("Retain"));
        assert_eq!(volume.claim_ref.unwrap().name.as_deref(), Some("howdah-verify-u-1"));
    }
    #[test]
    fn further_volumes_are_mounted_where_they_were() {
        let mut original = original();
        let wal = json!({"name": "wal", "mountPath": "/wal", "subPath": "pg"});
        original.container.volume_mounts.as_mut().unwrap().push(serde_json::from_value(wal).unwrap());
        original.disks.push(disk("csi-vol-2", "wal"));
        let parts = Parts::new("u-1", &original, &[1 << 30, 2 << 30]).unwrap();
        let spec = parts.pod.spec.unwrap();
        let mounts = spec.containers[0].volume_mounts.clone().unwrap();
        let mounts: Vec<(&str, &str, Option<&str>)> = mounts
            .iter()
            .map(|mount| (mount.name.as_str(), mount.mount_path.as_str(), mount.sub_path.as_deref()))
            .collect();
        assert_eq!(mounts, [("disk-0", "/data", None), ("disk-1", "/wal", Some("pg"))]);
        let claims =
            spec.volumes.iter().flatten().filter_map(|volume| volume.persistent_volume_claim.as_ref());
        let claims: Vec<&str> = claims.map(|claim| claim.claim_name.as_str()).collect();
        assert_eq!(claims, ["howdah-verify-u-1", "howdah-verify-u-1-1"]);
        let made = &parts.volumes[1].volume;
        let spec = made.spec.clone().unwrap();
        assert_eq!(spec.capacity.unwrap()["storage"].0, (2_u64 << 30).to_string());
        assert_eq!(spec.csi.unwrap().volume_handle, "howdah-verify-u-1-1");
        assert!(is_of("u-1", "howdah-verify-u-1-1") && is_of("u-1", "howdah-verify-u-1"));
        assert!(!is_of("u-1", "howdah-verify-u-10") && !is_of("u-1", "howdah-verify-u-2"));
    }
}
