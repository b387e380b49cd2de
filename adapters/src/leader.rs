//! Leader election on a `coordination.k8s.io/v1` Lease, with the rules of client-go's `leaderelection`.
//!
//! Time is never compared between machines: a contender takes the lease over only after it has itself seen the
//! record unchanged for the lease's duration, on its own monotonic clock; a leader counts its term from *before* the
//! request that renewed it. A leader that cannot renew, for whatever reason, stops believing before anybody else may
//! begin. kube-lease-manager was considered: it compares wall clocks, and a leader that cannot reach the API server
//! is not told.
//!
//! Leadership saves work, it is no lock: a process that is stopped and continued believes for a moment. What must
//! not happen twice is guarded by the name of the object that records it.

use std::time::Duration;

use anyhow::ensure;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::kubernetes::{KubernetesError, call_within, find_within};

/// Who competes for which lease, and how fast.
#[derive(Clone, Debug)]
pub struct LeaderSettings {
    /// The lease's namespace.
    pub namespace: String,
    /// The lease's name.
    pub name: String,
    /// This process: unique among contenders, the pod's name.
    pub identity: String,
    /// How long others wait after the last renewal they saw. Whole seconds.
    pub duration: Duration,
    /// How long the leader believes after its last renewal; less than `duration` by more than a clock's drift.
    pub renew_deadline: Duration,
    /// The pause between attempts.
    pub retry: Duration,
}

impl LeaderSettings {
    /// The times of Kubernetes' own components: 15 s, 10 s, 2 s.
    #[must_use]
    pub fn new(namespace: &str, name: &str, identity: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            identity: identity.to_owned(),
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// A contender for a lease.
#[derive(Clone)]
pub struct Election {
    leases: Api<Lease>,
    settings: LeaderSettings,
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What a contender saw, and since when it has not changed.
struct Observed {
    resource_version: Option<String>,
    since: Instant,
}

impl Election {
    /// Checks the settings.
    ///
    /// # Errors
    /// If the times do not leave room for each other, or the identity is empty.
    pub fn new(client: Client, settings: LeaderSettings) -> anyhow::Result<Self> {
        let LeaderSettings { identity, duration, renew_deadline, retry, .. } = &settings;
        ensure!(!identity.is_empty(), "the leader election needs an identity: set it to the pod's name");
        ensure!(
            duration.as_secs() >= 1 && duration.subsec_nanos() == 0,
            "the lease duration must be whole seconds"
        );
        ensure!(renew_deadline < duration, "the renew deadline must be shorter than the lease duration");
        ensure!(retry < renew_deadline, "the retry pause must be shorter than the renew deadline");
        Ok(Self { leases: Api::namespaced(client, &settings.namespace), settings })
    }

    /// Waits until this process leads, and keeps renewing in the background. None if `shutdown` comes first.
    pub async fn acquire(&self, shutdown: &CancellationToken) -> Option<Leadership> {
        let mut observed: Option<Observed> = None;
        loop {
            let asked = Instant::now();
            match self.attempt(&mut observed).await {
                Ok(Some(lease)) => return Some(self.lead(lease, asked)),
                Ok(None) => {}
                Err(error) => {
                    warn!(error = %error, lease = %self.settings.name, "leader election attempt failed")
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = tokio::time::sleep(self.settings.retry) => {}
            }
        }
    }

    /// Tries once to take the lease; none while somebody else holds it.
    async fn attempt(&self, observed: &mut Option<Observed>) -> Result<Option<Lease>, KubernetesError> {
        let name = &self.settings.name;
        let limit = self.settings.renew_deadline;
        let found = find_within(limit, format!("get the lease {name}"), &self.leases, name).await?;
        let Some(lease) = found else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
                spec: Some(self.record(None)),
            };
            let parameters = PostParams::default();
            let create = self.leases.create(&parameters, &lease);
            return taken(call_within(limit, format!("create the lease {name}"), create).await);
        };

        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        let version = lease.metadata.resource_version.clone();
        let since = match observed {
            Some(seen) if seen.resource_version == version => seen.since,
            _ => {
                let since = Instant::now();
                *observed = Some(Observed { resource_version: version, since });
                since
            }
        };
        let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(self.settings.duration, Duration::from_secs);
        // Our own record is taken at once: a restarted pod of the same name is the same contender.
        if !holder.is_empty() && holder != self.settings.identity && since.elapsed() < duration {
            return Ok(None);
        }
        let taken_over = Lease { spec: Some(self.record(Some(&spec))), ..lease };
        taken(self.replace(&taken_over).await)
    }

    /// Starts the task that renews. `asked` is when the request was sent that made us the leader.
    fn lead(&self, lease: Lease, asked: Instant) -> Leadership {
        let term = lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0);
        info!(lease = %self.settings.name, identity = %self.settings.identity, term, "leading");
        let (lost, resign) = (CancellationToken::new(), CancellationToken::new());
        let (renewals, until) = watch::channel(asked + self.settings.renew_deadline);
        let mandate = Mandate { lost: lost.clone(), until };
        let election = self.clone();
        let (task_lost, task_resign) = (lost.clone(), resign.clone());
        let renewing = tokio::spawn(async move {
            // The guard speaks also if the task panics: nobody may go on leading without renewal.
            let _guard = task_lost.drop_guard();
            election.renew(lease, &renewals, &task_resign).await;
        });
        Leadership { lost, mandate, resign, renewing, term }
    }

    /// Renews until the term is lost or given up, and says each time until when it lasts.
    async fn renew(&self, mut lease: Lease, until: &watch::Sender<Instant>, resign: &CancellationToken) {
        loop {
            let deadline = *until.borrow();
            tokio::select! {
                () = resign.cancelled() => return self.give_up(lease).await,
                () = tokio::time::sleep_until(deadline.min(Instant::now() + self.settings.retry)) => {}
            }
            let asked = Instant::now();
            match tokio::time::timeout_at(deadline, self.renew_once(&lease)).await {
                Ok(Ok(Some(next))) => {
                    lease = next;
                    until.send_replace(asked + self.settings.renew_deadline);
                }
                Ok(Ok(None)) => {
                    warn!(lease = %self.settings.name, "leadership lost: another contender holds the lease");
                    return;
                }
                Ok(Err(error)) if Instant::now() < deadline => {
                    warn!(error = %error, lease = %self.settings.name, "renew the lease: trying again");
                }
                Ok(Err(_)) | Err(_) => {
                    warn!(lease = %self.settings.name, "leadership lost: the lease was not renewed in time");
                    return;
                }
            }
        }
    }

    /// Writes a new renewal time; none if the lease is somebody else's.
    async fn renew_once(&self, lease: &Lease) -> Result<Option<Lease>, KubernetesError> {
        let mut next = lease.clone();
        next.spec = Some(self.record(lease.spec.as_ref()));
        match self.replace(&next).await {
            Ok(written) => Ok(Some(written)),
            Err(KubernetesError::Conflict { .. }) => {
                // Our own earlier write may have arrived although its answer did not.
                let name = &self.settings.name;
                let get = self.leases.get(name);
                let current =
                    call_within(self.settings.renew_deadline, format!("get the lease {name}"), get).await?;
                let spec = current.spec.clone().unwrap_or_default();
                if spec.holder_identity.as_deref() != Some(&self.settings.identity) {
                    return Ok(None);
                }
                next = Lease { spec: Some(self.record(Some(&spec))), ..current };
                self.replace(&next).await.map(Some)
            }
            Err(KubernetesError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Empties the lease, so that the next leader need not wait for it to run out. Best effort.
    async fn give_up(&self, mut lease: Lease) {
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        if let Err(error) = self.replace(&lease).await {
            warn!(error = %error, lease = %self.settings.name, "give the lease back: it runs out by itself");
        }
    }

    async fn replace(&self, lease: &Lease) -> Result<Lease, KubernetesError> {
        let name = &self.settings.name;
        let parameters = PostParams::default();
        let request = self.leases.replace(name, &parameters, lease);
        call_within(self.settings.renew_deadline, format!("renew the lease {name}"), request).await
    }

    /// The record that says that we lead as of now. Times in it are for people; no contender compares them.
    fn record(&self, previous: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let ours =
            previous.is_some_and(|spec| spec.holder_identity.as_deref() == Some(&self.settings.identity));
        let transitions = previous.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.settings.duration.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: if ours {
                previous.and_then(|spec| spec.acquire_time.clone())
            } else {
                now.clone()
            },
            renew_time: now,
            lease_transitions: Some(if ours || previous.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }
}

/// The outcome of an attempt to write ourselves in: losing the race is no error.
fn taken(written: Result<Lease, KubernetesError>) -> Result<Option<Lease>, KubernetesError> {
    match written {
        Ok(lease) => Ok(Some(lease)),
        Err(KubernetesError::Conflict { .. } | KubernetesError::AlreadyExists { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The right to act as the leader, for what acts.
#[derive(Clone, Debug)]
pub struct Mandate {
    lost: CancellationToken,
    until: watch::Receiver<Instant>,
}

impl Mandate {
    /// Ends when the right does.
    pub async fn ended(&self) {
        self.lost.cancelled().await;
    }

    /// Whether this process may act now. It asks the clock, which goes on while a process is stopped: when that is
    /// continued, what was waited for may be looked at before the timer that ends the term.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.lost.is_cancelled() && Instant::now() < *self.until.borrow()
    }
}

/// Being the leader. Dropping it resigns, too, without waiting for the lease to be given back.
#[derive(Debug)]
pub struct Leadership {
    lost: CancellationToken,
    mandate: Mandate,
    resign: CancellationToken,
    renewing: JoinHandle<()>,
    term: i32,
}

impl Leadership {
    /// Cancelled the moment this process may no longer act as the leader. Select on it around everything.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// The same for what asks before each thing it does.
    #[must_use]
    pub fn mandate(&self) -> &Mandate {
        &self.mandate
    }

    /// The number of the term (`leaseTransitions`); grows with each change of leader.
    #[must_use]
    pub fn term(&self) -> i32 {
        self.term
    }

    /// Stops acting and gives the lease back, so that another contender follows within its retry pause.
    pub async fn resign(mut self) {
        self.lost.cancel();
        self.resign.cancel();
        // The task only panics if the runtime is going; there is nothing left to do about it then.
        let _ = (&mut self.renewing).await;
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.lost.cancel();
        self.resign.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_that_ran_out_is_none_although_nobody_has_said_so_yet() {
        let lost = CancellationToken::new();
        let (renewals, until) = watch::channel(Instant::now() + Duration::from_secs(60));
        let mandate = Mandate { lost: lost.clone(), until };
        assert!(mandate.holds());
        renewals.send_replace(Instant::now());
        assert!(!mandate.holds() && !lost.is_cancelled());
        renewals.send_replace(Instant::now() + Duration::from_secs(60));
        assert!(mandate.holds());
        lost.cancel();
        assert!(!mandate.holds());
    }
}
