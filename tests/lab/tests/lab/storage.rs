//! A volume of the lab is to Kubernetes and to Ceph what a volume of ceph-csi v3.12.2 under Rook was when we
//! measured it: howdah reads these places, so a difference here would let it pass in the lab and fail outside.

use std::io::Write;
use std::time::Duration;

use howdah_lab::ceph::POOL;
use howdah_lab::lab::Lab;
use howdah_lab::repository;
use howdah_lab::storage::claim::{Claim, rados, wait_slowly};
use howdah_lab::storage::{DRIVER, NAMESPACE};
use howdah_lab::testing::shared_name;
use serde_json::{Value, json};

const CLASS: &str = "rook-ceph-block";
/// For what the manager and Rook's operator do in the background: seconds, on a busy machine some more.
const BACKGROUND_LIMIT: Duration = Duration::from_secs(90);

fn lab() -> Lab {
    Lab::open_or_up(&shared_name(), 0).unwrap()
}

fn image_id(lab: &Lab, image: &str) -> String {
    let info: Value = serde_json::from_str(&lab.rbd(&["info", "--format", "json", image]).unwrap()).unwrap();
    info["id"].as_str().unwrap().to_owned()
}

fn in_trash(lab: &Lab, id: &str) -> bool {
    let trash = lab.rbd(&["trash", "ls", "--format", "json", POOL]).unwrap();
    let trash: Value = serde_json::from_str(&trash).unwrap();
    trash.as_array().unwrap().iter().any(|image| image["id"] == id)
}

#[test]
fn a_volume_looks_to_kubernetes_and_to_ceph_as_ceph_csi_makes_it() {
    let lab = lab();
    let namespace = lab.namespace("volume").unwrap();
    let claim = Claim::create(&lab, namespace.name(), "data", CLASS, "1Gi").unwrap();
    let volume = claim.volume();
    let (spec, csi) = (&volume["spec"], &volume["spec"]["csi"]);
    assert_eq!(csi["driver"], DRIVER);
    assert_eq!(csi["fsType"], "ext4");
    assert_eq!(csi["nodeStageSecretRef"], json!({ "name": "rook-csi-rbd-node", "namespace": NAMESPACE }));
    assert_eq!(
        csi["controllerExpandSecretRef"],
        json!({ "name": "rook-csi-rbd-provisioner", "namespace": NAMESPACE })
    );
    assert_eq!(
        (&spec["persistentVolumeReclaimPolicy"], &spec["volumeMode"]),
        (&json!("Delete"), &json!("Filesystem"))
    );

    let uuid = claim.uuid().unwrap();
    let pools: Value =
        serde_json::from_str(&lab.ceph(&["osd", "lspools", "--format", "json"]).unwrap()).unwrap();
    let pool = pools.as_array().unwrap().iter().find(|pool| pool["poolname"] == POOL).unwrap();
    let pool = pool["poolnum"].as_u64().unwrap();
    assert_eq!(csi["volumeHandle"], format!("0001-0009-rook-ceph-{pool:016x}-{uuid}"));

    let mut attributes = csi["volumeAttributes"].clone();
    let identity = attributes.as_object_mut().unwrap().remove("storage.kubernetes.io/csiProvisionerIdentity");
    assert!(identity.unwrap().as_str().unwrap().ends_with(DRIVER));
    let image = format!("csi-vol-{uuid}");
    assert_eq!(
        attributes,
        json!({
            "clusterID": "rook-ceph",
            "imageFeatures": "layering,exclusive-lock,object-map,fast-diff,deep-flatten",
            "imageFormat": "2",
            "imageName": image,
            "journalPool": POOL,
            "mapOptions": "krbd:noshare",
            "pool": POOL,
        })
    );

    let name = volume["metadata"]["name"].as_str().unwrap();
    let by_name = ["getomapval", "csi.volumes.default", &format!("csi.volume.{name}"), "/dev/stdout"];
    assert_eq!(rados(&lab, &by_name).unwrap(), uuid);
    assert_eq!(claim.journal("csi.imagename").unwrap(), image);
    assert_eq!(claim.journal("csi.volname").unwrap(), name);
    assert_eq!(claim.journal("csi.volume.owner").unwrap(), namespace.name());
    assert_eq!(claim.journal("csi.imageid").unwrap(), image_id(&lab, &claim.image().unwrap()));

    let metadata = lab.rbd(&["image-meta", "ls", "--format", "json", &claim.image().unwrap()]).unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&metadata).unwrap(),
        json!({
            "csi.storage.k8s.io/pv/name": name,
            "csi.storage.k8s.io/pvc/name": "data",
            "csi.storage.k8s.io/pvc/namespace": namespace.name(),
        })
    );
    claim.delete().unwrap();
}

#[test]
fn deleting_a_volume_removes_the_image_whose_id_the_journal_holds() {
    let lab = lab();
    let namespace = lab.namespace("swapped").unwrap();
    for journal_follows in [false, true] {
        let claim = Claim::create(&lab, namespace.name(), "data", CLASS, "1Gi").unwrap();
        let image = claim.image().unwrap();
        let aside = format!("{image}-aside");
        let old = image_id(&lab, &image);
        lab.rbd(&["mv", &image, &aside]).unwrap();
        lab.rbd(&["trash", "mv", &aside]).unwrap();
        lab.rbd(&["create", "--size", "1G", &image]).unwrap();
        let new = image_id(&lab, &image);
        if journal_follows {
            let object = format!("csi.volume.{}", claim.uuid().unwrap());
            rados(&lab, &["setomapval", &object, "csi.imageid", &new]).unwrap();
        }
        claim.delete_volume().unwrap();
        let (removed, left) = if journal_follows { (&new, &old) } else { (&old, &new) };
        let gone = wait_slowly(BACKGROUND_LIMIT, || !in_trash(&lab, removed));
        assert!(gone, "journal follows: {journal_follows}");
        assert!(in_trash(&lab, left), "journal follows: {journal_follows}");
        lab.rbd(&["trash", "rm", "--no-progress", &format!("{POOL}/{left}")]).unwrap();
    }
}

#[test]
fn a_deleted_volume_with_a_snapshot_waits_in_the_trash() {
    let lab = lab();
    let namespace = lab.namespace("snapshot-left").unwrap();
    let claim = Claim::create(&lab, namespace.name(), "data", CLASS, "1Gi").unwrap();
    let image = claim.image().unwrap();
    let id = image_id(&lab, &image);
    lab.rbd(&["snap", "create", "--no-progress", &format!("{image}@kept")]).unwrap();
    claim.delete_volume().unwrap();
    assert!(in_trash(&lab, &id));
    let refused =
        lab.rbd(&["trash", "rm", "--no-progress", &format!("{POOL}/{id}")]).unwrap_err().to_string();
    assert!(refused.contains("has snapshots"), "{refused}");
    lab.rbd(&["snap", "rm", "--no-progress", "--pool", POOL, "--image-id", &id, "--snap", "kept"]).unwrap();
    // The manager's own next try may come first.
    let _ = lab.rbd(&["trash", "rm", "--no-progress", &format!("{POOL}/{id}")]);
    assert!(wait_slowly(BACKGROUND_LIMIT, || !in_trash(&lab, &id)));
}

#[test]
fn a_cephclient_is_a_user_with_exactly_its_capabilities() {
    let lab = lab();
    // howdah's own manifest under another name, so that the installed one is left alone.
    let manifest = repository::root().join("deploy/overlays/rook/cephclient.yaml");
    let manifest = std::fs::read_to_string(manifest).unwrap();
    let mut object: Value = serde_yaml_ng::from_str(&manifest).unwrap();
    let name = format!("lab-test-{}", std::process::id());
    object["metadata"]["name"] = json!(name);
    let entity = format!("client.{name}");
    let apply = |object: &Value| {
        let applied = lab.kubectl_apply(&object.to_string()).unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    };
    let caps = || -> Value {
        let said = lab.ceph(&["auth", "get", &entity, "--format", "json"]).unwrap_or_default();
        let users: Value = serde_json::from_str(&said).unwrap_or_default();
        users[0]["caps"].clone()
    };
    apply(&object);
    let ready = ["wait", "-n", NAMESPACE, "--for=jsonpath={.status.phase}=Ready", "--timeout=90s"];
    lab.kubectl_ok(&[&ready[..], &[&format!("cephclient/{name}")]].concat()).unwrap();
    assert_eq!(caps(), object["spec"]["caps"]);

    let wanted =
        ["get", "-n", NAMESPACE, &format!("cephclient/{name}"), "-o", "jsonpath={.status.info.secretName}"];
    let secret = lab.kubectl_ok(&wanted).unwrap();
    assert_eq!(secret, format!("rook-ceph-client-{name}"));
    let template = format!("go-template={{{{index .data \"{name}\" | base64decode}}}}");
    let key = lab.kubectl_ok(&["get", "-n", NAMESPACE, "secret", &secret, "-o", &template]).unwrap();
    assert_eq!(key, lab.ceph(&["auth", "get-key", &entity]).unwrap().trim());
    may_snapshot_but_not_blocklist(&lab, &name, &key);

    object["spec"]["caps"] = json!({ "mon": "allow r" });
    apply(&object);
    assert!(wait_slowly(BACKGROUND_LIMIT, || caps() == json!({ "mon": "allow r" })), "{}", caps());
    lab.kubectl_ok(&["delete", "-n", NAMESPACE, "cephclient", &name, "--timeout=90s"]).unwrap();
    assert!(caps().is_null(), "the user outlived its object");
    let secret = ["wait", "-n", NAMESPACE, "--for=delete", &format!("secret/{secret}"), "--timeout=90s"];
    lab.kubectl_ok(&secret).unwrap();
}

/// The one property of the backup identity that everything rests on.
fn may_snapshot_but_not_blocklist(lab: &Lab, user: &str, key: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(key.as_bytes()).unwrap();
    let as_user = |program: &str, arguments: &[&str]| {
        let mut command = lab.command(program);
        command.args(["--id", user, "--keyfile"]).arg(file.path()).args(arguments);
        lab.output_inside(&mut command)
    };
    let image = format!("{POOL}/{user}");
    lab.rbd(&["create", "--size", "16M", &image]).unwrap();
    as_user("rbd", &["snap", "create", "--no-progress", &format!("{image}@s")]).unwrap();
    as_user("rbd", &["snap", "rm", "--no-progress", &format!("{image}@s")]).unwrap();
    lab.rbd(&["rm", "--no-progress", &image]).unwrap();
    let refused = as_user("ceph", &["osd", "blocklist", "add", "10.77.0.250:0/1"]).unwrap_err().to_string();
    assert!(refused.contains("EACCES"), "{refused}");
}
