//! The restores of a stage.

use std::time::Duration;

use howdah_adapters::kubernetes::find;
use howdah_adapters::records::PostgresRestore;
use howdah_core::restore::{Phase, RestoreStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};

use super::Stage;

/// A restore takes some fifteen seconds, most of them the stop and the start of the server on a busy machine.
pub const RESTORE_LIMIT: Duration = Duration::from_secs(300);

impl Stage {
    fn restores(&self) -> Api<PostgresRestore> {
        Api::namespaced(self.client.clone(), self.namespace.name())
    }

    /// What the record says; none when there is no such record, or nothing yet.
    pub fn restore(&self, name: &str) -> Option<RestoreStatus> {
        self.ask(|| self.runtime.block_on(find("get a restore", &self.restores(), name)))?.status
    }

    /// What the records of all restores say.
    pub fn all_restores(&self) -> Vec<RestoreStatus> {
        let all = self.runtime.block_on(self.restores().list(&ListParams::default())).unwrap().items;
        all.into_iter().filter_map(|restore| restore.status).collect()
    }

    /// The record with this status: no two are alike.
    pub fn restore_record(&self, status: &RestoreStatus) -> PostgresRestore {
        let all = self.runtime.block_on(self.restores().list(&ListParams::default())).unwrap().items;
        all.into_iter().find(|record| record.status.as_ref() == Some(status)).unwrap()
    }

    /// Waits until a restore's status is so, and returns at that moment.
    pub fn wait_restore(&self, restore: &str, so: impl Fn(&RestoreStatus) -> bool) {
        self.wait_record(self.restores(), restore, RESTORE_LIMIT, |record| {
            so(&record.status.clone().unwrap_or_default())
        });
    }

    /// The phases of these restores, in no order.
    pub fn restore_phases(&self, names: &[String]) -> Vec<Phase> {
        let all = self.runtime.block_on(self.restores().list(&ListParams::default())).unwrap().items;
        let wanted = all.into_iter().filter(|restore| names.contains(&restore.name_any()));
        wanted.map(|restore| restore.status.unwrap_or_default().phase).collect()
    }

    /// The uid of a pod; none when there is none, or when it is going.
    pub fn pod_uid(&self, pod: &str) -> Option<String> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), self.namespace.name());
        let found = self.runtime.block_on(find("get a pod", &pods, pod)).unwrap()?;
        found.metadata.deletion_timestamp.is_none().then_some(found.metadata.uid?)
    }
}
