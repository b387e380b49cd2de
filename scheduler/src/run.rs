//! Runs one operation: asks `core` what to do, writes the intent to the record, does it, and feeds back what happened.
//!
//! The same for every kind of operation; what one is made of is an [`Operation`].

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, bail};
use howdah_adapters::kubernetes::{KubernetesError, call, find};
use howdah_adapters::leader::Mandate;
use jiff::Timestamp;
use kube::api::PostParams;
use kube::core::NamespaceResourceScope;
use kube::core::object::HasStatus;
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use crate::context::Context;

/// Tries to write the record before the run is given up, which ends its session and so backup mode.
const WRITE_TRIES: u32 = 4;
/// Pause between these tries.
const WRITE_PAUSE: Duration = Duration::from_secs(2);

/// A custom resource whose status is the journal of an operation.
pub trait Record:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: Clone + Default + PartialEq + Send + Sync>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
{
}

impl<T> Record for T where
    T: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + HasStatus<Status: Clone + Default + PartialEq + Send + Sync>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
{
}

/// The journal of an operation.
pub type StatusOf<O> = <<O as Operation>::Record as HasStatus>::Status;

/// One operation under way: the decisions of `core`, and the hands that carry them out.
pub trait Operation: Send {
    /// Its record.
    type Record: Record;
    /// What happened.
    type Event: Send;
    /// What to do.
    type Effect: Send + Sync;
    /// What one is called in the log.
    const NOUN: &'static str;

    /// What a run of the record begins with; `None` when there is nothing left to do.
    fn first_event(record: &Self::Record) -> Option<Self::Event>;
    /// Where it stands, for the log.
    fn phase(status: &StatusOf<Self>) -> &'static str;
    /// Whether `record` lacks fields of `status` without which it would be half of one. An API server whose definition of the
    /// record is older takes a status without them, and says nothing.
    fn loses(_record: &Self::Record, _status: &StatusOf<Self>) -> bool {
        false
    }
    /// What happened, for the log.
    fn label(event: &Self::Event) -> &'static str;
    /// The next status and what to do.
    ///
    /// # Errors
    /// If the event cannot happen now, which is a bug.
    fn next(
        &self,
        status: &StatusOf<Self>,
        event: Self::Event,
        now: Timestamp,
    ) -> anyhow::Result<(StatusOf<Self>, Vec<Self::Effect>)>;
    /// Does it; `None` for an effect that ends in no event.
    fn perform(
        &mut self,
        effect: &Self::Effect,
        status: &StatusOf<Self>,
    ) -> impl Future<Output = Option<Self::Event>> + Send;
}

/// Runs the operation recorded in `namespace/name` from wherever it stands until its end, or while `mandate` holds. `begin`
/// makes its hands.
///
/// # Errors
/// If the record cannot be read or written any more. Nothing is lost: the next run resumes from the record.
pub async fn run<O: Operation>(
    cx: &Context,
    namespace: &str,
    name: &str,
    mandate: &Mandate,
    begin: impl FnOnce(&O::Record) -> O,
) -> anyhow::Result<()> {
    // The cache may lag behind what a former leader wrote.
    let Some(mut journal) = Journal::<O>::open(cx, namespace, name).await? else { return Ok(()) };
    let Some(mut event) = O::first_event(&journal.record) else { return Ok(()) };
    let mut operation = begin(&journal.record);
    loop {
        info!(
            namespace,
            operation = O::NOUN,
            name,
            phase = O::phase(&journal.status()),
            event = O::label(&event),
            "operation event"
        );
        let (status, todo) =
            operation.next(&journal.status(), event, Timestamp::now()).context("decide what to do next")?;
        // Whoever leads now writes the record; a write of ours would only collide with it.
        if !mandate.holds() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = mandate.ended() => return Ok(()),
            written = journal.write(status) => written?,
        }
        let current = journal.status();
        let mut answer = None;
        for effect in &todo {
            if !mandate.holds() {
                return Ok(());
            }
            tokio::select! {
                biased;
                // Dropping the hands closes what they hold; a session in backup mode ends with that.
                () = mandate.ended() => return Ok(()),
                event = operation.perform(effect, &current) => answer = event,
            }
        }
        match answer {
            Some(next) => event = next,
            None => return Ok(()),
        }
    }
}

/// What is wrong when the API server answers with another status than it was given.
const LOSES_FIELDS: &str = "the API server does not keep all of it: its CustomResourceDefinitions are of an older version, \
                            apply deploy/base/crds";

/// The record of one operation, written before each effect.
struct Journal<O: Operation> {
    api: Api<O::Record>,
    namespace: String,
    record: O::Record,
}

impl<O: Operation> Journal<O> {
    /// Reads the record; `None` when it is gone.
    async fn open(cx: &Context, namespace: &str, name: &str) -> anyhow::Result<Option<Self>> {
        let api = Api::<O::Record>::namespaced(cx.kubernetes.client().clone(), namespace);
        let found = find(format!("get the {} {namespace}/{name}", O::NOUN), &api, name).await?;
        Ok(found.map(|record| Self { api, namespace: namespace.to_owned(), record }))
    }

    fn status(&self) -> StatusOf<O> {
        self.record.status().cloned().unwrap_or_default()
    }

    /// Writes the status. A conflict is resolved when only others' fields changed (a hold was put on it), and ends
    /// the run when the status did: then another leader runs this operation.
    async fn write(&mut self, status: StatusOf<O>) -> anyhow::Result<()> {
        let name = self.record.name_any();
        let attempt = format!("write the status of the {} {}/{name}", O::NOUN, self.namespace);
        if O::loses(&self.record, &status) {
            // Nothing is written: whoever took up what is left of the record would go on with half of it.
            let rehearsal = PostParams { dry_run: true, ..PostParams::default() };
            let mut next = self.record.clone();
            *next.status_mut() = Some(status.clone());
            let written = call(attempt.as_str(), self.api.replace_status(&name, &rehearsal, &next)).await;
            // Whatever else is wrong, the write itself finds it, and has its tries.
            if written.is_ok_and(|written| O::loses(&written, &status)) {
                bail!("{attempt}: {LOSES_FIELDS}");
            }
        }
        for left in (0..WRITE_TRIES).rev() {
            let mut next = self.record.clone();
            *next.status_mut() = Some(status.clone());
            let parameters = PostParams::default();
            match call(attempt.as_str(), self.api.replace_status(&name, &parameters, &next)).await {
                Ok(written) => {
                    if O::loses(&written, &status) {
                        bail!("{attempt}: {LOSES_FIELDS}");
                    }
                    self.record = written;
                    return Ok(());
                }
                Err(KubernetesError::Conflict { .. }) => {
                    let current = call(attempt.as_str(), self.api.get(&name)).await?;
                    // A lost answer to our own write looks like this, too.
                    if current.status() == Some(&status) {
                        self.record = current;
                        return Ok(());
                    }
                    if current.status() != self.record.status() {
                        bail!("{attempt}: somebody else runs it");
                    }
                    self.record = current;
                }
                Err(error @ (KubernetesError::NotFound { .. } | KubernetesError::Forbidden { .. })) => {
                    return Err(error.into());
                }
                Err(error) if left > 0 => {
                    warn!(error = %error, "write the record: trying again");
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        bail!("{attempt}: it is changed too often")
    }
}
