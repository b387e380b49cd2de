//! Does what `core::backup` says, through the adapters, and reports what happened.

pub mod preflight;

use std::time::Duration;

use howdah_adapters::ceph::{Ceph, CephError, CephPlace, ConnectError};
use howdah_adapters::kubernetes::KubernetesError;
use howdah_adapters::postgres::{BackupLimits, BackupSession, PostgresError, ServerFacts, Session, Standing};
use howdah_adapters::records::PostgresBackup;
use howdah_core::annotations::{Consistency, Settings};
use howdah_core::backup::{
    self, BackupStatus, Effect, Event, FailureKind, ImageRecord, Order, Phase, Problem, SnapshotRecord,
    Snapshots,
};
use howdah_core::catalogue::Entry;
use howdah_core::names;
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;
use kube::runtime::events::{Event as ClusterEvent, EventType};
use tracing::{info, warn};

use crate::context::Context;
use crate::places::Place;
use crate::prune::Pruning;

/// How long each effect may take with this many images, beyond the limits of the single calls inside.
fn limit_of(effect: &Effect, images: u64) -> Duration {
    Duration::from_secs(match effect {
        // Some ten calls, each answered in a second, or slow for one reason.
        Effect::Preflight => 120,
        // A fast checkpoint writes all dirty buffers: minutes with a large cache on a slow disk.
        Effect::StartBackupMode { .. } => 300,
        // Ceph answers within 30 s when the lock holder does not (lab.md K2); the adapter kills rbd at 90.
        Effect::TakeSnapshot { .. } | Effect::FindSnapshot { .. } | Effect::RemoveSnapshot { .. } => {
            150 * images
        }
        Effect::StopBackupMode => 60,
        Effect::Record => 150 * images,
        // Ten deletions.
        Effect::Prune => 600,
        Effect::AbandonBackupMode | Effect::Announce => 30,
        // As long as `core` says.
        Effect::Wait { .. } => 3600,
    })
}

/// The answer of a part of an effect, or that it took too long.
async fn within<T>(
    limit: Duration,
    phase: Phase,
    part: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    tokio::time::timeout(limit, part).await.unwrap_or_else(|_| {
        Err(Problem::new(
            FailureKind::Transient,
            format!("{} took longer than {} s", phase.as_str(), limit.as_secs()),
            "look at the load of the database and of Ceph",
        ))
    })
}

/// The session with PostgreSQL, as far as it came.
enum Held {
    Nothing,
    /// Opened by the preflight.
    Reading {
        session: Session,
        facts: Box<ServerFacts>,
    },
    /// In backup mode.
    Backup {
        session: BackupSession,
        /// What the preflight went by.
        tablespaces: Vec<(String, String)>,
    },
}

/// The hands of one backup: the session it holds, and what it found.
pub struct Effects<'a> {
    cx: &'a Context,
    backup: PostgresBackup,
    order: Order,
    settings: Result<Settings, String>,
    held: Held,
    ceph: Option<Ceph>,
    place: Place,
}

impl<'a> Effects<'a> {
    /// Nothing is open yet. `settings` may be what is wrong with them; `place` is one in the cluster.
    pub fn new(
        cx: &'a Context,
        backup: &PostgresBackup,
        order: Order,
        settings: Result<Settings, String>,
        place: Place,
    ) -> Self {
        Self { cx, backup: backup.clone(), order, settings, held: Held::Nothing, ceph: None, place }
    }

    fn namespace(&self) -> String {
        self.backup.namespace().unwrap_or_default()
    }

    /// What is to be done.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// Performs `effect` within its limit; `None` for those that end in no event.
    pub async fn perform_within_limit(&mut self, effect: &Effect, status: &BackupStatus) -> Option<Event> {
        // One image after the other.
        let limit = limit_of(effect, 1 + status.parts.len() as u64);
        let performed = match effect {
            // It waits for others in between, and has its limits inside.
            Effect::Preflight => self.perform_unbounded(effect, status).await,
            _ => within(limit, status.phase, self.perform_unbounded(effect, status)).await,
        };
        performed.unwrap_or_else(|problem| {
            // What a call that failed or took too long left behind in the session is not to be trusted.
            self.held = Held::Nothing;
            warn!(
                backup = self.backup.name_any(),
                phase = status.phase.as_str(),
                reason = problem.reason,
                cure = problem.cure,
                "backup step failed"
            );
            Some(Event::Failed(problem))
        })
    }

    async fn perform_unbounded(
        &mut self,
        effect: &Effect,
        status: &BackupStatus,
    ) -> Result<Option<Event>, Problem> {
        Ok(match effect {
            // On the heap: this is the largest of them by far, and each is as large as the largest.
            Effect::Preflight => Some(Box::pin(self.preflight_in_its_pool(limit_of(effect, 1))).await?),
            Effect::StartBackupMode { label } => Some(self.start_backup_mode(label).await?),
            Effect::TakeSnapshot { name } => Some(self.take_snapshots(status, name).await?),
            Effect::FindSnapshot { name } => {
                let found = self.find_snapshot(image_of(status)?, name).await?;
                Some(match found {
                    Some(data) => Event::SnapshotTaken(Snapshots { data, parts: Vec::new(), flushed: None }),
                    None => Event::SnapshotMissing,
                })
            }
            Effect::StopBackupMode => Some(self.stop_backup_mode().await?),
            Effect::AbandonBackupMode => {
                // Dropping it closes the connection, and PostgreSQL leaves backup mode by itself.
                self.held = Held::Nothing;
                None
            }
            Effect::Record => {
                self.record(status).await?;
                Some(Event::Recorded)
            }
            Effect::Prune => {
                self.prune(status).await?;
                Some(Event::Pruned)
            }
            Effect::RemoveSnapshot { name } => {
                // One that cannot be reached leaves no other behind.
                let mut removed = Ok(());
                for image in images_of(status)? {
                    removed = removed.and(self.remove_snapshot(image, name).await);
                }
                removed?;
                Some(Event::Undone)
            }
            Effect::Wait { until } => self.wait(*until, status).await,
            Effect::Announce => {
                self.announce(status).await;
                None
            }
        })
    }

    /// The preflight, with a place in the pool that the database lies in. That place is waited for outside of `limit`:
    /// others may hold the pool for long.
    async fn preflight_in_its_pool(&mut self, limit: Duration) -> Result<Event, Problem> {
        let mut found = within(limit, Phase::Preflight, Box::pin(self.find_database())).await?;
        let pool = found.volume.pool.clone();
        if self.cx.places.enter_pool(&mut self.place, &pool).await {
            if Timestamp::now() > self.order.deadline {
                return Err(Problem::new(
                    FailureKind::Transient,
                    format!("other backups were under way in the pool {pool} until the deadline of this one"),
                    "spread the schedules, or give the scheduler more places (HOWDAH_CONCURRENCY_PER_POOL)",
                ));
            }
            // Much may have happened meanwhile.
            found = within(limit, Phase::Preflight, Box::pin(self.find_database())).await?;
        }
        let facts = within(limit, Phase::Preflight, Box::pin(self.preflight(found))).await?;
        Ok(Event::PreflightPassed(Box::new(facts)))
    }

    /// Waits with its place free for others: four databases that cannot be backed up would hold up all.
    async fn wait(&mut self, until: Timestamp, status: &BackupStatus) -> Option<Event> {
        let now = Timestamp::now();
        if status.phase == Phase::Waiting {
            // Nothing is under way: a tick takes it up again when it is time. Ten thousand may wait so.
            return backup::retry_is_due(until, now).then_some(Event::RetryDue);
        }
        self.place = Place::default();
        let left = until.duration_since(now).clamp(SignedDuration::ZERO, backup::RETRY_DELAY_MAX);
        tokio::time::sleep(left.unsigned_abs()).await;
        self.place = self.cx.places.enter().await;
        if let Some(image) = &status.image {
            self.cx.places.enter_pool(&mut self.place, &image.pool).await;
        }
        Some(Event::RetryDue)
    }

    /// The connection of this run's preflight, or a new one after a restart.
    async fn ceph(&mut self) -> Result<Ceph, Problem> {
        match &self.ceph {
            Some(ceph) => Ok(ceph.clone()),
            None => Ok(self.ceph.insert(connect_ceph(self.cx).await?).clone()),
        }
    }

    async fn start_backup_mode(&mut self, label: &str) -> Result<Event, Problem> {
        let Held::Reading { session, facts } = std::mem::replace(&mut self.held, Held::Nothing) else {
            return Err(no_session());
        };
        let session = session.start_backup(label, BackupLimits::default()).await.map_err(of_postgres)?;
        let (lsn, timeline) = (session.start_lsn().to_owned(), facts.timeline);
        self.held = Held::Backup { session, tablespaces: facts.tablespaces };
        Ok(Event::BackupModeStarted { lsn, timeline: Some(timeline) })
    }

    async fn stop_backup_mode(&mut self) -> Result<Event, Problem> {
        let Held::Backup { session, .. } = std::mem::replace(&mut self.held, Held::Nothing) else {
            return Err(no_session());
        };
        let end = session.stop().await.map_err(of_postgres)?;
        Ok(Event::BackupModeStopped { lsn: end.stop_lsn, label: end.label, spcmap: end.tablespace_map })
    }

    /// Takes the snapshot of each image. Several are one state of the database if recovery can begin before them all: it
    /// does so at the last checkpoint that ended, whose WAL stays until the next one has ended. The WAL goes last, because
    /// a page is written to its file after the WAL that changes it.
    async fn take_snapshots(&mut self, status: &BackupStatus, name: &str) -> Result<Event, Problem> {
        let image = image_of(status)?;
        if status.parts.is_empty() {
            let data = match status.consistency {
                // It is told to be of this session.
                Some(Consistency::Online) => self.take_new_snapshot(image, name).await?,
                _ => self.take_snapshot(image, name).await?,
            };
            // A session that is lost costs the class, not the backup: leaving backup mode finds that.
            if let Ok(Some(standing)) = self.standing().await {
                self.same_tablespaces(&standing)?;
            }
            return Ok(Event::SnapshotTaken(Snapshots { data, parts: Vec::new(), flushed: None }));
        }
        let before = self.standing().await?;
        if status.consistency == Some(Consistency::Online) && before.is_none() {
            return Err(no_session());
        }
        let mut parts: Vec<Option<SnapshotRecord>> = vec![None; status.parts.len()];
        let all = || status.parts.iter().enumerate();
        for (at, part) in all().filter(|(_, part)| !part.wal) {
            parts[at] = Some(self.take_new_snapshot(&part.image, name).await?);
        }
        // Wherever the WAL lies of these two, its snapshot is younger than this.
        let flushed = self.standing().await?.map(|standing| standing.flushed);
        let data = self.take_new_snapshot(image, name).await?;
        for (at, part) in all().filter(|(_, part)| part.wal) {
            parts[at] = Some(self.take_new_snapshot(&part.image, name).await?);
        }
        match (before, self.standing().await?) {
            (Some(before), Some(after)) => {
                for standing in [&before, &after] {
                    self.same_tablespaces(standing)?;
                }
                if before.checkpoint != after.checkpoint {
                    return Err(Problem::new(
                        FailureKind::Transient,
                        "a checkpoint ended while the snapshots of the volumes were taken",
                        "nothing to do: they are removed, and the backup is tried again; if it happens often, raise \
                         max_wal_size and checkpoint_timeout",
                    ));
                }
            }
            (Some(_), None) => return Err(no_session()),
            // Nobody wrote if nobody had it open all the time.
            (None, _) => self.still_at_rest(status).await?,
        }
        Ok(Event::SnapshotTaken(Snapshots { data, parts: parts.into_iter().flatten().collect(), flushed }))
    }

    /// Where the server stands; `None` without a session in backup mode.
    async fn standing(&self) -> Result<Option<Standing>, Problem> {
        match &self.held {
            Held::Backup { session, .. } => session.standing().await.map(Some).map_err(of_postgres),
            Held::Nothing | Held::Reading { .. } => Ok(None),
        }
    }

    /// Whether no tablespace came or went since the preflight: it may lie on another volume.
    fn same_tablespaces(&self, standing: &Standing) -> Result<(), Problem> {
        match &self.held {
            Held::Backup { tablespaces, .. } if *tablespaces != standing.tablespaces => Err(Problem::new(
                FailureKind::Transient,
                "a tablespace was created, moved or dropped since the backup began",
                "nothing to do: the backup is tried again",
            )),
            _ => Ok(()),
        }
    }

    /// Looks once more at the images of a stopped database.
    async fn still_at_rest(&mut self, status: &BackupStatus) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        for image in images_of(status)? {
            let spec = image.spec();
            let open = ceph.watchers(&spec).await.map_err(of_ceph)?;
            let open: Vec<String> = open.into_iter().map(|watcher| watcher.address).collect();
            let owners = ceph.lock_owners(&spec).await.map_err(of_ceph)?;
            if let Some(client) = open.iter().chain(&owners).next() {
                return Err(Problem::new(
                    FailureKind::Transient,
                    format!(
                        "the image {spec} was opened by {client} while the snapshots of the volumes were taken"
                    ),
                    "nothing to do: they are removed, and the backup is tried again",
                ));
            }
        }
        Ok(())
    }

    /// One that has to be of now.
    async fn take_new_snapshot(
        &mut self,
        image: &ImageRecord,
        name: &str,
    ) -> Result<SnapshotRecord, Problem> {
        let ceph = self.ceph().await?;
        match ceph.create_snapshot(&image.spec(), name).await {
            Ok(()) => self.listed(image, name).await,
            // It arrived late, of an attempt before this one or of a leader before this one.
            Err(error) => Err(of_ceph(error)),
        }
    }

    async fn take_snapshot(&mut self, image: &ImageRecord, name: &str) -> Result<SnapshotRecord, Problem> {
        let ceph = self.ceph().await?;
        match ceph.create_snapshot(&image.spec(), name).await {
            // The preflight saw that the name was free, so it is our own from before a lost answer.
            Ok(()) | Err(CephError::AlreadyExists { .. }) => self.listed(image, name).await,
            Err(error) => Err(of_ceph(error)),
        }
    }

    async fn listed(&mut self, image: &ImageRecord, name: &str) -> Result<SnapshotRecord, Problem> {
        self.find_snapshot(image, name).await?.ok_or_else(|| {
            Problem::new(
                FailureKind::Transient,
                format!("the snapshot {name} was taken but is not listed"),
                "look who else removes snapshots of this image",
            )
        })
    }

    async fn find_snapshot(
        &mut self,
        image: &ImageRecord,
        name: &str,
    ) -> Result<Option<SnapshotRecord>, Problem> {
        let snapshots = self.ceph().await?.snapshots(&image.spec()).await.map_err(of_ceph)?;
        let found = snapshots.into_iter().find(|snapshot| snapshot.by_user && snapshot.name == name);
        Ok(found.map(|snapshot| SnapshotRecord { name: snapshot.name, id: snapshot.id, size: snapshot.size }))
    }

    async fn remove_snapshot(&mut self, image: &ImageRecord, name: &str) -> Result<(), Problem> {
        let ceph = self.ceph().await?;
        if self.find_snapshot(image, name).await?.is_none() {
            return Ok(());
        }
        match ceph.remove_snapshot(&image.spec(), name).await {
            Ok(()) | Err(CephError::NotFound { .. }) => {}
            Err(error) => return Err(of_ceph(error)),
        }
        ceph.remove_metadata(&image.spec(), &names::image_meta_key(name)).await.map_err(of_ceph)
    }

    async fn record(&mut self, status: &BackupStatus) -> Result<(), Problem> {
        let entry = Entry::of(
            &self.namespace(),
            &self.backup.spec.stateful_set,
            &self.backup.name_any(),
            self.order.trigger,
            status,
            Timestamp::now(),
        );
        let entry = entry.ok_or_else(|| {
            Problem::new(
                FailureKind::Permanent,
                "the record lacks its snapshot or image",
                "report this as a bug",
            )
        })?;
        let value = entry.to_value().map_err(|error| {
            Problem::new(
                FailureKind::Permanent,
                error,
                "the record in the API server is whole; nothing to do",
            )
        })?;
        let key = names::image_meta_key(&entry.snapshot);
        let ceph = self.ceph().await?;
        for image in images_of(status)? {
            ceph.set_metadata(&image.spec(), &key, &value).await.map_err(of_ceph)?;
        }
        Ok(())
    }

    async fn prune(&mut self, status: &BackupStatus) -> Result<(), Problem> {
        let Ok(settings) = self.settings.clone() else { return Ok(()) };
        let ceph = self.ceph().await?;
        let namespace = self.namespace();
        let pruning = Pruning {
            ceph: &ceph,
            client: self.cx.kubernetes.client(),
            namespace: &namespace,
            database: &self.backup.spec.stateful_set,
            status,
            image: image_of(status)?,
            settings: &settings,
        };
        let pruned = pruning.run(Timestamp::now()).await.map_err(|error| {
            Problem::new(FailureKind::Transient, error.to_string(), "the next backup prunes again")
        })?;
        self.cx.metrics.pruned.inc_by(pruned.deleted.len() as u64);
        if !pruned.deleted.is_empty() {
            let list: Vec<String> =
                pruned.deleted.iter().map(|(name, why)| format!("{name} ({why})")).collect();
            let note = format!("deleted {}; {} are kept", list.join(", "), pruned.kept);
            self.tell(EventType::Normal, "BackupsPruned", "Prune", note).await;
        }
        Ok(())
    }

    /// Says how the backup ended: in the metrics, the log, and as an Event of the StatefulSet.
    async fn announce(&self, status: &BackupStatus) {
        self.cx.metrics.ended(status);
        let backup = self.backup.name_any();
        let class = status.consistency.map_or("none", |class| class.as_str());
        info!(
            backup,
            phase = status.phase.as_str(),
            consistency = class,
            attempt = status.attempt,
            "backup ended"
        );
        let (kind, reason, note) = match (&status.failure, status.phase) {
            (_, Phase::Taken) => {
                (EventType::Normal, "BackupTaken", format!("backup {backup} ({class}) was taken"))
            }
            (failure, phase) => {
                let why = failure
                    .as_ref()
                    .map_or(String::new(), |f| format!(" in {}: {}; {}", f.step.as_str(), f.reason, f.cure));
                let reason = if phase == Phase::Stuck { "BackupStuck" } else { "BackupFailed" };
                (EventType::Warning, reason, format!("backup {backup} failed{why}"))
            }
        };
        self.tell(kind, reason, "Backup", note).await;
    }

    /// Publishes an Event on the StatefulSet, or on the record when the StatefulSet is gone.
    async fn tell(&self, kind: EventType, reason: &str, action: &str, note: String) {
        let event = ClusterEvent {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(note),
            action: action.to_owned(),
            secondary: None,
        };
        let database = self.cx.caches.database(&self.namespace(), &self.backup.spec.stateful_set);
        let published = match database.as_deref() {
            Some(database) => self.cx.kubernetes.publish(event, database).await,
            None => self.cx.kubernetes.publish(event, &self.backup).await,
        };
        if let Err(error) = published {
            warn!(error = %error, "publish an event");
        }
    }
}

/// Ceph, as the identity that cannot blocklist; connected anew in each preflight, because rights may change.
pub async fn connect_ceph(cx: &Context) -> Result<Ceph, Problem> {
    let args = &cx.args;
    let place =
        CephPlace { runner: args.ceph_runner, namespace: &args.ceph_namespace, user: &args.ceph_user };
    place.connect(&cx.kubernetes).await.map_err(|error| match error {
        ConnectError::SetUp(error) => ceph_setup(&error),
        ConnectError::Ceph(error) => of_ceph(error),
    })
}

/// The image the preflight wrote down.
fn image_of(status: &BackupStatus) -> Result<&ImageRecord, Problem> {
    status.image.as_ref().ok_or_else(|| {
        Problem::new(FailureKind::Permanent, "the record names no image", "report this as a bug")
    })
}

/// It, and the further ones.
fn images_of(status: &BackupStatus) -> Result<impl Iterator<Item = &ImageRecord>, Problem> {
    Ok(status.parts.iter().map(|part| &part.image).chain(std::iter::once(image_of(status)?)))
}

fn no_session() -> Problem {
    Problem::new(
        FailureKind::Transient,
        "the session with PostgreSQL is gone",
        "nothing to do: it is tried again",
    )
}

/// A part of the set-up of Ceph cannot be read.
fn ceph_setup(error: &KubernetesError) -> Problem {
    Problem::new(
        FailureKind::Transient,
        error.to_string(),
        "apply the CephClient and the Role of deploy/overlays/rook (or plain-ceph)",
    )
}

/// Sorts an error of Ceph by whether trying again can help.
pub fn of_ceph(error: CephError) -> Problem {
    let (kind, cure) = match &error {
        CephError::UnsafeIdentity { .. } | CephError::Denied { .. } => (
            FailureKind::Permanent,
            "give the Ceph user exactly mon 'allow r', osd 'profile rbd pool=POOL' (deploy/overlays/rook/cephclient.yaml)",
        ),
        CephError::ReadOnly { .. } => (
            FailureKind::Transient,
            "see whether the node of the database answers; a backup never takes the lock from it by force",
        ),
        CephError::NotFound { .. } => (FailureKind::Transient, "see whether the image was moved or deleted"),
        CephError::AlreadyExists { .. } | CephError::Busy { .. } => {
            (FailureKind::Transient, "see what else works on the image")
        }
        CephError::TimedOut { .. } | CephError::Other { .. } => {
            (FailureKind::Transient, "see the health of the Ceph cluster (ceph status)")
        }
    };
    Problem::new(kind, error.to_string(), cure)
}

/// Sorts an error of PostgreSQL by whether trying again can help.
pub fn of_postgres(error: PostgresError) -> Problem {
    let (kind, cure) = match &error {
        PostgresError::WrongCredentials { .. } => (
            FailureKind::Credentials,
            "put the right username and password into a Secret and name it in howdah.dev/credentials"
                .to_owned(),
        ),
        PostgresError::MissingRight { grant, database, .. } => {
            (FailureKind::Credentials, format!("run in the database {database:?} as a superuser: {grant}"))
        }
        PostgresError::Unreachable { .. } => (
            FailureKind::Connection,
            "see whether PostgreSQL runs, and whether a NetworkPolicy lets the scheduler reach it".to_owned(),
        ),
        PostgresError::Unsupported { .. } => (FailureKind::Permanent, "use a supported version".to_owned()),
        PostgresError::TimedOut { .. } | PostgresError::SessionLost { .. } | PostgresError::Other { .. } => {
            (FailureKind::Transient, "see the log of PostgreSQL".to_owned())
        }
    };
    Problem::new(kind, error.to_string(), cure)
}
