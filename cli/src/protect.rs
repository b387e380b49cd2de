//! `protect`: lets the scheduler read the Secrets of one namespace, and tells what that means.

use anyhow::Context as _;
use howdah_adapters::kubernetes::{Kubernetes, find};
use k8s_openapi::api::rbac::v1::{ClusterRole, RoleBinding, RoleRef, Subject};
use kube::api::ObjectMeta;
use kube::{Api, Client};

use crate::args::ProtectArgs;

/// The ClusterRole that deploy/ installs, bound to nobody; the binding bears its name.
const ROLE: &str = "howdah-credentials";
/// The service account of the scheduler.
const SCHEDULER: &str = "howdah-scheduler";

/// Makes the RoleBinding; a second time changes nothing.
pub async fn run(client: Client, arguments: ProtectArgs) -> anyhow::Result<String> {
    let ProtectArgs { target, howdah_namespace, .. } = &arguments;
    let roles = Api::<ClusterRole>::all(client.clone());
    if find(format!("get the ClusterRole {ROLE}"), &roles, ROLE).await?.is_none() {
        anyhow::bail!(
            "bind the ClusterRole {ROLE}: it does not exist; install howdah first (deploy/README.md)"
        );
    }
    let bindings = Api::<RoleBinding>::namespaced(client.clone(), target);
    let before = find(format!("get the RoleBinding {target}/{ROLE}"), &bindings, ROLE).await?;
    let wanted = binding(&arguments);
    let same = before
        .as_ref()
        .is_some_and(|found| found.role_ref == wanted.role_ref && found.subjects == wanted.subjects);
    if same {
        return Ok(format!("rolebinding {target}/{ROLE} is there already: nothing changed\n"));
    }
    let kubernetes = Kubernetes::new(client, "kubectl-howdah");
    kubernetes
        .apply(&bindings, ROLE, &wanted)
        .await
        .with_context(|| format!("let the scheduler read credentials in {target}"))?;
    let verb = if before.is_some() { "corrected" } else { "created" };
    Ok(format!(
        "rolebinding {target}/{ROLE} {verb}: {howdah_namespace}/{SCHEDULER} may now read a Secret or ConfigMap of {target} by its name\n\
         The next backup of each database there is an online one, if its credentials are right.\n\
         To take it back: kubectl delete rolebinding {ROLE} -n {target}\n"
    ))
}

/// The RoleBinding as YAML.
pub fn manifest(arguments: &ProtectArgs) -> anyhow::Result<String> {
    serde_yaml_ng::to_string(&binding(arguments)).context("write the RoleBinding as YAML")
}

fn binding(ProtectArgs { target, howdah_namespace, .. }: &ProtectArgs) -> RoleBinding {
    let labels = [("app.kubernetes.io/part-of".to_owned(), "howdah".to_owned())];
    RoleBinding {
        metadata: ObjectMeta {
            name: Some(ROLE.to_owned()),
            namespace: Some(target.clone()),
            labels: Some(labels.into()),
            ..ObjectMeta::default()
        },
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "ClusterRole".to_owned(),
            name: ROLE.to_owned(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".to_owned(),
            name: SCHEDULER.to_owned(),
            namespace: Some(howdah_namespace.clone()),
            ..Subject::default()
        }]),
    }
}
