//! `catalog rebuild`: brings the records of backups back from the metadata of the RBD images.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use howdah_adapters::ceph::{Ceph, CephError, CephPlace};
use howdah_adapters::kubernetes::{Kubernetes, KubernetesError, call, find};
use howdah_adapters::records::{PostgresBackup, PostgresBackupSpec};
use howdah_core::backup::{ImageRecord, SnapshotRecord};
use howdah_core::catalogue::{self, Found, Rebuilt};
use howdah_core::names;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::args::RebuildArgs;
use crate::table;

/// Images that are read at the same time; each is a process or two, here or in the toolbox.
const IMAGES_AT_ONCE: usize = 8;
/// Looks at a pool: two when nothing happens in it, four for a swap that falls badly, and some for images that are made.
const POOL_LOOKS: u32 = 8;

/// A pool, or a rados namespace of it, as `rbd ls` takes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Pool {
    name: String,
    rados_namespace: String,
}

impl Pool {
    /// Reads `POOL` or `POOL/NAMESPACE`.
    fn parse(text: &str) -> Self {
        let (name, rados_namespace) = text.split_once('/').unwrap_or((text, ""));
        Self { name: name.to_owned(), rados_namespace: rados_namespace.to_owned() }
    }

    fn spec(&self) -> String {
        match self.rados_namespace.as_str() {
            "" => self.name.clone(),
            namespace => format!("{}/{namespace}", self.name),
        }
    }
}

/// What one image gave.
struct Shelf {
    image: ImageRecord,
    snapshots: Vec<SnapshotRecord>,
    found: Vec<Found>,
}

/// Reads the images and writes what is missing; the answer is what to print.
pub async fn rebuild(client: Client, arguments: RebuildArgs) -> anyhow::Result<String> {
    let RebuildArgs { target, pool, ceph_runner, ceph_namespace, ceph_user, dry_run } = arguments;
    let kubernetes = Kubernetes::new(client.clone(), "kubectl-howdah");
    let target = target.as_deref().map(parse_target).transpose()?;
    let pools = match (&target, pool) {
        (Some((namespace, name)), _) => pools_of(&kubernetes, namespace, name).await?,
        (None, Some(pool)) => BTreeSet::from([Pool::parse(&pool)]),
        (None, None) => bail!("rebuild the catalogue: name a StatefulSet or a pool"),
    };
    let place = CephPlace { runner: ceph_runner, namespace: &ceph_namespace, user: &ceph_user };
    let ceph = place.connect(&kubernetes).await.context("reach Ceph as the user that snapshots")?;
    let mut rows = Vec::new();
    let (mut restored, mut there, mut failed) = (0, 0, 0);
    for pool in &pools {
        let shelves = read_pool(&ceph, pool).await?;
        let images: BTreeMap<String, (ImageRecord, Vec<SnapshotRecord>)> = shelves
            .iter()
            .map(|shelf| (shelf.image.id.clone(), (shelf.image.clone(), shelf.snapshots.clone())))
            .collect();
        for shelf in shelves {
            let image = shelf.image.spec();
            for found in shelf.found {
                let rebuilt = match found {
                    Found::Backup(rebuilt) => rebuilt,
                    Found::Nothing { snapshot, reason } => {
                        // Of no database that is known, so only a look at the whole pool shows it.
                        if target.is_none() {
                            rows.push(row(&image, &snapshot, "-", &format!("left alone: {reason}")));
                        }
                        continue;
                    }
                };
                let Rebuilt { entry, .. } = &*rebuilt;
                let wanted = target
                    .as_ref()
                    .is_none_or(|(namespace, name)| entry.namespace == *namespace && entry.database == *name);
                if !wanted {
                    continue;
                }
                let record = format!("{}/{}", entry.namespace, entry.backup);
                let snapshot = entry.snapshot.clone();
                let rebuilt = match rebuilt.find_parts(&images) {
                    Ok(rebuilt) => rebuilt,
                    Err(reason) => {
                        rows.push(row(&image, &snapshot, &record, &format!("left alone: {reason}")));
                        continue;
                    }
                };
                let outcome = match put_back(&client, &rebuilt, dry_run).await {
                    Ok(Outcome::Restored) => {
                        restored += 1;
                        if dry_run { "would be brought back".to_owned() } else { "brought back".to_owned() }
                    }
                    Ok(Outcome::There) => {
                        there += 1;
                        "there already".to_owned()
                    }
                    Err(error) => {
                        failed += 1;
                        format!("failed: {error:#}")
                    }
                };
                rows.push(row(&image, &snapshot, &record, &outcome));
            }
        }
    }
    rows.sort();
    let mut text = if rows.is_empty() {
        "No backup is in the catalogue of these images\n".to_owned()
    } else {
        table::render(&["IMAGE", "SNAPSHOT", "RECORD", "OUTCOME"], &rows)
    };
    let verb = if dry_run { "would be brought back" } else { "brought back" };
    text.push_str(&format!("\n{restored} {verb}, {there} there already, {failed} failed\n"));
    ensure!(failed == 0, "bring every record back:\n{text}");
    Ok(text)
}

fn row(image: &str, snapshot: &str, record: &str, outcome: &str) -> Vec<String> {
    [image, snapshot, record, outcome].map(str::to_owned).to_vec()
}

fn parse_target(text: &str) -> anyhow::Result<(String, String)> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => bail!("read {text:?}: write NAMESPACE/NAME of the StatefulSet"),
    }
}

/// The pools of a StatefulSet's volumes. All images of theirs are read: after a restore the backups lie on an image that the
/// claim no longer names.
async fn pools_of(kubernetes: &Kubernetes, namespace: &str, name: &str) -> anyhow::Result<BTreeSet<Pool>> {
    let sets = Api::<StatefulSet>::namespaced(kubernetes.client().clone(), namespace);
    let found = find(format!("get the StatefulSet {namespace}/{name}"), &sets, name).await?;
    let set = found.with_context(|| {
        format!("find the StatefulSet {namespace}/{name}: if it is lost, too, rebuild its pool with --pool")
    })?;
    let spec = set.spec.unwrap_or_default();
    let ordinal = spec.ordinals.and_then(|ordinals| ordinals.start).unwrap_or(0);
    let mut pools = BTreeSet::new();
    for template in spec.volume_claim_templates.iter().flatten() {
        let claim = format!("{}-{name}-{ordinal}", template.name_any());
        let volume = kubernetes.rbd_volume(namespace, &claim).await?;
        pools.insert(Pool { name: volume.pool, rados_namespace: volume.rados_namespace });
    }
    ensure!(
        !pools.is_empty(),
        "find the volumes of {namespace}/{name}: it has no volumeClaimTemplates; rebuild its pool with --pool"
    );
    Ok(pools)
}

/// Reads every image. A restore that swaps gives images other names meanwhile, so the pool is listed again after each look, and
/// what is not known by its name is read, until nothing is left to read.
async fn read_pool(ceph: &Ceph, pool: &Pool) -> anyhow::Result<Vec<Shelf>> {
    let mut known = Known::default();
    for _ in 0..POOL_LOOKS {
        let unread = known.unread(ceph.images(&pool.spec()).await?.into_iter().collect());
        if unread.is_empty() {
            return Ok(known.0.into_values().flatten().collect());
        }
        known.add(read_images(ceph, pool, unread).await?);
    }
    bail!(
        "read the pool {}: after {POOL_LOOKS} looks some of its images still had other names than just before: run this again",
        pool.spec()
    )
}

/// What the images of a pool gave, by their names; none when they have nothing of howdah's.
#[derive(Default)]
struct Known(BTreeMap<String, Option<Shelf>>);

impl Known {
    /// Forgets what is not listed any more, and gives what of `listed` is to be read.
    fn unread(&mut self, mut listed: BTreeSet<String>) -> BTreeSet<String> {
        self.0.retain(|name, _| listed.contains(name));
        listed.retain(|name| !self.0.contains_key(name));
        listed
    }

    /// Adds what was read. An image that has two names was renamed in between: what either leads to now is not known.
    fn add(&mut self, read: BTreeMap<String, Option<Shelf>>) {
        self.0.extend(read);
        let mut names_of = BTreeMap::<String, usize>::new();
        for shelf in self.0.values().flatten() {
            *names_of.entry(shelf.image.id.clone()).or_default() += 1;
        }
        self.0
            .retain(|_, shelf| shelf.as_ref().is_none_or(|shelf| names_of.get(&shelf.image.id) == Some(&1)));
    }
}

/// Reads these images; of those that are gone by now nothing is in the answer.
async fn read_images(
    ceph: &Ceph,
    pool: &Pool,
    names: BTreeSet<String>,
) -> anyhow::Result<BTreeMap<String, Option<Shelf>>> {
    let permits = Arc::new(Semaphore::new(IMAGES_AT_ONCE));
    let mut reads = JoinSet::new();
    for image in names {
        let (ceph, pool, permits) = (ceph.clone(), pool.clone(), permits.clone());
        reads.spawn(async move {
            let _permit = permits.acquire().await.context("wait for a free place")?;
            match read_image(&ceph, &pool, image.clone()).await {
                Err(error) if error.is_not_found() => anyhow::Ok(None),
                shelf => Ok(Some((image, shelf?))),
            }
        });
    }
    let mut answer = BTreeMap::new();
    while let Some(read) = reads.join_next().await {
        answer.extend(read.context("read an image")??);
    }
    Ok(answer)
}

/// What the image has of howdah's; none when it has nothing.
async fn read_image(ceph: &Ceph, pool: &Pool, name: String) -> Result<Option<Shelf>, CephError> {
    let spec = format!("{}/{name}", pool.spec());
    let metadata = ceph.metadata(&spec).await?;
    if !metadata.keys().any(|key| key.starts_with(names::IMAGE_META_PREFIX)) {
        return Ok(None);
    }
    let (info, snapshots) = tokio::try_join!(ceph.info(&spec), ceph.snapshots(&spec))?;
    let image = ImageRecord {
        pool: pool.name.clone(),
        rados_namespace: pool.rados_namespace.clone(),
        name,
        id: info.id,
    };
    let of_users = snapshots.into_iter().filter(|snapshot| snapshot.by_user);
    let snapshots: Vec<SnapshotRecord> = of_users
        .map(|snapshot| SnapshotRecord { name: snapshot.name, id: snapshot.id, size: snapshot.size })
        .collect();
    let found = catalogue::read(&image, &snapshots, &metadata, Timestamp::now());
    Ok(Some(Shelf { image, snapshots, found }))
}

enum Outcome {
    Restored,
    There,
}

/// Writes one record, unless it is there. Killed half-way it is finished by the next run.
async fn put_back(client: &Client, rebuilt: &Rebuilt, dry_run: bool) -> anyhow::Result<Outcome> {
    let (namespace, name) = (&rebuilt.entry.namespace, &rebuilt.entry.backup);
    let records = Api::<PostgresBackup>::namespaced(client.clone(), namespace);
    let found = find(format!("get the PostgresBackup {namespace}/{name}"), &records, name).await?;
    let wanted = record(rebuilt);
    let mut record = match found {
        Some(found) if found.spec.stateful_set != rebuilt.entry.database => {
            bail!("a record of this name is of the StatefulSet {}", found.spec.stateful_set)
        }
        // An order that nobody has taken up yet has no status either, but not the annotation.
        Some(found) if found.status.is_some() || !found.annotations().contains_key(names::REBUILT) => {
            return Ok(Outcome::There);
        }
        _ if dry_run => return Ok(Outcome::Restored),
        Some(found) => found,
        None => {
            let attempt = format!("create the PostgresBackup {namespace}/{name}");
            match call(attempt, records.create(&PostParams::default(), &wanted)).await {
                Err(KubernetesError::NotFound { .. }) => bail!(
                    "there is no namespace {namespace}: run kubectl create namespace {namespace}, and this again"
                ),
                created => created?,
            }
        }
    };
    record.status = wanted.status;
    let attempt = format!("write the status of the PostgresBackup {namespace}/{name}");
    call(attempt, records.replace_status(name, &PostParams::default(), &record)).await?;
    Ok(Outcome::Restored)
}

/// The record of a backup as the catalogue knows it. The uid of the StatefulSet is not in it: a set that was lost has another
/// one now.
fn record(rebuilt: &Rebuilt) -> PostgresBackup {
    let Rebuilt { entry, status, hold } = rebuilt;
    let spec = PostgresBackupSpec {
        stateful_set: entry.database.clone(),
        stateful_set_uid: None,
        slot: Some(entry.slot),
        trigger: entry.trigger,
        consistency: None,
    };
    let mut record = PostgresBackup::new(&entry.backup, spec);
    record.labels_mut().insert(names::DATABASE_LABEL.to_owned(), entry.database.clone());
    record.annotations_mut().insert(names::REBUILT.to_owned(), "from the catalogue".to_owned());
    if let Some(reason) = hold {
        record.annotations_mut().insert(names::HOLD.to_owned(), reason.clone());
    }
    record.status = Some(status.clone());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_namespace_and_a_name() {
        assert_eq!(parse_target("shop/db").unwrap(), ("shop".to_owned(), "db".to_owned()));
        for wrong in ["db", "/db", "shop/", "shop/db/0"] {
            assert!(parse_target(wrong).unwrap_err().to_string().contains("NAMESPACE/NAME"), "{wrong}");
        }
    }

    #[test]
    fn an_image_that_is_renamed_while_its_pool_is_read_is_read_whenever_that_falls() {
        let read = |all: &[(&str, &str)]| {
            let shelf = |name: &str, id: &str| Shelf {
                image: ImageRecord {
                    pool: "p".to_owned(),
                    rados_namespace: String::new(),
                    name: name.to_owned(),
                    id: id.to_owned(),
                },
                snapshots: vec![],
                found: vec![],
            };
            all.iter().map(|(name, id)| ((*name).to_owned(), Some(shelf(name, id)))).collect()
        };
        // The swap makes the data the safety copy, and the copy the data. What the first look read, before and after.
        let now = [("data", "new"), ("safety", "old")];
        for first in [
            &[("data", "old"), ("copy", "new")][..],
            &[("data", "new"), ("copy", "new")],
            &[("data", "old")],
            &[("data", "new")],
            &[],
        ] {
            let mut known = Known::default();
            known.add(read(first));
            let mut looks = 1;
            loop {
                looks += 1;
                let unread = known.unread(now.map(|(name, _)| name.to_owned()).into());
                if unread.is_empty() {
                    break;
                }
                known.add(read(
                    &now.into_iter().filter(|(name, _)| unread.contains(*name)).collect::<Vec<_>>(),
                ));
                assert!(looks < 4, "{first:?}: four looks were not enough");
            }
            let found = known
                .0
                .iter()
                .map(|(name, shelf)| (name.as_str(), shelf.as_ref().unwrap().image.id.as_str()));
            assert_eq!(found.collect::<Vec<_>>(), now, "{first:?}");
        }
    }

    #[test]
    fn a_pool_may_have_a_rados_namespace() {
        for text in ["replicapool", "replicapool/tenant"] {
            assert_eq!(Pool::parse(text).spec(), text);
        }
    }
}
