//! The reviews: the creation of one StatefulSet of 8 KiB, as it comes from a user and as it is after howdah's defaults.

use howdah_lab::reviews;
use serde_json::{Value, json};

/// Length of the body of each review.
pub const BODY_BYTES: usize = 8 * 1024;

/// The two requests that a creation causes: one to mutate, one to validate.
#[must_use]
pub fn requests() -> [Vec<u8>; 2] {
    let user = stateful_set();
    let mut filled = user.clone();
    let labels = json!({"app": "orders", "howdah.dev/protect": "true"});
    filled["spec"]["template"]["metadata"]["labels"] = labels.clone();
    filled["spec"]["volumeClaimTemplates"][0]["metadata"]["labels"] = labels;
    filled["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = json!(300);
    filled["spec"]["template"]["spec"]["affinity"] = json!({"podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": {
            "labelSelector": {"matchLabels": {"howdah.dev/protect": "true"}},
            "namespaceSelector": {}, "topologyKey": "kubernetes.io/hostname",
        }}],
    }});
    filled["spec"]["persistentVolumeClaimRetentionPolicy"] =
        json!({"whenScaled": "Retain", "whenDeleted": "Retain"});
    [("/mutate", user), ("/validate", filled)].map(|(path, object)| reviews::request(path, &body(object)))
}

/// A review of exactly [`BODY_BYTES`]: a comment fills it up.
fn body(mut object: Value) -> Vec<u8> {
    let review = |object: &Value| {
        json!({
            "kind": "AdmissionReview",
            "apiVersion": "admission.k8s.io/v1",
            "request": {
                "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
                "kind": {"group": "apps", "version": "v1", "kind": "StatefulSet"},
                "resource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
                "requestKind": {"group": "apps", "version": "v1", "kind": "StatefulSet"},
                "requestResource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
                "name": "orders",
                "namespace": "shop",
                "operation": "CREATE",
                "userInfo": {
                    "username": "system:serviceaccount:argocd:argocd-application-controller",
                    "uid": "f0e9c6a1-3d1d-4f6d-8d33-8f2e3f1d7a55",
                    "groups": ["system:serviceaccounts", "system:serviceaccounts:argocd", "system:authenticated"],
                },
                "object": object,
                "oldObject": null,
                "dryRun": false,
                "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1", "fieldManager": "argocd"},
            },
        })
        .to_string()
    };
    let missing = BODY_BYTES.saturating_sub(review(&object).len());
    let comment = object["metadata"]["annotations"]["comment"].as_str().unwrap_or_default().to_owned();
    object["metadata"]["annotations"]["comment"] = json!(format!("{comment}{}", "x".repeat(missing)));
    review(&object).into_bytes()
}

/// A PostgreSQL StatefulSet as people write them, with the managed fields that the API server adds.
fn stateful_set() -> Value {
    let probe = |seconds: u32| {
        json!({"exec": {"command": ["sh", "-c", "exec pg_isready -U postgres -h 127.0.0.1 -p 5432"]},
               "periodSeconds": seconds, "timeoutSeconds": 5, "failureThreshold": 6, "successThreshold": 1})
    };
    let env = |name: &str, key: &str| json!({"name": name, "valueFrom": {"secretKeyRef": {"name": "orders", "key": key}}});
    let container = json!({
        "name": "postgres",
        "image": "docker.io/library/postgres:17.2-bookworm",
        "imagePullPolicy": "IfNotPresent",
        "args": ["-c", "shared_buffers=2GB", "-c", "max_connections=200", "-c", "wal_compression=on"],
        "env": [env("POSTGRES_USER", "username"), env("POSTGRES_PASSWORD", "password"),
                {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}],
        "ports": [{"name": "postgres", "containerPort": 5432, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}},
        "livenessProbe": probe(10), "readinessProbe": probe(5), "startupProbe": probe(2),
        "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"},
                         {"name": "shm", "mountPath": "/dev/shm"}],
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let exporter = json!({
        "name": "exporter", "image": "quay.io/prometheuscommunity/postgres-exporter:v0.16.0",
        "imagePullPolicy": "IfNotPresent",
        "env": [env("DATA_SOURCE_USER", "username"), env("DATA_SOURCE_PASS", "password"),
                {"name": "DATA_SOURCE_URI", "value": "127.0.0.1:5432/postgres?sslmode=disable"}],
        "ports": [{"name": "metrics", "containerPort": 9187, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
    });
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {
            "name": "orders", "namespace": "shop",
            "uid": "0b7c5a34-7a53-4d0e-a1f4-5f1f7c1c9b0e", "creationTimestamp": "2026-11-25T08:00:00Z", "generation": 1,
            "labels": {"app": "orders", "app.kubernetes.io/part-of": "shop", "howdah.dev/protect": "true"},
            "annotations": {
                "howdah.dev/schedule": "0 3 * * *", "howdah.dev/time-zone": "Europe/Berlin",
                "howdah.dev/retention": "last=3 daily=7 weekly=4", "comment": "",
            },
            "managedFields": [{
                "manager": "argocd", "operation": "Apply", "apiVersion": "apps/v1", "time": "2026-11-25T08:00:00Z",
                "fieldsType": "FieldsV1", "fieldsV1": managed(&container, &exporter),
            }],
        },
        "spec": {
            "replicas": 1, "serviceName": "orders", "podManagementPolicy": "OrderedReady", "revisionHistoryLimit": 10,
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}},
            "selector": {"matchLabels": {"app": "orders"}},
            "template": {
                "metadata": {"labels": {"app": "orders"}},
                "spec": {
                    "containers": [container, exporter],
                    "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
                    "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
                    "terminationGracePeriodSeconds": 30,
                    "securityContext": {"runAsUser": 999, "runAsGroup": 999, "fsGroup": 999},
                },
            },
            "volumeClaimTemplates": [{
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": "data"},
                "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "bench-rbd", "volumeMode": "Filesystem",
                         "resources": {"requests": {"storage": "100Gi"}}},
                "status": {"phase": "Pending"},
            }],
        },
        "status": {"replicas": 0, "availableReplicas": 0},
    })
}

/// The ownership of the fields of two containers, in the API server's notation.
fn managed(container: &Value, exporter: &Value) -> Value {
    let fields = |object: &Value| -> Value {
        let names = object.as_object().into_iter().flatten();
        names.map(|(name, _)| (format!("f:{name}"), json!({}))).collect::<serde_json::Map<_, _>>().into()
    };
    json!({"f:spec": {"f:replicas": {}, "f:serviceName": {}, "f:selector": {}, "f:template": {"f:spec": {"f:containers": {
        "k:{\"name\":\"postgres\"}": fields(container), "k:{\"name\":\"exporter\"}": fields(exporter),
    }}}, "f:volumeClaimTemplates": {}}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bodies_have_the_length_that_the_report_says() {
        for request in requests() {
            let text = String::from_utf8(request).unwrap();
            assert!(text.contains("content-length: 8192\r\n"), "{}", &text[..120]);
        }
    }
}
