//! The records on a real API server: what they refuse, what they show, and that their journals survive a round trip.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use howdah_adapters::kubernetes::find;
use howdah_adapters::records::{
    PostgresBackup, PostgresBackupSpec, PostgresRestore, PostgresRestoreSpec, crd_yaml,
};
use howdah_core::annotations::Consistency;
use howdah_core::backup::{
    BackupStatus, Condition, Failure, FailureKind, ImageRecord, PartRecord, Phase, SnapshotRecord,
    StepOutcome, StepRecord, Trigger,
};
use howdah_core::restore::{
    self, JournalRecord, Method, Proof, RestoreStatus, RestoredPart, Source, StepRecord as RestoreStep,
    VolumeRecord,
};
use howdah_core::verify::{self, Report, VerifyStatus};
use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;
use jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};

use crate::deploy::TURN;

/// Puts the definitions on the server, as `deploy/` does.
pub fn install_definitions(lab: &Lab) {
    for (name, yaml) in crd_yaml().unwrap() {
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        let applied = lab.kubectl_with_input(&arguments, &yaml).unwrap();
        let stderr = String::from_utf8_lossy(&applied.stderr);
        assert!(applied.status.success(), "{name}: {stderr}");
        assert!(!stderr.contains("Warning"), "{name}: {stderr}");
        let definition = format!("crd/{}.howdah.dev", name.trim_end_matches(".yaml"));
        lab.kubectl_ok(&["wait", "--for=condition=Established", "--timeout=30s", &definition]).unwrap();
    }
}

fn slot() -> Timestamp {
    "2026-11-22T03:00:00Z".parse().unwrap()
}

/// A status with every field set, so that the schema must know each of them.
fn full_status() -> BackupStatus {
    let step = StepRecord {
        phase: Phase::Snapshotting,
        attempt: 1,
        started_at: slot(),
        took_ms: Some(570),
        outcome: Some(StepOutcome::Failed),
        message: Some("words".to_owned()),
    };
    let text = || Some("text\nwith \"quotes\"".to_owned());
    BackupStatus {
        phase: Phase::Taken,
        attempt: 2,
        consistency: Some(Consistency::Online),
        slot: Some(slot()),
        started_at: Some(slot()),
        finished_at: Some(slot()),
        deadline: Some(slot()),
        retry_at: Some(slot()),
        phase_retries: 1,
        steps: vec![step],
        image: Some(ImageRecord {
            pool: "replicapool".to_owned(),
            rados_namespace: "tenant".to_owned(),
            name: "csi-vol-1".to_owned(),
            id: "10393aa892a5".to_owned(),
        }),
        snapshot: Some(SnapshotRecord { name: "howdah-20261122T030000Z".to_owned(), id: 4, size: 1 << 40 }),
        parts: vec![PartRecord {
            volume: "wal".to_owned(),
            wal: true,
            image: ImageRecord {
                pool: "replicapool".to_owned(),
                rados_namespace: "tenant".to_owned(),
                name: "csi-vol-2".to_owned(),
                id: "10393aa892a6".to_owned(),
            },
            snapshot: Some(SnapshotRecord {
                name: "howdah-20261122T030000Z".to_owned(),
                id: 5,
                size: 1 << 30,
            }),
        }],
        beside: vec!["dumps".to_owned()],
        pod: text(),
        node: text(),
        postgres_version: text(),
        system_identifier: Some("7575757575757575757".to_owned()),
        timeline: Some(1),
        start_lsn: text(),
        flushed_lsn: text(),
        stop_lsn: text(),
        label: text(),
        spcmap: text(),
        conditions: vec![Condition {
            kind: "Online".to_owned(),
            status: "True".to_owned(),
            reason: "Fine".to_owned(),
            message: "words".to_owned(),
            last_transition_time: slot(),
        }],
        failure: Some(Failure {
            step: Phase::Preflight,
            kind: FailureKind::Transient,
            reason: "words".to_owned(),
            cure: "do it".to_owned(),
        }),
        verification: Some(VerifyStatus {
            phase: verify::Phase::Damaged,
            attempt: 2,
            asked: text(),
            started_at: Some(slot()),
            finished_at: Some(slot()),
            retry_at: Some(slot()),
            phase_since: Some(slot()),
            phase_retries: 1,
            report: Some(Report {
                postgres_version: text(),
                recovery_ms: Some(812),
                system_identifier: text(),
                databases: Some(2),
                rows: Some(1 << 40),
                checksums: Some(true),
                answer: text(),
                damage: text(),
            }),
            failure: Some(verify::Failure {
                step: verify::Phase::Running,
                reason: "words".to_owned(),
                cure: "do it".to_owned(),
            }),
            left_behind: text(),
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_keeps_its_journal_and_its_order() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("records").unwrap();
    let backups = Api::<PostgresBackup>::namespaced(lab.client().await.unwrap(), namespace.name());
    let spec = PostgresBackupSpec {
        stateful_set: "db".to_owned(),
        stateful_set_uid: Some("0b9f".to_owned()),
        slot: Some(slot()),
        trigger: Trigger::Schedule,
        consistency: Some(Consistency::Online),
    };
    let wanted = PostgresBackup::new("db-20261122030000", spec);
    let mut created = backups.create(&PostParams::default(), &wanted).await.unwrap();
    assert!(created.status.is_none());

    // Every field must come back, or a restart would resume from half a journal.
    created.status = Some(full_status());
    backups.replace_status("db-20261122030000", &PostParams::default(), &created).await.unwrap();
    let read = backups.get("db-20261122030000").await.unwrap();
    assert_eq!(read.spec, wanted.spec);
    assert_eq!(read.status, Some(full_status()));

    let mut changed = read.clone();
    changed.spec.stateful_set = "other".to_owned();
    let refused = backups.replace("db-20261122030000", &PostParams::default(), &changed).await.unwrap_err();
    assert!(refused.to_string().contains("a backup's spec cannot be changed"), "{refused}");

    let shown = lab.kubectl_ok(&["get", "pgb", "-n", namespace.name()]).unwrap();
    let header = ["NAME", "DATABASE", "CONSISTENCY", "PHASE", "SLOT", "SNAPSHOT", "AGE"];
    assert_eq!(shown.lines().next().unwrap().split_whitespace().collect::<Vec<_>>(), header, "{shown}");
    for part in ["db-20261122030000", "online", "Taken", "2026-11-22T03:00:00Z", "howdah-20261122T030000Z"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_by_hand_needs_a_name_and_nothing_it_does_not_know() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("records").unwrap();
    let create = |spec: &str| {
        let manifest = format!(
            r#"{{"apiVersion":"howdah.dev/v1alpha1","kind":"PostgresBackup","metadata":{{"generateName":"by-hand-","namespace":"{}"}},"spec":{spec}}}"#,
            namespace.name()
        );
        let output = lab
            .kubectl_with_input(&["create", "--validate=strict", "-o", "json", "-f", "-"], &manifest)
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    };
    let (made, text) = create(r#"{"statefulSet":"db"}"#);
    assert!(made && text.contains(r#""trigger": "Manual""#), "{text}");
    for (spec, wanted) in [
        ("{}", "spec.statefulSet: Required value"),
        (r#"{"statefulSet":""}"#, "name the StatefulSet to back up"),
        (r#"{"statefulSet":"db","consistency":"perfect"}"#, "spec.consistency: Unsupported value"),
        (r#"{"statefulSet":"db","slot":"tomorrow"}"#, "spec.slot"),
        (r#"{"statefulSet":"db","retention":"last=1"}"#, "unknown field \"spec.retention\""),
    ] {
        let (made, text) = create(spec);
        assert!(!made && text.contains(wanted), "{spec}: {text}");
    }
}

/// A status with every field set, so that the schema must know each of them.
fn full_restore_status() -> RestoreStatus {
    let image = |name: &str| ImageRecord {
        pool: "replicapool".to_owned(),
        rados_namespace: "tenant".to_owned(),
        name: name.to_owned(),
        id: "10393aa892a5".to_owned(),
    };
    let snapshot = SnapshotRecord { name: "howdah-20261122T030000Z".to_owned(), id: 4, size: 1 << 40 };
    RestoreStatus {
        phase: restore::Phase::Stuck,
        going_back: true,
        attempt: 2,
        started_at: Some(slot()),
        finished_at: Some(slot()),
        retry_at: Some(slot()),
        phase_retries: 1,
        phase_since: Some(slot()),
        steps: vec![RestoreStep {
            phase: restore::Phase::RollingBack,
            started_at: slot(),
            took_ms: Some(570),
            outcome: Some(StepOutcome::Failed),
            message: Some("words".to_owned()),
        }],
        source: Some(Source {
            name: "db-20261122030000".to_owned(),
            taken_at: Some(slot()),
            consistency: Some(Consistency::Online),
            image: image("csi-vol-1"),
            snapshot: Some(snapshot.clone()),
        }),
        method: Some(Method::Rollback),
        volume: Some(VolumeRecord {
            claim: "data-db-0".to_owned(),
            volume: "pvc-1".to_owned(),
            journal: Some(JournalRecord {
                pool: "replicapool".to_owned(),
                rados_namespace: "tenant".to_owned(),
                object: "csi.volume.1".to_owned(),
            }),
        }),
        image: Some(image("csi-vol-1")),
        size: Some(1 << 40),
        replicas: Some(1),
        replicas_after: Some(0),
        grace_seconds: 300,
        incoming: Some(image("csi-vol-1.howdah-new-1")),
        safety_image: Some(image("csi-vol-1.howdah-1")),
        safety_snapshot: Some(snapshot.clone()),
        parts: vec![RestoredPart {
            name: "wal".to_owned(),
            volume: VolumeRecord { claim: "wal-db-0".to_owned(), volume: "pvc-2".to_owned(), journal: None },
            image: image("csi-vol-2"),
            size: 1 << 30,
            source_image: image("csi-vol-2"),
            source_snapshot: Some(snapshot.clone()),
            incoming: Some(image("csi-vol-2.howdah-new-1")),
            safety_image: Some(image("csi-vol-2.howdah-1")),
            safety_snapshot: Some(snapshot),
        }],
        safety_until: Some(slot()),
        proofs: vec![Proof { what: "no pod".to_owned(), holds: true, seen: "none".to_owned() }],
        started: true,
        resumed: Some("retry/1".to_owned()),
        conditions: vec![Condition {
            kind: "Answers".to_owned(),
            status: "True".to_owned(),
            reason: "Sql".to_owned(),
            message: "words".to_owned(),
            last_transition_time: slot(),
        }],
        failure: Some(restore::Failure {
            step: restore::Phase::RollingBack,
            kind: FailureKind::Transient,
            reason: "words".to_owned(),
            cure: "do it".to_owned(),
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_keeps_its_journal_and_its_order() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("records").unwrap();
    let restores = Api::<PostgresRestore>::namespaced(lab.client().await.unwrap(), namespace.name());
    let spec = PostgresRestoreSpec {
        stateful_set: "db".to_owned(),
        stateful_set_uid: Some("0b9f".to_owned()),
        before: Some(slot()),
        method: Method::Rollback,
        ..PostgresRestoreSpec::default()
    };
    let wanted = PostgresRestore::new("db-restore", spec);
    let mut created = restores.create(&PostParams::default(), &wanted).await.unwrap();
    created.status = Some(full_restore_status());
    restores.replace_status("db-restore", &PostParams::default(), &created).await.unwrap();
    let read = restores.get("db-restore").await.unwrap();
    assert_eq!(read.spec, wanted.spec);
    assert_eq!(read.status, Some(full_restore_status()));

    let mut changed = read.clone();
    changed.spec.method = Method::Swap;
    let refused = restores.replace("db-restore", &PostParams::default(), &changed).await.unwrap_err();
    assert!(refused.to_string().contains("a restore's spec cannot be changed"), "{refused}");

    let shown = lab.kubectl_ok(&["get", "pgr", "-n", namespace.name()]).unwrap();
    for part in ["DATABASE", "SOURCE", "db-20261122030000", "rollback", "Stuck"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_by_hand_says_one_thing_to_restore() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    install_definitions(&lab);
    let namespace = lab.namespace("records").unwrap();
    let create = |spec: &str| {
        let manifest = format!(
            r#"{{"apiVersion":"howdah.dev/v1alpha1","kind":"PostgresRestore","metadata":{{"generateName":"by-hand-","namespace":"{}"}},"spec":{spec}}}"#,
            namespace.name()
        );
        let arguments = ["create", "--validate=strict", "-o", "json", "-f", "-"];
        let output = lab.kubectl_with_input(&arguments, &manifest).unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (made, text) = create(r#"{"statefulSet":"db","to":"newest"}"#);
    assert!(made && text.contains(r#""method": "swap""#), "{text}");
    let (made, text) = create(r#"{"statefulSet":"db","to":"newest","into":"db-copy"}"#);
    assert!(made, "{text}");
    let (made, text) = create(r#"{"statefulSet":"db","before":"2026-11-22T03:00:00+09:00"}"#);
    assert!(made, "{text}");
    for (spec, wanted) in [
        (r#"{"to":"newest"}"#, "spec.statefulSet: Required value"),
        (r#"{"statefulSet":"db"}"#, "say exactly one of to"),
        (r#"{"statefulSet":"db","to":"newest","undo":"r"}"#, "say exactly one of to"),
        (r#"{"statefulSet":"db","before":"2026-11-22 03:00"}"#, "spec.before"),
        (r#"{"statefulSet":"db","to":"newest","method":"magic"}"#, "spec.method: Unsupported value"),
        (r#"{"statefulSet":"db","to":"newest","into":"db"}"#, "name another StatefulSet in into"),
        (r#"{"statefulSet":"db","to":"newest","into":""}"#, "name the StatefulSet to restore into"),
        (
            r#"{"statefulSet":"db","to":"db-1","into":"new","method":"rollback"}"#,
            "use the method swap with into",
        ),
    ] {
        let (made, text) = create(spec);
        assert!(!made && text.contains(wanted), "{spec}: {text}");
    }
}

/// As while a definition is put in place: then no backup is there to be read, and none is absent.
#[tokio::test]
async fn an_object_of_a_kind_that_is_not_served_is_not_taken_for_absent() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let client = lab.client().await.unwrap();
    install_definitions(&lab);
    for (group, version) in [("howdah.dev", "v1alpha1"), ("howdah.dev", "v9"), ("nobody.howdah.dev", "v1")] {
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, "Nothing"));
        let api = Api::<DynamicObject>::namespaced_with(client.clone(), "default", &kind);
        let error = find("get a Nothing", &api, "one").await.unwrap_err();
        assert!(!error.is_not_found(), "{group}/{version}: {error:?}");
    }
    let backups = Api::<PostgresBackup>::namespaced(client.clone(), "default");
    assert!(find("get a backup", &backups, "no-such").await.unwrap().is_none());
    let elsewhere = Api::<PostgresBackup>::namespaced(client, "no-such-namespace");
    assert!(find("get a backup", &elsewhere, "no-such").await.unwrap().is_none());
}
