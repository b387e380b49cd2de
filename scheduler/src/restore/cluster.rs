//! What a restore does in Kubernetes: the gate, the scale, the proofs, and the question whether the database answers.

use howdah_adapters::kubernetes::{KubernetesError, call, find, is_ready};
use howdah_adapters::postgres::{PostgresError, Session, Target};
use howdah_adapters::records::PostgresRestore;
use howdah_core::backup::{FailureKind, ImageRecord, Problem};
use howdah_core::restore::{Answer, Event, Goal, Proof, RestoreStatus};
use howdah_core::{annotations, names};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::preflight::{no_backup_runs, pod_name};
use super::{Restore, pieces, transient};
use crate::effects::of_ceph;
use crate::effects::preflight::{
    DATABASE, backups, claim_of_template, credentials, database_container, of_kubernetes, port, strange,
};

impl Restore<'_> {
    fn sets(&self) -> Api<StatefulSet> {
        Api::namespaced(self.cx.kubernetes.client().clone(), &self.namespace())
    }

    /// Annotates the StatefulSet. Before that the record gets a finalizer, so that deleting it puts everything back.
    pub(super) async fn close_gate(&mut self) -> Result<Event, Problem> {
        self.keep_record(true).await?;
        let database = self.database().await?;
        self.gate_fits(&database)?;
        self.annotate(&database, Some(&self.order.gate())).await?;
        Ok(Event::GateClosed)
    }

    /// Takes the annotation away, and the finalizer after it.
    pub(super) async fn open_gate(&mut self) -> Result<Event, Problem> {
        let name = self.record.spec.target();
        let attempt = format!("get the StatefulSet {}/{name}", self.namespace());
        let found = find(attempt, &self.sets(), name).await.map_err(|error| of_kubernetes(&error))?;
        if let Some(database) =
            found.filter(|set| set.annotations().get(names::GATE) == Some(&self.order.gate()))
        {
            self.annotate(&database, None).await?;
        }
        self.keep_record(false).await?;
        Ok(Event::GateOpened)
    }

    async fn annotate(&self, database: &StatefulSet, gate: Option<&str>) -> Result<(), Problem> {
        if database.annotations().get(names::GATE).map(String::as_str) == gate {
            return Ok(());
        }
        let name = database.name_any();
        // With the version that was judged, so that two operations cannot both close it.
        let version = database.resource_version();
        let patch = json!({"metadata": {"resourceVersion": version, "annotations": {names::GATE: gate}}});
        let verb = if gate.is_some() { "close" } else { "open" };
        let attempt = format!("{verb} the gate of the StatefulSet {}/{name}", self.namespace());
        let patched =
            call(attempt, self.sets().patch(&name, &PatchParams::default(), &Patch::Merge(&patch))).await;
        patched.map(drop).map_err(|error| of_kubernetes(&error))
    }

    /// Puts the finalizer on the record, or takes it off.
    async fn keep_record(&self, keep: bool) -> Result<(), Problem> {
        let (api, name) = (self.records(), self.order.name.as_str());
        let found = find(format!("get the restore {name}"), &api, name).await;
        let Some(record) = found.map_err(|error| of_kubernetes(&error))? else { return Ok(()) };
        let record: PostgresRestore = record;
        let mut finalizers = record.finalizers().to_vec();
        let has = finalizers.iter().any(|finalizer| finalizer == names::RESTORE_FINALIZER);
        // The API server takes no new finalizer on an object that is being deleted.
        if has == keep || (keep && record.metadata.deletion_timestamp.is_some()) {
            return Ok(());
        }
        if keep {
            finalizers.push(names::RESTORE_FINALIZER.to_owned());
        } else {
            finalizers.retain(|finalizer| finalizer != names::RESTORE_FINALIZER);
        }
        let version = record.resource_version();
        let patch = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
        let attempt = format!("write the finalizers of the restore {name}");
        let patched = call(attempt, api.patch(name, &PatchParams::default(), &Patch::Merge(&patch))).await;
        patched.map(drop).map_err(|error| of_kubernetes(&error))
    }

    /// Scales the database to zero, when no backup is under way.
    pub(super) async fn stop(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        // One may have been reserved between the preflight and the gate; none begins while it is closed.
        no_backup_runs(&backups(self.cx, &self.namespace()).await?, self.record.spec.target())?;
        self.scale(0, status).await?;
        Ok(Event::Stopped)
    }

    pub(super) async fn start(&mut self, replicas: i32, status: &RestoreStatus) -> Result<Event, Problem> {
        self.scale(replicas, status).await?;
        Ok(Event::Started)
    }

    async fn scale(&self, replicas: i32, status: &RestoreStatus) -> Result<(), Problem> {
        let name = self.record.spec.target();
        let patch = json!({"spec": {"replicas": replicas}});
        let attempt = format!("scale the StatefulSet {}/{name} to {replicas}", self.namespace());
        let sets = self.sets();
        match call(attempt, sets.patch_scale(name, &PatchParams::default(), &Patch::Merge(&patch))).await {
            Ok(_) => Ok(()),
            // Somebody deleted it: there is nothing to be scaled any more, and the volume is still put back.
            Err(KubernetesError::NotFound { .. }) if status.going_back => Ok(()),
            Err(error) => Err(of_kubernetes(&error)),
        }
    }

    /// Looks whether anybody can still write to one of the volumes.
    pub(super) async fn prove(&mut self, status: &RestoreStatus) -> Result<Event, Problem> {
        let pieces = pieces(status)?;
        let claims: Vec<&str> = pieces.iter().map(|piece| piece.volume.claim.as_str()).collect();
        let volumes: Vec<&str> = pieces.iter().map(|piece| piece.volume.volume.as_str()).collect();
        let mut proofs = vec![self.no_pod(&claims).await?, self.no_attachment(&volumes).await?];
        let ceph = self.ceph().await?;
        // On the way back each volume may go by either image.
        let mut images = Vec::new();
        for piece in &pieces {
            for record in std::iter::once(piece.image).chain(piece.incoming) {
                let in_place = record.id == piece.image.id;
                match ceph.image_by_id(record).await {
                    Ok(found) => images.push((record, in_place, found)),
                    // An image that is gone with its volume, or was put back, has no writer.
                    Err(error) if error.is_not_found() && (status.going_back || !in_place) => {}
                    Err(error) => return Err(of_ceph(error)),
                }
            }
        }
        let mut watchers = Vec::new();
        let mut locks = Vec::new();
        for (record, in_place, found) in images {
            let spec = ImageRecord { name: found.name, ..record.clone() }.spec();
            let open = ceph.watchers(&spec).await.map_err(of_ceph)?;
            watchers.extend(open.into_iter().map(|watcher| format!("{spec} is open on {}", watcher.address)));
            if self.needs_lock(status, in_place) {
                let owners = ceph.lock_owners(&spec).await.map_err(of_ceph)?;
                locks.extend(
                    owners.into_iter().map(|owner| format!("{spec} is locked by {owner}, which is gone")),
                );
            }
        }
        proofs.push(proof("no client has the image open", watchers, "no watcher"));
        proofs.push(proof("no client that is gone has left its lock", locks, "no lock"));
        let proven = proofs.iter().all(|proof| proof.holds);
        Ok(if proven { Event::Proven(proofs) } else { Event::Unproven(proofs) })
    }

    /// Whether a lock that a client has left on an image stands in the way; `in_place` says whether it was the volume's
    /// before the restore. Renaming an image takes its lock, as rolling it back does, and such a client may only be cut off:
    /// it has to be fenced before its lock may be broken, which takes a right that we do not have. Once we have written
    /// ourselves, a lock that is left is our own.
    fn needs_lock(&self, status: &RestoreStatus, in_place: bool) -> bool {
        let undo = matches!(self.order.goal, Goal::Undo(_));
        !status.going_back && status.safety_snapshot.is_none() && (in_place || undo)
    }

    async fn no_pod(&self, claims: &[&str]) -> Result<Proof, Problem> {
        let namespace = self.namespace();
        let pods = Api::<Pod>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let attempt = format!("list the pods of {namespace}");
        let all =
            call(attempt, pods.list(&ListParams::default())).await.map_err(|error| of_kubernetes(&error))?;
        let found = all.items.iter().filter(|pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            !matches!(phase, Some("Succeeded" | "Failed"))
        });
        let found = found.flat_map(|pod| {
            let going = if pod.metadata.deletion_timestamp.is_some() { "is still going" } else { "runs" };
            let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
            let used = volumes.filter_map(|volume| volume.persistent_volume_claim.as_ref());
            used.filter(|used| claims.contains(&used.claim_name.as_str())).map(move |used| {
                format!("the pod {} uses the claim {} and {going}", pod.name_any(), used.claim_name)
            })
        });
        Ok(proof("no pod uses the claim", found.collect(), "no pod"))
    }

    async fn no_attachment(&self, volumes: &[&str]) -> Result<Proof, Problem> {
        let api = Api::<VolumeAttachment>::all(self.cx.kubernetes.client().clone());
        let all = call("list the VolumeAttachments", api.list(&ListParams::default())).await;
        let all = all.map_err(|error| of_kubernetes(&error))?;
        let attached = all.items.iter().filter_map(|attachment| {
            let volume = attachment.spec.source.persistent_volume_name.as_deref()?;
            Some((volume, &attachment.spec.node_name))
        });
        let found = attached.filter(|(volume, _)| volumes.contains(volume));
        let found = found.map(|(volume, node)| format!("the volume {volume} is attached to the node {node}"));
        Ok(proof("the volume is attached to no node", found.collect(), "no attachment"))
    }

    /// Looks whether the restored database answers.
    pub(super) async fn ask(&mut self) -> Result<Event, Problem> {
        let database = self.database().await?;
        let (namespace, name) = (self.namespace(), pod_name(&database));
        let pods = Api::<Pod>::namespaced(self.cx.kubernetes.client().clone(), &namespace);
        let pod = find(format!("get the pod {namespace}/{name}"), &pods, &name).await;
        let silent = |seen: String| Ok(Event::Silent { seen });
        let Some(pod) = pod.map_err(|error| of_kubernetes(&error))? else {
            return silent(format!("the pod {name} does not exist yet"));
        };
        if !is_ready(&pod) {
            return silent(format!("the pod {name} is not ready"));
        }
        let spec = pod.spec.as_ref().ok_or_else(|| strange("the pod has no spec"))?;
        let template = |volume: &str| claim_of_template(&database, spec, volume);
        let (container, _) = database_container(spec, &template)?;
        // Annotations that cannot be read name no Secret.
        let settings = annotations::parse(database.annotations()).unwrap_or_default();
        let credentials = match credentials(self.cx, &namespace, &pod, &settings).await {
            Ok(credentials) => credentials,
            Err(problem) if problem.kind == FailureKind::Credentials => {
                return Ok(Event::Answered(Answer::Ready));
            }
            Err(problem) => return Err(problem),
        };
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let host = address.ok_or_else(|| transient("the pod has no address", "wait"))?;
        let port = port(self.cx, &namespace, container).await?;
        let target = Target { host, port, database: DATABASE.to_owned(), credentials, ca_pem: None };
        match Session::connect(&target).await {
            Ok(_) => Ok(Event::Answered(Answer::Sql)),
            // It is up, and was restored to a time when the password was another one.
            Err(PostgresError::WrongCredentials { .. }) => Ok(Event::Answered(Answer::Ready)),
            Err(error) => silent(error.to_string()),
        }
    }
}

/// `against` is what speaks against it, and `absent` what was seen where nothing does.
fn proof(what: &str, against: Vec<String>, absent: &str) -> Proof {
    let holds = against.is_empty();
    let seen = if holds { absent.to_owned() } else { against.join("; ") };
    Proof { what: what.to_owned(), holds, seen }
}
