//! `restore --into`: makes the StatefulSet and the claims that a backup is restored into, by the rights of whoever runs it.
//! The scheduler needs none for that: it only fills what is there.

use anyhow::{Context as _, bail};
use howdah_adapters::kubernetes::{KubernetesError, call};
use howdah_adapters::records::{PostgresBackup, PostgresRestoreSpec};
use howdah_core::restore::{Candidate, choose, copy};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::{ApiResource, DynamicObject, ListParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;

/// What has to be there before the restore is ordered.
#[derive(Debug)]
pub struct Copy {
    /// The StatefulSet, at zero replicas.
    pub set: Value,
    /// The claim of its data, and one for each further volume that the backup holds.
    pub claims: Vec<Value>,
}

/// As raw objects, so that no field is lost that this version does not know.
fn sets(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<StatefulSet>(&()))
}

fn claims(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<PersistentVolumeClaim>(&()))
}

/// Copies the StatefulSet of `spec`, with a claim for each image of the backup that `spec` means today.
pub async fn plan(client: &Client, namespace: &str, spec: &PostgresRestoreSpec) -> anyhow::Result<Copy> {
    let (of, name) = (&spec.stateful_set, spec.target());
    let set = call(format!("get the StatefulSet {namespace}/{of}"), sets(client, namespace).get(of)).await?;
    let set = serde_json::to_value(set).context("read the StatefulSet")?;
    // What the manifest or the claim lacks is told before what the backups do.
    let (original, copied) = (copy::claim_name(&set, of)?, copy::claim_name(&set, name)?);
    let data = claim_of(client, namespace, &original).await?;
    let backup = backup(client, namespace, spec).await?;
    let snapshot = backup.snapshot.context("read the size of the backup: it records none")?;
    let mut claims = vec![copy::claim(&data, &copied, name, snapshot.size)];
    for part in backup.parts {
        let volume = &part.volume;
        let snapshot = part.snapshot.with_context(|| {
            format!("read the size of the volume {volume} in the backup: it records no snapshot of it")
        })?;
        let original = claim_of(client, namespace, &copy::part_claim_name(&set, of, volume)?).await?;
        let copied = copy::part_claim_name(&set, name, volume)?;
        claims.push(copy::claim(&original, &copied, name, snapshot.size));
    }
    Ok(Copy { set: copy::stateful_set(&set, name), claims })
}

/// A claim of the original.
async fn claim_of(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Value> {
    let attempt = format!("get the PersistentVolumeClaim {namespace}/{name}");
    let claim = call(attempt, claims(client, namespace).get(name)).await?;
    serde_json::to_value(claim).context("read the PersistentVolumeClaim")
}

async fn backup(client: &Client, namespace: &str, spec: &PostgresRestoreSpec) -> anyhow::Result<Candidate> {
    let backups = Api::<PostgresBackup>::namespaced(client.clone(), namespace);
    let all = call(format!("list the backups of {namespace}"), backups.list(&ListParams::default())).await?;
    let candidates: Vec<_> = all.items.iter().map(PostgresBackup::candidate).collect();
    let chosen = choose(&spec.goal(), &spec.stateful_set, &candidates, Timestamp::now());
    chosen.cloned().map_err(|problem| anyhow::anyhow!("{}; {}", problem.reason, problem.cure))
}

/// Creates all of it, the StatefulSet first, which a policy may refuse; answers with its uid.
pub async fn create(client: &Client, namespace: &str, copy: Copy) -> anyhow::Result<Option<String>> {
    let set = one(&sets(client, namespace), "statefulset", namespace, copy.set).await?;
    let name = set.name_any();
    let mut made = String::new();
    for claim in copy.claims {
        let claim = one(&claims(client, namespace), "persistentvolumeclaim", namespace, claim).await;
        let claim = claim.with_context(|| {
            format!(
                "the StatefulSet was created; before another try: kubectl delete statefulset/{name}{made} -n {namespace}"
            )
        })?;
        made.push_str(&format!(" pvc/{}", claim.name_any()));
    }
    Ok(set.uid())
}

async fn one(
    api: &Api<DynamicObject>,
    kind: &str,
    namespace: &str,
    object: Value,
) -> anyhow::Result<DynamicObject> {
    let object: DynamicObject = serde_json::from_value(object).context("read what was copied")?;
    let name = object.name_any();
    let attempt = format!("create the {kind} {namespace}/{name}");
    match call(attempt.as_str(), api.create(&PostParams::default(), &object)).await {
        Ok(created) => {
            println!("{kind} {namespace}/{name} created");
            Ok(created)
        }
        Err(KubernetesError::AlreadyExists { .. }) => bail!(
            "{attempt}: it exists already; give --into another name, or, if it is the one that you mean and never ran, create a \
             PostgresRestore with spec.into"
        ),
        Err(error) => Err(error.into()),
    }
}
