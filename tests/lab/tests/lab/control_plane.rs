//! The control plane answers, from outside and from inside, and a second `up` changes nothing.

use howdah_adapters::kubernetes::find;
use howdah_lab::control_plane::API_FORWARD;
use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;
use howdah_lab::{forward, netns, pki, process};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Api;
use kube::api::PostParams;

#[tokio::test]
async fn a_client_outside_the_namespace_reads_and_writes() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let client = lab.client().await.unwrap();
    let version = client.apiserver_version().await.unwrap();
    assert_eq!((version.major.as_str(), version.minor.as_str()), ("1", "36"));

    let namespace = lab.namespace("control-plane").unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace.name());
    let map = ConfigMap {
        metadata: kube::api::ObjectMeta { name: Some("a".to_owned()), ..Default::default() },
        ..Default::default()
    };
    maps.create(&PostParams::default(), &map).await.unwrap();
    let seen = lab.kubectl_ok(&["get", "configmap", "a", "-n", namespace.name(), "-o", "name"]).unwrap();
    assert_eq!(seen.trim(), "configmap/a");

    let name = namespace.name().to_owned();
    drop(namespace);
    let left = find("get a namespace", &Api::<Namespace>::all(client), &name).await.unwrap();
    assert!(
        left.is_none_or(|left| left.metadata.deletion_timestamp.is_some()),
        "{name} is not being deleted"
    );
}

#[test]
fn a_second_up_keeps_every_process() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let before = process::records(&lab).unwrap();
    let status =
        process::lab_binary().unwrap().args(["--name", lab.name(), "up", "--without-ceph"]).status().unwrap();
    assert!(status.success());
    let after = process::records(&lab).unwrap();
    for (name, identity) in before {
        assert!(after.contains(&(name.clone(), identity)), "{name} was started again");
    }
}

#[test]
fn a_node_may_speak_for_itself_and_for_no_other_node() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let credentials = pki::node_credentials(&lab, "node-test", netns::node_address(1)).unwrap();
    let server = format!("https://{}", forward::address(&lab, API_FORWARD).unwrap());
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kubeconfig.path(), pki::kubeconfig(&lab, &server, &credentials).unwrap()).unwrap();
    let kubeconfig = kubeconfig.path().to_string_lossy();

    let who = lab.kubectl_ok(&["--kubeconfig", &kubeconfig, "auth", "whoami", "-o", "json"]).unwrap();
    assert!(who.contains(r#""username": "system:node:node-test""#) && who.contains("system:nodes"), "{who}");
    let other = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"node-other"}}"#;
    let refused = lab.kubectl_with_input(&["--kubeconfig", &kubeconfig, "create", "-f", "-"], other).unwrap();
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(message.contains(r#"node "node-test" is not allowed to modify node "node-other""#), "{message}");
}
