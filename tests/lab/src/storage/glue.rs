//! The hidden command `__rook-glue`: does for `CephClient` objects what the Rook operator does. It gives the
//! Ceph user exactly the capabilities that the object names, writes its key into a Secret, and deletes the
//! user when the object goes.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ObjectMeta, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::controller::Action;
use kube::runtime::finalizer::{self, Event, finalizer};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::Deserialize;
use serde_json::json;

use super::NAMESPACE;
use crate::lab::Lab;
use crate::process::{self, Network, output_of};

/// Its name among the lab's processes.
const PROCESS: &str = "rook-glue";
/// Rook's own finalizer, so that an object deleted while nobody watches still loses its user.
const FINALIZER: &str = "cephclient.ceph.rook.io";
/// Between two tries for an object whose user could not be made.
const RETRY: Duration = Duration::from_secs(5);
/// A lost watch is noticed by then at the latest.
const RESYNC: Duration = Duration::from_secs(600);

/// What of a `CephClient`'s spec counts (rook: pkg/apis/ceph.rook.io/v1, `ClientSpec`).
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Wanted {
    /// The user, if not named like the object.
    name: Option<String>,
    /// The Secret, if not `rook-ceph-client-NAME`.
    secret_name: Option<String>,
    /// Capabilities by service: mon, osd, mgr, mds.
    caps: BTreeMap<String, String>,
}

struct Glue {
    lab: Lab,
    clients: Api<DynamicObject>,
    secrets: Api<Secret>,
}

/// Starts it, unless it runs.
pub(super) fn ensure(lab: &Lab) -> Result<()> {
    process::ensure(lab, PROCESS, Network::Lab, || {
        let mut command = process::lab_binary()?;
        command.args(["--name", lab.name(), "__rook-glue"]);
        Ok(command)
    })
    .map(drop)
}

/// Watches until it is killed.
pub fn run(lab: &Lab) -> Result<()> {
    // Fails only where a provider is installed already, which is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(watch(lab))
}

async fn watch(lab: &Lab) -> Result<()> {
    let config = Kubeconfig::read_from(lab.inside_kubeconfig()).context("read the kubeconfig")?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default())
        .await
        .context("read the kubeconfig")?;
    let client = Client::try_from(config).context("make a client of the apiserver")?;
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("ceph.rook.io", "v1", "CephClient"));
    let glue = Arc::new(Glue {
        lab: lab.clone(),
        clients: Api::namespaced_with(client.clone(), NAMESPACE, &kind),
        secrets: Api::namespaced(client, NAMESPACE),
    });
    Controller::new_with(glue.clients.clone(), watcher::Config::default(), kind)
        .run(reconcile, |_, _, _| Action::requeue(RETRY), glue)
        .for_each(|result| async move {
            match result {
                Ok((object, _)) => eprintln!("CephClient {} is as it should be", object.name),
                Err(error) => eprintln!("reconcile: {error}"),
            }
        })
        .await;
    bail!("watch CephClients: the watch ended")
}

/// anyhow's error is no `std::error::Error`, which the controller asks for.
#[derive(Debug)]
struct Failed(anyhow::Error);

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Failed {}

async fn reconcile(
    object: Arc<DynamicObject>,
    glue: Arc<Glue>,
) -> std::result::Result<Action, finalizer::Error<Failed>> {
    let clients = glue.clients.clone();
    finalizer(&clients, FINALIZER, object, |event| async {
        match event {
            Event::Apply(object) => glue.apply(&object).await,
            Event::Cleanup(object) => glue.clean_up(&object).await,
        }
        .map_err(Failed)
    })
    .await
}

impl Glue {
    async fn apply(&self, object: &DynamicObject) -> Result<Action> {
        let wanted = wanted(object)?;
        let user = wanted.name.unwrap_or_else(|| object.name_any());
        let secret = wanted.secret_name.unwrap_or_else(|| format!("rook-ceph-client-{}", object.name_any()));
        let key = self.ensure_user(&format!("client.{user}"), &wanted.caps).await?;
        self.write_secret(object, &secret, &user, key).await?;
        let status = json!({ "status": { "phase": "Ready", "info": { "secretName": secret } } });
        self.clients
            .patch_status(&object.name_any(), &PatchParams::default(), &Patch::Merge(status))
            .await
            .context("write the status")?;
        Ok(Action::requeue(RESYNC))
    }

    /// The user's key, after its capabilities are what the object says.
    async fn ensure_user(&self, entity: &str, caps: &BTreeMap<String, String>) -> Result<String> {
        let caps: Vec<&str> =
            caps.iter().flat_map(|(service, cap)| [service.as_str(), cap.as_str()]).collect();
        let known = self.ceph(&["auth", "ls", "--format", "json"]).await?;
        let command = if has_entity(&known, entity)? { "caps" } else { "add" };
        self.ceph(&[&["auth", command, entity], &caps[..]].concat()).await?;
        self.ceph(&["auth", "get-key", entity]).await
    }

    async fn write_secret(&self, object: &DynamicObject, name: &str, user: &str, key: String) -> Result<()> {
        let owner = object.controller_owner_ref(&ApiResource::from_gvk(&GroupVersionKind::gvk(
            "ceph.rook.io",
            "v1",
            "CephClient",
        )));
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                owner_references: owner.map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/rook".to_owned()),
            string_data: Some(BTreeMap::from([(user.to_owned(), key)])),
            ..Secret::default()
        };
        self.secrets
            .patch(name, &PatchParams::apply("rook").force(), &Patch::Apply(secret))
            .await
            .context("write the Secret")
            .map(drop)
    }

    async fn clean_up(&self, object: &DynamicObject) -> Result<Action> {
        let user = wanted(object)?.name.unwrap_or_else(|| object.name_any());
        // Succeeds, too, when the user is gone already. The Secret goes with its owner.
        self.ceph(&["auth", "del", &format!("client.{user}")]).await?;
        Ok(Action::await_change())
    }

    async fn ceph(&self, arguments: &[&str]) -> Result<String> {
        let mut command: Command = self.lab.command("ceph");
        command.args(arguments);
        let said = tokio::task::spawn_blocking(move || output_of(&mut command)).await;
        Ok(said.map_err(|error| anyhow!("run ceph: {error}"))??.trim().to_owned())
    }
}

fn wanted(object: &DynamicObject) -> Result<Wanted> {
    serde_json::from_value(object.data["spec"].clone()).context("read the CephClient's spec")
}

/// Whether the output of `ceph auth ls` holds `entity`.
fn has_entity(listed: &str, entity: &str) -> Result<bool> {
    #[derive(Deserialize)]
    struct Listed {
        auth_dump: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        entity: String,
    }
    let listed: Listed = serde_json::from_str(listed).context("read the list of Ceph users")?;
    Ok(listed.auth_dump.iter().any(|entry| entry.entity == entity))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_user_counts_as_there() {
        let listed = r#"{"auth_dump":[{"entity":"client.a","key":"k","caps":{"mon":"allow r"}}]}"#;
        assert!(has_entity(listed, "client.a").unwrap());
        assert!(!has_entity(listed, "client.").unwrap());
        assert!(has_entity("not JSON", "client.a").is_err());
    }

    #[test]
    fn a_spec_without_caps_is_refused() {
        let spec = |json: serde_json::Value| serde_json::from_value::<Wanted>(json);
        assert!(spec(json!({})).is_err());
        let wanted = spec(json!({ "caps": { "mon": "allow r" }, "secretName": "s" })).unwrap();
        assert_eq!(wanted.secret_name.as_deref(), Some("s"));
        assert_eq!(wanted.caps["mon"], "allow r");
    }
}
