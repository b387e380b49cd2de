//! Many protected databases and their backups, as objects of the API server: no pods, no volumes.

use std::ops::RangeInclusive;

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use howdah_adapters::records::PostgresBackup;
use howdah_core::names;
use howdah_lab::lab::Lab;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

/// Requests under way at a time: what two processors and etcd answer without a queue.
const PARALLEL: usize = 24;
/// Databases in one namespace.
const PER_NAMESPACE: u32 = 500;
/// Time between two backups in a made history.
const BETWEEN: SignedDuration = SignedDuration::from_hours(24);

/// Where the database with this number is.
fn place(number: u32) -> (String, String) {
    (format!("crowd-{}", number / PER_NAMESPACE), format!("db-{number}"))
}

/// Makes the databases `from..to`, each with `records` backups that were taken.
///
/// # Errors
/// If the API server refuses one.
pub async fn make(lab: &Lab, client: &Client, from: u32, to: u32, records: u32) -> Result<()> {
    for namespace in (from / PER_NAMESPACE)..to.div_ceil(PER_NAMESPACE) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("crowd-{namespace}")}});
        lab.kubectl_apply(&namespace.to_string())?;
    }
    let newest = Timestamp::now();
    stream::iter(from..to)
        .map(|number| async move {
            let (namespace, name) = place(number);
            let sets = Api::<StatefulSet>::namespaced(client.clone(), &namespace);
            let set: StatefulSet = serde_json::from_value(database(&name)).context("make a StatefulSet")?;
            let made = sets.create(&PostParams::default(), &set).await.context("create a StatefulSet")?;
            let uid = made.uid().unwrap_or_default();
            make_backups(client, (&namespace, &name, &uid), newest, 1..=records).await
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await
}

/// Makes older backups of the first databases, so that each of them has `history` where it had `records`.
///
/// # Errors
/// If the API server refuses one.
pub async fn deepen(client: &Client, databases: u32, records: u32, history: u32) -> Result<()> {
    let newest = Timestamp::now();
    stream::iter(0..databases)
        .map(|number| async move {
            let (namespace, name) = place(number);
            let sets = Api::<StatefulSet>::namespaced(client.clone(), &namespace);
            let uid = sets.get(&name).await.context("get a StatefulSet")?.uid().unwrap_or_default();
            make_backups(client, (&namespace, &name, &uid), newest, records + 1..=history).await
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await
}

/// Gives all of them this schedule.
///
/// # Errors
/// If the API server refuses one.
pub async fn schedule(client: &Client, databases: u32, expression: &str) -> Result<()> {
    let patch = Patch::Merge(json!({"metadata": {"annotations": {names::SCHEDULE: expression}}}));
    stream::iter(0..databases)
        .map(|number| {
            let (namespace, name) = place(number);
            let sets = Api::<StatefulSet>::namespaced(client.clone(), &namespace);
            let patch = &patch;
            async move { sets.patch(&name, &PatchParams::default(), patch).await.map(drop) }
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await
        .context("schedule a database")
}

/// As large as one of a small team's, with an exporter beside PostgreSQL. Without replicas nothing is made of it.
fn database(name: &str) -> Value {
    let container = |image: &str| {
        json!({"name": image, "image": format!("docker.io/library/{image}:15"),
            "env": [{"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"},
                    {"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": name, "key": "password"}}}],
            "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
            "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}]})
    };
    json!({"apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": {"name": name, "labels": {"howdah.dev/protect": "true", "app.kubernetes.io/name": "postgresql"},
            "annotations": {names::SCHEDULE: "@yearly", "howdah.dev/retention": "last=3 daily=7 weekly=4 monthly=6"}},
        "spec": {"serviceName": name, "replicas": 0, "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"terminationGracePeriodSeconds": 300, "containers": [container("postgres"), container("exporter")]}},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "10Gi"}}}}]}})
}

/// Makes the backups of one database, given by its namespace, name and uid, that are so many days older than `newest`.
async fn make_backups(
    client: &Client,
    (namespace, name, uid): (&str, &str, &str),
    newest: Timestamp,
    ages: RangeInclusive<u32>,
) -> Result<()> {
    let backups = Api::<PostgresBackup>::namespaced(client.clone(), namespace);
    for age in ages {
        backup(&backups, name, uid, newest - BETWEEN * i32::try_from(age)?).await?;
    }
    Ok(())
}

/// One that was taken in this slot, with a journal of the usual length.
async fn backup(api: &Api<PostgresBackup>, database: &str, uid: &str, slot: Timestamp) -> Result<()> {
    let name = names::backup_name(database, slot);
    let record: PostgresBackup = serde_json::from_value(json!({
        "apiVersion": "howdah.dev/v1alpha1", "kind": "PostgresBackup",
        "metadata": {"name": name, "labels": {names::DATABASE_LABEL: database}},
        "spec": {"statefulSet": database, "statefulSetUid": uid, "slot": slot, "trigger": "Schedule"}}))?;
    api.create(&PostParams::default(), &record).await.context("create a backup")?;
    let phases =
        ["Preflight", "StartingBackupMode", "Snapshotting", "StoppingBackupMode", "Recording", "Pruning"];
    let steps: Vec<Value> = phases
        .iter()
        .map(|phase| json!({"phase": phase, "attempt": 1, "startedAt": slot, "tookMs": 700, "outcome": "Done"}))
        .collect();
    let status = json!({"status": {"phase": "Taken", "attempt": 1, "consistency": "online", "slot": slot,
        "startedAt": slot, "finishedAt": slot, "steps": steps, "pod": format!("{database}-0"), "node": "node-1",
        "image": {"pool": "replicapool", "name": "csi-vol-4f1c2f3e-7a0d-4a55-9f0e-2f6a1d6f0c11", "id": "5e3c1b2a4d6f"},
        "snapshot": {"name": names::snapshot_name(slot), "id": 42, "size": 10_737_418_240_u64},
        "postgresVersion": "15.14", "systemIdentifier": "7445678901234567890", "timeline": 1,
        "startLsn": "0/2000028", "stopLsn": "0/2000138",
        "label": "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n"}});
    let params = PatchParams::default();
    api.patch_status(&name, &params, &Patch::Merge(&status)).await.context("write the status of a backup")?;
    Ok(())
}
