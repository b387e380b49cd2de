//! The restores of a stage.

use std::collections::HashSet;
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use howdah_adapters::kubernetes::find;
use howdah_adapters::records::PostgresRestore;
use howdah_core::restore::RestoreStatus;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::{WatchStreamExt as _, watcher};

use super::Stage;

/// A restore takes some fifteen seconds, most of them the stop and the start of the server on a busy machine.
pub const RESTORE_LIMIT: Duration = Duration::from_secs(300);

impl Stage {
    fn restores(&self) -> Api<PostgresRestore> {
        Api::namespaced(self.client.clone(), self.namespace.name())
    }

    /// What the record says; none when there is no such record, or nothing yet.
    pub fn restore(&self, name: &str) -> Option<RestoreStatus> {
        self.runtime.block_on(find("get a restore", &self.restores(), name)).unwrap()?.status
    }

    /// The record with this status: no two are alike.
    pub fn restore_record(&self, status: &RestoreStatus) -> PostgresRestore {
        let all = self.runtime.block_on(self.restores().list(&ListParams::default())).unwrap().items;
        all.into_iter().find(|record| record.status.as_ref() == Some(status)).unwrap()
    }

    /// Waits until a restore's status is so, and returns at that moment.
    pub fn wait_restore(&self, restore: &str, so: impl Fn(&RestoreStatus) -> bool) {
        self.runtime.block_on(async {
            let only = watcher::Config::default().fields(&format!("metadata.name={restore}"));
            let stream = watcher(self.restores(), only).applied_objects();
            pin_mut!(stream);
            let reached = async {
                while let Some(Ok(found)) = stream.next().await {
                    if so(&found.status.unwrap_or_default()) {
                        return;
                    }
                }
            };
            tokio::time::timeout(RESTORE_LIMIT, reached).await.unwrap();
        });
    }

    /// Waits until one of the restores is so, and returns true at that moment, or false when all are over.
    pub fn wait_any(&self, restores: &[String], so: impl Fn(&RestoreStatus) -> bool) -> bool {
        self.runtime.block_on(async {
            let stream = watcher(self.restores(), watcher::Config::default()).applied_objects();
            pin_mut!(stream);
            let mut over = HashSet::new();
            let reached = async {
                while let Some(Ok(found)) = stream.next().await {
                    let name = found.metadata.name.unwrap_or_default();
                    let status = found.status.unwrap_or_default();
                    if !restores.contains(&name) {
                        continue;
                    }
                    if so(&status) {
                        return true;
                    }
                    if status.phase.is_terminal() {
                        over.insert(name);
                    }
                    if over.len() == restores.len() {
                        return false;
                    }
                }
                false
            };
            tokio::time::timeout(RESTORE_LIMIT, reached).await.unwrap()
        })
    }

    /// The uid of a pod; none when there is none, or when it is going.
    pub fn pod_uid(&self, pod: &str) -> Option<String> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), self.namespace.name());
        let found = self.runtime.block_on(find("get a pod", &pods, pod)).unwrap()?;
        found.metadata.deletion_timestamp.is_none().then_some(found.metadata.uid?)
    }
}
