//! What Rook leaves in a cluster, as Kubernetes objects: fixed ones from manifests/rook/, and Secrets and
//! ConfigMaps with this lab's keys and addresses.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::users::Keys;
use super::{NAMESPACE, monitor};
use crate::lab::Lab;

/// In an order in which one `kubectl apply` can create them.
const MANIFESTS: [&str; 4] = [
    include_str!("../../manifests/rook/csidriver.yaml"),
    include_str!("../../manifests/rook/storageclasses.yaml"),
    include_str!("../../manifests/rook/cephclient-crd.yaml"),
    include_str!("../../manifests/rook/toolbox.yaml"),
];

/// Creates or corrects all objects.
pub(super) fn apply(lab: &Lab, keys: &Keys) -> Result<()> {
    let mut documents: Vec<String> = with_keys(keys).iter().map(Value::to_string).collect();
    documents.extend(MANIFESTS.iter().map(|manifest| (*manifest).to_owned()));
    let mut kubectl = lab.kubectl_command();
    kubectl.args(["apply", "--server-side", "--force-conflicts", "--field-manager=rook", "-f", "-"]);
    let mut child = kubectl
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run kubectl")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(documents.join("\n---\n").as_bytes()).context("hand kubectl Rook's objects")?;
    }
    let output = child.wait_with_output().context("wait for kubectl")?;
    if !output.status.success() {
        bail!("create Rook's objects: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn with_keys(keys: &Keys) -> Vec<Value> {
    let clusters = json!([{ "clusterID": NAMESPACE, "monitors": [monitor()] }]).to_string();
    vec![
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } }),
        config_map(
            "rook-ceph-mon-endpoints",
            json!({
                "data": format!("a={}", monitor()),
                "mapping": r#"{"node":{}}"#,
                "maxMonId": "0",
                "outOfQuorum": "",
                "csi-cluster-config-json": clusters,
            }),
        ),
        secret(
            "rook-ceph-mon",
            json!({
                "ceph-username": "client.admin",
                "ceph-secret": keys.admin,
                "fsid": keys.fsid,
                "mon-secret": keys.monitor,
            }),
        ),
        csi_secret("rook-csi-rbd-node", &keys.node),
        csi_secret("rook-csi-rbd-provisioner", &keys.provisioner),
    ]
}

fn csi_secret(name: &str, (user, key): &(&str, String)) -> Value {
    secret(name, json!({ "userID": user, "userKey": key }))
}

fn secret(name: &str, data: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/rook",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "stringData": data,
    })
}

fn config_map(name: &str, data: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": name, "namespace": NAMESPACE },
        "data": data,
    })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_yaml_ng::Deserializer;

    use super::{MANIFESTS, Value};
    use crate::database::stays;

    #[test]
    fn the_toolbox_that_all_tests_use_stays_where_it_is_when_one_moves_pods() {
        let documents = MANIFESTS.iter().flat_map(|manifest| Deserializer::from_str(manifest));
        let documents: Vec<Value> = documents.map(|document| Value::deserialize(document).unwrap()).collect();
        let toolbox = documents.iter().find(|document| document["kind"] == "Deployment").unwrap();
        let tolerated = toolbox["spec"]["template"]["spec"]["tolerations"].as_array().unwrap();
        assert!(tolerated.contains(&stays()[0]), "{tolerated:?}");
    }
}
