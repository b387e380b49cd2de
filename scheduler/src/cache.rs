//! What the scheduler knows of the cluster without asking: protected StatefulSets, backups and restores, kept by watches.
//!
//! A tick reads only these, so the number of API requests does not grow with the number of databases.

mod backups;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::BoxFuture;
use futures::{FutureExt as _, Stream, StreamExt as _, TryStreamExt as _};
use howdah_adapters::records::PostgresRestore;
use howdah_core::names;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use backups::{Backups, DatabaseKey, Drills, Open};

/// How long the first lists may take before the process gives up and is restarted: a million records come in 2,000 pages.
const FIRST_LIST_LIMIT: Duration = Duration::from_secs(600);

/// Where `kubectl apply` keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What is watched, and what went wrong.
type Failed = (&'static str, watcher::Error);

/// What a tick needs of a StatefulSet. A whole one takes ten times as much memory; an operation reads it when it begins,
/// and finds it as it is then.
pub type Protected = PartialObjectMeta<StatefulSet>;

/// The caches; clones share them.
#[derive(Debug, Clone)]
pub struct Caches {
    databases: Store<Protected>,
    backups: Backups,
    restores: Store<PostgresRestore>,
}

impl Caches {
    /// Starts the watches; the returned futures must be run for the caches to fill.
    pub fn new(
        client: &Client,
        shutdown: &CancellationToken,
    ) -> (Self, [BoxFuture<'static, anyhow::Result<()>>; 3]) {
        let protected =
            watcher::Config::default().labels(&format!("{}={}", names::PROTECT_LABEL, names::PROTECT_VALUE));
        let (databases, databases_writer) = store();
        let backups = Backups::default();
        let (restores, restores_writer) = store();
        let feeds = [
            follow(keep_databases(client, protected, databases_writer), shutdown.clone()).boxed(),
            follow(keep_backups(client, backups.clone()), shutdown.clone()).boxed(),
            follow(
                watcher(Api::all(client.clone()), watcher::Config::default())
                    .default_backoff()
                    .reflect(restores_writer)
                    .map_ok(drop)
                    .map_err(|error| ("PostgresRestore", error)),
                shutdown.clone(),
            )
            .boxed(),
        ];
        (Self { databases, backups, restores }, feeds)
    }

    /// Waits until all caches were filled once.
    ///
    /// # Errors
    /// If that takes too long, which a missing right or a missing CustomResourceDefinition does.
    pub async fn filled(&self) -> anyhow::Result<()> {
        let all = async {
            self.databases.wait_until_ready().await.context("list the protected StatefulSets")?;
            self.backups.filled().await;
            self.restores.wait_until_ready().await.context("list the PostgresRestores")
        };
        match tokio::time::timeout(FIRST_LIST_LIMIT, all).await {
            Ok(done) => done,
            Err(_) => bail!(
                "list StatefulSets, PostgresBackups and PostgresRestores in {} s: install the \
                 CustomResourceDefinitions and the ClusterRole of deploy/",
                FIRST_LIST_LIMIT.as_secs()
            ),
        }
    }

    /// The protected StatefulSets.
    #[must_use]
    pub fn databases(&self) -> Vec<Arc<Protected>> {
        self.databases.state()
    }

    /// The backups of all namespaces.
    #[must_use]
    pub fn backups(&self) -> &Backups {
        &self.backups
    }

    /// The restores of all namespaces.
    #[must_use]
    pub fn restores(&self) -> Vec<Arc<PostgresRestore>> {
        self.restores.state()
    }

    /// One protected StatefulSet.
    #[must_use]
    pub fn database(&self, namespace: &str, name: &str) -> Option<Arc<Protected>> {
        self.databases.get(&ObjectRef::new(name).within(namespace))
    }
}

/// The protected StatefulSets, without what nobody reads.
fn keep_databases(
    client: &Client,
    protected: watcher::Config,
    writer: Writer<Protected>,
) -> impl Stream<Item = Result<(), Failed>> + use<> {
    let lean = |database: &mut Protected| {
        database.metadata.managed_fields = None;
        database.annotations_mut().remove(LAST_APPLIED);
    };
    let stream = watcher(Api::<Protected>::all(client.clone()), protected)
        .default_backoff()
        .modify(lean)
        .reflect(writer);
    stream.map_ok(drop).map_err(|error| ("StatefulSet", error))
}

/// What a tick needs of the backups.
fn keep_backups(client: &Client, backups: Backups) -> impl Stream<Item = Result<(), Failed>> + use<> {
    let mut feed = backups::Feed::new(backups);
    let stream = watcher(Api::all(client.clone()), watcher::Config::default()).default_backoff();
    stream.map_ok(move |event| feed.take(&event)).map_err(|error| ("PostgresBackup", error))
}

/// Keeps one cache up to date until the shutdown.
async fn follow(
    stream: impl Stream<Item = Result<(), Failed>>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut stream = std::pin::pin!(stream);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = stream.next() => match event {
                Some(Ok(())) => {}
                Some(Err((kind, error))) => warn!(kind, error = %error, "watch: trying again"),
                None => bail!("a watch ended"),
            },
        }
    }
}
