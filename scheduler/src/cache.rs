//! What the scheduler knows of the cluster without asking: protected StatefulSets, backups and restores, kept by watches.
//!
//! A tick reads only these, so the number of API requests does not grow with the number of databases.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use howdah_adapters::records::{PostgresBackup, PostgresRestore};
use howdah_core::names;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long the first lists may take before the process gives up and is restarted.
const FIRST_LIST_LIMIT: Duration = Duration::from_secs(120);

/// The caches; clones share them.
#[derive(Debug, Clone)]
pub struct Caches {
    databases: Store<StatefulSet>,
    backups: Store<PostgresBackup>,
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
        let (backups, backups_writer) = store();
        let (restores, restores_writer) = store();
        let everything = watcher::Config::default;
        let feeds = [
            feed(databases_writer, Api::all(client.clone()), protected, shutdown.clone()).boxed(),
            feed(backups_writer, Api::all(client.clone()), everything(), shutdown.clone()).boxed(),
            feed(restores_writer, Api::all(client.clone()), everything(), shutdown.clone()).boxed(),
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
            self.backups.wait_until_ready().await.context("list the PostgresBackups")?;
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
    pub fn databases(&self) -> Vec<Arc<StatefulSet>> {
        self.databases.state()
    }

    /// The backups of all namespaces.
    #[must_use]
    pub fn backups(&self) -> Vec<Arc<PostgresBackup>> {
        self.backups.state()
    }

    /// The restores of all namespaces.
    #[must_use]
    pub fn restores(&self) -> Vec<Arc<PostgresRestore>> {
        self.restores.state()
    }

    /// One protected StatefulSet.
    #[must_use]
    pub fn database(&self, namespace: &str, name: &str) -> Option<Arc<StatefulSet>> {
        self.databases.get(&ObjectRef::new(name).within(namespace))
    }
}

/// Keeps one cache up to date until the shutdown.
async fn feed<K>(
    writer: Writer<K>,
    api: Api<K>,
    config: watcher::Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
{
    let stream = watcher(api, config).default_backoff().reflect(writer);
    let mut stream = std::pin::pin!(stream);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = stream.next() => match event {
                Some(Ok(_)) => {}
                Some(Err(error)) => warn!(kind = %K::kind(&()), error = %error, "watch: trying again"),
                None => bail!("watch {}: the stream ended", K::kind(&())),
            },
        }
    }
}
