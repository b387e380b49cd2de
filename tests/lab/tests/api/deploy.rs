//! Everything in deploy/ is rendered by kubectl and accepted by the real API server, field by field.

use anyhow::{Context, Result, ensure};
use howdah_lab::lab::Lab;
use howdah_lab::repository;
use howdah_lab::testing::shared_name;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;

const OVERLAYS: [&str; 4] = ["rook", "plain-ceph", "toolbox", "lab"];
const EXAMPLES: [&str; 3] = ["postgres", "refused", "unlabelled"];
/// What carries rights; the rest of an overlay is not applied at this level, where no webhook serves.
const KINDS_OF_RIGHTS: [&str; 6] =
    ["Namespace", "ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"];

#[test]
fn the_api_server_accepts_every_overlay() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.blocking_lock();
    prepare(&lab).unwrap();
    for overlay in OVERLAYS {
        let objects = render(&lab, overlay).unwrap();
        // Another object of the same name would silently replace the first.
        assert!(objects.len() >= 20, "{overlay} renders only {} objects", objects.len());
        dry_run(&lab, &objects).with_context(|| format!("try overlay {overlay}")).unwrap();
    }
}

#[test]
fn the_api_server_accepts_every_example() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let namespace = lab.namespace("examples").unwrap();
    for example in EXAMPLES {
        let file = repository::root().join(format!("deploy/examples/{example}.yaml"));
        let objects = documents(&std::fs::read_to_string(file).unwrap()).unwrap();
        for mut object in objects {
            object["metadata"]["namespace"] = json!(namespace.name());
            // Here no webhook of howdah's serves, and the label would have the set wait for one.
            if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
                labels.remove("howdah.dev/protect");
            }
            dry_run(&lab, &[object]).with_context(|| format!("try example {example}")).unwrap();
        }
    }
}

#[test]
fn the_lab_installs_what_a_user_installs() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let mut in_lab = render(&lab, "lab").unwrap();
    for object in &mut in_lab {
        if object["kind"] == "Deployment" {
            object["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] = json!("IfNotPresent");
        }
    }
    assert_eq!(
        in_lab,
        render(&lab, "rook").unwrap(),
        "the lab's overlay differs in more than its pull policy"
    );
}

#[test]
fn pods_of_howdah_are_as_restricted_as_their_namespace_demands() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.blocking_lock();
    apply_rights(&lab, "rook").unwrap();
    let objects = render(&lab, "rook").unwrap();
    let deployments: Vec<&Value> = objects.iter().filter(|object| object["kind"] == "Deployment").collect();
    assert_eq!(deployments.len(), 2);
    for deployment in deployments {
        let mut template = deployment["spec"]["template"].clone();
        template["apiVersion"] = json!("v1");
        template["kind"] = json!("Pod");
        template["metadata"]["name"] = json!("as-in-the-deployment");
        template["metadata"]["namespace"] = json!("howdah-system");
        // Pod Security Admission refuses it here, if at all: a Deployment it would only warn about.
        dry_run(&lab, &[template]).unwrap();
    }
}

/// Held by each test of this binary that changes objects outside a namespace of its own.
pub static TURN: Mutex<()> = Mutex::const_new(());

/// Applies what an overlay says about rights, and nothing that would serve or wait for a webhook.
pub fn apply_rights(lab: &Lab, overlay: &str) -> Result<()> {
    prepare(lab)?;
    let mut objects = render(lab, overlay)?;
    objects.retain(|object| KINDS_OF_RIGHTS.iter().any(|kind| object["kind"] == *kind));
    apply(lab, &objects, &["apply", "--server-side", "--force-conflicts"])
}

/// Compares the committed file with what the API server says, or writes it where that was asked for.
pub fn committed_equals(path: &str, wanted: &str) -> Result<()> {
    let file = repository::root().join(path);
    if std::env::var_os("HOWDAH_GENERATE").is_some() {
        return std::fs::write(&file, wanted).with_context(|| format!("write {path}"));
    }
    let found = std::fs::read_to_string(&file).with_context(|| format!("read {path}"))?;
    ensure!(
        found == wanted,
        "{path} is not what the API server says. If the change is meant, write it anew with \
         `HOWDAH_GENERATE=1 cargo test --workspace --test api` and read the difference. Wanted:\n{wanted}"
    );
    Ok(())
}

/// The namespaces and kinds that an overlay expects: Rook's, howdah's, and howdah's own custom resource.
fn prepare(lab: &Lab) -> Result<()> {
    let namespaces = ["howdah-system", "rook-ceph"].map(|name| {
        let labels = if name == "howdah-system" {
            json!({"pod-security.kubernetes.io/enforce": "restricted"})
        } else {
            json!({})
        };
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    });
    apply(lab, &namespaces, &["apply", "--server-side", "--force-conflicts"])?;
    let crds = [cephclient_crd()];
    apply(lab, &crds, &["apply", "--server-side", "--force-conflicts"])?;
    lab.kubectl_ok(&[
        "wait",
        "--for=condition=Established",
        "--timeout=30s",
        "crd/cephclients.ceph.rook.io",
    ])?;
    Ok(())
}

/// Rook's kind, as far as it matters for being accepted.
fn cephclient_crd() -> Value {
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "cephclients.ceph.rook.io"},
        "spec": {
            "group": "ceph.rook.io", "scope": "Namespaced",
            "names": {"kind": "CephClient", "listKind": "CephClientList", "plural": "cephclients", "singular": "cephclient"},
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema}
            }]
        }
    })
}

fn render(lab: &Lab, overlay: &str) -> Result<Vec<Value>> {
    let folder = repository::root().join("deploy/overlays").join(overlay);
    let folder = folder.to_str().context("write the overlay's path as text")?;
    documents(&lab.kubectl_ok(&["kustomize", folder])?)
}

fn documents(yaml: &str) -> Result<Vec<Value>> {
    serde_yaml_ng::Deserializer::from_str(yaml)
        .map(|document| Value::deserialize(document).context("read a manifest"))
        .collect()
}

/// Has the API server judge objects without keeping them; unknown fields are errors.
fn dry_run(lab: &Lab, objects: &[Value]) -> Result<()> {
    apply(
        lab,
        objects,
        &["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict"],
    )
}

fn apply(lab: &Lab, objects: &[Value], how: &[&str]) -> Result<()> {
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    let output = lab.kubectl_with_input(&[how, &["-f", "-"]].concat(), &text.join("\n---\n"))?;
    ensure!(output.status.success(), "{}: {}", how.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
